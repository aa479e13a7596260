//! Specification of a jail: what the process inside sees, and its limits.

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Specification of a jail.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JailSpec {
    /// Link to the process that starts the jail. The jail is not entered if that process has ended.
    #[serde(flatten)]
    pub parent: Parent,
    /// Network namespace to enter; `None` to create one without any link.
    pub netns: Option<PathBuf>,
    /// Cgroup directories to join.
    pub cgroups: Vec<PathBuf>,
    /// User and group ID to run as.
    pub uid: u32,
    /// Directories of the host that are visible at the same path, read-only and without devices.
    pub dirs: Vec<PathBuf>,
    /// Files of the host that are visible in the jail, and directories with such files.
    pub files: Vec<JailFile>,
    /// Device nodes of the host to create at the same path.
    pub devices: Vec<PathBuf>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment of the program, as `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Descriptors that the program inherits, besides its standard input and output. `None`: all
    /// that are inheritable.
    #[serde(default)]
    pub fds: Option<Vec<RawFd>>,
    /// Descriptor of the [`SocketDir`](crate::SocketDir) that the program sees. With one, the
    /// program may also create, bind and connect Unix sockets. `None`: it creates no sockets.
    #[serde(default)]
    pub sockets: Option<RawFd>,
    /// Resource limits of the process.
    #[serde(default)]
    pub limits: ProcessLimits,
    /// True to permit only the system calls of [`seccomp`](crate::seccomp). False in tests that run
    /// a shell in place of a VMM.
    #[serde(default = "yes")]
    pub seccomp: bool,
}

impl JailSpec {
    /// Writes the specification to an unnamed file, so that nothing of it remains.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn to_memfd(&self) -> io::Result<OwnedFd> {
        let fd = rustix::fs::memfd_create(c"jail", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut file = std::fs::File::from(fd);
        serde_json::to_writer(&mut file, self)?;
        Ok(file.into())
    }
}

/// Process that a jail must not outlive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parent {
    /// Process ID of the parent, for a jail in the parent's PID namespace.
    #[serde(rename = "parent_pid")]
    Pid(u32),
    /// Descriptor of the reading end of a pipe. The parent holds the writing end
    /// ([`ParentPipe`](crate::ParentPipe)).
    #[serde(rename = "parent_pipe")]
    Pipe(i32),
}

/// File of the host that is visible in the jail. A directory is visible with the files in it, also
/// with those that the host adds later.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JailFile {
    /// Path on the host.
    pub source: PathBuf,
    /// Absolute path in the jail.
    pub target: PathBuf,
    /// True if the process may write to the file.
    pub writable: bool,
    /// True if the process may execute the file, or map it as code.
    #[serde(default)]
    pub executable: bool,
}

/// Resource limits of a jailed process (rlimits). Each is the soft and the hard limit. The process
/// also has no core dumps, no locked memory, no message queues and no real-time priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// Maximum size of a file that the process writes, in bytes. A write beyond it fails.
    pub file_bytes: u64,
    /// Maximum number of open files.
    pub open_files: u64,
    /// Maximum number of threads of the process's user.
    pub threads: u64,
}

impl Default for ProcessLimits {
    fn default() -> Self {
        Self {
            file_bytes: 1 << 40,
            open_files: 1024,
            threads: 256,
        }
    }
}

const fn yes() -> bool {
    true
}

/// Program of the host that runs in a jail, with what it needs of the host.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub file: JailFile,
    /// Directories with its shared libraries, modules and data.
    pub dirs: Vec<PathBuf>,
}

impl Program {
    /// Returns a program of QEMU, installed at an absolute path.
    ///
    /// Whole directories of libraries are visible, not single files: which libraries are loaded is
    /// known to the dynamic linker only, QEMU loads modules by name, and a list that was computed
    /// before an upgrade of QEMU would prevent every later start. They contain no programs that can
    /// be executed by name and no data of the host.
    #[must_use]
    pub fn of_qemu(path: &Path) -> Self {
        const LIBRARIES: [&str; 2] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"];
        const DATA: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];
        let mut dirs = existing(&LIBRARIES);
        if dirs.is_empty() {
            dirs = existing(&["/usr/lib"]);
        }
        dirs.extend(existing(&DATA));
        Self {
            file: executable(path),
            dirs,
        }
    }

    /// Returns a statically linked program, installed at an absolute path. It needs nothing else.
    #[must_use]
    pub fn without_libraries(path: &Path) -> Self {
        Self {
            file: executable(path),
            dirs: Vec::new(),
        }
    }
}

fn executable(path: &Path) -> JailFile {
    JailFile {
        source: path.to_owned(),
        target: path.to_owned(),
        writable: false,
        executable: true,
    }
}

/// Returns the paths that are directories, and no links to one: the target of a link is listed,
/// too.
fn existing(paths: &[&str]) -> Vec<PathBuf> {
    let paths = paths.iter().map(PathBuf::from);
    let is_dir = |path: &PathBuf| std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    paths.filter(is_dir).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_specification_names_its_parent_in_one_of_two_ways() {
        let text = r#"{"parent_pid":7,"netns":"/run/netns/x","cgroups":[],"uid":1,"dirs":["/usr"],
            "files":[],"devices":[],"argv":["/usr/bin/sh"]}"#;
        let spec: JailSpec = serde_json::from_str(text).expect("valid");
        assert_eq!(spec.parent, Parent::Pid(7));
        assert!(spec.seccomp && spec.env.is_empty() && spec.sockets.is_none());
        let spec = JailSpec {
            parent: Parent::Pipe(5),
            netns: None,
            ..spec
        };
        let text = serde_json::to_string(&spec).expect("plain data");
        assert!(text.contains(r#""parent_pipe":5"#), "{text}");
        let again: JailSpec = serde_json::from_str(&text).expect("valid");
        assert_eq!((again.parent, again.netns), (Parent::Pipe(5), None));
    }
}
