-- One text for SQLite and PostgreSQL: TEXT, BIGINT (times are milliseconds since 1970) and JSON as TEXT only.
-- A migration is never edited once it is released; changes come in a new file.

CREATE TABLE sandboxes (
    id             TEXT   NOT NULL PRIMARY KEY,
    owner_id       TEXT   NOT NULL DEFAULT '',
    host_id        TEXT   NOT NULL DEFAULT 'default',
    template       TEXT   NOT NULL,
    status         TEXT   NOT NULL,
    -- Counts the changes of the row: a writer names the version that it read.
    version        BIGINT NOT NULL DEFAULT 0,
    vcpus          BIGINT NOT NULL,
    memory_mb      BIGINT NOT NULL,
    disk_size_mb   BIGINT NOT NULL,
    timeout_sec    BIGINT NOT NULL,
    egress         TEXT   NOT NULL,
    guest_ip       TEXT   NOT NULL DEFAULT '',
    host_ip        TEXT   NOT NULL DEFAULT '',
    -- JSON object of texts.
    metadata       TEXT   NOT NULL DEFAULT '{}',
    -- Why it is in `error`, or who stopped it.
    error          TEXT   NOT NULL DEFAULT '',
    -- JSON object of milliseconds; empty where not known.
    boot           TEXT   NOT NULL DEFAULT '',
    created_at     BIGINT NOT NULL,
    started_at     BIGINT NOT NULL DEFAULT 0,
    last_active_at BIGINT NOT NULL DEFAULT 0,
    last_updated   BIGINT NOT NULL
);

CREATE INDEX sandboxes_by_status ON sandboxes (status);
CREATE INDEX sandboxes_by_host ON sandboxes (host_id, status);
CREATE INDEX sandboxes_by_age ON sandboxes (created_at, id);

CREATE TABLE templates (
    name       TEXT   NOT NULL PRIMARY KEY,
    -- `base` or, later, `snapshot`.
    type       TEXT   NOT NULL DEFAULT 'base',
    vcpus      BIGINT NOT NULL DEFAULT 0,
    memory_mb  BIGINT NOT NULL DEFAULT 0,
    size_bytes BIGINT NOT NULL DEFAULT 0,
    created_at BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id           TEXT   NOT NULL PRIMARY KEY,
    name         TEXT   NOT NULL,
    -- Hexadecimal SHA-256 of the key.
    key_hash     TEXT   NOT NULL UNIQUE,
    -- First eight characters of the key.
    key_prefix   TEXT   NOT NULL,
    created_at   BIGINT NOT NULL,
    last_used_at BIGINT NOT NULL DEFAULT 0
);

CREATE INDEX api_keys_by_prefix ON api_keys (key_prefix);
