//! Output is never lost, regardless of the reader and its speed.

use std::time::Duration;

use sha2::{Digest as _, Sha256};
use wrenn_proto::rpc::process::__buffa::oneof::process_event::{Event, data_event::Output};

use crate::{
    calls::{CODECS, by_pid, clients, clients_by, refusal, script, script_with_input},
    world::{eventually, run, run_with},
};

/// Number of lines that give 50 MB of non-repeating text.
const LINES: u32 = 5_500_000;

#[test]
fn short_commands_lose_nothing() {
    let count = if std::env::var_os("WRENN_SOAK").is_some() {
        2000
    } else {
        200
    };
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            for number in 0..count / 2 {
                let outcome = clients
                    .run(script(&format!("echo x{number}; echo y >&2")))
                    .await;
                assert_eq!(outcome.stderr, b"y\n");
                assert_eq!(outcome.text(), format!("x{number}\n"));
            }
        }
        assert!(clients(world).list().await.is_empty());
    });
}

#[test]
fn a_slow_reader_gets_every_byte_and_the_agent_stores_none() {
    run(async |world| {
        let clients = clients(world);
        clients.sh("true").await;
        let before = world.agent_status("VmRSS");
        world.reset_peak();
        let mut events = clients
            .start(script(&format!("seq {LINES}")))
            .await
            .expect("started");
        let pid = events.pid().await;
        // The process is blocked by its full pipe and has not ended. Nothing is read for now.
        let mut switches = 0;
        eventually("the process waits for its reader", async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let last = switches;
            switches = io_bytes(world, pid);
            switches > 0 && switches == last
        })
        .await;
        let mut sum = Sha256::new();
        let mut length = 0;
        while let Some(Event::Data(data)) = events.next().await.expect("goes on") {
            let Some(Output::Stdout(bytes)) = data.output else {
                panic!("{data:?}")
            };
            length += bytes.len();
            sum.update(&bytes);
        }
        assert_eq!(
            length,
            (1..=LINES).map(|n| n.ilog10() as usize + 2).sum::<usize>()
        );
        let wanted = clients.sh(&format!("seq {LINES} | sha256sum")).await;
        assert_eq!(format!("{:x}", HexOf(&sum.finalize())), wanted[..64]);
        let grown = world.agent_status("VmHWM").saturating_sub(before);
        assert!(grown < 16 * 1024, "the agent grew by {grown} KiB");
    });
}

/// Returns the number of bytes that a process has written so far.
fn io_bytes(world: &crate::world::World, pid: u32) -> u64 {
    let Ok(io) = std::fs::read_to_string(world.path(&format!("/proc/{pid}/io"))) else {
        return 0;
    };
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: "));
    line.and_then(|word| word.parse().ok()).unwrap_or(0)
}

struct HexOf<'a>(&'a [u8]);

impl std::fmt::LowerHex for HexOf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[test]
fn who_connects_later_hears_what_nobody_heard_and_what_comes() {
    run(async |world| {
        let clients = clients(world);
        let mut first = clients
            .start(script_with_input("while read w; do echo got $w; done"))
            .await
            .expect("started");
        let pid = first.pid().await;
        let say = async |word: &str| {
            let input = wrenn_proto::rpc::process::__buffa::oneof::process_input::Input::Stdin(
                format!("{word}\n").into_bytes(),
            );
            clients.send(by_pid(pid), input).await.expect("sent");
        };
        say("one").await;
        assert_eq!(first.until("\n").await, "got one\n");
        // Two concurrent subscribers receive the same output.
        let mut second = clients.connect(by_pid(pid)).await.expect("there");
        assert_eq!(second.pid().await, pid);
        say("two").await;
        assert_eq!(first.until("\n").await, "got two\n");
        assert_eq!(second.until("\n").await, "got two\n");
        // Once the agent knows that both are gone, there are no subscribers, and the process is not
        // blocked.
        let before = world.descriptors();
        drop((first, second));
        eventually("the agent closes both connections", async || {
            world.descriptors() + 2 <= before
        })
        .await;
        let before = io_bytes(world, pid);
        say("three").await;
        eventually("the line is printed", async || {
            io_bytes(world, pid) > before
        })
        .await;
        let mut third = clients.connect(by_pid(pid)).await.expect("there");
        assert_eq!(third.pid().await, pid);
        assert_eq!(third.until("\n").await, "got three\n");
        clients.close_stdin(pid).await.expect("closed");
        let outcome = third.rest().await;
        assert_eq!((outcome.ends, outcome.end.exit_code), (1, 0));
        assert!(outcome.stdout.is_empty(), "output was delivered twice");
    });
}

#[test]
fn a_detached_start_leaves_the_first_byte_for_who_connects() {
    run(async |world| {
        let clients = clients(world);
        let detached = crate::calls::header("wrenn-detached", "1");
        let mut begun = clients
            .start_with(script("echo early; sleep 0.5; echo late"), detached)
            .await
            .expect("started");
        let pid = begun.pid().await;
        let all = clients
            .connect(by_pid(pid))
            .await
            .expect("there")
            .rest()
            .await;
        assert_eq!(String::from_utf8_lossy(&all.stdout), "early\nlate\n");
    });
}

#[test]
fn output_without_listeners_does_not_stop_a_process_and_its_end_is_kept() {
    run(async |world| {
        let clients = clients(world);
        let mut events = clients
            .start(script("sleep 0.3; seq 300000; echo last; exit 7"))
            .await
            .expect("started");
        let pid = events.pid().await;
        drop(events);
        eventually("the process ends", async || !world.runs(pid)).await;
        let late = clients
            .connect(by_pid(pid))
            .await
            .expect("remembered")
            .rest()
            .await;
        assert_eq!((late.pid, late.end.exit_code), (pid, 7));
        let text = String::from_utf8(late.stdout).expect("UTF-8");
        assert!(
            text.ends_with("300000\nlast\n"),
            "the newest output is kept"
        );
        assert!(text.len() <= 128 * 1024, "and no more than a little of it");
        let mark = String::from_utf8(late.stderr).expect("UTF-8");
        assert!(
            mark.starts_with("[envd: ") && mark.contains("dropped"),
            "{mark}"
        );
        let unknown = refusal(clients.connect(by_pid(999_999)).await).await;
        assert_eq!(unknown.code, connectrpc::ErrorCode::NotFound);
    });
}

#[test]
fn bytes_that_are_no_text_pass() {
    run(async |world| {
        for codec in CODECS {
            let outcome = clients_by(world, codec)
                .run(script("printf '\\377\\000\\303'; printf '\\251' >&2"))
                .await;
            assert_eq!(
                (&outcome.stdout[..], &outcome.stderr[..]),
                (&b"\xff\0\xc3"[..], &b"\xa9"[..])
            );
        }
    });
}

#[test]
fn a_thousand_processes_run_side_by_side() {
    run(async |world| {
        let clients = clients(world);
        clients.sh("true").await;
        let before = world.descriptors();
        let runs = (0..1000).map(|number| clients.run(script(&format!("sleep 2; echo {number}"))));
        let outcomes = futures::future::join_all(runs).await;
        for (number, outcome) in outcomes.into_iter().enumerate() {
            assert_eq!(outcome.text(), format!("{number}\n"));
        }
        assert!(clients.list().await.is_empty());
        drop(clients);
        eventually("descriptors are closed", async || {
            world.descriptors() <= before + 2
        })
        .await;
    });
}

#[test]
fn lost_output_is_counted_to_the_byte_in_the_form_that_the_client_knows() {
    run(async |world| {
        let total: u64 = (1..=300_000_u32).map(|n| u64::from(n.ilog10()) + 2).sum();
        let detached = || crate::calls::header("wrenn-detached", "1");
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let start = async |request| {
                let started = clients.start_with(request, detached()).await;
                let pid = started.expect("started").pid().await;
                eventually("the process ends", async || !world.runs(pid)).await;
                pid
            };
            let pid = start(script("seq 300000")).await;
            let options = crate::calls::header("wrenn-lost-output", "1");
            let late = clients.connect_with(by_pid(pid), options).await;
            let late = late.expect("remembered").rest().await;
            assert!(late.lost_bytes > 0 && late.stderr.is_empty(), "{late:?}");
            assert_eq!(late.lost_bytes + late.stdout.len() as u64, total);
            assert!(late.stdout.ends_with(b"\n300000\n"));
            // A client of E2B gets text, in a terminal in the terminal's own output.
            let pid = start(script("seq 300000")).await;
            let late = clients.connect(by_pid(pid)).await.expect("remembered");
            let late = late.rest().await;
            let lost = total - late.stdout.len() as u64;
            let mark = format!("[envd: {lost} bytes of output that no client took were dropped]");
            assert_eq!(late.stderr, format!("{mark}\n").into_bytes());
            let request = crate::terminal::in_terminal(script("seq 300000"), 80, 24);
            let pid = start(request).await;
            let late = clients.connect(by_pid(pid)).await.expect("remembered");
            let late = late.rest().await;
            let text = String::from_utf8(late.terminal).expect("UTF-8");
            assert!(text.starts_with("[envd: ") && text.ends_with("300000\r\n"));
        }
    });
}

#[test]
fn who_takes_nothing_is_dropped_with_a_mark_and_the_process_goes_on() {
    run_with(&["--patience", "1"], &[], async |world| {
        let clients = clients(world);
        let request = script(&format!(
            "seq {LINES}; echo > /mnt/work/done; exec sleep 1000"
        ));
        let mut slow = clients.start(request).await.expect("started");
        let pid = slow.pid().await;
        // Nothing is read.
        eventually("the process is not blocked", async || {
            world.path("/mnt/work/done").exists()
        })
        .await;
        let mut next = clients.connect(by_pid(pid)).await.expect("runs");
        assert_eq!(next.pid().await, pid);
        let newest = next.until(&format!("\n{LINES}\n")).await;
        assert!(newest.starts_with("[envd: "), "{}", &newest[..80]);
        let outcome = slow.rest().await;
        let error = outcome.error.expect("marked");
        assert_eq!(error.code, connectrpc::ErrorCode::DataLoss, "{error}");
        assert_eq!(outcome.ends, 0);
        assert!(outcome.stdout.starts_with(b"1\n2\n3\n"));
    });
}
