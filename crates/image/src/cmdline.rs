//! The kernel's command line, with the reason for each word.

use wrenn_proto::supervise::Accel;

/// What every guest is booted with.
const COMMON: [&str; 10] = [
    // The console is how a boot is timed and how a guest that does not come up is understood.
    "console=ttyS0",
    "quiet",
    "loglevel=1",
    // A panic or reboot ends the VMM at once, so that the loss is known.
    "panic=-1",
    "reboot=t",
    // There is one serial port; looking for others takes time.
    "8250.nr_uarts=1",
    // Self tests of cipher code and audit records serve nobody in a guest.
    "cryptomgr.notests",
    "audit=0",
    // The first random numbers come from the CPU and virtio-rng, not from waiting for interrupts.
    "random.trust_cpu=on",
    "net.ifnames=0",
];

/// Software emulation only.
const TCG: [&str; 3] = [
    // The calibration of the time stamp counter is a coin toss in software, and a lost toss hangs the boot.
    "tsc_early_khz=2000000",
    // Speculation barriers cost emulation a third of its speed and protect nothing that is not the guest's own.
    "mitigations=off",
    // Unpacking the kernel somewhere else takes time; what could be guessed is the guest's own kernel.
    "nokaslr",
];

/// Hardware virtualization only.
const KVM: [&str; 1] = [
    // The clock that stays right over a pause, and that `/dev/ptp0` is made of.
    "clocksource=kvm-clock",
];

/// The kernel command line of every template.
#[must_use]
pub fn kernel_args(accel: Accel) -> String {
    let more: &[&str] = match accel {
        Accel::Tcg => &TCG,
        Accel::Kvm => &KVM,
    };
    [&COMMON[..], more].concat().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_run_has_its_words() {
        assert!(kernel_args(Accel::Tcg).contains("tsc_early_khz="));
        assert!(!kernel_args(Accel::Kvm).contains("mitigations=off"));
        assert!(kernel_args(Accel::Kvm).starts_with("console=ttyS0 "));
    }
}
