//! Empty database per test, and sample rows.

use std::{collections::BTreeMap, path::Path};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection, migrate::Migrator};
use wrenn_db::{ApiKey, Db, NetworkLists, Options, ResumeAs, Sandbox, Template};
use wrenn_model::{BootTimes, Egress, MachineSize, OnTimeout, SandboxStatus, Scopes, TeamId};
use wrenn_test_postgres::Server;

/// Generates the tests `sqlite::name` and `postgres::name` for functions that take an empty
/// database.
macro_rules! on_both {
    ($($scenario:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $scenario() {
                super::$scenario(crate::support::Place::sqlite()).await;
            })*
        }

        mod postgres {
            $(#[tokio::test]
            async fn $scenario() {
                super::$scenario(crate::support::Place::postgres()).await;
            })*
        }
    };
}

/// Directory for the initialized PostgreSQL data directory.
pub(crate) fn cache() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Address of a test's database, which has no tables at first.
pub(crate) struct Place {
    pub(crate) url: String,
    /// Directory of SQLite's files.
    pub(crate) dir: Option<tempfile::TempDir>,
}

impl Place {
    pub(crate) fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            url: format!("sqlite://{}/db?mode=rwc", dir.path().display()),
            dir: Some(dir),
        }
    }

    pub(crate) fn postgres() -> Self {
        Self {
            url: Server::shared(cache()).create_database().unwrap(),
            dir: None,
        }
    }

    /// Returns the address of another database on the same system.
    pub(crate) fn another(&self) -> Self {
        match self.dir {
            Some(_) => Self::sqlite(),
            None => Self::postgres(),
        }
    }

    pub(crate) async fn open(&self) -> Db {
        Db::open(&self.url).await.unwrap()
    }

    /// Opens a connection that is independent of all handles.
    pub(crate) async fn connect(&self) -> Connection {
        match self.dir {
            Some(_) => Connection::Sqlite(SqliteConnection::connect(&self.url).await.unwrap()),
            None => {
                let url = self.url.replace("@/", "@localhost/");
                Connection::Postgres(PgConnection::connect(&url).await.unwrap())
            }
        }
    }

    /// Runs a statement. Returns the number of changed rows.
    pub(crate) async fn run(&self, sql: &str) -> u64 {
        let mut connection = self.connect().await;
        let changed = connection.run(sql).await;
        connection.close().await;
        changed
    }

    /// Returns all migrations.
    pub(crate) fn migrations(&self) -> Migrator {
        match self.dir {
            Some(_) => sqlx::migrate!("migrations/sqlite"),
            None => sqlx::migrate!("migrations/postgres"),
        }
    }

    /// Creates the tables as the first `count` migrations left them.
    pub(crate) async fn migrate(&self, count: usize) {
        let mut first = self.migrations();
        first.migrations.to_mut().truncate(count);
        match self.connect().await {
            Connection::Sqlite(mut connection) => {
                first.run(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
            Connection::Postgres(mut connection) => {
                first.run(&mut connection).await.unwrap();
                connection.close().await.unwrap();
            }
        }
    }
}

/// Connection for statements that the crate does not have.
pub(crate) enum Connection {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Connection {
    /// Runs statements. Returns the number of changed rows.
    pub(crate) async fn run(&mut self, sql: &str) -> u64 {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        match self {
            Self::Sqlite(connection) => sql.execute(connection).await.unwrap().rows_affected(),
            Self::Postgres(connection) => sql.execute(connection).await.unwrap().rows_affected(),
        }
    }

    pub(crate) async fn close(self) {
        match self {
            Self::Sqlite(connection) => connection.close().await.unwrap(),
            Self::Postgres(connection) => connection.close().await.unwrap(),
        }
    }
}

/// Returns a new row as a create request writes it.
pub(crate) fn sandbox(id: &str) -> Sandbox {
    Sandbox {
        id: id.parse().unwrap(),
        template: "minimal".to_owned(),
        status: SandboxStatus::Pending,
        version: 0,
        size: MachineSize {
            vcpus: 2,
            memory_mib: 512,
            disk_mib: 5120,
        },
        timeout_sec: 300,
        on_timeout: OnTimeout::Kill,
        auto_resume: true,
        egress: Egress::Allow,
        guest_ip: String::new(),
        host_ip: String::new(),
        metadata: BTreeMap::from([("quote \" and \\".to_owned(), "Grüße 🦀".to_owned())]),
        error: String::new(),
        warning: String::new(),
        boot: None,
        created_at: 1_700_000_000_123,
        started_at: 0,
        last_active_at: 0,
        last_updated: 1_700_000_000_124,
        expires_at: 0,
        envd_token: String::new(),
        options: options(),
        idempotency_key: String::new(),
        host_id: "host-1".to_owned(),
        team: TeamId::default(),
    }
}

/// Returns a row with this status that ran first at `started_at`.
pub(crate) fn started(id: &str, status: SandboxStatus, started_at: i64) -> Sandbox {
    Sandbox {
        status,
        started_at,
        ..sandbox(id)
    }
}

/// Changes all columns that an update may change.
pub(crate) fn change(row: &mut Sandbox) {
    row.status = SandboxStatus::Paused;
    row.guest_ip = "10.0.0.2".to_owned();
    row.host_ip = "10.1.0.2".to_owned();
    row.error = "it's gone".to_owned();
    row.boot = Some(BootTimes {
        prepared_ms: 1,
        vmm_started_ms: 2,
        kernel_ms: 3,
        init_ms: 4,
        envd_ms: u32::MAX,
    });
    row.started_at = 5;
    row.last_active_at = 6;
    row.last_updated = 7;
    row.warning = "pause failed".to_owned();
    row.expires_at = 8;
    row.envd_token = "token".to_owned();
    row.options.resuming = None;
    row.egress = Egress::Deny;
    row.on_timeout = OnTimeout::Pause;
    row.auto_resume = false;
    row.host_id = "host-2".to_owned();
}

fn options() -> Options {
    Options {
        lifetime_sec: 60,
        open: true,
        traffic_token: "traffic".to_owned(),
        mask_host: "localhost:${PORT}".to_owned(),
        disk_only: true,
        paused_disk_only: true,
        resuming: Some(ResumeAs {
            disk_only: true,
            lifetime_sec: Some(30),
        }),
        internet: Some(false),
        network: NetworkLists {
            allow: vec!["1.1.1.1".to_owned()],
            deny: vec!["0.0.0.0/0".to_owned()],
        },
        cpu: "max".to_owned(),
        accel: "kvm".to_owned(),
        request_hash: "ab".to_owned(),
    }
}

/// Inserts a row, and writes the columns that an insert leaves at their defaults.
pub(crate) async fn store(db: &Db, row: &Sandbox) {
    db.insert_sandbox(row).await.unwrap();
    assert!(db.update_sandbox(row).await.unwrap());
}

pub(crate) fn template(name: &str) -> Template {
    Template {
        name: name.to_owned(),
        kind: "snapshot".to_owned(),
        vcpus: 1,
        memory_mb: 256,
        disk_size_mb: 0,
        generation: 3,
        size_bytes: 5_000_000_000,
        created_at: 1_700_000_000_125,
    }
}

/// Returns a key whose hash and prefix are derived from its id.
pub(crate) fn api_key(id: &str, created_at: i64) -> ApiKey {
    ApiKey {
        id: id.to_owned(),
        name: format!("name of {id}"),
        key_hash: format!("hash of {id}"),
        key_prefix: format!("wrn_{id}"),
        created_at,
        last_used_at: 0,
        team: TeamId::default(),
        scopes: Scopes::all(),
    }
}

/// Returns the ids of rows.
pub(crate) fn ids(rows: &[Sandbox]) -> Vec<&str> {
    rows.iter().map(|row| row.id.as_str()).collect()
}
