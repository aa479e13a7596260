use std::time::Duration;

use super::{ready::MAX_READY, *};

const CREATE: EventType = EventType::EVENT_TYPE_CREATE;
const WRITE: EventType = EventType::EVENT_TYPE_WRITE;

async fn seen(watch: &Watch) -> Vec<(String, EventType)> {
    let events = watch.take().await.expect("readable");
    let change = |e: FilesystemEvent| Some((e.name, e.r#type.as_known()?));
    events.into_iter().filter_map(change).collect()
}

#[tokio::test]
async fn events_are_there_as_soon_as_the_change_is_made() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let watch = Watch::open(dir.path(), WatchOptions::default()).expect("watched");
    fs::write(dir.path().join("f"), "x").expect("written");
    let created = ("f".to_owned(), CREATE);
    let written = ("f".to_owned(), WRITE);
    assert_eq!(seen(&watch).await, [created, written]);
    fs::rename(dir.path().join("f"), dir.path().join("g")).expect("renamed");
    let from = ("f".to_owned(), EventType::EVENT_TYPE_RENAME);
    let to = ("g".to_owned(), CREATE);
    assert_eq!(seen(&watch).await, [from, to]);
    fs::remove_file(dir.path().join("g")).expect("removed");
    let removed = ("g".to_owned(), EventType::EVENT_TYPE_REMOVE);
    assert_eq!(seen(&watch).await, [removed]);
}

#[tokio::test]
async fn what_is_made_in_a_new_directory_at_once_is_seen() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let options = WatchOptions {
        recursive: true,
        include_entry: true,
        ..Default::default()
    };
    let watch = Watch::open(dir.path(), options).expect("watched");
    fs::create_dir_all(dir.path().join("a/b")).expect("made");
    fs::write(dir.path().join("a/b/f"), "x").expect("written");
    let first = seen(&watch).await;
    let created = ["a", "a/b", "a/b/f"].map(|name| (name, CREATE));
    for (name, kind) in created.into_iter().chain([("a/b/f", WRITE)]) {
        assert!(
            first.contains(&(name.to_owned(), kind)),
            "{name} {kind:?} in {first:?}"
        );
    }
    fs::write(dir.path().join("a/b/f"), "xy").expect("written");
    let later = seen(&watch).await;
    assert!(later.contains(&("a/b/f".to_owned(), WRITE)), "{later:?}");
}

#[tokio::test]
async fn only_directories_are_watched() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let watch = Watch::open(file.path(), WatchOptions::default());
    assert!(matches!(watch, Err(FileError::NotADirectory(_))));
}

#[tokio::test]
async fn more_is_kept_than_the_kernel_does_but_not_without_end() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let watch = Watch::open(dir.path(), WatchOptions::default()).expect("watched");
    let change = async |rounds: usize| {
        for round in 0..rounds {
            fs::write(dir.path().join("f"), "").expect("written");
            fs::remove_file(dir.path().join("f")).expect("removed");
            if round % 1000 == 0 {
                // The kernel's queue must not overflow, however busy the task that follows it is.
                let (done, looked) = oneshot::channel();
                watch.asks.send(done).await.expect("it goes on");
                looked.await.expect("it looks");
            }
        }
    };
    // More changes than the kernel keeps by default.
    change(10_000).await;
    assert_eq!(seen(&watch).await.len(), 20_000);
    change(MAX_READY / 2 + 1).await;
    let lost = watch.take().await;
    assert!(matches!(lost, Err(FileError::EventsLost)), "{lost:?}");
    fs::write(dir.path().join("after"), "").expect("written");
    assert_eq!(seen(&watch).await, [("after".to_owned(), CREATE)]);
}

#[tokio::test]
async fn an_event_survives_a_next_that_is_given_up() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let options = WatchOptions {
        include_entry: true,
        ..Default::default()
    };
    let mut watch = Watch::open(dir.path(), options).expect("watched");
    for number in 0..200 {
        fs::write(dir.path().join(number.to_string()), "").expect("written");
        let event = loop {
            // Cancelled at an arbitrary point.
            let next = tokio::time::timeout(Duration::from_micros(50), watch.next());
            if let Ok(event) = next.await {
                break event;
            }
        };
        let event = event.expect("goes on").expect("nothing is lost");
        assert_eq!(event.name, number.to_string());
    }
}

#[tokio::test]
async fn entries_have_the_path_that_was_asked_for() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    fs::create_dir(&real).expect("made");
    std::os::unix::fs::symlink(&real, &link).expect("linked");
    let options = WatchOptions {
        include_entry: true,
        ..Default::default()
    };
    let watch = Watch::open(&link, options).expect("watched");
    fs::write(real.join("f"), "x").expect("written");
    let events = watch.take().await.expect("readable");
    let entry = events[0].entry.as_option().expect("included");
    assert_eq!(Path::new(&entry.path), link.join("f"));
    assert_eq!(entry.size, 1);
}

#[tokio::test]
async fn the_end_of_a_directory_ends_its_watch() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let top = dir.path().join("top");
    let open = || Watch::open(&top, WatchOptions::default()).expect("watched");
    fs::create_dir(&top).expect("made");
    fs::write(top.join("f"), "").expect("written");
    let (mut followed, asked) = (open(), open());
    fs::remove_dir_all(&top).expect("removed");
    let removed = ("f".to_owned(), EventType::EVENT_TYPE_REMOVE);
    assert_eq!(seen(&asked).await, [removed]);
    let end = asked.take().await;
    assert!(matches!(end, Err(FileError::WatchEnded(_))), "{end:?}");
    let last = followed.next().await.expect("an event").expect("told");
    assert_eq!(last.r#type, EventType::EVENT_TYPE_REMOVE);
    assert!(followed.next().await.is_none());
}
