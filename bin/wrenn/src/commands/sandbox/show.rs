//! Tables of sandboxes.

use jiff::Timestamp;
use wrenn_api_types::{Sandbox, UnknownSandbox};
use wrenn_model::Egress;

use super::super::process::OneArgs;
use crate::{client::Client, output};

/// Implements `wrenn sandbox get`.
pub(crate) async fn get(client: &Client, args: &OneArgs) -> anyhow::Result<i32> {
    let sandbox = client.get(&args.id).await?;
    if args.json {
        output::json(&sandbox)?;
    } else {
        output::table(&["field", "value"], details(&sandbox))?;
    }
    Ok(0)
}

/// Prints the table of `wrenn sandbox ls`.
pub(crate) fn list(sandboxes: &[Sandbox]) -> std::io::Result<()> {
    let now = Timestamp::now();
    let rows = sandboxes.iter().map(|s| row(s, now)).collect();
    output::table(
        &[
            "id", "status", "template", "vcpus", "memory", "egress", "age", "note",
        ],
        rows,
    )
}

/// Prints a table of sandboxes that are not in the database.
pub(crate) fn list_unknown(sandboxes: &[UnknownSandbox]) -> std::io::Result<()> {
    let now = Timestamp::now();
    let row = |sandbox: &UnknownSandbox| {
        vec![
            sandbox.id.clone(),
            sandbox.state.clone(),
            sandbox.template.clone(),
            sandbox.vcpus.to_string(),
            format!("{} MiB", sandbox.memory_mb),
            output::age(sandbox.created_at, now),
            sandbox.installation_id.clone().unwrap_or_default(),
        ]
    };
    let columns = [
        "id",
        "state",
        "template",
        "vcpus",
        "memory",
        "age",
        "installation",
    ];
    output::table(&columns, sandboxes.iter().map(row).collect())
}

fn row(sandbox: &Sandbox, now: Timestamp) -> Vec<String> {
    vec![
        sandbox.id.clone(),
        sandbox.status.to_string(),
        sandbox.template.clone(),
        sandbox.vcpus.to_string(),
        format!("{} MiB", sandbox.memory_mb),
        egress(sandbox.egress).to_owned(),
        output::age(sandbox.created_at, now),
        output::printable(sandbox.error.as_deref().unwrap_or_default()),
    ]
}

fn details(sandbox: &Sandbox) -> Vec<Vec<String>> {
    let mut rows = vec![
        ("id", sandbox.id.clone()),
        ("status", sandbox.status.to_string()),
        ("template", sandbox.template.clone()),
        ("vcpus", sandbox.vcpus.to_string()),
        ("memory", format!("{} MiB", sandbox.memory_mb)),
        ("disk", format!("{} MiB", sandbox.disk_size_mb)),
        ("egress", egress(sandbox.egress).to_owned()),
        ("idle timeout", idle(sandbox.timeout_sec)),
        ("created", sandbox.created_at.to_string()),
    ];
    let times = [
        ("started", sandbox.started_at),
        ("last used", sandbox.last_active_at),
    ];
    rows.extend(
        times
            .into_iter()
            .filter_map(|(name, t)| Some((name, t?.to_string()))),
    );
    if let Some(isolation) = &sandbox.isolation {
        let note = isolation.note.as_ref();
        let note = note.map_or_else(String::new, |note| format!(": {}", output::printable(note)));
        let accel = output::printable(&isolation.accel);
        rows.push(("isolation", format!("{accel}{note}")));
    }
    let words = [
        ("guest address", &sandbox.guest_ip),
        ("host address", &sandbox.host_ip),
        ("cpu", &sandbox.cpu),
        ("error", &sandbox.error),
    ];
    rows.extend(
        words
            .into_iter()
            .filter_map(|(name, word)| Some((name, output::printable(word.as_deref()?)))),
    );
    if let Some(boot) = sandbox.boot {
        rows.push((
            "boot",
            format!(
                "{} ms: prepared {}, VMM {}, kernel {}, init {}, envd {}",
                boot.envd_ms,
                boot.prepared_ms,
                boot.vmm_started_ms,
                boot.kernel_ms,
                boot.init_ms,
                boot.envd_ms
            ),
        ));
    }
    let mut rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect();
    for (name, value) in &sandbox.metadata {
        rows.push(vec![
            format!("metadata {}", output::printable(name)),
            output::printable(value),
        ]);
    }
    rows
}

fn egress(egress: Egress) -> &'static str {
    match egress {
        Egress::Allow => "allow",
        Egress::Deny => "deny",
    }
}

fn idle(seconds: u32) -> String {
    match seconds {
        0 => "never".to_owned(),
        n => format!("{n} s"),
    }
}

#[cfg(test)]
mod tests {
    use wrenn_api_types::Isolation;
    use wrenn_model::SandboxStatus;

    use super::*;

    fn sandbox() -> Sandbox {
        let at: Timestamp = "2026-01-10T00:00:00Z".parse().expect("a time");
        Sandbox {
            id: "sb-1".into(),
            status: SandboxStatus::Error,
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            disk_size_mb: 5120,
            timeout_sec: 0,
            egress: Egress::Deny,
            guest_ip: None,
            host_ip: None,
            metadata: [("owner".to_owned(), "a\nb".to_owned())].into(),
            on_timeout: wrenn_model::OnTimeout::Pause,
            auto_resume: false,
            warning: None,
            error: Some("the VMM was killed\x1b[2J".into()),
            boot: None,
            cpu: None,
            isolation: Isolation::of_accel("tcg".to_owned()),
            created_at: at,
            started_at: None,
            last_active_at: None,
            last_updated: at,
            expires_at: None,
        }
    }

    #[test]
    fn row_shows_the_reason_of_a_failed_sandbox() {
        let now = "2026-01-10T00:02:00Z".parse().expect("a time");
        let row = row(&sandbox(), now);
        assert_eq!(row[1], "error");
        assert_eq!(row[6], "2m");
        assert_eq!(row[7], "the VMM was killed\u{fffd}[2J");
    }

    #[test]
    fn details_omit_unknown_fields() {
        let rows = details(&sandbox());
        let names: Vec<&str> = rows.iter().map(|r| r[0].as_str()).collect();
        assert!(!names.contains(&"started"), "{names:?}");
        assert!(names.contains(&"metadata owner"), "{names:?}");
        let emulated =
            |row: &Vec<String>| row[0] == "isolation" && row[1].contains("not a security boundary");
        assert!(rows.iter().any(emulated), "{rows:?}");
        assert!(
            rows.iter()
                .any(|r| r[0] == "idle timeout" && r[1] == "never")
        );
    }
}
