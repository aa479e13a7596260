//! Several handles on one database, as several control planes have.

use futures::future::join_all;
use wrenn_db::{Db, DbError, Owner};
use wrenn_model::SandboxId;

use crate::support::{Place, sandbox};

on_both!(
    handles_open_a_fresh_database_at_the_same_time,
    one_of_two_updates_of_the_same_version_takes_effect,
    no_update_of_two_handles_is_lost,
    one_of_two_inserts_takes_effect,
);

async fn handles_open_a_fresh_database_at_the_same_time(place: Place) {
    let opening = (0..6).map(|_| {
        tokio::spawn({
            let url = place.url.clone();
            async move { Db::open(&url).await }
        })
    });
    let mut ids = Vec::new();
    for db in join_all(opening).await {
        let db = db.unwrap().unwrap();
        ids.push(db.installation_id().await.unwrap());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
}

async fn one_of_two_updates_of_the_same_version_takes_effect(place: Place) {
    let (a, b) = (place.open().await, place.open().await);
    let mut row = sandbox("sb-1");
    a.insert_sandbox(&row).await.unwrap();
    for _ in 0..20 {
        let (of_a, of_b) = tokio::join!(a.update_sandbox(&row), b.update_sandbox(&row));
        assert!(of_a.unwrap() != of_b.unwrap());
        row.version += 1;
    }
}

async fn add(db: Db, id: SandboxId, count: i64) {
    let mut done = 0;
    while done < count {
        let mut row = db.sandbox(Owner::Any, &id).await.unwrap().unwrap();
        row.last_active_at += 1;
        done += i64::from(db.update_sandbox(&row).await.unwrap());
    }
}

async fn no_update_of_two_handles_is_lost(place: Place) {
    let (a, b) = (place.open().await, place.open().await);
    let row = sandbox("sb-1");
    a.insert_sandbox(&row).await.unwrap();
    let tasks = [a.clone(), a.clone(), b.clone(), b];
    join_all(tasks.map(|db| tokio::spawn(add(db, row.id.clone(), 25)))).await;
    let row = a.sandbox(Owner::Any, &row.id).await.unwrap().unwrap();
    assert_eq!((row.version, row.last_active_at), (100, 100));
}

async fn one_of_two_inserts_takes_effect(place: Place) {
    let (a, b) = (place.open().await, place.open().await);
    for number in 0..10 {
        let row = sandbox(&format!("sb-{number}"));
        let (of_a, of_b) = tokio::join!(a.insert_sandbox(&row), b.insert_sandbox(&row));
        assert_ne!(of_a.is_ok(), of_b.is_ok());
        let lost = of_a.and(of_b);
        assert!(matches!(lost, Err(DbError::Exists)), "{lost:?}");
    }
}
