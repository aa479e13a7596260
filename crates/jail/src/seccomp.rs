//! System calls that a jailed process may make: an allow list.
//!
//! `docs/seccomp.md` publishes the list with its reasons; a test compares the two. Any other call
//! fails with `EPERM`, so a program that tries an optional feature falls back. `clone3` fails with
//! `ENOSYS`: its flags are in memory, where a filter cannot see them, and the C library then uses
//! `clone`, which is permitted for threads only.
//!
//! The filter applies before the program is executed, so it covers every instruction and every
//! thread of the program. QEMU installs a second one (`-sandbox on`), which also denies `execve`.

use std::{collections::BTreeMap, io};

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::error::{JailError, failed};

/// Name and number of a system call.
type Call = (&'static str, libc::c_long);

macro_rules! calls {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name)),*] };
}

/// Permitted system calls, by purpose. The names have the prefix `SYS_`.
pub const GROUPS: &[(&str, &[Call])] = &[
    (
        "files",
        calls! {
            SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev
            SYS_preadv2 SYS_pwritev2 SYS_lseek SYS_open SYS_openat SYS_close SYS_close_range SYS_fstat
            SYS_stat SYS_lstat SYS_newfstatat SYS_statx SYS_statfs SYS_fstatfs SYS_access
            SYS_faccessat SYS_faccessat2 SYS_readlink SYS_readlinkat SYS_getdents64 SYS_getcwd
            SYS_fcntl SYS_flock SYS_fsync SYS_fdatasync SYS_sync_file_range SYS_ftruncate
            SYS_fallocate SYS_fadvise64 SYS_copy_file_range SYS_dup SYS_dup2 SYS_dup3 SYS_umask
        },
    ),
    (
        "memory",
        calls! {
            SYS_mmap SYS_munmap SYS_mprotect SYS_mremap SYS_madvise SYS_msync SYS_mincore SYS_brk
            SYS_memfd_create SYS_membarrier
        },
    ),
    (
        "threads",
        calls! {
            SYS_clone SYS_clone3 SYS_futex SYS_set_robust_list SYS_get_robust_list SYS_rseq
            SYS_set_tid_address SYS_exit SYS_exit_group SYS_sched_yield SYS_sched_getaffinity
            SYS_sched_getparam SYS_sched_getscheduler SYS_getpriority SYS_tgkill SYS_tkill
        },
    ),
    (
        "signals",
        calls! {
            SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigtimedwait
            SYS_rt_sigsuspend SYS_sigaltstack SYS_signalfd4 SYS_restart_syscall
        },
    ),
    (
        "time",
        calls! {
            SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday
            SYS_time SYS_times SYS_timer_create SYS_timer_settime SYS_timer_gettime
            SYS_timer_getoverrun SYS_timer_delete SYS_timerfd_create SYS_timerfd_settime
            SYS_timerfd_gettime SYS_getitimer SYS_setitimer
        },
    ),
    (
        "events",
        calls! {
            SYS_poll SYS_ppoll SYS_select SYS_pselect6 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_wait
            SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2 SYS_pipe SYS_pipe2
        },
    ),
    ("devices", calls! { SYS_ioctl }),
    (
        "inherited sockets",
        calls! {
            SYS_sendmsg SYS_recvmsg SYS_sendto SYS_recvfrom SYS_getsockname SYS_getpeername
            SYS_getsockopt SYS_setsockopt SYS_shutdown
        },
    ),
    (
        "information",
        calls! {
            SYS_getpid SYS_gettid SYS_getppid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid
            SYS_getresuid SYS_getresgid SYS_getgroups SYS_uname SYS_sysinfo SYS_getrandom
            SYS_getrusage SYS_getrlimit SYS_prlimit64
        },
    ),
    (
        "start",
        calls! { SYS_execve SYS_arch_prctl SYS_prctl SYS_seccomp },
    ),
];

/// Calls that are permitted in addition in a jail with a [`SocketDir`](crate::SocketDir). `socket`
/// is permitted for Unix sockets only, whose paths are those in the jail.
pub const SOCKET_GROUP: (&str, &[Call]) = (
    "own sockets",
    calls! { SYS_socket SYS_bind SYS_listen SYS_accept4 SYS_connect },
);

/// Permitted operations of `prctl`: names of threads, timer slack, delivery of memory errors of the
/// hardware, and what installs a filter.
const PRCTL: [libc::c_int; 6] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_TIMERSLACK,
    libc::PR_MCE_KILL,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_SECCOMP,
];

/// Permitted requests of `ioctl`, by number (`linux/if_tun.h`, `asm-generic/ioctls.h`): those of
/// TAP devices, and of descriptors in general.
const IOCTL: [u32; 13] = [
    TUNGETFEATURES,
    TUNGETIFF,
    TUNSETOFFLOAD,
    TUNSETSNDBUF,
    TUNGETVNETHDRSZ,
    TUNSETVNETHDRSZ,
    TUNSETVNETLE,
    TUNSETVNETBE,
    TUNSETQUEUE,
    // FIONBIO, FIONREAD, FIOCLEX, TCGETS.
    0x5421,
    0x541b,
    0x5451,
    0x5401,
];
/// Attaches to a TAP device. Permitted in addition in a jail with `/dev/net/tun`.
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNGETFEATURES: u32 = 0x8004_54cf;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETSNDBUF: u32 = 0x4004_54d4;
const TUNGETVNETHDRSZ: u32 = 0x8004_54d7;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETQUEUE: u32 = 0x4004_54d9;
const TUNSETVNETLE: u32 = 0x4004_54dc;
const TUNSETVNETBE: u32 = 0x4004_54de;

/// Types of `ioctl` requests that are permitted as a whole (`linux/userfaultfd.h`, `linux/kvm.h`).
/// The second one is permitted if the jail has the hypervisor's device.
const IOCTL_USERFAULTFD: u32 = 0xaa;
const IOCTL_KVM: u32 = 0xae;

/// Permissions of a jail in addition to [`GROUPS`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Permissions {
    /// The jail has the hypervisor's device.
    pub(crate) kvm: bool,
    /// The jail has the device that attaches to TAP devices.
    pub(crate) tap: bool,
    /// The jail has a directory of sockets.
    pub(crate) sockets: bool,
}

/// Applies the filter to this process, irrevocably.
pub(crate) fn apply(permissions: Permissions) -> Result<(), JailError> {
    let step = "apply the system call filter";
    let other = |error| failed(step)(io::Error::other(error));
    for program in [allow_list(permissions), no_clone3()] {
        let program = program.map_err(other)?;
        seccompiler::apply_filter(&program)
            .map_err(|error| failed(step)(io::Error::other(error)))?;
    }
    Ok(())
}

/// Permits the calls in [`GROUPS`], and those of the permissions.
fn allow_list(permissions: Permissions) -> Result<BpfProgram, seccompiler::BackendError> {
    let all = GROUPS.iter().flat_map(|(_, calls)| *calls);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = all.map(|(_, nr)| (*nr, vec![])).collect();
    rules.insert(libc::SYS_clone, vec![threads_only()?]);
    let operations: Result<Vec<_>, _> = PRCTL.iter().map(|op| prctl_of(*op)).collect();
    rules.insert(libc::SYS_prctl, operations?);
    if permissions.sockets {
        rules.extend(SOCKET_GROUP.1.iter().map(|(_, nr)| (*nr, vec![])));
        rules.insert(libc::SYS_socket, vec![unix_only()?]);
    }
    let types = [IOCTL_USERFAULTFD, IOCTL_KVM];
    let types = types.iter().take(if permissions.kvm { 2 } else { 1 });
    let attach: &[u32] = if permissions.tap { &[TUNSETIFF] } else { &[] };
    let requests = IOCTL.iter().chain(attach);
    let requests = requests.map(|request| ioctl_of(*request, u32::MAX));
    let requests: Result<Vec<_>, _> = requests
        .chain(types.map(|kind| ioctl_of(kind << 8, 0xff00)))
        .collect();
    rules.insert(libc::SYS_ioctl, requests?);
    filter(
        rules,
        SeccompAction::Errno(errno(libc::EPERM)),
        SeccompAction::Allow,
    )
}

/// Answers `clone3` as a kernel that does not have it.
fn no_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    filter(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno(libc::ENOSYS)),
    )
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    found: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, mismatch, found, architecture)?.try_into()
}

/// Matches a `clone` that creates a thread of this process.
fn threads_only() -> Result<SeccompRule, seccompiler::BackendError> {
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let flags = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(thread),
        thread,
    )?;
    SeccompRule::new(vec![flags])
}

/// Matches a `socket` that creates a Unix socket.
fn unix_only() -> Result<SeccompRule, seccompiler::BackendError> {
    let family = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(libc::AF_UNIX.unsigned_abs()),
    )?;
    SeccompRule::new(vec![family])
}

/// Matches one operation of `prctl`.
fn prctl_of(operation: libc::c_int) -> Result<SeccompRule, seccompiler::BackendError> {
    let is_it = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(operation.unsigned_abs()),
    )?;
    SeccompRule::new(vec![is_it])
}

/// Matches a request of `ioctl` whose bits in `mask` are those of `request`.
fn ioctl_of(request: u32, mask: u32) -> Result<SeccompRule, seccompiler::BackendError> {
    let is_it = SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(u64::from(mask)),
        u64::from(request),
    )?;
    SeccompRule::new(vec![is_it])
}

const fn errno(code: libc::c_int) -> u32 {
    code.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const DOCUMENT: &str = include_str!("../../../docs/seccomp.md");

    #[test]
    fn the_published_list_is_the_one_that_is_applied() {
        let rows = DOCUMENT.lines().filter(|line| line.starts_with("| "));
        let mut documented = BTreeSet::new();
        for row in rows {
            let mut cells = row.split('|').map(str::trim).skip(1);
            let group = cells.next().unwrap_or_default();
            let calls = cells
                .next()
                .unwrap_or_default()
                .split('`')
                .skip(1)
                .step_by(2);
            documented.extend(calls.map(|call| (group.to_owned(), call.to_owned())));
        }
        let applied: BTreeSet<_> = GROUPS
            .iter()
            .chain([&SOCKET_GROUP])
            .flat_map(|(group, calls)| calls.iter().map(move |(name, _)| (group, name)))
            .map(|(group, name)| ((*group).to_owned(), name.replacen("SYS_", "", 1)))
            .collect();
        let missing: Vec<_> = applied.difference(&documented).collect();
        let extra: Vec<_> = documented.difference(&applied).collect();
        assert!(
            missing.is_empty() && extra.is_empty(),
            "{missing:?} {extra:?}"
        );
    }

    #[test]
    fn the_filters_are_valid_and_no_call_is_listed_twice() {
        let length = |permissions| allow_list(permissions).expect("a valid filter").len();
        let none = Permissions::default();
        for more in [
            Permissions { kvm: true, ..none },
            Permissions { tap: true, ..none },
            Permissions {
                sockets: true,
                ..none
            },
        ] {
            assert!(length(more) > length(none), "{more:?}");
        }
        assert!(no_clone3().is_ok_and(|program| !program.is_empty()));
        let groups = GROUPS.iter().chain([&SOCKET_GROUP]);
        let all: Vec<_> = groups.flat_map(|(_, calls)| *calls).collect();
        let distinct: BTreeSet<_> = all.iter().map(|(_, nr)| nr).collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn calls_that_reach_beyond_the_process_are_not_permitted() {
        let permitted: BTreeSet<_> = GROUPS
            .iter()
            .flat_map(|(_, calls)| calls.iter().map(|(_, nr)| *nr))
            .collect();
        for denied in [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_kill,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_open_by_handle_at,
            libc::SYS_pidfd_getfd,
        ] {
            assert!(!permitted.contains(&denied), "{denied}");
        }
    }
}
