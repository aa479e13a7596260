//! Kernel image. An extracted kernel must be an ELF file.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// Length of the setup code of a repaired image: its first sector and one more, in bytes.
const SETUP_BYTES: usize = 1024;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    if let Some(repaired) = repair(bytes) {
        check(&repaired);
    }
});

fn check(bytes: &[u8]) {
    if let Ok(kernel) = wrenn_image::extract_vmlinux(bytes) {
        assert!(kernel.starts_with(b"\x7fELF"));
    }
}

/// Makes the boot header and the magic of the payload valid, so that the compressed blocks are
/// read.
fn repair(bytes: &[u8]) -> Option<Vec<u8>> {
    let payload = bytes
        .len()
        .checked_sub(SETUP_BYTES)
        .filter(|len| *len >= 4)?;
    let mut bytes = bytes.to_vec();
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x248, &0_u32.to_le_bytes());
    put(0x24c, &u32::try_from(payload).ok()?.to_le_bytes());
    put(SETUP_BYTES, &[0x02, 0x21, 0x4c, 0x18]);
    Some(bytes)
}
