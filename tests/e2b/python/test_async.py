"""What the asynchronous SDK does by other calls than the synchronous one: callbacks, pushed events, async sources."""

import asyncio
import time
import uuid

import pytest
import pytest_asyncio
from conftest import IS_NEW, LONG
from e2b import (
    AsyncSandbox,
    CommandExitException,
    FilesystemEventType,
    PtySize,
    SandboxNotFoundException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)


@pytest_asyncio.fixture(scope="session")
async def sandbox():
    sandbox = await AsyncSandbox.create(timeout=LONG)
    yield sandbox
    await sandbox.kill()


async def soon(what, ask, deadline=60.0):
    async def asking():
        while not (answer := ask()):
            await asyncio.sleep(0.02)
        return answer

    try:
        return await asyncio.wait_for(asking(), deadline)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {deadline} s") from None


async def test_commands_at_once_with_callbacks(sandbox):
    said = []

    async def on_stdout(text):
        said.append(text)

    results = await asyncio.gather(
        *[sandbox.commands.run(f"echo {n}; sleep 0.5; echo {n}", on_stdout=on_stdout) for n in range(6)]
    )
    assert [result.stdout for result in results] == [f"{n}\n{n}\n" for n in range(6)]
    assert len("".join(said)) == 6 * 4
    with pytest.raises(CommandExitException) as failed:
        await sandbox.commands.run("exit 5")
    assert failed.value.exit_code == 5
    with pytest.raises(TimeoutException):
        await sandbox.commands.run("sleep 300", timeout=1.5)


async def test_a_background_command_is_fed_left_and_found_again(sandbox):
    handle = await sandbox.commands.run("cat", background=True, stdin=True)
    await sandbox.commands.send_stdin(handle.pid, "one\n")
    await soon("it comes back", lambda: handle.stdout == "one\n")
    await handle.disconnect()
    again = await sandbox.commands.connect(handle.pid)
    await sandbox.commands.send_stdin(handle.pid, "two\n")
    await sandbox.commands.close_stdin(handle.pid)
    assert (await again.wait()).stdout == "two\n"
    killed = await sandbox.commands.run("sleep 300", background=True)
    assert await killed.kill() is True
    with pytest.raises(CommandExitException):
        await killed.wait()


async def test_a_terminal_by_callback(sandbox):
    shown = []
    terminal = await sandbox.pty.create(PtySize(rows=24, cols=80), on_data=shown.append, cwd="/tmp")
    await sandbox.pty.resize(terminal.pid, PtySize(rows=24, cols=101))
    await sandbox.pty.send_stdin(terminal.pid, b"echo w=$(tput cols) $PWD\nexit\n")
    await terminal.wait()
    assert b"w=101 /tmp" in b"".join(shown)


async def test_changes_are_pushed(sandbox):
    await sandbox.files.make_dir("/home/user/watched")
    events, ended = [], []
    watch = await sandbox.files.watch_dir(
        "/home/user/watched", on_event=events.append, on_exit=ended.append, recursive=True, timeout=0
    )
    await sandbox.files.write("/home/user/watched/sub/file", "x")
    wanted = ("sub/file", FilesystemEventType.WRITE)
    await soon("it is told", lambda: wanted in [(event.name, event.type) for event in events])
    await watch.stop()


async def test_files_of_all_kinds(sandbox):
    data = bytes(range(256)) * 2000
    if IS_NEW:

        async def pieces():
            for at in range(0, len(data), 5000):
                yield data[at : at + 5000]

        await sandbox.files.write("/tmp/pieces", pieces())
        assert bytes(await sandbox.files.read("/tmp/pieces", format="bytes")) == data
    await sandbox.files.write("/tmp/gzip", data, gzip=True)
    read = b""
    async for piece in await sandbox.files.read("/tmp/gzip", format="stream"):
        read += piece
    assert read == data
    written = await asyncio.gather(*[sandbox.files.write(f"/tmp/many/{n}", str(n)) for n in range(20)])
    assert [entry.name for entry in written] == [str(n) for n in range(20)]
    assert len(await sandbox.files.list("/tmp/many")) == 20


async def test_a_life(sandbox):
    mark = uuid.uuid4().hex
    other = await AsyncSandbox.create(timeout=LONG, metadata={"mark": mark})
    try:
        await other.files.write("/home/user/kept", "file")
        await other.pause()
        assert await other.is_running() is False
        pages = AsyncSandbox.list(SandboxQuery(metadata={"mark": mark}, state=[SandboxState.PAUSED]))
        assert [info.sandbox_id for info in await pages.next_items()] == [other.sandbox_id]
        again = await AsyncSandbox.connect(other.sandbox_id, timeout=LONG)
        assert await again.files.read("/home/user/kept") == "file"
    finally:
        assert await other.kill() is True
    with pytest.raises(SandboxNotFoundException):
        await AsyncSandbox.get_info(other.sandbox_id)


async def test_a_kill_ends_a_stream_with_the_reason(sandbox):
    other = await AsyncSandbox.create(timeout=LONG)
    running = asyncio.create_task(other.commands.run("sleep 300", timeout=0))
    end = time.monotonic() + 60
    while not any("sleep 300" in process.args for process in await other.commands.list()):
        assert time.monotonic() < end, "it is not listed"
        await asyncio.sleep(0.05)
    await other.kill()
    with pytest.raises(TimeoutException) as ended:
        await asyncio.wait_for(running, 60)
    if IS_NEW:
        assert "killed or reached its end of life" in str(ended.value) or "not found" in str(ended.value)
