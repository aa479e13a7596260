//! `wrenn sandbox shell` on a real pseudo-terminal, against a fake server.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failing test may panic"
)]

#[path = "fake/server.rs"]
#[expect(dead_code, reason = "shared with tests that use more of it")]
mod server;

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::Stdio,
    time::Duration,
};

use nix::{
    pty::{OpenptyResult, Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};
use rustix::termios::tcsetwinsize;
use serde_json::json;
use server::{DEADLINE, Fake, Script};
use tokio::process::Child;

/// Shell on its own terminal.
struct Shell {
    master: File,
    slave: OwnedFd,
    before: Termios,
    child: Child,
}

fn shell(fake: &Fake) -> Shell {
    let size = Winsize {
        ws_row: 33,
        ws_col: 101,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
    let before = tcgetattr(&slave).unwrap();
    let end = || Stdio::from(slave.try_clone().unwrap());
    let child = fake
        .wrenn(&["sandbox", "shell", "sb-1"])
        .env("TERM", "xterm")
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    Shell {
        master: File::from(master),
        slave,
        before,
        child,
    }
}

impl Shell {
    fn is_restored(&self) -> bool {
        tcgetattr(&self.slave).unwrap() == self.before
    }

    /// Waits until keys are passed on and no longer echoed locally.
    async fn until_raw(&self) {
        let wait = async {
            while self.is_restored() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait)
            .await
            .expect("a raw terminal in time");
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(DEADLINE, self.child.wait()).await;
        ended.expect("an end in time").unwrap().code()
    }

    /// Reads until `text` is shown, and returns everything that was shown.
    async fn until_shown(&self, text: &'static str) -> String {
        let mut terminal = self.master.try_clone().unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let (mut shown, mut piece) = (String::new(), [0; 512]);
            while !shown.contains(text) {
                let len = terminal.read(&mut piece).unwrap();
                shown.push_str(&String::from_utf8_lossy(&piece[..len]));
            }
            shown
        });
        tokio::time::timeout(DEADLINE, read)
            .await
            .expect("it is shown in time")
            .unwrap()
    }

    /// Types keys and reads what is shown for them.
    async fn type_and_read(&self, keys: &'static [u8]) -> Vec<u8> {
        let mut terminal = self.master.try_clone().unwrap();
        let read = tokio::task::spawn_blocking(move || {
            terminal.write_all(keys).unwrap();
            let mut shown = vec![0; keys.len()];
            terminal.read_exact(&mut shown).unwrap();
            shown
        });
        tokio::time::timeout(DEADLINE, read)
            .await
            .expect("an answer in time")
            .unwrap()
    }
}

#[tokio::test]
async fn keys_are_sent_and_the_terminal_is_restored() {
    let fake = Fake::start(Script::Echo).await;
    let mut shell = shell(&fake);
    let start = fake.received("start").await;
    assert_eq!((&start["cols"], &start["rows"]), (&json!(101), &json!(33)));
    assert_eq!(start["envs"]["TERM"], "xterm");
    shell.until_raw().await;
    // Ctrl-C is a key like any other: it belongs to the program in the sandbox.
    assert_eq!(shell.type_and_read(b"ls\r\x03").await, b"ls\r\x03");
    shell.master.write_all(b"\x04").unwrap();
    assert_eq!(shell.exit_code().await, Some(0));
    assert!(shell.is_restored());
}

#[tokio::test]
async fn new_size_is_sent() {
    let fake = Fake::start(Script::Echo).await;
    let mut shell = shell(&fake);
    fake.received("start").await;
    shell.until_raw().await;
    shell.type_and_read(b"x").await;
    let mut size = rustix::termios::tcgetwinsize(&shell.master).unwrap();
    (size.ws_col, size.ws_row) = (77, 11);
    tcsetwinsize(&shell.master, size).unwrap();
    // The kernel signals only the session of the terminal; here the test takes its place.
    shell.signal(Signal::SIGWINCH);
    let resize = fake.received("resize").await;
    assert_eq!((&resize["cols"], &resize["rows"]), (&json!(77), &json!(11)));
    shell.master.write_all(b"\x04").unwrap();
    assert_eq!(shell.exit_code().await, Some(0));
}

#[tokio::test]
async fn signal_ends_the_shell_and_restores_the_terminal() {
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let fake = Fake::start(Script::Echo).await;
        let mut shell = shell(&fake);
        fake.received("start").await;
        shell.until_raw().await;
        shell.type_and_read(b"x").await;
        shell.signal(signal);
        assert_eq!(shell.exit_code().await, Some(code));
        assert!(shell.is_restored());
    }
}

#[tokio::test]
async fn lost_server_is_reported_and_the_terminal_restored() {
    let broken = json!({"type": "error", "data": "the sandbox is gone"});
    let fake = Fake::start(Script::Send(vec![broken])).await;
    let mut shell = shell(&fake);
    assert_eq!(shell.exit_code().await, Some(1));
    assert!(shell.is_restored());
    let shown = shell.until_shown("the sandbox is gone").await;
    assert!(shown.contains("wrenn: "), "{shown}");
}
