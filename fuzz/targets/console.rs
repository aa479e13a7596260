//! Serial console of a guest. The marks must not depend on how the output is divided into reads.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_supervisor::console::{Mark, MarkFinder};

fuzz_target!(|input: &[u8]| {
    let Some((&piece, output)) = input.split_first() else {
        return;
    };
    let whole = MarkFinder::default().feed(output);
    let mut finder = MarkFinder::default();
    let pieces = output.chunks(usize::from(piece).max(1));
    let divided: Vec<Mark> = pieces.flat_map(|piece| finder.feed(piece)).collect();
    assert_eq!(divided, whole);
    for mark in whole {
        if let Mark::BootFailed(reason) = mark {
            // The reason reaches logs, terminals and a database that rejects NUL.
            assert!(!reason.contains(char::is_control));
        }
    }
});
