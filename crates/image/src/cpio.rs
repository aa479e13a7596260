//! Writer of cpio archives in "newc" format, which the kernel unpacks as its initramfs.
//!
//! Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`. Each entry is
//! a header of 110 ASCII bytes (magic `070701`, then 13 fields of 8 hexadecimal digits), the name
//! with a NUL, padding to 4 bytes, the content, padding to 4 bytes. An entry `TRAILER!!!` ends the
//! archive.

/// Archive in memory.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// Adds a directory. Parents must be added first.
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, (0, 0), &[]);
    }

    /// Adds an executable file.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, EXECUTABLE, (0, 0), content);
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// Returns the finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let links = 1;
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_documented_bytes() {
        let mut archive = Archive::default();
        archive.file("a", b"hello");
        let golden = "070701\
            00000001000081ed00000000000000000000000100000000\
            00000005000000000000000000000000000000000000000200000000\
            a\0hello\0\0\0\
            070701\
            00000001000000000000000000000000000000010000000000000000\
            000000000000000000000000000000000000000b00000000\
            TRAILER!!!\0\0\0\0";
        assert_eq!(String::from_utf8(archive.finish()).expect("ASCII"), golden);
    }
}
