//! Health check and closing of a handle.

use wrenn_db::{DbError, Owner};

use crate::support::{Place, sandbox};

on_both!(a_closed_handle_fails_and_another_one_works);

async fn a_closed_handle_fails_and_another_one_works(place: Place) {
    let (db, other) = (place.open().await, place.open().await);
    db.ping().await.unwrap();
    db.insert_sandbox(&sandbox("sb-1")).await.unwrap();
    db.keep().await.unwrap();
    let clone = db.clone();
    db.close().await;
    for handle in [&db, &clone] {
        let got = handle.ping().await;
        let message = got.as_ref().unwrap_err().to_string();
        assert!(matches!(got, Err(DbError::Query { .. })), "{got:?}");
        assert_eq!(message, "failed to run a test query in the database");
    }
    other.ping().await.unwrap();
    let id = "sb-1".parse().unwrap();
    assert!(other.sandbox(Owner::Any, &id).await.unwrap().is_some());
}
