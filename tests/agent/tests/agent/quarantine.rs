//! Slots of VMs that cannot be ended.

use std::{fs, process::Stdio};

use crate::{
    agent::{TestAgent, on_private_host},
    private_host::Footprint,
};

/// A process in a group below the sandbox's group is not among its processes, so the agent does not
/// end it, and cannot remove the group.
#[test]
fn a_slot_is_not_given_away_while_a_process_of_its_vm_exists() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        let first = agent.create("sb-stuck").await.expect("made");
        let groups = agent.spec("sb-stuck").cgroups;
        assert!(!groups.is_empty(), "the test needs cgroups");
        let mut survivor = std::process::Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .expect("started");
        let inner: Vec<_> = groups.iter().map(|group| group.join("inner")).collect();
        for group in &inner {
            fs::create_dir(group).expect("made");
            fs::write(group.join("cgroup.procs"), survivor.id().to_string()).expect("moved");
        }

        let error = agent.destroy("sb-stuck").await.expect_err("not ended");
        assert!(error.to_string().contains("processes"), "{error}");
        let now = Footprint::now();
        assert_eq!(
            (now.slots, now.namespaces),
            (before.slots + 1, before.namespaces + 1)
        );
        let second = agent.create("sb-next").await.expect("made");
        assert_ne!(second.host_ip, first.host_ip);
        agent.destroy("sb-next").await.expect("destroyed");

        // The next agent does not give it away either.
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        let third = agent.create("sb-next").await.expect("made");
        assert_ne!(third.host_ip, first.host_ip);
        agent.destroy("sb-next").await.expect("destroyed");

        survivor.kill().expect("killed");
        survivor.wait().expect("ended");
        for group in &inner {
            fs::remove_dir(group).expect("removed");
        }
        agent.destroy("sb-stuck").await.expect("destroyed");
        let fourth = agent.create("sb-next").await.expect("made");
        assert_eq!(fourth.host_ip, first.host_ip);
        agent.destroy("sb-next").await.expect("destroyed");
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}
