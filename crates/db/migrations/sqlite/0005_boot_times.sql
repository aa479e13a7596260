-- `boot` is NULL where it is not known, as in PostgreSQL. SQLite cannot change a column, so it is replaced.

ALTER TABLE sandboxes ADD COLUMN boot_times TEXT;
UPDATE sandboxes SET boot_times = NULLIF(boot, '');
ALTER TABLE sandboxes DROP COLUMN boot;
ALTER TABLE sandboxes RENAME COLUMN boot_times TO boot;
