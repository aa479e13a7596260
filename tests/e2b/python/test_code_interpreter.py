"""The code interpreter's SDK, which speaks to port 49999 of its sandbox; a stand-in serves there."""

import pathlib

import pytest
from conftest import LONG, ask_port, until

Sandbox = pytest.importorskip("e2b_code_interpreter").Sandbox


@pytest.fixture(scope="module", params=["public", "closed"])
def interpreter(request):
    network = {"allow_public_traffic": False} if request.param == "closed" else None
    sandbox = Sandbox.create("base", timeout=LONG, network=network)
    server = pathlib.Path(__file__).with_name("code_server.py").read_text()
    sandbox.files.write("/home/user/server.py", server)
    sandbox.commands.run("python3 /home/user/server.py", background=True, timeout=0)
    token = {"E2B-Traffic-Access-Token": sandbox.traffic_access_token or ""}
    until("it answers", lambda: ask_port(sandbox, 49999, "/contexts", token).status_code == 200)
    yield sandbox
    sandbox.kill()


def test_code_runs_and_its_result_streams_back(interpreter):
    said = []
    execution = interpreter.run_code("print('hi') or 6 * 7", on_stdout=lambda message: said.append(message.line))
    assert execution.text == "42" and execution.logs.stdout == ["hi\n"] and said == ["hi\n"]
    failed = interpreter.run_code("1 / 0")
    assert failed.error.name == "ZeroDivisionError"
    assert interpreter.run_code("os.environ['GIVEN']", envs={"GIVEN": "x"}).text == "'x'"


def test_contexts(interpreter):
    context = interpreter.create_code_context(cwd="/tmp", language="python")
    assert context.cwd == "/tmp"
    assert context.id in [found.id for found in interpreter.list_code_contexts()]
    assert interpreter.run_code("1", context=context).text == "1"
    interpreter.remove_code_context(context)


def test_a_client_that_gives_up_is_seen_in_the_guest(interpreter):
    with pytest.raises(Exception):
        interpreter.run_code("forever", timeout=5)
    until("the server saw it", lambda: interpreter.files.exists("/tmp/aborted"))
