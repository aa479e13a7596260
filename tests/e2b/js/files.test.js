// Files: every form of upload and download, links, lists, and what is told of changes.
import assert from 'node:assert/strict'
import { before, test } from 'node:test'
import { FileNotFoundError, FilesystemEventType, FileType } from 'e2b'
import { create, until } from './support.js'

const BINARY = new Uint8Array(100_000).map((_, at) => at % 251)

let sandbox, files
before(async () => {
  sandbox = await create()
  files = sandbox.files
})

test('every form of upload and download', async () => {
  await files.write('/home/user/f/text', 'hällo')
  assert.equal(await files.read('/home/user/f/text'), 'hällo')
  await files.write('/home/user/f/empty', '')
  assert.equal(await files.read('/home/user/f/empty'), '')
  const stream = new ReadableStream({
    start(controller) {
      for (let at = 0; at < BINARY.length; at += 10_000) controller.enqueue(BINARY.slice(at, at + 10_000))
      controller.close()
    },
  })
  const forms = { buffer: BINARY.buffer, blob: new Blob([BINARY]), stream }
  for (const [name, data] of Object.entries(forms)) {
    const path = `/home/user/f/${name}`
    assert.equal((await files.write(path, data)).path, path)
    assert.deepEqual(await files.read(path, { format: 'bytes' }), BINARY, name)
    assert.equal((await files.read(path, { format: 'blob' })).size, BINARY.length)
    const pieces = []
    for await (const piece of await files.read(path, { format: 'stream' })) pieces.push(piece)
    assert.deepEqual(new Uint8Array(Buffer.concat(pieces)), BINARY)
  }
  await files.write('/home/user/f/gzip', BINARY.buffer, { gzip: true })
  assert.deepEqual(await files.read('/home/user/f/gzip', { format: 'bytes', gzip: true }), BINARY)
})

test('several files at once', async () => {
  const wanted = [...Array(6).keys()].map((n) => ({ path: `/home/user/many/${n}`, data: String(n) }))
  const written = await files.write(wanted)
  assert.deepEqual(written.map((entry) => entry.path), wanted.map((entry) => entry.path))
  assert.equal((await files.list('/home/user/many')).length, 6)
})

test('metadata stays with a file until it is written again', async () => {
  await files.write('/home/user/meta', 'x', { metadata: { author: 'me' } })
  assert.deepEqual((await files.getInfo('/home/user/meta')).metadata, { author: 'me' })
  await files.write('/home/user/meta', 'y')
  assert.ok(!Object.keys((await files.getInfo('/home/user/meta')).metadata ?? {}).length)
})

test('directories and what is known of entries', async () => {
  assert.equal(await files.makeDir('/home/user/d/e'), true)
  assert.equal(await files.makeDir('/home/user/d/e'), false)
  await files.write('/home/user/d/e/f', '12345')
  const listed = await files.list('/home/user/d', { depth: 2 })
  assert.deepEqual(listed.map((entry) => [entry.name, entry.type]), [['e', FileType.DIR], ['f', FileType.FILE]])
  const info = await files.getInfo('/home/user/d/e/f')
  assert.deepEqual([info.size, info.permissions, info.owner], [5, '-rw-r--r--', 'user'])
  assert.equal((await files.rename('/home/user/d/e', '/home/user/d/g')).path, '/home/user/d/g')
  assert.equal(await files.exists('/home/user/d/e'), false)
  await files.remove('/home/user/d')
  await assert.rejects(files.read('/home/user/d/g/f'), FileNotFoundError)
  await assert.rejects(files.list('/home/user/d'), FileNotFoundError)
})

test('links work without a token, for their time', async () => {
  await files.write('/home/user/linked +', 'linked')
  const answer = await fetch(await sandbox.downloadUrl('/home/user/linked +', { useSignatureExpiration: 60 }))
  assert.deepEqual([answer.status, await answer.text()], [200, 'linked'])
  const form = new FormData()
  form.append('file', new Blob(['up']), 'up')
  const up = await fetch(await sandbox.uploadUrl('/home/user/up', { user: 'user' }), { method: 'POST', body: form })
  assert.equal(up.status, 200)
  assert.equal(await files.read('/home/user/up'), 'up')
  const late = await fetch(await sandbox.downloadUrl('/home/user/up', { useSignatureExpiration: -120 }))
  assert.deepEqual(await late.json(), { code: 401, message: 'signature is already expired' })
})

test('changes are pushed, also from directories that are new', async () => {
  await files.makeDir('/home/user/watched')
  const events = []
  const watch = await files.watchDir('/home/user/watched', (event) => void events.push(event), { recursive: true, timeoutMs: 0 })
  await files.write('/home/user/watched/a/b/file', 'x')
  const isTold = (name, type) => events.some((event) => event.name === name && event.type === type)
  await until('the write is told', () => isTold('a/b/file', FilesystemEventType.WRITE))
  await files.remove('/home/user/watched/a/b/file')
  await until('the removal is told', () => isTold('a/b/file', FilesystemEventType.REMOVE))
  await watch.stop()
  await assert.rejects(files.watchDir('/home/user/none', () => {}), FileNotFoundError)
})
