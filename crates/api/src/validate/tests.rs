#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use proptest::prelude::*;

use super::*;

fn template(name: &str, kind: &str) -> wrenn_db::Template {
    wrenn_db::Template {
        name: name.to_owned(),
        kind: kind.to_owned(),
        vcpus: 2,
        memory_mb: 384,
        disk_size_mb: if kind == host::SNAPSHOT { 2048 } else { 0 },
        generation: 0,
        size_bytes: 1,
        created_at: 0,
    }
}

fn facts() -> HostFacts {
    HostFacts {
        accel: "kvm".to_owned(),
        cpu_count: 2,
        memory_total_mib: 4096,
        templates: vec![
            template("minimal", host::BASE),
            template("mine", host::SNAPSHOT),
        ],
    }
}

fn create(request: CreateSandbox) -> Result<NewSandbox, ApiError> {
    let template = create_shape(&request)?;
    create_fits(TeamId::default(), request, template, &facts(), Egress::Deny)
}

fn sizes(new: &NewSandbox) -> (u32, u32, u32) {
    (new.size.vcpus, new.size.memory_mib, new.size.disk_mib)
}

#[test]
fn omitted_fields_are_those_of_the_template_or_the_default() {
    let new = create(CreateSandbox::default()).unwrap();
    assert_eq!(sizes(&new), (2, 384, limits::DEFAULT_DISK_MIB));
    assert_eq!(new.timeout_sec, limits::DEFAULT_TIMEOUT_SEC);
    assert_eq!(new.template.as_str(), "minimal");
    assert!(!new.auto_resume);
}

#[test]
fn sizes_of_a_snapshot_take_precedence_over_the_capacity() {
    let request = CreateSandbox {
        template: Some("mine".to_owned()),
        vcpus: Some(32),
        memory_mb: Some(1 << 20),
        disk_size_mb: Some(64),
        ..Default::default()
    };
    assert_eq!(sizes(&create(request.clone()).unwrap()), (2, 384, 2048));
    let request = CreateSandbox {
        template: None,
        ..request
    };
    let error = create(request).unwrap_err();
    assert!(error.message.contains("`vcpus`"), "{}", error.message);
}

#[test]
fn bounds_are_inclusive() {
    for (vcpus, memory, good) in [
        (1, 128, true),
        (8, 4096, true),
        (0, 128, false),
        (9, 128, false),
        (1, 127, false),
        (1, 4097, false),
    ] {
        let request = CreateSandbox {
            vcpus: Some(vcpus),
            memory_mb: Some(memory),
            ..Default::default()
        };
        assert_eq!(create(request).is_ok(), good, "{vcpus} {memory}");
    }
    for (count, good) in [
        (0, false),
        (1, true),
        (100, true),
        (101, false),
        (-1, false),
    ] {
        let request = ForkSandbox { count: Some(count) };
        assert_eq!(fork_count(&request).is_ok(), good, "{count}");
    }
}

#[test]
fn disk_smaller_than_its_image_is_rejected() {
    let mut facts = facts();
    facts.templates[0].disk_size_mb = 6000;
    for (asked, given) in [
        (None, Some(6000)),
        (Some(6000), Some(6000)),
        (Some(5999), None),
    ] {
        let request = CreateSandbox {
            disk_size_mb: asked,
            ..Default::default()
        };
        let template = create_shape(&request).unwrap();
        let made = create_fits(TeamId::default(), request, template, &facts, Egress::Deny);
        match (made, given) {
            (Ok(new), given) => assert_eq!(Some(new.size.disk_mib), given),
            (Err(error), None) => assert!(
                error.message.contains("`disk_size_mb`") && error.message.contains("6000"),
                "{}",
                error.message
            ),
            (Err(error), Some(_)) => panic!("{}", error.message),
        }
    }
}

#[test]
fn environment_above_the_limit_of_the_agent_is_rejected() {
    for (bytes, good) in [(0, true), (1, false)] {
        let value = "v".repeat(limits::MAX_SANDBOX_ENVS_BYTES - 1 + bytes);
        let request = CreateSandbox {
            envs: Some([("K".to_owned(), value)].into()),
            ..Default::default()
        };
        assert_eq!(create(request).is_ok(), good, "{bytes}");
    }
}

proptest! {
    #[test]
    fn any_accepted_request_is_within_bounds(
        name in prop::option::of("minimal|mine|[ -~]{0,70}"),
        vcpus in prop::option::of(any::<i64>()),
        memory_mb in prop::option::of(prop_oneof![any::<i64>(), 0..9000_i64]),
        disk_size_mb in prop::option::of(prop_oneof![any::<i64>(), 0..9000_i64]),
        timeout_sec in prop::option::of(prop_oneof![any::<i64>(), 0..9000_i64]),
    ) {
        let request = CreateSandbox { template: name, vcpus, memory_mb, disk_size_mb, timeout_sec, ..Default::default() };
        match create(request) {
            Ok(new) => {
                prop_assert!((1..=8).contains(&new.size.vcpus));
                prop_assert!((limits::MIN_MEMORY_MIB..=4096).contains(&new.size.memory_mib));
                prop_assert!((MIN_DISK_MIB..=limits::MAX_DISK_MIB).contains(&new.size.disk_mib));
                prop_assert!(new.timeout_sec <= limits::MAX_TIMEOUT_SEC);
            }
            Err(error) => {
                prop_assert!(error.status.is_client_error());
                prop_assert!(error.message.starts_with('`'), "{}", error.message);
            }
        }
    }

    #[test]
    fn accepted_user_names_and_tags_are_safe_in_headers_and_paths(text in ".{0,70}") {
        if check_user(Some(&text)).is_ok() {
            prop_assert!(!text.contains([':', '/', '\r', '\n', ' ']));
        }
        if check_tag("tag", &text).is_ok() {
            prop_assert!(text.bytes().all(|b| b.is_ascii_graphic() && b != b'/'));
            prop_assert!(text.parse::<u64>().is_err());
        }
    }
}
