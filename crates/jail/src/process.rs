//! Properties of the jailed process: parent-death signal, cgroups, namespaces, limits, user.

use std::{
    convert::Infallible,
    ffi::CString,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid, execve, setgroups, setresgid, setresuid},
};

use crate::{
    HOME,
    error::{JailError, failed, failed_nix},
    parent::Watch,
    spec::ProcessLimits,
};

/// Priority for the kernel's OOM killer (`oom_score_adj`). That of the agent is below 0.
const OOM_SCORE_ADJ: i32 = 500;

pub(crate) fn die_with_parent(watch: &Watch) -> Result<(), JailError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed_nix("set the parent-death signal"))?;
    // The parent may have died before the signal was set.
    watch.check()
}

/// Makes the kernel end this process, and thereby one sandbox, if the host runs out of memory.
pub(crate) fn be_killed_first() -> Result<(), JailError> {
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ.to_string())
        .map_err(failed("set the priority for the OOM killer"))
}

pub(crate) fn join_cgroups(cgroups: &[PathBuf]) -> Result<(), JailError> {
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

/// Enters the network namespace, or a new one, and new namespaces for mounts, IPC, host name and
/// cgroups. The cgroup namespace hides the path of the sandbox's groups, so they are joined before.
pub(crate) fn enter_namespaces(netns: Option<&Path>) -> Result<(), JailError> {
    let mut new = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    match netns {
        None => new |= CloneFlags::CLONE_NEWNET,
        Some(netns) => {
            let step = format!("open the network namespace {}", netns.display());
            let ns = fs::File::open(netns).map_err(failed(step))?;
            setns(&ns, CloneFlags::CLONE_NEWNET)
                .map_err(failed_nix("enter the network namespace"))?;
        }
    }
    unshare(new).map_err(failed_nix("create namespaces"))
}

pub(crate) fn limit(limits: &ProcessLimits) -> Result<(), JailError> {
    for (resource, value) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_FSIZE, limits.file_bytes),
        (Resource::RLIMIT_NOFILE, limits.open_files),
        (Resource::RLIMIT_NPROC, limits.threads),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_RTPRIO, 0),
        (Resource::RLIMIT_NICE, 0),
    ] {
        setrlimit(resource, value, value).map_err(failed_nix(format!("set {resource:?}")))?;
    }
    Ok(())
}

pub(crate) fn drop_privileges(uid: u32) -> Result<(), JailError> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[]).map_err(failed_nix("drop the supplementary groups"))?;
    setresgid(group, group, group).map_err(failed_nix("change the group ID"))?;
    // Changing from user ID 0 to another user ID drops all capabilities.
    setresuid(user, user, user).map_err(failed_nix("change the user ID"))?;
    prctl::set_no_new_privs().map_err(failed_nix("set no_new_privs"))
}

pub(crate) fn execute(argv: &[String], env: &[String]) -> Result<Infallible, JailError> {
    let args = c_strings(argv)?;
    let Some(program) = args.first() else {
        return Err(failed("find the program to execute")(
            io::ErrorKind::InvalidInput.into(),
        ));
    };
    // The host's environment must not reach the program.
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
