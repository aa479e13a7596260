//! Databases that hang, or that stop and start again.

use std::time::{Duration, Instant};

use wrenn_db::{Db, Owner};
use wrenn_test_postgres::Server;

use crate::support::{Connection, Place, cache, sandbox};

/// Time above the deadline of a query.
const DEADLINE: Duration = Duration::from_secs(14);

on_both!(a_call_that_waits_for_a_lock_fails_at_its_deadline);

async fn a_call_that_waits_for_a_lock_fails_at_its_deadline(place: Place) {
    let db = place.open().await;
    let row = sandbox("sb-1");
    db.insert_sandbox(&row).await.unwrap();
    let mut other = place.connect().await;
    match other {
        Connection::Sqlite(_) => other.run("BEGIN IMMEDIATE").await,
        Connection::Postgres(_) => other.run("BEGIN; LOCK TABLE sandboxes").await,
    };
    let begun = Instant::now();
    assert!(db.update_sandbox(&row).await.is_err());
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
    other.run("ROLLBACK").await;
    // The failed call changed nothing, not even later.
    assert!(db.update_sandbox(&row).await.unwrap());
}

async fn until_available(db: &Db) {
    let end = Instant::now() + Duration::from_secs(30);
    while let Err(error) = db.ping().await {
        assert!(Instant::now() < end, "{error}");
    }
}

#[tokio::test]
async fn calls_fail_while_postgres_is_stopped_and_succeed_after_a_restart() {
    let mut server = Server::start(cache()).unwrap();
    let db = Db::open(&server.create_database().unwrap()).await.unwrap();
    let row = sandbox("sb-1");
    db.insert_sandbox(&row).await.unwrap();
    for round in 0..2 {
        server.stop().unwrap();
        for _ in 0..2 {
            let begun = Instant::now();
            assert!(db.sandbox(Owner::Any, &row.id).await.is_err());
            assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
        }
        server.restart().unwrap();
        until_available(&db).await;
        let read = db.sandbox(Owner::Any, &row.id).await.unwrap().unwrap();
        assert_eq!(read.version, round);
        assert!(db.update_sandbox(&read).await.unwrap());
    }
}

#[tokio::test]
async fn a_stopped_postgres_cannot_be_opened_and_nothing_is_left_waiting() {
    let mut server = Server::start(cache()).unwrap();
    let url = server.create_database().unwrap();
    server.stop().unwrap();
    let begun = Instant::now();
    assert!(Db::open(&url).await.is_err());
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
    server.restart().unwrap();
    let db = Db::open(&url).await.unwrap();
    server.stop().unwrap();
    let begun = Instant::now();
    db.close().await;
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}
