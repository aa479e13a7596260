"""Commands: how they are started, fed, watched and ended."""

import threading
import time

import pytest
from conftest import IS_NEW, ask_port, until
from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)


def test_a_command_gives_its_output_and_exit_code(sandbox):
    result = sandbox.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo so far; exit 3")
    assert failed.value.exit_code == 3
    assert failed.value.stdout == "so far\n"
    assert "exit status 3" in str(failed.value.error)


def test_special_characters_and_many_lines_arrive(sandbox):
    text = "!@#$%^&*()_+ \"quoted\" \\ äöü 漢字 🎉"
    assert sandbox.commands.run(f"cat <<'EOF'\n{text}\nEOF").stdout == text + "\n"
    lines = "".join(f"{n}\n" for n in range(1, 20001))
    assert sandbox.commands.run("seq 20000").stdout == lines


def test_broken_utf8_does_not_break_the_stream(sandbox):
    result = sandbox.commands.run(r"printf 'a\xff\xfeb'; printf '\xe2\x82'; sleep 0.2; printf '\xac'; printf '\xe2'")
    assert result.stdout.startswith("a") and "b€" in result.stdout
    assert result.stdout.endswith("\ufffd")


def test_a_large_output_is_whole(sandbox):
    result = sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x | tee >(md5sum | cut -c1-32 >&2)")
    assert len(result.stdout) == 3_000_000 and set(result.stdout) == {"x"}


def test_output_is_told_while_it_comes(sandbox):
    out, err = [], []

    def on_stdout(text):
        # Not all at the end: it goes on when its first words were heard.
        if not out:
            sandbox.files.write("/tmp/heard", "")
        out.append(text)

    result = sandbox.commands.run(
        "for n in 1 2 3; do echo $n; echo e$n >&2; until [ -e /tmp/heard ]; do sleep 0.05; done; sleep 0.3; done",
        on_stdout=on_stdout,
        on_stderr=err.append,
    )
    assert "".join(out) == result.stdout == "1\n2\n3\n"
    assert "".join(err) == result.stderr == "e1\ne2\ne3\n"


def test_variables_of_the_sandbox_and_of_the_command(sandbox):
    run = sandbox.commands.run
    assert run("echo $GIVEN").stdout == "at create\n"
    assert run("echo $GIVEN-$OWN", envs={"GIVEN": "anew", "OWN": "x y"}).stdout == "anew-x y\n"
    assert run("echo $GIVEN-$OWN").stdout == "at create-\n"
    assert run("echo $E2B_SANDBOX-$E2B_SANDBOX_ID").stdout == f"true-{sandbox.sandbox_id}\n"
    assert run("echo $HOME-$USER-$LOGNAME").stdout == "/home/user-user-user\n"
    python = run("python3 -c 'import os; print(os.environ[\"OWN\"])'", envs={"OWN": "1"})
    assert python.stdout == "1\n"


def test_a_command_runs_as_its_user(sandbox):
    run = sandbox.commands.run
    assert run("id -un; pwd").stdout == "user\n/home/user\n"
    assert run("id -un; pwd", user="root").stdout == "root\n/root\n"
    assert run("sudo id -un").stdout == "root\n"
    with pytest.raises(AuthenticationException, match="invalid username: 'nobody-here'"):
        run("true", user="nobody-here")


def test_a_command_runs_in_its_directory(sandbox):
    assert sandbox.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    with pytest.raises(InvalidArgumentException, match="cwd '/no/such' does not exist"):
        sandbox.commands.run("pwd", cwd="/no/such")


def test_a_command_has_a_priority_of_its_own(sandbox):
    assert sandbox.commands.run("nice; cat /proc/self/oom_score_adj").stdout == "0\n100\n"


def test_a_command_that_takes_too_long_is_ended(sandbox):
    began = time.monotonic()
    with pytest.raises(TimeoutException):
        # Enough for a login shell on a busy machine.
        sandbox.commands.run("echo $$ > /tmp/slow; exec sleep 300", timeout=6)
    assert time.monotonic() - began < 60
    pid = sandbox.files.read("/tmp/slow").strip()
    until("it is gone", lambda: sandbox.commands.run(f"kill -0 {pid} 2>/dev/null; echo $?").stdout == "1\n")


def test_a_time_limit_ends_all_descendants(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("(setsid sleep 311 &); setsid sleep 311 & sleep 311", timeout=6)
    until("all are gone", lambda: sandbox.commands.run("pgrep -fx 'sleep 311' || echo none").stdout == "none\n")


def test_a_command_ends_although_its_child_holds_the_output(sandbox):
    began = time.monotonic()
    result = sandbox.commands.run("sleep 300 & echo $!")
    assert time.monotonic() - began < 30
    pid = result.stdout.strip()
    assert sandbox.commands.run(f"kill -0 {pid}; echo $?").stdout == "0\n"
    sandbox.commands.run(f"kill {pid}")


def test_a_command_in_the_background_goes_on(sandbox):
    handle = sandbox.commands.run("echo begun; sleep 0.5; echo done", background=True)
    assert handle.pid > 0
    assert sandbox.commands.run("echo meanwhile").stdout == "meanwhile\n"
    result = handle.wait()
    assert result.stdout == "begun\ndone\n" and result.exit_code == 0
    failing = sandbox.commands.run("exit 7", background=True)
    with pytest.raises(CommandExitException) as failed:
        failing.wait()
    assert failed.value.exit_code == 7


def test_a_running_command_is_listed_by_the_pid_it_has_in_the_guest(sandbox):
    handle = sandbox.commands.run("sleep 300", background=True, envs={"A": "1"}, cwd="/tmp")
    found = [process for process in sandbox.commands.list() if process.pid == handle.pid]
    assert len(found) == 1
    process = found[0]
    assert process.cmd == "/bin/bash" and process.args == ["-l", "-c", "sleep 300"]
    assert process.envs["A"] == "1" and process.cwd == "/tmp"
    sandbox.commands.run(f"kill -0 {handle.pid}")
    assert handle.kill() is True
    assert handle.pid not in [process.pid for process in sandbox.commands.list()]
    with pytest.raises(CommandExitException) as killed:
        handle.wait()
    assert "killed" in str(killed.value.error)


def test_killing_what_does_not_run_says_so(sandbox):
    assert sandbox.commands.kill(999999) is False
    handle = sandbox.commands.run("sleep 300", background=True)
    assert sandbox.commands.kill(handle.pid) is True
    assert sandbox.commands.kill(handle.pid) is False


def test_a_client_that_leaves_does_not_end_the_command(sandbox):
    handle = sandbox.commands.run("until [ -e /tmp/back ]; do sleep 0.05; done; echo late", background=True)
    handle.disconnect()
    again = sandbox.commands.connect(handle.pid)
    assert again.pid == handle.pid
    sandbox.files.write("/tmp/back", "")
    assert again.wait().stdout == "late\n"
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(999999)


def test_two_clients_see_the_same_output(sandbox):
    counting = "until [ -e /tmp/two ]; do sleep 0.05; done; for n in 1 2 3; do echo $n; done"
    first = sandbox.commands.run(counting, background=True)
    second = sandbox.commands.connect(first.pid)
    sandbox.files.write("/tmp/two", "")
    results = []
    waiting = threading.Thread(target=lambda: results.append(second.wait().stdout))
    waiting.start()
    assert first.wait().stdout == "1\n2\n3\n"
    waiting.join(60)
    assert results == ["1\n2\n3\n"]


def test_input_arrives_and_ends(sandbox):
    handle = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "Hello ")
    sandbox.commands.send_stdin(handle.pid, "wörld 🎉\n")
    sandbox.commands.send_stdin(handle.pid, "")
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "Hello wörld 🎉\n"
    large = sandbox.commands.run("wc -c", background=True, stdin=True)
    for _ in range(10):
        sandbox.commands.send_stdin(large.pid, "x" * 100_000)
    sandbox.commands.close_stdin(large.pid)
    assert large.wait().stdout.strip() == "1000000"


def test_a_command_has_no_input_unless_it_was_asked_for(sandbox):
    assert sandbox.commands.run("cat; echo end").stdout == "end\n"
    handle = sandbox.commands.run("sleep 300", background=True, stdin=False)
    with pytest.raises(SandboxException):
        sandbox.commands.send_stdin(handle.pid, "x")
    handle.kill()


@pytest.mark.skipif(not IS_NEW, reason="this generation of the SDK streams no input")
def test_input_can_be_a_stream(sandbox):
    handle = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.stream_input(handle.pid, (f"line {n}\n" for n in range(50)))
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "".join(f"line {n}\n" for n in range(50))


def test_many_commands_run_at_once(sandbox):
    handles = [sandbox.commands.run(f"sleep 1; echo {n}", background=True) for n in range(8)]
    assert [handle.wait().stdout for handle in handles] == [f"{n}\n" for n in range(8)]


def test_a_server_on_loopback_is_reachable_from_outside(sandbox):
    code = (
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        body = (self.path + ' ' + self.headers['Host']).encode()\n"
        "        self.send_response(200)\n"
        "        self.send_header('Content-Length', str(len(body)))\n"
        "        self.end_headers()\n"
        "        self.wfile.write(body)\n"
        "h.ThreadingHTTPServer(('127.0.0.1', 8123), H).serve_forever()\n"
    )
    sandbox.files.write("/tmp/server.py", code)
    closed = ask_port(sandbox, 8123)
    assert closed.status_code == 502 and closed.json()["message"] == "The sandbox is running but port is not open"
    assert closed.json()["port"] == 8123
    server = sandbox.commands.run("python3 /tmp/server.py", background=True, timeout=0)
    answer = until("it answers", lambda: (r := ask_port(sandbox, 8123, "/a%20b/?q=1")).status_code == 200 and r)
    assert answer.text.startswith("/a%20b/?q=1 ")
    host = f"8123-{sandbox.sandbox_id}.localhost"
    named = ask_port(sandbox, 1, headers={"Host": host})
    assert named.text == f"/ {host}"
    server.kill()
    until("it is closed", lambda: ask_port(sandbox, 8123).status_code == 502)


def test_internal_calls_of_the_guest_agent_are_closed(sandbox):
    for path in ["/init", "//init", "/%69nit", "/snapshot/prepare", "/freeze"]:
        assert ask_port(sandbox, 49983, path, method="POST").status_code == 404, path
    assert ask_port(sandbox, 49983, "/health").status_code == 204


def test_a_hog_of_memory_is_killed_and_nobody_else(sandbox):
    other = sandbox.commands.run("sleep 300", background=True)
    hog = "python3 -c 'b = []\nwhile True: b.append(b\"x\" * (8 << 20))'"
    with pytest.raises(CommandExitException) as ended:
        sandbox.commands.run(hog, timeout=120)
    # By the signal, or as the shell tells of it.
    assert ended.value.exit_code in (-1, 137)
    assert other.pid in [process.pid for process in sandbox.commands.list()]
    assert sandbox.commands.run("echo alive").stdout == "alive\n"
    assert other.kill() is True
