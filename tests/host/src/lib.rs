//! Private host of a test: a network namespace that acts as the host, and a private `/run`.
//!
//! Everything that a test creates is counted exactly and invisible to other tests. The kernel
//! removes all of it when the test ends, for any reason.
#![forbid(unsafe_code)]

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Moves the calling thread, and threads that it starts from now on, to a private host.
///
/// # Panics
/// Without root.
pub fn enter() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .expect("agent tests must run as root");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("mounts become private");
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .expect("a private /run");
    ip(&["link", "set", "lo", "up"]);
}

/// Runs `ip` and returns its output.
///
/// # Panics
/// If the command fails.
pub fn ip(args: &[&str]) -> String {
    run("ip", args)
}

/// Runs a program and returns its output.
///
/// # Panics
/// If the program fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

/// Network resources that a test may leave behind: named namespaces, links, routes, elements of
/// packet filter sets, slots.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Named network namespaces.
    pub namespaces: usize,
    /// Network links.
    pub links: usize,
    /// Routes of all tables.
    pub routes: usize,
    /// Links in the sets of packet filters.
    pub filter_elements: usize,
    /// Claimed network slots.
    pub slots: usize,
}

impl Footprint {
    /// Counts the current resources.
    ///
    /// # Panics
    /// If a program of the host fails.
    #[must_use]
    pub fn now() -> Self {
        let count_files = |dir: &str| std::fs::read_dir(dir).map_or(0, |entries| entries.count());
        let filter = run("nft", &["list", "ruleset"]);
        Self {
            namespaces: count_files("/run/netns"),
            links: ip(&["-o", "link", "show"]).lines().count(),
            routes: ip(&["-o", "route", "show", "table", "all"]).lines().count(),
            filter_elements: filter.matches("\"wrenn-v").count()
                - filter.matches("\"wrenn-v*\"").count(),
            slots: count_files("/run/wrenn/slots"),
        }
    }
}
