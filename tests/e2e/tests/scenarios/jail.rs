//! Jail of a VMM, inspected from inside: a shell runs in place of QEMU.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;
use wrenn_e2e::{Service, service::wrenn_exe};

/// User of the jails of this test. No other test has it, because a jailed process sees the
/// processes of its user.
fn uid() -> u32 {
    1_000_000_000 + std::process::id()
}

/// Network namespace with a link that the host does not have.
struct Namespace(String);

/// Name of that link.
const LINK: &str = "jailed0";

impl Namespace {
    fn new(test: &str) -> Result<Self> {
        let name = format!("wj-{test}-{}", std::process::id());
        let status = Command::new("ip").args(["netns", "add", &name]).status()?;
        anyhow::ensure!(status.success(), "failed to add network namespace");
        let namespace = Self(name);
        let link = [
            "link", "add", LINK, "type", "veth", "peer", "name", "jailed1",
        ];
        let mut add = Command::new("ip");
        let status = add.args(["-n", &namespace.0]).args(link).status()?;
        anyhow::ensure!(status.success(), "failed to add a link");
        Ok(namespace)
    }

    /// Returns the names of the links in the namespace.
    fn links(&self) -> Result<BTreeSet<String>> {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.0, "cat", "/proc/net/dev"])
            .output()?;
        anyhow::ensure!(output.status.success(), "{output:?}");
        Ok(links(&String::from_utf8(output.stdout)?))
    }
}

/// Returns the names in a table of links, as `/proc/net/dev` has it.
fn links(table: &str) -> BTreeSet<String> {
    let names = table.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Runs a shell command line in a jail with one writable and one read-only file. Returns its
/// output.
fn in_jail(test: &str, line: &str) -> Result<String> {
    in_jail_with(&Namespace::new(test)?, line)
}

/// Same as [`in_jail`], with the network namespace of the jail.
fn in_jail_with(namespace: &Namespace, line: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let (disk, base) = (dir.path().join("disk"), dir.path().join("base"));
    for path in [&disk, &base] {
        fs::write(path, "content\n")?;
        std::os::unix::fs::chown(path, Some(uid()), Some(uid()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    }
    // As for a sandbox's directory, only root has access.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
    let spec = json!({
        "parent_pid": std::process::id(),
        "netns": format!("/run/netns/{}", namespace.0),
        "cgroups": [],
        "uid": uid(),
        // A shell and its tools run in place of QEMU, and start processes.
        "dirs": ["/usr"],
        "seccomp": false,
        "files": [
            { "source": disk, "target": "/tmp/fc-vm/rootfs.qcow2", "writable": true },
            { "source": base, "target": "/tmp/fc-vm/base", "writable": false },
        ],
        "devices": ["/dev/null", "/dev/urandom"],
        "argv": ["/usr/bin/sh", "-c", line],
    });
    let spec_path = dir.path().join("jail.json");
    fs::write(&spec_path, spec.to_string())?;
    let output = Command::new(wrenn_exe())
        .args(["jail", "--spec"])
        .arg(&spec_path)
        .stdin(Stdio::null())
        .output()?;
    anyhow::ensure!(output.status.success(), "{output:?}");
    if line.contains("> /tmp/fc-vm/rootfs.qcow2") {
        assert_eq!(
            fs::read_to_string(&disk)?,
            "changed\n",
            "the disk must be writable"
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn jailed_process_has_no_privileges_and_cannot_gain_any() -> Result<()> {
    let status = in_jail("user", "id -u; id -G; cat /proc/self/status")?;
    let ids = format!("{0}\n{0}\n", uid());
    assert!(status.starts_with(&ids), "{status}");
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
    Ok(())
}

#[test]
fn jailed_process_sees_only_its_own_files_and_processes() -> Result<()> {
    let seen = in_jail(
        "files",
        "ls / /tmp /tmp/fc-vm /dev; echo \"processes $(ls /proc | grep -c '^[0-9]')\"; \
         [ ! -e /proc/1 ] || echo HOST PROCESS; cat /tmp/fc-vm/base; \
         echo changed > /tmp/fc-vm/rootfs.qcow2; \
         for f in /tmp/fc-vm/base /usr/x /x /tmp/x /dev/x; do (echo x > $f) 2>/dev/null && echo WROTE $f; done; \
         ls /etc /root /home /var /run /sys 2>/dev/null; echo end",
    )?;
    assert!(
        seen.contains("content") && seen.ends_with("end\n"),
        "{seen}"
    );
    assert!(!seen.contains("WROTE"), "{seen}");
    assert!(!seen.contains("HOST PROCESS"), "{seen}");
    // The shell, its subshell, `ls` and `grep`. The host has many more.
    let processes = seen
        .lines()
        .find_map(|line| line.strip_prefix("processes "));
    let processes: usize = processes.context("no count")?.parse()?;
    assert!(
        (1..=4).contains(&processes),
        "{processes} processes: {seen}"
    );
    for name in [
        "etc\n", "root\n", "home\n", "var\n", "run\n", "sys\n", "old\n", "kvm\n",
    ] {
        assert!(!seen.contains(&format!("\n{name}")), "{name} in {seen}");
    }
    Ok(())
}

#[test]
fn jailed_process_has_only_the_links_of_its_namespace() -> Result<()> {
    let namespace = Namespace::new("net")?;
    let seen = links(&in_jail_with(&namespace, "cat /proc/self/net/dev")?);
    assert_eq!(seen, namespace.links()?);
    assert!(seen.contains(LINK), "{seen:?}");
    assert!(!links(&fs::read_to_string("/proc/net/dev")?).contains(LINK));
    Ok(())
}

#[test]
fn jail_ends_with_its_parent_process() -> Result<()> {
    let namespace = Namespace::new("parent")?;
    let dir = tempfile::tempdir()?;
    let spec_path = dir.path().join("jail.json");
    let (spec, exe) = (spec_path.display(), wrenn_exe());
    let (netns, uid) = (format!("/run/netns/{}", namespace.0), uid());
    // A shell in place of the supervisor: it writes its own process id to the specification and
    // starts the jail.
    let script = format!(
        r#"printf '{{"parent_pid":%d,"netns":"{netns}","cgroups":[],"uid":{uid},"dirs":["/usr"],"seccomp":false,"files":[],"devices":[],"argv":["/usr/bin/sleep","1000"]}}' $$ > {spec}
           {} jail --spec {spec} & echo $!; wait"#,
        exe.display()
    );
    let mut parent = Command::new("bash")
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let stdout = parent.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    let comm = format!("/proc/{}/comm", line.trim());
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::read_to_string(&comm).unwrap_or_default().trim() != "sleep" {
        assert!(
            Instant::now() < deadline,
            "the jail did not execute its program"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    parent.kill()?;
    parent.wait()?;
    while fs::metadata(&comm).is_ok() {
        assert!(Instant::now() < deadline, "the jail outlived its parent");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Returns the process ID of a sandbox's VMM.
fn vmm_of(id: &str) -> Result<u32> {
    let entries = fs::read_dir("/proc")?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_vmm = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("qemu-system") && line.contains(&format!("\0-name\0{id}\0"))
    };
    let mut pids = pids.into_iter();
    pids.find(is_vmm).context("no VMM")
}

/// Checks the restrictions of each thread of a sandbox's VMM.
fn is_restricted(id: &str) -> Result<()> {
    let pid = vmm_of(id)?;
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        // Mode 2 is a filter: two of the jail, one of QEMU.
        assert_eq!(field("Seccomp:"), "2", "{status}");
        assert_eq!(field("Seccomp_filters:"), "3", "{status}");
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
        assert_eq!(field("CapEff:"), "0000000000000000", "{status}");
        // In the host's namespace, and in its own.
        let ids = field("NStgid:");
        let ids: Vec<_> = ids.split_whitespace().collect();
        assert_eq!((ids.len(), ids.last()), (2, Some(&"1")), "{status}");
        threads += 1;
    }
    assert!(threads > 1, "{threads} threads");
    for namespace in ["pid", "ipc", "uts", "cgroup", "net", "mnt"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        assert_ne!(of(&pid.to_string())?, of("self")?, "{namespace}");
    }
    // The kernel ends the VMM first, then its supervisor.
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent = parent.context("no parent")?.trim().to_owned();
    for (pid, expected) in [(pid.to_string(), "500"), (parent, "250")] {
        let oom = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
        assert_eq!(oom.trim(), expected, "{pid}");
    }
    Ok(())
}

#[tokio::test]
async fn every_thread_of_a_vmm_is_restricted_in_a_booted_and_in_a_restored_vm() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    // Disk requests make QEMU start more threads.
    let write = "dd if=/dev/urandom of=/home/user/x bs=1M count=8 conv=fsync 2>&1";
    sandbox.shell(write).await?;
    is_restricted(sandbox.id())?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    let size = sandbox.shell("wc -c < /home/user/x").await?.stdout;
    assert_eq!(size, "8388608\n");
    is_restricted(sandbox.id())?;
    let id = sandbox.id().to_owned();
    sandbox.destroy().await?;
    assert!(vmm_of(&id).is_err());
    Ok(())
}
