//! Memory and disk space that a guest gives back: it returns to the host, is not part of the next
//! snapshot, and never shows anything else than what the guest wrote.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service,
    host::{resident_kb, vmm_of},
    rounds,
    wait::{GENEROUS, until},
};
use wrenn_proto::guest::SETTLED;

const MIB: u64 = 1 << 20;

/// Uses 250 MiB of memory and ends.
const USE_MEMORY: &str = r#"
memory = bytearray(250 << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
print(len(memory) >> 20)
"#;

/// Allocates and frees memory all the time, and checks that each block has the content that was
/// written to it. Writes the number of turns to `/dev/shm/turns`, and a mismatch to `/dev/shm/bad`.
/// After each 20 turns, everything is freed for three seconds, in which the guest reports it.
const CHURN: &str = r#"
import mmap, random, time, zlib
MIB = 1 << 20
def pattern(seed, size):
    return random.Random(seed).randbytes(1 << 16) * (size >> 16)
def note(name, text):
    with open("/dev/shm/" + name, "w") as file:
        file.write(text + "\n")
held, seed, turns = [], 0, 0
def check(area, seed, size):
    if zlib.crc32(area) != zlib.crc32(pattern(seed, size)):
        note("bad", f"block {seed} of {size} bytes, turn {turns}")
        raise SystemExit(1)
def free(index):
    area, seed, size = held.pop(index)
    check(area, seed, size)
    area.close()
while True:
    turns += 1
    if turns % 20 == 0:
        while held:
            free(-1)
        time.sleep(3)
    elif len(held) > 12 or held and random.random() < 0.4:
        free(random.randrange(len(held)))
    else:
        seed, size = seed + 1, random.randrange(1, 13) * MIB
        area = mmap.mmap(-1, size)
        area[:] = pattern(seed, size)
        held.append((area, seed, size))
    if held:
        check(*random.choice(held))
    note("turns", str(turns))
    time.sleep(0.02)
"#;

/// Size of the template: such a sandbox is restored from the template's snapshot.
const TEMPLATE_MIB: u32 = 512;

/// Another size: such a sandbox boots.
const OTHER_MIB: u32 = 600;

/// Creates a sandbox and waits until its start is complete.
async fn create(service: &Service, body: Value) -> Result<Sandbox<'_>> {
    let sandbox = service.create_with(body).await?;
    let settled = format!("until [ -e {SETTLED} ]; do sleep 0.1; done");
    ensure!(sandbox.shell(&settled).await?.code == 0);
    Ok(sandbox)
}

/// Returns the resident memory of a sandbox's VMM, in MiB.
fn resident_mib(sandbox: &Sandbox<'_>) -> Result<u64> {
    let pid = vmm_of(sandbox.id()).context("no VMM")?;
    Ok(resident_kb(u32::try_from(pid)?)? / 1024)
}

/// Returns the size of the memory file that was written last, in MiB.
fn last_diff_mib(service: &Service) -> Result<u64> {
    let files = fs::read_dir(service.dir().join("snapshots/memory"))?.flatten();
    let newest = files
        .filter_map(|file| {
            let meta = file.metadata().ok()?;
            Some((meta.modified().ok()?, meta.len()))
        })
        .max();
    Ok(newest.context("no memory file")?.1 / MIB)
}

async fn use_memory(sandbox: &Sandbox<'_>) -> Result<()> {
    let used = sandbox.exec("python3", &["-c", USE_MEMORY]).await?;
    ensure!(used.stdout == "250\n", "{used:?}");
    Ok(())
}

/// Has the guest use memory until the VMM holds at least `least_mib`, and then free it.
async fn use_and_free_memory(sandbox: &Sandbox<'_>, least_mib: u64) -> Result<()> {
    let program = format!(
        "{USE_MEMORY}\nimport os, time\nwhile not os.path.exists('/dev/shm/free'): time.sleep(0.1)"
    );
    let args = ["-c", &program];
    let using = sandbox.exec("python3", &args);
    let freeing = async {
        until("the memory is used", GENEROUS, async || {
            Ok((resident_mib(sandbox)? >= least_mib).then_some(()))
        })
        .await?;
        sandbox.shell("touch /dev/shm/free").await
    };
    let (used, freed) = tokio::join!(using, freeing);
    ensure!(freed?.code == 0 && used?.stdout == "250\n");
    ensure!(sandbox.shell("rm /dev/shm/free").await?.code == 0);
    Ok(())
}

/// Waits until the VMM holds at most `limit_mib`.
async fn shrinks(sandbox: &Sandbox<'_>, limit_mib: u64) -> Result<()> {
    let what = format!("the VMM holds at most {limit_mib} MiB");
    let shrunk = until(&what, Duration::from_secs(60), async || {
        Ok((resident_mib(sandbox)? <= limit_mib).then_some(()))
    });
    if let Err(error) = shrunk.await {
        let free = sandbox.shell("free -m; cat /proc/buddyinfo").await?.stdout;
        let now = resident_mib(sandbox)?;
        return Err(error.context(format!(
            "the VMM holds {now} MiB, the guest reports:\n{free}"
        )));
    }
    Ok(())
}

#[tokio::test]
async fn memory_that_a_guest_frees_returns_to_the_host_and_is_in_no_snapshot() -> Result<()> {
    let service = Service::start().await?;
    // The second round of the booted one is restored, with a parent snapshot of its own.
    for (memory_mb, rounds) in [(TEMPLATE_MIB, 1), (OTHER_MIB, 2)] {
        let sandbox = create(&service, json!({ "memory_mb": memory_mb })).await?;
        for round in 0..rounds {
            // A restored VM holds less than a booted one.
            let before = resident_mib(&sandbox)?;
            use_and_free_memory(&sandbox, before + 150).await?;
            // Some of it stays: blocks that are not free as a whole, and code that QEMU translated.
            shrinks(&sandbox, before + 100).await?;
            sandbox.pause().await?;
            let written = last_diff_mib(&service)?;
            assert!(written < 160, "round {round}: {written} MiB");
            sandbox.resume().await?;
        }
        // The guest uses what it gave back, and what was given back before the pause.
        use_memory(&sandbox).await?;
        sandbox.destroy().await?;
    }
    Ok(())
}

/// Returns the number of turns that a churning guest has completed. Fails if memory had another
/// content than was written to it.
async fn turns(sandbox: &Sandbox<'_>) -> Result<u64> {
    let output = sandbox
        .shell("cat /dev/shm/bad 2>/dev/null && exit 1; cat /dev/shm/turns")
        .await?;
    ensure!(output.code == 0, "{}: {}", sandbox.id(), output.stdout);
    Ok(output.stdout.trim().parse().unwrap_or(0))
}

/// Waits until a churning guest has completed `more` turns.
async fn churns_on(sandbox: &Sandbox<'_>, more: u64) -> Result<u64> {
    let before = turns(sandbox).await?;
    until("the guest churns on", GENEROUS, async || {
        Ok(Some(turns(sandbox).await?).filter(|now| *now >= before + more))
    })
    .await
}

#[tokio::test]
async fn a_guest_that_frees_memory_all_the_time_keeps_what_it_wrote() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = create(&service, json!({ "memory_mb": TEMPLATE_MIB })).await?;
    sandbox.write("/root/churn.py", CHURN).await?;
    let body = json!({ "cmd": "python3", "args": ["/root/churn.py"], "background": true });
    let (status, started) = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await?;
    ensure!(status == StatusCode::ACCEPTED, "{started}");
    until("the guest churns", GENEROUS, async || {
        Ok(turns(&sandbox).await.ok().filter(|turns| *turns > 0))
    })
    .await?;
    // At any point between two phases.
    for cycle in 0..rounds(20).max(2) {
        churns_on(&sandbox, 13 + u64::try_from(cycle)? % 11).await?;
        sandbox.pause().await?;
        sandbox.resume().await?;
    }
    let fork = json!({ "count": 1 });
    let (status, copies) = service
        .json(Method::POST, &sandbox.path("/fork"), &fork)
        .await?;
    ensure!(status.is_success(), "{copies}");
    let named = json!({ "sandbox_id": sandbox.id(), "name": "churning" });
    let (status, made) = service.json(Method::POST, "/v1/snapshots", &named).await?;
    ensure!(status.is_success(), "{made}");
    let copy = copies[0]["id"].as_str().context("no id")?.to_owned();
    let copy = Sandbox::new(&service, copy);
    let spawned = create(
        &service,
        json!({ "template": "churning", "memory_mb": TEMPLATE_MIB }),
    )
    .await?;
    let all = [&sandbox, &copy, &spawned];
    let churning = all.map(|sandbox| churns_on(sandbox, 25));
    futures::future::try_join_all(churning).await?;
    for sandbox in all {
        sandbox.pause().await?;
        sandbox.resume().await?;
        churns_on(sandbox, 1).await?;
    }
    spawned.destroy().await?;
    copy.destroy().await?;
    sandbox.destroy().await
}

/// Returns the space that all disk files of the service take on the host, in MiB. Links to one file
/// count once.
fn disks_mib(service: &Service, sandbox: &Sandbox<'_>) -> u64 {
    let dirs: [PathBuf; 2] = [
        service.dir().join("sandboxes").join(sandbox.id()),
        service.dir().join("snapshots/disks"),
    ];
    let files = dirs.iter().flat_map(|dir| files_in(dir));
    let sizes: HashMap<u64, u64> = files
        .filter(|path| path.extension().is_some_and(|kind| kind == "qcow2"))
        .filter_map(|path| fs::metadata(path).ok())
        .map(|meta| (meta.ino(), meta.blocks() * 512))
        .collect();
    sizes.values().sum::<u64>() / MIB
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Writes 120 MiB to a file of the guest's disk.
async fn fill_disk(sandbox: &Sandbox<'_>) -> Result<()> {
    let line = "head -c 125829120 /dev/zero | tr '\\0' x >/root/large && sync";
    let written = sandbox.shell(line).await?;
    ensure!(written.code == 0, "{written:?}");
    Ok(())
}

async fn trim(sandbox: &Sandbox<'_>) -> Result<()> {
    let trimmed = sandbox.shell("rm /root/large && sync && fstrim /").await?;
    ensure!(trimmed.code == 0, "{trimmed:?}");
    Ok(())
}

#[tokio::test]
async fn disk_space_that_a_guest_trims_returns_to_the_host() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = create(&service, json!({ "memory_mb": TEMPLATE_MIB })).await?;
    let before = disks_mib(&service, &sandbox);
    fill_disk(&sandbox).await?;
    let filled = disks_mib(&service, &sandbox);
    assert!(filled >= before + 120, "{before} MiB, then {filled} MiB");
    trim(&sandbox).await?;
    let trimmed = disks_mib(&service, &sandbox);
    assert!(trimmed < before + 20, "{before} MiB, then {trimmed} MiB");

    // A snapshot has frozen the file's blocks before the guest trims them. From the first one on,
    // the layers of the template count as well.
    sandbox.pause().await?;
    sandbox.resume().await?;
    let before = disks_mib(&service, &sandbox);
    fill_disk(&sandbox).await?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    trim(&sandbox).await?;
    assert!(disks_mib(&service, &sandbox) >= before + 120);
    for cycle in 0..8 {
        sandbox
            .shell(&format!("echo {cycle} >>/root/cycles; sync"))
            .await?;
        sandbox.pause().await?;
        if cycle < 7 {
            sandbox.resume().await?;
        }
    }
    until("the layers are compacted", GENEROUS, async || {
        Ok((disks_mib(&service, &sandbox) < before + 30).then_some(()))
    })
    .await?;
    sandbox.resume().await?;
    let cycles = sandbox.shell("cat /root/cycles; ls /root/large").await?;
    assert_eq!(cycles.stdout, "0\n1\n2\n3\n4\n5\n6\n7\n");
    sandbox.destroy().await
}
