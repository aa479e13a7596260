//! Fatal errors: reports the reason on standard error and aborts, without allocating.

/// Writes the parts as one line and ends the process.
pub(crate) fn fatal(parts: &[&str]) -> ! {
    let error = std::io::Error::last_os_error();
    write("wrenn-preload: ");
    for part in parts {
        write(part);
    }
    let mut digits = [0_u8; 12];
    write(" (errno ");
    write(decimal(error.raw_os_error().unwrap_or(0), &mut digits));
    write(")\n");
    // SAFETY: `abort` takes no arguments and does not return.
    unsafe { libc::abort() }
}

fn write(text: &str) {
    // SAFETY: the pointer and the length belong to one string. A failed write is ignored, because
    // there is no other way to report an error.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

fn decimal(number: i32, buffer: &mut [u8; 12]) -> &str {
    let mut rest = number.unsigned_abs();
    let mut first = buffer.len();
    for (at, digit) in buffer.iter_mut().enumerate().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        first = at;
        if rest == 0 {
            break;
        }
    }
    let digits = buffer.get(first..).unwrap_or_default();
    std::str::from_utf8(digits).unwrap_or("?")
}
