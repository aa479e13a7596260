//! Tests of the end of a server: stopped, failed, or with its VM.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use wrenn_pager::{Backing, Options, PageRun, PageServer, StartError};

use crate::support::{DEADLINE, Faulter, PAGE, Pattern, memfd, until};

const PAGES: u64 = 600;
const LEN: u64 = PAGES * PAGE;

#[test]
fn failed_source_is_reported_by_name_and_serves_no_zeros() {
    for (private, prefetch) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut source = Pattern::new(PAGES, 0);
        source.broken = Some(300 * PAGE);
        let source = Arc::new(source);
        let memory = memfd(LEN);
        let (mut machine, backing) = if private {
            (Faulter::anonymous(LEN), Backing::Private)
        } else {
            let copy = memory.try_clone().expect("a copy");
            (Faulter::private_of(&memory, LEN), Backing::Shared(copy))
        };
        let run = PageRun {
            offset: 0,
            len: LEN,
        };
        let options = Options {
            prefetch: if prefetch { vec![run] } else { Vec::new() },
            record_limit: 0,
        };
        let mut server = machine.serve(backing, &source, options);
        let failed = server.failed();
        machine.send(&format!("later load {}", 300 * PAGE));
        let reason = failed.wait(DEADLINE).expect("fails").to_owned();
        assert!(reason.contains("/snapshots/g7/memory.diff"), "{reason}");
        assert!(reason.contains("offset"), "{reason}");
        // The thread waits, and keeps waiting after the server has stopped. It can only be killed.
        until("the thread waits", || {
            machine.threads_in("handle_userfault") == 1
        });
        server.stop();
        assert_eq!(machine.threads_in("handle_userfault"), 1);
        assert_eq!(failed.reason(), Some(reason.as_str()));
        machine.kill();
        assert_eq!(machine.answer(), "", "the process replied");
    }
}

#[test]
fn stop_does_not_wait_for_faulting_threads() {
    let mut source = Pattern::new(PAGES, 0);
    source.guarded = Some(0);
    let source = Arc::new(source);
    let mut machine = Faulter::anonymous(LEN);
    let mut server = machine.serve(Backing::Private, &source, Options::default());
    machine.send("later load 0");
    until("the fault is being read", || source.door.arrived() == 1);
    machine.send("touch 24");
    until("all wait", || machine.threads_in("handle_userfault") == 25);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| {
            let begun = Instant::now();
            server.stop();
            server.stop();
            begun.elapsed()
        });
        source.door.open();
        assert!(stopping.join().expect("ends") < Duration::from_secs(5));
    });
    assert_eq!(server.failed().reason(), None);
    machine.kill();
}

#[test]
fn killed_vmm_is_not_a_failure() {
    for private in [false, true] {
        let mut source = Pattern::new(PAGES, 0);
        source.guarded = Some(PAGE);
        let source = Arc::new(source);
        let memory = memfd(LEN);
        let (mut machine, backing) = if private {
            (Faulter::anonymous(LEN), Backing::Private)
        } else {
            let copy = memory.try_clone().expect("a copy");
            (Faulter::private_of(&memory, LEN), Backing::Shared(copy))
        };
        let mut server = machine.serve(backing, &source, Options::default());
        machine.send("touch 4");
        until("the fault is being read", || source.door.arrived() == 1);
        machine.kill();
        source.door.open();
        if private {
            // The process has exited before its fault is resolved.
            until("the exit is noticed", || server.stats().gone);
        }
        server.stop();
        assert_eq!(server.failed().reason(), None);
    }
}

#[test]
fn a_panic_in_a_source_is_a_failure() {
    struct Panics;
    impl wrenn_pager::MemorySource for Panics {
        fn len(&self) -> u64 {
            LEN
        }
        fn extent(&self, _: u64) -> Result<wrenn_pager::Extent, wrenn_pager::SourceError> {
            panic!("a defect");
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), wrenn_pager::SourceError> {
            panic!("a defect");
        }
    }
    let mut machine = Faulter::anonymous(LEN);
    let handshake = machine.handshake();
    let options = Options::default();
    let server = PageServer::start(handshake, Backing::Private, Arc::new(Panics), options);
    let server = server.expect("starts");
    machine.send("later load 0");
    let failed = server.failed();
    let reason = failed.wait(DEADLINE).expect("fails");
    assert!(reason.contains("panicked"), "{reason}");
}

#[test]
fn empty_extent_is_a_failure() {
    struct Empty;
    impl wrenn_pager::MemorySource for Empty {
        fn len(&self) -> u64 {
            LEN
        }
        fn extent(&self, _: u64) -> Result<wrenn_pager::Extent, wrenn_pager::SourceError> {
            Ok(wrenn_pager::Extent { zero: true, len: 0 })
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), wrenn_pager::SourceError> {
            Ok(())
        }
    }
    let mut machine = Faulter::anonymous(LEN);
    let handshake = machine.handshake();
    let options = Options::default();
    let server = PageServer::start(handshake, Backing::Private, Arc::new(Empty), options);
    let server = server.expect("starts");
    machine.send("later load 4096");
    let failed = server.failed();
    let reason = failed.wait(DEADLINE).expect("fails");
    assert!(reason.contains("extent of 0 bytes at offset"), "{reason}");
}

#[test]
fn memory_of_the_wrong_size_is_rejected_at_start() {
    let source = Arc::new(Pattern::new(PAGES - 1, 0));
    let mut machine = Faulter::anonymous(LEN);
    let handshake = machine.handshake();
    let options = Options::default();
    let result = PageServer::start(handshake, Backing::Private, source, options);
    assert!(matches!(
        result.expect_err("is too small"),
        StartError::SourceTooSmall { memory: LEN, source_len } if source_len == LEN - PAGE
    ));
    let source = Arc::new(Pattern::new(PAGES, 0));
    let mut machine = Faulter::anonymous(LEN);
    let handshake = machine.handshake();
    let backing = Backing::Shared(memfd(PAGE));
    let reads = Arc::clone(&source);
    let result = PageServer::start(handshake, backing, source, Options::default());
    assert!(matches!(
        result.expect_err("is too small"),
        StartError::SharedTooSmall {
            memory: LEN,
            shared: PAGE
        }
    ));
    assert_eq!(reads.reads.load(Ordering::SeqCst), 0);
}
