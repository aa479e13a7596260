//! VMMs that the scenarios run with: their settings and their images.

mod images;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use crate::{
    Sandbox, Service,
    host::{Role, process_of},
    wait::set_patience,
};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;

/// Memory of the templates, MiB. Such a sandbox is restored from the template's snapshot.
const TEMPLATE_MIB: u32 = 512;

/// Another size, MiB. Such a sandbox boots.
const OTHER_MIB: u32 = 256;

/// Factor of the deadlines of guests whose kernel is interpreted.
const INTERPRETED_PATIENCE: u32 = 4;

/// Kernel arguments for guests whose kernel is interpreted. Its timer is not precise enough for the
/// checks of the boot, and it saves no AVX registers, so no program may use them.
const INTERPRETED_ARGS: &str = "no_timer_check tsc=reliable \
    GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-ERMS,-FSRM";

/// QEMU triple-faults to reboot, by an instruction that cannot be interpreted.
const INTERPRETED_QEMU_ARGS: &str = "reboot=a";

/// True if the processor has hardware virtualization. Without it, KVM interprets the guest's
/// kernel, and only the kernel of `WRENN_TEST_KERNEL` runs.
static HAS_VIRTUALIZATION: LazyLock<bool> = LazyLock::new(|| {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
});

/// VMM with the settings that select it.
pub struct Vmm {
    /// Name of the program in the command lines of its processes.
    pub program: &'static str,
    /// True if a process of its own presents the disk to the VMM.
    pub exports_disk: bool,
    /// True if the VMM crashes when a restored guest shuts its devices down. In QEMU 7.2, the reset
    /// of the network card uses a timer that was freed after the restore (`timer_del`).
    pub crashes_at_a_restored_shutdown: bool,
    settings: BTreeMap<String, String>,
    /// Image directory, if it is not that of the test run.
    images: Option<PathBuf>,
}

impl Vmm {
    /// QEMU, as all other scenarios use it.
    pub fn qemu() -> Result<Self> {
        Ok(Self {
            program: "qemu-system",
            exports_disk: false,
            crashes_at_a_restored_shutdown: true,
            settings: settings(&[("WRENN_VMM", "qemu")]),
            images: None,
        })
    }

    /// QEMU with KVM.
    pub fn qemu_kvm() -> Result<Self> {
        let mut settings = settings(&[("WRENN_VMM", "qemu"), ("WRENN_ACCEL", "kvm")]);
        let kernel = test_kernel("WRENN_TEST_KERNEL_QEMU")?;
        if !*HAS_VIRTUALIZATION {
            settings.insert("WRENN_CPU".to_owned(), "qemu64".to_owned());
            interpret(&mut settings, INTERPRETED_QEMU_ARGS);
        }
        Ok(Self {
            program: "qemu-system",
            exports_disk: false,
            crashes_at_a_restored_shutdown: true,
            images: Some(images::of("qemu-kvm", &settings, kernel.as_deref())?),
            settings,
        })
    }

    /// Firecracker.
    pub fn firecracker() -> Result<Self> {
        let mut settings = settings(&[("WRENN_VMM", "firecracker")]);
        let program = env::var("WRENN_FIRECRACKER").context("WRENN_FIRECRACKER is not set")?;
        settings.insert("WRENN_FIRECRACKER".to_owned(), program);
        let kernel = test_kernel("WRENN_TEST_KERNEL")?;
        if !*HAS_VIRTUALIZATION {
            interpret(&mut settings, "");
        }
        Ok(Self {
            program: "firecracker",
            exports_disk: true,
            crashes_at_a_restored_shutdown: false,
            images: Some(images::of("firecracker", &settings, kernel.as_deref())?),
            settings,
        })
    }

    /// Starts a service that uses this VMM.
    pub async fn service(&self) -> Result<Service> {
        Service::start_configured(self.images.as_deref(), &self.settings).await
    }

    /// Creates a sandbox that boots.
    pub async fn boot<'a>(&self, service: &'a Service) -> Result<Sandbox<'a>> {
        self.create(service, OTHER_MIB).await
    }

    /// Creates a sandbox that is restored from the template's snapshot.
    pub async fn restore<'a>(&self, service: &'a Service) -> Result<Sandbox<'a>> {
        self.create(service, TEMPLATE_MIB).await
    }

    async fn create<'a>(&self, service: &'a Service, memory_mb: u32) -> Result<Sandbox<'a>> {
        let sandbox = service
            .create_with(json!({ "memory_mb": memory_mb }))
            .await?;
        self.ensure_used(sandbox.id())?;
        Ok(sandbox)
    }

    /// Checks that a sandbox runs in this VMM.
    pub fn ensure_used(&self, id: &str) -> Result<()> {
        let pid = process_of(id, Role::Vmm).context("no VMM")?;
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        let program = line.split('\0').next().unwrap_or_default();
        ensure!(program.contains(self.program), "{id} runs in {program}");
        let has_exporter = process_of(id, Role::DiskExporter).is_some();
        ensure!(
            has_exporter == self.exports_disk,
            "{id}: exporter: {has_exporter}"
        );
        Ok(())
    }
}

fn settings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// Adds the settings of guests whose kernel is interpreted.
fn interpret(settings: &mut BTreeMap<String, String>, args: &str) {
    set_patience(INTERPRETED_PATIENCE);
    // The check boots a guest that cannot be interpreted.
    settings.insert("WRENN_KVM_CHECK".to_owned(), "0".to_owned());
    let args = format!("{INTERPRETED_ARGS} {args}");
    settings.insert("WRENN_KERNEL_ARGS".to_owned(), args.trim().to_owned());
}

/// Returns the kernel of guests on hosts without hardware virtualization, which a variable names.
/// `None` if the template's kernel runs.
fn test_kernel(variable: &str) -> Result<Option<PathBuf>> {
    if *HAS_VIRTUALIZATION {
        return Ok(None);
    }
    let path = env::var_os(variable).with_context(|| format!("{variable} is not set"))?;
    let path = Path::new(&path);
    ensure!(
        path.is_file(),
        "{variable}: no kernel at {}",
        path.display()
    );
    Ok(Some(path.to_owned()))
}
