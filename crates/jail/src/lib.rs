//! Jail of a VMM: restricts what the VMM process can see and do.
//!
//! A supervisor starts `wrenn jail --spec FILE`. That process enters the jail step by step
//! ([`enter`]) and then becomes the VMM (exec). From then on the process
//! - runs as a user and group that belong to this sandbox only, without capabilities and without a
//!   way to gain any;
//! - is in the sandbox's cgroups and network namespace, and in IPC, UTS and mount namespaces of its
//!   own;
//! - sees a root file system made of `/usr` (read-only, no devices, no setuid), a `/proc` with
//!   processes only, three devices, and its own files at constant paths below [`HOME`];
//! - is killed when the thread that started it ends.
//!
//! The paths below [`HOME`] are the same for every sandbox, because a VMM's snapshot may store
//! them.
//!
//! Nothing needs to be undone: mounts belong to the mount namespace and disappear with the process.
//! On failure, the process prints the error and exits with status 1. The supervisor reads the text
//! from the VMM's standard error.
#![forbid(unsafe_code)]

use std::{
    ffi::CString,
    fs,
    io::{self, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{MetadataExt as _, OpenOptionsExt as _},
            process::parent_id,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::Signal,
        stat::{Mode, SFlag, mknod},
    },
    unistd::{Gid, Uid, chdir, chown, execve, pivot_root, setgroups, setresgid, setresuid},
};
use serde::{Deserialize, Serialize};

/// Directory of the VMM's own files, in the jail.
pub const HOME: &str = "/tmp/fc-vm";
/// Path of the guest's kernel, in the jail.
pub const KERNEL: &str = "/tmp/fc-vm/vmlinux";
/// Path of the guest's initial RAM disk, in the jail.
pub const INITRD: &str = "/tmp/fc-vm/initrd.img";
/// Path of the guest's disk, in the jail.
pub const DISK: &str = "/tmp/fc-vm/rootfs.qcow2";
/// Directory of the read-only disk layers, in the jail. `0` is the lowest layer.
pub const DISK_LAYERS: &str = "/tmp/fc-vm/layers";
/// Path of the library that reports the location of guest memory, in the jail.
pub const PRELOAD: &str = "/tmp/fc-vm/preload.so";
/// Path at which the VMM opens guest memory. No file exists there; the library handles the call.
pub const MEMORY: &str = "/tmp/fc-vm/memory";
/// Path of the disk's base image, in the jail.
pub const BASE_DISK: &str = "/tmp/fc-vm/base";

/// Mount point on which the new root is assembled: a directory that exists on every host. The tmpfs
/// hides its content in this mount namespace only.
const NEW_ROOT: &str = "/tmp";

/// Specification of a jail.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JailSpec {
    /// Process ID of the supervisor. If it is no longer the parent, the jail is not entered.
    pub parent_pid: u32,
    /// Network namespace to enter.
    pub netns: PathBuf,
    /// Cgroup directories to join.
    pub cgroups: Vec<PathBuf>,
    /// User and group ID to run as.
    pub uid: u32,
    /// Files of the host that are visible in the jail.
    pub files: Vec<JailFile>,
    /// Device nodes of the host to create at the same path.
    pub devices: Vec<PathBuf>,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment of the program, as `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
}

/// File of the host that is visible in the jail.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JailFile {
    /// Path on the host.
    pub source: PathBuf,
    /// Absolute path in the jail.
    pub target: PathBuf,
    /// True if the VMM may write to the file.
    pub writable: bool,
    /// True if the VMM may map the file as code.
    #[serde(default)]
    pub executable: bool,
}

/// Failure of one step into the jail.
#[derive(Debug, thiserror::Error)]
#[error("jail: failed to {step}: {source}")]
pub struct JailError {
    step: String,
    source: io::Error,
}

fn failed(step: impl Into<String>) -> impl FnOnce(io::Error) -> JailError {
    let step = step.into();
    move |source| JailError { step, source }
}

fn failed_nix(step: impl Into<String>) -> impl FnOnce(nix::Error) -> JailError {
    let step = step.into();
    move |source| JailError {
        step,
        source: source.into(),
    }
}

/// Enters the jail described by `spec_path` and executes its program. Returns only if a step
/// failed.
#[must_use]
pub fn enter(spec_path: &Path) -> JailError {
    match enter_steps(spec_path) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn enter_steps(spec_path: &Path) -> Result<std::convert::Infallible, JailError> {
    let text = fs::read(spec_path).map_err(failed("read the specification"))?;
    let spec: JailSpec = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .map_err(failed("parse the specification"))?;
    die_with_parent(&spec)?;
    join_cgroups(&spec.cgroups)?;
    enter_namespaces(&spec.netns)?;
    build_root(&spec)?;
    drop_privileges(spec.uid)?;
    // Changing the user ID clears the parent-death signal.
    die_with_parent(&spec)?;
    execute(&spec.argv, &spec.env)
}

fn die_with_parent(spec: &JailSpec) -> Result<(), JailError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed_nix("set the parent-death signal"))?;
    // The parent may have died before the signal was set.
    if parent_id() == spec.parent_pid {
        Ok(())
    } else {
        Err(failed("verify that the supervisor is still the parent")(
            io::ErrorKind::NotFound.into(),
        ))
    }
}

fn join_cgroups(cgroups: &[PathBuf]) -> Result<(), JailError> {
    for dir in cgroups {
        let procs = dir.join("cgroup.procs");
        fs::OpenOptions::new()
            .write(true)
            .open(&procs)
            .and_then(|mut file| file.write_all(b"0"))
            .map_err(failed(format!("join the cgroup {}", dir.display())))?;
    }
    Ok(())
}

fn enter_namespaces(netns: &Path) -> Result<(), JailError> {
    let ns = fs::File::open(netns).map_err(failed(format!(
        "open the network namespace {}",
        netns.display()
    )))?;
    setns(&ns, CloneFlags::CLONE_NEWNET).map_err(failed_nix("enter the network namespace"))?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(failed_nix("create namespaces"))?;
    do_mount(
        None,
        Path::new("/"),
        None,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None,
    )
}

/// Assembles the new root on a tmpfs and makes it the only root.
fn build_root(spec: &JailSpec) -> Result<(), JailError> {
    let root = Path::new(NEW_ROOT);
    // Sources may be below the directory that the tmpfs hides, so they are opened first.
    let files = open_sources(&spec.files)?;
    do_mount(
        Some("tmpfs"),
        root,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0755,size=1m"),
    )?;
    for dir in [
        "usr",
        "proc",
        "dev",
        "tmp",
        "tmp/fc-vm",
        "tmp/fc-vm/layers",
        "old",
    ] {
        make_dir(&root.join(dir))?;
    }
    bind_read_only(Path::new("/usr"), &root.join("usr"))?;
    for name in ["lib", "lib64", "bin", "sbin"] {
        show_system_dir(name, root)?;
    }
    make_devices(spec, root)?;
    for (file, source) in spec.files.iter().zip(&files) {
        bind_file(file, source, root)?;
    }
    let proc_dir = root.join("proc");
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    do_mount(
        Some("proc"),
        &proc_dir,
        Some("proc"),
        hardened,
        Some("hidepid=2,subset=pid"),
    )?;
    pivot_root(root, &root.join("old")).map_err(failed_nix("pivot to the new root"))?;
    chdir("/").map_err(failed_nix("enter the new root"))?;
    umount2("/old", MntFlags::MNT_DETACH).map_err(failed_nix("unmount the old root"))?;
    fs::remove_dir("/old").map_err(failed("remove the old root's mount point"))?;
    do_mount(
        None,
        Path::new("/"),
        None,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | hardened,
        None,
    )
}

fn open_sources(files: &[JailFile]) -> Result<Vec<fs::File>, JailError> {
    files
        .iter()
        .map(|file| {
            fs::OpenOptions::new()
                .read(true)
                .custom_flags(nix::libc::O_PATH | nix::libc::O_CLOEXEC)
                .open(&file.source)
                .map_err(failed(format!("open {}", file.source.display())))
        })
        .collect()
}

/// Makes `/lib` and similar directories visible: a link into `/usr` on a merged system, otherwise a
/// bind mount.
fn show_system_dir(name: &str, root: &Path) -> Result<(), JailError> {
    let source = Path::new("/").join(name);
    let target = root.join(name);
    match fs::read_link(&source) {
        Ok(link) => std::os::unix::fs::symlink(&link, &target)
            .map_err(failed(format!("link {}", target.display()))),
        Err(_) if source.is_dir() => {
            make_dir(&target)?;
            bind_read_only(&source, &target)
        }
        Err(_) => Ok(()),
    }
}

fn bind_read_only(source: &Path, target: &Path) -> Result<(), JailError> {
    let source = source.to_string_lossy();
    do_mount(Some(&source), target, None, MsFlags::MS_BIND, None)?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    do_mount(
        None,
        target,
        None,
        flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        None,
    )
}

/// Creates one node per device that only this sandbox's user can open. The host's own nodes may be
/// restricted to root.
fn make_devices(spec: &JailSpec, root: &Path) -> Result<(), JailError> {
    do_mount(
        Some("tmpfs"),
        &root.join("dev"),
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=0755,size=64k"),
    )?;
    for device in &spec.devices {
        let inside = device.strip_prefix("/").unwrap_or(device);
        let target = root.join(inside);
        let number = fs::metadata(device)
            .map_err(failed(format!("inspect {}", device.display())))?
            .rdev();
        mknod(
            &target,
            SFlag::S_IFCHR,
            Mode::S_IRUSR | Mode::S_IWUSR,
            number,
        )
        .map_err(failed_nix(format!("create {}", target.display())))?;
        let (user, group) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.uid));
        chown(&target, Some(user), Some(group)).map_err(failed_nix(format!(
            "change the owner of {}",
            target.display()
        )))?;
    }
    Ok(())
}

fn bind_file(file: &JailFile, source: &fs::File, root: &Path) -> Result<(), JailError> {
    let inside = file.target.strip_prefix("/").unwrap_or(&file.target);
    let target = root.join(inside);
    make_file(&target)?;
    let source = format!("/proc/self/fd/{}", source.as_raw_fd());
    do_mount(Some(&source), &target, None, MsFlags::MS_BIND, None)?;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if !file.executable {
        flags |= MsFlags::MS_NOEXEC;
    }
    if !file.writable {
        flags |= MsFlags::MS_RDONLY;
    }
    do_mount(None, &target, None, flags, None)
}

fn make_dir(path: &Path) -> Result<(), JailError> {
    fs::create_dir(path).map_err(failed(format!("create {}", path.display())))
}

fn make_file(path: &Path) -> Result<(), JailError> {
    fs::File::create(path)
        .map(drop)
        .map_err(failed(format!("create {}", path.display())))
}

fn do_mount(
    source: Option<&str>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), JailError> {
    mount(source, target, kind, flags, options)
        .map_err(failed_nix(format!("mount {}", target.display())))
}

fn drop_privileges(uid: u32) -> Result<(), JailError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed_nix("disable core dumps"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[]).map_err(failed_nix("drop the supplementary groups"))?;
    setresgid(group, group, group).map_err(failed_nix("change the group ID"))?;
    // Changing from user ID 0 to another user ID drops all capabilities.
    setresuid(user, user, user).map_err(failed_nix("change the user ID"))?;
    prctl::set_no_new_privs().map_err(failed_nix("set no_new_privs"))
}

fn execute(argv: &[String], env: &[String]) -> Result<std::convert::Infallible, JailError> {
    let args = c_strings(argv)?;
    let Some(program) = args.first() else {
        return Err(failed("find the program to execute")(
            io::ErrorKind::InvalidInput.into(),
        ));
    };
    // The host's environment must not reach the VMM.
    let mut env = c_strings(env)?;
    env.extend(c_strings(&[format!("HOME={HOME}")])?);
    execve(program, &args, &env).map_err(failed_nix(format!("execute {}", argv[0])))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, JailError> {
    let c_string = |text: &String| {
        CString::new(text.as_bytes()).map_err(|_| {
            failed("encode an argument, it contains a NUL byte")(io::ErrorKind::InvalidInput.into())
        })
    };
    texts.iter().map(c_string).collect()
}
