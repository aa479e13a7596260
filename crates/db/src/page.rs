//! Pages of sandboxes, in the order in which they first ran.

use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use crate::{backend::Backend, sandbox::columns, statement::Statement};

/// Selection and start of a page.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a> {
    /// Team that owns the sandboxes.
    pub team: &'a TeamId,
    /// Selected statuses, at most [`MAX_STATUSES`].
    pub statuses: &'a [SandboxStatus],
    /// Template that the sandboxes were created from; empty: any.
    pub template: &'a str,
    /// Earliest first run, in milliseconds since the Unix epoch.
    pub started_from: i64,
    /// Last sandbox of the previous page.
    pub after: Option<(i64, &'a SandboxId)>,
    /// Order of the page.
    pub newest_first: bool,
    /// Maximum number of sandboxes.
    pub limit: u32,
}

/// Maximum number of statuses per page.
pub const MAX_STATUSES: usize = 4;

const NEWEST_FIRST: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM sandboxes WHERE status IN ($1, $2, $3, $4) AND ($5 = '' OR template = $5) AND started_at >= $6 \
     AND (started_at < $7 OR (started_at = $7 AND id < $8)) AND team_id = $10 ORDER BY started_at DESC, id DESC LIMIT $9"
);

const OLDEST_FIRST: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM sandboxes WHERE status IN ($1, $2, $3, $4) AND ($5 = '' OR template = $5) AND started_at >= $6 \
     AND (started_at > $7 OR (started_at = $7 AND id > $8)) AND team_id = $10 ORDER BY started_at, id LIMIT $9"
);

/// Returns the statement that counts the running sandboxes of a team. The parameters are those of
/// [`Page`].
pub(crate) fn count_running<B: Backend>(
    team: &TeamId,
    template: &str,
    started_from: i64,
) -> Statement<B> {
    Statement::new(
        "count the sandboxes",
        "SELECT COUNT(*) FROM sandboxes WHERE status = 'running' AND ($1 = '' OR template = $1) \
         AND started_at >= $2 AND team_id = $3",
    )
    .bind(template)
    .bind(started_from)
    .bind(team.as_str())
}

/// Returns the statement that selects the metadata of the same sandboxes.
pub(crate) fn running_metadata<B: Backend>(
    team: &TeamId,
    template: &str,
    started_from: i64,
) -> Statement<B> {
    Statement::new(
        "read the metadata of the sandboxes",
        "SELECT id, metadata FROM sandboxes WHERE status = 'running' AND ($1 = '' OR template = $1) \
         AND started_at >= $2 AND team_id = $3",
    )
    .bind(template)
    .bind(started_from)
    .bind(team.as_str())
}

/// Returns the statement of a page, or `None` if the page selects no status. Equal times are
/// ordered by id, so that no sandbox is skipped or repeated at a page boundary.
pub(crate) fn select<B: Backend>(page: &Page<'_>) -> Option<Statement<B>> {
    let first = page.statuses.first()?;
    let sql = match page.newest_first {
        true => NEWEST_FIRST,
        false => OLDEST_FIRST,
    };
    let mut statement = Statement::new("list the sandboxes", sql);
    for place in 0..MAX_STATUSES {
        statement = statement.bind(page.statuses.get(place).unwrap_or(first).as_str());
    }
    let (time, id) = match page.after {
        Some((time, id)) => (time, id.as_str()),
        None if page.newest_first => (i64::MAX, ""),
        None => (-1, ""),
    };
    let statement = statement
        .bind(page.template)
        .bind(page.started_from)
        .bind(time)
        .bind(id)
        .bind(i64::from(page.limit))
        .bind(page.team.as_str());
    Some(statement)
}
