use std::{
    fs,
    os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
};

use super::*;

/// Runs a program to its end and returns its output and exit code.
fn run(
    program: &str,
    args: &[&str],
    path: &str,
    credentials: &Credentials,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<(String, Option<i32>)> {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let envs = BTreeMap::from([("PATH".to_owned(), path.to_owned())]);
    let null = fs::File::open("/dev/null")?;
    let (mut output, writer) = io::pipe()?;
    let spawned = spawn(&Launch {
        program,
        args: &args,
        envs: &envs,
        directory: Path::new("/"),
        stdio: [null.as_fd(), writer.as_fd(), null.as_fd()],
        credentials,
        cgroup,
    })
    .map_err(SpawnError::into_io)?;
    drop(writer);
    let mut text = String::new();
    output.read_to_string(&mut text)?;
    let end = rustix::process::waitid(
        rustix::process::WaitId::PidFd(spawned.pidfd.as_fd()),
        rustix::process::WaitIdOptions::EXITED,
    )?;
    Ok((text, end.and_then(|end| end.exit_status())))
}

fn root() -> Credentials {
    Credentials {
        uid: 0,
        gid: 0,
        groups: vec![],
        oom_score_adj: 100,
        open_files: None,
        controlling_terminal: false,
    }
}

fn script(text: &str, credentials: &Credentials) -> String {
    let path = "/usr/bin:/bin";
    run("sh", &["-c", text], path, credentials, None)
        .expect("runs")
        .0
}

#[test]
fn process_has_exactly_the_groups_of_its_user() {
    let unprivileged = |groups: &[u32]| Credentials {
        uid: 65_534,
        gid: 65_534,
        groups: groups.to_vec(),
        ..root()
    };
    let ids = script("id -u; id -g; id -G", &unprivileged(&[100, 101]));
    assert_eq!(ids, "65534\n65534\n65534 100 101\n");
    assert_eq!(script("id -G", &unprivileged(&[])), "65534\n");
}

#[test]
fn process_inherits_no_signal_handler_and_no_descriptor() {
    // Listing the directory would open one more descriptor, so the shell tests each number.
    let text = "grep -E 'Sig(Ign|Blk)' /proc/self/status; \
                for n in 0 1 2 3 4 5 6 7 8 9; do [ -e /proc/$$/fd/$n ] && echo $n; done";
    let seen = script(text, &root());
    let words: Vec<_> = seen.split_whitespace().collect();
    let none = "0000000000000000";
    assert_eq!(
        words,
        ["SigBlk:", none, "SigIgn:", none, "0", "1", "2"],
        "{seen}"
    );
}

#[test]
fn process_has_the_requested_priorities_and_limits() {
    let credentials = Credentials {
        open_files: Some((100, 200)),
        ..root()
    };
    let text = "nice; cat /proc/self/oom_score_adj; ulimit -Sn; ulimit -Hn";
    assert_eq!(script(text, &credentials), "0\n100\n100\n200\n");
}

#[test]
fn program_is_searched_in_path() {
    let dir = tempfile::tempdir().expect("a directory");
    let put = |name: &str, content: &str, mode: u32| {
        let path = dir.path().join(name);
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
    };
    // The script has no `#!` line, so the shell runs it.
    put("bare", "echo bare $0 $1", 0o755);
    put("locked", "echo locked", 0o644);
    let here = dir.path().display().to_string();
    let path = format!("/no/such:{here}:/usr/bin:/bin");
    let find = |program: &str| run(program, &["one"], &path, &root(), None);
    let (text, code) = find("bare").expect("runs");
    assert_eq!((text, code), (format!("bare {here}/bare one\n"), Some(0)));
    let kind = |program: &str| find(program).expect_err("refused").kind();
    assert_eq!(kind("locked"), io::ErrorKind::PermissionDenied);
    assert_eq!(kind("no-such-program"), io::ErrorKind::NotFound);
    assert_eq!(kind(""), io::ErrorKind::NotFound);
    assert_eq!(kind("nul\0"), io::ErrorKind::InvalidInput);
    assert_eq!(find(&format!("{here}/bare")).expect("runs").1, Some(0));
}

/// Starts a program that cannot run, in a directory, and returns the error.
fn refusal(program: &str, directory: &Path, credentials: &Credentials) -> SpawnError {
    let envs = BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]);
    let null = fs::File::open("/dev/null").expect("there");
    let launch = Launch {
        program,
        args: &[],
        envs: &envs,
        directory,
        stdio: [null.as_fd(), null.as_fd(), null.as_fd()],
        credentials,
        cgroup: None,
    };
    spawn(&launch).expect_err("refused")
}

#[test]
fn an_error_names_the_step_that_failed() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script");
    fs::write(&script, "#!/no/such/interpreter\n").expect("written");
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
    };
    mode(&script, 0o755);
    let script = script.display().to_string();
    let error = refusal(&script, Path::new("/"), &root());
    assert!(matches!(error, SpawnError::NoInterpreter(_)), "{error:?}");
    let error = refusal("no-such-program", Path::new("/"), &root());
    assert!(matches!(error, SpawnError::NoProgram(_)), "{error:?}");
    let error = refusal("true", Path::new("/no/such"), &root());
    assert!(matches!(error, SpawnError::NoDirectory(_)), "{error:?}");
    // Only root may enter the directory.
    mode(dir.path(), 0o700);
    let nobody = Credentials {
        uid: 65_534,
        gid: 65_534,
        ..root()
    };
    let error = refusal("true", dir.path(), &nobody);
    assert!(
        matches!(&error, SpawnError::NoDirectory(cause) if cause.kind() == io::ErrorKind::PermissionDenied),
        "{error:?}"
    );
}

#[test]
fn process_starts_in_its_control_group() {
    let mount = Path::new("/mnt");
    // The test uses one thread in a mount namespace that ends with the thread, because the host's
    // own hierarchy may be mounted anywhere, or nowhere.
    let thread = std::thread::spawn(move || {
        mount_groups(mount);
        let group = mount.join(format!("wrenn-sys-test-{}", std::process::id()));
        fs::create_dir(&group).expect("made");
        let directory = fs::File::open(&group).expect("there");
        let text = "cat /proc/self/cgroup";
        let path = "/usr/bin:/bin";
        let (seen, _) =
            run("sh", &["-c", text], path, &root(), Some(directory.as_fd())).expect("runs");
        let name = group
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let found = seen
            .lines()
            .any(|line| line.starts_with("0::") && line.ends_with(&name));
        fs::remove_dir(&group).expect("empty");
        assert!(found, "{seen}");
        // A removed group is an error; the process does not start in another group.
        run("true", &[], path, &root(), Some(directory.as_fd())).expect_err("gone");
    });
    thread.join().expect("it holds");
}

fn mount_groups(at: &Path) {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root may");
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).expect("changed");
    mount("none", at, "cgroup2", MountFlags::empty(), None).expect("mounted");
}
