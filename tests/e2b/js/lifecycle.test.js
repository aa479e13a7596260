// The life of a sandbox.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { test } from 'node:test'
import { AuthenticationError, Sandbox, SandboxNotFoundError, TimeoutError } from 'e2b'
import { adopt, allOf, askPort, create, LONG, until } from './support.js'

const ids = (infos) => infos.map((info) => info.sandboxId)

test('a sandbox is made, found, listed by pages, and killed', async () => {
  const mark = randomUUID()
  const first = await create('base', { metadata: { mark, 'odd &=': 'ä&=%' } })
  const second = await create({ metadata: { mark } })
  const info = await first.getInfo()
  assert.equal(info.state, 'running')
  assert.deepEqual(info.metadata, { mark, 'odd &=': 'ä&=%' })
  assert.ok(info.endAt > info.startedAt && info.cpuCount >= 1)
  assert.equal(await first.isRunning(), true)
  const list = (opts) => allOf(Sandbox.list({ query: { metadata: { mark } }, ...opts }))
  assert.deepEqual(ids(await list({ limit: 1 })), [second.sandboxId, first.sandboxId])
  assert.deepEqual(ids(await list({ order: 'asc' })), [first.sandboxId, second.sandboxId])
  const odd = Sandbox.list({ query: { metadata: { mark, 'odd &=': 'ä&=%' }, state: ['running'] } })
  assert.deepEqual(ids(await allOf(odd)), [first.sandboxId])
  assert.equal(await second.kill(), true)
  assert.equal(await second.kill(), false)
  assert.equal(await Sandbox.kill('nonexistingsandbox'), false)
  assert.equal(await second.isRunning(), false)
  await assert.rejects(Sandbox.getInfo(second.sandboxId), SandboxNotFoundError)
  await assert.rejects(Sandbox.connect(second.sandboxId), SandboxNotFoundError)
  await assert.rejects(second.commands.run('true'), SandboxNotFoundError)
})

test('a wrong key is refused', async () => {
  await assert.rejects(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
})

test('deadlines', async () => {
  const sandbox = await create({ timeoutMs: 60_000 })
  await sandbox.setTimeout(600_000)
  assert.ok((await sandbox.getInfo()).endAt.getTime() - Date.now() > 500_000)
  await sandbox.setTimeout(0)
  await until('it is gone', async () => !(await sandbox.isRunning()))
})

test('a pause keeps all; a connect goes on with it', async () => {
  const sandbox = await create()
  await sandbox.files.write('/home/user/kept', 'file')
  const running = await sandbox.commands.run('sleep 600', { background: true, timeoutMs: 0 })
  running.wait().catch(() => {})
  assert.equal(await sandbox.pause(), true)
  assert.equal(await sandbox.pause(), false)
  assert.equal(await sandbox.isRunning(), false)
  assert.equal((await Sandbox.getInfo(sandbox.sandboxId)).state, 'paused')
  const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: LONG })
  assert.equal(await again.files.read('/home/user/kept'), 'file')
  assert.equal(await sandbox.files.read('/home/user/kept'), 'file')
  assert.ok((await sandbox.commands.list()).some((process) => process.pid === running.pid))
})

test('a pause of the disk alone boots anew', async () => {
  const sandbox = await create()
  await sandbox.files.write('/home/user/kept', 'file')
  const boot = await sandbox.files.read('/proc/sys/kernel/random/boot_id')
  assert.equal(await sandbox.pause({ keepMemory: false }), true)
  await sandbox.connect({ timeoutMs: LONG })
  assert.equal(await sandbox.files.read('/home/user/kept'), 'file')
  assert.notEqual(await sandbox.files.read('/proc/sys/kernel/random/boot_id'), boot)
})

test('a deadline may pause, and traffic may wake', async () => {
  const sandbox = await create({ lifecycle: { onTimeout: 'pause', autoResume: true } })
  await sandbox.files.write('/home/user/kept', 'file')
  await sandbox.setTimeout(3000)
  await until('it is paused', async () => (await Sandbox.getInfo(sandbox.sandboxId)).state === 'paused')
  assert.equal(await sandbox.files.read('/home/user/kept'), 'file')
})

test('a snapshot makes others; a fork is another', async () => {
  const source = await create()
  await source.files.write('/home/user/moment', 'then')
  const snapshot = await source.createSnapshot()
  assert.ok((await allOf(source.listSnapshots())).some((found) => found.snapshotId === snapshot.snapshotId))
  const [fork] = await source.fork({ timeoutMs: LONG })
  assert.ok(!(fork instanceof Error), String(fork))
  adopt(fork)
  assert.equal(await fork.files.read('/home/user/moment'), 'then')
  await fork.kill()
  await source.kill()
  const copy = await create(snapshot.snapshotId)
  assert.equal(await copy.files.read('/home/user/moment'), 'then')
  await copy.kill()
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

test('a kill ends what streams at once', async () => {
  const sandbox = await create()
  const running = await sandbox.commands.run('sleep 300', { background: true, timeoutMs: 0 })
  const ended = assert.rejects(running.wait(), TimeoutError)
  await sandbox.kill()
  await ended
  const health = await askPort(sandbox, 49983, '/health')
  assert.deepEqual([health.status, (await health.json()).message], [502, 'The sandbox was not found'])
})

test('metrics are there soon, and a closed sandbox wants its token', async () => {
  const sandbox = await create({ network: { allowPublicTraffic: false } })
  const [sample] = await until('a sample', async () => {
    const found = await sandbox.getMetrics()
    return found.length && found
  })
  assert.ok(sample.memTotal > 0 && sample.diskTotal > 0)
  assert.ok(sandbox.trafficAccessToken)
  assert.equal((await askPort(sandbox, 8080)).status, 403)
  const token = { 'E2B-Traffic-Access-Token': sandbox.trafficAccessToken }
  assert.equal((await askPort(sandbox, 8080, '/', { headers: token })).status, 502)
})
