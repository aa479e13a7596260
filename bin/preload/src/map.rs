//! Interposed `mmap`: the mapping of guest memory becomes private, and the page server handles its
//! faults.

use std::{
    ffi::{c_int, c_void},
    fmt::Write as _,
    os::fd::{AsFd as _, BorrowedFd, RawFd},
    sync::atomic::Ordering,
};

use wrenn_sys::{
    scm,
    uffd::{Features, Uffd, UffdError},
};

use crate::{
    config::{self, Config, Mode},
    report::fatal,
};

/// # Safety
/// As for the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    unsafe {
        map_any(Request {
            address,
            len,
            protection,
            flags,
            fd,
            offset,
        })
    }
}

/// # Safety
/// As for the C library's function.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    unsafe {
        map_any(Request {
            address,
            len,
            protection,
            flags,
            fd,
            offset,
        })
    }
}

struct Request {
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
}

/// # Safety
/// As for the C library's `mmap`.
unsafe fn map_any(mut request: Request) -> *mut c_void {
    let config = config::get().filter(|config| is_guest_memory(config, &request));
    let Some(config) = config else {
        // SAFETY: guaranteed by the caller.
        return unsafe { map(&request) };
    };
    if request.len != config.len || request.offset != 0 {
        fatal(&["attempt to map only a part of guest memory"]);
    }
    if config.mapped.swap(true, Ordering::SeqCst) {
        fatal(&["attempt to map guest memory a second time"]);
    }
    // The mapping is neither shared nor populated. Populating would fill the memory before the page
    // server is involved.
    let kept = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE;
    request.flags = request.flags & kept | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    if config.mode == Mode::Anonymous {
        request.flags |= libc::MAP_ANONYMOUS;
        request.fd = -1;
    }
    // SAFETY: this is the caller's mapping, backed by another kind of memory.
    let start = unsafe { map(&request) };
    if start == libc::MAP_FAILED {
        fatal(&["failed to map guest memory"]);
    }
    announce(config, start.addr() as u64);
    config.start.store(start.addr(), Ordering::SeqCst);
    start
}

/// # Safety
/// As for the C library's `mmap`.
unsafe fn map(request: &Request) -> *mut c_void {
    // SAFETY: the arguments are the caller's, who is responsible for the memory that MAP_FIXED
    // replaces.
    let start = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            request.address,
            request.len,
            request.protection,
            request.flags,
            request.fd,
            request.offset,
        )
    };
    // -1 is MAP_FAILED.
    start as *mut c_void
}

/// True if the request maps the file of guest memory, through any descriptor.
fn is_guest_memory(config: &Config, request: &Request) -> bool {
    if request.fd < 0 || request.flags & libc::MAP_ANONYMOUS != 0 {
        return false;
    }
    config::look_at(request.fd).is_some_and(|(identity, _)| identity == config.identity)
}

/// Reports the address of guest memory to the page server. In `paged` mode, also sends the
/// userfaultfd.
fn announce(config: &Config, start: u64) {
    let mut message = Message::default();
    let (len, page) = (config.len, wrenn_sys::mapping::PAGE_BYTES);
    let written = write!(
        message,
        r#"[{{"base_host_virt_addr":{start},"size":{len},"offset":0,"page_size":{page},"page_size_kib":{page}}}]"#
    );
    if written.is_err() {
        fatal(&["message to the page server exceeds the buffer"]);
    }
    // SAFETY: the descriptor was open at startup, is owned by this library, and is closed below.
    let socket = unsafe { BorrowedFd::borrow_raw(config.socket) };
    let sent = match config.mode {
        Mode::Anonymous => scm::send(socket, message.bytes(), &[]),
        Mode::Paged => {
            // The userfaultfd stays open until the process ends; see the crate documentation.
            let uffd = config.uffd.get_or_init(|| register(config, start));
            scm::send(socket, message.bytes(), &[uffd.as_fd()])
        }
    };
    if sent.is_err() {
        fatal(&["failed to notify the page server"]);
    }
    close(config.socket);
    if let Some(device) = config.device {
        close(device);
    }
}

fn register(config: &Config, start: u64) -> Uffd {
    let registered = make(config).and_then(|uffd| {
        // Without EVENT_REMOVE: the page server need not know what the guest gives back, and QEMU
        // does not wait for it.
        uffd.handshake(Features::MISSING_SHMEM, Features::NONE)?;
        uffd.register_missing(start, config.len as u64)?;
        Ok(uffd)
    });
    match registered {
        Ok(uffd) => uffd,
        Err(UffdError::Other { request, .. }) => fatal(&[request, " failed"]),
        Err(_) => fatal(&["failed to register guest memory with userfaultfd"]),
    }
}

fn make(config: &Config) -> Result<Uffd, UffdError> {
    match config.device {
        // SAFETY: the descriptor was open at startup, is owned by this library, and is closed
        // later.
        Some(device) => Uffd::from_device(unsafe { BorrowedFd::borrow_raw(device) }),
        None => Uffd::open(),
    }
}

fn close(fd: RawFd) {
    // SAFETY: the descriptor was inherited for this library, which does not use it again.
    let _ = unsafe { libc::close(fd) };
}

/// Text in a buffer of fixed size.
struct Message {
    buffer: [u8; 256],
    len: usize,
}

impl Default for Message {
    fn default() -> Self {
        Self {
            buffer: [0; 256],
            len: 0,
        }
    }
}

impl Message {
    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }
}

impl std::fmt::Write for Message {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.len + text.len();
        let place = self.buffer.get_mut(self.len..end).ok_or(std::fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}
