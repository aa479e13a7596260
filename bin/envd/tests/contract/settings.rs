//! `/init`, `/envs`, `/metrics`, `/health`, and authorization of callers.

use std::io::{Read as _, Write as _};

use crate::{
    calls::{CODECS, clients_by, header, script},
    raw::{Answer, call, connect},
    world::run,
};

fn init(body: &str, token: &str) -> Answer {
    let token = if token.is_empty() {
        String::new()
    } else {
        format!("\r\nx-access-token: {token}")
    };
    call(
        &format!("POST /init HTTP/1.1\r\ncontent-type: application/json{token}"),
        body.as_bytes(),
    )
}

#[test]
fn a_token_once_set_is_asked_of_everyone() {
    run(async |world| {
        let envs = |token: &str| call(&format!("GET /envs HTTP/1.1{token}"), b"").status;
        assert_eq!(envs(""), 200, "no token yet");
        let answer = init(r#"{"accessToken":"one"}"#, "");
        assert_eq!(
            (answer.status, answer.header("x-envd-version")),
            (204, Some("0.6.13"))
        );
        for path in ["/envs", "/metrics", "/nothing"] {
            let answer = call(&format!("GET {path} HTTP/1.1"), b"");
            assert_eq!(
                (answer.status, &answer.json()["code"]),
                (401, &401.into()),
                "{path}"
            );
            assert_eq!(
                call(&format!("GET {path} HTTP/1.1\r\nx-access-token: on"), b"").status,
                401
            );
        }
        assert_eq!(call("GET /health HTTP/1.1", b"").status, 204);
        assert_eq!(envs("\r\nx-access-token: one"), 200);
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let error = crate::calls::refusal(clients.start(script("true")).await).await;
            assert_eq!(error.code, connectrpc::ErrorCode::Unauthenticated);
            let good = clients
                .start_with(script("echo x"), header("x-access-token", "one"))
                .await;
            assert_eq!(good.expect("admitted").rest().await.text(), "x\n");
        }
        // An upgrade request does not bypass the token.
        let upgrade = "GET /envs HTTP/1.1\r\nupgrade: websocket\r\nsec-websocket-key: eA==";
        assert_eq!(call(upgrade, b"").status, 401);
    });
}

#[test]
fn a_refused_call_costs_its_connection_nothing() {
    run(async |_| {
        assert_eq!(init(r#"{"accessToken":"one"}"#, "").status, 204);
        let mut stream = connect();
        let refused = "POST /process.Process/List HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n";
        stream.write_all(refused.as_bytes()).expect("sent");
        // The response comes before the body, which arrives together with the next call.
        let mut answers = Vec::new();
        let mut piece = [0; 4096];
        while !String::from_utf8_lossy(&answers).contains("unauthorized") {
            let length = stream.read(&mut piece).expect("read");
            assert_ne!(length, 0, "closed: {}", String::from_utf8_lossy(&answers));
            answers.extend_from_slice(&piece[..length]);
        }
        let next = "{}GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(next.as_bytes()).expect("sent");
        assert_eq!(crate::raw::read(&mut stream).status, 204);
    });
}

#[test]
fn only_who_knows_the_token_changes_it() {
    run(async |_| {
        assert_eq!(init(r#"{"accessToken":"one"}"#, "").status, 204);
        for (body, token) in [
            ("{}", ""),
            (r#"{"accessToken":"two"}"#, ""),
            (r#"{"accessToken":"two"}"#, "on"),
            (r#"{"accessToken":""}"#, ""),
        ] {
            assert_eq!(init(body, token).status, 401, "{body} {token}");
        }
        assert_eq!(
            init(r#"{"accessToken":"one"}"#, "").status,
            204,
            "repeating it is fine"
        );
        assert_eq!(init("{}", "one").status, 204);
        assert_eq!(
            call("GET /envs HTTP/1.1", b"").status,
            401,
            "a body without one keeps it"
        );
        assert_eq!(init(r#"{"accessToken":"two"}"#, "one").status, 204);
        let with = |token: &str| {
            call(
                &format!("GET /envs HTTP/1.1\r\nx-access-token: {token}"),
                b"",
            )
            .status
        };
        assert_eq!((with("one"), with("two")), (401, 200));
    });
}

#[test]
fn older_news_are_ignored_in_every_way_to_write_a_time() {
    run(async |_| {
        let say = |time: &str, value: &str| {
            init(
                &format!(r#"{{"timestamp":"{time}","envVars":{{"V":"{value}"}}}}"#),
                "",
            )
            .status
        };
        let value = || {
            call("GET /envs HTTP/1.1", b"").json()["V"]
                .as_str()
                .map(str::to_owned)
        };
        assert_eq!(say("2026-05-01T12:00:00.000000002Z", "b"), 204);
        for older in [
            "2026-05-01T12:00:00.000000001Z",
            "2026-05-01T11:59:59Z",
            "2026-05-01T13:59:59+02:00",
        ] {
            assert_eq!(
                (say(older, "a"), value().as_deref()),
                (204, Some("b")),
                "{older}"
            );
        }
        assert_eq!(
            (say("2026-05-01T08:00:01-04:00", "c"), value().as_deref()),
            (204, Some("c"))
        );
        assert_eq!(
            init(r#"{"envVars":{"V":"d"}}"#, "").status,
            204,
            "no time: applied"
        );
        assert_eq!(value().as_deref(), Some("d"));
        for bad in [
            r#"{"timestamp":"yesterday"}"#,
            "{",
            "[]",
            r#"{"envVars":{"A":1}}"#,
        ] {
            let answer = init(bad, "");
            assert_eq!(
                (answer.status, &answer.json()["code"]),
                (400, &400.into()),
                "{bad}"
            );
        }
        assert_eq!(init("", "").status, 204);
    });
}

#[test]
fn the_default_user_is_used_and_kept() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            assert_eq!(init(r#"{"defaultUser":"user"}"#, "").status, 204);
            assert_eq!(clients.sh("id -un").await, "user\n");
            assert_eq!(init(r#"{"envVars":{}}"#, "").status, 204);
            assert_eq!(clients.sh("id -un; pwd").await, "user\n/home/user\n");
        }
    });
}

#[test]
fn metrics_are_the_kernels() {
    run(async |world| {
        let metrics = call("GET /metrics HTTP/1.1", b"").json();
        let number = |name: &str| {
            metrics[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name} in {metrics}"))
        };
        let total = world.read("/proc/meminfo");
        let total: f64 = total
            .split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .expect("a number");
        assert!((number("mem_total") - total * 1024.0).abs() < 1.0);
        assert!((number("mem_total_mib") - (total / 1024.0).floor()).abs() < 1.0);
        assert!(number("mem_used") > 0.0 && number("mem_used") < number("mem_total"));
        assert!(number("disk_used") > 0.0 && number("disk_used") <= number("disk_total"));
        let cpus = std::thread::available_parallelism().expect("known").get();
        assert!((number("cpu_count") - cpus as f64).abs() < 0.5);
        assert!((0.0..=100.0).contains(&number("cpu_used_pct")));
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970");
        assert!((number("ts") - now.as_secs_f64()).abs() < 60.0);
        assert!(metrics["mem_cache"].is_u64());
    });
}

#[test]
fn what_is_not_built_is_said_to_be_not_built() {
    run(async |_| {
        for path in ["/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw"] {
            let answer = call(&format!("POST {path} HTTP/1.1"), b"{}");
            assert_eq!((answer.status, &answer.json()["code"]), (501, &501.into()));
        }
        let mounts = r#"{"volumeMounts":[{"nfs_target":"a:/b","path":"/c"}],"accessToken":"one"}"#;
        let answer = init(mounts, "");
        assert_eq!((answer.status, &answer.json()["code"]), (501, &501.into()));
        assert_eq!(
            call("GET /envs HTTP/1.1", b"").status,
            200,
            "nothing was set"
        );
        assert_eq!(
            init(
                r#"{"volumeMounts":[],"hyperloopIP":"","lifecycleID":"x"}"#,
                ""
            )
            .status,
            204
        );
    });
}
