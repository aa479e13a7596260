//! Pages of sandboxes, in the order in which they first ran.

use wrenn_model::{SandboxId, SandboxStatus};

use super::{
    Db, DbError, run,
    sandboxes::{Sandbox, Stored, columns},
};

/// Selection and start of a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page<'a> {
    /// Up to [`MAX_STATUSES`].
    pub(crate) statuses: &'a [SandboxStatus],
    /// Template that the sandboxes were created from; empty: any.
    pub(crate) template: &'a str,
    /// Earliest first run, in milliseconds since the Unix epoch.
    pub(crate) started_from: i64,
    /// Last sandbox of the previous page.
    pub(crate) after: Option<(i64, &'a SandboxId)>,
    pub(crate) newest_first: bool,
    pub(crate) limit: u32,
}

/// Maximum number of statuses per page.
pub(crate) const MAX_STATUSES: usize = 4;

impl Db {
    /// Returns a page of sandboxes. Equal times are ordered by id, so that no sandbox is skipped or
    /// repeated at a page boundary.
    pub(crate) async fn page(&self, page: Page<'_>) -> Result<Vec<Sandbox>, DbError> {
        let Some(&first) = page.statuses.first() else {
            return Ok(Vec::new());
        };
        let sql = if page.newest_first {
            concat!(
                "SELECT ",
                columns!(),
                " FROM sandboxes WHERE status IN ($1, $2, $3, $4) AND ($5 = '' OR template = $6) AND started_at >= $7 \
                 AND (started_at < $8 OR (started_at = $9 AND id < $10)) ORDER BY started_at DESC, id DESC LIMIT $11"
            )
        } else {
            concat!(
                "SELECT ",
                columns!(),
                " FROM sandboxes WHERE status IN ($1, $2, $3, $4) AND ($5 = '' OR template = $6) AND started_at >= $7 \
                 AND (started_at > $8 OR (started_at = $9 AND id > $10)) ORDER BY started_at, id LIMIT $11"
            )
        };
        let mut query = sqlx::query_as::<_, Stored>(sql);
        for place in 0..MAX_STATUSES {
            query = query.bind(page.statuses.get(place).unwrap_or(&first).as_str());
        }
        let (time, id) = match page.after {
            Some((time, id)) => (time, id.to_string()),
            None if page.newest_first => (i64::MAX, String::new()),
            None => (-1, String::new()),
        };
        let query = query
            .bind(page.template.to_owned())
            .bind(page.template.to_owned())
            .bind(page.started_from)
            .bind(time)
            .bind(time)
            .bind(id)
            .bind(i64::from(page.limit));
        let rows = run("list the sandboxes", query.fetch_all(&self.pool)).await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }
}
