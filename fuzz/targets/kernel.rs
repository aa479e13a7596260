//! Kernel image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = wrenn_image::extract_vmlinux(bytes);
});
