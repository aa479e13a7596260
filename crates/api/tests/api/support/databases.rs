//! Databases of a test, on SQLite or PostgreSQL.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use wrenn_test_postgres::Server;

use super::Options;

/// Generates the tests `sqlite::name` and `postgres::name` for functions that take [`Databases`].
macro_rules! on_both {
    ($($scenario:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $scenario() {
                super::$scenario(crate::support::Databases::sqlite()).await;
            })*
        }

        mod postgres {
            $(#[tokio::test]
            async fn $scenario() {
                super::$scenario(crate::support::Databases::postgres()).await;
            })*
        }
    };
}

/// Databases of a test, by name, and the data directory that its control planes share.
pub(crate) struct Databases {
    pub(crate) dir: Arc<tempfile::TempDir>,
    /// URLs of the databases that exist on PostgreSQL; `None` for SQLite.
    postgres: Option<Mutex<BTreeMap<String, String>>>,
}

impl Databases {
    pub(crate) fn sqlite() -> Self {
        Self {
            dir: Arc::new(tempfile::tempdir().unwrap()),
            postgres: None,
        }
    }

    pub(crate) fn postgres() -> Self {
        Self {
            postgres: Some(Mutex::default()),
            ..Self::sqlite()
        }
    }

    /// Returns the options of a control plane that polls often and has this database, which is
    /// created when it is first named.
    pub(crate) fn options(&self, name: &str) -> Options {
        let url = match &self.postgres {
            Some(urls) => {
                let server = Server::shared(Path::new(env!("CARGO_TARGET_TMPDIR")));
                let mut urls = urls.lock();
                let url = urls.entry(name.to_owned());
                url.or_insert_with(|| server.create_database().unwrap())
                    .clone()
            }
            None => format!("sqlite://{}/{name}?mode=rwc", self.dir.path().display()),
        };
        Options {
            dir: Arc::clone(&self.dir),
            database_url: Some(url),
            poll_interval: Duration::from_millis(10),
            ..Options::default()
        }
    }
}
