//! Environment of programs in the guest: drivers, device nodes, limits, locale, `/run`, services.
//!
//! Each property is checked in a guest that booted and in one that was restored, because they get
//! it in different ways.

use anyhow::{Context as _, Result};
use serde_json::json;
use wrenn_e2e::{Sandbox, Service, rounds};

const MODULES: &str = include_str!("../../guest/modules.sh");
const FUSE: &str = include_str!("../../guest/fuse.py");

/// Loads drivers in all ways in which programs do so.
async fn use_drivers(sandbox: &Sandbox<'_>) -> Result<()> {
    let body = json!({ "cmd": "sh", "args": ["-c", MODULES], "user": "root", "timeout_sec": 280 });
    let output = sandbox.exec_with(body).await?;
    assert_eq!(output.code, 0, "{output:?}");
    let counts = output.stdout;
    let (packed, indexed) = counts.trim().split_once('\n').context("no counts")?;
    assert_eq!(packed, indexed);
    assert!(packed.parse::<u32>()? > 500, "{counts}");
    Ok(())
}

async fn mount_fuse(sandbox: &Sandbox<'_>) -> Result<()> {
    sandbox.write("/tmp/fuse.py", FUSE).await?;
    for user in ["root", "user"] {
        let body = json!({ "cmd": "python3", "args": ["/tmp/fuse.py"], "user": user });
        let output = sandbox.exec_with(body).await?;
        assert_eq!(output.stdout, "served by fuse\n", "{user}: {output:?}");
        assert_eq!(output.code, 0, "{user}: {output:?}");
    }
    Ok(())
}

#[tokio::test]
async fn drivers_are_loaded_on_demand_after_a_boot_and_after_a_restore() -> Result<()> {
    let service = Service::start().await?;
    let booted = service.create().await?;
    use_drivers(&booted).await?;
    mount_fuse(&booted).await?;
    booted.destroy().await?;
    for template in ["minimal", "base"] {
        // The size of the template, so that the sandbox is restored.
        let body = json!({ "template": template, "memory_mb": 512 });
        let restored = service.create_with(body).await?;
        restored.pause().await?;
        restored.resume().await?;
        use_drivers(&restored).await?;
        mount_fuse(&restored).await?;
        restored.destroy().await?;
    }
    Ok(())
}

/// Properties that programs expect of a usual Linux system: command and output.
const EXPECTED: [(&str, &str); 10] = [
    ("ulimit -Sn; ulimit -Hn", "65536\n1048576\n"),
    ("sudo sh -c 'ulimit -Sn; ulimit -Hn'", "65536\n1048576\n"),
    ("echo $LANG; printf é | wc -m", "C.UTF-8\n1\n"),
    ("LANG=C; printf é | wc -m", "2\n"),
    (
        "cd /proc/sys/fs/inotify; cat max_user_instances max_user_watches",
        "2048\n1048576\n",
    ),
    ("sysctl -n vm.max_map_count", "1048576\n"),
    (
        "bash -lc 'command -v sysctl modprobe service iptables nft'",
        "/usr/sbin/sysctl\n/usr/sbin/modprobe\n/usr/sbin/service\n/usr/sbin/iptables\n/usr/sbin/nft\n",
    ),
    (
        "stat -c '%a %U' /run/lock /run/sudo",
        "1777 root\n711 root\n",
    ),
    ("findmnt -no PROPAGATION /", "shared\n"),
    ("systemctl is-system-running", "offline\n"),
];

#[tokio::test]
async fn limits_locale_and_directories_are_those_of_a_usual_system() -> Result<()> {
    let service = Service::start().await?;
    for memory_mb in [256, 512] {
        let sandbox = service
            .create_with(json!({ "memory_mb": memory_mb }))
            .await?;
        for (command, expected) in EXPECTED {
            for user in ["root", "user"] {
                let body = json!({ "cmd": "sh", "args": ["-c", command], "user": user });
                let output = sandbox.exec_with(body).await?;
                assert_eq!(output.stdout, expected, "{command} as {user}: {output:?}");
            }
        }
        sandbox.destroy().await?;
    }
    Ok(())
}

/// Init script in the format of Debian's packages.
const INIT_SCRIPT: &str = r#"#!/bin/sh
### BEGIN INIT INFO
# Provides:          ticker
# Required-Start:
# Required-Stop:
# Default-Start:     2 3 4 5
# Default-Stop:
### END INIT INFO
DAEMON=/usr/bin/sleep
run() { start-stop-daemon "$@" --pidfile /run/ticker.pid --exec $DAEMON; }
case $1 in
  start) start-stop-daemon --start --background --make-pidfile --pidfile /run/ticker.pid --exec $DAEMON -- 100000 ;;
  stop) run --stop --remove-pidfile ;;
  status) run --status ;;
esac
"#;

#[tokio::test]
async fn services_are_started_by_service_and_by_systemctl() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create_with(json!({ "memory_mb": 512 })).await?;
    sandbox.write("/etc/init.d/ticker", INIT_SCRIPT).await?;
    sandbox.script("chmod +x /etc/init.d/ticker").await?;
    let state = "systemctl is-active ticker.service || true";
    for (change, expected) in [
        ("service ticker start", "active\n"),
        ("service ticker stop", "inactive\n"),
        ("systemctl enable --now ticker", "active\n"),
        (
            "systemctl daemon-reload && systemctl stop ticker.service",
            "inactive\n",
        ),
    ] {
        sandbox.script(change).await?;
        assert_eq!(sandbox.script(state).await?, expected, "{change}");
    }
    let missing = sandbox.shell("systemctl start nonesuch").await?;
    assert_eq!(missing.code, 5);
    assert!(
        missing.stderr.contains("/etc/init.d/nonesuch"),
        "{missing:?}"
    );
    let other = sandbox.shell("systemctl list-timers").await?;
    assert_eq!(other.code, 1);
    assert!(other.stderr.contains("use `service"), "{other:?}");
    sandbox.destroy().await
}

#[tokio::test]
async fn run_has_what_packages_declare_after_a_boot_from_the_disk() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create_with(json!({ "memory_mb": 512 })).await?;
    let declared = "d /run/declared 2775 root user -\nf /run/declared/file 0640 user user - text\n";
    sandbox
        .write("/usr/lib/tmpfiles.d/declared.conf", declared)
        .await?;
    // What a power failure leaves, and what is kept.
    sandbox
        .script("touch /etc/passwd.lock /tmp/kept; sync")
        .await?;
    sandbox.pause().await?;
    sandbox.boot().await?;
    // The first command after the boot.
    let found = sandbox
        .script("stat -c '%a %U %G' /run/declared /run/declared/file; cat /run/declared/file; ls /tmp/kept")
        .await?;
    assert_eq!(found, "2775 root user\n640 user user\ntext/tmp/kept\n");
    assert_ne!(sandbox.shell("ls /etc/passwd.lock").await?.code, 0);
    assert_eq!(sandbox.script("ls -d /run/lock").await?, "/run/lock\n");
    use_drivers(&sandbox).await?;
    sandbox.destroy().await
}

/// Loads the modules that are given as arguments. Prints one line per module that is not loaded.
const LOAD_EACH: &str = r#"for module; do modprobe "$module" 2>&1; done; true"#;

/// Reasons for which a module of the package cannot be loaded: the VM lacks its device or feature,
/// or the module only runs a test when it is loaded (`tcrypt`).
const NOT_FOR_THIS_MACHINE: [&str; 5] = [
    "No such device",
    "Operation not supported",
    "Operation not permitted",
    "'acpi_pad': Invalid argument",
    "'tcrypt': Resource temporarily unavailable",
];

/// A tenth of the modules; all with `WRENN_SOAK=1`.
#[tokio::test]
async fn every_module_of_the_package_is_accepted_by_the_kernel() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create_with(json!({ "memory_mb": 512 })).await?;
    let list = r"find /lib/modules/*/kernel -name '*.ko' -printf '%f\n' | sed 's/\.ko$//' | sort";
    let list = sandbox.script(list).await?;
    let modules: Vec<&str> = list.lines().collect();
    let step = modules.len() / rounds(modules.len());
    let chosen: Vec<&str> = modules.into_iter().step_by(step).collect();
    for some in chosen.chunks(50) {
        let args = [&["-c", LOAD_EACH, "sh"], some].concat();
        let body = json!({ "cmd": "sh", "args": args, "timeout_sec": 120 });
        let output = sandbox.exec_with(body).await?;
        let unexpected: Vec<_> = output
            .stdout
            .lines()
            .filter(|line| !NOT_FOR_THIS_MACHINE.iter().any(|why| line.contains(why)))
            .collect();
        assert!(unexpected.is_empty(), "{unexpected:#?}");
        assert_eq!(output.code, 0, "{output:?}");
    }
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    sandbox.destroy().await
}
