-- Teams own sandboxes and API keys. Everything that exists belongs to the team `default`.

ALTER TABLE sandboxes RENAME COLUMN owner_id TO team_id;
UPDATE sandboxes SET team_id = 'default' WHERE team_id = '';

ALTER TABLE api_keys ADD COLUMN team_id TEXT NOT NULL DEFAULT 'default';
-- Names of the scopes of the key, separated by commas.
ALTER TABLE api_keys ADD COLUMN scopes TEXT NOT NULL DEFAULT 'sandboxes,keys,hosts';

-- Two teams may use the same idempotency key.
DROP INDEX sandboxes_by_idempotency_key;
CREATE UNIQUE INDEX sandboxes_by_idempotency_key ON sandboxes (team_id, idempotency_key) WHERE idempotency_key <> '';
CREATE INDEX sandboxes_by_team ON sandboxes (team_id, created_at, id);
