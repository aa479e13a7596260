//! Directory watches, streamed and polled.

use connectrpc::ErrorCode;
use wrenn_proto::rpc::filesystem::{
    __buffa::oneof::watch_dir_response::Event, CreateWatcherRequest, EventType, FilesystemEvent,
    GetWatcherEventsRequest, RemoveWatcherRequest, WatchDirRequest,
};

use crate::{
    calls::{CODECS, Clients, clients, clients_by},
    raw::call,
    world::{eventually, run},
};

const CREATE: EventType = EventType::EVENT_TYPE_CREATE;
const WRITE: EventType = EventType::EVENT_TYPE_WRITE;
const REMOVE: EventType = EventType::EVENT_TYPE_REMOVE;
const RENAME: EventType = EventType::EVENT_TYPE_RENAME;
const CHMOD: EventType = EventType::EVENT_TYPE_CHMOD;

impl Clients {
    async fn watcher(
        &self,
        path: &str,
        recursive: bool,
    ) -> Result<String, connectrpc::ConnectError> {
        let request = CreateWatcherRequest {
            path: path.into(),
            recursive,
            include_entry: true,
            ..Default::default()
        };
        Ok(self
            .files
            .create_watcher(request)
            .await?
            .into_owned()
            .watcher_id)
    }

    async fn events(&self, id: &str) -> Vec<FilesystemEvent> {
        let request = GetWatcherEventsRequest {
            watcher_id: id.into(),
            ..Default::default()
        };
        self.files
            .get_watcher_events(request)
            .await
            .expect("known")
            .into_owned()
            .events
    }

    async fn changes(&self, id: &str) -> Vec<(String, EventType)> {
        let events = self.events(id).await;
        events
            .into_iter()
            .map(|e| (e.name, e.r#type.as_known().expect("known")))
            .collect()
    }
}

fn named(list: &[(&str, EventType)]) -> Vec<(String, EventType)> {
    list.iter()
        .map(|(name, kind)| ((*name).to_owned(), *kind))
        .collect()
}

#[test]
fn changes_can_be_asked_for_as_soon_as_they_are_made() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            clients.sh("rm -rf /mnt/work/*; mkdir /mnt/work/dir").await;
            let id = clients.watcher("/mnt/work", false).await.expect("watched");
            assert!(id.starts_with('w'), "{id}");
            // An upload produces three events, in this order.
            assert_eq!(
                call(
                    "POST /files?path=/mnt/work/f&username=user HTTP/1.1",
                    b"content"
                )
                .status,
                200
            );
            let events = clients.events(&id).await;
            let kinds: Vec<_> = events
                .iter()
                .map(|e| e.r#type.as_known().expect("known"))
                .collect();
            assert_eq!(kinds, [CREATE, CHMOD, WRITE], "{events:?}");
            let entry = events[2].entry.as_option().expect("included");
            assert_eq!((entry.path.as_str(), entry.size), ("/mnt/work/f", 7));
            clients.sh("mv /mnt/work/f /mnt/work/g").await;
            assert_eq!(
                clients.changes(&id).await,
                named(&[("f", RENAME), ("g", CREATE)])
            );
            clients
                .sh("chmod 600 /mnt/work/g; rm /mnt/work/g; echo below > /mnt/work/dir/f")
                .await;
            assert_eq!(
                clients.changes(&id).await,
                named(&[("g", CHMOD), ("g", REMOVE)])
            );
            assert_eq!(clients.changes(&id).await, []);
            let request = || RemoveWatcherRequest {
                watcher_id: id.clone(),
                ..Default::default()
            };
            clients
                .files
                .remove_watcher(request())
                .await
                .expect("removed");
            assert_eq!(
                clients
                    .files
                    .remove_watcher(request())
                    .await
                    .expect_err("gone")
                    .code,
                ErrorCode::NotFound
            );
            let request = GetWatcherEventsRequest {
                watcher_id: id,
                ..Default::default()
            };
            assert_eq!(
                clients
                    .files
                    .get_watcher_events(request)
                    .await
                    .expect_err("gone")
                    .code,
                ErrorCode::NotFound
            );
        }
    });
}

#[test]
fn nothing_below_a_recursive_watch_is_missed() {
    run(async |world| {
        let clients = clients(world);
        clients
            .sh("mkdir -p /mnt/work/old/deep /mnt/away/in; touch /mnt/away/in/f")
            .await;
        let id = clients.watcher("/mnt/work", true).await.expect("watched");
        clients
            .sh("cd /mnt/work; echo x > old/deep/f; mkdir -p a/b/c; echo x > a/b/c/f")
            .await;
        let seen = clients.changes(&id).await;
        for wanted in named(&[
            ("old/deep/f", CREATE),
            ("old/deep/f", WRITE),
            ("a", CREATE),
            ("a/b", CREATE),
            ("a/b/c", CREATE),
            ("a/b/c/f", CREATE),
            ("a/b/c/f", WRITE),
        ]) {
            assert_eq!(
                seen.iter().filter(|event| **event == wanted).count(),
                1,
                "{wanted:?} in {seen:?}"
            );
        }
        // A directory that was moved in from elsewhere, and a renamed directory, are watched under
        // their new names.
        clients
            .sh("mv /mnt/away/in /mnt/work/came; mv /mnt/work/a /mnt/work/moved")
            .await;
        let seen = clients.changes(&id).await;
        for wanted in named(&[
            ("came", CREATE),
            ("came/f", CREATE),
            ("a", RENAME),
            ("moved", CREATE),
        ]) {
            assert!(seen.contains(&wanted), "{wanted:?} in {seen:?}");
        }
        clients
            .sh("echo y > /mnt/work/moved/b/c/f; echo y > /mnt/work/came/f")
            .await;
        let seen = clients.changes(&id).await;
        assert!(
            seen.contains(&("moved/b/c/f".into(), WRITE))
                && seen.contains(&("came/f".into(), WRITE)),
            "{seen:?}"
        );
        // A directory that was moved away is no longer watched.
        clients
            .sh("mv /mnt/work/came /mnt/away/out; echo z > /mnt/away/out/f")
            .await;
        assert_eq!(clients.changes(&id).await, named(&[("came", RENAME)]));
        clients.sh("rm -r /mnt/work/moved").await;
        let seen = clients.changes(&id).await;
        assert_eq!(seen.last(), Some(&("moved".to_owned(), REMOVE)), "{seen:?}");
        let removed = ["moved/b/c/f", "moved/b/c", "moved/b", "moved"];
        assert_eq!(
            seen.iter()
                .filter(|(_, kind)| *kind == REMOVE)
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>(),
            removed
        );
    });
}

#[test]
fn a_stream_tells_what_happens_and_ends_with_its_client() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            clients.sh("rm -rf /mnt/work/*").await;
            let before = world.descriptors();
            let request = WatchDirRequest {
                path: "/mnt/work".into(),
                recursive: true,
                ..Default::default()
            };
            let mut stream = clients.files.watch_dir(request).await.expect("watched");
            let mut next = async || {
                let message = stream.message().await.expect("goes on").expect("goes on");
                message.to_owned_message().event.expect("an event")
            };
            assert!(matches!(next().await, Event::Start(_)));
            clients.sh("mkdir /mnt/work/d; touch /mnt/work/d/f").await;
            let mut seen = Vec::new();
            while !seen.contains(&("d/f".to_owned(), CREATE)) {
                let Event::Filesystem(event) = next().await else {
                    continue;
                };
                assert!(!event.entry.is_set(), "the entry was not requested");
                seen.push((event.name.clone(), event.r#type.as_known().expect("known")));
            }
            assert_eq!(seen[0], ("d".to_owned(), CREATE));
            drop(stream);
            eventually("the watch ends", async || world.descriptors() <= before + 1).await;
        }
    });
}

#[test]
fn what_cannot_be_watched_is_refused() {
    run(async |world| {
        let clients = clients(world);
        world.write("/mnt/work/f", "");
        clients
            .sh("ln -s /mnt/work /mnt/link; ln -s loop /mnt/loop")
            .await;
        let code = async |path: &str| {
            clients
                .watcher(path, false)
                .await
                .expect_err("refused")
                .code
        };
        assert_eq!(code("/no/such").await, ErrorCode::NotFound);
        assert_eq!(code("/mnt/work/f").await, ErrorCode::InvalidArgument);
        assert_eq!(code("/mnt/loop").await, ErrorCode::FailedPrecondition);
        assert_eq!(code("~root").await, ErrorCode::InvalidArgument);
        let request = WatchDirRequest {
            path: "/no/such".into(),
            ..Default::default()
        };
        let error = match clients.files.watch_dir(request).await {
            Err(error) => error,
            Ok(mut stream) => stream.message().await.expect_err("refused"),
        };
        assert_eq!(error.code, ErrorCode::NotFound);
        let id = clients
            .watcher("/mnt/link", false)
            .await
            .expect("through a link");
        clients.sh("touch /mnt/work/new").await;
        assert_eq!(clients.changes(&id).await[0], ("new".to_owned(), CREATE));
    });
}

#[test]
fn more_changes_than_are_kept_do_not_go_unnoticed() {
    run(async |world| {
        let clients = clients(world);
        clients.sh("mkdir /mnt/work/d").await;
        let id = clients.watcher("/mnt/work", true).await.expect("watched");
        // More events than the agent keeps, and more than /proc/sys/fs/inotify/max_queued_events.
        clients.sh("cd /mnt/work/d; n=$(cat /proc/sys/fs/inotify/max_queued_events); seq -f 'f%.0f' $((n + 70000)) | xargs touch").await;
        let request = GetWatcherEventsRequest {
            watcher_id: id.clone(),
            ..Default::default()
        };
        let error = clients
            .files
            .get_watcher_events(request)
            .await
            .expect_err("some were lost");
        assert_eq!(error.code, ErrorCode::DataLoss, "{error}");
        clients.sh("touch /mnt/work/after").await;
        assert_eq!(
            clients.changes(&id).await[0],
            ("after".to_owned(), CREATE),
            "it goes on"
        );
    });
}

#[test]
fn a_new_directory_is_followed_before_anybody_asks() {
    run(async |world| {
        use std::os::unix::fs::MetadataExt as _;
        let clients = clients(world);
        let id = clients.watcher("/mnt/work", true).await.expect("watched");
        clients.sh("mkdir /mnt/work/n").await;
        let made = std::fs::metadata(world.path("/mnt/work/n")).expect("made");
        let watched = format!(" ino:{:x} ", made.ino());
        eventually("the directory is watched", async || {
            let all = std::fs::read_dir(format!("/proc/{}/fdinfo", world.agent));
            let texts = all
                .expect("it runs")
                .flatten()
                .map(|file| std::fs::read_to_string(file.path()).unwrap_or_default());
            let mut lines =
                texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
            lines.any(|line| line.starts_with("inotify ") && line.contains(&watched))
        })
        .await;
        clients.sh("echo x > /mnt/work/n/f; rm /mnt/work/n/f").await;
        assert_eq!(
            clients.changes(&id).await,
            named(&[
                ("n", CREATE),
                ("n/f", CREATE),
                ("n/f", WRITE),
                ("n/f", REMOVE)
            ])
        );
    });
}

#[test]
fn others_are_served_while_entries_are_described() {
    run(async |world| {
        let clients = clients(world);
        clients
            .sh("mkdir /mnt/away; echo x > /mnt/away/f; echo x > /mnt/away/g")
            .await;
        let id = clients.watcher("/mnt/work", true).await.expect("watched");
        clients.sh("mv /mnt/away /mnt/work/d").await;
        // Owner names are read from /etc/passwd. It is replaced by a pipe, so a lookup blocks until
        // the pipe is written to.
        let users = world.read("/etc/passwd");
        std::fs::remove_file(world.path("/etc/passwd")).expect("there");
        nix::unistd::mkfifo(&world.path("/etc/passwd"), nix::sys::stat::Mode::S_IRWXU)
            .expect("made");
        let path = world.path("/etc/passwd");
        let served = async {
            // This open succeeds once the agent looks up the names, which is part of the call's
            // work.
            let file = tokio::task::spawn_blocking(move || {
                std::fs::OpenOptions::new().write(true).open(path)
            });
            let mut file = file.await.expect("no panic").expect("opened");
            let health = reqwest::Client::new()
                .get(world.url("/health"))
                .timeout(std::time::Duration::from_secs(20))
                .send()
                .await;
            assert_eq!(health.expect("answered").status(), 204);
            std::io::Write::write_all(&mut file, users.as_bytes()).expect("fed");
        };
        // One write is enough for all events.
        let (events, ()) = tokio::join!(clients.events(&id), served);
        let owners = events
            .iter()
            .filter_map(|e| Some(&e.entry.as_option()?.owner));
        assert!(owners.clone().count() >= 3, "{events:?}");
        assert!(owners.clone().all(|owner| owner == "root"), "{events:?}");
    });
}

#[test]
fn a_stream_ends_with_its_directory() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            for end in ["rm -r /mnt/work/d", "mv /mnt/work/d /mnt/work/e"] {
                clients.sh("rm -rf /mnt/work/*; mkdir /mnt/work/d").await;
                let request = WatchDirRequest {
                    path: "/mnt/work/d".into(),
                    ..Default::default()
                };
                let mut stream = clients.files.watch_dir(request).await.expect("watched");
                assert!(stream.message().await.expect("goes on").is_some());
                let id = clients
                    .watcher("/mnt/work/d", false)
                    .await
                    .expect("watched");
                clients.sh(&format!("touch /mnt/work/d/f; {end}")).await;
                let mut seen = Vec::new();
                while let Some(message) = stream.message().await.expect("no error") {
                    seen.push(message.to_owned_message().event);
                }
                assert!(
                    matches!(&seen[0], Some(Event::Filesystem(event)) if event.name == "f"),
                    "{seen:?}"
                );
                // A poll returns the remaining events, and then an error, because the directory is
                // gone.
                assert_eq!(clients.changes(&id).await[0], ("f".to_owned(), CREATE));
                let request = GetWatcherEventsRequest {
                    watcher_id: id,
                    ..Default::default()
                };
                let error = clients.files.get_watcher_events(request).await;
                let error = error.expect_err("it is gone");
                assert_eq!(error.code, ErrorCode::NotFound);
                assert!(error.to_string().contains("/mnt/work/d"), "{error}");
            }
        }
    });
}

#[test]
fn an_upload_over_a_file_gives_it_away_before_it_writes() {
    run(async |world| {
        let clients = clients(world);
        world.write("/mnt/work/f", "old content");
        let id = clients.watcher("/mnt/work", false).await.expect("watched");
        let head = "POST /files?path=/mnt/work/f&username=user HTTP/1.1";
        assert_eq!(call(head, b"new").status, 200);
        // The file is truncated and written, which may be reported as one event.
        let mut seen = clients.changes(&id).await;
        seen.dedup();
        assert_eq!(seen, named(&[("f", CHMOD), ("f", WRITE)]));
        assert_eq!(world.read("/mnt/work/f"), "new");
        assert_eq!(call(head, b"").status, 200);
        assert_eq!(world.read("/mnt/work/f"), "");
    });
}
