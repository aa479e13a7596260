//! Programs of QEMU that parse disk layers, each in a jail.
//!
//! A program runs under a user ID of its own, without a network. It sees the files that it is given
//! and no others. If this process dies, the program is killed.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, Command},
};
use wrenn_jail::{Alive, DISK_LAYERS, JailFile, JailSpec, Parent, ParentPipe, ProcessLimits, Program};

use crate::{DiskError, Header, HeaderError};

/// User and group ID of the programs. The IDs of VMMs follow it.
pub(crate) const UID: u32 = 1_899_999_999;

/// Maximum number of bytes that are kept of a program's output, and of its errors.
const MAX_OUTPUT: u64 = 64 * 1024;
const MAX_ERRORS: u64 = 1000;

/// Program that parses disk layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    /// Name, also of the file in `/usr/bin`.
    pub(crate) name: &'static str,
    /// Debian package.
    pub(crate) package: &'static str,
}

/// Program that was started. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Running {
    tool: Tool,
    child: Child,
    _alive: Alive,
}

impl Tool {
    /// Returns the jail of the program. It sees `files`, and `layers` read-only
    /// ([`layer_path`]). A file that it writes may be slightly larger than a disk of `size_mib`.
    pub(crate) fn jail<'a>(
        self,
        args: Vec<String>,
        mut files: Vec<JailFile>,
        layers: impl Iterator<Item = &'a Path>,
        size_mib: u32,
    ) -> JailSpec {
        let path = format!("/usr/bin/{}", self.name);
        let program = Program::of_qemu(Path::new(&path));
        files.push(program.file);
        for (number, layer) in layers.enumerate() {
            files.push(file(layer, &layer_path(number), false));
        }
        let mib = u64::from(size_mib);
        JailSpec {
            parent: Parent::Pipe(-1),
            netns: None,
            cgroups: Vec::new(),
            uid: UID,
            dirs: program.dirs,
            files,
            devices: vec!["/dev/null".into(), "/dev/urandom".into()],
            argv: std::iter::once(path).chain(args).collect(),
            env: Vec::new(),
            limits: ProcessLimits {
                // qcow2 stores where each cluster is, besides the clusters.
                file_bytes: (mib + mib / 16 + 64) * 1024 * 1024,
                ..ProcessLimits::default()
            },
            seccomp: true,
        }
    }

    /// Starts the program. `wrenn_exe` enters the jail (`jail --spec FILE`).
    pub(crate) fn start(
        self,
        wrenn_exe: &Path,
        mut jail: JailSpec,
        stdin: Stdio,
        stdout: Stdio,
    ) -> Result<Running, DiskError> {
        let start = || {
            let parent = ParentPipe::new()?;
            jail.parent = parent.parent();
            let spec = jail.to_memfd()?;
            keep_across_exec(&spec)?;
            let mut command = Command::new(wrenn_exe);
            command
                .args(["jail", "--spec"])
                .arg(format!("/proc/self/fd/{}", spec.as_raw_fd()))
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
        };
        start().map_err(self.not_run())
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
        // It may have exited.
        let _ = self.child.start_kill();
    }

    /// Waits for the end of the program. Returns what it printed, if its output is captured, and
    /// what it reported if it failed.
    pub(crate) async fn output(mut self) -> Result<(Vec<u8>, Result<(), String>), DiskError> {
        let (mut output, mut errors) = (Vec::new(), String::new());
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let read_output = async {
            if let Some(stdout) = stdout {
                // What cannot be read is missing in the output, which is checked.
                let _ = stdout.take(MAX_OUTPUT).read_to_end(&mut output).await;
            }
        };
        let read_errors = async {
            if let Some(stderr) = stderr {
                let _ = stderr.take(MAX_ERRORS).read_to_string(&mut errors).await;
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

fn keep_across_exec(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}
