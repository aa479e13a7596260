//! Rows of templates: the templates that the host last reported.

use sqlx::FromRow;
use wrenn_api_types::Template;

use super::{Db, DbError, narrow, run, sandboxes::UNKNOWN_HOST};
use crate::clock;

#[derive(FromRow)]
struct Stored {
    name: String,
    kind: String,
    vcpus: i64,
    memory_mb: i64,
    disk_size_mb: i64,
    generation: i64,
    size_bytes: i64,
    created_at: i64,
}

impl TryFrom<Stored> for Template {
    type Error = DbError;

    fn try_from(row: Stored) -> Result<Self, DbError> {
        let given = |n: u32| (n > 0).then_some(n);
        Ok(Self {
            vcpus: given(narrow(&row.name, "vcpus", row.vcpus)?),
            memory_mb: given(narrow(&row.name, "memory_mb", row.memory_mb)?),
            disk_size_mb: given(narrow(&row.name, "disk_size_mb", row.disk_size_mb)?),
            generation: given(narrow(&row.name, "generation", row.generation)?),
            size_bytes: narrow(&row.name, "size_bytes", row.size_bytes)?,
            created_at: clock::timestamp(row.created_at),
            kind: row.kind,
            name: row.name,
        })
    }
}

impl Db {
    /// Returns all templates, by name.
    pub(crate) async fn templates(&self) -> Result<Vec<Template>, DbError> {
        let query = sqlx::query_as::<_, Stored>(
            "SELECT name, type AS kind, vcpus, memory_mb, disk_size_mb, generation, size_bytes, created_at \
             FROM templates ORDER BY name",
        );
        let rows = run("list the templates", query.fetch_all(&self.pool)).await?;
        rows.into_iter().map(Template::try_from).collect()
    }

    /// Makes the stored templates of a host equal to those that it reports. Templates that another
    /// host reported stay.
    pub(crate) async fn sync_templates(
        &self,
        host_id: &str,
        present: &[Template],
    ) -> Result<(), DbError> {
        for name in self.template_names_of(host_id).await? {
            if present.iter().all(|t| t.name != name) {
                self.forget_template(&name).await?;
            }
        }
        for template in present {
            self.store_template(host_id, template).await?;
        }
        Ok(())
    }

    /// Returns the names of the templates that no other host is known to have reported.
    async fn template_names_of(&self, host_id: &str) -> Result<Vec<String>, DbError> {
        let query = sqlx::query_scalar(
            "SELECT name FROM templates WHERE host_id IN ($1, $2) ORDER BY name",
        )
        .bind(host_id.to_owned())
        .bind(UNKNOWN_HOST);
        run("list the host's templates", query.fetch_all(&self.pool)).await
    }

    /// Writes a template. Replaces one with the same name.
    async fn store_template(&self, host_id: &str, template: &Template) -> Result<(), DbError> {
        let query = sqlx::query(
            "INSERT INTO templates (name, type, vcpus, memory_mb, disk_size_mb, generation, size_bytes, created_at, host_id) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (name) DO UPDATE SET type = excluded.type, \
             vcpus = excluded.vcpus, memory_mb = excluded.memory_mb, disk_size_mb = excluded.disk_size_mb, \
             generation = excluded.generation, size_bytes = excluded.size_bytes, created_at = excluded.created_at, \
             host_id = excluded.host_id",
        )
        .bind(template.name.clone())
        .bind(template.kind.clone())
        .bind(i64::from(template.vcpus.unwrap_or(0)))
        .bind(i64::from(template.memory_mb.unwrap_or(0)))
        .bind(i64::from(template.disk_size_mb.unwrap_or(0)))
        .bind(i64::from(template.generation.unwrap_or(0)))
        .bind(i64::try_from(template.size_bytes).unwrap_or(i64::MAX))
        .bind(template.created_at.as_millisecond())
        .bind(host_id.to_owned());
        run("store a template", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Writes a new snapshot and its source sandbox.
    pub(crate) async fn record_snapshot(
        &self,
        host_id: &str,
        snapshot: &Template,
        sandbox: &str,
    ) -> Result<(), DbError> {
        self.store_template(host_id, snapshot).await?;
        let query = sqlx::query("UPDATE templates SET source = $1 WHERE name = $2")
            .bind(sandbox.to_owned())
            .bind(snapshot.name.clone());
        run("record the source of a template", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Returns the names of the snapshots of a sandbox.
    pub(crate) async fn templates_of(&self, sandbox: &str) -> Result<Vec<String>, DbError> {
        let query = sqlx::query_scalar("SELECT name FROM templates WHERE source = $1")
            .bind(sandbox.to_owned());
        run("list a sandbox's templates", query.fetch_all(&self.pool)).await
    }

    async fn forget_template(&self, name: &str) -> Result<(), DbError> {
        let query = sqlx::query("DELETE FROM templates WHERE name = $1").bind(name.to_owned());
        run("delete a template", query.execute(&self.pool)).await?;
        Ok(())
    }
}
