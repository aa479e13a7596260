//! Statements on templates.

use super::{Template, columns};
use crate::{backend::Backend, sandbox::UNKNOWN_HOST, statement::Statement};

/// Selects all templates, by name.
pub(crate) fn all<B: Backend>() -> Statement<B> {
    Statement::new(
        "list the templates",
        concat!("SELECT ", columns!(), " FROM templates ORDER BY name"),
    )
}

/// Selects the names of the templates that no other host is known to have reported.
pub(crate) fn names_of_host<B: Backend>(host_id: &str) -> Statement<B> {
    Statement::new(
        "list the host's templates",
        "SELECT name FROM templates WHERE host_id IN ($1, $2) ORDER BY name",
    )
    .bind(host_id)
    .bind(UNKNOWN_HOST)
}

/// Writes a template. Replaces one with the same name.
pub(crate) fn upsert<B: Backend>(host_id: &str, template: &Template) -> Statement<B> {
    Statement::new(
        "store a template",
        "INSERT INTO templates (name, type, vcpus, memory_mb, disk_size_mb, generation, size_bytes, created_at, host_id) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (name) DO UPDATE SET type = excluded.type, \
         vcpus = excluded.vcpus, memory_mb = excluded.memory_mb, disk_size_mb = excluded.disk_size_mb, \
         generation = excluded.generation, size_bytes = excluded.size_bytes, created_at = excluded.created_at, \
         host_id = excluded.host_id",
    )
    .bind(&*template.name)
    .bind(&*template.kind)
    .bind(i64::from(template.vcpus))
    .bind(i64::from(template.memory_mb))
    .bind(i64::from(template.disk_size_mb))
    .bind(i64::from(template.generation))
    .bind(i64::try_from(template.size_bytes).unwrap_or(i64::MAX))
    .bind(template.created_at)
    .bind(host_id)
}

/// Writes the sandbox that a snapshot was made of.
pub(crate) fn set_source<B: Backend>(name: &str, sandbox: &str) -> Statement<B> {
    Statement::new(
        "record the source of a template",
        "UPDATE templates SET source = $1 WHERE name = $2",
    )
    .bind(sandbox)
    .bind(name)
}

/// Selects the names of the snapshots of a sandbox.
pub(crate) fn names_of_sandbox<B: Backend>(sandbox: &str) -> Statement<B> {
    Statement::new(
        "list a sandbox's templates",
        "SELECT name FROM templates WHERE source = $1",
    )
    .bind(sandbox)
}

/// Deletes a template.
pub(crate) fn delete<B: Backend>(name: &str) -> Statement<B> {
    Statement::new("delete a template", "DELETE FROM templates WHERE name = $1").bind(name)
}
