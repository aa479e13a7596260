#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use SandboxStatus as S;
use proptest::prelude::*;
use wrenn_db::Options;
use wrenn_model::{Egress, MachineSize, OnTimeout};

use super::*;
use crate::state_machine::{Effect, transition};

const CALL_FAILED: Cause<'static> = Cause::CallFailed { error: "no reply" };

fn warned(state: HostState, warning: &str) -> HostReport {
    HostReport {
        warning: warning.to_owned(),
        host_ip: "10.0.0.1".to_owned(),
        ..HostReport::in_state(state)
    }
}

fn report(state: HostState) -> HostReport {
    warned(state, "")
}

/// Returns the columns of the tables.
fn host_reports() -> Vec<Option<HostReport>> {
    let reason = "gone".to_owned();
    let mut reports = vec![None];
    reports.extend(
        [
            HostState::Starting,
            HostState::Running,
            HostState::Changing,
            HostState::Paused,
            HostState::Error { reason },
            HostState::Stopping,
        ]
        .map(|state| Some(report(state))),
    );
    reports
}

/// Returns the status to which a row settles.
fn settled(status: S, host: Option<&HostReport>, cause: Cause<'_>) -> S {
    settle(status, host, cause).map_or(status, |decision| {
        transition(status, decision.event).unwrap().0
    })
}

/// True if the host may have resources of a sandbox in this status.
fn may_be_at_host(status: S) -> bool {
    !matches!(status, S::Stopped | S::Error)
}

fn row(status: S, warning: &str) -> Sandbox {
    Sandbox {
        id: "sb-1".parse().unwrap(),
        template: String::new(),
        status,
        version: 0,
        size: MachineSize {
            vcpus: 1,
            memory_mib: 1,
            disk_mib: 1,
        },
        timeout_sec: 0,
        on_timeout: OnTimeout::Pause,
        auto_resume: false,
        egress: Egress::Deny,
        guest_ip: String::new(),
        host_ip: String::new(),
        metadata: std::collections::BTreeMap::new(),
        error: String::new(),
        warning: warning.to_owned(),
        boot: None,
        created_at: 0,
        started_at: 1,
        last_active_at: 0,
        last_updated: 0,
        expires_at: 0,
        envd_token: String::new(),
        options: Options {
            lifetime_sec: 60,
            ..Options::default()
        },
        idempotency_key: String::new(),
        host_id: String::new(),
        team: wrenn_model::TeamId::default(),
    }
}

/// Returns a row in this status, with this warning, after the decision was written to it.
fn written(status: S, warning: &str, host: Option<&HostReport>, cause: Cause<'_>) -> Sandbox {
    let mut row = row(status, warning);
    let decision = settle(status, host, cause).unwrap();
    decision.change.write_to(&mut row, 1_000_000);
    row
}

#[test]
fn every_cell_of_the_table_for_failed_calls_holds() {
    let table = [
        (S::Pending, "EEEEEEE"),
        (S::Starting, "EEEEEEE"),
        (S::Pausing, "E-R-PE-"),
        (S::Resuming, "P-R-PE-"),
    ];
    for (status, wanted) in table {
        let got: String = host_reports()
            .iter()
            .map(|host| match settled(status, host.as_ref(), CALL_FAILED) {
                S::Error => 'E',
                S::Running => 'R',
                S::Paused => 'P',
                other if other == status => '-',
                other => panic!("{other}"),
            })
            .collect();
        assert_eq!(got, wanted, "{status}");
    }
}

#[test]
fn a_failed_call_is_described_in_the_row() {
    let running = report(HostState::Running);
    let paused = report(HostState::Paused);
    for (status, host, warning, error) in [
        (S::Pausing, Some(&running), "the pause failed: no reply", ""),
        (S::Pausing, Some(&paused), "", ""),
        (
            S::Pausing,
            None,
            "before",
            "the host lost the sandbox: no reply",
        ),
        (S::Resuming, Some(&running), "", ""),
        (
            S::Resuming,
            Some(&paused),
            "the resume failed: no reply",
            "",
        ),
        (
            S::Resuming,
            None,
            "the host does not have the sandbox's files",
            "",
        ),
        (S::Starting, None, "before", "no reply"),
    ] {
        let row = written(status, "before", host, CALL_FAILED);
        assert_eq!((&*row.warning, &*row.error), (warning, error), "{status}");
    }
}

#[test]
fn an_interruption_is_described_in_the_row_unless_a_warning_exists() {
    let interrupted = "the pause was interrupted; the sandbox keeps running";
    for (before, reported, after) in [
        ("", "", interrupted),
        ("before", "", "before"),
        ("before", "reported", "before"),
        ("", "reported", "reported"),
    ] {
        let host = warned(HostState::Running, reported);
        let row = written(S::Pausing, before, Some(&host), Cause::Pass);
        assert_eq!(row.warning, after);
    }
    let interrupted = "the resume was interrupted; the sandbox stays paused";
    for (before, reported, after) in [
        ("before", "", interrupted),
        ("before", "reported", "reported"),
    ] {
        let host = warned(HostState::Paused, reported);
        let row = written(S::Resuming, before, Some(&host), Cause::Pass);
        assert_eq!(row.warning, after);
    }
}

#[test]
fn a_lifetime_starts_when_the_sandbox_starts_to_run_and_not_when_a_pause_fails() {
    let host = report(HostState::Running);
    for (status, cause, expires_at) in [
        (S::Starting, Cause::Pass, 1_060_000),
        (S::Paused, Cause::Pass, 1_060_000),
        (S::Resuming, Cause::Pass, 1_060_000),
        (S::Resuming, CALL_FAILED, 1_060_000),
        (S::Pausing, Cause::Pass, 0),
        (S::Pausing, CALL_FAILED, 0),
    ] {
        let row = written(status, "", Some(&host), cause);
        assert_eq!(row.expires_at, expires_at, "{status} {cause:?}");
        assert_eq!(row.host_ip, host.host_ip, "{status} {cause:?}");
    }
}

#[test]
fn a_failed_create_is_undone_for_every_report_of_the_host() {
    for status in [S::Pending, S::Starting] {
        for host in host_reports() {
            assert_eq!(
                settle(status, host.as_ref(), CALL_FAILED),
                Some(Decision::create_failed("no reply".to_owned()))
            );
        }
    }
}

fn any_status() -> impl Strategy<Value = S> {
    prop::sample::select(S::ALL.to_vec())
}

fn any_host() -> impl Strategy<Value = Option<HostReport>> {
    let warning = prop::sample::select(vec!["", "restored"]);
    (prop::sample::select(host_reports()), warning).prop_map(|(host, warning)| {
        host.map(|report| HostReport {
            warning: warning.to_owned(),
            ..report
        })
    })
}

fn any_cause() -> impl Strategy<Value = Cause<'static>> {
    prop::sample::select(vec![Cause::Pass, CALL_FAILED])
}

proptest! {
    #[test]
    fn every_decision_is_allowed_by_the_state_machine(
        status in any_status(),
        host in any_host(),
        cause in any_cause(),
    ) {
        let Some(decision) = settle(status, host.as_ref(), cause) else { return Ok(()) };
        let next = transition(status, decision.event);
        prop_assert!(next.is_ok(), "{status} {decision:?}");
        // A decision that changes no status would not be written.
        prop_assert_ne!(next.unwrap().0, status, "{:?}", decision);
    }

    #[test]
    fn a_report_settles_a_row_to_the_same_status_for_every_cause(
        status in any_status(),
        host in any_host(),
    ) {
        let pass = settled(status, host.as_ref(), Cause::Pass);
        let failed = settled(status, host.as_ref(), CALL_FAILED);
        match (status, &host) {
            // The differences in the module documentation.
            (S::Pending | S::Starting, _) => prop_assert_eq!(failed, S::Error),
            (S::Resuming, None) => prop_assert_eq!((pass, failed), (S::Error, S::Paused)),
            _ => prop_assert_eq!(pass, failed),
        }
    }

    #[test]
    fn resources_of_the_host_are_destroyed_when_their_row_ends(
        status in any_status(),
        host in any_host(),
        cause in any_cause(),
    ) {
        let Some(decision) = settle(status, host.as_ref(), cause) else { return Ok(()) };
        let (next, effects) = transition(status, decision.event).unwrap();
        let destroys = match decision.destroy {
            Destroy::Nothing => false,
            Destroy::First => true,
            Destroy::IfRequired => effects.contains(&Effect::Destroy),
        };
        if host.is_some() {
            prop_assert_eq!(destroys, may_be_at_host(status) && !may_be_at_host(next));
        }
        // Only an event that ends the row may follow a destroy.
        if decision.destroy == Destroy::First {
            prop_assert!(!may_be_at_host(next), "{status} {decision:?}");
        }
    }

    #[test]
    fn a_settled_row_stays_settled(
        status in any_status(),
        host in any_host(),
        cause in any_cause(),
    ) {
        let Some(decision) = settle(status, host.as_ref(), cause) else { return Ok(()) };
        let next = transition(status, decision.event).unwrap().0;
        // A sandbox that was destroyed at the host is not reported again.
        let left = host.filter(|_| may_be_at_host(next));
        prop_assert_eq!(settle(next, left.as_ref(), Cause::Pass), None);
    }
}

#[test]
fn a_row_keeps_the_last_reported_cpu_model_and_accelerator() {
    let mut row = row(S::Starting, "");
    for (reported, kept) in [("max", "max"), ("", "max"), ("host", "host")] {
        let report = HostReport {
            cpu: reported.to_owned(),
            accel: reported.to_owned(),
            ..report(HostState::Running)
        };
        report.fill(&mut row, 1);
        assert_eq!((&*row.options.cpu, &*row.options.accel), (kept, kept));
    }
}
