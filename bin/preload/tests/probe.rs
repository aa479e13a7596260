//! Opens and maps memory as QEMU's memory-backend-file does, and then runs the commands in its
//! arguments.
//!
//! `probe PATH LEN [sum | write OFFSET | discard OFFSET LEN | load OFFSET | map-again | map-half |
//! wait]…`
#![allow(unsafe_code, reason = "calls the C library as QEMU does")]

use std::{env, ffi::CString, io, ptr};

fn main() -> io::Result<()> {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().ok_or(io::ErrorKind::InvalidInput)?;
    let len = arguments.next().and_then(|len| len.parse().ok());
    let len: usize = len.ok_or(io::ErrorKind::InvalidInput)?;
    let path = CString::new(path)?;
    // SAFETY: the path is a NUL-terminated string.
    let fd = check(unsafe { libc::open64(path.as_ptr(), libc::O_RDWR) })?;
    // SAFETY: `lseek64` takes its arguments by value.
    let end = unsafe { libc::lseek64(fd, 0, libc::SEEK_END) };
    let memory = map_at_reserved(fd, len)?;
    for name in [
        "MEMORY_PATH",
        "MEMORY_FD",
        "MEMORY_MODE",
        "PAGER_SOCKET_FD",
        "UFFD_DEVICE_FD",
    ] {
        assert!(
            env::var_os(format!("WRENN_{name}")).is_none(),
            "{name} is left"
        );
    }
    println!("mapped {:#x} of {end}", memory.addr());
    while let Some(word) = arguments.next() {
        match word.as_str() {
            "sum" => println!("sum {}", sum(memory, len)),
            "write" => {
                // SAFETY: the offset is within the mapping.
                let place = unsafe { memory.add(number(&mut arguments)?) };
                // SAFETY: the mapping is writable, and the program has no other thread.
                unsafe { place.write_volatile(1) };
            }
            "load" => {
                // SAFETY: the offset is within the mapping.
                let place = unsafe { memory.add(number(&mut arguments)?) }.cast::<u64>();
                // SAFETY: the mapping is readable, and the tests pass multiples of 8.
                let word = unsafe { place.read_volatile() };
                println!("word {word}");
            }
            "discard" => {
                let (offset, len) = (number(&mut arguments)?, number(&mut arguments)?);
                discard(fd, memory, offset, len)?;
                println!("discarded");
            }
            "map-again" => {
                map_at_reserved(fd, len)?;
            }
            "map-half" => {
                map_at_reserved(fd, len / 2)?;
            }
            "wait" => {
                io::stdin().read_line(&mut String::new())?;
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
    }
    Ok(())
}

fn number(arguments: &mut impl Iterator<Item = String>) -> io::Result<usize> {
    let number = arguments.next().and_then(|number| number.parse().ok());
    number.ok_or(io::ErrorKind::InvalidInput.into())
}

/// Discards a range as QEMU's `ram_block_discard_range` does.
fn discard(fd: i32, memory: *mut u8, offset: usize, len: usize) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let range = (i64::try_from(offset), i64::try_from(len));
    let (Ok(first), Ok(bytes)) = range else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: `fallocate64` takes its arguments by value.
    check(unsafe { libc::fallocate64(fd, mode, first, bytes) })?;
    // SAFETY: the offset is within the mapping.
    let start = unsafe { memory.add(offset) };
    // SAFETY: the range is in the mapping, into which the program holds no reference.
    check(unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) })?;
    Ok(())
}

/// Reserves addresses, maps the file over them, and gives the same advice as QEMU.
fn map_at_reserved(fd: i32, len: usize) -> io::Result<*mut u8> {
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an unused address range.
    let area = unsafe { libc::mmap64(ptr::null_mut(), len, libc::PROT_NONE, reserve, -1, 0) };
    if area == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range was just reserved for this mapping.
    let memory = unsafe { libc::mmap64(area, len, protection, flags, fd, 0) };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    assert_eq!(memory, area);
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTFORK] {
        // SAFETY: the advice changes nothing that this program can observe.
        let _ = unsafe { libc::madvise(memory, len, advice) };
    }
    Ok(memory.cast())
}

fn sum(memory: *mut u8, len: usize) -> u64 {
    let mut sum = 0_u64;
    for at in 0..len {
        // SAFETY: the offset is within the mapping.
        let place = unsafe { memory.add(at) };
        // SAFETY: the mapping is readable.
        let byte = unsafe { place.read_volatile() };
        sum = sum.rotate_left(1) ^ u64::from(byte);
    }
    sum
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
