//! Row of the installation: the identity of this database.

use super::{Db, DbError, run};
use crate::clock;

impl Db {
    /// Returns the id of the installation. The first control plane of the database chooses it.
    pub(crate) async fn installation_id(&self) -> Result<String, DbError> {
        let insert = sqlx::query(
            "INSERT INTO installation (singleton, id, created_at) VALUES (1, $1, $2) \
             ON CONFLICT (singleton) DO NOTHING",
        )
        .bind(uuid::Uuid::new_v4().to_string())
        .bind(clock::now_ms());
        run("store the installation id", insert.execute(&self.pool)).await?;
        let select = sqlx::query_scalar("SELECT id FROM installation WHERE singleton = 1");
        run("read the installation id", select.fetch_one(&self.pool)).await
    }
}
