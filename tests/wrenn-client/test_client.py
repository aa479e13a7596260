"""The unmodified client `wrenn` of PyPI against a `wrenn up`.

The variables WRENN_BASE_URL, WRENN_API_KEY and WRENN_PROXY_DOMAIN name the service. Tests that leave no
state behind share one sandbox.
"""

import asyncio
import os
import time

import httpx
import pytest
from wrenn import AsyncCapsule, Capsule, WrennClient, WrennNotFoundError, WrennValidationError
from wrenn.exceptions import WrennError

#: Alive for longer than the file takes.
LONG = 900
TEMPLATE = "minimal-ubuntu"


@pytest.fixture(scope="session")
def capsule():
    with Capsule(template=TEMPLATE, timeout=LONG, wait=True) as capsule:
        yield capsule


@pytest.fixture
def client():
    with WrennClient() as client:
        yield client


def test_default_template_runs_commands_as_its_own_user(capsule):
    result = capsule.commands.run("id -un; pwd; echo $HOME; sudo id -un")
    assert result.stdout == "wrenn-user\n/home/wrenn-user\n/home/wrenn-user\nroot\n", result
    assert result.exit_code == 0
    assert capsule.get_info().template == TEMPLATE


def test_commands(capsule):
    result = capsule.commands.run("echo $A; echo err >&2; pwd; exit 3", envs={"A": "ü"}, cwd="/tmp")
    assert (result.stdout, result.stderr, result.exit_code) == ("ü\n/tmp\n", "err\n", 3)
    assert capsule.commands.run("printf '\\377'").stdout == "\ufffd"
    handle = capsule.commands.run("echo begun; sleep 1000", background=True, tag="sleeper")
    assert handle.tag == "sleeper"
    assert handle.pid in [process.pid for process in capsule.commands.list()]
    events = capsule.commands.connect(handle.pid)
    seen = [next(events), next(events)]
    assert [event.type for event in seen] == ["start", "stdout"] and seen[1].data == "begun\n"
    capsule.commands.kill(handle.pid)
    assert [event.type for event in events] == ["exit"]
    with pytest.raises(WrennNotFoundError):
        capsule.commands.kill(handle.pid)
    events = list(capsule.commands.stream("echo out; echo err >&2; exit 4"))
    assert (events[0].type, events[-1].type, events[-1].exit_code) == ("start", "exit", 4)
    assert sorted(event.data for event in events[1:-1]) == ["err\n", "out\n"]


def test_command_that_exceeds_its_time_raises(capsule):
    with pytest.raises(WrennError, match="timed out after 1 s") as raised:
        capsule.commands.run("sleep 1000", timeout=1)
    assert raised.value.status_code == 504


def test_files(capsule):
    files = capsule.files
    files.write("/tmp/d/f", "text")
    files.write("/tmp/d/b", b"\xff\x00")
    assert files.read("/tmp/d/f") == "text" and files.read_bytes("/tmp/d/b") == b"\xff\x00"
    entries = {entry.name: entry for entry in files.list("/tmp/d")}
    assert sorted(entries) == ["b", "f"]
    entry = entries["f"]
    assert (entry.path, entry.type, entry.size, entry.owner) == ("/tmp/d/f", "file", 4, "wrenn-user")
    guest_time = int(capsule.commands.run("date +%s").stdout)
    assert 0 <= guest_time - entry.modified_at < 60
    made = files.make_dir("/tmp/d/sub")
    assert made.type == "directory" and files.make_dir("/tmp/d/sub").path == made.path
    assert files.exists("/tmp/d/sub") and not files.exists("/tmp/d/none")
    files.remove("/tmp/d/sub")
    assert not files.exists("/tmp/d/sub")
    with pytest.raises(WrennNotFoundError):
        files.read("/tmp/d/none")
    with pytest.raises(WrennValidationError):
        files.read("")


def test_every_kind_of_file_is_listed(capsule):
    script = "mkdir /tmp/kinds && cd /tmp/kinds && mkfifo pipe && ln -s nowhere broken && ln -s /dev/null device && touch file"
    assert capsule.commands.run(script).exit_code == 0
    kinds = {entry.name: str(entry.type) for entry in capsule.files.list("/tmp/kinds")}
    assert kinds == {"broken": "symlink", "device": "symlink", "file": "file", "pipe": "file"}
    assert len(capsule.files.list("/dev", depth=2)) > 10


def test_large_files_are_streamed(capsule):
    chunks = [bytes([n % 251]) * 65_537 for n in range(64)]
    capsule.files.upload_stream("/tmp/large", iter(chunks))
    assert b"".join(capsule.files.download_stream("/tmp/large")) == b"".join(chunks)


def output_until(term, end):
    """Returns the output of a terminal up to and with `end`."""
    seen = b""
    for event in term:
        if event.type == "output":
            assert isinstance(event.data, bytes), event
            seen += event.data
        assert event.type not in ("error", "exit"), (event, seen)
        if end in seen:
            return seen
    raise AssertionError(seen)


def test_terminal_output_is_delivered_without_any_input(capsule):
    with capsule.pty(cmd="/bin/sh", args=["-c", "printf 'a\\377b'"]) as term:
        events = list(term)
    assert [event.type for event in events if event.type != "output"] == ["started", "exit"]
    assert b"".join(event.data for event in events if event.type == "output") == b"a\xffb"
    assert events[-1].exit_code == 0 and term.pid and term.tag


def test_terminal(capsule):
    with capsule.pty(cols=100, rows=30, envs={"A": "1"}, cwd="/tmp") as term:
        term.write(b"stty size; echo $((6*7))$A; pwd\n")
        seen = output_until(term, b"421\r\n/tmp")
        assert b"30 100" in seen
        term.resize(120, 40)
        term.write(b"sleep 0.1; stty size; echo do''ne\n")
        assert b"40 120" in output_until(term, b"done")
        with capsule.pty_connect(term.tag) as again:
            again.write("echo '€' | wc -c; echo ov''er\n".encode())
            output_until(again, b"4\r\nover")
            assert (again.tag, again.pid) == (term.tag, term.pid)
        term.kill()
        assert [event.type for event in term][-1] == "exit"


def test_port_is_reached_by_its_url(capsule):
    capsule.files.write("/tmp/www/index.html", "hello")
    serve = "python3 -m http.server -d /tmp/www 8080"
    capsule.commands.run(serve, background=True)
    domain = os.environ["WRENN_PROXY_DOMAIN"]
    url = httpx.URL(capsule.get_url(8080))
    assert str(url) == f"http://8080-{capsule.capsule_id}.{domain}"
    # `*.localhost` is not resolved on every machine.
    local = url.copy_with(host="127.0.0.1")
    host = f"{url.host}:{url.port}"
    deadline = time.monotonic() + 60
    while True:
        response = httpx.get(local, headers={"Host": host}, timeout=30)
        if response.status_code == 200:
            break
        assert time.monotonic() < deadline, response.text
        time.sleep(0.1)
    assert response.text == "hello"


def test_metrics(capsule, client):
    for range in ["5m", "10m", "1h", "2h", "6h", "12h", "24h"]:
        assert client.capsules.metrics(capsule.capsule_id, range=range).sandbox_id == capsule.capsule_id


def test_lifecycle_and_snapshots(client):
    made = client.capsules.create(template=TEMPLATE, vcpus=1, memory_mb=512, timeout_sec=LONG)
    capsule = Capsule.connect(made.id)
    assert capsule.is_running() and capsule.info.memory_mb == 512
    assert made.id in [each.id for each in Capsule.list()]
    capsule.ping()
    capsule.commands.run("echo kept > /tmp/kept")
    assert capsule.pause(wait=True).status == "paused"
    again = Capsule.connect(made.id)
    assert again.files.read("/tmp/kept") == "kept\n"
    snapshot = again.create_snapshot(name="of-a-client")
    assert (snapshot.name, snapshot.type) == ("of-a-client", "snapshot")
    again.create_snapshot(name="of-a-client", overwrite=True)
    assert "of-a-client" in [each.name for each in client.snapshots.list(type="snapshot")]
    assert TEMPLATE in [each.name for each in client.snapshots.list(type="base")]
    with Capsule(template="of-a-client", timeout=LONG, wait=True) as copy:
        assert copy.commands.run("cat /tmp/kept; id -un").stdout == "kept\nwrenn-user\n"
    client.snapshots.delete("of-a-client")
    again.destroy(wait=True)
    with pytest.raises(WrennNotFoundError):
        client.capsules.get("sb-00000000")


def test_asynchronous_client(capsule):
    async def use():
        other = await AsyncCapsule.connect(capsule.capsule_id)
        assert (await other.commands.run("echo hi")).stdout == "hi\n"
        assert [entry.type async for entry in other.commands.stream("true")] == ["start", "exit"]
        await other.files.write("/tmp/async", "text")
        assert await other.files.read("/tmp/async") == "text"
        async with other.pty(cmd="/bin/echo", args=["hi"]) as term:
            events = [event async for event in term]
        assert b"".join(event.data for event in events if event.type == "output") == b"hi\r\n"

    asyncio.run(use())
