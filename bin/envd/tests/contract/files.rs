//! `/files`: readable and writable paths, and access control.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wrenn_proto::Grant;

use crate::{
    raw::{Answer, call},
    world::{World, run},
};

fn get(query: &str, headers: &str) -> Answer {
    call(&format!("GET /files?{query} HTTP/1.1{headers}"), b"")
}

fn put(query: &str, headers: &str, body: &[u8]) -> Answer {
    call(
        &format!("POST /files?{query} HTTP/1.1\r\ncontent-type: application/octet-stream{headers}"),
        body,
    )
}

/// Sends a multipart form. Each part is a name, a file name and content.
fn form(query: &str, parts: &[(&str, Option<&str>, &str)]) -> Answer {
    let mut body = String::new();
    for (name, file, content) in parts {
        let file = file
            .map(|file| format!("; filename=\"{file}\""))
            .unwrap_or_default();
        body.push_str(&format!(
            "--B\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n{content}\r\n"
        ));
    }
    body.push_str("--B--\r\n");
    let head =
        format!("POST /files?{query} HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=B");
    call(&head, body.as_bytes())
}

fn init(world: &World, body: &str, token: &str) -> u16 {
    let _ = world;
    call(
        &format!("POST /init HTTP/1.1\r\ncontent-type: application/json{token}"),
        body.as_bytes(),
    )
    .status
}

#[test]
fn only_regular_files_are_read_and_written() {
    run(async |world| {
        nix::unistd::mkfifo(&world.path("/mnt/work/pipe"), nix::sys::stat::Mode::S_IRWXU)
            .expect("made");
        std::os::unix::net::UnixListener::bind(world.path("/mnt/work/socket")).expect("bound");
        for path in [
            "/dev/zero",
            "/dev/tty",
            "/mnt/work/pipe",
            "/mnt/work",
            "/mnt/work/socket",
            "/proc/1/root",
        ] {
            let answer = get(&format!("path={path}"), "");
            assert_eq!(
                (answer.status, &answer.json()["code"]),
                (400, &400.into()),
                "{path}"
            );
            assert_eq!(put(&format!("path={path}"), "", b"x").status, 400, "{path}");
            assert_eq!(form("", &[("file", Some(path), "x")]).status, 400, "{path}");
        }
        let answer = get("path=/no/such", "");
        assert_eq!(
            (answer.status, answer.json()["message"].as_str()),
            (404, Some("path '/no/such' does not exist"))
        );
        for path in ["%00", "~other/x", "/etc/passwd/x"] {
            assert_eq!(put(&format!("path={path}"), "", b"x").status, 400, "{path}");
        }
        assert_eq!(
            put(&format!("path=/mnt/work/{}", "n".repeat(300)), "", b"x").status,
            400
        );
        assert_eq!(put("", "", b"x").status, 400);
        // Files of /proc report no length; their content is returned nevertheless.
        let answer = get("path=/proc/sys/kernel/ostype", "");
        assert_eq!((answer.status, answer.text().as_str()), (200, "Linux\n"));
        // Files of /sys report the length of a page.
        let answer = get("path=/sys/devices/system/cpu/online", "");
        assert!(answer.status == 200 && answer.complete, "{answer:?}");
        assert!(answer.text().starts_with('0'), "{answer:?}");
        assert_eq!(call("DELETE /files?path=/x HTTP/1.1", b"").status, 405);
        assert_eq!(
            get("path=/etc/passwd&signature_expiration=soon", "").status,
            400
        );
    });
}

#[test]
fn a_form_names_its_files_in_every_allowed_way() {
    run(async |world| {
        let answer = form(
            "",
            &[
                ("file", Some("/mnt/work/a/b"), "one"),
                ("note", None, "ignored"),
                ("file", Some("/mnt/work/c"), "two"),
            ],
        );
        assert_eq!(answer.status, 200, "{answer:?}");
        let wanted = serde_json::json!([{"path": "/mnt/work/a/b", "name": "b", "type": "file"}, {"path": "/mnt/work/c", "name": "c", "type": "file"}]);
        assert_eq!(answer.json(), wanted);
        assert_eq!(
            (world.read("/mnt/work/a/b"), world.read("/mnt/work/c")),
            ("one".into(), "two".into())
        );
        // The path in the query takes precedence, regardless of its position.
        assert_eq!(
            form(
                "username=user&path=d",
                &[("file", Some("/elsewhere"), "three")]
            )
            .status,
            200
        );
        assert_eq!(world.read("/home/user/d"), "three");
        // A path that comes after the file, or is missing, stores nothing.
        let answer = form(
            "",
            &[("file", None, "lost"), ("path", None, "/mnt/work/late")],
        );
        assert_eq!(
            (answer.status, world.path("/mnt/work/late").exists()),
            (400, false)
        );
        assert_eq!(form("", &[("file", Some(""), "x")]).status, 400);
        assert_eq!(form("", &[("other", Some("/mnt/work/x"), "x")]).status, 400);
        assert_eq!(form("", &[]).status, 400);
        assert!(!world.path("/mnt/work/x").exists());
        let twice = form(
            "",
            &[
                ("file", Some("/mnt/work/t"), "1"),
                ("file", Some("/mnt/work/./t"), "2"),
            ],
        );
        assert_eq!(
            (twice.status, world.read("/mnt/work/t").as_str()),
            (400, "1")
        );
        assert_eq!(
            form(
                "path=/mnt/work/t",
                &[("file", None, "3"), ("file", None, "4")]
            )
            .status,
            400
        );
        // A truncated form, and a body that is no form.
        let head = "POST /files?path=/mnt/work/cut HTTP/1.1\r\ncontent-type: multipart/form-data";
        let part = b"--B\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\nhalf";
        assert_eq!(call(&format!("{head}; boundary=B"), part).status, 400);
        assert_eq!(call(head, part).status, 400);
        assert_eq!(call(&format!("{head}; boundary=B"), b"no form").status, 400);
    });
}

#[test]
fn files_belong_to_the_user_and_are_replaced_in_place() {
    run(async |world| {
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(
            put("path=~/new/dir/f&username=user", "", b"long content").status,
            200
        );
        let stat = |path: &str| std::fs::metadata(world.path(path)).expect(path);
        for path in [
            "/home/user/new",
            "/home/user/new/dir",
            "/home/user/new/dir/f",
        ] {
            assert_eq!((stat(path).uid(), stat(path).gid()), (1000, 1000), "{path}");
        }
        assert_eq!(
            (
                stat("/home/user/new").mode() & 0o7777,
                stat("/home/user/new/dir/f").mode() & 0o7777
            ),
            (0o755, 0o644)
        );
        let inode = stat("/home/user/new/dir/f").ino();
        assert_eq!(
            put("path=/home/user/new/dir/f&username=root", "", b"short").status,
            200
        );
        let now = stat("/home/user/new/dir/f");
        assert_eq!((now.ino(), now.uid(), now.len()), (inode, 0, 5));
        // The default user applies if the request names none.
        assert_eq!(init(world, r#"{"defaultUser":"user"}"#, ""), 204);
        assert_eq!(put("path=by-default", "", b"x").status, 200);
        assert_eq!(stat("/home/user/by-default").uid(), 1000);
        let answer = put("path=x&username=root123", "", b"x");
        assert_eq!(
            (answer.status, answer.json()["message"].as_str()),
            (401, Some("invalid username: 'root123'"))
        );
    });
}

/// The kernel does not let anybody own these files, and no other file can take their place.
#[test]
fn values_of_the_kernel_are_written_in_every_way() {
    run(async |world| {
        let path = "/proc/sys/net/ipv4/ip_default_ttl";
        let query = format!("path={path}&username=user");
        let whole = "\r\nwrenn-upload-whole: 1";
        let check = |answer: Answer, value: &str| {
            assert_eq!(answer.status, 200, "{answer:?}");
            assert_eq!(world.read(path), format!("{value}\n"));
        };
        check(put(&query, "", b"101"), "101");
        check(put(&query, whole, b"102\n"), "102");
        check(form(&query, &[("file", None, "103")]), "103");
        world.write("/mnt/work/part", "104");
        let body = format!(r#"{{"source_paths":["/mnt/work/part"],"destination":"{path}"}}"#);
        let head = "POST /files/compose HTTP/1.1\r\ncontent-type: application/json";
        check(call(head, body.as_bytes()), "104");
        for headers in ["", whole] {
            let answer = put(&query, headers, b"nonsense");
            assert_eq!(answer.status, 400, "{answer:?}");
        }
        assert_eq!(world.read(path), "104\n");
    });
}

/// Writes files with one form, and returns how long that took.
fn many_files(world: &World, dir: &str, count: usize) -> Duration {
    let names: Vec<String> = (0..count).map(|n| format!("/mnt/work/{dir}/{n}")).collect();
    let mut parts: Vec<_> = names
        .iter()
        .map(|name| ("file", Some(name.as_str()), "content"))
        .collect();
    let began = Instant::now();
    let answer = form("", &parts);
    let took = began.elapsed();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json().as_array().map(Vec::len), Some(count));
    let written = std::fs::read_dir(world.path(&format!("/mnt/work/{dir}"))).expect("made");
    assert_eq!(written.count(), count);
    let again = format!("/mnt/work/{dir}/./0");
    parts.push(("file", Some(&again), "again"));
    assert_eq!(form("", &parts).status, 400);
    took
}

#[test]
fn ten_thousand_files_are_one_form_and_take_time_in_proportion() {
    run(async |world| {
        let few = many_files(world, "few", 2500);
        let many = many_files(world, "many", 10_000);
        assert_eq!(world.read("/mnt/work/many/9999"), "content");
        // Four times as many. Work for each pair of files would take sixteen times as long.
        assert!(many < few * 9, "{few:?}, {many:?}");
    });
}

#[test]
fn a_full_disk_is_said_to_be_full_and_the_agent_goes_on() {
    run(async |world| {
        let large = vec![7; 3 << 20];
        for answer in [
            put("path=/mnt/small/big", "", &large),
            form(
                "",
                &[("file", Some("/mnt/small/form"), &"x".repeat(3 << 20))],
            ),
        ] {
            assert_eq!((answer.status, &answer.json()["code"]), (507, &507.into()));
        }
        std::fs::remove_file(world.path("/mnt/small/big")).expect("there");
        std::fs::remove_file(world.path("/mnt/small/form")).expect("there");
        assert_eq!(put("path=/mnt/small/fits", "", b"x").status, 200);
    });
}

#[test]
fn ranges_and_conditions_are_answered_as_the_standard_says() {
    run(async |world| {
        world.write("/mnt/work/f", "0123456789");
        let part = |range: &str| {
            let answer = get("path=/mnt/work/f", &format!("\r\nrange: {range}"));
            (
                answer.status,
                answer
                    .header("content-range")
                    .unwrap_or_default()
                    .to_owned(),
                answer.text(),
            )
        };
        assert_eq!(
            part("bytes=2-4"),
            (206, "bytes 2-4/10".into(), "234".into())
        );
        assert_eq!(part("bytes=7-"), (206, "bytes 7-9/10".into(), "789".into()));
        assert_eq!(part("bytes=-1"), (206, "bytes 9-9/10".into(), "9".into()));
        assert_eq!(part("bytes=10-"), (416, "bytes */10".into(), String::new()));
        assert_eq!(part("bytes=5-2"), (200, String::new(), "0123456789".into()));
        assert_eq!(
            part("bytes=0-1,3-4"),
            (200, String::new(), "0123456789".into())
        );
        assert_eq!(
            part("bytes=0-18446744073709551615"),
            (206, "bytes 0-9/10".into(), "0123456789".into())
        );
        let answer = get(
            "path=/mnt/work/f",
            "\r\nrange: bytes=0-1\r\naccept-encoding: gzip",
        );
        assert_eq!(
            (answer.status, answer.header("content-encoding")),
            (206, None)
        );
        let whole = get("path=/mnt/work/f", "");
        assert_eq!(
            (whole.header("vary"), whole.header("accept-ranges")),
            (Some("Accept-Encoding"), Some("bytes"))
        );
        assert_eq!(
            whole.header("content-disposition"),
            Some("inline; filename=\"f\"")
        );
        let tag = whole.header("etag").expect("a tag").to_owned();
        let unchanged = |header: &str| get("path=/mnt/work/f", header).status;
        assert_eq!(unchanged(&format!("\r\nif-none-match: {tag}")), 304);
        assert_eq!(unchanged("\r\nif-none-match: \"other\""), 200);
        let modified = whole.header("last-modified").expect("a date").to_owned();
        assert_eq!(
            unchanged(&format!("\r\nif-modified-since: {modified}")),
            304
        );
        assert_eq!(
            unchanged(&format!("\r\nrange: bytes=0-1\r\nif-range: {tag}")),
            206
        );
        assert_eq!(
            unchanged("\r\nrange: bytes=0-1\r\nif-range: \"other\""),
            200
        );
        assert_eq!(
            get("path=/mnt/work/f", "\r\naccept-encoding: identity;q=0, br").status,
            406
        );
        let head = call("HEAD /files?path=/mnt/work/f HTTP/1.1", b"");
        assert_eq!(
            (head.status, head.header("content-length"), head.body.len()),
            (200, Some("10"), 0)
        );
    });
}

#[test]
fn links_are_signed_for_one_path_one_user_one_direction_and_a_time() {
    run(async |world| {
        world.write("/mnt/work/f", "secret");
        assert_eq!(init(world, r#"{"accessToken":"tok"}"#, ""), 204);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970");
        let at = |time: Duration| i64::try_from(time.as_secs()).expect("soon");
        let link = |operation: &str, user: &str, expires: Option<i64>, token: &str| {
            let grant = Grant {
                path: "/mnt/work/f",
                operation,
                user,
                expires,
            };
            let signature = grant.sign(token).replace('+', "%2B").replace('/', "%2F");
            let mut query = format!("path=%2Fmnt%2Fwork%2Ff&signature={signature}");
            if !user.is_empty() {
                query.push_str(&format!("&username={user}"));
            }
            if let Some(expires) = expires {
                query.push_str(&format!("&signature_expiration={expires}"));
            }
            query
        };
        let told = |answer: Answer| {
            (
                answer.status,
                answer.json()["message"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            )
        };
        let refused = |text: &str| (401, text.to_owned());
        let good = link("read", "", None, "tok");
        assert_eq!(get(&good, "").text(), "secret");
        assert_eq!(
            get(&link("read", "user", Some(at(now) + 100), "tok"), "").text(),
            "secret"
        );
        assert_eq!(
            told(get("path=/mnt/work/f", "")),
            refused("missing signature query parameter")
        );
        assert_eq!(
            told(get(&link("read", "", None, "other"), "")),
            refused("invalid signature")
        );
        assert_eq!(
            told(get(&good.replace("work%2Ff", "work%2Fg"), "")),
            refused("invalid signature")
        );
        assert_eq!(
            told(get(&format!("{good}&username=user"), "")),
            refused("invalid signature")
        );
        assert_eq!(told(put(&good, "", b"x")), refused("invalid signature"));
        let old = link("read", "", Some(at(now) - 10), "tok");
        assert_eq!(told(get(&old, "")), refused("signature is already expired"));
        let stretched = old.replace(&(at(now) - 10).to_string(), &(at(now) + 1000).to_string());
        assert_eq!(told(get(&stretched, "")), refused("invalid signature"));
        assert_eq!(put(&link("write", "", None, "tok"), "", b"new").status, 200);
        // The token is checked before the signature. A valid token needs no signature.
        assert_eq!(get(&good, "\r\nx-access-token: wrong").status, 401);
        assert_eq!(
            get("path=/mnt/work/f", "\r\nx-access-token: tok").text(),
            "new"
        );
    });
}

#[test]
fn the_words_of_an_upload_are_kept_with_the_file() {
    run(async |world| {
        let headers = "\r\nX-Metadata-Colour: light green\r\nx-metadata-n: 1";
        let answer = put("path=/mnt/work/f", headers, b"x");
        assert_eq!(
            answer.json()[0]["metadata"],
            serde_json::json!({"colour": "light green", "n": "1"})
        );
        let stat = |path: &str| {
            let head =
                "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/json";
            call(head, format!(r#"{{"path":"{path}"}}"#).as_bytes()).json()["entry"]["metadata"]
                .clone()
        };
        assert_eq!(
            stat("/mnt/work/f"),
            serde_json::json!({"colour": "light green", "n": "1"})
        );
        assert_eq!(put("path=/mnt/work/f", "", b"y").status, 200);
        assert_eq!(
            stat("/mnt/work/f"),
            serde_json::Value::Null,
            "each upload replaces all"
        );
        let long = format!("\r\nx-metadata-k: {}", "v".repeat(4096));
        assert_eq!(put("path=/mnt/work/g", &long, b"x").status, 400);
        assert_eq!(
            put("path=/mnt/work/g", "\r\nx-metadata-k: \u{e9}", b"x").status,
            400
        );
        assert!(!world.path("/mnt/work/g").exists());
    });
}

#[test]
fn a_browser_may_send_what_it_asks_for() {
    run(async |_| {
        // By the standard, a wildcard does not cover `authorization`.
        let wanted = ["authorization", "x-access-token", "content-type"];
        let preflight = format!(
            "OPTIONS /files HTTP/1.1\r\norigin: http://a.example\r\naccess-control-request-method: POST\r\naccess-control-request-headers: {}",
            wanted.join(",")
        );
        let answer = call(&preflight, b"");
        let allowed = answer.header("access-control-allow-headers");
        let allowed = allowed.unwrap_or_default().to_ascii_lowercase();
        for name in wanted {
            assert!(
                allowed.split(',').any(|one| one.trim() == name),
                "{answer:?}"
            );
        }
    });
}
