#!/usr/bin/env bash
# Uses Wrenn's REST API with curl (7.82 or newer); python3 reads fields of JSON responses.
#
# Creates a sandbox, runs a command, writes and reads a file, pauses, resumes and destroys the
# sandbox. Settings: WRENN_API_URL (default http://127.0.0.1:8000) and WRENN_API_KEY.
set -euo pipefail

api=${WRENN_API_URL:-http://127.0.0.1:8000}/v1
key=${WRENN_API_KEY:?set WRENN_API_KEY}

# A file in memory: it is still there after the resume, because a pause saves memory, too.
note=/dev/shm/note.txt

# call PATH [CURL-OPTION…]: sends a request and prints the body of the response. The key is passed
# on standard input, because other users can see the arguments of a process.
call() {
  local path=$1 body
  shift
  body=$(curl -sS --fail-with-body --max-time 120 -K - "$@" "$api$path" \
    <<<"header = \"X-API-Key: $key\"") || {
    # Every error has the form {"error": {"code": …, "message": …}}.
    echo "$path: $body" >&2
    return 1
  }
  echo "$body"
}

# field NAME: prints a field of the JSON object on standard input.
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

sandbox=
finish() {
  local code=$?
  if [ -n "$sandbox" ]; then call "/sandboxes/$sandbox" -X DELETE >/dev/null || code=1; fi
  if [ "$code" = 0 ]; then echo destroyed; fi
  exit "$code"
}
trap finish EXIT

# If this program dies, the sandbox is destroyed when it was idle for `timeout_sec`.
reply=$(call /sandboxes --json '{"timeout_sec":300,"on_timeout":"kill"}')
sandbox=$(field id <<<"$reply")
echo "created $sandbox"

# Commands and file calls wait for a sandbox that is still booting.
reply=$(call "/sandboxes/$sandbox/exec" --json '{"cmd":"sh","args":["-c","echo $((6 * 7))"]}')
echo "ran: $(field stdout <<<"$reply")"

# The part `path` of the form must precede the part `file`.
call "/sandboxes/$sandbox/files/write" -F "path=$note" -F 'file=hello;filename=file' >/dev/null
reply=$(call "/sandboxes/$sandbox/files/read" --json "{\"path\":\"$note\"}")
echo "read: $reply"

reply=$(call "/sandboxes/$sandbox/pause" -X POST)
field status <<<"$reply"
reply=$(call "/sandboxes/$sandbox/resume" -X POST)
field status <<<"$reply"

reply=$(call "/sandboxes/$sandbox/exec" --json "{\"cmd\":\"cat\",\"args\":[\"$note\"]}")
echo "still there: $(field stdout <<<"$reply")"
