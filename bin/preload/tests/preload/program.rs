//! Tests with a program that opens and maps memory as QEMU does.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use wrenn_pager::{PageRun, dirty};

use crate::support::{Host, Numbers, PATH, library};

const LEN: u64 = 4 * 1024 * 1024;

fn probe(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-preload-probe"));
    command
        .args([PATH, &LEN.to_string()])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Waits for the program to end and returns its standard error.
fn ends(child: Child, how: impl FnOnce(std::process::ExitStatus) -> bool) -> String {
    let output = child.wait_with_output().expect("ends");
    let output_text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(how(output.status), "{} {output_text}", output.status);
    output_text
}

fn aborted(status: std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt as _;
    status.signal() == Some(6)
}

#[test]
fn a_mapping_is_paged_from_the_server_and_writes_stay_private() {
    let host = Host::new(LEN);
    let mut child = host.spawn(&mut probe(&["sum", "write", "8192", "wait"]), "paged");
    let handshake = host.handshake().expect("arrives");
    let region = *handshake.regions.as_slice().first().expect("one");
    assert_eq!((region.len, region.offset), (LEN, 0));
    let source = Numbers(LEN);
    let server = host.serve(handshake, source);
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut line = || lines.next().expect("a line").expect("reads");
    assert_eq!(line(), format!("mapped {:#x} of {LEN}", region.address));
    assert_eq!(line(), format!("sum {}", source.sum()));
    // The program writes, and then waits for this test.
    let expected = [PageRun {
        offset: 8192,
        len: 4096,
    }];
    let deadline = std::time::Instant::now() + crate::support::DEADLINE;
    while dirty::scan(child.id(), region.address, LEN).expect("scans") != expected {
        assert!(std::time::Instant::now() < deadline, "no write in time");
    }
    let mut page = [0; 16];
    rustix::io::pread(&host.memory, &mut page, 8192).expect("reads");
    assert_eq!(page[..8], 8192_u64.to_ne_bytes());
    drop(child.stdin.take());
    assert_eq!(ends(child, |status| status.success()), "");
    assert_eq!(server.failed().reason(), None);
}

#[test]
fn anonymous_memory_is_zero_and_announced_without_a_descriptor() {
    let host = Host::new(LEN);
    rustix::io::pwrite(&host.memory, b"not for you", 4096).expect("writes");
    let child = host.spawn(&mut probe(&["sum", "write", "0"]), "anonymous");
    let regions = host.layout().expect("arrives");
    assert_eq!(regions.end_offset(), LEN);
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.success(), "{output:?}");
    let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output_text.contains("sum 0"), "{output_text}");
}

/// A discarded page is zero, whether it was changed, loaded or never touched, and whether it is
/// data or zeros in the snapshot. It belongs to no file and costs no memory.
#[test]
fn discarded_memory_is_zero_and_the_snapshot_stays_as_it_is() {
    let host = Host::new(LEN);
    let arguments = [
        // Page 1 is changed, page 2 loaded, page 3 not touched; page 4 is zero in the snapshot.
        "write", "4096", "load", "8192", "discard", "4096", "16384", "load", "4096", "load", "8192",
        "load", "12288", "load", "16384", "load", "20480", // Written again after the discard.
        "write", "8192", "load", "8192", "wait",
    ];
    let mut child = host.spawn(&mut probe(&arguments), "paged");
    let handshake = host.handshake().expect("arrives");
    let region = *handshake.regions.as_slice().first().expect("one");
    let server = host.serve(handshake, Numbers(LEN));
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut line = || lines.next().expect("a line").expect("reads");
    assert!(line().starts_with("mapped"));
    assert_eq!(line(), "word 8192");
    assert_eq!(line(), "discarded");
    for _ in 0..4 {
        assert_eq!(line(), "word 0");
    }
    assert_eq!(line(), "word 20480", "the page behind the range");
    assert_eq!(line(), "word 1");
    let run = |first: u64, pages: u64| PageRun {
        offset: first * 4096,
        len: pages * 4096,
    };
    let changed = dirty::scan(child.id(), region.address, LEN).expect("scans");
    assert_eq!(changed, [run(2, 1)]);
    // Page 0 was not touched. Zeros around a fault on zeros may be mapped as well.
    let zeros = dirty::zeros(child.id(), region.address, 5 * 4096).expect("scans");
    assert_eq!(zeros, [run(1, 1), run(3, 2)]);
    let mut page = [0; 8];
    rustix::io::pread(&host.memory, &mut page, 8192).expect("reads");
    assert_eq!(page, 8192_u64.to_ne_bytes());
    drop(child.stdin.take());
    assert_eq!(ends(child, |status| status.success()), "");
    assert_eq!(server.failed().reason(), None);
}

#[test]
fn discarded_anonymous_memory_is_zero_and_not_mapped() {
    let host = Host::new(LEN);
    let arguments = [
        "write", "4096", "discard", "0", "8192", "load", "4096", "wait",
    ];
    let mut child = host.spawn(&mut probe(&arguments), "anonymous");
    let regions = host.layout().expect("arrives");
    let region = *regions.as_slice().first().expect("one");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut line = || lines.next().expect("a line").expect("reads");
    assert!(line().starts_with("mapped"));
    assert_eq!(
        (line(), line()),
        ("discarded".to_owned(), "word 0".to_owned())
    );
    let changed = dirty::scan(child.id(), region.address, LEN).expect("scans");
    // The kernel may have used a huge page for the write, of which the rest is still mapped.
    assert!(changed.iter().all(|run| run.offset >= 8192), "{changed:?}");
    drop(child.stdin.take());
    assert_eq!(ends(child, |status| status.success()), "");
}

#[test]
fn a_discard_beyond_guest_memory_ends_the_program() {
    let host = Host::new(LEN);
    let len = LEN.to_string();
    let child = host.spawn(&mut probe(&["discard", "4096", &len]), "paged");
    let handshake = host.handshake().expect("arrives");
    let _server = host.serve(handshake, Numbers(LEN));
    let said = ends(child, aborted);
    assert!(said.contains("beyond the bounds of guest memory"), "{said}");
}

#[test]
fn second_or_partial_mapping_aborts_the_program() {
    for (arguments, expected) in [
        (["map-again"], "guest memory a second time"),
        (["map-half"], "a part of guest memory"),
    ] {
        let host = Host::new(LEN);
        let child = host.spawn(&mut probe(&arguments), "paged");
        let _handshake = host.handshake().expect("arrives");
        let output_text = ends(child, aborted);
        assert!(output_text.contains(expected), "{output_text}");
    }
}

#[test]
fn any_failure_aborts_the_program_before_it_uses_other_memory() {
    let null = std::fs::File::open("/dev/null").expect("opens");
    // The page server has closed the connection.
    let mut host = Host::new(LEN);
    let (server_end, _) = std::os::unix::net::UnixStream::pair().expect("a pair");
    drop(std::mem::replace(&mut host.server_end, server_end));
    let output_text = ends(host.spawn(&mut probe(&[]), "paged"), aborted);
    assert!(
        output_text.contains("failed to notify the page server"),
        "{output_text}"
    );
    // The device is not `/dev/userfaultfd`.
    let mut host = Host::new(LEN);
    host.device = null.into();
    let output_text = ends(host.spawn(&mut probe(&[]), "paged"), aborted);
    assert!(
        output_text.contains("USERFAULTFD_IOC_NEW failed"),
        "{output_text}"
    );
    // The memory has another size.
    let host = Host::new(LEN * 2);
    let output_text = ends(host.spawn(&mut probe(&[]), "paged"), aborted);
    assert!(
        output_text.contains("only a part of guest memory"),
        "{output_text}"
    );
    // The environment holds invalid values.
    let host = Host::new(LEN);
    let output_text = ends(host.spawn(&mut probe(&[]), "sideways"), aborted);
    assert!(output_text.contains("WRENN_MEMORY_MODE"), "{output_text}");
    for (name, value) in [
        ("WRENN_MEMORY_PATH", "relative"),
        ("WRENN_MEMORY_FD", "9999"),
        ("WRENN_MEMORY_FD", "-1"),
        ("WRENN_MEMORY_FD", "three"),
    ] {
        let mut command = probe(&[]);
        command
            .env("LD_PRELOAD", library())
            .env("WRENN_MEMORY_PATH", PATH)
            .env(name, value);
        let output_text = ends(command.spawn().expect("starts"), aborted);
        assert!(output_text.contains(name), "{output_text}");
    }
}

#[test]
fn without_its_variables_the_library_does_nothing() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let path = directory.path().join("memory");
    std::fs::write(&path, vec![0; 8192]).expect("writes");
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-preload-probe"));
    command.env("LD_PRELOAD", library()).arg(&path);
    let status = command
        .args(["8192", "write", "4096"])
        .status()
        .expect("runs");
    assert!(status.success());
    // The mapping was shared, so the write is in the file.
    assert_eq!(std::fs::read(&path).expect("reads")[4096], 1);
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-preload-probe"));
    command.env("LD_PRELOAD", library()).arg(&path);
    let status = command.args(["8192", "discard", "4096", "4096"]).status();
    assert!(status.expect("runs").success());
    assert_eq!(std::fs::read(&path).expect("reads")[4096], 0);
}
