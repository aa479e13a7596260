//! Command line against a running service, from a user's view.

use std::process::Output;

use anyhow::Result;
use wrenn_e2e::Service;

/// Runs a CLI command to its end.
fn run(service: &Service, verb: &str, args: &[&str]) -> Result<Output> {
    Ok(service
        .command(verb)
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn run_streams_output_and_returns_the_exit_code() -> Result<()> {
    let service = Service::start().await?;
    let output = run(
        &service,
        "run",
        &["--", "sh", "-c", "printf out; printf err >&2; exit 3"],
    )?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(
        (text(&output.stdout).as_str(), text(&output.stderr).as_str()),
        ("out", "err")
    );
    let (_, list) = service.get("/v1/sandboxes").await?;
    assert_eq!(
        list,
        serde_json::json!([]),
        "the temporary sandbox must be removed"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_created_listed_used_and_removed() -> Result<()> {
    let service = Service::start().await?;
    let created = run(&service, "sandbox", &["create", "--memory", "256"])?;
    assert!(created.status.success(), "{created:?}");
    let id = text(&created.stdout).trim().to_owned();
    assert!(id.starts_with("sb-"), "{created:?}");

    let listed = run(&service, "sandbox", &["ls"])?;
    assert!(text(&listed.stdout).contains(&id), "{listed:?}");
    let json = run(&service, "sandbox", &["ls", "--json"])?;
    let json: serde_json::Value = serde_json::from_slice(&json.stdout)?;
    assert_eq!(json[0]["id"], id.as_str());

    let dir = tempfile::tempdir()?;
    let (local, back) = (dir.path().join("local"), dir.path().join("back"));
    let content: Vec<u8> = (0..200_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    std::fs::write(&local, &content)?;
    let remote = format!("{id}:/home/user/file");
    let up = run(
        &service,
        "sandbox",
        &["cp", local.to_str().unwrap(), &remote],
    )?;
    assert!(up.status.success(), "{up:?}");
    let size = run(
        &service,
        "sandbox",
        &["exec", &id, "--", "stat", "-c", "%s", "/home/user/file"],
    )?;
    assert_eq!(text(&size.stdout), "200000\n");
    let down = run(
        &service,
        "sandbox",
        &["cp", &remote, back.to_str().unwrap()],
    )?;
    assert!(down.status.success(), "{down:?}");
    assert_eq!(std::fs::read(&back)?, content);

    let exec = |args: &[&str]| run(&service, "sandbox", &[&["exec", &id, "--"], args].concat());
    let behind = exec(&["sh", "-c", "sleep 1000 & echo up; exit 4"])?;
    assert_eq!(behind.status.code(), Some(4), "{behind:?}");
    assert_eq!(text(&behind.stdout), "up\n");
    for (program, code) in [("nonesuch", 127), ("/etc/passwd", 126)] {
        let failed = exec(&[program])?;
        assert_eq!(failed.status.code(), Some(code), "{failed:?}");
        assert!(text(&failed.stderr).contains(program), "{failed:?}");
    }

    let removed = run(&service, "sandbox", &["rm", &id])?;
    assert!(removed.status.success(), "{removed:?}");
    let gone = run(&service, "sandbox", &["exec", &id, "--", "true"])?;
    assert_eq!(gone.status.code(), Some(1), "{gone:?}");
    assert!(text(&gone.stderr).starts_with("wrenn: "), "{gone:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_finds_nothing_wrong_with_this_machine() -> Result<()> {
    let service = Service::start().await?;
    let text_report = run(&service, "doctor", &[])?;
    let json_report = run(&service, "doctor", &["--json"])?;
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&json_report.stdout)?;
    let failed: Vec<&str> = findings
        .iter()
        .filter(|finding| finding["level"] == "fail")
        .filter_map(|finding| finding["name"].as_str())
        .collect();
    // Other programs of the machine decide how much of its disk is free.
    let failed_here = failed.iter().filter(|name| **name != "free disk").count();
    assert_eq!(failed_here, 0, "{}", text(&text_report.stdout));
    assert!(findings.iter().any(|finding| finding["name"] == "images"));
    assert_eq!(json_report.status.success(), failed.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_service_is_reported_in_one_line() -> Result<()> {
    let mut service = Service::start().await?;
    service.kill()?;
    let output = run(&service, "sandbox", &["ls"])?;
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert!(
        message.starts_with("wrenn: ") && message.trim().lines().count() == 1,
        "{message}"
    );
    Ok(())
}
