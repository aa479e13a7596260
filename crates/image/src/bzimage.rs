//! Extracts the uncompressed kernel from a Linux `bzImage`.
//!
//! Source: the kernel's `Documentation/arch/x86/boot.rst`. Offsets in the file, little-endian:
//!
//! | off   | size | field          | meaning                                                      |
//! |-------|------|----------------|--------------------------------------------------------------|
//! | 0x1f1 |    1 | setup_sects    | 512-byte sectors of setup code after the first; 0 means 4    |
//! | 0x202 |    4 | header         | `HdrS`                                                       |
//! | 0x206 |    2 | version        | boot protocol; 0x0208 is the first version with a payload    |
//! | 0x248 |    4 | payload_offset | bytes, from the end of the setup code                        |
//! | 0x24c |    4 | payload_length | bytes; the last 4 contain the uncompressed size              |
//!
//! The payload is an LZ4 "legacy" stream: magic `02 21 4c 18`, then blocks. Each block is a u32
//! compressed size followed by the data, which is 8 MiB uncompressed except in the last block.

/// Uncompressed size of a block of the legacy LZ4 format, in bytes.
const BLOCK_BYTES: usize = 8 * 1024 * 1024;
/// Maximum size of a kernel, in bytes.
const MAX_KERNEL_BYTES: usize = 512 * 1024 * 1024;
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// Errors of extracting a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelFormatError {
    /// The file ends too early.
    #[error("kernel image truncated in its {0}")]
    Truncated(&'static str),
    /// The file has no boot header.
    #[error("not a bzImage: no `HdrS` at 0x202")]
    NotBzImage,
    /// The boot protocol is too old.
    #[error("unsupported boot protocol {0:#06x}: expected at least 0x0208")]
    OldProtocol(u16),
    /// The payload is not compressed with LZ4.
    #[error("kernel payload is not compressed with LZ4: it starts with {0:02x?}")]
    NotLz4([u8; 4]),
    /// A block cannot be decompressed.
    #[error("block {0} of the kernel payload is damaged")]
    BadBlock(usize),
    /// The result is not an ELF file, or not of the size that the image states.
    #[error("kernel payload decompresses to {got} bytes, expected an ELF file of {want} bytes")]
    NotElf {
        /// Actual size in bytes.
        got: usize,
        /// Expected size in bytes.
        want: usize,
    },
}

/// Returns the uncompressed kernel (ELF) of a `bzImage`.
///
/// # Errors
/// See [`KernelFormatError`]. Never panics, regardless of the input.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, KernelFormatError> {
    let payload = payload(image)?;
    let (stream, size) = payload
        .split_last_chunk::<4>()
        .ok_or(KernelFormatError::Truncated("payload"))?;
    let want = u32::from_le_bytes(*size) as usize;
    let kernel = decompress(stream)?;
    if kernel.len() == want && kernel.starts_with(b"\x7fELF") {
        Ok(kernel)
    } else {
        Err(KernelFormatError::NotElf {
            got: kernel.len(),
            want,
        })
    }
}

fn payload(image: &[u8]) -> Result<&[u8], KernelFormatError> {
    let field = |offset: usize| {
        image
            .get(offset..)
            .and_then(|rest| rest.first_chunk::<4>())
            .copied()
            .ok_or(KernelFormatError::Truncated("boot header"))
    };
    if field(0x202)? != *b"HdrS" {
        return Err(KernelFormatError::NotBzImage);
    }
    let [low, high, ..] = field(0x206)?;
    let version = u16::from_le_bytes([low, high]);
    if version < 0x0208 {
        return Err(KernelFormatError::OldProtocol(version));
    }
    let sectors = match field(0x1f1)?[0] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + u32::from_le_bytes(field(0x248)?) as usize;
    let length = u32::from_le_bytes(field(0x24c)?) as usize;
    image
        .get(start..)
        .and_then(|rest| rest.get(..length))
        .ok_or(KernelFormatError::Truncated("payload"))
}

fn decompress(stream: &[u8]) -> Result<Vec<u8>, KernelFormatError> {
    let (magic, mut rest) = stream
        .split_first_chunk::<4>()
        .ok_or(KernelFormatError::Truncated("payload"))?;
    if *magic != LZ4_LEGACY_MAGIC {
        return Err(KernelFormatError::NotLz4(*magic));
    }
    let mut kernel = Vec::new();
    let mut block = vec![0; BLOCK_BYTES];
    for number in 0.. {
        let Some((size, behind)) = rest.split_first_chunk::<4>() else {
            break;
        };
        let size = u32::from_le_bytes(*size) as usize;
        let data = behind
            .get(..size)
            .ok_or(KernelFormatError::BadBlock(number))?;
        let written = lz4_flex::block::decompress_into(data, &mut block)
            .map_err(|_| KernelFormatError::BadBlock(number))?;
        if kernel.len() + written > MAX_KERNEL_BYTES {
            return Err(KernelFormatError::BadBlock(number));
        }
        kernel.extend_from_slice(&block[..written]);
        rest = &behind[size..];
    }
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(kernel: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY_MAGIC.to_vec();
        for block in kernel.chunks(BLOCK_BYTES) {
            let data = lz4_flex::block::compress(block);
            payload.extend_from_slice(&u32::try_from(data.len()).expect("small").to_le_bytes());
            payload.extend_from_slice(&data);
        }
        payload.extend_from_slice(&u32::try_from(kernel.len()).expect("small").to_le_bytes());
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x24c..0x250]
            .copy_from_slice(&u32::try_from(payload.len()).expect("small").to_le_bytes());
        image.extend_from_slice(&payload);
        image
    }

    #[test]
    fn a_kernel_of_more_than_one_block_comes_out_whole() {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.resize(BLOCK_BYTES + 1000, 7);
        assert_eq!(extract_vmlinux(&image(&kernel)), Ok(kernel));
    }

    #[test]
    fn what_is_not_a_kernel_is_named() {
        assert_eq!(
            extract_vmlinux(b"short"),
            Err(KernelFormatError::Truncated("boot header"))
        );
        assert_eq!(
            extract_vmlinux(&[0; 2048]),
            Err(KernelFormatError::NotBzImage)
        );
        let mut truncated = image(b"\x7fELF and more");
        truncated.truncate(1030);
        assert_eq!(
            extract_vmlinux(&truncated),
            Err(KernelFormatError::Truncated("payload"))
        );
        assert!(matches!(
            extract_vmlinux(&image(b"not an ELF file")),
            Err(KernelFormatError::NotElf { .. })
        ));
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(at in 0_usize..1100, byte: u8, cut in 0_usize..1100) {
            let mut damaged = image(b"\x7fELF kernel kernel kernel kernel");
            let len = damaged.len();
            damaged[at % len] = byte;
            damaged.truncate(cut);
            let _ = extract_vmlinux(&damaged);
        }
    }
}
