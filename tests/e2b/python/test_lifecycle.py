"""The life of a sandbox: made, found, kept, paused, resumed, ended."""

import datetime
import os
import threading
import time
import uuid

import pytest
from conftest import IS_NEW, LONG, ask_port, until
from e2b import (
    AuthenticationException,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)

NOBODY = "nonexistingsandbox"


def all_of(paginator):
    found = []
    while paginator.has_next:
        found.extend(paginator.next_items())
    return found


def ids(infos):
    return [info.sandbox_id for info in infos]


def pause(sandbox, memory=True):
    if IS_NEW:
        return sandbox.pause(mode="full" if memory else "filesystem")
    return sandbox.pause(keep_memory=memory)


def test_what_is_known_of_a_sandbox(create):
    before = datetime.datetime.now(datetime.timezone.utc)
    sandbox = create("base", timeout=300, metadata={"who": "me", "k&=": "ä b"}, envs={"A": "1"})
    info = sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id and info.state == SandboxState.RUNNING
    assert info.metadata == {"who": "me", "k&=": "ä b"}
    assert abs((info.started_at - before).total_seconds()) < 60
    assert 240 < (info.end_at - info.started_at).total_seconds() < 360
    assert info.cpu_count >= 1 and info.memory_mb >= 128 and info.template_id
    assert info.envd_version
    assert info.lifecycle["on_timeout"] == "kill" and info.lifecycle["auto_resume"] is False
    assert sandbox.is_running() is True
    assert sandbox.get_host(80).startswith(f"80-{sandbox.sandbox_id}.")
    assert Sandbox.get_info(sandbox.sandbox_id).started_at == info.started_at


def test_what_cannot_be_made_is_refused():
    with pytest.raises(SandboxException, match="404"):
        Sandbox.create("no-such-template")
    with pytest.raises(SandboxException, match="400"):
        Sandbox.create(timeout=-1)
    with pytest.raises(AuthenticationException):
        Sandbox.create(api_key="e2b_" + "0" * 40)
    with pytest.raises(SandboxException, match="501"):
        Sandbox.create(network={"dns_servers": ["10.0.0.1"]} if IS_NEW else {"rules": {"a.example": []}, "allow_out": ["a.example"], "deny_out": ["0.0.0.0/0"]})


def test_killing_twice_says_so(create):
    sandbox = create()
    assert sandbox.kill() is True
    assert sandbox.kill() is False and Sandbox.kill(sandbox.sandbox_id) is False
    assert Sandbox.kill(NOBODY) is False
    assert sandbox.is_running() is False
    assert sandbox.sandbox_id not in ids(all_of(Sandbox.list()))
    for ask in [
        lambda: Sandbox.get_info(sandbox.sandbox_id),
        lambda: Sandbox.connect(sandbox.sandbox_id),
        lambda: sandbox.set_timeout(10),
        lambda: sandbox.pause(),
        lambda: sandbox.fork(),
        lambda: sandbox.create_snapshot(),
        lambda: Sandbox.get_info(NOBODY),
        lambda: Sandbox.connect(NOBODY),
    ]:
        with pytest.raises((SandboxNotFoundException, SandboxException)):
            ask()
    with pytest.raises(TimeoutException):
        sandbox.commands.run("true")


def test_a_kill_ends_what_runs_at_once(create):
    sandbox = create()
    handle = sandbox.commands.run("sleep 300", background=True, timeout=0)
    ended = []

    def wait():
        try:
            handle.wait()
        except Exception as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    sandbox.kill()
    waiting.join(60)
    assert not waiting.is_alive() and isinstance(ended[0], TimeoutException)
    gone = ask_port(sandbox, 49983, "/health")
    assert gone.status_code == 502 and gone.json()["message"] == "The sandbox was not found"


def test_lists_are_filtered_ordered_and_paged(create):
    mark = uuid.uuid4().hex
    first = create(metadata={"mark": mark, "n": "1", "odd key&=": "odd value=&%"})
    second = create(metadata={"mark": mark, "n": "2"})
    of_mark = lambda **more: SandboxQuery(metadata={"mark": mark}, **more)
    assert ids(all_of(Sandbox.list(of_mark()))) == [second.sandbox_id, first.sandbox_id]
    assert ids(all_of(Sandbox.list(SandboxQuery(metadata={"mark": mark, "n": "1"})))) == [first.sandbox_id]
    odd = SandboxQuery(metadata={"mark": mark, "odd key&=": "odd value=&%"})
    assert ids(all_of(Sandbox.list(odd))) == [first.sandbox_id]
    assert all_of(Sandbox.list(SandboxQuery(metadata={"mark": mark, "n": "3"}))) == []
    first.pause()
    states = lambda *state: ids(all_of(Sandbox.list(of_mark(state=list(state)))))
    assert states(SandboxState.PAUSED) == [first.sandbox_id]
    assert states(SandboxState.RUNNING) == [second.sandbox_id]
    assert len(states(SandboxState.RUNNING, SandboxState.PAUSED)) == 2
    pages = Sandbox.list(of_mark(), limit=1)
    assert ids(pages.next_items()) == [second.sandbox_id] and pages.has_next and pages.next_token
    assert ids(pages.next_items()) == [first.sandbox_id]
    assert not pages.has_next and not pages.next_token
    assert ids(all_of(Sandbox.list(of_mark(), limit=1, order="asc"))) == [first.sandbox_id, second.sandbox_id]
    since = second.get_info().started_at
    assert ids(all_of(Sandbox.list(of_mark(started_after=since)))) == [second.sandbox_id]
    assert len(all_of(Sandbox.list(of_mark(template="base")))) == 2


def test_a_deadline_can_be_moved(create):
    sandbox = create(timeout=60)
    sandbox.set_timeout(600)
    left = sandbox.get_info().end_at - datetime.datetime.now(datetime.timezone.utc)
    assert 500 < left.total_seconds() <= 601
    # A connect makes it later, never sooner.
    Sandbox.connect(sandbox.sandbox_id, timeout=10)
    assert (sandbox.get_info().end_at - datetime.datetime.now(datetime.timezone.utc)).total_seconds() > 500
    sandbox.set_timeout(0)
    until("it is gone", lambda: not sandbox.is_running())


def test_a_sandbox_ends_at_its_deadline(create):
    sandbox = create()
    assert sandbox.is_running()
    sandbox.set_timeout(3)
    until("it is gone", lambda: not sandbox.is_running())
    with pytest.raises(SandboxNotFoundException):
        sandbox.get_info()


def test_a_pause_keeps_files_processes_and_identity(create):
    sandbox = create(timeout=LONG)
    sandbox.files.write("/home/user/kept", "file")
    sandbox.commands.run("echo memory > /dev/shm/kept")
    process = sandbox.commands.run("sleep 600", background=True, timeout=0)
    boot = sandbox.files.read("/proc/sys/kernel/random/boot_id")
    assert pause(sandbox) is True
    assert sandbox.is_running() is False
    assert Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED
    assert pause(sandbox) is False
    with pytest.raises(TimeoutException):
        sandbox.commands.run("true")
    again = Sandbox.connect(sandbox.sandbox_id, timeout=LONG)
    assert again.sandbox_id == sandbox.sandbox_id
    # The handle that was there before works as well: its token is the same.
    for handle in [again, sandbox]:
        assert handle.is_running() and handle.files.read("/home/user/kept") == "file"
    assert sandbox.files.read("/dev/shm/kept") == "memory\n"
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") == boot
    assert sandbox.commands.run("echo $E2B_SANDBOX_ID").stdout.strip() == sandbox.sandbox_id
    assert process.pid in [found.pid for found in sandbox.commands.list()]
    # The guest's own time service steps the clock at its next look.
    def clock_is_right():
        before = time.time()
        said = float(sandbox.commands.run("date +%s.%N").stdout)
        return before - 2 < said < time.time() + 2

    until("the clock is right", clock_is_right)
    assert sandbox.get_info().state == SandboxState.RUNNING


def test_a_pause_of_the_disk_alone_boots_anew(create):
    sandbox = create(timeout=LONG)
    sandbox.files.write("/home/user/kept", "file")
    boot = sandbox.files.read("/proc/sys/kernel/random/boot_id")
    assert pause(sandbox, memory=False) is True
    sandbox.connect(timeout=LONG)
    assert sandbox.files.read("/home/user/kept") == "file"
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") != boot


@pytest.mark.skipif(not IS_NEW, reason="newer than this SDK")
def test_a_whole_pause_may_be_booted_anew(create):
    sandbox = create(timeout=LONG)
    sandbox.files.write("/home/user/kept", "file")
    boot = sandbox.files.read("/proc/sys/kernel/random/boot_id")
    assert pause(sandbox) is True
    sandbox.connect(timeout=LONG, on_resume="reboot")
    assert sandbox.files.read("/home/user/kept") == "file"
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") != boot


def test_a_sandbox_may_pause_at_its_deadline_and_wake_by_traffic(create):
    sandbox = create(lifecycle={"on_timeout": "pause", "auto_resume": True})
    sandbox.files.write("/home/user/kept", "file")
    lifecycle = sandbox.get_info().lifecycle
    assert lifecycle["on_timeout"] == "pause" and lifecycle["auto_resume"] is True
    sandbox.set_timeout(3)
    until("it is paused", lambda: Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED)
    assert sandbox.files.read("/home/user/kept") == "file"
    assert sandbox.get_info().state == SandboxState.RUNNING


def test_a_sandbox_that_paused_at_its_deadline_stays_so_unless_told(create):
    sandbox = create(timeout=4, lifecycle={"on_timeout": "pause"})
    until("it is paused", lambda: Sandbox.get_info(sandbox.sandbox_id).state == SandboxState.PAUSED)
    assert sandbox.is_running() is False
    assert ask_port(sandbox, 49983, "/health").status_code == 502
    sandbox.connect(timeout=LONG)
    assert sandbox.is_running() is True
    assert sandbox.kill() is True


def test_a_create_that_is_sent_again_makes_no_second_one(create):
    if not IS_NEW:
        pytest.skip("newer than this SDK")
    key = uuid.uuid4().hex
    first = create(idempotency_key=key)
    second = Sandbox.create(timeout=LONG, idempotency_key=key)
    assert second.sandbox_id == first.sandbox_id


def test_metrics_are_there_soon(create):
    sandbox = create()
    found = until("a sample", sandbox.get_metrics)
    sample = found[-1]
    assert sample.cpu_count >= 1 and sample.mem_total > 0 and 0 < sample.mem_used <= sample.mem_total
    assert sample.disk_total > 0 and 0 < sample.disk_used <= sample.disk_total
    assert 0 <= sample.cpu_used_pct <= 100 * sample.cpu_count + 1
    start, end = sandbox.get_info().started_at, datetime.datetime.now(datetime.timezone.utc)
    for metric in sandbox.get_metrics(start=start - datetime.timedelta(seconds=5), end=end):
        assert start.timestamp() - 6 <= metric.timestamp.timestamp() <= end.timestamp() + 1
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    assert sandbox.get_metrics(start=long_ago, end=long_ago + datetime.timedelta(hours=1)) == []


def test_ports_of_a_closed_sandbox_want_its_token(create):
    sandbox = create(network={"allow_public_traffic": False, "mask_request_host": "masked:${PORT}"})
    assert sandbox.traffic_access_token
    sandbox.files.write(
        "/tmp/s.py",
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(self.headers['Host'].encode())\n"
        "h.HTTPServer(('', 8080), H).serve_forever()\n",
    )
    sandbox.commands.run("python3 /tmp/s.py", background=True, timeout=0)
    token = {"E2B-Traffic-Access-Token": sandbox.traffic_access_token}
    until("it answers", lambda: ask_port(sandbox, 8080, headers=token).status_code == 200)
    assert ask_port(sandbox, 8080, headers=token).text == "masked:8080"
    assert ask_port(sandbox, 8080).status_code == 403
    assert ask_port(sandbox, 8080, headers={"E2B-Traffic-Access-Token": "x"}).status_code == 403
    assert sandbox.commands.run("echo the agent needs none").exit_code == 0
    info = sandbox.get_info()
    assert info.network["allow_public_traffic"] is False


def test_a_network_policy_is_told_and_can_be_changed(create):
    # Tests send nothing beyond this machine: that a policy holds is tested where packets are.
    sandbox = create(allow_internet_access=False, network={"deny_out": ["10.0.0.0/8"]})
    info = sandbox.get_info()
    assert info.allow_internet_access is False and info.network["deny_out"] == ["10.0.0.0/8"]
    sandbox.update_network({"allow_out": ["192.0.2.1"], "deny_out": ["0.0.0.0/0"]})
    network = sandbox.get_info().network
    assert network["allow_out"] == ["192.0.2.1"] and network["deny_out"] == ["0.0.0.0/0"]
    with pytest.raises(SandboxException, match="400"):
        sandbox.update_network({"allow_out": ["example.com"]})
    with pytest.raises(SandboxException, match="400"):
        sandbox.update_network({"deny_out": ["example.com"]})


def test_all_of_this_was_with_the_service_of_this_test():
    assert os.environ["E2B_API_URL"].startswith("http://127.0.0.1:")
