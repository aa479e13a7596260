-- Sandboxes are found by the token of their guest agent, through its hash.

-- Hexadecimal SHA-256 of `envd_token`; empty without a token. Rows of earlier releases get theirs at
-- the next start: SQLite has no such function.
ALTER TABLE sandboxes ADD COLUMN token_hash TEXT NOT NULL DEFAULT '';

CREATE INDEX sandboxes_by_token ON sandboxes (token_hash) WHERE token_hash <> '';
CREATE INDEX sandboxes_without_token_hash ON sandboxes (id) WHERE token_hash = '' AND envd_token <> '';

-- Rows that have ended are removed in the order of their last change.
CREATE INDEX sandboxes_by_last_update ON sandboxes (status, last_updated, id);
