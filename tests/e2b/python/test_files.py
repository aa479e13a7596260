"""Files: every way in and out, links without a token, directories, and what is told of changes."""

import functools
import gzip
import io
import os
import time

import httpx
import pytest
from conftest import IS_NEW, until
from e2b import (
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    Sandbox,
    SandboxException,
)

BINARY = bytes(range(256)) * 400

get, post = functools.partial(httpx.get, timeout=60), functools.partial(httpx.post, timeout=60)


@pytest.fixture
def files(sandbox):
    return sandbox.files


@pytest.fixture
def folder(sandbox, request):
    """A directory of the test's own."""
    path = f"/home/user/{request.node.name.split('[')[0]}"
    sandbox.files.make_dir(path)
    return path


def test_text_and_bytes_come_back_as_they_were_written(files, folder):
    for name, data in [("text", "hällo\n"), ("empty", ""), ("binary", BINARY)]:
        path = f"{folder}/{name}"
        written = files.write(path, data)
        assert (written.name, written.path, written.type) == (name, path, FileType.FILE)
        raw = data.encode() if isinstance(data, str) else data
        assert bytes(files.read(path, format="bytes")) == raw
        assert b"".join(files.read(path, format="stream")) == raw
    assert files.read(f"{folder}/text") == "hällo\n"
    files.write(f"{folder}/text", "short")
    assert files.read(f"{folder}/text") == "short"


def test_every_form_of_upload(files, folder):
    files.write(f"{folder}/io", io.BytesIO(BINARY))
    files.write(f"{folder}/gzip", BINARY, gzip=True)
    files.write(f"{folder}/octets", BINARY, use_octet_stream=True)
    files.write(f"{folder}/multipart", BINARY, use_octet_stream=False)
    if IS_NEW:
        files.write(f"{folder}/pieces", (BINARY[at : at + 1000] for at in range(0, len(BINARY), 1000)))
    for entry in files.list(folder):
        assert bytes(files.read(entry.path, format="bytes")) == BINARY, entry.name
        assert bytes(files.read(entry.path, format="bytes", gzip=True)) == BINARY, entry.name


def test_a_file_of_some_size_is_whole_both_ways(sandbox, files, folder):
    data = os.urandom(8 * 1024 * 1024)
    files.write(f"{folder}/large", data, use_octet_stream=True)
    assert sandbox.commands.run(f"stat -c %s {folder}/large").stdout == f"{len(data)}\n"
    assert bytes(files.read(f"{folder}/large", format="bytes")) == data


def test_several_files_at_once(files, folder):
    assert files.write_files([]) == []
    written = files.write_files(
        [{"path": f"{folder}/a/{n}", "data": f"{n}" if n % 2 else str(n).encode()} for n in range(8)]
    )
    assert [entry.path for entry in written] == [f"{folder}/a/{n}" for n in range(8)]
    assert [files.read(f"{folder}/a/{n}") for n in range(8)] == [str(n) for n in range(8)]


def test_names_are_not_changed_on_the_way(files, folder):
    for name in ["with space", "ünï", "a+b", "100%", "q?x=1", "#hash", "semi;colon", "quote'"]:
        files.write(f"{folder}/{name}", name)
        assert files.read(f"{folder}/{name}") == name
        assert files.exists(f"{folder}/{name}")
    assert len(files.list(folder)) == 8


def test_directories_are_made_on_the_way_and_belong_to_the_user(sandbox, files, folder):
    files.write(f"{folder}/x/y/z", "deep")
    shown = sandbox.commands.run(f"stat -c '%U %a' {folder}/x {folder}/x/y {folder}/x/y/z").stdout
    assert shown == "user 755\nuser 755\nuser 644\n"
    files.write("/root/roots", "r", user="root")
    assert sandbox.commands.run("stat -c %U /root/roots", user="root").stdout == "root\n"
    files.write("relative", "home")
    assert files.read("/home/user/relative") == files.read("~/relative") == "home"


def test_what_is_not_there_is_told(files, folder):
    with pytest.raises(FileNotFoundException):
        files.read(f"{folder}/none")
    with pytest.raises(FileNotFoundException):
        files.list(f"{folder}/none")
    with pytest.raises(FileNotFoundException):
        files.get_info(f"{folder}/none")
    with pytest.raises(FileNotFoundException):
        files.rename(f"{folder}/none", f"{folder}/other")
    assert files.exists(f"{folder}/none") is False
    files.remove(f"{folder}/none")
    with pytest.raises((InvalidArgumentException, SandboxException)):
        files.read(folder)


def test_what_is_known_of_an_entry(sandbox, files, folder):
    files.write(f"{folder}/file", "12345")
    sandbox.commands.run(f"chmod 640 {folder}/file && ln -s {folder}/file {folder}/link && ln -s nowhere {folder}/dangling")
    info = files.get_info(f"{folder}/file")
    assert (info.name, info.type, info.path, info.size) == ("file", FileType.FILE, f"{folder}/file", 5)
    assert (info.mode, info.permissions, info.owner, info.group) == (0o640, "-rw-r-----", "user", "user")
    assert abs(info.modified_time.timestamp() - float(sandbox.commands.run(f"stat -c %Y {folder}/file").stdout)) < 2
    assert info.symlink_target is None
    directory = files.get_info(folder)
    assert (directory.type, directory.permissions) == (FileType.DIR, "drwxr-xr-x")
    link = files.get_info(f"{folder}/link")
    assert link.symlink_target == f"{folder}/file"
    # The older generation does not read that it is a link.
    assert link.type == (FileType.SYMLINK if IS_NEW else FileType.FILE)


def test_lists_of_some_depth(files, folder):
    files.write_files([{"path": f"{folder}/{path}", "data": ""} for path in ["b/c/d/e", "b/f", "a"]])
    paths = lambda depth: [entry.path.removeprefix(folder + "/") for entry in files.list(folder, depth=depth)]
    assert paths(1) == ["a", "b"]
    assert paths(2) == ["a", "b", "b/c", "b/f"]
    assert paths(9) == ["a", "b", "b/c", "b/c/d", "b/c/d/e", "b/f"]
    with pytest.raises(InvalidArgumentException):
        files.list(folder, depth=0)
    with pytest.raises((InvalidArgumentException, SandboxException)):
        files.list(f"{folder}/a")


def test_directories_are_made_moved_and_removed(files, folder):
    assert files.make_dir(f"{folder}/one/two") is True
    assert files.make_dir(f"{folder}/one/two") is False
    files.write(f"{folder}/one/two/file", "x")
    moved = files.rename(f"{folder}/one", f"{folder}/other")
    assert moved.path == f"{folder}/other"
    assert files.read(f"{folder}/other/two/file") == "x" and not files.exists(f"{folder}/one")
    files.remove(f"{folder}/other")
    assert files.list(folder) == []


def test_metadata_stays_with_a_file(files, folder):
    path = f"{folder}/file"
    written = files.write(path, "x", metadata={"Author": "me", "run-id": "42"})
    assert written.metadata == {"author": "me", "run-id": "42"}
    assert files.get_info(path).metadata == {"author": "me", "run-id": "42"}
    assert files.list(folder)[0].metadata == {"author": "me", "run-id": "42"}
    assert files.rename(path, f"{folder}/moved").metadata == {"author": "me", "run-id": "42"}
    # Each write says anew what there is.
    files.write(f"{folder}/moved", "y")
    assert not files.get_info(f"{folder}/moved").metadata
    for name in ["one", "two"]:
        files.write(f"{folder}/{name}", b"z", metadata={"k": name}, use_octet_stream=name == "two")
        assert files.get_info(f"{folder}/{name}").metadata == {"k": name}
    with pytest.raises((InvalidArgumentException, SandboxException)):
        files.write(f"{folder}/bad", "x", metadata={"k": "v" * 5000})


def test_links_work_without_a_token(sandbox, files, folder):
    path = f"{folder}/with a + sign"
    files.write(path, "linked")
    answer = get(sandbox.download_url(path))
    assert (answer.status_code, answer.text) == (200, "linked")
    answer = get(sandbox.download_url(path, user="user", use_signature_expiration=60))
    assert (answer.status_code, answer.text) == (200, "linked")
    part = get(sandbox.download_url(path), headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.text) == (206, "ink")
    up = post(sandbox.upload_url(f"{folder}/up"), files={"file": ("up", b"uploaded")})
    assert up.status_code == 200 and files.read(f"{folder}/up") == "uploaded"
    packed = post(
        sandbox.upload_url(f"{folder}/packed", user="user"),
        content=gzip.compress(b"packed"),
        headers={"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"},
    )
    assert packed.status_code == 200 and files.read(f"{folder}/packed") == "packed"


def test_a_link_is_good_for_its_path_its_use_and_its_time(sandbox, files, folder):
    files.write(f"{folder}/file", "secret")
    link = sandbox.download_url(f"{folder}/file")
    assert post(link, files={"file": b"x"}).status_code in (400, 401)
    assert get(link.replace("file&", "fil&")).status_code in (400, 401)
    assert get(link.split("&signature")[0]).status_code in (400, 401)
    late = sandbox.download_url(f"{folder}/file", use_signature_expiration=-120)
    answer = get(late)
    assert answer.status_code == 401
    assert answer.json() == {"code": 401, "message": "signature is already expired"}


def test_nothing_is_given_to_whom_has_no_token(sandbox):
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    url = os.environ["E2B_SANDBOX_URL"]
    assert get(f"{url}/files?path=/etc/hostname", headers=headers).status_code == 401
    call = f"{url}/process.Process/List"
    assert post(call, headers=headers, json={}).status_code == 401
    assert post(call, headers={**headers, "X-Access-Token": "wrong"}, json={}).status_code == 401


def events_of(handle, wanted, events):
    events.extend(handle.get_new_events())
    seen = {(event.name, event.type) for event in events}
    return wanted <= seen


def test_changes_in_a_directory_are_told(files, folder):
    files.write(f"{folder}/old", "1")
    watch = files.watch_dir(folder)
    files.write(f"{folder}/new", "1")
    # Nothing is waited for: what was done is to be told.
    told = [(event.name, event.type) for event in watch.get_new_events()]
    kind = FilesystemEventType
    assert told == [("new", kind.CREATE), ("new", kind.CHMOD), ("new", kind.WRITE)]
    assert watch.get_new_events() == []
    files.rename(f"{folder}/old", f"{folder}/renamed")
    files.remove(f"{folder}/new")
    told = {(event.name, event.type) for event in watch.get_new_events()}
    assert {("old", kind.RENAME), ("renamed", kind.CREATE), ("new", kind.REMOVE)} <= told
    watch.stop()
    with pytest.raises(Exception):
        watch.get_new_events()


def test_changes_below_are_told_where_asked_for(sandbox, files, folder):
    kind = FilesystemEventType
    files.make_dir(f"{folder}/sub")
    flat, deep = files.watch_dir(folder), files.watch_dir(folder, recursive=True)
    files.write(f"{folder}/sub/file", "x")
    assert [event.name for event in flat.get_new_events() if event.name.startswith("sub/")] == []
    assert ("sub/file", kind.CREATE) in {(event.name, event.type) for event in deep.get_new_events()}
    # In a directory that is new itself, at once.
    sandbox.commands.run(f"mkdir -p {folder}/n/e/w && echo > {folder}/n/e/w/file")
    events = []
    until("the new file is told", lambda: events_of(deep, {("n/e/w/file", kind.CREATE)}, events))
    flat.stop()
    deep.stop()
    with pytest.raises(FileNotFoundException):
        files.watch_dir(f"{folder}/none")
    with pytest.raises((InvalidArgumentException, SandboxException)):
        files.watch_dir(f"{folder}/sub/file")


@pytest.mark.skipif(not IS_NEW, reason="newer than this SDK")
def test_changes_come_with_their_entries_where_asked_for(files, folder):
    watch = files.watch_dir(folder, include_entry=True)
    files.write(f"{folder}/file", "12345")
    written = [event for event in watch.get_new_events() if event.type == FilesystemEventType.WRITE]
    assert written[0].entry.path == f"{folder}/file" and written[0].entry.size == 5
    watch.stop()


def test_a_sandbox_is_secured_also_if_the_old_api_asks_for_an_open_one(create):
    if IS_NEW:
        pytest.skip("only the older API asks for such sandboxes")
    sandbox = create(secure=False)
    sandbox.files.write("/tmp/a", "secured")
    assert sandbox.files.read("/tmp/a") == "secured"
    assert httpx.get(sandbox.download_url("/tmp/a", use_signature_expiration=60)).text == "secured"
    assert Sandbox.connect(sandbox.sandbox_id).files.read("/tmp/a") == "secured"
