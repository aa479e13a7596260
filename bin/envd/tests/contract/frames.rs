//! Malformed input that no correct client sends.

use std::{io::Write as _, net::Shutdown};

use crate::{
    calls::{clients, script},
    raw::{self, call, connect, frame},
    world::{eventually, run},
};

const START: &str = "POST /process.Process/Start HTTP/1.1\r\ncontent-type: application/connect+json\r\nconnect-protocol-version: 1";
const STAT: &str = "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/json";

fn code_of_stream(answer: &raw::Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    let frames = answer.frames();
    let (flags, last) = frames.last().expect("an end");
    assert_eq!(flags & 2, 2, "{frames:?}");
    last["error"]["code"].as_str().unwrap_or("none").to_owned()
}

#[test]
fn a_start_by_bytes_is_answered_frame_by_frame() {
    run(async |_| {
        let request =
            r#"{"process":{"cmd":"/bin/sh","args":["-c","echo hi; exit 3"]},"stdin":false}"#;
        let answer = call(START, &frame(0, request.as_bytes()));
        assert_eq!(
            answer.header("content-type"),
            Some("application/connect+json")
        );
        assert!(answer.complete);
        let frames = answer.frames();
        assert!(
            frames[0].1["event"]["start"]["pid"]
                .as_u64()
                .is_some_and(|pid| pid > 1),
            "{frames:?}"
        );
        assert_eq!(frames[1].1["event"]["data"]["stdout"], "aGkK");
        let end = serde_json::json!({"exitCode": 3, "exited": true, "status": "exit status 3", "error": "exit status 3"});
        assert_eq!(frames[2].1["event"]["end"], end);
        assert_eq!(frames[3], (2, serde_json::json!({})));
    });
}

#[test]
fn bad_frames_are_errors_and_start_nothing() {
    run(async |world| {
        let request = br#"{"process":{"cmd":"sleep","args":["1000"]}}"#;
        let cases: [(&str, Vec<u8>, &str); 7] = [
            ("not JSON", frame(0, b"{nonsense"), "invalid_argument"),
            (
                "wrong type",
                frame(0, br#"{"process":5}"#),
                "invalid_argument",
            ),
            ("no message", vec![], ""),
            ("half a header", vec![0, 0, 0], "invalid_argument"),
            (
                "half a message",
                frame(0, request)[..20].to_vec(),
                "invalid_argument",
            ),
            (
                "two messages",
                [frame(0, request), frame(0, request)].concat(),
                "",
            ),
            (
                "compressed without saying how",
                frame(1, request),
                "internal",
            ),
        ];
        for (what, body, wanted) in cases {
            let code = code_of_stream(&call(START, &body));
            assert_ne!(code, "none", "{what}");
            if !wanted.is_empty() {
                assert_eq!(code, wanted, "{what}");
            }
        }
        assert!(clients(world).list().await.is_empty(), "nothing runs");
    });
}

#[test]
fn huge_lengths_are_refused_without_room_for_them() {
    run(async |world| {
        clients(world).sh("true").await;
        let before = world.agent_status("VmRSS");
        world.reset_peak();
        for length in [5_000_000_u32, 0x7fff_ffff, u32::MAX] {
            let mut body = vec![0];
            body.extend(length.to_be_bytes());
            body.extend([b' '; 1000]);
            assert_eq!(
                code_of_stream(&call(START, &body)),
                "resource_exhausted",
                "{length}"
            );
        }
        // As a body with a declared length, and as one without.
        let mut stream = connect();
        raw::send(
            &mut stream,
            &format!("{STAT}\r\ncontent-length: 4000000000"),
            b"{",
        );
        assert_eq!(raw::read(&mut stream).status, 429);
        let long = format!(r#"{{"path":"{}"}}"#, "x".repeat(6_000_000));
        let chunked = [
            format!("{:x}\r\n", long.len()).as_bytes(),
            long.as_bytes(),
            b"\r\n0\r\n\r\n",
        ]
        .concat();
        let answer = call(&format!("{STAT}\r\ntransfer-encoding: chunked"), &chunked);
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (429, Some("resource_exhausted"))
        );
        assert!(world.agent_status("VmHWM") < before + 24 * 1024);
    });
}

#[test]
fn wrong_codecs_methods_and_paths_are_named_as_such() {
    run(async |_| {
        let kind =
            |kind: &str| format!("POST /process.Process/Start HTTP/1.1\r\ncontent-type: {kind}");
        for wrong in ["text/plain", "application/connect+xml"] {
            assert_eq!(call(&kind(wrong), b"{}").status, 415, "{wrong}");
        }
        let answer = call(&kind("application/json"), b"{}");
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (501, Some("unimplemented")),
            "not as one message"
        );
        assert_eq!(
            call(
                "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/xml",
                b"{}"
            )
            .status,
            415
        );
        assert_eq!(call("GET /process.Process/Start HTTP/1.1", b"").status, 405);
        assert_eq!(call(&STAT.replace("Stat", "NoSuch"), b"{}").status, 404);
        assert_eq!(
            call(&STAT.replace("filesystem.", "nosuch."), b"{}").status,
            404
        );
        assert_eq!(call("GET /nothing HTTP/1.1", b"").status, 404);
        let answer = call(STAT, br#"{"path":"/no/such"}"#);
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (404, Some("not_found"))
        );
        for bad in [&b"{"[..], b"7", b"\xff\xfe", br#"{"path":7}"#] {
            let answer = call(STAT, bad);
            assert_eq!(
                (answer.status, answer.json()["code"].as_str()),
                (400, Some("invalid_argument"))
            );
        }
        // Unknown fields are ignored, and both styles of field names are accepted.
        assert_eq!(call(STAT, br#"{"path":"/etc","later":1}"#).status, 200);
        let watch = STAT.replace("Stat", "CreateWatcher");
        assert_eq!(
            call(&watch, br#"{"path":"/mnt","include_entry":true}"#).status,
            200
        );
        assert_eq!(
            call(&watch, br#"{"path":"/mnt","includeEntry":true}"#).status,
            200
        );
    });
}

#[test]
fn what_is_not_http_is_closed() {
    run(async |_| {
        for nonsense in [
            &b"\0\0\0\0\0\0\0\0\r\n\r\n"[..],
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
        ] {
            let mut stream = connect();
            stream.write_all(nonsense).expect("sent");
            assert_eq!(raw::read(&mut stream).status, 400);
        }
        let many = format!("GET /health HTTP/1.1\r\n{}", "x: y\r\n".repeat(500));
        assert_eq!(call(many.trim_end(), b"").status, 431);
        let mut stream = connect();
        let long = format!(
            "GET /health HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n",
            "y".repeat(2_000_000)
        );
        let _ = stream.write_all(long.as_bytes());
        assert_eq!(call("GET /health HTTP/1.1", b"").status, 204);
    });
}

#[test]
fn half_open_streams_leave_nothing_behind() {
    run(async |world| {
        let clients = clients(world);
        clients.sh("true").await;
        let before = world.descriptors();
        for _ in 0..30 {
            // An unfinished request, one whose response is never read, and one that is half closed.
            let mut unfinished = connect();
            unfinished
                .write_all(format!("{STAT}\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").as_bytes())
                .expect("sent");
            let mut unread = connect();
            let request =
                br#"{"process":{"cmd":"sh","args":["-c","yes | head -c 300000"]},"stdin":true}"#;
            raw::send(&mut unread, START, &frame(0, request));
            let mut half = connect();
            raw::send(
                &mut half,
                &STAT.replace("Stat", "ListDir"),
                br#"{"path":"/etc"}"#,
            );
            half.shutdown(Shutdown::Write).expect("open");
            let mut input = connect();
            let head = START.replace("Start", "StreamInput") + "\r\ntransfer-encoding: chunked";
            raw::send(&mut input, &head, b"5\r\n\0\0\0\0\x09\r\n");
        }
        eventually("processes end and descriptors are closed", async || {
            clients.list().await.is_empty() && world.descriptors() <= before + 2
        })
        .await;
        assert_eq!(clients.run(script("echo on")).await.text(), "on\n");
    });
}

#[test]
fn headers_that_make_no_sense_are_errors_or_ignored() {
    run(async |_| {
        let answer = call(
            &format!("{STAT}\r\nauthorization: Basic !!!"),
            br#"{"path":"/"}"#,
        );
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (401, Some("unauthenticated"))
        );
        assert_eq!(
            call(
                &format!("{STAT}\r\nauthorization: Bearer x"),
                br#"{"path":"/"}"#
            )
            .status,
            200
        );
        let request = br#"{"process":{"cmd":"true"},"stdin":false}"#;
        for header in [
            "keepalive-ping-interval: x",
            "keepalive-ping-interval: -1",
            "keepalive-ping-interval: 99999999999999999999",
        ] {
            assert_eq!(
                code_of_stream(&call(&format!("{START}\r\n{header}"), &frame(0, request))),
                "none",
                "{header}"
            );
        }
        assert_eq!(
            code_of_stream(&call(
                &format!("{START}\r\nkeepalive-ping-interval: 18446744073709551615"),
                &frame(0, request)
            )),
            "none"
        );
        for timeout in ["99999999999", "abc"] {
            let answer = call(
                &format!("{START}\r\nconnect-timeout-ms: {timeout}"),
                &frame(0, request),
            );
            assert!(answer.complete, "{answer:?}");
        }
    });
}

#[test]
fn browsers_of_any_origin_may_call() {
    run(async |_| {
        let preflight = "OPTIONS /files HTTP/1.1\r\norigin: http://a.example\r\naccess-control-request-method: POST\r\naccess-control-request-headers: x-access-token";
        let answer = call(preflight, b"");
        assert_eq!(
            (answer.status, answer.header("access-control-allow-origin")),
            (200, Some("*"))
        );
        assert_eq!(answer.header("access-control-max-age"), Some("7200"));
        let answer = call("GET /health HTTP/1.1\r\norigin: http://a.example", b"");
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
    });
}

#[test]
fn fields_may_have_their_names_in_either_style() {
    run(async |_| {
        let ask = |method: &str, body: &str| {
            let head = format!(
                "POST /filesystem.Filesystem/{method} HTTP/1.1\r\ncontent-type: application/json"
            );
            let answer = call(&head, body.as_bytes());
            assert_eq!(answer.status, 200, "{answer:?}");
            answer.json()
        };
        for (entry, id) in [
            ("includeEntry", "watcherId"),
            ("include_entry", "watcher_id"),
        ] {
            let made = ask(
                "CreateWatcher",
                &format!(r#"{{"path":"/mnt/work","{entry}":true}}"#),
            );
            let made = made["watcherId"].as_str().expect("an id");
            let head =
                "POST /files?path=/mnt/work/f HTTP/1.1\r\ncontent-type: application/octet-stream";
            assert_eq!(call(head, b"x").status, 200);
            let events = ask("GetWatcherEvents", &format!(r#"{{"{id}":"{made}"}}"#));
            let event = &events["events"][0];
            assert_eq!(event["entry"]["path"], "/mnt/work/f", "{events}");
            // Enumerations are sent as names, 64-bit numbers as strings, times as RFC 3339.
            assert_eq!(event["entry"]["type"], "FILE_TYPE_FILE");
            assert_eq!(event["entry"]["size"], "1");
            assert!(
                event["entry"]["modifiedTime"]
                    .as_str()
                    .is_some_and(|t| t.ends_with('Z'))
            );
        }
    });
}
