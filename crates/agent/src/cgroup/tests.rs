//! Tests with real groups of this host, in one instance directory per test.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Stdio};

use super::*;

/// Size of a guest with a small disk.
pub(super) const fn size(memory_mib: u32, vcpus: u32) -> MachineSize {
    MachineSize {
        vcpus,
        memory_mib,
        disk_mib: 1024,
    }
}

fn cgroups(test: &str) -> Cgroups {
    let instance = format!("test-{test}-{}", std::process::id());
    let common = CommonLimits {
        memory_bytes: 1 << 30,
        swap_bytes: 0,
        io: None,
    };
    let cgroups = Cgroups::detect(&instance, common);
    assert!(
        !cgroups.hierarchies.is_empty(),
        "this host has no usable cgroups"
    );
    cgroups
}

fn create(cgroups: &Cgroups, id: &SandboxId, size: MachineSize) {
    let (vmm, supervisor) = (Limits::for_guest(size), Limits::for_supervisor(size));
    cgroups.create(id, vmm, supervisor).unwrap();
}

fn id() -> SandboxId {
    "sb-cgroup".parse().unwrap()
}

/// Starts a process that joins all groups, as a jail does.
fn spawn_inside(directories: &[PathBuf]) -> std::process::Child {
    let mut script = String::new();
    for dir in directories {
        script += &format!("echo 0 > {}/cgroup.procs\n", dir.display());
    }
    script += "echo in; exec sleep 1000";
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 3];
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    child
}

#[tokio::test]
async fn group_limits_its_processes_and_is_removed_with_them() {
    let cgroups = cgroups("limits");
    create(&cgroups, &id(), size(256, 1));
    let directories = cgroups.directories(&id());
    let read = |file: &str| {
        let find = |dir: &PathBuf| fs::read_to_string(dir.join(file)).ok();
        directories.iter().find_map(find).unwrap_or_default()
    };
    let memory = read("memory.limit_in_bytes") + &read("memory.max");
    assert_eq!(memory.trim(), (512_u64 * 1024 * 1024).to_string());
    // All sandboxes together have a limit, too.
    let parents = directories.iter().filter_map(|dir| dir.parent());
    let of_all: Vec<String> = ["memory.limit_in_bytes", "memory.max"]
        .iter()
        .flat_map(|file| parents.clone().map(move |dir| dir.join(file)))
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect();
    assert_eq!(of_all.concat().trim(), (1_u64 << 30).to_string());
    let mut child = spawn_inside(&directories);
    assert_eq!(processes(&directories).unwrap().len(), 1);
    assert_eq!(cgroups.existing(), [id()]);
    // The child must be reaped while the removal waits for the group to become empty.
    let reaper = tokio::task::spawn_blocking(move || child.wait().unwrap());
    cgroups.remove(&id()).await.unwrap();
    assert!(!reaper.await.unwrap().success());
    assert!(directories.iter().all(|dir| !dir.exists()));
    assert!(
        directories
            .iter()
            .all(|dir| !dir.parent().unwrap().exists())
    );
    cgroups.remove(&id()).await.unwrap();
}

#[tokio::test]
async fn groups_created_and_removed_concurrently_leave_nothing() {
    let cgroups = cgroups("parallel");
    let ids: Vec<SandboxId> = (0..20)
        .map(|n| format!("sb-{n}").parse().unwrap())
        .collect();
    for _ in 0..3 {
        let cycle = |id: SandboxId| {
            let cgroups = cgroups.clone();
            tokio::spawn(async move {
                create(&cgroups, &id, size(128, 1));
                cgroups.remove(&id).await.unwrap();
            })
        };
        for task in ids.iter().cloned().map(cycle) {
            task.await.unwrap();
        }
    }
    assert!(cgroups.existing().is_empty());
    for hierarchy in &cgroups.hierarchies {
        assert!(!hierarchy.instance_dir(&cgroups.instance).exists());
    }
}

#[tokio::test]
async fn a_supervisor_has_a_group_of_its_own_that_is_removed_with_the_sandbox() {
    let cgroups = cgroups("supervisor");
    assert_eq!(cgroups.missing(), [""; 0]);
    create(&cgroups, &id(), size(256, 1));
    let directories = cgroups.supervisor_directories(&id());
    let read = |file: &str| {
        let find = |dir: &PathBuf| fs::read_to_string(dir.join(file)).ok();
        directories.iter().find_map(find).unwrap_or_default()
    };
    assert_eq!(read("pids.max").trim(), SUPERVISOR_THREADS.to_string());
    let mut child = spawn_inside(&directories);
    assert_eq!(cgroups.existing(), [id()]);
    let reaper = tokio::task::spawn_blocking(move || child.wait().unwrap());
    cgroups.remove(&id()).await.unwrap();
    assert!(!reaper.await.unwrap().success());
    assert!(
        cgroups
            .all_directories(&id())
            .iter()
            .all(|dir| !dir.exists())
    );
    assert!(cgroups.existing().is_empty());
}
