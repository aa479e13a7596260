//! Tests with QEMU itself, running as an unprivileged user.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, Command, Stdio},
    time::Instant,
};

use wrenn_pager::dirty;

use crate::support::{DEADLINE, Host, Numbers, PATH};

const LEN: u64 = 64 * 1024 * 1024;
const NOBODY: u32 = 65_534;

/// Builds the command of a stopped VM with a monitor on its standard input.
fn qemu(machine: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let backend = format!("memory-backend-file,id=ram,size={LEN},mem-path={PATH},share=on");
    command
        .args([
            "-M",
            &format!("{machine},memory-backend=ram"),
            "-m",
            "64M",
            "-S",
        ])
        .args([
            "-object",
            &backend,
            "-accel",
            "tcg",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-monitor", "stdio"])
        .args([
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ])
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Kills QEMU when the test ends, even if the test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn send(monitor: &mut ChildStdin, command: &str) {
    writeln!(monitor, "{command}").expect("QEMU reads its monitor");
}

/// Reads the two 8-byte values that QEMU prints for an address.
fn words(lines: &mut impl Iterator<Item = std::io::Result<String>>, address: u64) -> [u64; 2] {
    let deadline = Instant::now() + DEADLINE;
    let prefix = format!("{address:016x}: ");
    for line in lines {
        let line = line.expect("reads");
        assert!(Instant::now() < deadline, "not in time: {line}");
        if let Some(rest) = line.strip_prefix(&prefix) {
            let word = |text: &str| u64::from_str_radix(&text[2..], 16).expect("a number");
            let words: Vec<u64> = rest.split_whitespace().map(word).collect();
            return words.try_into().expect("two");
        }
    }
    panic!("QEMU ended");
}

#[test]
fn qemu_reads_its_memory_from_the_page_server() {
    for machine in ["none", "microvm"] {
        let host = Host::new(LEN);
        let mut running = Running(host.spawn(&mut qemu(machine), "paged"));
        let handshake = host.handshake().expect("arrives");
        let region = *handshake.regions.as_slice().first().expect("one");
        assert_eq!((region.len, region.offset), (LEN, 0));
        let source = Numbers(LEN);
        let server = host.serve(handshake, source);
        let mut monitor = running.0.stdin.take().expect("piped");
        let mut lines = BufReader::new(running.0.stdout.take().expect("piped")).lines();
        if machine == "microvm" {
            for page in [0x401, 0x400, 0x1fff_u64] {
                let address = page * 4096 + 16;
                send(&mut monitor, &format!("xp /2gx {address:#x}"));
                let expected = [source.word(address), source.word(address + 8)];
                assert_eq!(words(&mut lines, address), expected);
            }
            assert!(server.stats().pages_loaded >= 2);
            let changed = dirty::scan(running.0.id(), region.address, LEN).expect("scans");
            let inside = changed.iter().filter(|run| run.offset >= 0x10_0000);
            assert_eq!(inside.count(), 0, "{changed:?}");
        }
        send(&mut monitor, "quit");
        assert!(running.0.wait().expect("ends").success());
        assert_eq!(server.failed().reason(), None);
    }
}

#[test]
fn qemu_boots_on_private_memory() {
    let host = Host::new(LEN);
    let mut running = Running(host.spawn(&mut qemu("microvm"), "anonymous"));
    let regions = host.layout().expect("arrives");
    assert_eq!(regions.end_offset(), LEN);
    let mut monitor = running.0.stdin.take().expect("piped");
    let mut lines = BufReader::new(running.0.stdout.take().expect("piped")).lines();
    send(&mut monitor, "xp /2gx 0x401000");
    assert_eq!(words(&mut lines, 0x40_1000), [0, 0]);
    send(&mut monitor, "quit");
    assert!(running.0.wait().expect("ends").success());
}
