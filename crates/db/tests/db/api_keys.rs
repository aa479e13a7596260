//! Rows of API keys.

use wrenn_db::{ApiKey, DbError};
use wrenn_model::{Scopes, TeamId};

use crate::support::{Place, api_key};

on_both!(
    keys_are_listed_oldest_first_and_found_by_prefix,
    a_hash_is_unique,
    the_last_key_is_dropped_but_not_deleted,
    a_team_keeps_a_key_that_may_create_keys,
);

async fn keys_are_listed_oldest_first_and_found_by_prefix(place: Place) {
    let db = place.open().await;
    let (second, first) = (api_key("second", 2), api_key("first", 1));
    let same_prefix = ApiKey {
        key_prefix: first.key_prefix.clone(),
        ..api_key("third", 3)
    };
    for key in [&second, &first, &same_prefix] {
        db.insert_api_key(key).await.unwrap();
    }
    let all = [first.clone(), second.clone(), same_prefix.clone()];
    assert_eq!(db.api_keys(&TeamId::default()).await.unwrap(), all);
    let mut found = db.api_keys_by_prefix(&first.key_prefix).await.unwrap();
    found.sort_by_key(|key| key.created_at);
    assert_eq!(found, [first, same_prefix]);
    assert!(db.api_keys_by_prefix("wrn_none").await.unwrap().is_empty());

    db.touch_api_key(&second.id, 1_700_000_000_126)
        .await
        .unwrap();
    let found = db.api_keys_by_prefix(&second.key_prefix).await.unwrap();
    let used = ApiKey {
        last_used_at: 1_700_000_000_126,
        ..second
    };
    assert_eq!(found, [used]);
}

async fn a_hash_is_unique(place: Place) {
    let db = place.open().await;
    let key = api_key("first", 1);
    db.insert_api_key(&key).await.unwrap();
    let again = ApiKey {
        key_hash: key.key_hash,
        ..api_key("second", 2)
    };
    let again = db.insert_api_key(&again).await;
    assert!(matches!(again, Err(DbError::Exists)), "{again:?}");
}

async fn the_last_key_is_dropped_but_not_deleted(place: Place) {
    let db = place.open().await;
    db.insert_api_key(&api_key("first", 1)).await.unwrap();
    db.insert_api_key(&api_key("second", 2)).await.unwrap();
    assert!(
        !db.delete_api_key(&TeamId::default(), "third")
            .await
            .unwrap()
    );
    assert!(
        db.delete_api_key(&TeamId::default(), "first")
            .await
            .unwrap()
    );
    assert!(
        !db.delete_api_key(&TeamId::default(), "second")
            .await
            .unwrap()
    );
    assert_eq!(
        db.api_keys(&TeamId::default()).await.unwrap(),
        [api_key("second", 2)]
    );
    db.drop_api_key("second").await.unwrap();
    assert!(db.api_keys(&TeamId::default()).await.unwrap().is_empty());
}

async fn a_team_keeps_a_key_that_may_create_keys(place: Place) {
    let db = place.open().await;
    let (own, other) = (TeamId::default(), "other".parse::<TeamId>().unwrap());
    let only_sandboxes = "sandboxes".parse::<Scopes>().unwrap();
    for key in [
        api_key("admin", 1),
        ApiKey {
            scopes: only_sandboxes.clone(),
            ..api_key("worker", 2)
        },
        ApiKey {
            team: other.clone(),
            ..api_key("foreign", 3)
        },
    ] {
        db.insert_api_key(&key).await.unwrap();
    }
    assert_eq!(db.api_keys(&own).await.unwrap()[1].scopes, only_sandboxes);
    assert_eq!(db.api_keys(&other).await.unwrap().len(), 1);
    for (team, id) in [(&own, "admin"), (&own, "foreign"), (&other, "foreign")] {
        assert!(!db.delete_api_key(team, id).await.unwrap(), "{id}");
    }
    assert!(db.delete_api_key(&own, "worker").await.unwrap());
    assert_eq!(db.api_keys(&own).await.unwrap().len(), 1);
}
