"""Terminals."""

import pytest
from conftest import IS_NEW
from e2b import CommandExitException, NotFoundException, PtySize, SandboxException


def run_in(sandbox, text, **options):
    """Types a line into a new terminal and returns all that it shows until the shell ends."""
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), **options)
    sandbox.pty.send_stdin(terminal.pid, f"{text}\nexit\n".encode())
    shown = []
    terminal.wait(on_pty=shown.append)
    return b"".join(shown).decode(errors="replace")


def test_a_terminal_shows_what_a_command_prints(sandbox):
    shown = run_in(sandbox, "echo $((40+2))-$OWN; tput cols; tty; pwd; echo $TERM", envs={"OWN": "mine"}, cwd="/tmp")
    assert "42-mine" in shown and "80" in shown and "/dev/pts/" in shown
    assert "/tmp" in shown and "xterm-256color" in shown


def test_a_terminal_is_its_users(sandbox):
    assert "uid=0(root)" in run_in(sandbox, "id", user="root")
    assert "(user)" in run_in(sandbox, "id")


def test_a_terminal_can_be_resized(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.resize(terminal.pid, PtySize(rows=30, cols=123))
    sandbox.pty.send_stdin(terminal.pid, b"echo size=$(stty size)\nexit\n")
    shown = []
    terminal.wait(on_pty=shown.append)
    assert b"size=30 123" in b"".join(shown)
    with pytest.raises((NotFoundException, SandboxException)):
        sandbox.pty.resize(999999, PtySize(rows=1, cols=1))


def test_a_terminal_can_be_killed_in_the_middle_of_a_burst(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    for n in range(50):
        sandbox.pty.send_stdin(terminal.pid, f"echo {n}\n".encode())
    assert sandbox.pty.kill(terminal.pid) is True
    assert sandbox.pty.kill(terminal.pid) is False
    with pytest.raises(CommandExitException):
        terminal.wait()


def test_a_terminal_that_was_left_can_be_found_again(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), envs={"KEPT": "yes"})
    terminal.disconnect()
    if not hasattr(sandbox.pty, "connect"):
        pytest.skip("this SDK cannot")
    again = sandbox.pty.connect(terminal.pid)
    sandbox.pty.send_stdin(terminal.pid, b"echo kept=$KEPT\nexit\n")
    shown = []
    again.wait(on_pty=shown.append)
    assert b"kept=yes" in b"".join(shown)


@pytest.mark.skipif(not IS_NEW, reason="this generation of the SDK streams no input")
def test_typing_can_be_a_stream(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.stream_input(terminal.pid, iter([b"echo one=", b"$((1))\n", b"exit\n"]))
    shown = []
    terminal.wait(on_pty=shown.append)
    assert b"one=1" in b"".join(shown)
