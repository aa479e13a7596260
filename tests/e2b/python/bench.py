"""What a user of the SDK waits for, as JSON: medians of a create, its first command, a later one, and MB/s of a file up and down."""

import json
import time
from statistics import median

from e2b import Sandbox

CREATES = 5
COMMANDS = 50
FILES = 3
FILE_BYTES = 64 << 20


def timed(work):
    """How long it took, seconds, and what came of it."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def megabytes_a_second(seconds):
    return round(FILE_BYTES / 1e6 / seconds, 1)


def creates():
    made, first = [], []
    for _ in range(CREATES):
        seconds, sandbox = timed(lambda: Sandbox.create(timeout=300))
        made.append(seconds)
        first.append(timed(lambda: sandbox.commands.run("true"))[0])
        sandbox.kill()
    return median(made), median(first)


def main():
    create, first = creates()
    sandbox = Sandbox.create(timeout=900)
    try:
        command = median(timed(lambda: sandbox.commands.run("true"))[0] for _ in range(COMMANDS))
        content = bytes(range(256)) * (FILE_BYTES // 256)
        up, down = [], []
        for _ in range(FILES):
            up.append(timed(lambda: sandbox.files.write("/home/user/bench", content, request_timeout=300))[0])
            seconds, back = timed(lambda: sandbox.files.read("/home/user/bench", format="bytes", request_timeout=300))
            assert back == content
            down.append(seconds)
    finally:
        sandbox.kill()
    report = {
        "create_ms": round(create * 1000, 1),
        "first_command_ms": round(first * 1000, 1),
        "command_ms": round(command * 1000, 1),
        "upload_mb_s": megabytes_a_second(median(up)),
        "download_mb_s": megabytes_a_second(median(down)),
        "file_mib": FILE_BYTES >> 20,
    }
    print(json.dumps(report))


main()
