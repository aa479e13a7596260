//! Tests that every byte a VM reads is correct.

use std::sync::{Arc, atomic::Ordering};

use wrenn_pager::{Backing, Options, PageRun};

use crate::support::{Faulter, PAGE, Pattern, checksum, filled, memfd, until};

const PAGES: u64 = 1500;
const LEN: u64 = PAGES * PAGE;

fn shared(memfd: &std::os::fd::OwnedFd) -> Backing {
    Backing::Shared(memfd.try_clone().expect("a copy"))
}

#[test]
fn shared_memory_is_exact_and_a_second_vm_does_not_fault() {
    let source = Arc::new(Pattern::new(PAGES, 3));
    let memory = memfd(LEN);
    let mut first = Faulter::private_of(&memory, LEN);
    let server = first.serve(shared(&memory), &source, Options::default());
    assert_eq!(first.checksum(0, LEN), source.checksum(0, LEN));
    let stats = server.stats();
    assert_eq!(stats.pages_loaded, source.data_pages());
    assert_eq!(filled(&memory), source.data_pages() * PAGE);
    assert!(stats.zero_faults > 0 && stats.zero_faults < PAGES - source.data_pages());
    // A write is visible only in the process that wrote.
    let data = (0..PAGES)
        .map(|page| page * PAGE)
        .find(|at| !source.is_zero(*at));
    let data = data.expect("there is data");
    assert_eq!(first.ask(&format!("store {data} 42")), "ok");

    let mut second = Faulter::private_of(&memory, LEN);
    let other = second.serve(shared(&memory), &source, Options::default());
    assert_eq!(second.checksum(0, LEN), source.checksum(0, LEN));
    let stats = other.stats();
    assert_eq!(stats.pages_loaded, 0, "{stats:?}");
    assert_eq!(stats.demand_faults, stats.zero_faults, "{stats:?}");
    assert_eq!(first.load(data), 42);
    for server in [&server, &other] {
        assert_eq!(server.failed().reason(), None);
    }
}

#[test]
fn two_vms_fill_a_shared_memory_concurrently() {
    let source = Arc::new(Pattern::new(PAGES, 5));
    let memory = memfd(LEN);
    let mut machines: Vec<Faulter> = (0..3).map(|_| Faulter::private_of(&memory, LEN)).collect();
    let all = vec![PageRun {
        offset: 0,
        len: LEN,
    }];
    let options = |index: usize| Options {
        prefetch: if index == 1 { all.clone() } else { Vec::new() },
        record_limit: 0,
    };
    let servers: Vec<_> = machines
        .iter_mut()
        .enumerate()
        .map(|(index, machine)| machine.serve(shared(&memory), &source, options(index)))
        .collect();
    for machine in &mut machines {
        machine.send(&format!("checksum 0 {LEN}"));
    }
    for machine in &mut machines {
        assert_eq!(machine.answer(), source.checksum(0, LEN).to_string());
    }
    assert!(
        servers
            .iter()
            .all(|server| server.failed().reason().is_none())
    );
}

#[test]
fn private_memory_is_exact_with_concurrent_threads_and_prefetch() {
    for prefetch in [false, true] {
        let source = Arc::new(Pattern::new(PAGES, 3));
        let mut machine = Faulter::anonymous(LEN);
        let run = PageRun {
            offset: 0,
            len: LEN,
        };
        let options = Options {
            prefetch: if prefetch { vec![run] } else { Vec::new() },
            record_limit: 0,
        };
        let server = machine.serve(Backing::Private, &source, options);
        assert_eq!(machine.ask("touch 4"), "touched");
        assert_eq!(machine.checksum(0, LEN), source.checksum(0, LEN));
        until("all are counted", || {
            let stats = server.stats();
            stats.pages_loaded + stats.pages_prefetched >= source.data_pages()
        });
        assert_eq!(server.failed().reason(), None);
    }
}

#[test]
fn prefetched_page_does_not_fault() {
    for private in [false, true] {
        let source = Arc::new(Pattern::new(PAGES, 4));
        let memory = memfd(LEN);
        let (mut machine, backing) = if private {
            (Faulter::anonymous(LEN), Backing::Private)
        } else {
            (Faulter::private_of(&memory, LEN), shared(&memory))
        };
        let run = |first: u64, pages: u64| PageRun {
            offset: first * PAGE,
            len: pages * PAGE,
        };
        // One run crosses the border of the two regions, one lies beyond the end of memory.
        let prefetch = vec![run(10, 1), run(700, 200), run(1490, 100), run(5000, 1)];
        let options = Options {
            prefetch,
            record_limit: 0,
        };
        let server = machine.serve(backing, &source, options);
        until("prefetch", || server.stats().prefetch_done);
        assert_eq!(server.stats().demand_faults, 0);
        let sum = machine.checksum(700 * PAGE, 200 * PAGE);
        assert_eq!(sum, source.checksum(700 * PAGE, 200 * PAGE));
        let stats = server.stats();
        assert_eq!(stats.pages_loaded, 0, "{stats:?}");
        assert_eq!(stats.demand_faults, stats.zero_faults, "{stats:?}");
        assert_eq!(private, stats.demand_faults == 0, "{stats:?}");
        assert_eq!(machine.checksum(0, LEN), source.checksum(0, LEN));
    }
}

#[test]
fn runs_of_zeros_take_few_faults_and_never_touch_the_source_or_the_copy() {
    let source = Arc::new(Pattern::new(4096, 1));
    let len = 4096 * PAGE;
    let memory = memfd(len);
    let mut machine = Faulter::private_of(&memory, len);
    let server = machine.serve(shared(&memory), &source, Options::default());
    // Reads first from the middle of a window, then everything.
    assert_eq!(machine.load(777 * PAGE), 0);
    assert_eq!(machine.checksum(0, len), source.checksum(0, len));
    let stats = server.stats();
    assert!(stats.demand_faults <= 12, "{stats:?}");
    until("all are counted", || server.stats().pages_zeroed == 4096);
    assert_eq!(source.reads.load(Ordering::SeqCst), 0);
    assert_eq!(filled(&memory), 0);
}

#[test]
fn first_faults_are_recorded_in_order_and_bounded() {
    let source = Arc::new(Pattern::new(PAGES, 0));
    let memory = memfd(LEN);
    let mut machine = Faulter::private_of(&memory, LEN);
    let options = Options {
        prefetch: Vec::new(),
        record_limit: 4,
    };
    let server = machine.serve(shared(&memory), &source, options);
    for page in [900_u64, 3, 901, 900, 7, 8] {
        assert_eq!(machine.load(page * PAGE + 8), source.word(page * PAGE + 8));
    }
    assert_eq!(server.recorded(), [900, 3, 901, 7].map(|page| page * PAGE));
    assert_eq!(server.stats().demand_faults, 5);
}

#[test]
fn discarded_memory_reads_as_zero() {
    let source = Arc::new(Pattern::new(PAGES, 0));
    let mut machine = Faulter::anonymous(LEN);
    let server = machine.serve(Backing::Private, &source, Options::default());
    assert_eq!(machine.load(100 * PAGE), source.word(100 * PAGE));
    // The range covers loaded pages, pages that were not loaded, and the border of the regions at
    // 750.
    let (first, pages) = (90, 700);
    let discard = format!("discard {} {}", first * PAGE, pages * PAGE);
    assert_eq!(machine.ask(&discard), "ok");
    assert_eq!(machine.load(100 * PAGE), 0);
    assert_eq!(machine.ask("touch 3"), "touched");
    let expected = (0..LEN).step_by(8).map(|at| {
        let given_back = (first..first + pages).contains(&(at / PAGE));
        if given_back { 0 } else { source.word(at) }
    });
    assert_eq!(machine.checksum(0, LEN), checksum(expected));
    assert_eq!(server.stats().pages_removed, pages);
    // A page that is discarded again after a write is zero again.
    assert_eq!(machine.ask(&format!("store {} 5", 100 * PAGE)), "ok");
    assert_eq!(machine.ask(&discard), "ok");
    assert_eq!(machine.load(100 * PAGE), 0);
    assert_eq!(server.failed().reason(), None);
}

#[test]
fn prefetch_skips_discarded_pages() {
    let mut source = Pattern::new(PAGES, 0);
    source.guarded = Some(0);
    let source = Arc::new(source);
    let mut machine = Faulter::anonymous(LEN);
    let options = Options {
        prefetch: vec![PageRun {
            offset: 0,
            len: LEN,
        }],
        record_limit: 0,
    };
    let server = machine.serve(Backing::Private, &source, options);
    // The prefetch thread has read the extent of its first piece and waits for the content.
    until("prefetch reads", || source.door.arrived() == 1);
    assert_eq!(
        machine.ask(&format!("discard {} {}", 4 * PAGE, 60 * PAGE)),
        "ok"
    );
    source.door.open();
    until("prefetch", || server.stats().prefetch_done);
    assert_eq!(server.stats().pages_prefetched, PAGES - 60);
    assert_eq!(machine.load(4 * PAGE), 0);
    assert_eq!(machine.load(3 * PAGE), source.word(3 * PAGE));
    let expected = (0..LEN).step_by(8).map(|at| {
        let given_back = (4..64).contains(&(at / PAGE));
        if given_back { 0 } else { source.word(at) }
    });
    assert_eq!(machine.checksum(0, LEN), checksum(expected));
}

#[test]
fn address_space_change_delays_a_reply_only() {
    for given_back in [false, true] {
        let mut source = Pattern::new(PAGES, 0);
        source.guarded = Some(20 * PAGE);
        let source = Arc::new(source);
        let mut machine = Faulter::anonymous(LEN);
        let server = machine.serve(Backing::Private, &source, Options::default());
        machine.send(&format!("later load {}", 20 * PAGE));
        until("the fault is being read", || source.door.arrived() == 1);
        let first = if given_back { 20 } else { 40 };
        machine.send(&format!("later discard {} {}", first * PAGE, 8 * PAGE));
        // From now on the kernel rejects requests to install pages until the event is read.
        until("madvise waits", || {
            machine.threads_in("userfaultfd_event") == 1
        });
        source.door.open();
        let mut answers = [machine.answer(), machine.answer()];
        answers.sort();
        let value = if given_back {
            0
        } else {
            source.word(20 * PAGE)
        };
        assert!(answers.contains(&value.to_string()), "{answers:?}");
        assert!(answers.contains(&"discarded".to_owned()), "{answers:?}");
        assert!(server.stats().retries >= 1, "{:?}", server.stats());
        assert_eq!(server.failed().reason(), None);
    }
}

#[test]
fn both_threads_waiting_for_a_page_continue() {
    let mut source = Pattern::new(PAGES, 0);
    source.guarded = Some(5 * PAGE);
    let source = Arc::new(source);
    let mut machine = Faulter::anonymous(LEN);
    let server = machine.serve(Backing::Private, &source, Options::default());
    machine.send(&format!("later load {}", 5 * PAGE));
    until("the fault is being read", || source.door.arrived() == 1);
    for _ in 0..3 {
        machine.send(&format!("later load {}", 9 * PAGE));
    }
    until("all wait", || machine.threads_in("handle_userfault") == 4);
    source.door.open();
    let mut answers: Vec<String> = (0..4).map(|_| machine.answer()).collect();
    answers.sort();
    let mut expected = vec![source.word(9 * PAGE).to_string(); 3];
    expected.push(source.word(5 * PAGE).to_string());
    expected.sort();
    assert_eq!(answers, expected);
    // The page was installed once and found to exist twice. Counters may lag behind the replies.
    until("all are counted", || {
        let stats = server.stats();
        (stats.pages_loaded, stats.present_faults) == (2, 2)
    });
}
