//! The kernel's command line, with the reason for each word.

use wrenn_proto::supervise::Accel;

/// What every guest is booted with.
const COMMON: [&str; 13] = [
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
    // Without a policy, security modules check every exec and open for nothing; nor does anybody read how long who waited, or want
    // a report when a guest stood still while it was frozen.
    "lsm=capability",
    "psi=0",
    "nowatchdog",
];

/// Software emulation only, beside `tsc_early_khz`.
const TCG: [&str; 4] = [
    // Lost timer interrupts would make the kernel take its best clock, which is the host's counter, for a bad one, and fall back
    // to counting them.
    "tsc=reliable",
    // Speculation barriers cost emulation a third of its speed and protect nothing that is not the guest's own.
    "mitigations=off",
    // Unpacking the kernel somewhere else takes time; what could be guessed is the guest's own kernel.
    "nokaslr",
    // QEMU finds translated code by its address, so a library that lies elsewhere in each process is translated again for each:
    // that was four fifths of what starting a program took. What could be guessed is, again, the guest's own.
    "norandmaps",
];

/// Hardware virtualization only.
const KVM: [&str; 1] = [
    // The clock that stays right over a pause, and that `/dev/ptp0` is made of.
    "clocksource=kvm-clock",
];

/// The kernel command line of every template. `tsc_khz` is how fast this host's time stamp counter counts.
///
/// In software emulation that counter is the guest's, too, and a guest cannot measure it: its calibration is a coin toss, and a
/// lost toss hangs the boot. What it believes is how fast its clock goes.
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
