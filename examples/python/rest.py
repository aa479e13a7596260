#!/usr/bin/env python3
"""Uses Wrenn's REST API with Python's standard library only.

Creates a sandbox, runs a command, writes and reads a file, pauses, resumes and destroys the
sandbox. Settings: WRENN_API_URL (default http://127.0.0.1:8000) and WRENN_API_KEY.
"""

import json
import os
import sys
import urllib.error
import urllib.request
import uuid

API = os.environ.get("WRENN_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("WRENN_API_KEY") or sys.exit("set WRENN_API_KEY")

# A file in memory: it is still there after the resume, because a pause saves memory, too.
NOTE = "/dev/shm/note.txt"


def send(method, path, body=None, content_type="application/json"):
    """Sends a request and returns the body of the response."""
    headers = {"X-API-Key": KEY, "Content-Type": content_type}
    request = urllib.request.Request(f"{API}/v1{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        # Every error has the form {"error": {"code": …, "message": …}}.
        sys.exit(f"{method} {path}: {error.code} {error.read().decode()}")


def call(method, path, body=None):
    """Sends JSON and returns the JSON of the response, or None if there is none."""
    reply = send(method, path, None if body is None else json.dumps(body).encode())
    return json.loads(reply) if reply else None


def write_file(sandbox, path, content):
    """Writes a file. The part `path` of the form must precede the part `file`."""
    boundary = uuid.uuid4().hex
    disposition = f"--{boundary}\r\nContent-Disposition: form-data; name="
    form = (
        f'{disposition}"path"\r\n\r\n{path}\r\n'
        f'{disposition}"file"; filename="file"\r\n\r\n'
    ).encode()
    form += content + f"\r\n--{boundary}--\r\n".encode()
    content_type = f"multipart/form-data; boundary={boundary}"
    send("POST", f"/sandboxes/{sandbox}/files/write", form, content_type)


def read_file(sandbox, path):
    """Returns the content of a file."""
    body = json.dumps({"path": path}).encode()
    return send("POST", f"/sandboxes/{sandbox}/files/read", body)


def run(sandbox, cmd, *args):
    """Runs a command and returns its output."""
    result = call("POST", f"/sandboxes/{sandbox}/exec", {"cmd": cmd, "args": args})
    if result["exit_code"] != 0:
        sys.exit(f"{cmd}: exit code {result['exit_code']}: {result['stderr']}")
    return result["stdout"].strip()


def main():
    # If this program dies, the sandbox is destroyed when it was idle for `timeout_sec`.
    sandbox = call("POST", "/sandboxes", {"timeout_sec": 300, "on_timeout": "kill"})["id"]
    print("created", sandbox)
    try:
        # Commands and file calls wait for a sandbox that is still booting.
        print("ran:", run(sandbox, "sh", "-c", "echo $((6 * 7))"))
        write_file(sandbox, NOTE, b"hello")
        print("read:", read_file(sandbox, NOTE).decode())
        print(call("POST", f"/sandboxes/{sandbox}/pause")["status"])
        print(call("POST", f"/sandboxes/{sandbox}/resume")["status"])
        print("still there:", run(sandbox, "cat", NOTE))
    finally:
        call("DELETE", f"/sandboxes/{sandbox}")
    print("destroyed")


if __name__ == "__main__":
    main()
