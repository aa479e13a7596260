//! Programs of QEMU that parse disk layers, each in a jail.
//!
//! A program runs under a user ID and cgroups of its own, without a network. It sees the files that
//! it is given and no others. If this process dies, the program is killed.

use std::{
    fmt, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use parking_lot::Mutex;
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, ChildStderr, Command},
    sync::{Semaphore, SemaphorePermit},
};
use wrenn_jail::{Alive, DISK_LAYERS, JailFile, JailSpec, ParentPipe, ProcessLimits, Program};

use crate::{DiskError, Header, HeaderError};

/// Highest user and group ID of the programs. The IDs of VMMs follow it.
const MAX_UID: u32 = 1_899_999_999;

/// Maximum number of programs that run at the same time.
const MAX_AT_ONCE: u32 = 2;

/// Maximum number of bytes that are kept of a program's output.
const MAX_OUTPUT: u64 = 64 * 1024;

/// Maximum number of bytes that are kept of a program's errors.
pub(crate) const MAX_ERRORS: usize = 1000;

/// Returns the cgroup directories of the jail with a number, which exist then.
type Groups = dyn Fn(u32) -> io::Result<Vec<PathBuf>> + Send + Sync;

/// Jails of programs that parse disk layers. Each has a user ID and cgroups of its own. A program
/// waits for a free one.
pub struct ToolJails {
    wrenn_exe: PathBuf,
    groups: Box<Groups>,
    free: Mutex<Vec<u32>>,
    turns: Semaphore,
}

impl fmt::Debug for ToolJails {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToolJails").finish_non_exhaustive()
    }
}

impl ToolJails {
    /// Returns the jails. `wrenn_exe` is the program that enters a jail (`jail --spec FILE`).
    /// `groups` creates the cgroups of the jail with a number, and returns their directories.
    pub fn new(
        wrenn_exe: &Path,
        groups: impl Fn(u32) -> io::Result<Vec<PathBuf>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            wrenn_exe: wrenn_exe.to_owned(),
            groups: Box::new(groups),
            free: Mutex::new((0..MAX_AT_ONCE).collect()),
            turns: Semaphore::new(MAX_AT_ONCE as usize),
        }
    }

    /// Waits for a free jail.
    pub(crate) async fn claim(&self) -> ToolJail<'_> {
        // Never closed.
        let turn = self.turns.acquire().await.ok();
        let number = self.free.lock().pop().unwrap_or_default();
        ToolJail {
            jails: self,
            number,
            _turn: turn,
        }
    }
}

/// Jail that one program uses. It is free again on drop.
pub(crate) struct ToolJail<'a> {
    jails: &'a ToolJails,
    number: u32,
    _turn: Option<SemaphorePermit<'a>>,
}

impl ToolJail<'_> {
    /// Returns the user and group ID of the program.
    pub(crate) const fn uid(&self) -> u32 {
        MAX_UID - self.number
    }

    fn identity(&self) -> io::Result<Identity<'_>> {
        Ok(Identity {
            wrenn_exe: &self.jails.wrenn_exe,
            cgroups: (self.jails.groups)(self.number)?,
            uid: self.uid(),
        })
    }
}

impl Drop for ToolJail<'_> {
    fn drop(&mut self) {
        self.jails.free.lock().push(self.number);
    }
}

/// User and cgroups of a program in its jail.
#[derive(Debug)]
pub(crate) struct Identity<'a> {
    /// Program that enters a jail (`jail --spec FILE`).
    pub(crate) wrenn_exe: &'a Path,
    pub(crate) cgroups: Vec<PathBuf>,
    /// User and group ID.
    pub(crate) uid: u32,
}

/// Program that parses disk layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    /// Name, also of the file in `/usr/bin`.
    pub(crate) name: &'static str,
    /// Debian package.
    pub(crate) package: &'static str,
}

/// QEMU's block layer without a machine.
pub(crate) const STORAGE_DAEMON: Tool = Tool {
    name: "qemu-storage-daemon",
    package: "qemu-system-common",
};

/// Arguments of [`STORAGE_DAEMON`] that make its standard input a QMP connection.
pub(crate) const MONITOR_ARGS: [&str; 4] = [
    "--chardev",
    "socket,id=qmp,fd=0",
    "--monitor",
    "chardev=qmp",
];

/// Files and arguments of a program.
pub(crate) struct Work<'a> {
    pub(crate) args: Vec<String>,
    /// Files that it sees, besides the layers.
    pub(crate) files: Vec<JailFile>,
    /// Layers that it reads ([`layer_path`]).
    pub(crate) layers: Vec<&'a Path>,
    /// Descriptors that it inherits under the numbers that they have here.
    pub(crate) fds: Vec<OwnedFd>,
    /// Size of the disk. A file that the program writes may be slightly larger.
    pub(crate) size_mib: u32,
    pub(crate) stdin: Stdio,
    pub(crate) stdout: Stdio,
}

/// Program that was started. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Running {
    tool: Tool,
    child: Child,
    _alive: Alive,
}

impl Tool {
    /// Starts the program in a jail.
    pub(crate) fn start(self, jail: &ToolJail<'_>, work: Work<'_>) -> Result<Running, DiskError> {
        let identity = jail.identity().map_err(self.not_run())?;
        self.start_as(identity, work)
    }

    /// Starts the program in a jail of its own.
    pub(crate) fn start_as(
        self,
        identity: Identity<'_>,
        work: Work<'_>,
    ) -> Result<Running, DiskError> {
        self.try_start(identity, work).map_err(self.not_run())
    }

    /// Returns the path of the program, on the host and in a jail.
    pub(crate) fn path(self) -> String {
        format!("/usr/bin/{}", self.name)
    }

    fn try_start(self, identity: Identity<'_>, mut work: Work<'_>) -> io::Result<Running> {
        let parent = ParentPipe::new()?;
        let (stdin, stdout) = (work.stdin, work.stdout);
        let path = self.path();
        let program = Program::of_qemu(Path::new(&path));
        work.files.push(program.file);
        for (number, layer) in work.layers.iter().enumerate() {
            work.files.push(file(layer, &layer_path(number), false));
        }
        let mib = u64::from(work.size_mib);
        let spec = JailSpec {
            parent: parent.parent(),
            netns: None,
            cgroups: identity.cgroups,
            uid: identity.uid,
            dirs: program.dirs,
            files: work.files,
            devices: vec!["/dev/null".into(), "/dev/urandom".into()],
            argv: std::iter::once(path).chain(work.args).collect(),
            env: Vec::new(),
            fds: Some(work.fds.iter().map(AsRawFd::as_raw_fd).collect()),
            sockets: None,
            limits: ProcessLimits {
                // qcow2 stores where each cluster is, besides the clusters.
                file_bytes: (mib + mib / 16 + 64) * 1024 * 1024,
                ..ProcessLimits::default()
            },
            seccomp: true,
        };
        let mut command = Command::new(identity.wrenn_exe);
        for fd in work.fds {
            wrenn_sys::session::inherit(command.as_std_mut(), fd);
        }
        let number = wrenn_sys::session::inherit(command.as_std_mut(), spec.to_memfd()?);
        command
            .args(["jail", "--spec"])
            .arg(format!("/proc/self/fd/{number}"))
            .env_clear()
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = wrenn_jail::spawn_in_pid_namespace(|| command.spawn())?;
        Ok(Running {
            tool: self,
            child,
            _alive: parent.keep(),
        })
    }

    /// Converts the error of a program that did not start.
    pub(crate) fn not_run(self) -> impl FnOnce(io::Error) -> DiskError {
        move |source| DiskError::Run {
            program: self.name,
            package: self.package,
            source,
        }
    }
}

impl Running {
    /// Ends the program.
    pub(crate) fn kill(&mut self) {
        // The program may have exited.
        let _ = self.child.start_kill();
    }

    /// Returns the process ID, until the end of the program was waited for.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Returns what the program reports, once.
    pub(crate) fn take_errors(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Waits for the end of the program. Cancel safe.
    pub(crate) async fn wait(&mut self) -> Result<ExitStatus, DiskError> {
        self.child.wait().await.map_err(self.tool.not_run())
    }

    /// Waits for the end of the program. Returns what it printed, if its output is captured, and
    /// what it reported if it failed.
    pub(crate) async fn output(mut self) -> Result<(Vec<u8>, Result<(), String>), DiskError> {
        let (mut output, mut errors) = (Vec::new(), String::new());
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let read_output = async {
            if let Some(stdout) = stdout {
                // Output that cannot be read is missing, and the caller checks the output.
                let _ = stdout.take(MAX_OUTPUT).read_to_end(&mut output).await;
            }
        };
        let read_errors = async {
            if let Some(stderr) = stderr {
                let mut limited = stderr.take(MAX_ERRORS as u64);
                let _ = limited.read_to_string(&mut errors).await;
            }
        };
        let (ended, (), ()) = tokio::join!(self.child.wait(), read_output, read_errors);
        let status = ended.map_err(self.tool.not_run())?;
        let ended = match status.success() {
            true => Ok(()),
            false => Err(errors.trim().to_owned()),
        };
        Ok((output, ended))
    }
}

/// Rejects layers that do not have the form that is written, or another size than `size_mib`.
pub(crate) fn check<'a>(
    layers: impl Iterator<Item = &'a Path>,
    size_mib: u32,
) -> Result<(), DiskError> {
    let expected = u64::from(size_mib) * 1024 * 1024;
    for path in layers {
        let rejected = |source| DiskError::Layer {
            path: path.to_owned(),
            source,
        };
        let got = Header::read(path).map_err(rejected)?.size_bytes;
        if got != expected {
            let field = "size";
            return Err(rejected(HeaderError::Field { field, got }));
        }
    }
    Ok(())
}

/// Returns the path of a layer in the jail.
pub(crate) fn layer_path(number: usize) -> String {
    format!("{DISK_LAYERS}/{number}")
}

/// Returns a file of the jail.
pub(crate) fn file(source: &Path, target: &str, writable: bool) -> JailFile {
    JailFile {
        source: source.to_owned(),
        target: PathBuf::from(target),
        writable,
        executable: false,
    }
}
