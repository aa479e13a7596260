-- Deadlines, and what clients of the E2B API ask for. As before: TEXT and BIGINT only, for SQLite and PostgreSQL alike.

-- Milliseconds since 1970 at which `on_timeout` happens whether it is used or not; 0: never.
ALTER TABLE sandboxes ADD COLUMN expires_at BIGINT NOT NULL DEFAULT 0;
-- What its guest agent asks of clients. As secret as the sandbox.
ALTER TABLE sandboxes ADD COLUMN envd_token TEXT NOT NULL DEFAULT '';
-- JSON object: `db::options::Options`.
ALTER TABLE sandboxes ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
-- What its client called the request that made it, so that the same request does not make another; empty if nothing.
ALTER TABLE sandboxes ADD COLUMN idempotency_key TEXT NOT NULL DEFAULT '';

CREATE UNIQUE INDEX sandboxes_by_idempotency_key ON sandboxes (idempotency_key) WHERE idempotency_key <> '';
CREATE INDEX sandboxes_by_expiry ON sandboxes (status, expires_at);

-- The sandbox that a snapshot was made of; empty if not known.
ALTER TABLE templates ADD COLUMN source TEXT NOT NULL DEFAULT '';
