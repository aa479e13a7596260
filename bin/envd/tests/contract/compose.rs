//! `/files/compose`: concatenation of several files into one.

use crate::{
    raw::{Answer, call},
    world::{World, run},
};

fn compose(body: &str) -> Answer {
    let head = "POST /files/compose HTTP/1.1\r\ncontent-type: application/json";
    call(head, body.as_bytes())
}

fn parts(world: &World) {
    world.write("/mnt/work/a", "one ");
    world.write("/mnt/work/b", "two ");
    world.write("/mnt/work/c", "three");
}

fn names(world: &World, dir: &str) -> Vec<String> {
    let list = std::fs::read_dir(world.path(dir)).expect("there");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry
            .expect("there")
            .file_name()
            .into_string()
            .expect("text")
    };
    let mut names: Vec<_> = list.map(name).collect();
    names.sort();
    names
}

#[test]
fn parts_become_one_file_of_the_user_and_are_gone() {
    run(async |world| {
        use std::os::unix::fs::MetadataExt as _;
        parts(world);
        let answer = compose(
            r#"{"source_paths":["/mnt/work/a","/mnt/work/b","/mnt/work/c"],"destination":"~/new/whole","username":"user"}"#,
        );
        assert_eq!(answer.status, 200, "{answer:?}");
        let wanted =
            serde_json::json!({"path": "/home/user/new/whole", "name": "whole", "type": "file"});
        assert_eq!(answer.json(), wanted);
        assert_eq!(world.read("/home/user/new/whole"), "one two three");
        let there = std::fs::metadata(world.path("/home/user/new/whole")).expect("there");
        assert_eq!(
            (there.uid(), there.gid(), there.mode() & 0o777),
            (1000, 1000, 0o644)
        );
        assert_eq!(names(world, "/mnt/work"), Vec::<String>::new());
        assert_eq!(names(world, "/home/user/new"), ["whole"]);
    });
}

#[test]
fn a_destination_may_be_one_of_the_parts() {
    run(async |world| {
        parts(world);
        let body = r#"{"source_paths":["/mnt/work/b","/mnt/work/a","/mnt/work/b"],"destination":"/mnt/work/a"}"#;
        assert_eq!(compose(body).status, 200);
        assert_eq!(world.read("/mnt/work/a"), "two one two ");
        assert_eq!(names(world, "/mnt/work"), ["a", "c"]);
    });
}

#[test]
fn what_fails_changes_nothing() {
    run(async |world| {
        parts(world);
        let refused = |sources: &str, destination: &str, user: &str| {
            let answer = compose(&format!(
                r#"{{"source_paths":[{sources}],"destination":"{destination}"{user}}}"#
            ));
            assert_eq!(answer.json()["code"], u64::from(answer.status));
            answer.status
        };
        let a = r#""/mnt/work/a""#;
        assert_eq!(refused("", "/mnt/work/x", ""), 400);
        assert_eq!(refused(a, "", ""), 400);
        assert_eq!(
            refused(r#""/mnt/work/a","/no/such""#, "/mnt/work/x", ""),
            404
        );
        assert_eq!(refused(r#""/mnt/work/a","/mnt""#, "/mnt/work/x", ""), 400);
        assert_eq!(refused(r#""/dev/zero""#, "/mnt/work/x", ""), 400);
        assert_eq!(refused(a, "/mnt/work", ""), 400);
        assert_eq!(refused(a, "/mnt/work/b/x", ""), 400);
        assert_eq!(refused(a, "~other/x", ""), 400);
        assert_eq!(refused(a, "/mnt/work/x", r#","username":"root123""#), 401);
        assert_eq!(compose("{").status, 400);
        assert_eq!(names(world, "/mnt/work"), ["a", "b", "c"]);
        // Disk full: the previous file stays, and no temporary file is left.
        world.write("/mnt/work/big", vec![7; 3 << 20]);
        world.write("/mnt/small/old", "old");
        assert_eq!(
            refused(r#""/mnt/work/a","/mnt/work/big""#, "/mnt/small/old", ""),
            507
        );
        assert_eq!(names(world, "/mnt/small"), ["old"]);
        assert_eq!(
            (
                world.read("/mnt/small/old").as_str(),
                world.read("/mnt/work/a").as_str()
            ),
            ("old", "one ")
        );
        // Signed file links do not cover this call: the token is required.
        let init = "POST /init HTTP/1.1\r\ncontent-type: application/json";
        assert_eq!(call(init, br#"{"accessToken":"t"}"#).status, 204);
        assert_eq!(refused(a, "/mnt/work/x", ""), 401);
    });
}
