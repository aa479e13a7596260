//! Databases of earlier releases.

use wrenn_db::{Db, DbError, Owner, UNKNOWN_HOST};
use wrenn_model::{BootTimes, OnTimeout, SandboxStatus, TeamId};

use crate::support::{Place, sandbox};

on_both!(
    released_migrations_are_never_changed,
    a_database_of_the_first_migration_is_updated_with_its_rows,
    a_database_of_release_0_1_0_keeps_all_values,
    a_database_of_release_0_1_0_keeps_its_rows_and_templates,
    a_database_of_a_newer_release_is_not_opened,
);

/// SHA-384 of the migrations that were the same for both databases.
const RELEASED: [&str; 4] = [
    "dc414b6e1b9242db75c3bcb84ffd7f7adc901f765a8e4c2a51e0b7067423d87cfce12b7fa7649a39560d1071fa06f131",
    "7b76583d3c271aeb017dc60d609e376a798af68dc2cd4f5ec28b89d433abfdc985b698a7f89debf949e7358dd14ba847",
    "10194b88055f5b552c4eb75efcebe464431eeee1fb629b3bbe3e4ef91e754725545a3ed470de4e3d1adcdb7eb29b19f0",
    "8f51d30675114243ea5cd75050d5c205b169d5cb2731dbb85cffe8eb3ad5849a1a32468771b9bf42fd1c0b8a3741d06e",
];

async fn released_migrations_are_never_changed(place: Place) {
    let migrations = place.migrations();
    for (number, checksum) in (1..).zip(RELEASED) {
        let migration = migrations.iter().find(|m| m.version == number).unwrap();
        assert_eq!(hex::encode(&migration.checksum), checksum, "{number}");
    }
}

const OLD_ROW: &str = "INSERT INTO sandboxes (id, template, status, vcpus, memory_mb, disk_size_mb, timeout_sec, \
                       egress, created_at, last_updated) \
                       VALUES ('sb-1', 'minimal', 'paused', 1, 256, 5120, 300, 'deny', 1, 1)";

async fn a_database_of_the_first_migration_is_updated_with_its_rows(place: Place) {
    place.migrate(1).await;
    place.run(OLD_ROW).await;
    place
        .run("INSERT INTO templates (name, created_at) VALUES ('minimal', 1)")
        .await;

    let db = place.open().await;
    let row = db
        .sandbox(Owner::Any, &"sb-1".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((row.on_timeout, row.boot), (OnTimeout::Pause, None));
    assert!(!row.auto_resume && row.warning.is_empty() && row.metadata.is_empty());
    assert!(db.update_sandbox(&row).await.unwrap());
    let templates = db.templates().await.unwrap();
    assert_eq!(templates[0].kind, "base");
    let sizes = (templates[0].disk_size_mb, templates[0].generation);
    assert_eq!(sizes, (0, 0));
}

/// Release 0.1.0 had three migrations, the same for both databases.
async fn a_database_of_release_0_1_0_keeps_all_values(place: Place) {
    place.migrate(3).await;
    place.run(OLD_ROW).await;
    let boot = r#"{"prepared_ms":1,"vmm_started_ms":2,"kernel_ms":3,"init_ms":4,"envd_ms":5}"#;
    let metadata = r#"{"a \"b\" \\ c":"Grüße 🦀"}"#;
    let options = r#"{"lifetime_sec":60,"open":true,"internet":false,"network":{"allow":["1.1.1.1"],"deny":[]}}"#;
    place
        .run(&format!(
            "INSERT INTO sandboxes (id, template, status, version, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, \
             metadata, boot, options, auto_resume, on_timeout, idempotency_key, envd_token, created_at, started_at, \
             last_active_at, last_updated, expires_at) VALUES ('sb-2', 'base', 'running', 7, 2, 512, 5120, 0, 'allow', \
             '{metadata}', '{boot}', '{options}', 1, 'kill', 'key', 'token', 2, 3, 4, 5, 6)"
        ))
        .await;

    let db = place.open().await;
    let row = db
        .sandbox(Owner::Any, &"sb-2".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((row.status, row.version), (SandboxStatus::Running, 7));
    assert!(row.auto_resume);
    let expected = BootTimes {
        prepared_ms: 1,
        vmm_started_ms: 2,
        kernel_ms: 3,
        init_ms: 4,
        envd_ms: 5,
    };
    assert_eq!(row.boot, Some(expected));
    assert_eq!(row.metadata["a \"b\" \\ c"], "Grüße 🦀");
    assert_eq!((row.options.lifetime_sec, row.options.open), (60, true));
    assert_eq!(row.options.internet, Some(false));
    assert_eq!(row.options.network.allow, ["1.1.1.1"]);
    let times = (row.created_at, row.started_at, row.last_active_at);
    assert_eq!(times, (2, 3, 4));
    assert_eq!((row.last_updated, row.expires_at), (5, 6));
    let by_token = db.sandboxes_by_token("token").await.unwrap();
    assert_eq!(by_token, [(row.id.clone(), "token".to_owned())]);
    let found = db
        .sandbox_by_idempotency_key(&TeamId::default(), "key")
        .await
        .unwrap();
    assert_eq!(found, Some(row));
    let plain = db
        .sandbox(Owner::Any, &"sb-1".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((plain.boot, plain.auto_resume), (None, false));
    // New rows are stored beside the old ones.
    db.insert_sandbox(&sandbox("sb-3")).await.unwrap();
    // A second start changes nothing.
    drop(db);
    place.open().await;
}

/// Release 0.1.0 had no ids of hosts.
async fn a_database_of_release_0_1_0_keeps_its_rows_and_templates(place: Place) {
    place.migrate(3).await;
    place.run(OLD_ROW).await;
    for name in ["minimal", "gone"] {
        place
            .run(&format!(
                "INSERT INTO templates (name, created_at) VALUES ('{name}', 1)"
            ))
            .await;
    }

    let db = place.open().await;
    let row = db
        .sandbox(Owner::Any, &"sb-1".parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(row.host_id, UNKNOWN_HOST);
    assert_eq!(row.team, TeamId::default());
    // What this host does not report is gone; what another one reported stays.
    let mut templates = db.templates().await.unwrap();
    templates.retain(|template| template.name == "minimal");
    db.sync_templates("this-host", &templates).await.unwrap();
    db.sync_templates("other-host", &[]).await.unwrap();
    let names = db.templates().await.unwrap().into_iter().map(|t| t.name);
    assert_eq!(names.collect::<Vec<_>>(), ["minimal"]);
}

async fn a_database_of_a_newer_release_is_not_opened(place: Place) {
    place.open().await;
    place
        .run("UPDATE _sqlx_migrations SET version = 9999 WHERE version = 7")
        .await;
    let got = Db::open(&place.url).await;
    assert!(matches!(got, Err(DbError::Migrate { .. })), "{got:?}");
}

/// Database that a control plane of release 0.1.0 (commit 95e2493) wrote: a paused sandbox with a
/// snapshot, a running one, and two keys.
#[tokio::test]
async fn the_frozen_database_of_release_0_1_0_is_opened_with_its_rows() {
    let frozen = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/wrenn-0.1.0.db");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wrenn.db");
    std::fs::copy(frozen, &file).unwrap();
    let db = Db::open(&format!("sqlite://{}?mode=rwc", file.display()))
        .await
        .unwrap();
    let row = async |id: &str| {
        db.sandbox(Owner::Any, &id.parse().unwrap())
            .await
            .unwrap()
            .unwrap()
    };

    let paused = row("sb-d79ee15e").await;
    assert_eq!(paused.status, SandboxStatus::Paused);
    assert_eq!((paused.size.memory_mib, paused.size.disk_mib), (256, 5120));
    assert_eq!(paused.metadata["a"], "b");
    assert_eq!(paused.boot.map(|boot| boot.envd_ms), Some(3565));
    assert!(!paused.envd_token.is_empty() && paused.host_id == UNKNOWN_HOST);
    let by_token = db.sandboxes_by_token(&paused.envd_token).await.unwrap();
    assert_eq!(by_token, [(paused.id.clone(), paused.envd_token.clone())]);
    let running = row("sb-fc61c947").await;
    assert_eq!(running.status, SandboxStatus::Running);
    assert_eq!(
        (running.timeout_sec, running.on_timeout),
        (600, OnTimeout::Kill)
    );
    assert!(db.update_sandbox(&running).await.unwrap());

    let names = db.templates().await.unwrap().into_iter().map(|t| t.name);
    assert_eq!(names.collect::<Vec<_>>(), ["base", "kept", "minimal"]);
    assert_eq!(db.templates_of("sb-d79ee15e").await.unwrap(), ["kept"]);
    for prefix in ["wrn_585d", "e2b_7543"] {
        assert_eq!(db.api_keys_by_prefix(prefix).await.unwrap().len(), 1);
    }
}
