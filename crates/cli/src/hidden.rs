//! The verbs that Wrenn calls itself: one process of each for every sandbox.

use std::{ffi::OsString, path::PathBuf};

/// Runs a hidden verb if the command line names one, and answers with its exit code.
pub(crate) fn dispatch(args: &[OsString]) -> Option<i32> {
    let (verb, rest) = args.split_first()?;
    match verb.to_str()? {
        "supervise" => Some(with_path("supervise", "--dir", rest, |dir| {
            wrenn_supervisor::run(dir).map_err(Into::into)
        })),
        "jail" => Some(with_path("jail", "--spec", rest, |spec| {
            Err(wrenn_vmm::jail::enter(spec).into())
        })),
        _ => None,
    }
}

fn with_path(
    verb: &str,
    flag: &str,
    args: &[OsString],
    run: impl FnOnce(&std::path::Path) -> Result<(), anyhow::Error>,
) -> i32 {
    let [given, path] = args else {
        eprintln!("wrenn: `wrenn {verb}` is internal: expected {flag} PATH and nothing else");
        return 2;
    };
    if given != flag {
        eprintln!("wrenn: `wrenn {verb}` is internal: expected {flag} PATH and nothing else");
        return 2;
    }
    match run(&PathBuf::from(path)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("wrenn {verb}: {}", crate::output::in_full(error.as_ref()));
            1
        }
    }
}
