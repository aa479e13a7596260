//! Serial console of the guest. The supervisor reads it continuously, keeps a bounded log and
//! detects the boot marks.

use std::{
    fs, io,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::Instant,
};

use tokio::{io::AsyncReadExt as _, net::unix::pipe, sync::watch};
use wrenn_proto::supervise::{CONSOLE_KEEP_BYTES, MachineStatus, marks};

use crate::supervise::elapsed_ms;

/// Maximum length of a line that is searched for a mark, in bytes.
const MAX_LINE_BYTES: usize = 512;

/// Records the console in `log` until the VMM closes it, and stores the times of the boot marks in
/// `status`.
pub(crate) async fn record(
    mut output: pipe::Receiver,
    log: PathBuf,
    status: watch::Sender<MachineStatus>,
    started: Instant,
) {
    let mut log = BoundedLog::open(log);
    let mut marks = MarkFinder::default();
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = output.read(&mut buffer).await {
        for mark in marks.feed(&buffer[..read]) {
            let now = Some(elapsed_ms(started));
            status.send_modify(|status| match mark {
                Mark::KernelDone => status.kernel_ms = now,
                Mark::InitDone => status.init_ms = now,
                Mark::BootFailed(reason) => status.boot_failure = Some(reason),
            });
        }
        if let Err(error) = log.append(&buffer[..read]) {
            // The console log is only for diagnosis, so a write error must not end the sandbox.
            tracing::warn!(%error, "failed to write the console log");
        }
    }
}

/// Boot mark: a line that the guest prints at a step of its boot (see [`marks`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// The kernel started its first program.
    KernelDone,
    /// The guest agent is about to start.
    InitDone,
    /// The guest's init failed the boot. The reason contains no control characters.
    BootFailed(String),
}

/// Finds marks in a stream that arrives in pieces.
#[derive(Debug, Default)]
pub struct MarkFinder {
    line: Vec<u8>,
}

impl MarkFinder {
    /// Returns the marks that end in `bytes`, the next piece of the stream.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Mark> {
        let mut found = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                found.extend(mark_of(&self.line));
                self.line.clear();
            } else if self.line.len() < MAX_LINE_BYTES {
                self.line.push(byte);
            }
        }
        found
    }
}

fn mark_of(line: &[u8]) -> Option<Mark> {
    match std::str::from_utf8(line).ok()?.trim() {
        marks::KERNEL_DONE => Some(Mark::KernelDone),
        marks::INIT_DONE => Some(Mark::InitDone),
        line => {
            let reason = line.strip_prefix(marks::BOOT_FAILED)?;
            // The guest is untrusted, and the reason reaches logs, terminals and a database.
            let printable = |c: char| if c.is_control() { ' ' } else { c };
            Some(Mark::BootFailed(reason.chars().map(printable).collect()))
        }
    }
}

/// Log file that keeps at least its last [`CONSOLE_KEEP_BYTES`] and at most twice as many.
struct BoundedLog {
    path: PathBuf,
    file: Option<fs::File>,
    len: u64,
}

impl BoundedLog {
    fn open(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            len: 0,
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len + bytes.len() as u64 > 2 * CONSOLE_KEEP_BYTES {
            self.file = None;
            self.len = keep_tail(&self.path, CONSOLE_KEEP_BYTES)?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            closed => {
                let file = fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(&self.path)?;
                self.len = file.metadata()?.len();
                closed.insert(file)
            }
        };
        file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

/// Replaces a file by its last `keep` bytes. Returns the new length.
fn keep_tail(path: &Path, keep: u64) -> io::Result<u64> {
    let mut file = fs::File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(keep)))?;
    let mut tail = Vec::new();
    file.take(keep).read_to_end(&mut tail)?;
    // Not flushed: the log need not survive a power failure, and the guest determines how often it
    // is cut.
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, &tail)?;
    fs::rename(&temporary, path)?;
    Ok(tail.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_detected_in_fragments_and_between_other_lines() {
        let mut finder = MarkFinder::default();
        assert!(finder.feed(b"[ 0.1] noise\r\nwrenn: ker").is_empty());
        assert_eq!(finder.feed(b"nel up\r\nmore\n"), [Mark::KernelDone]);
        assert_eq!(finder.feed(b"wrenn: starting envd\n"), [Mark::InitDone]);
        assert_eq!(
            finder.feed(b"wrenn: boot failed: no clock event device\r\n"),
            [Mark::BootFailed("no clock event device".to_owned())]
        );
    }

    #[test]
    fn a_reason_has_no_control_characters() {
        let mut finder = MarkFinder::default();
        assert_eq!(
            finder.feed(b"wrenn: boot failed: no\0 \x1b[2Jclock\n"),
            [Mark::BootFailed("no   [2Jclock".to_owned())]
        );
    }

    #[test]
    fn line_without_end_is_bounded_in_memory() {
        let mut finder = MarkFinder::default();
        for _ in 0..1000 {
            finder.feed(&[b'x'; 1000]);
        }
        assert!(finder.line.capacity() <= 2 * MAX_LINE_BYTES);
    }

    #[test]
    fn the_log_keeps_its_end_and_stays_within_bounds() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("console.log");
        let mut log = BoundedLog::open(path.clone());
        let chunk = [b'x'; 10_000];
        for _ in 0..200 {
            log.append(&chunk).expect("written");
        }
        log.append(b"the end\n").expect("written");
        let kept = fs::read(&path).expect("readable");
        assert!(kept.ends_with(b"the end\n"));
        let len = kept.len() as u64;
        assert!(
            (CONSOLE_KEEP_BYTES..=2 * CONSOLE_KEEP_BYTES).contains(&len),
            "{len}"
        );
    }
}
