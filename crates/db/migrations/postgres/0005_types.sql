-- The earlier migrations have the types of both databases. From here on, PostgreSQL has its own.

ALTER TABLE sandboxes
    ALTER COLUMN auto_resume DROP DEFAULT,
    ALTER COLUMN auto_resume TYPE BOOLEAN USING auto_resume <> 0,
    ALTER COLUMN auto_resume SET DEFAULT FALSE,
    ALTER COLUMN metadata DROP DEFAULT,
    ALTER COLUMN metadata TYPE JSONB USING metadata::jsonb,
    ALTER COLUMN metadata SET DEFAULT '{}',
    ALTER COLUMN options DROP DEFAULT,
    ALTER COLUMN options TYPE JSONB USING options::jsonb,
    ALTER COLUMN options SET DEFAULT '{}',
    -- NULL where not known.
    ALTER COLUMN boot DROP DEFAULT,
    ALTER COLUMN boot DROP NOT NULL,
    ALTER COLUMN boot TYPE JSONB USING NULLIF(boot, '')::jsonb;
