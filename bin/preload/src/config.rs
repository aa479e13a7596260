//! Configuration, read once from the environment and removed from the environment.
//!
//! | variable                | meaning                                                            |
//! | `WRENN_MEMORY_PATH`     | absolute path of guest memory; if unset, the library does nothing  |
//! | `WRENN_MEMORY_FD`       | inherited descriptor of the memory, at most readable, returned for |
//! |                         | that path                                                          |
//! | `WRENN_MEMORY_MODE`     | `paged` or `anonymous`                                             |
//! | `WRENN_PAGER_SOCKET_FD` | inherited, connected unix stream socket of the page server         |
//! | `WRENN_UFFD_DEVICE_FD`  | inherited, open `/dev/userfaultfd`; optional                       |

use std::{
    ffi::{CString, OsString},
    mem::MaybeUninit,
    os::{fd::RawFd, unix::ffi::OsStringExt as _},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize},
    },
};

use wrenn_sys::uffd::Uffd;

use crate::report::fatal;

static CONFIG: OnceLock<Config> = OnceLock::new();

/// Mapping mode of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Paged,
    Anonymous,
}

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) path: CString,
    pub(crate) memory: RawFd,
    pub(crate) identity: Identity,
    /// Size of guest memory, in bytes.
    pub(crate) len: usize,
    pub(crate) mode: Mode,
    pub(crate) socket: RawFd,
    pub(crate) device: Option<RawFd>,
    /// True once the single mapping was made.
    pub(crate) mapped: AtomicBool,
    /// Address of the mapping; 0 before it is made.
    pub(crate) start: AtomicUsize,
    /// Userfaultfd of the mapping, in the mode `paged`. Open until the process ends.
    pub(crate) uffd: OnceLock<Uffd>,
}

/// Identity of the file behind a descriptor, independent of the descriptor's number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: libc::dev_t,
    inode: libc::ino_t,
}

/// Returns the configuration read at startup, or `None` before startup and if the library is
/// inactive. Takes no lock.
pub(crate) fn get() -> Option<&'static Config> {
    CONFIG.get()
}

/// Reads the environment. Must run before the process has other threads.
pub(crate) fn read() {
    let Some(path) = take("WRENN_MEMORY_PATH") else {
        return;
    };
    let Ok(path) = CString::new(path.into_vec()) else {
        fatal(&["WRENN_MEMORY_PATH contains a NUL byte"]);
    };
    if path.to_bytes().first() != Some(&b'/') {
        fatal(&["WRENN_MEMORY_PATH is not an absolute path"]);
    }
    let memory = required_descriptor("WRENN_MEMORY_FD");
    let Some((identity, len)) = look_at(memory) else {
        fatal(&["WRENN_MEMORY_FD is not an open descriptor"]);
    };
    if len == 0 {
        fatal(&["WRENN_MEMORY_FD refers to an empty file"]);
    }
    let mode = match take("WRENN_MEMORY_MODE")
        .as_deref()
        .and_then(|mode| mode.to_str())
    {
        Some("paged") => Mode::Paged,
        Some("anonymous") => Mode::Anonymous,
        _ => fatal(&["WRENN_MEMORY_MODE is invalid, expected `paged` or `anonymous`"]),
    };
    let config = Config {
        path,
        memory,
        identity,
        len,
        mode,
        socket: required_descriptor("WRENN_PAGER_SOCKET_FD"),
        device: descriptor("WRENN_UFFD_DEVICE_FD"),
        mapped: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        uffd: OnceLock::new(),
    };
    if CONFIG.set(config).is_err() {
        fatal(&["the library was initialized twice"]);
    }
}

/// Returns the identity and the size of the file behind `fd`.
pub(crate) fn look_at(fd: RawFd) -> Option<(Identity, usize)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the call writes one `stat` to the pointer, or fails.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call succeeded, so `stat` is initialized.
    let stat = unsafe { stat.assume_init() };
    let identity = Identity {
        device: stat.st_dev,
        inode: stat.st_ino,
    };
    Some((identity, usize::try_from(stat.st_size).ok()?))
}

fn take(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: runs before `main`, when no other thread can read the environment.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

fn required_descriptor(name: &str) -> RawFd {
    descriptor(name).unwrap_or_else(|| fatal(&[name, " is not set"]))
}

/// Reads a descriptor number and sets close-on-exec, so that children do not inherit the
/// descriptor.
fn descriptor(name: &str) -> Option<RawFd> {
    let value = take(name)?;
    let number = value.to_str().and_then(|text| text.parse::<RawFd>().ok());
    let Some(fd) = number.filter(|fd| *fd >= 0) else {
        fatal(&[name, " is not a descriptor number"]);
    };
    // SAFETY: `fcntl` takes its arguments by value; a number that is not open is an error.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        fatal(&[name, " is not an open descriptor"]);
    }
    Some(fd)
}
