//! Snapshots: the state of a guest is correct after every pause, resume, fork and spawn.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service,
    host::open_files,
    rounds,
    wait::{GENEROUS, until},
};
use wrenn_proto::guest::SETTLED;

/// Program that holds memory, counts, and answers questions over TCP.
const WITNESS: &str = r#"
import os, random, signal, socket, threading, time, zlib
memory = bytearray(random.Random(7).randbytes(24 << 20))
count = 0
def counting():
    global count
    while True:
        count += 1
        time.sleep(0.02)
threading.Thread(target=counting, daemon=True).start()
def touch(*_):
    for page in range(100, 110):
        memory[page * 4096:page * 4096 + 4096] = random.randbytes(4096)
signal.signal(signal.SIGUSR1, touch)
open("/root/pid", "w").write(f"{os.getpid()}\n")
server = socket.create_server(("127.0.0.1", 7000))
while True:
    peer, _ = server.accept()
    words = peer.makefile().readline().split()
    if words[0] == "sum": answer = zlib.crc32(memory)
    elif words[0] == "count": answer = count
    else:
        for page in range(int(words[1]), int(words[1]) + int(words[2])):
            fill = bytes(4096) if words[0] == "zero" else random.randbytes(4096)
            memory[page * 4096:page * 4096 + 4096] = fill
        answer = zlib.crc32(memory)
    peer.sendall(f"{answer}\n".encode())
    peer.close()
"#;

/// Creates a sandbox of the template's own size, with a running witness.
async fn with_witness(service: &Service) -> Result<Sandbox<'_>> {
    let sandbox = plain(service, json!({})).await?;
    sandbox.write("/root/witness.py", WITNESS).await?;
    let body = json!({ "cmd": "python3", "args": ["/root/witness.py"], "background": true });
    let (status, started) = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await?;
    ensure!(status == StatusCode::ACCEPTED, "{started}");
    until("the witness answers", GENEROUS, async || {
        Ok(ask(&sandbox, "count").await.ok())
    })
    .await?;
    Ok(sandbox)
}

/// Creates a sandbox of the template's own size.
async fn plain(service: &Service, body: Value) -> Result<Sandbox<'_>> {
    let (status, made) = service.json(Method::POST, "/v1/sandboxes", &body).await?;
    ensure!(status == StatusCode::CREATED, "{status}: {made}");
    let id = made["id"].as_str().context("no id")?.to_owned();
    let sandbox = Sandbox::new(service, id);
    sandbox.until_status("running").await?;
    Ok(sandbox)
}

/// Sends a question to the witness.
async fn ask(sandbox: &Sandbox<'_>, question: &str) -> Result<u64> {
    let line = format!("echo {question} | socat -t 60 - TCP:127.0.0.1:7000");
    let output = sandbox.shell(&line).await?;
    ensure!(output.code == 0, "{output:?}");
    Ok(output.stdout.trim().parse()?)
}

async fn post(service: &Service, path: &str, body: Value) -> Result<Value> {
    let (status, reply) = service.json(Method::POST, path, &body).await?;
    ensure!(
        status.is_success(),
        "{path}: {status}: {reply}\n{}",
        service.log()
    );
    Ok(reply)
}

async fn pause(service: &Service, sandbox: &Sandbox<'_>) -> Result<()> {
    let record = post(service, &sandbox.path("/pause"), json!({})).await?;
    ensure!(record["status"] == "paused", "{record}");
    Ok(())
}

async fn resume(service: &Service, sandbox: &Sandbox<'_>) -> Result<()> {
    let record = post(service, &sandbox.path("/resume"), json!({})).await?;
    ensure!(record["status"] == "running", "{record}");
    Ok(())
}

/// Returns the memory file that was written last, and its size.
fn last_diff(service: &Service) -> Result<(PathBuf, u64)> {
    let dir = service.dir().join("snapshots/memory");
    let newest = fs::read_dir(dir)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .max();
    let path = newest.context("no memory file")?.1;
    let bytes = fs::metadata(&path)?.len();
    Ok((path, bytes))
}

async fn fork(service: &Service, sandbox: &Sandbox<'_>, count: usize) -> Result<Vec<String>> {
    let copies = post(service, &sandbox.path("/fork"), json!({ "count": count })).await?;
    let ids = copies.as_array().context("not a list")?.iter();
    let ids: Vec<String> = ids
        .filter_map(|copy| Some(copy["id"].as_str()?.to_owned()))
        .collect();
    ensure!(ids.len() == count, "{copies}");
    Ok(ids)
}

#[tokio::test]
async fn memory_processes_and_files_survive_every_pause() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = with_witness(&service).await?;
    let cycles = rounds(20).max(5);
    for cycle in 0..cycles {
        let page = cycle * 40;
        ask(&sandbox, &format!("fill {page} 30")).await?;
        let sum = ask(&sandbox, &format!("zero {} 5", page + 10)).await?;
        let count = ask(&sandbox, "count").await?;
        sandbox
            .shell(&format!("echo {cycle} >>/root/cycles; sync"))
            .await?;
        pause(&service, &sandbox).await?;
        resume(&service, &sandbox).await?;
        assert_eq!(ask(&sandbox, "sum").await?, sum, "cycle {cycle}");
        assert!(ask(&sandbox, "count").await? >= count, "cycle {cycle}");
        until("the witness continues to count", GENEROUS, async || {
            Ok((ask(&sandbox, "count").await? > count).then_some(()))
        })
        .await?;
    }
    let lines: String = (0..cycles).map(|cycle| format!("{cycle}\n")).collect();
    assert_eq!(sandbox.shell("cat /root/cycles").await?.stdout, lines);
    let dmesg = sandbox
        .shell("dmesg | grep -E 'EXT4-fs error|I/O error|Oops|BUG:' || true")
        .await?;
    assert_eq!(dmesg.stdout, "");
    sandbox.destroy().await
}

#[tokio::test]
async fn pause_writes_changed_pages_only() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = with_witness(&service).await?;
    let settled = format!("until [ -e {SETTLED} ]; do sleep 0.1; done");
    assert_eq!(sandbox.shell(&settled).await?.code, 0);
    for _ in 0..2 {
        pause(&service, &sandbox).await?;
        resume(&service, &sandbox).await?;
    }
    let sum = ask(&sandbox, "sum").await?;
    pause(&service, &sandbox).await?;
    resume(&service, &sandbox).await?;
    // Tells the witness to change ten pages, at almost no cost.
    sandbox
        .shell("read pid </root/pid && kill -USR1 $pid")
        .await?;
    pause(&service, &sandbox).await?;
    let (path, bytes) = last_diff(&service)?;
    assert!(bytes >= 10 * 4096, "{bytes} bytes");
    // The guest's kernel and agent, and the shell that sends the signal, change pages as well.
    assert!(bytes < 2 << 20, "{} has {bytes} bytes", path.display());
    resume(&service, &sandbox).await?;
    assert_ne!(ask(&sandbox, "sum").await?, sum, "ten pages changed");
    sandbox.destroy().await
}

/// Returns the number of memory files and of disk layers.
fn chain_files(service: &Service) -> [usize; 2] {
    ["memory", "disks"].map(|area| {
        let dir = service.dir().join("snapshots").join(area);
        fs::read_dir(dir).map_or(0, Iterator::count)
    })
}

#[tokio::test]
async fn chains_are_compacted_in_the_background() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = with_witness(&service).await?;
    for cycle in 0..9 {
        ask(&sandbox, &format!("fill {} 20", cycle * 50)).await?;
        ask(&sandbox, &format!("zero {} 5", cycle * 50 + 30)).await?;
        sandbox
            .shell(&format!("echo {cycle} >>/root/cycles; rm -f /root/cycle-*; head -c 100000 /dev/urandom >/root/cycle-{cycle}; sync"))
            .await?;
        pause(&service, &sandbox).await?;
        resume(&service, &sandbox).await?;
    }
    let sum = ask(&sandbox, "sum").await?;
    let files = sandbox.shell("sha256sum /root/cycle*").await?.stdout;
    pause(&service, &sandbox).await?;
    // The template's file, and the compacted copy of all files of the sandbox.
    until("the chains are compacted", GENEROUS, async || {
        Ok((chain_files(&service).into_iter().all(|files| files <= 2)).then_some(()))
    })
    .await?;
    resume(&service, &sandbox).await?;
    assert_eq!(ask(&sandbox, "sum").await?, sum);
    assert_eq!(
        sandbox
            .shell("echo 3 >/proc/sys/vm/drop_caches; sha256sum /root/cycle*")
            .await?
            .stdout,
        files
    );
    sandbox.destroy().await
}

#[tokio::test]
async fn many_snapshots_disturb_no_command_and_their_copies_have_short_chains() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = with_witness(&service).await?;
    let body = json!({ "sandbox_id": sandbox.id(), "name": "last" });
    let command = sandbox.script("while [ ! -e /root/end ]; do sleep 0.2; done; echo through");
    let snapshots = async {
        for moment in 0..40 {
            sandbox
                .shell(&format!("echo {moment} >>/root/moments"))
                .await?;
            post(&service, "/v1/snapshots?overwrite=true", body.clone()).await?;
        }
        sandbox.shell("touch /root/end").await
    };
    let (through, ended) = tokio::join!(command, snapshots);
    ended?;
    assert_eq!(through?, "through\n");
    let moments: String = (0..40).map(|moment| format!("{moment}\n")).collect();
    let sum = ask(&sandbox, "sum").await?;
    let copy = plain(&service, json!({ "template": "last" })).await?;
    for one in [&copy, &sandbox] {
        assert_eq!(one.shell("cat /root/moments").await?.stdout, moments);
        assert_eq!(ask(one, "sum").await?, sum);
    }
    let spec = service.dir().join("sandboxes").join(copy.id());
    let spec: Value = serde_json::from_slice(&fs::read(spec.join("spec.json"))?)?;
    let layers = spec["disk_layers"].as_array().map_or(0, Vec::len);
    assert!(layers <= 3, "{spec}");
    copy.destroy().await?;
    sandbox.destroy().await
}

#[tokio::test]
async fn copies_have_the_state_of_their_snapshot_and_are_independent() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = with_witness(&service).await?;
    // The fork is generation 6, the template generation 7.
    for cycle in 0..5 {
        ask(&sandbox, &format!("fill {} 20", cycle * 50)).await?;
        pause(&service, &sandbox).await?;
        resume(&service, &sandbox).await?;
    }
    sandbox.shell("echo then >/root/moment").await?;
    let moment = ask(&sandbox, "sum").await?;
    let ids = fork(&service, &sandbox, 2).await?;
    let made = post(
        &service,
        "/v1/snapshots",
        json!({ "sandbox_id": sandbox.id(), "name": "generation" }),
    )
    .await?;
    assert_eq!(made["type"], "snapshot", "{made}");
    // Later changes must not affect the copies.
    ask(&sandbox, "fill 0 200").await?;
    sandbox.shell("echo now >/root/moment").await?;

    let mut copies: Vec<Sandbox<'_>> = ids
        .into_iter()
        .map(|id| Sandbox::new(&service, id))
        .collect();
    for _ in 0..rounds(20) {
        // The size is the template's, regardless of the request.
        copies.push(
            plain(
                &service,
                json!({ "template": "generation", "vcpus": 2, "memory_mb": 300 }),
            )
            .await?,
        );
    }
    let mut seen: [HashSet<String>; 5] = Default::default();
    for copy in copies.iter().chain([&sandbox]) {
        let own = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; cat /etc/machine-id; hostname; cat /run/wrenn/generation-id";
        let output = copy.shell(own).await?.stdout;
        for (set, line) in seen.iter_mut().zip(output.lines()) {
            assert!(set.insert(line.to_owned()), "{line} twice");
        }
        assert_eq!(
            copy.shell("cat /run/wrenn/.WRENN_SANDBOX_ID; echo -n $WRENN_SANDBOX_ID")
                .await?
                .stdout,
            copy.id().repeat(2)
        );
    }
    for copy in &copies {
        assert_eq!(ask(copy, "sum").await?, moment, "{}", copy.id());
        assert_eq!(copy.shell("cat /root/moment").await?.stdout, "then\n");
        assert_eq!(copy.record().await?["memory_mb"], 512);
    }
    assert_eq!(sandbox.shell("cat /root/moment").await?.stdout, "now\n");
    // The template cannot be removed while sandboxes of it exist.
    let (status, refused) = service
        .json(Method::DELETE, "/v1/snapshots/generation", &json!({}))
        .await?;
    assert_eq!(status, StatusCode::CONFLICT, "{refused}");
    for copy in copies {
        copy.destroy().await?;
    }
    let (status, _) = service
        .json(Method::DELETE, "/v1/snapshots/generation", &json!({}))
        .await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    sandbox.destroy().await
}

#[tokio::test]
async fn overwritten_template_keeps_the_sandboxes_based_on_it() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = plain(&service, json!({})).await?;
    let body = json!({ "sandbox_id": sandbox.id(), "name": "mine" });
    sandbox.shell("echo first >/root/version").await?;
    post(&service, "/v1/snapshots", body.clone()).await?;
    let old = plain(&service, json!({ "template": "mine" })).await?;
    pause(&service, &old).await?;
    sandbox.shell("echo second >/root/version").await?;
    let (status, refused) = service.json(Method::POST, "/v1/snapshots", &body).await?;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (StatusCode::CONFLICT, Some("already_exists"))
    );
    post(&service, "/v1/snapshots?overwrite=true", body).await?;
    let new = plain(&service, json!({ "template": "mine" })).await?;
    sandbox.destroy().await?;
    resume(&service, &old).await?;
    assert_eq!(old.shell("cat /root/version").await?.stdout, "first\n");
    assert_eq!(new.shell("cat /root/version").await?.stdout, "second\n");
    old.destroy().await?;
    new.destroy().await
}

#[tokio::test]
async fn clock_is_correct_soon_after_a_resume() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = plain(&service, json!({})).await?;
    pause(&service, &sandbox).await?;
    // Real time must pass, because the test is about the clock.
    tokio::time::sleep(Duration::from_secs(if rounds(10) == 10 { 30 } else { 8 })).await;
    resume(&service, &sandbox).await?;
    // Six seconds, plus a margin for an emulated guest on a busy machine.
    until("the clock is right", Duration::from_secs(12), async || {
        let before = now()?;
        let said = sandbox.shell("date +%s.%N").await?.stdout;
        let after = now()?;
        let guest: f64 = said.trim().parse()?;
        Ok((guest > before - 0.1 && guest < after + 0.1).then_some(()))
    })
    .await?;
    sandbox.destroy().await
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

#[tokio::test]
async fn connections_from_before_a_pause_do_not_delay_later_ones() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = plain(&service, json!({})).await?;
    let ip = sandbox.record().await?["host_ip"]
        .as_str()
        .context("no address in the record")?
        .to_owned();
    let mut idle = Vec::new();
    for _ in 0..50 {
        idle.push(tokio::net::TcpStream::connect((ip.as_str(), 49983)).await?);
    }
    let path = sandbox.path("/exec");
    let body = json!({ "cmd": "sleep", "args": ["120"], "timeout_sec": 120 });
    let active: Vec<_> = (0..5)
        .map(|_| service.json(Method::POST, &path, &body))
        .collect();
    let active = futures::future::join_all(active);
    let paused = async {
        // Waits until all commands run.
        until("all commands run", GENEROUS, async || {
            let count = sandbox.shell("pgrep -c sleep").await?.stdout;
            Ok((count.trim() == "5").then_some(()))
        })
        .await?;
        pause(&service, &sandbox).await
    };
    let (answers, paused) = tokio::join!(active, paused);
    paused?;
    for answer in answers {
        let (status, reply) = answer?;
        assert!(!status.is_success(), "cut call succeeded: {reply}");
    }
    resume(&service, &sandbox).await?;
    let began = Instant::now();
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    let took = began.elapsed();
    // A call that is held up waits for a deadline of a connection, which is at least 30 s.
    assert!(
        took < Duration::from_secs(10),
        "the first call took {took:?}"
    );
    assert_eq!(
        sandbox.shell("pgrep -c sleep").await?.stdout,
        "5\n",
        "the commands must keep running"
    );
    drop(idle);
    sandbox.destroy().await
}

#[tokio::test]
async fn idle_sandbox_is_paused_and_resumed_by_a_call() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = plain(&service, json!({ "timeout_sec": 6, "auto_resume": true })).await?;
    sandbox.shell("echo kept >/root/file").await?;
    sandbox.until_status("paused").await?;
    assert_eq!(sandbox.shell("cat /root/file").await?.stdout, "kept\n");
    sandbox.destroy().await?;

    let plain = plain(&service, json!({ "timeout_sec": 6 })).await?;
    plain.until_status("paused").await?;
    let (status, refused) = service
        .json(
            Method::POST,
            &plain.path("/exec"),
            &json!({ "cmd": "true" }),
        )
        .await?;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (StatusCode::CONFLICT, Some("invalid_state"))
    );
    plain.destroy().await
}

#[tokio::test]
async fn paused_sandbox_survives_restarts() -> Result<()> {
    let mut service = Service::start().await?;
    let (id, sum) = {
        let sandbox = with_witness(&service).await?;
        let sum = ask(&sandbox, "fill 3 3").await?;
        pause(&service, &sandbox).await?;
        (sandbox.id().to_owned(), sum)
    };
    service.kill()?;
    service.start_again().await?;
    let sandbox = Sandbox::new(&service, id);
    assert_eq!(sandbox.record().await?["status"], "paused");
    // When the idle sandbox has been ended, the reconciler has run several times. It must not treat
    // the absence of a paused VM as a loss.
    let idle = plain(&service, json!({ "timeout_sec": 6, "on_timeout": "kill" })).await?;
    idle.until_status("stopped").await?;
    assert_eq!(sandbox.record().await?["status"], "paused");
    resume(&service, &sandbox).await?;
    assert_eq!(ask(&sandbox, "sum").await?, sum);
    sandbox.destroy().await
}

/// Returns the files of the newest snapshot, to damage them.
fn snapshot_files(service: &Service) -> Result<Vec<PathBuf>> {
    let (memory, _) = last_diff(service)?;
    let build = memory.file_stem().context("no file name")?.to_owned();
    let dir = service.dir().join("snapshots/snapshots").join(build);
    Ok(vec![memory, dir.join("header"), dir.join("device")])
}

fn damage(path: &Path, how: &str) -> Result<()> {
    match how {
        "missing" => fs::remove_file(path)?,
        "corrupted" => {
            let mut bytes = fs::read(path)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            fs::write(path, bytes)?;
        }
        _ => {
            let len = fs::metadata(path)?.len();
            fs::File::options()
                .write(true)
                .open(path)?
                .set_len(len / 2)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn damaged_snapshot_file_is_named_and_affects_no_other_sandbox() -> Result<()> {
    let service = Service::start().await?;
    let other = plain(&service, json!({})).await?;
    for how in ["truncated", "corrupted", "missing"] {
        for number in 0..3 {
            let sandbox = plain(&service, json!({})).await?;
            pause(&service, &sandbox).await?;
            let path = snapshot_files(&service)?[number].clone();
            let good = fs::read(&path)?;
            damage(&path, how)?;
            let began = Instant::now();
            let (status, refused) = service
                .json(Method::POST, &sandbox.path("/resume"), &json!({}))
                .await?;
            assert!(!status.is_success(), "{how} {}: {refused}", path.display());
            assert!(began.elapsed() < GENEROUS, "{how} {}", path.display());
            let record = sandbox.record().await?;
            assert_eq!(record["status"], "paused", "{record}");
            let name = path
                .file_name()
                .context("no file name")?
                .to_string_lossy()
                .into_owned();
            let told = format!("{refused}{record}");
            assert!(told.contains(&name), "{how} {name}: {told}");
            fs::write(&path, good)?;
            resume(&service, &sandbox).await?;
            assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
            sandbox.destroy().await?;
        }
    }
    assert_eq!(other.exec("true", &[]).await?.code, 0);

    let body = json!({ "sandbox_id": other.id(), "name": "mine" });
    post(&service, "/v1/snapshots", body).await?;
    damage(&snapshot_files(&service)?[1], "truncated")?;
    let (_, known) = service.get("/v1/snapshots/mine").await?;
    assert_eq!(known["name"], "mine", "{known}");
    let create = json!({ "template": "mine" });
    let (_, made) = service.json(Method::POST, "/v1/sandboxes", &create).await?;
    assert!(made.to_string().contains("header"), "{made}");
    let (status, gone) = service
        .json(Method::DELETE, "/v1/snapshots/mine", &json!({}))
        .await?;
    assert_eq!(status, StatusCode::NO_CONTENT, "{gone}");
    other.destroy().await
}

#[tokio::test]
async fn many_cycles_and_spawns_leak_no_files_and_descriptors() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = plain(&service, json!({})).await?;
    for _ in 0..2 {
        pause(&service, &sandbox).await?;
        resume(&service, &sandbox).await?;
    }
    let files = open_files(service.pid());
    for _ in 0..rounds(200) {
        pause(&service, &sandbox).await?;
        resume(&service, &sandbox).await?;
    }
    assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
    let after = open_files(service.pid());
    assert!(after <= files + 10, "{files} -> {after} descriptors");

    post(
        &service,
        "/v1/snapshots",
        json!({ "sandbox_id": sandbox.id(), "name": "many" }),
    )
    .await?;
    let count = rounds(20).max(4);
    let spawned = futures::future::join_all(
        (0..count).map(|_| plain(&service, json!({ "template": "many" }))),
    )
    .await;
    for copy in spawned {
        let copy = copy?;
        assert_eq!(copy.exec("true", &[]).await?.code, 0);
        copy.destroy().await?;
    }
    sandbox.destroy().await?;
    let (status, _) = service
        .json(Method::DELETE, "/v1/snapshots/many", &json!({}))
        .await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    until("nothing is left of any snapshot", GENEROUS, async || {
        let count = |area: &str| {
            fs::read_dir(service.dir().join("snapshots").join(area)).map_or(0, Iterator::count)
        };
        let left: usize = ["memory", "disks", "snapshots", "staging", "names"]
            .map(count)
            .iter()
            .sum();
        Ok((left == 0).then_some(()))
    })
    .await
}
