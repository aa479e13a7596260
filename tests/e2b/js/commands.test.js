// Commands and terminals.
import assert from 'node:assert/strict'
import { before, test } from 'node:test'
import { CommandExitError, InvalidArgumentError, NotFoundError, TimeoutError } from 'e2b'
import { askPort, create, until } from './support.js'

let sandbox
before(async () => {
  sandbox = await create({ envs: { GIVEN: 'at create' } })
})

test('a command gives its output and exit code', async () => {
  const result = await sandbox.commands.run('echo out; echo err >&2')
  assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
  await assert.rejects(sandbox.commands.run('exit 3'), (error) => error instanceof CommandExitError && error.exitCode === 3)
})

test('output is told while it comes, and broken UTF-8 does not break it', async () => {
  const said = []
  const result = await sandbox.commands.run("printf 'a\\xffb'; sleep 0.3; printf '\\xe2\\x82'; sleep 0.3; printf '\\xac'", {
    onStdout: (text) => void said.push(text),
  })
  assert.equal(said.join(''), result.stdout)
  assert.match(result.stdout, /^a.+b€$/)
})

test('variables, user and directory', async () => {
  const run = async (line, opts) => (await sandbox.commands.run(line, opts)).stdout
  assert.equal(await run('echo $GIVEN-$OWN', { envs: { OWN: 'x y' } }), 'at create-x y\n')
  assert.equal(await run('id -un; pwd'), 'user\n/home/user\n')
  assert.equal(await run('id -un; pwd', { user: 'root', cwd: '/tmp' }), 'root\n/tmp\n')
  await assert.rejects(run('pwd', { cwd: '/no/such' }), InvalidArgumentError)
})

test('a command that takes too long is ended', async () => {
  await assert.rejects(sandbox.commands.run('exec sleep 301', { timeoutMs: 1500 }), TimeoutError)
  await until('it is gone', async () => (await sandbox.commands.run('pgrep -f "sleep 30[1]" || echo none')).stdout === 'none\n')
})

test('a command ends although its child holds the output', async () => {
  const { stdout } = await sandbox.commands.run('sleep 302 & echo $!', { timeoutMs: 30_000 })
  assert.equal((await sandbox.commands.run(`kill ${stdout.trim()}; echo $?`)).stdout, '0\n')
})

test('a background command is fed, left, found again and killed', async () => {
  const handle = await sandbox.commands.run('cat', { background: true, stdin: true })
  await sandbox.commands.sendStdin(handle.pid, 'one\n')
  await until('it comes back', () => handle.stdout === 'one\n')
  await handle.disconnect()
  const again = await sandbox.commands.connect(handle.pid)
  await sandbox.commands.sendStdin(handle.pid, 'two\n')
  await sandbox.commands.closeStdin(handle.pid)
  assert.equal((await again.wait()).stdout, 'two\n')
  const killed = await sandbox.commands.run('sleep 300', { background: true, timeoutMs: 0 })
  assert.ok((await sandbox.commands.list()).some((process) => process.pid === killed.pid))
  assert.equal(await killed.kill(), true)
  assert.equal(await sandbox.commands.kill(killed.pid), false)
  await assert.rejects(killed.wait(), CommandExitError)
  await assert.rejects(sandbox.commands.connect(999999), NotFoundError)
})

test('commands run at once', async () => {
  const numbers = [...Array(8).keys()]
  const results = await Promise.all(numbers.map((n) => sandbox.commands.run(`sleep 0.5; echo ${n}`)))
  assert.deepEqual(results.map((result) => result.stdout), numbers.map((n) => `${n}\n`))
})

test('a terminal shows, is resized, left and found again', async () => {
  let shown = ''
  const onData = (bytes) => void (shown += new TextDecoder().decode(bytes))
  const type = (pid, text) => sandbox.pty.sendInput(pid, new TextEncoder().encode(text))
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData, envs: { OWN: 'mine' } })
  await sandbox.pty.resize(terminal.pid, { cols: 101, rows: 24 })
  await type(terminal.pid, 'echo $OWN=$(tput cols)\n')
  await until('it shows', () => shown.includes('mine=101'))
  await terminal.disconnect()
  const again = await sandbox.pty.connect(terminal.pid, { onData })
  await type(terminal.pid, 'echo still-$((1+1))\nexit\n')
  await again.wait()
  assert.match(shown, /still-2/)
  const other = await sandbox.pty.create({ cols: 80, rows: 24, onData })
  assert.equal(await sandbox.pty.kill(other.pid), true)
  assert.equal(await sandbox.pty.kill(other.pid), false)
})

test('a server of node is reachable from outside', async () => {
  await sandbox.files.write('/home/user/s.mjs', "import http from 'node:http'; http.createServer((q, a) => a.end(q.url)).listen(3000, '127.0.0.1')")
  assert.equal((await askPort(sandbox, 3000)).status, 502)
  const server = await sandbox.commands.run('node /home/user/s.mjs', { background: true, timeoutMs: 0 })
  await until('it answers', async () => (await askPort(sandbox, 3000)).status === 200)
  assert.equal(await (await askPort(sandbox, 3000, '/a%20b/')).text(), '/a%20b/')
  await server.kill()
})

test('git in the guest', async () => {
  await sandbox.git.configureUser('A Tester', 'tester@example.com')
  await sandbox.git.init('/home/user/repo', { initialBranch: 'main' })
  await sandbox.files.write('/home/user/repo/file', '1')
  await sandbox.git.add('/home/user/repo')
  await sandbox.git.commit('/home/user/repo', 'the first')
  assert.equal((await sandbox.git.status('/home/user/repo')).currentBranch, 'main')
})
