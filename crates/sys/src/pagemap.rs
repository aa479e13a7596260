//! Private pages of another process's mapping, and their content.
//!
//! Reads `/proc/<pid>/pagemap`, either by the PAGEMAP_SCAN request (Linux 6.7 and newer) or entry
//! by entry. A page is dirty if it is anonymous: present or swapped out, not of a file, and not the
//! kernel's zero page. A page that the process never wrote, or that it discarded and had zeroed,
//! may be mapped to that zero page. The process must not run during the scan; otherwise the result
//! is not consistent. The scan changes nothing in the process.
//!
//! Source: Documentation/admin-guide/mm/pagemap.rst, <linux/fs.h>, process_vm_readv(2).

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::fs::FileExt as _,
    },
};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};

use crate::mapping::{Mapping, PAGE_BYTES};

const PAGE: u64 = PAGE_BYTES as u64;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

// Bits of a pagemap entry.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_EXCLUSIVE: u64 = 1 << 56;
const ENTRY_FRAME: u64 = (1 << 55) - 1;

/// Maximum number of regions returned per request.
const REGIONS: usize = 512;
/// Number of entries read at once.
const ENTRIES: usize = 4096;
/// Maximum number of ranges per `process_vm_readv` call: IOV_MAX.
pub const MAX_RANGES: usize = 1024;

/// Range of addresses in another process, in whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// First address.
    pub start: u64,
    /// Length, in bytes.
    pub len: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96);
const _: () = assert!(size_of::<ScanRegion>() == 24);

/// Conditions on the categories of a page.
#[derive(Clone, Copy)]
struct Categories {
    none_of: u64,
    all_of: u64,
    any_of: u64,
}

/// Pages that belong to the process alone.
const DIRTY: Categories = Categories {
    none_of: PAGE_IS_FILE | PAGE_IS_PFNZERO,
    all_of: 0,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
};

/// Pages that are mapped to the kernel's zero page.
const ZEROS: Categories = Categories {
    none_of: 0,
    all_of: PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
    any_of: 0,
};

/// Page map of one process.
#[derive(Debug)]
pub struct PageMap {
    file: File,
}

impl PageMap {
    /// Opens the page map of process `pid`.
    ///
    /// # Errors
    /// The kernel's error. The kernel requires the right to trace the process.
    pub fn open(pid: u32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { file })
    }

    /// Returns the dirty pages among `len` bytes from `start`, in order, with adjacent pages merged
    /// into one range. `start` and `len` are multiples of 4096.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn dirty(&self, start: u64, len: u64) -> io::Result<Vec<AddressRange>> {
        match self.dirty_by_request(start, len) {
            Err(error) if is_unknown(&error) => self.dirty_by_entries(start, len),
            other => other,
        }
    }

    /// Returns the pages among `len` bytes from `start` that are mapped to the kernel's zero page,
    /// in order, with adjacent pages merged into one range. `start` and `len` are multiples of
    /// 4096.
    ///
    /// # Errors
    /// The kernel's error; `Unsupported` if the kernel hides frame numbers and is older than Linux
    /// 6.7.
    pub fn zeros(&self, start: u64, len: u64) -> io::Result<Vec<AddressRange>> {
        match self.scan(start, len, ZEROS) {
            Err(error) if is_unknown(&error) => self.zeros_by_entries(start, len),
            other => other,
        }
    }

    /// Like [`PageMap::zeros`], by reading the entry of each page.
    ///
    /// # Errors
    /// The kernel's error; `Unsupported` if the kernel hides frame numbers.
    pub fn zeros_by_entries(&self, start: u64, len: u64) -> io::Result<Vec<AddressRange>> {
        let zero_frame = zero_frame()?.ok_or(io::ErrorKind::Unsupported)?;
        self.entries(start, len, |entry| is_zero(entry, zero_frame))
    }

    /// Like [`PageMap::dirty`], by PAGEMAP_SCAN only.
    ///
    /// # Errors
    /// ENOTTY or EINVAL before Linux 6.7; otherwise the kernel's error.
    pub fn dirty_by_request(&self, start: u64, len: u64) -> io::Result<Vec<AddressRange>> {
        self.scan(start, len, DIRTY)
    }

    /// Returns the pages of `categories`, by PAGEMAP_SCAN.
    fn scan(&self, start: u64, len: u64, categories: Categories) -> io::Result<Vec<AddressRange>> {
        let end = end_of(start, len)?;
        let mut found = Vec::new();
        let mut regions = vec![ScanRegion::default(); REGIONS];
        let mut position = start;
        while position < end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                start: position,
                end,
                vec: regions.as_mut_ptr().addr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: categories.none_of,
                category_mask: categories.none_of | categories.all_of,
                category_anyof_mask: categories.any_of,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                ..ScanArgument::default()
            };
            let pointer: *mut ScanArgument = &raw mut argument;
            // SAFETY: the request reads and writes one argument and writes at most `vec_len`
            // regions to `vec`. Both outlive the call.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, pointer) };
            if count < 0 {
                return Err(io::Error::last_os_error());
            }
            for region in regions.iter().take(usize::try_from(count).unwrap_or(0)) {
                join(
                    &mut found,
                    region.start,
                    region.end.saturating_sub(region.start),
                );
            }
            if argument.walk_end <= position {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            position = argument.walk_end;
        }
        Ok(found)
    }

    /// Like [`PageMap::dirty`], by reading the entry of each page. Slower, but available on every
    /// kernel.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn dirty_by_entries(&self, start: u64, len: u64) -> io::Result<Vec<AddressRange>> {
        let zero_frame = zero_frame()?;
        self.entries(start, len, |entry| is_dirty(entry, zero_frame))
    }

    /// Returns the pages whose entry is `wanted`.
    fn entries(
        &self,
        start: u64,
        len: u64,
        wanted: impl Fn(u64) -> bool,
    ) -> io::Result<Vec<AddressRange>> {
        let end = end_of(start, len)?;
        let mut found = Vec::new();
        let mut entries = vec![0_u8; ENTRIES * 8];
        let mut position = start;
        while position < end {
            let pages = ((end - position) / PAGE).min(ENTRIES as u64);
            let bytes = usize::try_from(pages * 8).unwrap_or(0);
            let part = entries.get_mut(..bytes).unwrap_or_default();
            self.file.read_exact_at(part, position / PAGE * 8)?;
            for entry in part.chunks_exact(8) {
                let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
                if wanted(entry) {
                    join(&mut found, position, PAGE);
                }
                position += PAGE;
            }
        }
        Ok(found)
    }
}

/// True if an error means that the kernel does not know PAGEMAP_SCAN.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}

/// True if the page of `entry` is the kernel's zero page.
fn is_zero(entry: u64, zero_frame: u64) -> bool {
    entry & ENTRY_PRESENT != 0
        && entry & (ENTRY_FILE | ENTRY_SWAPPED | ENTRY_EXCLUSIVE) == 0
        && entry & ENTRY_FRAME == zero_frame
}

/// True if the page of `entry` is dirty.
///
/// An entry that is not exclusive and whose frame number is hidden (0) may be the zero page. Such
/// an entry counts as dirty, which costs one page but loses no data.
fn is_dirty(entry: u64, zero_frame: Option<u64>) -> bool {
    if entry & ENTRY_FILE != 0 {
        return false;
    }
    if entry & ENTRY_SWAPPED != 0 {
        return true;
    }
    let is_zero = entry & ENTRY_EXCLUSIVE == 0 && Some(entry & ENTRY_FRAME) == zero_frame;
    entry & ENTRY_PRESENT != 0 && !is_zero
}

/// Returns the frame number of the kernel's zero page, or `None` if frame numbers are hidden. The
/// number is read from a page of this process that was only read, never written.
fn zero_frame() -> io::Result<Option<u64>> {
    let page = Mapping::anonymous(PAGE_BYTES)?;
    let _ = page.load(0);
    let mut entry = [0; 8];
    let own = File::open("/proc/self/pagemap")?;
    own.read_exact_at(&mut entry, page.address() / PAGE * 8)?;
    let frame = u64::from_ne_bytes(entry) & ENTRY_FRAME;
    Ok((frame != 0).then_some(frame))
}

fn end_of(start: u64, len: u64) -> io::Result<u64> {
    match start.checked_add(len) {
        Some(end) if start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) => Ok(end),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn join(ranges: &mut Vec<AddressRange>, start: u64, len: u64) {
    match ranges.last_mut() {
        Some(last) if last.start + last.len == start => last.len += len,
        _ => ranges.push(AddressRange { start, len }),
    }
}

/// Reads `ranges` of process `pid`, one after the other, into `buffer`. The length of `buffer` is
/// the total length of the ranges.
///
/// # Errors
/// The kernel's error; `InvalidInput` if the lengths differ or there are more than [`MAX_RANGES`]
/// ranges; `UnexpectedEof` if the process has no memory there.
pub fn read_process(pid: u32, ranges: &[AddressRange], buffer: &mut [u8]) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let pid = Pid::from_raw(i32::try_from(pid).map_err(invalid)?);
    let mut remote = Vec::with_capacity(ranges.len());
    let mut total = 0_usize;
    for range in ranges {
        let len = usize::try_from(range.len).map_err(invalid)?;
        let base = usize::try_from(range.start).map_err(invalid)?;
        total = total.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        remote.push(RemoteIoVec { base, len });
    }
    if total != buffer.len() || remote.len() > MAX_RANGES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut rest = buffer;
    while !rest.is_empty() {
        let read = match process_vm_readv(pid, &mut [IoSliceMut::new(rest)], &remote) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest = rest
            .split_at_mut_checked(read)
            .ok_or(io::ErrorKind::InvalidData)?
            .1;
        advance(&mut remote, read);
    }
    Ok(())
}

/// Removes `done` bytes from the front of the ranges.
fn advance(remote: &mut Vec<RemoteIoVec>, mut done: usize) {
    let mut finished = 0;
    for range in remote.iter_mut() {
        let part = range.len.min(done);
        range.base += part;
        range.len -= part;
        done -= part;
        if range.len > 0 {
            break;
        }
        finished += 1;
    }
    remote.drain(..finished);
}

/// Returns the object behind a descriptor as named by `/proc`, such as `anon_inode:[userfaultfd]`
/// or a path.
///
/// # Errors
/// The kernel's error.
pub fn descriptor_name(fd: BorrowedFd<'_>) -> io::Result<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges_of(mapping: &Mapping, pages: &[(u64, u64)]) -> Vec<AddressRange> {
        let range = |&(first, count): &(u64, u64)| AddressRange {
            start: mapping.address() + first * PAGE,
            len: count * PAGE,
        };
        pages.iter().map(range).collect()
    }

    #[test]
    fn written_pages_are_dirty_and_pages_of_zeros_are_not() {
        let mapping = Mapping::anonymous(64 * PAGE_BYTES).expect("maps");
        for page in [3, 4, 5, 9, 63] {
            mapping.store(page * PAGE_BYTES, 1).expect("inside");
        }
        for page in [0, 7, 40] {
            assert_eq!(mapping.load(page * PAGE_BYTES), Some(0));
        }
        let map = PageMap::open(std::process::id()).expect("opens");
        let expected = ranges_of(&mapping, &[(3, 3), (9, 1), (63, 1)]);
        let (start, len) = (mapping.address(), mapping.len() as u64);
        assert_eq!(map.dirty_by_request(start, len).expect("scans"), expected);
        assert_eq!(map.dirty_by_entries(start, len).expect("reads"), expected);
        assert_eq!(map.dirty(start, len).expect("scans"), expected);
        let zeros = ranges_of(&mapping, &[(0, 1), (7, 1), (40, 1)]);
        assert_eq!(map.zeros(start, len).expect("scans"), zeros);
        assert_eq!(map.zeros_by_entries(start, len).expect("reads"), zeros);
    }

    #[test]
    fn regions_beyond_one_ioctl_reply_are_returned() {
        let pages = 4 * REGIONS;
        let mapping = Mapping::anonymous(pages * PAGE_BYTES).expect("maps");
        for page in (0..pages).step_by(2) {
            mapping.store(page * PAGE_BYTES, 1).expect("inside");
        }
        let map = PageMap::open(std::process::id()).expect("opens");
        let (start, len) = (mapping.address(), mapping.len() as u64);
        let scanned = map.dirty_by_request(start, len).expect("scans");
        assert_eq!(scanned.len(), pages / 2);
        assert_eq!(map.dirty_by_entries(start, len).expect("reads"), scanned);
    }

    #[test]
    fn memory_is_read_range_by_range() {
        let mapping = Mapping::anonymous(8 * PAGE_BYTES).expect("maps");
        mapping.store(PAGE_BYTES, 0x11).expect("inside");
        mapping.store(5 * PAGE_BYTES, 0x22).expect("inside");
        let ranges = ranges_of(&mapping, &[(1, 1), (5, 2)]);
        let mut buffer = vec![0xFF; 3 * PAGE_BYTES];
        let pid = std::process::id();
        read_process(pid, &ranges, &mut buffer).expect("reads");
        assert_eq!((buffer[0], buffer[4096], buffer[8192]), (0x11, 0x22, 0));
        assert!(read_process(pid, &ranges, &mut buffer[1..]).is_err());
        let nowhere = [AddressRange {
            start: PAGE,
            len: PAGE,
        }];
        assert!(read_process(pid, &nowhere, &mut buffer[..4096]).is_err());
    }

    #[test]
    fn partial_scan_continues_where_it_stopped() {
        let range = |base, len| RemoteIoVec { base, len };
        let mut remote = vec![range(0x1000, 10), range(0x2000, 10), range(0x3000, 10)];
        advance(&mut remote, 15);
        assert_eq!(remote, [range(0x2005, 5), range(0x3000, 10)]);
        advance(&mut remote, 15);
        assert!(remote.is_empty());
    }

    #[test]
    fn pagemap_entry_bits_determine_the_page_state() {
        assert!(is_dirty(ENTRY_PRESENT | ENTRY_EXCLUSIVE | 7, Some(7)));
        assert!(is_dirty(ENTRY_PRESENT | 8, Some(7)));
        assert!(is_dirty(ENTRY_SWAPPED, Some(7)));
        assert!(is_dirty(ENTRY_PRESENT, None));
        assert!(!is_dirty(ENTRY_PRESENT | 7, Some(7)));
        assert!(!is_dirty(ENTRY_PRESENT | ENTRY_FILE | 8, Some(7)));
        assert!(!is_dirty(0, Some(7)));
        assert!(is_zero(ENTRY_PRESENT | 7, 7));
        assert!(!is_zero(ENTRY_PRESENT | 8, 7) && !is_zero(7, 7));
        assert!(!is_zero(ENTRY_PRESENT | ENTRY_EXCLUSIVE | 7, 7));
    }
}
