"""Stands in for the code interpreter's server in a guest: the same routes and stream, and `exec` for a kernel."""

import contextlib
import http.server
import io
import json
import os
import time
import traceback

contexts = {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self):
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def say(self, **event):
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def do_GET(self):
        self.answer(list(contexts.values()))

    def do_DELETE(self):
        contexts.pop(self.path.split("/")[2], None)
        self.answer({})

    def do_POST(self):
        if self.path == "/contexts":
            asked = self.body()
            context = {"id": f"c{len(contexts)}", "language": asked.get("language") or "python", "cwd": asked.get("cwd") or "/"}
            contexts[context["id"]] = context
            self.answer(context)
        elif self.path == "/execute":
            self.execute(self.body())
        else:
            self.answer({}, 404)

    def execute(self, asked):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        os.environ.update(asked.get("env_vars") or {})
        printed = io.StringIO()
        self.say(type="number_of_executions", execution_count=1)
        try:
            with contextlib.redirect_stdout(printed):
                if asked["code"] == "forever":
                    self.forever()
                value = eval(asked["code"])
            self.say(type="stdout", text=printed.getvalue(), timestamp=0)
            self.say(type="result", text=repr(value), is_main_result=True)
        except OSError:
            with open("/tmp/aborted", "w") as file:
                file.write("yes")
            raise
        except Exception as error:
            self.say(type="error", name=type(error).__name__, value=str(error), traceback=traceback.format_exc())
        self.wfile.write(b"0\r\n\r\n")

    def forever(self):
        while True:
            self.say(type="stdout", text=".", timestamp=0)
            time.sleep(0.05)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", 49999), Handler).serve_forever()
