//! Conversion of a process's exit status to the contract's end event.

use std::{os::unix::process::ExitStatusExt as _, process::ExitStatus};

use wrenn_proto::rpc::process::process_event::EndEvent;

/// Returns the end event of a process: `exit status 3` and the exit code, or `signal: killed` and
/// -1.
#[must_use]
pub fn end_event(status: ExitStatus) -> EndEvent {
    if let Some(code) = status.code() {
        let text = format!("exit status {code}");
        return EndEvent {
            exit_code: code,
            exited: true,
            error: (code != 0).then(|| text.clone()),
            status: text,
            ..Default::default()
        };
    }
    let signal = status.signal().unwrap_or_default();
    let core = if status.core_dumped() {
        " (core dumped)"
    } else {
        ""
    };
    let text = format!("signal: {}{core}", signal_text(signal));
    EndEvent {
        exit_code: -1,
        exited: false,
        error: Some(text.clone()),
        status: text,
        ..Default::default()
    }
}

/// Returns the description of a signal that clients expect.
fn signal_text(signal: i32) -> String {
    let text = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        _ => return format!("signal {signal}"),
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_words() {
        let end = |raw| end_event(ExitStatus::from_raw(raw));
        let fine = end(0);
        assert_eq!((fine.exit_code, fine.exited, fine.error), (0, true, None));
        assert_eq!(fine.status, "exit status 0");
        let failed = end(3 << 8);
        assert_eq!(failed.error.as_deref(), Some("exit status 3"));
        let killed = end(9);
        assert_eq!((killed.exit_code, killed.exited), (-1, false));
        assert_eq!(killed.error.as_deref(), Some("signal: killed"));
    }
}
