//! FUSE file with the content of a source, read on demand and cached by the kernel.

use std::{ffi::OsStr, io, path::Path, sync::Arc, time::Duration};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyEntry, ReplyOpen, Request, Session,
};
use wrenn_pager::MemorySource;

/// Time for which the kernel trusts the attributes. They never change.
const TTL: Duration = Duration::from_secs(3600);
const FILE: INodeNo = INodeNo(2);
/// Name of the file.
pub(crate) const NAME: &str = "memory";
const THREADS: usize = 2;

struct MemoryFile {
    source: Arc<dyn MemorySource>,
    readahead: bool,
}

/// Mounts the file system of one file on a directory. Only root can use it.
pub(crate) fn mount(
    dir: &Path,
    source: Arc<dyn MemorySource>,
    readahead: bool,
) -> io::Result<BackgroundSession> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        MountOption::FSName("wrenn-backings".to_owned()),
    ];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    Session::new(MemoryFile { source, readahead }, dir, &config)?.spawn()
}

impl MemoryFile {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_file = inode == FILE;
        let size = if is_file { self.source.len() } else { 0 };
        let time = std::time::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_file { 0o400 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for MemoryFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if !self.readahead {
            // Less than a page: the kernel reads only pages that are accessed.
            let set = config.set_max_readahead(1);
            set.map_err(|_| io::ErrorKind::InvalidInput)?;
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Without this flag, each VM that opens the file would empty its page cache.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = self
            .source
            .len()
            .saturating_sub(offset)
            .min(u64::from(size));
        let mut content = vec![0; usize::try_from(len).unwrap_or(0)];
        match self.source.read_at(offset, &mut content) {
            Ok(()) => reply.data(&content),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}
