//! Rows of templates.

use wrenn_db::{Db, Template};

use crate::support::{Place, template};

on_both!(
    templates_are_those_that_their_host_reports,
    templates_of_other_hosts_stay,
    snapshots_know_their_sandbox,
);

async fn names(db: &Db) -> Vec<String> {
    let templates = db.templates().await.unwrap();
    templates
        .into_iter()
        .map(|template| template.name)
        .collect()
}

async fn templates_are_those_that_their_host_reports(place: Place) {
    let db = place.open().await;
    let (old, kept) = (template("old"), template("kept"));
    db.sync_templates("host", &[old, kept.clone()])
        .await
        .unwrap();
    let rebuilt = Template {
        size_bytes: u64::try_from(i64::MAX).unwrap(),
        kind: "base".to_owned(),
        ..kept
    };
    let new = template("new");
    let present = [rebuilt.clone(), new.clone()];
    db.sync_templates("host", &present).await.unwrap();
    assert_eq!(db.templates().await.unwrap(), [rebuilt, new]);
    db.sync_templates("host", &[]).await.unwrap();
    assert!(names(&db).await.is_empty());
}

async fn templates_of_other_hosts_stay(place: Place) {
    let db = place.open().await;
    db.sync_templates("a", &[template("of-a")]).await.unwrap();
    db.sync_templates("b", &[template("of-b")]).await.unwrap();
    assert_eq!(names(&db).await, ["of-a", "of-b"]);
    db.sync_templates("a", &[]).await.unwrap();
    assert_eq!(names(&db).await, ["of-b"]);
}

async fn snapshots_know_their_sandbox(place: Place) {
    let db = place.open().await;
    let snapshot = template("snapshot");
    db.record_snapshot("host", &snapshot, "sb-1").await.unwrap();
    assert_eq!(
        db.templates().await.unwrap(),
        std::slice::from_ref(&snapshot)
    );
    assert_eq!(db.templates_of("sb-1").await.unwrap(), ["snapshot"]);
    assert!(db.templates_of("sb-2").await.unwrap().is_empty());
    // A report of the host does not name the sandbox, which stays known.
    let present = [snapshot, template("other")];
    db.sync_templates("host", &present).await.unwrap();
    assert_eq!(db.templates_of("sb-1").await.unwrap(), ["snapshot"]);
}
