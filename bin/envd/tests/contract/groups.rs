//! Cgroup membership of processes.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use wrenn_proto::rpc::process::{Signal, StartRequest};

use crate::{
    calls::{Clients, Events, clients, limit, program, script},
    raw::call,
    terminal::in_terminal,
    world::{World, eventually, run_with},
};

/// Mount point of cgroups in the test environment.
const MOUNT: &str = "/mnt/groups";

/// Returns the group of a process's kind relative to the test's own group, and the name of the
/// process's own group in it, as the process itself sees them.
async fn group_of(clients: &Clients, request: StartRequest) -> (String, String) {
    let outcome = clients.run(request).await;
    assert_eq!(outcome.end.exit_code, 0, "{outcome:?}");
    let bytes = [outcome.stdout, outcome.terminal].concat();
    split(String::from_utf8(bytes).expect("text").trim())
}

fn split(group: &str) -> (String, String) {
    let (kind, command) = group.rsplit_once('/').expect("a path");
    (kind.to_owned(), command.to_owned())
}

fn group_of_agent(world: &World) -> String {
    let all = fs::read_to_string(format!("/proc/{}/cgroup", world.agent)).expect("it runs");
    let line = all.lines().find_map(|line| line.strip_prefix("0::"));
    line.expect("version 2").to_owned()
}

/// Runs a test in an environment with its own cgroups, and removes them afterwards.
fn run(name: &str, test: impl AsyncFnOnce(&World, &str)) {
    let name = format!("wrenn-envd-{name}-{}", std::process::id());
    let root = format!("{MOUNT}/{name}");
    let envs = [("WORLD_GROUPS", root.as_str())];
    run_with(&["--cgroup-root", &root], &envs, async |world| {
        test(world, &root).await;
    });
    remove(&name);
}

/// Removes the test's cgroups. Uses a mount namespace of one thread, so that the hierarchy is
/// visible regardless of the host's mounts.
fn remove(name: &str) {
    let name = name.to_owned();
    let thread = std::thread::spawn(move || {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare needs root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("changed");
        mount("none", "/mnt", "cgroup2", MountFlags::empty(), None).expect("mounted");
        let root = Path::new("/mnt").join(name);
        for group in ["envd", "ptys", "system", "user", "."] {
            let group = root.join(group).components().as_path().to_owned();
            let commands = if group == root { vec![] } else { below(&group) };
            commands.iter().chain([&group]).for_each(|path| empty(path));
        }
    });
    thread.join().expect("removed");
}

/// Removes a group once its processes have exited.
fn empty(group: &Path) {
    crate::world::wait_for("the processes of a group have exited", || {
        let removed = fs::remove_dir(group);
        let busy = std::io::ErrorKind::ResourceBusy;
        let waits = removed.as_ref().is_err_and(|error| error.kind() == busy);
        (!waits).then(|| removed.expect("an empty group"))
    });
}

/// Returns the groups in a group.
fn below(group: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(group).expect("a group");
    let paths = entries.map(|entry| entry.expect("readable").path());
    paths.filter(|path| path.is_dir()).collect()
}

#[test]
fn each_process_is_born_into_its_group() {
    run("born", async |world, root| {
        let own = root.strip_prefix(MOUNT).expect("below").to_owned();
        let clients = clients(world);
        // The shell reads its own group, so it must have been in it from the start.
        let ask = || {
            script(
                "while read -r line; do case $line in 0::*) echo ${line#0::};; esac; done </proc/self/cgroup",
            )
        };
        let user = group_of(&clients, ask()).await;
        assert_eq!(user.0, format!("{own}/user"));
        let another = group_of(&clients, ask()).await;
        assert!(another.0 == user.0 && another.1 != user.1, "{another:?}");
        let terminal = group_of(&clients, in_terminal(ask(), 80, 24)).await;
        assert_eq!(terminal.0, format!("{own}/ptys"));
        let tagged = |request| StartRequest {
            tag: Some("_system".into()),
            ..request
        };
        let system = group_of(&clients, tagged(ask())).await;
        assert_eq!(system.0, format!("{own}/system"));
        let system = group_of(&clients, tagged(in_terminal(ask(), 80, 24))).await;
        assert_eq!(system.0, format!("{own}/system"));
        assert_eq!(group_of_agent(world), format!("{own}/envd"));
    });
}

#[test]
fn children_stay_in_the_group() {
    run("children", async |world, root| {
        let clients = clients(world);
        let text = "sh -c 'grep ^0:: /proc/self/cgroup'";
        let child = clients.sh(text).await;
        let own = root.strip_prefix(MOUNT).expect("below");
        assert_eq!(split(child.trim()).0, format!("0::{own}/user"));
    });
}

#[test]
fn a_group_that_somebody_removed_keeps_nothing_from_running() {
    run("removed", async |world, root| {
        let clients = clients(world);
        // The agent listens before it has created its groups, and responds afterwards.
        assert_eq!(call("GET /health HTTP/1.1", b"").status, 204);
        let user = world.path(&format!("{root}/user"));
        fs::remove_dir(&user).expect("empty");
        assert_eq!(clients.sh("echo x").await, "x\n");
        fs::create_dir(&user).expect("made, for the test's end");
    });
}

/// Starts descendants in every way, and prints one PID per line: a job with its own process group, a
/// child with its own session, and a grandchild with its own session whose parent has ended.
const DESCENDANTS: &str = "set -m; sleep 1000 & echo $!; \
    setsid sh -c 'echo $$; exec sleep 1000' & \
    (setsid sh -c 'echo $$; exec sleep 1000' &); \
    wait";

/// Returns the PIDs that [`DESCENDANTS`] prints. The shell may print messages about its jobs, too.
async fn descendants(events: &mut Events) -> Vec<u32> {
    let mut printed = String::new();
    loop {
        printed.push_str(&events.until("\n").await);
        let whole = printed.rsplit_once('\n').map_or("", |(lines, _)| lines);
        let pids: Vec<u32> = whole
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect();
        if pids.len() == 3 {
            return pids;
        }
    }
}

#[test]
fn a_time_limit_and_a_kill_end_every_descendant() {
    run("killed", async |world, _| {
        let clients = clients(world);
        let plain = || program(&["/bin/bash", "-c", DESCENDANTS]);
        for request in [plain(), in_terminal(plain(), 80, 24)] {
            // Long enough for the descendants to start on a busy machine.
            let time = limit(Duration::from_secs(5));
            let events = clients.start_with(request.clone(), time).await;
            let mut events = events.expect("started");
            events.pid().await;
            let by_limit = descendants(&mut events).await;
            let outcome = events.rest().await;
            assert_eq!(outcome.end.error.as_deref(), Some("signal: killed"));

            let mut events = clients.start(request).await.expect("started");
            let pid = events.pid().await;
            let by_kill = descendants(&mut events).await;
            clients
                .signal(pid, Signal::SIGNAL_SIGKILL)
                .await
                .expect("sent");
            let outcome = events.rest().await;
            assert_eq!(outcome.end.error.as_deref(), Some("signal: killed"));
            eventually("all are gone", async || {
                let mut all = by_limit.iter().chain(&by_kill);
                !all.any(|pid| world.runs(*pid))
            })
            .await;
        }
    });
}

#[test]
fn a_group_is_removed_when_its_last_process_has_ended() {
    run("left", async |world, root| {
        let clients = clients(world);
        let user = world.path(&format!("{root}/user"));
        let text = "setsid sleep 1000 > /dev/null 2>&1 & echo $!";
        let survivor: u32 = clients.sh(text).await.trim().parse().expect("a PID");
        for _ in 0..20 {
            clients.sh("true").await;
        }
        eventually("one group is left", async || below(&user).len() == 1).await;
        assert!(world.runs(survivor));
        clients.sh(&format!("kill -9 {survivor}")).await;
        eventually("no group is left", async || {
            clients.sh("true").await;
            below(&user).is_empty()
        })
        .await;
    });
}

#[test]
fn a_value_of_a_group_is_written_in_every_way() {
    run("value", async |world, root| {
        let path = format!("{root}/user/cgroup.max.descendants");
        for (value, header) in [("100", ""), ("200", "\r\nwrenn-upload-whole: 1")] {
            let head = format!("POST /files?path={path}&username=user HTTP/1.1{header}");
            let answer = call(&head, value.as_bytes());
            assert_eq!(answer.status, 200, "{answer:?}");
            assert_eq!(world.read(&path), format!("{value}\n"));
            let owner = fs::metadata(world.path(&path)).expect("there").uid();
            assert_eq!(owner, 0, "a value of the kernel stays the kernel's");
        }
    });
}
