"""Sandboxes for the scenarios. The service is told by E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY, as a user would.

`sandbox` is one for all tests of a file, for those that leave nothing others mind. `create` makes one for a test of its own;
all are killed at the end. Two run at a time at most.
"""

import importlib.metadata
import os
import time

import httpx
import pytest
from e2b import Sandbox

VERSION = tuple(int(part) for part in importlib.metadata.version("e2b").split(".")[:2])
#: What came with the generation that creates by POST /v2/sandboxes.
IS_NEW = VERSION >= (2, 63)
#: Alive for longer than any file takes.
LONG = 900


@pytest.fixture(scope="session")
def sandbox():
    sandbox = Sandbox.create(timeout=LONG, envs={"GIVEN": "at create"}, metadata={"of": "all tests"})
    yield sandbox
    sandbox.kill()


@pytest.fixture
def create():
    """Makes sandboxes, and kills them whatever happens."""
    made = []

    def make(*args, **options):
        options.setdefault("timeout", LONG)
        sandbox = Sandbox.create(*args, **options)
        made.append(sandbox.sandbox_id)
        return sandbox

    make.adopt = lambda sandbox: made.append(sandbox.sandbox_id) or sandbox
    yield make
    for sandbox_id in made:
        Sandbox.kill(sandbox_id)


def until(what, ask, deadline=60.0):
    """Asks until there is an answer that counts."""
    end = time.monotonic() + deadline
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < end, f"{what}: not within {deadline} s, last {answer!r}"
        time.sleep(0.05)


def port_url(path="/"):
    return os.environ["E2B_SANDBOX_URL"] + path


def ask_port(sandbox, port, path="/", headers=None, method="GET", **options):
    """A request to a port of a sandbox, as the routing headers name it."""
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(port), **(headers or {})}
    return httpx.request(method, port_url(path), headers=headers, timeout=60, **options)
