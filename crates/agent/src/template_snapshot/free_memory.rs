//! Free memory of a guest whose snapshot is about to be taken.
//!
//! The guest reports free memory to the balloon in the background, some seconds after it was freed.
//! If the snapshot were taken before, every sandbox of the template would repeat that work, and the
//! snapshot would contain what the free pages held.

use super::{
    TemplateSnapshotError,
    guest_command::{User, run_command},
};
use crate::sandbox::Sandbox;

/// Program that ends when the guest has reported almost all of its free blocks of 2 MiB and more,
/// or after 40 s: the guest then reports nothing, and the snapshot is only larger.
///
/// `/proc/kpageflags` has one word per page. All pages of a free block have the flag `BUDDY`. The
/// first page of a reported block also has the flag `UPTODATE`, which means something else in used
/// pages (`PG_reported` in the kernel's `page-flags.h`). The largest block has 4 MiB, and two free
/// halves of it are always one block, so the second half has no flag of its own. The kernel reports
/// nothing of the first 16 MiB (`ZONE_DMA`), because a small zone is always short of memory. The
/// program itself uses and frees memory, so a few blocks remain.
const UNTIL_REPORTED: &str = r#"
import array, time
BUDDY, REPORTED, HALF, FIRST = 1 << 10, 1 << 3, 512, 4096
def unreported():
    flags = array.array("Q")
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        while part := file.read(1 << 16):
            flags.frombytes(part)
    count = 0
    for start in range(FIRST, len(flags) - HALF + 1, HALF):
        if start % (2 * HALF) == 0:
            is_free = False
        is_second = is_free
        is_free = all(flag & BUDDY for flag in flags[start:start + HALF])
        count += is_free and not is_second and not flags[start] & REPORTED
    return count
end = time.monotonic() + 40
while unreported() > 4 and time.monotonic() < end:
    time.sleep(0.5)
"#;

/// Waits until the guest has reported its free memory.
pub(super) async fn await_reported(sandbox: &Sandbox) -> Result<(), TemplateSnapshotError> {
    run_command(sandbox, User::Root, &["python3", "-c", UNTIL_REPORTED]).await
}
