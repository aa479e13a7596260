"""Git in the guest, as the SDK drives it: many short commands under a short deadline."""

import pytest
from conftest import LONG
from e2b import Sandbox


@pytest.fixture(scope="module")
def repo():
    sandbox = Sandbox.create(timeout=LONG)
    sandbox.git.configure_user("A Tester", "tester@example.com")
    sandbox.git.init("/home/user/repo", initial_branch="main")
    yield sandbox
    sandbox.kill()


def test_a_commit_is_made_and_seen(repo):
    repo.files.write("/home/user/repo/file", "1")
    status = repo.git.status("/home/user/repo")
    assert [(entry.name, entry.status) for entry in status.file_status] == [("file", "untracked")]
    repo.git.add("/home/user/repo")
    repo.git.commit("/home/user/repo", "the first")
    status = repo.git.status("/home/user/repo")
    assert status.current_branch == "main" and status.file_status == []
    assert repo.commands.run("git -C repo log --format=%an:%s").stdout == "A Tester:the first\n"


def test_branches_and_remotes(repo):
    repo.git.create_branch("/home/user/repo", "other")
    branches = repo.git.branches("/home/user/repo")
    assert branches.current_branch == "other" and set(branches.branches) == {"main", "other"}
    repo.git.checkout_branch("/home/user/repo", "main")
    repo.git.init("/home/user/bare", bare=True, initial_branch="main")
    repo.git.remote_add("/home/user/repo", "origin", "/home/user/bare")
    repo.git.push("/home/user/repo", remote="origin", branch="main")
    repo.git.clone("/home/user/bare", path="/home/user/clone")
    assert repo.files.read("/home/user/clone/file") == "1"
    repo.files.write("/home/user/repo/file", "2")
    repo.git.add("/home/user/repo")
    repo.git.commit("/home/user/repo", "the second")
    repo.git.push("/home/user/repo", remote="origin", branch="main")
    repo.git.pull("/home/user/clone")
    assert repo.files.read("/home/user/clone/file") == "2"


def test_a_daemon_in_the_guest_serves_a_clone(repo):
    daemon = repo.commands.run(
        "git daemon --reuseaddr --base-path=/home/user --export-all --listen=127.0.0.1 --port=9418",
        background=True,
        timeout=0,
    )
    repo.commands.run("for n in $(seq 100); do git ls-remote git://127.0.0.1/bare && break; sleep 0.1; done")
    repo.git.clone("git://127.0.0.1/bare", path="/home/user/served")
    assert repo.files.exists("/home/user/served/.git")
    daemon.kill()
