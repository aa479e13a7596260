//! Interposed `open` family: opening the configured path returns a duplicate of the inherited
//! descriptor.
//!
//! Every other path is passed to the kernel. The C library's functions take the mode as a variadic
//! argument. On 64-bit Linux that argument is passed like a fixed one, and has no meaning unless
//! the call may create a file.

use std::ffi::{CStr, c_char, c_int};

use crate::{config, report::fatal};

/// # Safety
/// `path` is NULL or a string, as for the C library's function. The same applies to the whole
/// family.
#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(libc::AT_FDCWD, path, flags, mode) }
}

/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(libc::AT_FDCWD, path, flags, mode) }
}

/// Entry point that a fortified program calls when it passes no mode.
///
/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(libc::AT_FDCWD, path, flags, 0) }
}

/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(libc::AT_FDCWD, path, flags, 0) }
}

/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn openat(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(directory, path, flags, mode) }
}

/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn openat64(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(directory, path, flags, mode) }
}

/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn __openat_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(directory, path, flags, 0) }
}

/// # Safety
/// As for [`open`].
#[unsafe(no_mangle)]
unsafe extern "C" fn __openat64_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: guaranteed by the caller.
    unsafe { open_any(directory, path, flags, 0) }
}

/// # Safety
/// As for [`open`].
unsafe fn open_any(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    if let Some(config) = config::get()
        && !path.is_null()
    {
        // SAFETY: the caller passes a string, and the pointer is not NULL.
        let wanted = unsafe { CStr::from_ptr(path) };
        if wanted == config.path.as_c_str() {
            return copy_of_memory(config.memory);
        }
    }
    let may_make = flags & libc::O_CREAT != 0 || flags & libc::O_TMPFILE == libc::O_TMPFILE;
    let mode = if may_make { mode } else { 0 };
    // SAFETY: the arguments are the caller's; the kernel checks the pointer.
    let fd = unsafe { libc::syscall(libc::SYS_openat, directory, path, flags, mode) };
    c_int::try_from(fd).unwrap_or(-1)
}

fn copy_of_memory(memory: c_int) -> c_int {
    // SAFETY: `fcntl` takes its arguments by value.
    let fd = unsafe { libc::fcntl(memory, libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        fatal(&["failed to duplicate the memory descriptor"]);
    }
    fd
}
