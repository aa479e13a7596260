-- Pause, resume, snapshots. As in the first migration: TEXT and BIGINT only, for SQLite and PostgreSQL alike.

-- What becomes of a sandbox that nobody uses: `pause` or `kill`.
ALTER TABLE sandboxes ADD COLUMN on_timeout TEXT NOT NULL DEFAULT 'pause';
-- 1: a call to it resumes it when it is paused.
ALTER TABLE sandboxes ADD COLUMN auto_resume BIGINT NOT NULL DEFAULT 0;
-- The last step that failed and left it as it was; empty if none.
ALTER TABLE sandboxes ADD COLUMN warning TEXT NOT NULL DEFAULT '';

-- MiB; 0 where sandboxes may choose.
ALTER TABLE templates ADD COLUMN disk_size_mb BIGINT NOT NULL DEFAULT 0;
-- How many times its memory was frozen.
ALTER TABLE templates ADD COLUMN generation BIGINT NOT NULL DEFAULT 0;
