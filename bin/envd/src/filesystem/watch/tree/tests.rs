use std::process::Command;

use super::*;

const CREATE: EventType = EventType::EVENT_TYPE_CREATE;
const WRITE: EventType = EventType::EVENT_TYPE_WRITE;
const RENAME: EventType = EventType::EVENT_TYPE_RENAME;

/// A watched directory and a directory beside it.
struct Scene {
    _dir: tempfile::TempDir,
    top: PathBuf,
    tree: Tree,
}

impl Scene {
    /// Creates the scene. A script runs before the watch begins.
    fn after(script: &str) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let top = dir.path().canonicalize().expect("there");
        fs::create_dir_all(top.join("w")).expect("made");
        fs::create_dir_all(top.join("away")).expect("made");
        sh(&top, script);
        let options = WatchOptions {
            recursive: true,
            ..Default::default()
        };
        let tree = Tree::open(top.join("w"), options).expect("watched");
        let _dir = dir;
        Self { _dir, top, tree }
    }

    /// Returns the reported changes of a script that runs in the watched directory.
    fn told(&mut self, script: &str) -> Vec<(String, EventType)> {
        sh(&self.top.join("w"), script);
        let look = self.tree.look().expect("readable");
        assert!(!look.lost);
        let change = |(name, kind): Change| (name.display().to_string(), kind);
        look.changes.into_iter().map(change).collect()
    }
}

fn sh(directory: &Path, script: &str) {
    let mut command = Command::new("sh");
    command.current_dir(directory).args(["-euc", script]);
    assert!(command.status().expect("run").success(), "{script}");
}

fn named(list: &[(&str, EventType)]) -> Vec<(String, EventType)> {
    let own = |(name, kind): &(&str, EventType)| ((*name).to_owned(), *kind);
    list.iter().map(own).collect()
}

#[tokio::test]
async fn a_directory_that_was_made_again_is_told_again_with_its_files() {
    let mut scene = Scene::after("");
    let told = scene.told("mkdir d; echo x > d/f; rm -r d; mkdir d; echo x > d/f");
    let last = told
        .iter()
        .rposition(|event| *event == ("d".to_owned(), CREATE));
    let after = &told[last.expect("told")..];
    assert_eq!(
        after,
        named(&[("d", CREATE), ("d/f", CREATE), ("d/f", WRITE)]),
        "{told:?}"
    );
    // The same for a directory that was moved away.
    let told = scene.told("mkdir e; echo x > e/f; mv e ../away/e; mkdir e; echo x > e/f");
    let last = told
        .iter()
        .rposition(|event| *event == ("e".to_owned(), CREATE));
    let after = &told[last.expect("told")..];
    assert_eq!(
        after,
        named(&[("e", CREATE), ("e/f", CREATE), ("e/f", WRITE)]),
        "{told:?}"
    );
    let told = scene.told("echo y >> d/f; echo y >> e/f; echo y >> ../away/e/f");
    assert_eq!(told, named(&[("d/f", WRITE), ("e/f", WRITE)]));
}

#[tokio::test]
async fn a_rename_inside_tells_two_names_and_what_is_below_is_followed() {
    let mut scene = Scene::after("mkdir -p w/a/b w/c; touch w/a/f w/a/b/f");
    let told = scene.told("mv a c/d");
    assert_eq!(told, named(&[("a", RENAME), ("c/d", CREATE)]));
    let told = scene.told("echo x > c/d/f; echo x > c/d/b/f; mkdir c/d/b/new; touch c/d/b/new/f");
    let wanted = [
        ("c/d/f", WRITE),
        ("c/d/b/f", WRITE),
        ("c/d/b/new", CREATE),
        ("c/d/b/new/f", CREATE),
    ];
    assert_eq!(told, named(&wanted));
    // Renamed twice before the look, and a part of it moved away at the end.
    let told = scene.told("mv c/d e; mv e g; echo x > g/f; mv g/b ../away/b; echo x > ../away/b/f");
    let wanted = [
        ("c/d", RENAME),
        ("e", CREATE),
        ("e", RENAME),
        ("g", CREATE),
        ("g/f", WRITE),
        ("g/b", RENAME),
    ];
    assert_eq!(told, named(&wanted));
    assert_eq!(scene.told("echo x > ../away/b/f"), []);
    assert_eq!(
        scene.tree.directories.len(),
        3,
        "{:?}",
        scene.tree.directories
    );
}

#[tokio::test]
async fn directories_that_change_places_are_told_apart() {
    let mut scene = Scene::after("mkdir -p w/a/one w/b/two");
    let at = |name: &str| scene.top.join("w").join(name);
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        at("a"),
        rustix::fs::CWD,
        at("b"),
        rustix::fs::RenameFlags::EXCHANGE,
    )
    .expect("exchanged");
    let wanted = [("a", RENAME), ("b", CREATE), ("b", RENAME), ("a", CREATE)];
    assert_eq!(scene.told(""), named(&wanted));
    let told = scene.told("touch a/two/f b/one/f; touch a/f b/f");
    let created: Vec<_> = told
        .into_iter()
        .filter(|(_, kind)| *kind == CREATE)
        .collect();
    let wanted = ["a/two/f", "b/one/f", "a/f", "b/f"].map(|name| (name, CREATE));
    assert_eq!(created, named(&wanted));
}

#[tokio::test]
async fn what_is_made_and_renamed_before_the_look_is_told_with_what_it_holds() {
    let mut scene = Scene::after("mkdir w/d");
    let told = scene.told("mkdir a; echo x > a/f; mv a b");
    let wanted = [
        ("a", CREATE),
        ("a", RENAME),
        ("b", CREATE),
        ("b/f", CREATE),
        ("b/f", WRITE),
    ];
    assert_eq!(told, named(&wanted));
    // The same below a watched directory.
    let told = scene.told("mkdir d/new; echo x > d/new/f; mv d e");
    let wanted = [
        ("d/new", CREATE),
        ("d", RENAME),
        ("e", CREATE),
        ("e/new/f", CREATE),
        ("e/new/f", WRITE),
    ];
    assert_eq!(told, named(&wanted));
    assert_eq!(
        scene.told("echo x >> e/new/f"),
        named(&[("e/new/f", WRITE)])
    );
}

#[tokio::test]
async fn what_comes_with_a_moved_directory_was_not_written_here() {
    // Written early enough that no clock is too coarse.
    let mut scene = Scene::after("mkdir away/d; echo x > away/d/old; sleep .2");
    let told = scene.told("mkdir made; mv ../away/d made/d; cp made/d/old made/copy");
    let written: Vec<_> = told.iter().filter(|(_, kind)| *kind == WRITE).collect();
    assert_eq!(written, [&("made/copy".to_owned(), WRITE)], "{told:?}");
    let old = ("made/d/old".to_owned(), CREATE);
    assert!(told.contains(&old), "{told:?}");
}

#[tokio::test]
async fn what_is_written_between_a_move_into_the_watch_and_the_look_is_told() {
    let mut scene = Scene::after("mkdir away/d; touch away/d/f");
    let told = scene.told("mv ../away/d d; echo x > d/f");
    let wanted = [("d", CREATE), ("d/f", CREATE), ("d/f", WRITE)];
    assert_eq!(told, named(&wanted));
    // Extracted with an old modification time, but created here.
    let told = scene.told("mkdir t; echo x > t/f; touch -d 2001-01-01 t/f");
    assert!(told.contains(&("t/f".to_owned(), WRITE)), "{told:?}");
}

#[tokio::test]
async fn the_roots_removal_or_move_ends_it() {
    for end in ["rm -r w", "mv w away/w"] {
        let mut scene = Scene::after("touch w/f");
        sh(&scene.top, "echo x > w/f");
        sh(&scene.top, end);
        let look = scene.tree.look().expect("readable");
        assert!(look.ended, "{end}");
        assert_eq!(look.changes[0], ("f".into(), WRITE));
    }
    let mut scene = Scene::after("mkdir w/d");
    sh(&scene.top, "rm -r w/d; mkdir w/e; mv w/e w/g; chmod 700 w");
    assert!(!scene.tree.look().expect("readable").ended);
}

#[tokio::test]
async fn after_an_overflow_all_directories_are_watched_under_their_names() {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("readable");
    let limit: usize = limit.trim().parse().expect("a number");
    let mut scene = Scene::after("mkdir -p w/a w/b w/many");
    for number in 0..=limit {
        fs::write(scene.top.join("w/many").join(number.to_string()), "").expect("written");
    }
    sh(&scene.top.join("w"), "rm -r a; mv b c; mkdir d");
    assert!(scene.tree.look().expect("readable").lost);
    let told = scene.told("echo x > c/f; echo x > d/f");
    let wanted = [
        ("c/f", CREATE),
        ("c/f", WRITE),
        ("d/f", CREATE),
        ("d/f", WRITE),
    ];
    assert_eq!(told, named(&wanted));
    let mut names: Vec<_> = scene.tree.directories.values().collect();
    names.sort();
    assert_eq!(names, ["", "c", "d", "many"].map(Path::new));
}
