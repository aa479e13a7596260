//! The same scenarios for each VMM: boot, commands, files, pause and resume, named snapshots,
//! network policy, the end of a guest, and the death of processes.
//!
//! | suite         | guests                     | runs in                                       |
//! |---------------|----------------------------|-----------------------------------------------|
//! | `qemu`        | accelerator of the machine | `make test`                                   |
//! | `qemu_kvm`    | KVM                        | `make test-firecracker`                       |
//! | `firecracker` | KVM                        | `make test-firecracker`                       |
//!
//! The suite of `qemu` has only the scenarios that no other module has for QEMU: the failpoints of
//! pause and resume are in `pause_faults`, the network policy is in `network`.
//!
//! Hosts without hardware virtualization for KVM need a kernel of their own in the guests, and are
//! slow. All suites therefore start few processes in a guest: a program that holds data answers all
//! questions ([`witness`]).

mod basics;
mod copies;
mod failpoints;
mod generations;
mod guest_ends;
mod kills;
mod witness;

use anyhow::Result;

use wrenn_e2e::vmms::Vmm;

/// Defines the module of a suite: one test per line. All tests have the attributes that precede
/// them.
macro_rules! suite {
    ($(#[$of_all:meta])* $suite:ident: $vmm:path; $($test:ident = $scenario:path;)+) => {
        mod $suite {
            use super::*;

            suite! { @tests [$(#[$of_all])*] $vmm; $($test = $scenario;)+ }
        }
    };
    (@tests $of_all:tt $vmm:path; $($test:ident = $scenario:path;)+) => {
        $(suite! { @test $of_all $vmm; $test = $scenario; })+
    };
    (@test [$(#[$of_all:meta])*] $vmm:path; $test:ident = $scenario:path;) => {
        #[tokio::test]
        $(#[$of_all])*
        async fn $test() -> Result<()> {
            $scenario(&$vmm()?).await
        }
    };
}

suite! {
    qemu: Vmm::qemu;
    sandbox_boots_from_its_disk_and_serves_commands_and_files = basics::boots_and_serves;
    memory_and_disk_survive_three_generations = generations::survive;
    copies_of_a_named_snapshot_have_its_data_and_their_own_identity = copies::are_independent;
    guest_that_reboots_or_panics_ends_with_a_reason_and_leaves_nothing = guest_ends::are_reported;
    killed_processes_lose_no_snapshot_and_leave_nothing = kills::lose_no_snapshot;
}

suite! {
    #[ignore = "needs KVM that runs the guest's kernel; run make test-firecracker"]
    qemu_kvm: Vmm::qemu_kvm;
    sandbox_boots_from_its_disk_and_serves_commands_and_files = basics::boots_and_serves;
    memory_and_disk_survive_three_generations = generations::survive;
    copies_of_a_named_snapshot_have_its_data_and_their_own_identity = copies::are_independent;
    guest_that_reboots_or_panics_ends_with_a_reason_and_leaves_nothing = guest_ends::are_reported;
    killed_processes_lose_no_snapshot_and_leave_nothing = kills::lose_no_snapshot;
}

suite! {
    #[ignore = "needs WRENN_FIRECRACKER and WRENN_TEST_KERNEL; run make test-firecracker"]
    firecracker: Vmm::firecracker;
    sandbox_boots_from_its_disk_and_serves_commands_and_files = basics::boots_and_serves;
    memory_and_disk_survive_three_generations = generations::survive;
    copies_of_a_named_snapshot_have_its_data_and_their_own_identity = copies::are_independent;
    egress_is_denied_unless_allowed = basics::egress_follows_the_request;
    guest_that_reboots_or_panics_ends_with_a_reason_and_leaves_nothing = guest_ends::are_reported;
    killed_processes_lose_no_snapshot_and_leave_nothing = kills::lose_no_snapshot;
    death_of_the_agent_in_a_pause_loses_nothing = failpoints::agent_in_a_pause;
    death_of_the_agent_in_a_resume_loses_nothing = failpoints::agent_in_a_resume;
    death_of_the_vm_in_a_pause_keeps_the_last_snapshot = failpoints::vm_in_a_pause;
    death_of_the_vm_in_a_resume_keeps_the_snapshot = failpoints::vm_in_a_resume;
}
