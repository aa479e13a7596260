//! Header of a qcow2 file, checked before any program of QEMU opens the file.
//!
//! A compromised VMM can write any header. QEMU's block layer believes it: a backing file or a data
//! file names another file that is opened, on the host where the reader runs. So only headers of
//! exactly the form are accepted that `qemu-img create` writes and that a VM leaves unchanged.
//!
//! All numbers are big-endian. Source: QEMU's `docs/interop/qcow2.txt`.
//!
//! | offset | size | field                    | accepted                                         |
//! |-------:|-----:|--------------------------|--------------------------------------------------|
//! |      0 |    4 | magic                    | `QFI\xfb`                                        |
//! |      4 |    4 | version                  | 3                                                |
//! |      8 |    8 | offset of backing file   | 0, or inside the first cluster                   |
//! |     16 |    4 | length of backing file   | name: none, or [`BASE_DISK`]                     |
//! |     20 |    4 | bits per cluster         | 16                                               |
//! |     24 |    8 | size of the disk, bytes  | that of the disk (checked by the caller)         |
//! |     32 |    4 | encryption               | 0                                                |
//! |     60 |    4 | internal snapshots       | 0                                                |
//! |     72 |    8 | incompatible features    | 0: no data file, not corrupt, no other format    |
//! |     88 |    8 | autoclear features       | 0: no bitmaps, no raw data file                  |
//! |     96 |    4 | refcount order           | 4                                                |
//! |    100 |    4 | length of the header     | 104 or 112                                       |
//! |    104 |    4 | compression, padding     | 0 (zlib)                                         |
//! |        |      | extensions               | backing format, feature names                    |

use std::{fs, io, io::Read as _, os::unix::fs::FileTypeExt as _, path::Path};

use wrenn_jail::BASE_DISK;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: usize = 1 << CLUSTER_BITS;
const REFCOUNT_ORDER: u32 = 4;
const HEADER_LENGTHS: [u32; 2] = [104, 112];

/// Offset of the compression type, which a header of the smaller length does not have.
const COMPRESSION_OFFSET: u32 = 104;

/// Extension: end of the extensions.
const END: u32 = 0;
/// Extension: format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension: names of feature bits.
const FEATURE_NAMES: u32 = 0x6803_f857;

/// Accepted header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Size of the disk, in bytes.
    pub size_bytes: u64,
    /// Name of the backing file.
    pub backing_file: Option<String>,
}

/// Reason why a header is rejected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file cannot be read.
    #[error("failed to read its header")]
    Read(#[source] io::Error),
    /// The file is a link, a device or a directory.
    #[error("it is not a regular file")]
    NotAFile,
    /// The file ends within the header.
    #[error("it ends within its header")]
    Truncated,
    /// The file is not a qcow2 file.
    #[error("it is not a qcow2 file")]
    Magic,
    /// A field has another value than the one that is written.
    #[error("`{field}` is {got:#x}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        got: u64,
    },
    /// The header names another backing file.
    #[error("it names the backing file {0:?}")]
    BackingFile(String),
    /// The header has an extension that is not written.
    #[error("it has a header extension of type {0:#x}")]
    Extension(u32),
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn read(path: &Path) -> Result<Self, HeaderError> {
        let meta = fs::symlink_metadata(path).map_err(HeaderError::Read)?;
        let kind = meta.file_type();
        if !kind.is_file() || kind.is_fifo() {
            return Err(HeaderError::NotAFile);
        }
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(HeaderError::Read)?;
        let limit = u64::try_from(CLUSTER_BYTES).unwrap_or(u64::MAX);
        let read = file.take(limit).read_to_end(&mut bytes);
        read.map_err(HeaderError::Read)?;
        Self::parse(&bytes)
    }

    /// Checks a header. `bytes` is the beginning of the file: at most its first cluster.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(HeaderError::Magic);
        }
        for (field, offset, expected) in [
            ("version", 4, VERSION),
            ("cluster_bits", 20, CLUSTER_BITS),
            ("crypt_method", 32, 0),
            ("nb_snapshots", 60, 0),
            ("refcount_order", 96, REFCOUNT_ORDER),
        ] {
            expect(
                field,
                u64::from(u32_at(bytes, offset)?),
                u64::from(expected),
            )?;
        }
        expect("incompatible_features", u64_at(bytes, 72)?, 0)?;
        expect("autoclear_features", u64_at(bytes, 88)?, 0)?;
        let length = u32_at(bytes, 100)?;
        if !HEADER_LENGTHS.contains(&length) {
            let got = u64::from(length);
            return Err(HeaderError::Field {
                field: "header_length",
                got,
            });
        }
        if length > COMPRESSION_OFFSET {
            let compression = u32_at(bytes, 104)?;
            expect("compression_type", u64::from(compression), 0)?;
        }
        check_extensions(bytes, to_usize("header_length", u64::from(length))?)?;
        Ok(Self {
            size_bytes: u64_at(bytes, 24)?,
            backing_file: backing_file(bytes)?,
        })
    }
}

/// Returns the name of the backing file, if it is the one that is written.
fn backing_file(bytes: &[u8]) -> Result<Option<String>, HeaderError> {
    let offset = u64_at(bytes, 8)?;
    if offset == 0 {
        return Ok(None);
    }
    let offset = to_usize("backing_file_offset", offset)?;
    let length = to_usize("backing_file_size", u64::from(u32_at(bytes, 16)?))?;
    let end = offset.checked_add(length).ok_or(HeaderError::Truncated)?;
    let name = bytes.get(offset..end).ok_or(HeaderError::Truncated)?;
    let name = String::from_utf8_lossy(name).into_owned();
    if name == BASE_DISK {
        return Ok(Some(name));
    }
    Err(HeaderError::BackingFile(name))
}

fn check_extensions(bytes: &[u8], mut offset: usize) -> Result<(), HeaderError> {
    loop {
        let kind = u32_at(bytes, offset)?;
        match kind {
            END => return Ok(()),
            BACKING_FORMAT | FEATURE_NAMES => {}
            other => return Err(HeaderError::Extension(other)),
        }
        let length = to_usize("extension length", u64::from(u32_at(bytes, offset + 4)?))?;
        // The data is padded to a multiple of 8 bytes.
        offset += 8 + length.next_multiple_of(8);
    }
}

fn expect(field: &'static str, got: u64, expected: u64) -> Result<(), HeaderError> {
    if got == expected {
        return Ok(());
    }
    Err(HeaderError::Field { field, got })
}

/// Converts an offset or a length, which must be inside the first cluster.
fn to_usize(field: &'static str, got: u64) -> Result<usize, HeaderError> {
    let inside = usize::try_from(got)
        .ok()
        .filter(|value| *value <= CLUSTER_BYTES);
    inside.ok_or(HeaderError::Field { field, got })
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, HeaderError> {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes
        .map(|bytes| u32::from_be_bytes(*bytes))
        .ok_or(HeaderError::Truncated)
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, HeaderError> {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes
        .map(|bytes| u64::from_be_bytes(*bytes))
        .ok_or(HeaderError::Truncated)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// Creates a file with `qemu-img`.
    fn create(args: &[&str]) -> Result<Header, HeaderError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        let data = dir.path().join("data");
        let args = args
            .iter()
            .map(|arg| arg.replace('@', data.to_str().unwrap()));
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-u"])
            .args(args)
            .arg(&path)
            .arg("8M")
            .status()
            .unwrap();
        assert!(status.success());
        Header::read(&path)
    }

    fn ours() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        let status = Command::new("qemu-img")
            .args([
                "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", BASE_DISK,
            ])
            .arg(&path)
            .arg("8M")
            .status()
            .unwrap();
        assert!(status.success());
        let mut bytes = fs::read(path).unwrap();
        bytes.truncate(CLUSTER_BYTES);
        bytes
    }

    #[test]
    fn the_form_that_is_written_is_accepted() {
        let header = create(&["-F", "raw", "-b", BASE_DISK]).unwrap();
        assert_eq!(header.size_bytes, 8 << 20);
        assert_eq!(header.backing_file.as_deref(), Some(BASE_DISK));
        assert_eq!(create(&[]).unwrap().backing_file, None);
    }

    #[test]
    fn every_other_form_is_rejected_with_the_reason() {
        for (args, reason) in [
            (&["-F", "raw", "-b", "/etc/shadow"][..], "\"/etc/shadow\""),
            (&["-F", "raw", "-b", "json:{}"][..], "json:"),
            (&["-o", "data_file=@"][..], "incompatible_features"),
            (
                &["-o", "data_file=@,data_file_raw=on"][..],
                "incompatible_features",
            ),
            (&["-o", "cluster_size=4096"][..], "cluster_bits"),
            (&["-o", "compat=0.10"][..], "version"),
            (&["-o", "extended_l2=on"][..], "incompatible_features"),
            (&["-o", "refcount_bits=64"][..], "refcount_order"),
        ] {
            let error = create(args).unwrap_err().to_string();
            assert!(error.contains(reason), "{args:?}: {error}");
        }
        // A data file's name without its feature bit.
        let mut bytes = ours();
        bytes[112..116].copy_from_slice(b"DATA");
        let error = Header::parse(&bytes).unwrap_err();
        assert!(
            matches!(error, HeaderError::Extension(0x4441_5441)),
            "{error}"
        );
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/shadow", &link).unwrap();
        assert!(matches!(Header::read(&link), Err(HeaderError::NotAFile)));
        assert!(matches!(
            Header::parse(b"QFI\xfb"),
            Err(HeaderError::Truncated)
        ));
    }

    proptest! {
        #[test]
        fn no_input_panics_and_an_accepted_one_names_no_other_file(
            changes in prop::collection::vec((0..256_usize, any::<u8>()), 0..12),
            length in 0..CLUSTER_BYTES,
        ) {
            let mut bytes = ours();
            for (offset, value) in changes {
                bytes[offset] = value;
            }
            bytes.truncate(length);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.backing_file.is_none_or(|name| name == BASE_DISK));
                prop_assert_eq!(&bytes[72..80], &[0; 8]);
            }
        }
    }
}
