//! TLS to PostgreSQL.

use sqlx::{Connection as _, PgConnection};
use wrenn_db::{Db, DbError};
use wrenn_test_postgres::{Certificates, Server};

use crate::support::cache;

struct Secured {
    server: Server,
    dir: tempfile::TempDir,
    certificates: Certificates,
    database: String,
}

impl Secured {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let certificates = Certificates::create(&dir.path().join("right")).unwrap();
        let server = Server::start_with_tls(cache(), &certificates).unwrap();
        let database = server.create_database().unwrap();
        Self {
            server,
            dir,
            certificates,
            database,
        }
    }

    async fn open(&self, host: &str, parameters: &str) -> Result<Db, DbError> {
        let url = self.server.tcp_url(host, "test0");
        Db::open(&format!("{url}?application_name=tested&{parameters}")).await
    }

    /// Returns the numbers of connections of the tested handle with and without TLS.
    async fn connections(&self) -> (i64, i64) {
        let url = self.database.replace("@/", "@localhost/");
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let counts = "SELECT count(*) FILTER (WHERE ssl), count(*) FILTER (WHERE NOT ssl) FROM pg_stat_ssl \
                      JOIN pg_stat_activity USING (pid) WHERE application_name = 'tested'";
        let counts = sqlx::query_as(counts).fetch_one(&mut connection).await;
        connection.close().await.unwrap();
        counts.unwrap()
    }
}

#[tokio::test]
async fn the_mode_decides_whether_a_connection_is_encrypted() {
    let secured = Secured::start();
    let root = format!("&sslrootcert={}", secured.certificates.root.display());
    for (host, parameters, encrypted) in [
        ("localhost", "sslmode=disable", false),
        ("localhost", "sslmode=prefer", true),
        ("localhost", "sslmode=require", true),
        // The certificate is for `localhost`, and `verify-ca` does not compare the name.
        ("127.0.0.1", &format!("sslmode=verify-ca{root}"), true),
        ("localhost", &format!("sslmode=verify-full{root}"), true),
    ] {
        let db = secured.open(host, parameters).await.unwrap();
        db.ping().await.unwrap();
        let (with, without) = secured.connections().await;
        assert_eq!(
            (with > 0, without > 0),
            (encrypted, !encrypted),
            "{parameters}"
        );
        db.close().await;
        // The server notices the end of a connection a little later.
        while secured.connections().await != (0, 0) {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_verified_is_rejected() {
    let secured = Secured::start();
    let wrong = Certificates::create(&secured.dir.path().join("wrong")).unwrap();
    let wrong = format!("&sslrootcert={}", wrong.root.display());
    let right = format!("&sslrootcert={}", secured.certificates.root.display());
    for (host, parameters) in [
        ("localhost", format!("sslmode=verify-full{wrong}")),
        ("localhost", format!("sslmode=verify-ca{wrong}")),
        ("localhost", "sslmode=verify-full".to_owned()),
        ("127.0.0.1", format!("sslmode=verify-full{right}")),
        (
            "localhost",
            "sslmode=verify-full&sslrootcert=/none".to_owned(),
        ),
    ] {
        let got = secured.open(host, &parameters).await;
        assert!(
            matches!(got, Err(DbError::Open { .. })),
            "{parameters}: {got:?}"
        );
    }
}

#[tokio::test]
async fn a_server_without_tls_is_rejected_if_tls_is_required() {
    let server = Server::shared(cache());
    let url = server.create_database().unwrap();
    let required = url.replace("sslmode=disable", "sslmode=require");
    let got = Db::open(&required).await;
    assert!(matches!(got, Err(DbError::Open { .. })), "{got:?}");
    let preferred = url.replace("sslmode=disable", "sslmode=prefer");
    Db::open(&preferred).await.unwrap().ping().await.unwrap();
}
