//! Metadata service: identity of the VM, and the tokens that it accepts.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha512};

use crate::{
    calls::clients,
    raw::{Answer, call},
    world::{World, eventually, run, run_with},
};

const PORT: u16 = 8170;
const ARGUMENTS: [&str; 2] = ["--metadata", "127.0.0.1:8170"];
const TOKEN: &str = "metadata-token";

/// Behaviour of the service.
#[derive(Debug, Clone)]
enum Manner {
    /// Serves this data as the protocol specifies.
    Tells(String),
    /// Accepts connections and sends nothing.
    Silent,
    /// Sends an endless response.
    Endless,
}

/// Metadata service that speaks version 2 of the protocol only.
struct Service {
    manner: Arc<Mutex<Manner>>,
    questions: Arc<AtomicUsize>,
    /// Times at which the service was about to send its data.
    told: Arc<Mutex<Vec<Instant>>>,
}

impl Service {
    fn open(manner: Manner) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).expect("free");
        let manner = Arc::new(Mutex::new(manner));
        let questions = Arc::new(AtomicUsize::new(0));
        let told = Arc::new(Mutex::new(Vec::new()));
        let (current, count, times) = (manner.clone(), questions.clone(), Arc::clone(&told));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let manner = current.lock().clone();
                count.fetch_add(1, Ordering::SeqCst);
                let times = Arc::clone(&times);
                std::thread::spawn(move || answer(stream, &manner, &times));
            }
        });
        Self {
            manner,
            questions,
            told,
        }
    }

    fn tells(data: &str) -> Self {
        Self::open(Manner::Tells(data.to_owned()))
    }

    fn change(&self, manner: Manner) {
        *self.manner.lock() = manner;
    }

    fn questions(&self) -> usize {
        self.questions.load(Ordering::SeqCst)
    }

    /// Returns the times after `begin` at which the service sent its data.
    fn told_since(&self, begin: Instant) -> Vec<Instant> {
        let told = self.told.lock();
        told.iter().copied().filter(|at| *at > begin).collect()
    }

    /// Returns once all connections made before this call are counted.
    fn counts_all(&self) {
        let mut mark = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).expect("open");
        mark.write_all(b"GET /mark HTTP/1.1\r\n\r\n").expect("sent");
        let mut answer = String::new();
        mark.read_to_string(&mut answer).expect("answered");
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}

fn answer(mut stream: TcpStream, manner: &Manner, told: &Mutex<Vec<Instant>>) {
    let mut head = Vec::new();
    for line in BufReader::new(stream.try_clone().expect("cloned")).lines() {
        match line {
            Ok(line) if !line.is_empty() => head.push(line.to_ascii_lowercase()),
            _ => break,
        }
    }
    let has = |header: &str| head.iter().any(|line| line == header);
    let say = |mut stream: TcpStream, status: &str, body: &str| {
        let length = body.len();
        // The agent may have closed the connection.
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}"
        );
    };
    let request = head.first().map_or("", String::as_str);
    match manner {
        Manner::Silent => std::thread::park(),
        Manner::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while stream.write_all(&[b' '; 65536]).is_ok() {}
        }
        Manner::Tells(_) if request == "put /latest/api/token http/1.1" => {
            assert!(has("x-metadata-token-ttl-seconds: 60"), "{head:?}");
            say(stream, "200 OK", TOKEN);
        }
        Manner::Tells(data) if request == "get / http/1.1" => {
            assert!(has("accept: application/json"), "{head:?}");
            if has(&format!("x-metadata-token: {TOKEN}")) {
                told.lock().push(Instant::now());
                say(stream, "200 OK", data);
            } else {
                say(stream, "401 Unauthorized", "");
            }
        }
        Manner::Tells(_) => say(stream, "404 Not Found", ""),
    }
}

fn hash(token: &str) -> String {
    let digest = Sha512::digest(token);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn init(body: &str) -> Answer {
    call(
        "POST /init HTTP/1.1\r\ncontent-type: application/json",
        body.as_bytes(),
    )
}

fn recover(body: &str) -> u16 {
    let head = "POST /snapshot/recover HTTP/1.1\r\ncontent-type: application/json";
    call(head, body.as_bytes()).status
}

fn envs(token: &str) -> Answer {
    call(
        &format!("GET /envs HTTP/1.1\r\nx-access-token: {token}"),
        b"",
    )
}

/// Returns the sandbox and template recorded in the VM's files, if they exist.
fn files(world: &World, prefix: &str) -> Option<(String, String)> {
    let dir = format!("/run/{}", prefix.to_ascii_lowercase());
    let read =
        |name: &str| std::fs::read_to_string(world.path(&format!("{dir}/.{prefix}_{name}"))).ok();
    assert!(read("SANDBOX").is_none_or(|word| word == "true"));
    Some((read("SANDBOX_ID")?, read("TEMPLATE_ID").unwrap_or_default()))
}

async fn is(world: &World, sandbox: &str, template: &str) {
    let wanted = Some((sandbox.to_owned(), template.to_owned()));
    for prefix in ["WRENN", "E2B"] {
        eventually(sandbox, async || files(world, prefix) == wanted).await;
    }
    let text = "echo $WRENN_SANDBOX $WRENN_SANDBOX_ID $WRENN_TEMPLATE_ID $E2B_SANDBOX $E2B_SANDBOX_ID $E2B_TEMPLATE_ID";
    let all = format!("true {sandbox} {template} true {sandbox} {template}\n");
    eventually(&all, async || clients(world).sh(text).await == all).await;
}

#[test]
fn a_machine_learns_who_it_is_at_its_start_and_after_each_restore() {
    run_with(&ARGUMENTS, &[], async |world| {
        // The service starts after the agent.
        let service = Service::tells(r#"{"instanceID":"sb-1","envID":"base","address":""}"#);
        is(world, "sb-1", "base").await;
        let tells = |sandbox: &str| {
            Manner::Tells(format!(
                r#"{{"instanceID":"{sandbox}","envID":"base","more":{{}}}}"#
            ))
        };
        for sandbox in ["sb-2", "sb-3"] {
            service.change(tells(sandbox));
            assert_eq!(recover(r#"{"sandboxId":"sb-x","templateId":"t"}"#), 204);
            is(world, sandbox, "base").await;
        }
        service.change(tells("sb-4"));
        assert_eq!(init("{}").status, 204);
        is(world, "sb-4", "base").await;
        // A VM that keeps its identity sends no query.
        let before = service.questions();
        assert_eq!(recover("{}"), 204);
        assert_eq!(envs("").status, 200);
        assert_eq!(service.questions(), before);
    });
}

#[test]
fn generation_id_changes_with_each_restore_and_with_nothing_else() {
    run(async |world| {
        let id = || world.read("/run/wrenn/generation-id");
        assert_eq!(recover(r#"{"sandboxId":"sb-1"}"#), 204);
        let first = id();
        // A VM that keeps running after a snapshot is not a copy.
        assert_eq!(recover("{}"), 204);
        assert_eq!(id(), first);
        assert_eq!(recover(r#"{"sandboxId":"sb-1"}"#), 204);
        assert_ne!(id(), first);
    });
}

#[test]
fn what_the_host_says_holds_at_once_without_any_service() {
    run(async |world| {
        for (sandbox, template) in [("sb-1", "base"), ("sb-2", "mine")] {
            let body = format!(
                r#"{{"sandboxId":"{sandbox}","templateId":"{template}","envVars":{{"A":"{sandbox}"}}}}"#
            );
            assert_eq!(recover(&body), 204);
            let wanted = Some((sandbox.to_owned(), template.to_owned()));
            assert_eq!(
                (files(world, "WRENN"), files(world, "E2B")),
                (wanted.clone(), wanted)
            );
            let all = envs("").json();
            assert_eq!(
                (&all["A"], &all["E2B_SANDBOX_ID"], &all["WRENN_TEMPLATE_ID"]),
                (&sandbox.into(), &sandbox.into(), &template.into())
            );
        }
    });
}

#[test]
fn a_field_that_is_missing_costs_no_other() {
    run_with(&ARGUMENTS, &[], async |world| {
        let service = Service::tells(r#"{"instanceID":"sb-1","envID":null}"#);
        eventually("the id", async || {
            files(world, "E2B") == Some(("sb-1".into(), String::new()))
        })
        .await;
        // An ID with invalid characters is not stored.
        service.change(Manner::Tells(r#"{"instanceID":"a\nb"}"#.into()));
        assert_eq!(init("{}").status, 204);
        let before = service.questions();
        eventually("the service is queried again", async || {
            service.questions() > before + 4
        })
        .await;
        assert_eq!(files(world, "E2B"), Some(("sb-1".into(), String::new())));
    });
}

#[test]
fn a_token_is_set_anew_by_who_brings_the_one_of_the_hash() {
    run_with(&ARGUMENTS, &[], async |world| {
        assert_eq!(
            init(r#"{"accessToken":"one"}"#).status,
            204,
            "no hash is known yet"
        );
        let tells = |token: &str| {
            let hash = hash(token);
            Manner::Tells(format!(
                r#"{{"instanceID":"sb-1","envID":"b","accessTokenHash":"{hash}"}}"#
            ))
        };
        let service = Service::open(tells("two"));
        is_not(
            &init(r#"{"accessToken":"three"}"#),
            "access token validation failed",
        );
        is_not(&init("{}"), "access token reset not authorized");
        assert_eq!(envs("one").status, 200);
        assert_eq!(init(r#"{"accessToken":"two"}"#).status, 204);
        assert_eq!((envs("one").status, envs("two").status), (401, 200));
        // The hash of the empty string: no token is required.
        service.change(tells(""));
        is_not(
            &init(r#"{"accessToken":"three"}"#),
            "access token validation failed",
        );
        assert_eq!(init("{}").status, 204);
        assert_eq!(envs("").status, 200);
        // Once this hash is known, no token may be set.
        let _ = world;
        eventually("the hash is known", async || {
            init(r#"{"accessToken":"three"}"#).status == 401
        })
        .await;
        assert_eq!(envs("").status, 200);
    });
}

fn is_not(answer: &Answer, message: &str) {
    assert_eq!(answer.status, 401);
    assert_eq!(answer.json()["message"], message);
}

#[test]
fn a_service_that_is_silent_or_does_not_stop_holds_nothing_up() {
    run_with(&ARGUMENTS, &[], async |world| {
        let service = Service::open(Manner::Silent);
        eventually("the service is queried", async || service.questions() > 0).await;
        // The service would delay every call by a second. On a busy machine some calls are slow
        // anyway, so one quick call is enough.
        let is_quick = || {
            let begin = Instant::now();
            assert_eq!(init("{}").status, 204);
            begin.elapsed() < Duration::from_millis(500)
        };
        assert!((0..10).any(|_| is_quick()));
        let begin = Instant::now();
        assert_eq!(init(r#"{"accessToken":"one"}"#).status, 204);
        is_not(
            &init(r#"{"accessToken":"two"}"#),
            "access token validation failed",
        );
        assert!(begin.elapsed() < Duration::from_secs(20));
        service.change(Manner::Endless);
        world.reset_peak();
        let before = world.agent_status("VmRSS");
        is_not(
            &init(r#"{"accessToken":"two"}"#),
            "access token validation failed",
        );
        assert!(world.agent_status("VmHWM") < before + 2048);
        assert_eq!(envs("one").status, 200);
    });
}

#[test]
fn nobody_asks_in_a_hurry_or_while_a_machine_is_being_frozen() {
    run_with(&ARGUMENTS, &[], async |_| {
        let service = Service::tells("{}");
        assert_eq!(init("{}").status, 204);
        let begin = Instant::now();
        eventually("the service is queried a few times", async || {
            service.told_since(begin).len() >= 5
        })
        .await;
        // Intervals double. The first response may belong to a query sent before.
        let told = service.told_since(begin);
        for (pair, doublings) in told[1..].windows(2).zip(0_u32..) {
            let least = Duration::from_millis(50_u64 << doublings);
            assert!(pair[1] - pair[0] >= least, "{told:?}");
        }
        let head = "POST /snapshot/prepare HTTP/1.1\r\ncontent-type: application/json";
        let body = br#"{"snapshotId":"s","keepCache":true}"#;
        assert_eq!(call(head, body).status, 204);
        service.counts_all();
        let before = service.questions();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(service.questions(), before);
    });
}
