//! Kernel command line, with the reason for each argument.

use wrenn_proto::{machine::VmmKind, supervise::Accel};

/// Arguments of every guest.
const COMMON: [&str; 12] = [
    // Boot timing and the diagnosis of failed boots depend on the console.
    "console=ttyS0",
    "quiet",
    "loglevel=1",
    // A panic ends the VMM at once, so that the loss is detected.
    "panic=-1",
    // There is one serial port; probing for more takes time.
    "8250.nr_uarts=1",
    // Self-tests of cryptographic code and audit records have no use in a guest.
    "cryptomgr.notests",
    "audit=0",
    // The first random numbers come from the CPU and virtio-rng instead of interrupt timing, which
    // takes time to collect.
    "random.trust_cpu=on",
    "net.ifnames=0",
    // Without a policy, security modules check every exec and open to no effect. No program reads
    // pressure stall information, and the watchdogs would report a lockup whenever a guest was
    // paused.
    "lsm=capability",
    "psi=0",
    "nowatchdog",
];

/// Arguments for software emulation, in addition to `tsc_early_khz`.
const TCG: [&str; 4] = [
    // Lost timer interrupts would make the kernel consider its best clock, which is the host's
    // counter, unstable, and fall back to counting interrupts.
    "tsc=reliable",
    // Speculation barriers cost a third of the emulation's speed and protect only the guest from
    // itself.
    "mitigations=off",
    // Unpacking the kernel at another address takes time; the addresses that could be guessed are
    // those of the guest's own kernel.
    "nokaslr",
    // QEMU looks up translated code by address, so a library that is mapped at a different address
    // in each process is translated again for each. That was four fifths of the time to start a
    // program. Again, the addresses that could be guessed are the guest's own.
    "norandmaps",
];

/// Arguments for hardware virtualization.
const KVM: [&str; 1] = [
    // The clock that stays correct across a pause; `/dev/ptp0` is based on it.
    "clocksource=kvm-clock",
];

/// Arguments for QEMU.
const QEMU: [&str; 1] = [
    // A reboot ends the VMM at once: the machine type has no keyboard controller, by which the
    // kernel would reset first.
    "reboot=t",
];

/// Arguments for Firecracker.
const FIRECRACKER: [&str; 6] = [
    // A reset by the keyboard controller is the only one that Firecracker handles.
    "reboot=k",
    // There is no PCI bus, and nothing but a reset behind the keyboard controller. Probing for
    // them takes time.
    "pci=off",
    "i8042.noaux",
    "i8042.nomux",
    "i8042.nopnp",
    "i8042.dumbkbd",
];

/// Returns the kernel command line of every template. `tsc_khz` is the frequency of this host's
/// time stamp counter.
///
/// In software emulation the guest reads the same counter, but it cannot measure its frequency
/// reliably: calibration fails at random, and a failed calibration hangs the boot. The frequency on
/// the command line determines the rate of the guest's clock.
#[must_use]
pub fn kernel_args(vmm: VmmKind, accel: Accel, tsc_khz: u32) -> String {
    let of_vmm: &[&str] = match vmm {
        VmmKind::Qemu => &QEMU,
        VmmKind::Firecracker => &FIRECRACKER,
    };
    let common = [&COMMON[..], of_vmm].concat();
    match accel {
        Accel::Tcg => {
            let speed = format!("tsc_early_khz={tsc_khz}");
            [&common[..], &TCG, &[&*speed]].concat().join(" ")
        }
        Accel::Kvm => [&common[..], &KVM].concat().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_run_has_its_arguments() {
        let [tcg, kvm] = [Accel::Tcg, Accel::Kvm].map(|a| kernel_args(VmmKind::Qemu, a, 2_100_000));
        assert!(tcg.ends_with(" tsc_early_khz=2100000"));
        for word in ["mitigations=off", "norandmaps"] {
            assert!(tcg.contains(word) && !kvm.contains(word));
        }
        let firecracker = kernel_args(VmmKind::Firecracker, Accel::Kvm, 1);
        for line in [&tcg, &kvm, &firecracker] {
            assert!(line.starts_with("console=ttyS0 "));
            assert_eq!(line.matches("reboot=").count(), 1, "{line}");
        }
        assert!(firecracker.contains(" reboot=k ") && kvm.contains(" reboot=t "));
        assert!(firecracker.contains("clocksource=kvm-clock"));
    }
}
