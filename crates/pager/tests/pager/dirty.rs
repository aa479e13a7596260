//! Tests that all pages changed by a VM are found, and no others.

use std::sync::Arc;

use wrenn_pager::{
    Backing, Options, PageRun, PageServer,
    dirty::{BATCH_BYTES, DirtyError, read_runs, scan, scan_entries, zeros},
};

use crate::support::{Faulter, PAGE, Pattern, memfd, until};

const PAGES: u64 = 2000;
const LEN: u64 = PAGES * PAGE;

fn run(first: u64, pages: u64) -> PageRun {
    PageRun {
        offset: first * PAGE,
        len: pages * PAGE,
    }
}

#[test]
fn the_dirty_pages_are_exactly_those_written() {
    let source = Arc::new(Pattern::new(PAGES, 3));
    let memory = memfd(LEN);
    let mut machine = Faulter::private_of(&memory, LEN);
    let copy = memory.try_clone().expect("a copy");
    let options = Options {
        prefetch: vec![run(0, PAGES)],
        record_limit: 0,
    };
    let server = machine.serve(Backing::Shared(copy), &source, options);
    until("prefetch", || server.stats().prefetch_done);
    assert_eq!(machine.ask("touch 2"), "touched");
    let (pid, base) = (machine.pid(), machine.base);
    assert_eq!(scan(pid, base, LEN).expect("scans"), []);
    assert_eq!(scan_entries(pid, base, LEN).expect("reads"), []);

    // The pages hold data and zeros, lie at both ends, and cross the border of the regions.
    let written = [0, 5, 6, 7, 999, 1000, 1001, 1500, PAGES - 1];
    for page in written {
        let store = format!("store {} {}", page * PAGE + 8, page + 1);
        assert_eq!(machine.ask(&store), "ok");
    }
    let expected = [
        run(0, 1),
        run(5, 3),
        run(999, 3),
        run(1500, 1),
        run(PAGES - 1, 1),
    ];
    assert_eq!(scan(pid, base, LEN).expect("scans"), expected);
    assert_eq!(scan_entries(pid, base, LEN).expect("reads"), expected);

    let mut read = Vec::new();
    read_runs(pid, base, &expected, |offset, bytes| {
        for (at, page) in bytes.chunks_exact(4096).enumerate() {
            let offset = offset + at as u64 * PAGE;
            let word = |at: usize| u64::from_ne_bytes(page[at..at + 8].try_into().expect("8"));
            assert_eq!(word(8), offset / PAGE + 1);
            assert_eq!(word(16), source.word(offset + 16));
            read.push(offset / PAGE);
        }
        Ok::<_, DirtyError>(())
    })
    .expect("reads");
    assert_eq!(read, written);
}

/// Pages that the VM gives back are zeros from then on, are found as such, and are changed by the
/// next write like any other page. The shared memory stays as it is.
#[test]
fn pages_that_are_given_back_are_found_as_zeros() {
    let source = Arc::new(Pattern::new(PAGES, 0));
    let memory = memfd(LEN);
    let mut machine = Faulter::private_of(&memory, LEN);
    let handshake = machine.quiet_handshake();
    let backing = Backing::Shared(memory.try_clone().expect("a copy"));
    let server = PageServer::start(handshake, backing, source.clone(), Options::default());
    let server = server.expect("starts");
    let (pid, base) = (machine.pid(), machine.base);
    // Page 10 is changed, page 11 loaded; 12 and 13 are not touched.
    assert_eq!(machine.ask(&format!("store {} 1", 10 * PAGE)), "ok");
    assert_eq!(machine.load(11 * PAGE), source.word(11 * PAGE));
    assert_eq!(zeros(pid, base, LEN).expect("scans"), []);
    let zero = format!("zero {} {}", 10 * PAGE, 4 * PAGE);
    assert_eq!(machine.ask(&zero), "ok");
    assert_eq!(zeros(pid, base, LEN).expect("scans"), [run(10, 4)]);
    assert_eq!(scan(pid, base, LEN).expect("scans"), []);
    for page in 10..14 {
        assert_eq!(machine.load(page * PAGE), 0);
    }
    assert_eq!(machine.load(14 * PAGE), source.word(14 * PAGE));
    assert_eq!(machine.ask(&format!("store {} 7", 12 * PAGE)), "ok");
    assert_eq!(scan(pid, base, LEN).expect("scans"), [run(12, 1)]);
    let left = [run(10, 2), run(13, 1)];
    assert_eq!(zeros(pid, base, LEN).expect("scans"), left);
    assert_eq!(machine.load(12 * PAGE + 8), 0);
    let mut word = [0; 8];
    rustix::io::pread(&memory, &mut word, 11 * PAGE).expect("reads");
    assert_eq!(u64::from_ne_bytes(word), source.word(11 * PAGE));
    assert_eq!(server.failed().reason(), None);
}

/// A thread waits for a page that the page server is loading while the page is given back.
#[test]
fn a_page_that_is_given_back_while_it_is_loaded_is_zero() {
    let mut source = Pattern::new(PAGES, 0);
    source.guarded = Some(20 * PAGE);
    let source = Arc::new(source);
    let memory = memfd(LEN);
    let mut machine = Faulter::private_of(&memory, LEN);
    let handshake = machine.quiet_handshake();
    let backing = Backing::Shared(memory.try_clone().expect("a copy"));
    let server = PageServer::start(handshake, backing, source.clone(), Options::default());
    let server = server.expect("starts");
    machine.send(&format!("later load {}", 20 * PAGE));
    until("the page is being loaded", || source.door.arrived() > 0);
    machine.send(&format!("zero {} {}", 20 * PAGE, PAGE));
    // One answer of each command, in any order.
    let mut answers = [machine.answer(), machine.answer()];
    answers.sort();
    assert_eq!(answers, ["0", "ok"]);
    source.door.open();
    until("the page is loaded", || server.stats().pages_loaded > 0);
    assert_eq!(machine.load(20 * PAGE), 0);
    let found = zeros(machine.pid(), machine.base, LEN).expect("scans");
    assert_eq!(found, [run(20, 1)]);
    assert_eq!(server.failed().reason(), None);
}

#[test]
fn long_runs_are_split_and_short_runs_are_in_order() {
    let mut machine = Faulter::anonymous(LEN);
    for page in 0..PAGES {
        let store = format!("store {} {}", page * PAGE, page + 1);
        assert_eq!(machine.ask(&store), "ok");
    }
    let all = scan(machine.pid(), machine.base, LEN).expect("scans");
    assert_eq!(all, [run(0, PAGES)]);
    let every_other: Vec<PageRun> = (0..PAGES).step_by(2).map(|page| run(page, 1)).collect();
    for (runs, step) in [(&all, 1), (&every_other, 2)] {
        let mut next = 0;
        read_runs(machine.pid(), machine.base, runs, |offset, bytes| {
            assert!(bytes.len() as u64 <= BATCH_BYTES);
            assert_eq!(offset, next * PAGE);
            for page in bytes.chunks_exact(4096) {
                let first = u64::from_ne_bytes(page[..8].try_into().expect("8"));
                assert_eq!(first, next + 1);
                next += step;
            }
            Ok::<_, DirtyError>(())
        })
        .expect("reads");
        assert_eq!(next, PAGES);
    }
}

#[test]
fn unreadable_memory_is_an_error_with_its_address() {
    let mut machine = Faulter::anonymous(LEN);
    let (pid, base) = (machine.pid(), machine.base);
    let take = |_: u64, _: &[u8]| Ok::<_, DirtyError>(());
    let odd = PageRun { offset: 0, len: 7 };
    let error = read_runs(pid, base, &[odd], take).expect_err("is not whole pages");
    assert!(matches!(error, DirtyError::Run { len: 7, .. }));
    let far = PageRun {
        offset: u64::MAX - 4095,
        len: PAGE,
    };
    assert!(read_runs(pid, base, &[far], take).is_err());
    machine.kill();
    let error = read_runs(pid, base, &[run(3, 1)], take).expect_err("is gone");
    assert!(error.to_string().contains("offset 12288"), "{error}");
    let error = scan(pid, base, LEN).expect_err("is gone");
    assert!(error.to_string().contains(&pid.to_string()), "{error}");
}
