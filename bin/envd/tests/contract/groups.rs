//! Cgroup membership of processes.

use std::{fs, path::Path};

use wrenn_proto::rpc::process::StartRequest;

use crate::{
    calls::{Clients, clients, script},
    raw::call,
    terminal::in_terminal,
    world::{World, run_with},
};

/// Mount point of cgroups in the test environment.
const MOUNT: &str = "/mnt/groups";

/// Returns a process's group relative to the test's own group, as the process itself sees it.
async fn group_of(clients: &Clients, request: StartRequest) -> String {
    let outcome = clients.run(request).await;
    assert_eq!(outcome.end.exit_code, 0, "{outcome:?}");
    let bytes = [outcome.stdout, outcome.terminal].concat();
    String::from_utf8(bytes).expect("text").trim().to_owned()
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
            crate::world::wait_for(group, || {
                let removed = fs::remove_dir(root.join(group).components().as_path());
                // The processes of the group are still exiting.
                let busy = std::io::ErrorKind::ResourceBusy;
                let waits = removed.as_ref().is_err_and(|error| error.kind() == busy);
                (!waits).then(|| removed.expect(group))
            });
        }
    });
    thread.join().expect("removed");
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
        assert_eq!(user, format!("{own}/user"));
        let terminal = group_of(&clients, in_terminal(ask(), 80, 24)).await;
        assert_eq!(terminal, format!("{own}/ptys"));
        let tagged = |request| StartRequest {
            tag: Some("_system".into()),
            ..request
        };
        let system = group_of(&clients, tagged(ask())).await;
        assert_eq!(system, format!("{own}/system"));
        let system = group_of(&clients, tagged(in_terminal(ask(), 80, 24))).await;
        assert_eq!(system, format!("{own}/system"));
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
        assert_eq!(child, format!("0::{own}/user\n"));
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
