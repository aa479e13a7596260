-- Several hosts on one database, several databases at one host. As before: TEXT and BIGINT only, for
-- SQLite and PostgreSQL alike.

-- One row: identifies this database to host agents. A copy of the database is the same installation.
CREATE TABLE installation (
    singleton  BIGINT NOT NULL PRIMARY KEY CHECK (singleton = 1),
    id         TEXT   NOT NULL,
    created_at BIGINT NOT NULL
);

-- Host that last reported the template; `default` for a row of an earlier release.
ALTER TABLE templates ADD COLUMN host_id TEXT NOT NULL DEFAULT 'default';
