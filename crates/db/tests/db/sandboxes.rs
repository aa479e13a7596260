//! Rows of sandboxes: every column, every operation.

use wrenn_db::{DbError, MAX_LIST, Owner, Sandbox, StateRow};
use wrenn_model::{SandboxStatus, TeamId};

use crate::support::{Place, change, ids, sandbox, started, store};

on_both!(
    all_columns_are_read_as_they_were_written,
    a_row_changes_only_at_the_version_that_was_read,
    a_refresh_writes_data_of_the_host_and_keeps_the_version,
    an_id_is_unique,
    an_idempotency_key_is_unique_until_it_is_released,
    a_query_of_a_team_returns_no_rows_of_others,
    a_list_has_the_requested_statuses_newest_first,
    deadlines_of_running_sandboxes_are_listed,
    only_tokens_of_sandboxes_that_run_or_are_paused_are_listed,
    sandbox_is_found_by_its_token,
    states_are_filtered_by_status,
    ended_rows_are_listed_by_end_and_host,
);

async fn all_columns_are_read_as_they_were_written(place: Place) {
    let db = place.open().await;
    let mut row = sandbox("sb-1");
    row.idempotency_key = "key".to_owned();
    db.insert_sandbox(&row).await.unwrap();
    assert_eq!(
        db.sandbox(Owner::Any, &row.id).await.unwrap().as_ref(),
        Some(&row)
    );

    change(&mut row);
    assert!(db.update_sandbox(&row).await.unwrap());
    row.version += 1;
    assert_eq!(
        db.sandbox(Owner::Any, &row.id).await.unwrap().as_ref(),
        Some(&row)
    );

    row.boot = None;
    assert!(db.update_sandbox(&row).await.unwrap());
    row.version += 1;
    // Another handle reads the same.
    let other = place.open().await;
    assert_eq!(other.sandbox(Owner::Any, &row.id).await.unwrap(), Some(row));
    let none = "sb-2".parse().unwrap();
    assert_eq!(db.sandbox(Owner::Any, &none).await.unwrap(), None);
}

async fn a_row_changes_only_at_the_version_that_was_read(place: Place) {
    let db = place.open().await;
    db.insert_sandbox(&sandbox("sb-1")).await.unwrap();
    let id = "sb-1".parse().unwrap();
    let row = db.sandbox(Owner::Any, &id).await.unwrap().unwrap();
    assert!(db.update_sandbox(&row).await.unwrap());
    assert!(!db.update_sandbox(&row).await.unwrap());
    assert!(!db.refresh_sandbox(&row).await.unwrap());
    assert!(!db.remove_sandbox(&id, row.version).await.unwrap());
    assert!(db.remove_sandbox(&id, row.version + 1).await.unwrap());
    assert_eq!(db.sandbox(Owner::Any, &id).await.unwrap(), None);
    assert!(!db.remove_sandbox(&id, row.version + 1).await.unwrap());
}

async fn a_refresh_writes_data_of_the_host_and_keeps_the_version(place: Place) {
    let db = place.open().await;
    let before = sandbox("sb-1");
    db.insert_sandbox(&before).await.unwrap();
    let mut seen = before.clone();
    change(&mut seen);
    assert!(db.refresh_sandbox(&seen).await.unwrap());
    let expected = Sandbox {
        guest_ip: seen.guest_ip,
        host_ip: seen.host_ip,
        boot: seen.boot,
        last_active_at: seen.last_active_at,
        warning: seen.warning,
        host_id: seen.host_id,
        envd_token: seen.envd_token,
        ..before
    };
    assert_eq!(
        db.sandbox(Owner::Any, &expected.id).await.unwrap(),
        Some(expected)
    );
}

async fn an_id_is_unique(place: Place) {
    let db = place.open().await;
    db.insert_sandbox(&sandbox("sb-1")).await.unwrap();
    let again = db.insert_sandbox(&sandbox("sb-1")).await;
    assert!(matches!(again, Err(DbError::Exists)), "{again:?}");
}

async fn an_idempotency_key_is_unique_until_it_is_released(place: Place) {
    let db = place.open().await;
    let keyed = |id: &str| Sandbox {
        idempotency_key: "key".to_owned(),
        ..sandbox(id)
    };
    // Rows without a key do not exclude each other.
    db.insert_sandbox(&sandbox("sb-1")).await.unwrap();
    db.insert_sandbox(&sandbox("sb-2")).await.unwrap();
    assert_eq!(
        db.sandbox_by_idempotency_key(&TeamId::default(), "key")
            .await
            .unwrap(),
        None
    );

    let first = keyed("sb-3");
    db.insert_sandbox(&first).await.unwrap();
    let second = db.insert_sandbox(&keyed("sb-4")).await;
    assert!(matches!(second, Err(DbError::Exists)), "{second:?}");
    let found = db
        .sandbox_by_idempotency_key(&TeamId::default(), "key")
        .await
        .unwrap();
    assert_eq!(found.as_ref(), Some(&first));

    db.release_idempotency_key(&first.id).await.unwrap();
    assert_eq!(
        db.sandbox_by_idempotency_key(&TeamId::default(), "key")
            .await
            .unwrap(),
        None
    );
    db.insert_sandbox(&keyed("sb-4")).await.unwrap();
    let found = db
        .sandbox_by_idempotency_key(&TeamId::default(), "key")
        .await
        .unwrap();
    assert_eq!(found.unwrap().id.as_str(), "sb-4");
}

async fn a_list_has_the_requested_statuses_newest_first(place: Place) {
    let db = place.open().await;
    for (number, status) in SandboxStatus::ALL.into_iter().enumerate() {
        let row = Sandbox {
            status,
            created_at: i64::try_from(number).unwrap(),
            ..sandbox(&format!("sb-{number}"))
        };
        db.insert_sandbox(&row).await.unwrap();
    }
    let all = db
        .sandboxes(Owner::Any, &SandboxStatus::ALL, MAX_LIST)
        .await
        .unwrap();
    let newest_first: Vec<_> = (0..SandboxStatus::ALL.len())
        .rev()
        .map(|number| format!("sb-{number}"))
        .collect();
    assert_eq!(ids(&all), newest_first);
    let some = [SandboxStatus::Pending, SandboxStatus::Running];
    assert_eq!(
        ids(&db.sandboxes(Owner::Any, &some, MAX_LIST).await.unwrap()),
        ["sb-2", "sb-0"]
    );
    assert_eq!(
        ids(&db.sandboxes(Owner::Any, &some, 1).await.unwrap()),
        ["sb-2"]
    );
    assert!(
        db.sandboxes(Owner::Any, &[], MAX_LIST)
            .await
            .unwrap()
            .is_empty()
    );
}

async fn deadlines_of_running_sandboxes_are_listed(place: Place) {
    let db = place.open().await;
    for (id, status, expires_at) in [
        ("sb-1", SandboxStatus::Running, 30),
        ("sb-2", SandboxStatus::Running, 0),
        ("sb-3", SandboxStatus::Running, 10),
        ("sb-4", SandboxStatus::Paused, 5),
        ("sb-5", SandboxStatus::Running, 20),
    ] {
        let row = Sandbox {
            expires_at,
            ..started(id, status, 1)
        };
        store(&db, &row).await;
    }
    let mut deadlines = db.deadlines().await.unwrap();
    deadlines.sort_by_key(|row| row.expires_at);
    let deadlines: Vec<_> = deadlines
        .iter()
        .map(|row| (row.id.as_str(), row.version, row.expires_at, &*row.host_id))
        .collect();
    let row = |id, expires_at| (id, 1, expires_at, "host-1");
    assert_eq!(
        deadlines,
        [row("sb-3", 10), row("sb-5", 20), row("sb-1", 30)]
    );
}

async fn only_tokens_of_sandboxes_that_run_or_are_paused_are_listed(place: Place) {
    let db = place.open().await;
    for (number, status) in SandboxStatus::ALL.into_iter().enumerate() {
        let row = Sandbox {
            envd_token: format!("token of {status}"),
            ..started(&format!("sb-{number}"), status, 1)
        };
        store(&db, &row).await;
    }
    store(&db, &started("sb-none", SandboxStatus::Running, 1)).await;
    let mut tokens = db.envd_tokens().await.unwrap();
    tokens.sort();
    let tokens: Vec<_> = tokens
        .iter()
        .map(|(id, token)| (id.as_str(), &**token))
        .collect();
    assert_eq!(
        tokens,
        [
            ("sb-2", "token of running"),
            ("sb-3", "token of pausing"),
            ("sb-4", "token of paused"),
            ("sb-5", "token of resuming"),
        ]
    );
}

async fn states_are_filtered_by_status(place: Place) {
    let db = place.open().await;
    for (number, status) in SandboxStatus::ALL.into_iter().enumerate() {
        let is_running = status == SandboxStatus::Running;
        let row = Sandbox {
            last_active_at: 7,
            warning: if is_running { "disk full" } else { "" }.to_owned(),
            ..started(&format!("sb-{number}"), status, 5)
        };
        store(&db, &row).await;
    }
    let all = db.states(&SandboxStatus::ALL).await.unwrap();
    assert_eq!(all.len(), SandboxStatus::ALL.len());
    assert_eq!(all.iter().filter(|row| row.is_warned).count(), 1);
    let running = db.states(&[SandboxStatus::Running]).await.unwrap();
    let expected = StateRow {
        id: "sb-2".parse().unwrap(),
        status: SandboxStatus::Running,
        version: 1,
        timeout_sec: 300,
        started_at: 5,
        last_active_at: 7,
        host_id: "host-1".to_owned(),
        is_warned: true,
    };
    assert_eq!(running, [expected]);
    assert!(db.states(&[]).await.unwrap().is_empty());
}

async fn ended_rows_are_listed_by_end_and_host(place: Place) {
    let db = place.open().await;
    for (id, status, last_updated, host_id) in [
        ("sb-1", SandboxStatus::Stopped, 30, "a"),
        ("sb-2", SandboxStatus::Error, 10, "a"),
        ("sb-3", SandboxStatus::Stopped, 10, "b"),
        ("sb-4", SandboxStatus::Stopped, 10, "c"),
        ("sb-5", SandboxStatus::Running, 10, "a"),
        ("sb-6", SandboxStatus::Paused, 10, "a"),
        ("sb-7", SandboxStatus::Stopped, 40, "a"),
    ] {
        let row = Sandbox {
            last_updated,
            host_id: host_id.to_owned(),
            ..started(id, status, 1)
        };
        store(&db, &row).await;
    }
    let mut after: Option<(i64, wrenn_model::SandboxId)> = None;
    let mut found = Vec::new();
    loop {
        let last = after.as_ref().map(|(time, id)| (*time, id));
        let rows = db.ended(["a", "b"], 40, last, 2).await.unwrap();
        let Some(row) = rows.last() else { break };
        after = Some((row.last_updated, row.id.clone()));
        found.extend(rows);
    }
    let ids: Vec<_> = found.iter().map(|row| row.id.as_str()).collect();
    assert_eq!(ids, ["sb-2", "sb-3", "sb-1"]);
    let row = &found[0];
    assert!(!db.remove_sandbox(&row.id, row.version + 1).await.unwrap());
    assert!(db.remove_sandbox(&row.id, row.version).await.unwrap());
    assert_eq!(db.sandbox(Owner::Any, &row.id).await.unwrap(), None);
}

async fn sandbox_is_found_by_its_token(place: Place) {
    let db = place.open().await;
    let with_token = |id: &str, token: &str| Sandbox {
        envd_token: token.to_owned(),
        ..started(id, SandboxStatus::Stopped, 1)
    };
    store(&db, &with_token("sb-1", "one")).await;
    store(&db, &with_token("sb-2", "two")).await;
    // A refresh of the host's data also changes the token.
    let mut third = started("sb-3", SandboxStatus::Running, 1);
    db.insert_sandbox(&third).await.unwrap();
    third.envd_token = "three".to_owned();
    assert!(db.refresh_sandbox(&third).await.unwrap());
    let found = async |token: &str| db.sandboxes_by_token(token).await.unwrap();
    for (id, token) in [("sb-1", "one"), ("sb-2", "two"), ("sb-3", "three")] {
        assert_eq!(
            found(token).await,
            [(id.parse().unwrap(), token.to_owned())]
        );
    }
    store(&db, &sandbox("sb-none")).await;
    for token in ["", "four", "One"] {
        assert!(found(token).await.is_empty(), "{token}");
    }
}

async fn a_query_of_a_team_returns_no_rows_of_others(place: Place) {
    let db = place.open().await;
    let (own, other) = (TeamId::default(), "other".parse::<TeamId>().unwrap());
    for (id, team) in [("sb-1", &own), ("sb-2", &other)] {
        let row = Sandbox {
            team: team.clone(),
            idempotency_key: "key".to_owned(),
            ..sandbox(id)
        };
        db.insert_sandbox(&row).await.unwrap();
    }
    for (team, its, foreign) in [(&own, "sb-1", "sb-2"), (&other, "sb-2", "sb-1")] {
        let owner = Owner::Team(team);
        let id = |id: &str| id.parse().unwrap();
        let found = db.sandbox(owner, &id(its)).await.unwrap();
        assert_eq!(found.unwrap().team, *team);
        assert_eq!(db.sandbox(owner, &id(foreign)).await.unwrap(), None);
        let all = db.sandboxes(owner, &SandboxStatus::ALL, MAX_LIST).await;
        assert_eq!(ids(&all.unwrap()), [its]);
        let found = db.sandbox_by_idempotency_key(team, "key").await.unwrap();
        assert_eq!(found.unwrap().id.as_str(), its);
    }
    let all = db
        .sandboxes(Owner::Any, &SandboxStatus::ALL, MAX_LIST)
        .await;
    assert_eq!(all.unwrap().len(), 2);
}
