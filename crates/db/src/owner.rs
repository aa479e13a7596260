//! Restriction of a query to the rows of a team.

use wrenn_model::TeamId;

/// Owner of the rows that a query may return. A request of a client is always restricted to the
/// client's team.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner<'a> {
    /// This team.
    Team(&'a TeamId),
    /// Any team. For tasks of the control plane, which act on all sandboxes.
    Any,
}

impl Owner<'_> {
    /// Returns the value that statements compare with `team_id`. An empty text selects all rows.
    pub(crate) fn as_param(&self) -> &str {
        match self {
            Self::Team(team) => team.as_str(),
            Self::Any => "",
        }
    }
}
