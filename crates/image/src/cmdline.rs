//! Kernel command line, with the reason for each argument.

use wrenn_proto::supervise::Accel;

/// Arguments of every guest.
const COMMON: [&str; 13] = [
    // Boot timing and the diagnosis of failed boots depend on the console.
    "console=ttyS0",
    "quiet",
    "loglevel=1",
    // A panic or reboot ends the VMM at once, so that the loss is detected.
    "panic=-1",
    "reboot=t",
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

/// Returns the kernel command line of every template. `tsc_khz` is the frequency of this host's
/// time stamp counter.
///
/// In software emulation the guest reads the same counter, but it cannot measure its frequency
/// reliably: calibration fails at random, and a failed calibration hangs the boot. The frequency on
/// the command line determines the rate of the guest's clock.
#[must_use]
pub fn kernel_args(accel: Accel, tsc_khz: u32) -> String {
    match accel {
        Accel::Tcg => {
            let speed = format!("tsc_early_khz={tsc_khz}");
            [&COMMON[..], &TCG, &[&*speed]].concat().join(" ")
        }
        Accel::Kvm => [&COMMON[..], &KVM].concat().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_run_has_its_words() {
        assert!(kernel_args(Accel::Tcg, 2_100_000).ends_with(" tsc_early_khz=2100000"));
        for word in ["mitigations=off", "norandmaps"] {
            assert!(kernel_args(Accel::Tcg, 1).contains(word));
            assert!(!kernel_args(Accel::Kvm, 1).contains(word));
        }
        assert!(kernel_args(Accel::Kvm, 1).starts_with("console=ttyS0 "));
    }
}
