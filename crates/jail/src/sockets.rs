//! Directory of Unix sockets that a jailed process and its parent share.
//!
//! A VMM that binds its control socket itself needs a directory that it can write to and that its
//! parent can reach. The directory is a small tmpfs of its own. It has no path on the host: the
//! parent holds it as a descriptor, and the jail attaches it at [`SOCKETS`](crate::SOCKETS). It
//! takes no space on a disk, and the kernel frees it when the last descriptor and the jail are gone.
//!
//! | directory in the jail               | writable for    | sockets in it are bound by |
//! |-------------------------------------|-----------------|----------------------------|
//! | [`SOCKETS`](crate::SOCKETS)         | the parent      | the parent                 |
//! | [`OWN_SOCKETS`](crate::OWN_SOCKETS) | the jail's user | the jailed process         |
//!
//! The parent does not trust the jailed process, which may replace anything in its own directory,
//! for example by a link to a socket of the host. The parent therefore opens a socket without
//! following links, checks that it is a socket, and connects to what it opened
//! ([`SocketDir::find`]). The sockets of the parent are in a directory that the jailed process
//! cannot change.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, fstat, mkdirat, openat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
};

/// Name of the directory that belongs to the jail's user.
pub(crate) const OWN_NAME: &str = "own";

/// Options of the tmpfs: enough for a few sockets, and no more.
const OPTIONS: [(&str, &str); 3] = [("size", "64k"), ("nr_inodes", "32"), ("mode", "0755")];

/// Directory of Unix sockets that a jailed process and its parent share.
#[derive(Debug)]
pub struct SocketDir {
    dir: OwnedFd,
}

/// Socket that was found, to which the parent can connect. A later change of the directory does not
/// affect it.
#[derive(Debug)]
pub struct FoundSocket(OwnedFd);

impl FoundSocket {
    /// Returns the path to connect to. It is valid as long as this value exists.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        descriptor_path(&self.0)
    }
}

impl SocketDir {
    /// Creates a directory for a jail that runs as `uid`. Requires the privilege to mount.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn new(uid: u32) -> io::Result<Self> {
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (name, value) in OPTIONS {
            fsconfig_set_string(&tmpfs, name, value)?;
        }
        fsconfig_create(&tmpfs)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let dir = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Self::in_directory(dir, uid)
    }

    /// Uses an empty directory that exists. A jail cannot attach it. For tests of code that uses
    /// the sockets.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn in_directory(dir: OwnedFd, uid: u32) -> io::Result<Self> {
        mkdirat(&dir, OWN_NAME, Mode::RWXU)?;
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        chownat(&dir, OWN_NAME, Some(user), Some(group), flags)?;
        Ok(Self { dir })
    }

    /// Opens a socket that the jailed process has bound.
    ///
    /// # Errors
    /// `NotFound` if it does not exist yet; `InvalidInput` if it is a link or anything else than a
    /// socket; other errors of the kernel.
    pub fn find(&self, name: &str) -> io::Result<FoundSocket> {
        let path = format!("{OWN_NAME}/{name}");
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = openat(&self.dir, path, flags, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::Socket {
            let reason = "the VMM replaced its socket by something else";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        Ok(FoundSocket(found))
    }

    /// Binds a socket to which the jailed process can connect.
    ///
    /// # Errors
    /// `AddrInUse` if the name is taken; other errors of the kernel.
    pub fn listen(&self, name: &str) -> io::Result<UnixListener> {
        let listener = UnixListener::bind(descriptor_path(&self.dir).join(name))?;
        // Only the jail can reach the socket.
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
        chmodat(&self.dir, name, mode, AtFlags::empty())?;
        Ok(listener)
    }

    /// Removes a socket that [`listen`](Self::listen) bound.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.dir, name, AtFlags::empty())?)
    }
}

impl AsFd for SocketDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

fn descriptor_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        os::unix::{
            fs::{PermissionsExt as _, symlink},
            net::UnixStream,
        },
    };

    use super::*;

    /// Returns a directory at a path, and the directory of the jail's user in it.
    fn at_path() -> (tempfile::TempDir, SocketDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let opened = fs::File::open(dir.path()).expect("opens");
        let uid = rustix::process::getuid().as_raw();
        let sockets = SocketDir::in_directory(opened.into(), uid).expect("created");
        let own = dir.path().join(OWN_NAME);
        (dir, sockets, own)
    }

    #[test]
    fn parent_connects_to_a_socket_of_the_jail() {
        let (_dir, sockets, own) = at_path();
        let missing = sockets.find("api").expect_err("not bound yet");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(own.join("api")).expect("bound");
        let found = sockets.find("api").expect("a socket");
        let mut client = UnixStream::connect(found.address()).expect("connects");
        client.write_all(b"hello").expect("written");
        drop(client);
        let mut text = String::new();
        let (mut peer, _) = listener.accept().expect("connected");
        peer.read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello");
    }

    #[test]
    fn parent_follows_no_link_and_opens_nothing_but_sockets() {
        let (dir, sockets, own) = at_path();
        let victim = dir.path().join("victim");
        let _listener = UnixListener::bind(&victim).expect("bound");
        symlink(&victim, own.join("link")).expect("linked");
        fs::write(own.join("file"), "").expect("written");
        fs::create_dir(own.join("directory")).expect("created");
        for name in ["link", "file", "directory"] {
            let error = sockets.find(name).expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
        }
    }

    #[test]
    fn a_socket_that_was_found_cannot_be_replaced() {
        let (dir, sockets, own) = at_path();
        let victim = dir.path().join("victim");
        let _listener = UnixListener::bind(&victim).expect("bound");
        drop(UnixListener::bind(own.join("api")).expect("bound"));
        let found = sockets.find("api").expect("a socket");
        fs::remove_file(own.join("api")).expect("removed");
        symlink(&victim, own.join("api")).expect("linked");
        let error = UnixStream::connect(found.address()).expect_err("its listener is gone");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn every_user_may_connect_to_a_socket_of_the_parent_until_it_is_removed() {
        let (dir, sockets, _) = at_path();
        let _listener = sockets.listen("pages").expect("bound");
        let path = dir.path().join("pages");
        let mode = fs::metadata(&path).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o666);
        UnixStream::connect(&path).expect("connects");
        let taken = sockets.listen("pages").expect_err("taken");
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        sockets.remove("pages").expect("removed");
        assert!(!path.exists());
    }

    #[test]
    fn detached_directory_is_small_and_belongs_to_the_jail() {
        let uid = 1_234_567;
        let sockets = SocketDir::new(uid).expect("created, with the privilege to mount");
        let root = descriptor_path(&sockets.dir);
        let stat = rustix::fs::statat(&sockets.dir, OWN_NAME, AtFlags::empty()).expect("exists");
        assert_eq!((stat.st_uid, stat.st_gid), (uid, uid));
        assert_eq!(stat.st_mode & 0o777, 0o700);
        let stat = fstat(&sockets.dir).expect("exists");
        assert_eq!((stat.st_uid, stat.st_mode & 0o777), (0, 0o755));
        let full = fs::write(root.join(OWN_NAME).join("file"), vec![1; 128 * 1024]);
        let full = full.expect_err("no room");
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }
}
