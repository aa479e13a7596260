// Uses Wrenn's REST API with Node's own `fetch` (node 18 or newer), without packages.
//
// Creates a sandbox, runs a command, writes and reads a file, pauses, resumes and destroys the
// sandbox. Settings: WRENN_API_URL (default http://127.0.0.1:8000) and WRENN_API_KEY.

const api = process.env.WRENN_API_URL ?? 'http://127.0.0.1:8000'
const key = process.env.WRENN_API_KEY
if (!key) throw new Error('set WRENN_API_KEY')

// A file in memory: it is still there after the resume, because a pause saves memory, too.
const note = '/dev/shm/note.txt'

// Sends a request. An object is sent as JSON, a form as it is.
async function send(method, path, body) {
  const headers = { 'X-API-Key': key }
  if (body && !(body instanceof FormData)) {
    headers['Content-Type'] = 'application/json'
    body = JSON.stringify(body)
  }
  const response = await fetch(`${api}/v1${path}`, { method, headers, body })
  if (!response.ok) {
    // Every error has the form {"error": {"code": …, "message": …}}.
    throw new Error(`${method} ${path}: ${response.status} ${await response.text()}`)
  }
  return response
}

async function call(method, path, body) {
  return (await send(method, path, body)).json()
}

// Writes a file. The part `path` of the form must precede the part `file`.
async function writeFile(sandbox, path, content) {
  const form = new FormData()
  form.append('path', path)
  form.append('file', new Blob([content]), 'file')
  await send('POST', `/sandboxes/${sandbox}/files/write`, form)
}

async function readFile(sandbox, path) {
  return (await send('POST', `/sandboxes/${sandbox}/files/read`, { path })).text()
}

// Runs a command and returns its output.
async function run(sandbox, cmd, ...args) {
  const result = await call('POST', `/sandboxes/${sandbox}/exec`, { cmd, args })
  if (result.exit_code !== 0) {
    throw new Error(`${cmd}: exit code ${result.exit_code}: ${result.stderr}`)
  }
  return result.stdout.trim()
}

// If this program dies, the sandbox is destroyed when it was idle for `timeout_sec`.
const { id } = await call('POST', '/sandboxes', { timeout_sec: 300, on_timeout: 'kill' })
console.log('created', id)
try {
  // Commands and file calls wait for a sandbox that is still booting.
  console.log('ran:', await run(id, 'sh', '-c', 'echo $((6 * 7))'))
  await writeFile(id, note, 'hello')
  console.log('read:', await readFile(id, note))
  console.log((await call('POST', `/sandboxes/${id}/pause`)).status)
  console.log((await call('POST', `/sandboxes/${id}/resume`)).status)
  console.log('still there:', await run(id, 'cat', note))
} finally {
  await send('DELETE', `/sandboxes/${id}`)
}
console.log('destroyed')
