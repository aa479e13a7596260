//! Entries, directories and links.

use connectrpc::{ConnectError, ErrorCode};
use wrenn_proto::rpc::filesystem::{
    EntryInfo, FileType, ListDirRequest, MakeDirRequest, MoveRequest, RemoveRequest, StatRequest,
};

use crate::{
    calls::{CODECS, Clients, as_user, clients, clients_by},
    world::run,
};

impl Clients {
    pub(crate) async fn stat(&self, path: &str) -> Result<EntryInfo, ConnectError> {
        let request = StatRequest {
            path: path.into(),
            ..Default::default()
        };
        let answer = self
            .files
            .stat_with_options(request, as_user("user"))
            .await?;
        Ok(answer.into_owned().entry.into_option().expect("an entry"))
    }

    async fn make_dir(&self, path: &str) -> Result<EntryInfo, ConnectError> {
        let request = MakeDirRequest {
            path: path.into(),
            ..Default::default()
        };
        let answer = self
            .files
            .make_dir_with_options(request, as_user("user"))
            .await?;
        Ok(answer.into_owned().entry.into_option().expect("an entry"))
    }

    async fn rename(&self, source: &str, destination: &str) -> Result<EntryInfo, ConnectError> {
        let request = MoveRequest {
            source: source.into(),
            destination: destination.into(),
            ..Default::default()
        };
        let answer = self
            .files
            .r#move_with_options(request, as_user("user"))
            .await?;
        Ok(answer.into_owned().entry.into_option().expect("an entry"))
    }

    async fn list_dir(&self, path: &str, depth: u32) -> Result<Vec<String>, ConnectError> {
        let request = ListDirRequest {
            path: path.into(),
            depth,
            ..Default::default()
        };
        let answer = self
            .files
            .list_dir_with_options(request, as_user("user"))
            .await?;
        Ok(answer
            .into_owned()
            .entries
            .into_iter()
            .map(|entry| entry.path)
            .collect())
    }

    async fn remove(&self, path: &str) -> Result<(), ConnectError> {
        let request = RemoveRequest {
            path: path.into(),
            ..Default::default()
        };
        self.files
            .remove_with_options(request, as_user("user"))
            .await
            .map(drop)
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ConnectError>) -> ErrorCode {
    result.expect_err("refused").code
}

#[test]
fn entries_are_described_in_both_codecs() {
    run(async |world| {
        world.write("/mnt/work/file", "hello");
        let seen = clients(world);
        seen.sh("cd /mnt/work; chmod 4640 file; chown user:team file; touch -d @1700000000.25 file; ln -s file link; ln -s /no/such dangling; ln -s loop loop; mkfifo pipe; mkdir dir; chmod 1777 dir").await;
        for codec in CODECS {
            let clients = clients_by(world, codec);
            let file = clients.stat("/mnt/work/file").await.expect("there");
            assert_eq!(
                (
                    file.name.as_str(),
                    file.size,
                    file.mode,
                    file.permissions.as_str()
                ),
                ("file", 5, 0o640, "-rw-r-----")
            );
            assert_eq!(
                (file.owner.as_str(), file.group.as_str(), file.is_symlink),
                ("user", "team", false)
            );
            let time = file.modified_time.as_option().expect("a time");
            assert_eq!((time.seconds, time.nanos), (1_700_000_000, 250_000_000));
            assert_eq!(file.r#type, FileType::FILE_TYPE_FILE);
            let link = clients.stat("/mnt/work/link").await.expect("there");
            assert_eq!(
                (link.path.as_str(), link.symlink_target.as_deref()),
                ("/mnt/work/link", Some("/mnt/work/file"))
            );
            assert_eq!(
                (
                    link.is_symlink,
                    link.mode,
                    link.permissions.as_str(),
                    link.size
                ),
                (true, 0o640, "Lrwxrwxrwx", 4)
            );
            assert_eq!(link.r#type, FileType::FILE_TYPE_FILE);
            let dangling = clients.stat("/mnt/work/dangling").await.expect("there");
            assert_eq!(
                dangling.symlink_target.as_deref(),
                Some("/mnt/work/dangling")
            );
            assert_eq!(dangling.r#type, FileType::FILE_TYPE_UNSPECIFIED);
            let circle = clients
                .stat("/mnt/work/loop")
                .await
                .expect("a link is there");
            assert_eq!(circle.r#type, FileType::FILE_TYPE_UNSPECIFIED);
            let dir = clients.stat("/mnt/work/dir").await.expect("there");
            assert_eq!((dir.permissions.as_str(), dir.mode), ("dtrwxrwxrwx", 0o777));
            assert_eq!(
                clients.stat("/mnt/work/pipe").await.expect("there").r#type,
                FileType::FILE_TYPE_UNSPECIFIED
            );
            let root = clients.stat("/").await.expect("there");
            assert_eq!((root.name.as_str(), root.path.as_str()), ("/", "/"));
            assert_eq!(clients.stat("~").await.expect("there").path, "/home/user");
            assert_eq!(clients.stat("").await.expect("there").path, "/home/user");
            assert_eq!(code(clients.stat("/no/such").await), ErrorCode::NotFound);
            assert_eq!(
                code(clients.stat("/mnt/work/file/x").await),
                ErrorCode::InvalidArgument
            );
            assert_eq!(
                code(clients.stat("~root").await),
                ErrorCode::InvalidArgument
            );
            assert_eq!(code(clients.stat("a\0b").await), ErrorCode::InvalidArgument);
            assert_eq!(
                code(clients.stat(&format!("/{}", "n".repeat(300))).await),
                ErrorCode::InvalidArgument
            );
        }
    });
}

#[test]
fn directories_are_made_once_with_those_above() {
    run(async |world| {
        let clients = clients(world);
        let made = clients.make_dir("new/a/b").await.expect("made");
        assert_eq!(
            (made.path.as_str(), made.permissions.as_str()),
            ("/home/user/new/a/b", "drwxr-xr-x")
        );
        for path in ["new", "new/a", "new/a/b"] {
            let entry = clients.stat(path).await.expect("there");
            assert_eq!(
                (entry.owner.as_str(), entry.group.as_str()),
                ("user", "user"),
                "{path}"
            );
        }
        assert_eq!(
            code(clients.make_dir("new/a/b").await),
            ErrorCode::AlreadyExists
        );
        assert_eq!(code(clients.make_dir("/").await), ErrorCode::AlreadyExists);
        world.write("/home/user/file", "");
        clients
            .sh("ln -s new /home/user/to-dir; ln -s /no/such /home/user/dangling")
            .await;
        assert_eq!(
            code(clients.make_dir("file").await),
            ErrorCode::InvalidArgument
        );
        assert_eq!(
            code(clients.make_dir("file/x/y").await),
            ErrorCode::InvalidArgument
        );
        assert_eq!(
            code(clients.make_dir("to-dir").await),
            ErrorCode::AlreadyExists
        );
        assert_eq!(
            code(clients.make_dir("dangling").await),
            ErrorCode::InvalidArgument
        );
        assert_eq!(code(clients.make_dir("/proc/x").await), ErrorCode::NotFound);
        clients.make_dir("to-dir/through").await.expect("made");
        assert!(world.path("/home/user/new/through").is_dir());
    });
}

#[test]
fn moving_makes_the_way_and_says_what_is_wrong() {
    run(async |world| {
        let clients = clients(world);
        world.write("/mnt/work/f", "content");
        let moved = clients
            .rename("/mnt/work/f", "/mnt/work/x/y/g")
            .await
            .expect("moved");
        assert_eq!(
            (moved.path.as_str(), moved.name.as_str()),
            ("/mnt/work/x/y/g", "g")
        );
        assert_eq!(world.read("/mnt/work/x/y/g"), "content");
        assert_eq!(
            code(clients.rename("/mnt/work/f", "/mnt/work/z").await),
            ErrorCode::NotFound
        );
        assert!(!world.path("/mnt/work/z").exists());
        world.write("/mnt/work/over", "old");
        clients
            .rename("/mnt/work/x/y/g", "/mnt/work/over")
            .await
            .expect("replaced");
        assert_eq!(world.read("/mnt/work/over"), "content");
        clients.make_dir("/mnt/work/full/sub").await.expect("made");
        for (source, destination) in [
            ("/mnt/work/x", "/mnt/work/full"),
            ("/mnt/work/x", "/mnt/work/x/inside"),
            ("/mnt/work/over", "/mnt/work/full"),
            ("/mnt/work/x", "/mnt/work/over"),
            ("/mnt/work/x", "/mnt/work/over/below"),
        ] {
            let error = clients
                .rename(source, destination)
                .await
                .expect_err("refused");
            assert_eq!(
                error.code,
                ErrorCode::InvalidArgument,
                "{source} {destination}: {error}"
            );
        }
        clients.sh("ln -s /no/such /mnt/work/link").await;
        assert!(
            clients
                .rename("/mnt/work/link", "/mnt/work/link2")
                .await
                .expect("the link itself")
                .is_symlink
        );
        // A rename cannot cross file systems; the client gets an error.
        let error = clients
            .rename("/mnt/work/over", "/home/user/over")
            .await
            .expect_err("another file system");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        assert_eq!(world.read("/mnt/work/over"), "content");
    });
}

#[test]
fn lists_are_sorted_as_deep_as_asked_and_stay_inside() {
    run(async |world| {
        for codec in CODECS {
            let clients = clients_by(world, codec);
            clients.sh("rm -rf /mnt/work/*; cd /mnt/work; mkdir -p t/b/c/d t/a; touch t/b/c/f t/z; ln -s /etc t/link; ln -s t by; ln -s l2 l1; ln -s l1 l2; printf x > \"$(printf 't/a/\\377')\"").await;
            let list = async |path: &str, depth| clients.list_dir(path, depth).await;
            let top = ["a", "b", "link", "z"].map(|n| format!("/mnt/work/t/{n}"));
            assert_eq!(list("/mnt/work/t", 0).await.expect("listed"), top);
            assert_eq!(list("/mnt/work/t", 1).await.expect("listed"), top);
            let deep = list("/mnt/work/by", 100).await.expect("listed");
            let wanted = ["a", "a/\u{fffd}", "b", "b/c", "b/c/d", "b/c/f", "link", "z"]
                .map(|n| format!("/mnt/work/by/{n}"));
            assert_eq!(deep, wanted);
            assert_eq!(
                code(list("/mnt/work/t/z", 1).await),
                ErrorCode::InvalidArgument
            );
            assert_eq!(code(list("/mnt/work/none", 1).await), ErrorCode::NotFound);
            assert_eq!(
                code(list("/mnt/work/l1", 1).await),
                ErrorCode::FailedPrecondition
            );
            assert!(
                list("/proc/1", u32::MAX).await.is_ok(),
                "entries that change during the listing do not matter"
            );
        }
    });
}

#[test]
fn a_list_of_ten_thousand_is_whole() {
    run(async |world| {
        let clients = clients(world);
        clients
            .sh("mkdir /mnt/work/many; cd /mnt/work/many; seq -f '%06.0f' 10000 | xargs touch")
            .await;
        let list = clients.list_dir("/mnt/work/many", 1).await.expect("listed");
        assert_eq!(
            (list.len(), list[0].as_str(), list[9999].as_str()),
            (10_000, "/mnt/work/many/000001", "/mnt/work/many/010000")
        );
    });
}

#[test]
fn removing_is_thorough_and_follows_no_link() {
    run(async |world| {
        let clients = clients(world);
        clients.sh("cd /mnt/work; mkdir -p t/a/b keep; touch t/a/b/f keep/f; ln -s ../keep t/link; ln -s keep to; ln -s /no/such dangling").await;
        for path in [
            "/mnt/work/t",
            "/mnt/work/to",
            "/mnt/work/dangling",
            "/mnt/work/none",
            "/mnt/work/keep/f/x",
        ] {
            clients.remove(path).await.expect(path);
        }
        assert_eq!(
            clients.list_dir("/mnt/work", 9).await.expect("listed"),
            ["/mnt/work/keep", "/mnt/work/keep/f"]
        );
    });
}
