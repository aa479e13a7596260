// Sandboxes for the scenarios, and waiting with a deadline. The service is told by E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY.
import { after } from 'node:test'
import { Sandbox } from 'e2b'

export const LONG = 900_000

const made = []

/** Makes a sandbox that is killed when all tests of the file are through. */
export async function create(...options) {
  const template = typeof options[0] === 'string' ? options.shift() : undefined
  const opts = { timeoutMs: LONG, ...options[0] }
  const sandbox = template ? await Sandbox.create(template, opts) : await Sandbox.create(opts)
  made.push(sandbox.sandboxId)
  return sandbox
}

export function adopt(sandbox) {
  made.push(sandbox.sandboxId)
  return sandbox
}

after(async () => {
  for (const id of made) await Sandbox.kill(id)
})

/** Asks until there is an answer that counts. */
export async function until(what, ask, deadlineMs = 60_000) {
  const end = Date.now() + deadlineMs
  for (;;) {
    const answer = await ask()
    if (answer) return answer
    if (Date.now() > end) throw new Error(`${what}: not within ${deadlineMs} ms`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

/** A request to a port of a sandbox, as the routing headers name it. */
export function askPort(sandbox, port, path = '/', init = {}) {
  const headers = { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': String(port), ...init.headers }
  return fetch(process.env.E2B_SANDBOX_URL + path, { ...init, headers })
}

export async function allOf(paginator) {
  const found = []
  while (paginator.hasNext) found.push(...(await paginator.nextItems()))
  return found
}
