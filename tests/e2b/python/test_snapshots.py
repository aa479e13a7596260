"""Moments of a sandbox that have a name, and copies."""

import uuid

import pytest
from conftest import LONG
from e2b import Sandbox, SandboxException


def names(paginator):
    found = []
    while paginator.has_next:
        found.extend(paginator.next_items())
    return [snapshot.snapshot_id for snapshot in found]


def test_a_snapshot_leaves_its_source_running_and_makes_others(create):
    source = create(timeout=600)
    source.files.write("/home/user/moment", "then")
    process = source.commands.run("sleep 600", background=True, timeout=0)
    end = source.get_info().end_at
    snapshot = source.create_snapshot()
    assert snapshot.snapshot_id in names(source.list_snapshots())
    assert source.is_running() and source.get_info().end_at == end
    assert process.pid in [found.pid for found in source.commands.list()]
    source.files.write("/home/user/moment", "later")
    source.kill()
    copy = create(snapshot.snapshot_id, envs={"OWN": "mine"})
    assert copy.sandbox_id != source.sandbox_id
    assert copy.files.read("/home/user/moment") == "then"
    assert copy.commands.run("echo $OWN-$E2B_SANDBOX_ID").stdout == f"mine-{copy.sandbox_id}\n"
    copy.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False
    with pytest.raises(SandboxException):
        Sandbox.create(snapshot.snapshot_id)


def test_a_snapshot_can_have_a_name(create):
    source = create()
    name = f"moment-{uuid.uuid4().hex[:8]}"
    snapshot = source.create_snapshot(name=name)
    assert any(name in found for found in snapshot.names)
    assert name in snapshot.snapshot_id
    source.kill()
    assert create(name).is_running()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True


def test_a_fork_is_another_from_the_same_moment(create):
    source = create()
    source.files.write("/home/user/moment", "then")
    source.commands.run("echo memory > /dev/shm/kept")
    forks = source.fork(timeout=LONG, count=1)
    assert len(forks) == 1 and not isinstance(forks[0], Exception), forks
    fork = create.adopt(forks[0])
    assert fork.sandbox_id != source.sandbox_id
    assert fork.files.read("/home/user/moment") == "then" and fork.files.read("/dev/shm/kept") == "memory\n"
    fork.files.write("/home/user/moment", "fork")
    assert source.files.read("/home/user/moment") == "then"
    assert fork.commands.run("echo $E2B_SANDBOX_ID").stdout.strip() == fork.sandbox_id
    draw = "head -c 16 /dev/urandom | xxd -p || head -c 16 /dev/urandom | od -An -tx1"
    assert fork.commands.run(draw).stdout != source.commands.run(draw).stdout
    # One's token is not the other's.
    assert fork.connection_config.sandbox_headers != source.connection_config.sandbox_headers
