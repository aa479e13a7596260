//! Invalid values in columns.

use wrenn_db::{DbError, Owner};

use crate::support::{Place, sandbox, template};

on_both!(
    an_error_names_the_row_and_the_column,
    an_invalid_template_is_named,
);

async fn an_error_names_the_row_and_the_column(place: Place) {
    let db = place.open().await;
    let row = sandbox("sb-1");
    db.insert_sandbox(&row).await.unwrap();
    for (column, value, right) in [
        ("status", "'lost'", "'pending'"),
        ("egress", "''", "'deny'"),
        ("on_timeout", "'x'", "'kill'"),
        ("vcpus", "-1", "1"),
        ("memory_mb", "4294967296", "256"),
        ("metadata", "'[]'", "'{}'"),
        ("options", "'{\"open\": 3}'", "'{}'"),
        ("boot", "'{\"prepared_ms\": 1}'", "NULL"),
    ] {
        assert_eq!(
            place
                .run(&format!("UPDATE sandboxes SET {column} = {value}"))
                .await,
            1
        );
        let got = db.sandbox(Owner::Any, &row.id).await;
        assert!(
            matches!(&got, Err(DbError::Corrupt { id, field, .. }) if id == "sb-1" && field == column),
            "{column}: {got:?}"
        );
        place
            .run(&format!("UPDATE sandboxes SET {column} = {right}"))
            .await;
        assert!(db.sandbox(Owner::Any, &row.id).await.unwrap().is_some());
    }
}

async fn an_invalid_template_is_named(place: Place) {
    let db = place.open().await;
    db.sync_templates("host", &[template("minimal")])
        .await
        .unwrap();
    place.run("UPDATE templates SET size_bytes = -1").await;
    let got = db.templates().await.unwrap_err();
    let message = "invalid value in column `size_bytes` of row `minimal`";
    assert_eq!(got.to_string(), message);
}
