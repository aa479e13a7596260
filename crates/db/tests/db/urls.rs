//! URLs of databases.

use wrenn_db::{Db, DbError};
use wrenn_test_postgres::Server;

use crate::support::{Place, cache};

#[tokio::test]
async fn a_url_names_user_socket_and_database_in_both_forms() {
    let server = Server::shared(cache());
    let url = server.create_database().unwrap();
    assert!(url.contains("@/") && url.contains("host=/"), "{url}");
    let other_form = url.replace("postgres://wrenn@/", "postgresql:///") + "&user=wrenn";
    let first = Db::open(&url).await.unwrap();
    let second = Db::open(&other_form).await.unwrap();
    assert_eq!(
        first.installation_id().await.unwrap(),
        second.installation_id().await.unwrap()
    );
}

#[tokio::test]
async fn an_unusable_url_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().display();
    for url in [
        "",
        "mysql://localhost/db",
        "/var/lib/wrenn.db",
        "postgres://[",
        &format!("sqlite://{dir}/none"),
        &format!("sqlite://{dir}/none/db?mode=rwc"),
        &format!("postgres://u@/db?host={dir}"),
    ] {
        let got = Db::open(url).await;
        assert!(matches!(got, Err(DbError::Open { .. })), "{url}: {got:?}");
    }
    let none = Place::postgres().url.replace("/test", "/none");
    let got = Db::open(&none).await;
    assert!(matches!(got, Err(DbError::Open { .. })), "{got:?}");
}
