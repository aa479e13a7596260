//! Internal commands, each of which Wrenn runs as one process per sandbox.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use crate::{accel, logging};

/// Runs an internal command if the arguments name one, and returns its exit code.
pub(crate) fn dispatch(args: &[OsString]) -> Option<i32> {
    let (command, rest) = args.split_first()?;
    match command.to_str()? {
        "supervise" => Some(supervise(rest)),
        "jail" => Some(with_path("jail", "--spec", rest, |spec| {
            Err(wrenn_jail::enter(spec).into())
        })),
        command if command == accel::RUN_GUEST && rest.is_empty() => {
            let ran = wrenn_sys::kvm::run_tiny_guest(Path::new("/dev/kvm"));
            Some(exit_code(command, ran.map_err(Into::into)))
        }
        _ => None,
    }
}

/// Parses `--dir DIR`, optionally followed by `--memory-fd N`, and runs a supervisor.
fn supervise(args: &[OsString]) -> i32 {
    let (dir, memory) = match args {
        [flag, dir] if flag == "--dir" => (dir, None),
        [flag, dir, fd, number] if flag == "--dir" && fd == "--memory-fd" => (dir, Some(number)),
        _ => {
            crate::output::error(format_args!(
                "wrenn: `wrenn supervise` is internal: expected --dir PATH [--memory-fd N]"
            ));
            return 2;
        }
    };
    let dir = PathBuf::from(dir);
    if let Err(error) = logging::init_supervisor(&dir) {
        // The sandbox can be used without a log.
        crate::output::error(format_args!(
            "wrenn supervise: {}",
            crate::output::in_full(error.as_ref())
        ));
    }
    let inherited = memory.map(|number| {
        let number = number.to_str().and_then(|number| number.parse().ok());
        wrenn_sys::session::take_inherited(number.unwrap_or(-1))
    });
    let ended = match inherited.transpose() {
        Ok(memory) => wrenn_supervisor::run(&dir, memory).map_err(Into::into),
        Err(error) => {
            Err(anyhow::Error::new(error).context("failed to take over the image's memory"))
        }
    };
    match ended {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(
                reason = crate::output::in_full(error.as_ref()),
                "supervisor failed"
            );
            1
        }
    }
}

fn exit_code(command: &str, ended: Result<(), anyhow::Error>) -> i32 {
    match ended {
        Ok(()) => 0,
        Err(error) => {
            crate::output::error(format_args!(
                "wrenn {command}: {}",
                crate::output::in_full(error.as_ref())
            ));
            1
        }
    }
}

fn with_path(
    command: &str,
    flag: &str,
    args: &[OsString],
    run: impl FnOnce(&std::path::Path) -> Result<(), anyhow::Error>,
) -> i32 {
    let [given, path] = args else {
        crate::output::error(format_args!(
            "wrenn: `wrenn {command}` is internal: expected only {flag} PATH"
        ));
        return 2;
    };
    if given != flag {
        crate::output::error(format_args!(
            "wrenn: `wrenn {command}` is internal: expected only {flag} PATH"
        ));
        return 2;
    }
    exit_code(command, run(&PathBuf::from(path)))
}
