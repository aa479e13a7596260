//! Pages of sandboxes.

use wrenn_db::{Db, Page, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use crate::support::{Place, ids, started, store};

on_both!(
    pages_have_each_sandbox_once_even_at_equal_times,
    a_page_has_the_selected_sandboxes,
    running_sandboxes_are_counted_with_filters,
);

const RUNNING: [SandboxStatus; 1] = [SandboxStatus::Running];

/// Returns the first page of a team.
fn first(team: &TeamId) -> Page<'_> {
    Page {
        team,
        statuses: &RUNNING,
        template: "",
        started_from: 0,
        after: None,
        newest_first: false,
        limit: 100,
    }
}

async fn all_pages(db: &Db, newest_first: bool, limit: u32) -> Vec<SandboxId> {
    let team = TeamId::default();
    let mut all: Vec<(i64, SandboxId)> = Vec::new();
    loop {
        let after = all.last().map(|(time, id)| (*time, id));
        let page = Page {
            after,
            newest_first,
            limit,
            ..first(&team)
        };
        let rows = db.page(page).await.unwrap();
        if rows.is_empty() {
            return all.into_iter().map(|(_, id)| id).collect();
        }
        assert!(rows.len() <= limit as usize);
        all.extend(rows.into_iter().map(|row| (row.started_at, row.id)));
    }
}

async fn pages_have_each_sandbox_once_even_at_equal_times(place: Place) {
    let db = place.open().await;
    let order = ["sb-d", "sb-a", "sb-b", "sb-c", "sb-e"];
    for (id, started_at) in [
        ("sb-c", 2),
        ("sb-a", 2),
        ("sb-e", 3),
        ("sb-b", 2),
        ("sb-d", 1),
    ] {
        store(&db, &started(id, SandboxStatus::Running, started_at)).await;
    }
    for limit in 1..=6 {
        let oldest_first = all_pages(&db, false, limit).await;
        assert_eq!(
            oldest_first
                .iter()
                .map(SandboxId::as_str)
                .collect::<Vec<_>>(),
            order
        );
        let mut newest_first = all_pages(&db, true, limit).await;
        newest_first.reverse();
        assert_eq!(newest_first, oldest_first);
    }
}

async fn a_page_has_the_selected_sandboxes(place: Place) {
    let db = place.open().await;
    for (id, status, started_at, template) in [
        ("sb-1", SandboxStatus::Running, 1, "minimal"),
        ("sb-2", SandboxStatus::Paused, 2, "minimal"),
        ("sb-3", SandboxStatus::Running, 3, "base"),
        ("sb-4", SandboxStatus::Stopped, 4, "base"),
    ] {
        let row = Sandbox {
            template: template.to_owned(),
            ..started(id, status, started_at)
        };
        store(&db, &row).await;
    }
    let of_other = Sandbox {
        team: "other".parse().unwrap(),
        ..started("sb-other", SandboxStatus::Running, 2)
    };
    store(&db, &of_other).await;
    let statuses = [SandboxStatus::Running, SandboxStatus::Paused];
    let (team, other) = (TeamId::default(), "other".parse().unwrap());
    let both = Page {
        statuses: &statuses,
        ..first(&team)
    };
    for (page, expected) in [
        (first(&team), &["sb-1", "sb-3"][..]),
        (both, &["sb-1", "sb-2", "sb-3"]),
        (
            Page {
                team: &other,
                ..both
            },
            &["sb-other"],
        ),
        (
            Page {
                started_from: 2,
                ..both
            },
            &["sb-2", "sb-3"],
        ),
        (
            Page {
                template: "base",
                ..both
            },
            &["sb-3"],
        ),
        (
            Page {
                template: "none",
                ..both
            },
            &[],
        ),
        (
            Page {
                statuses: &[],
                ..both
            },
            &[],
        ),
    ] {
        assert_eq!(ids(&db.page(page).await.unwrap()), expected, "{page:?}");
    }
}

async fn running_sandboxes_are_counted_with_filters(place: Place) {
    let db = place.open().await;
    for (id, status, started_at, template) in [
        ("sb-1", SandboxStatus::Running, 1, "minimal"),
        ("sb-2", SandboxStatus::Running, 2, "base"),
        ("sb-3", SandboxStatus::Running, 3, "base"),
        ("sb-4", SandboxStatus::Paused, 4, "base"),
    ] {
        let row = Sandbox {
            template: template.to_owned(),
            ..started(id, status, started_at)
        };
        store(&db, &row).await;
    }
    let (team, other) = (TeamId::default(), "other".parse().unwrap());
    for (team, template, started_from, expected) in [
        (&team, "", 0, 3),
        (&team, "base", 0, 2),
        (&team, "", 2, 2),
        (&team, "base", 3, 1),
        (&team, "none", 0, 0),
        (&other, "", 0, 0),
    ] {
        let count = db.running_count(team, template, started_from).await;
        assert_eq!(count.unwrap(), expected, "{team} {template} {started_from}");
        let metadata = db.running_metadata(team, template, started_from).await;
        let metadata = metadata.unwrap();
        assert_eq!(metadata.len(), usize::try_from(expected).unwrap());
        let whole = |found: &std::collections::BTreeMap<String, String>| {
            *found == started("sb-1", SandboxStatus::Running, 1).metadata
        };
        assert!(metadata.iter().all(whole), "{metadata:?}");
    }
}
