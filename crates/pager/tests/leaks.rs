//! Test that a server leaves no descriptors and threads behind. It has its own program, because it
//! counts the resources of the whole process.

#[path = "pager/support.rs"]
#[allow(dead_code, reason = "the other tests use the rest of it")]
mod support;

use std::sync::Arc;

use support::{Faulter, PAGE, Pattern, memfd, until};
use wrenn_pager::{Backing, Options, PageRun};

fn count(of: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{of}"))
        .expect("lists")
        .count()
}

#[test]
fn server_leaves_no_descriptor_and_no_thread() {
    let len = 500 * PAGE;
    let before = (count("fd"), count("task"));
    for round in 0..30 {
        let mut source = Pattern::new(500, 3);
        if round % 3 == 2 {
            source.broken = Some(source_page(&source));
        }
        let source = Arc::new(source);
        let memory = memfd(len);
        let private = round % 2 == 0;
        let (mut machine, backing) = if private {
            (Faulter::anonymous(len), Backing::Private)
        } else {
            let copy = memory.try_clone().expect("a copy");
            (Faulter::private_of(&memory, len), Backing::Shared(copy))
        };
        let options = Options {
            prefetch: vec![PageRun { offset: 0, len }],
            record_limit: 100,
        };
        let mut server = machine.serve(backing, &source, options);
        machine.send("touch 3");
        match round % 3 {
            0 => assert_eq!(machine.answer(), "touched"),
            1 => machine.kill(),
            _ => until("it fails", || server.failed().reason().is_some()),
        }
        drop(machine);
        if round % 2 == 1 {
            server.stop();
        }
    }
    // An ended thread is listed until the kernel has removed it.
    until("as many as before", || {
        (count("fd"), count("task")) == before
    });
}

fn source_page(source: &Pattern) -> u64 {
    let mut offsets = (0..500).map(|page| page * PAGE);
    offsets
        .find(|offset| !source.is_zero(*offset))
        .expect("there is data")
}
