//! Guest of a few instructions: a loop in 32-bit kernel mode.

use std::path::Path;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

/// Size of a page, in bytes.
const PAGE_BYTES: usize = 4096;

/// Address of the guest's code: its second page.
const CODE_ADDRESS: u64 = 0x1000;

/// Number of iterations. Takes some 25 ms in hardware, and half a minute where KVM interprets.
const ITERATIONS: u32 = 20_000_000;

/// Port that the guest writes to at its end.
const PORT: u8 = 0x10;

/// Failure to run the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TinyGuestError {
    /// KVM rejected a request.
    #[error("failed to {step}")]
    Kvm {
        /// Step that failed.
        step: &'static str,
        /// Error returned by the kernel.
        source: std::io::Error,
    },
    /// The guest stopped for another reason than the end of its code.
    #[error("the guest stopped early: {0}")]
    Stopped(String),
}

/// Runs the guest through `device` (`/dev/kvm`) to its end. May block for ever, so the caller limits
/// the time by running it in a process of its own.
///
/// # Errors
/// See [`TinyGuestError`].
pub fn run_tiny_guest(device: &Path) -> Result<(), TinyGuestError> {
    let device = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
        .map_err(|error| failed("open the device", error.into()))?;
    let kvm = Kvm::new_with_path(device).map_err(kvm_failed("open the device"))?;
    let vm = kvm.create_vm().map_err(kvm_failed("create a VM"))?;
    let mut memory = Box::new([
        Page([0; PAGE_BYTES]),
        Page::starting_with(&code(ITERATIONS)),
    ]);
    let region = kvm_userspace_memory_region {
        memory_size: size_of_val(&*memory) as u64,
        userspace_addr: (&raw mut *memory) as u64,
        ..kvm_userspace_memory_region::default()
    };
    // SAFETY: the memory is aligned to pages and exists for as long as the VM: `vm` and `vcpu` are
    // dropped before it. It is not accessed while the guest runs.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm_failed("give the VM memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm_failed("create a vCPU"))?;
    prepare(&vcpu).map_err(kvm_failed("set the registers of the vCPU"))?;
    let ended = match vcpu.run().map_err(kvm_failed("run the vCPU"))? {
        VcpuExit::IoOut(port, _) if port == u16::from(PORT) => Ok(()),
        other => Err(TinyGuestError::Stopped(format!("{other:?}"))),
    };
    drop((vcpu, vm));
    drop(memory);
    ended
}

/// Returns the code: a loop, and a write to a port.
fn code(iterations: u32) -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, iterations
    code.extend(iterations.to_le_bytes());
    code.push(0x49); // dec ecx
    code.extend([0x75, 0xfd]); // jnz to the decrement
    code.extend([0xe6, PORT]); // out PORT, al
    code.push(0xf4); // hlt
    code
}

/// Sets a vCPU to 32-bit protected mode without paging, at the start of the code.
fn prepare(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut system = vcpu.get_sregs()?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3, // writable, accessed
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..kvm_segment::default()
    };
    system.cs = kvm_segment {
        selector: 0x08,
        type_: 11, // executable, readable, accessed
        ..data
    };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.cr0 |= 1;
    vcpu.set_sregs(&system)?;
    let mut general = vcpu.get_regs()?;
    general.rip = CODE_ADDRESS;
    general.rflags = 2;
    vcpu.set_regs(&general)
}

/// Page of the guest's memory. KVM takes only whole pages.
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

impl Page {
    fn starting_with(content: &[u8]) -> Self {
        let mut page = [0; PAGE_BYTES];
        for (to, from) in page.iter_mut().zip(content) {
            *to = *from;
        }
        Self(page)
    }
}

fn kvm_failed(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> TinyGuestError {
    move |error| failed(step, error.into())
}

fn failed(step: &'static str, source: std::io::Error) -> TinyGuestError {
    TinyGuestError::Kvm { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_is_an_error_of_the_first_step() {
        let error = run_tiny_guest(Path::new("/dev/no-such-device")).expect_err("there is none");
        assert!(matches!(error, TinyGuestError::Kvm { .. }), "{error}");
    }

    #[test]
    fn code_is_what_the_comments_say() {
        let expected = [
            0xb9, 0x04, 0x03, 0x02, 0x01, 0x49, 0x75, 0xfd, 0xe6, 0x10, 0xf4,
        ];
        assert_eq!(code(0x0102_0304), expected);
    }
}
