//! Requests of the driver, compared with recorded files.

use serde_json::{Value, json};
use wrenn_proto::machine::MachineProfile;
use wrenn_vmm::{
    MachineConfig, Start,
    firecracker::{Control, Deadlines, Pages},
};

use crate::support::{
    FakeFirecracker, MAPPED_PATH, Reaction, config, empty_file, full_config, pager, state_file,
};

/// Simulated process, with the paths of its files.
struct Recording {
    fake: FakeFirecracker,
    control: Control,
    state_path: String,
    memory_path: String,
}

impl Recording {
    async fn start(version: &str, config: &MachineConfig, pages: Option<Pages>) -> Self {
        let (fake, channels) = FakeFirecracker::start(version, pages);
        let state_path = channels.files.state_path();
        let memory_path = channels.files.memory_path();
        let control = Control::attach(channels, config, Deadlines::default())
            .await
            .expect("attached");
        Self {
            fake,
            control,
            state_path,
            memory_path,
        }
    }

    /// Compares the requests so far with a recorded file. The numbers of descriptors differ from
    /// run to run, so names stand for them in the file.
    fn assert_equals(&self, recorded: &str) {
        let requests: Vec<Value> = self
            .fake
            .requests()
            .into_iter()
            .map(|(call, body)| json!({ "call": call, "body": body }))
            .collect();
        let sent = serde_json::to_string_pretty(&requests).expect("JSON");
        let sent = sent.replace(&format!("\"{}\"", self.state_path), "\"{state}\"");
        let sent = sent.replace(&format!("\"{}\"", self.memory_path), "\"{memory}\"");
        let sent: Value = serde_json::from_str(&sent).expect("JSON");
        let expected: Value = serde_json::from_str(recorded).expect("JSON");
        let pretty = |value| serde_json::to_string_pretty(value).expect("JSON");
        assert_eq!(pretty(&sent), pretty(&expected));
    }
}

async fn boot(version: &str, config: MachineConfig) -> Recording {
    let recording = Recording::start(version, &config, None).await;
    recording.control.boot(&config).await.expect("booted");
    recording
}

#[tokio::test]
async fn boot_configures_all_devices_and_starts_the_guest() {
    let recording = boot("1.16.1", full_config(Start::Boot)).await;
    recording.assert_equals(include_str!("golden/boot-1.16.1.json"));
    assert_eq!(recording.control.version().as_str(), "1.16.1");
}

#[tokio::test]
async fn boot_of_the_oldest_version_sends_no_field_that_came_later() {
    let recording = boot("1.10.1", config(Start::Boot)).await;
    recording.assert_equals(include_str!("golden/boot-1.10.1.json"));
}

#[tokio::test]
async fn boot_attaches_only_the_devices_of_the_profile() {
    let config = MachineConfig {
        machine: MachineProfile::first(),
        ..config(Start::Boot)
    };
    let recording = boot("1.16.1", config).await;
    let calls = recording.fake.calls();
    assert!(!calls.contains(&"PUT /balloon".to_owned()), "{calls:?}");
    assert!(calls.contains(&"PUT /entropy".to_owned()), "{calls:?}");
}

async fn restore(version: &str, config: MachineConfig) -> Recording {
    let (pages, _reader) = pager();
    let mut recording = Recording::start(version, &config, Some(pages)).await;
    let path = recording.fake.pages_path();
    let load = Reaction::run(move |_| crate::handshake::send_handshake(&path));
    recording.fake.react("PUT /snapshot/load", load);
    recording.control.load(state_file()).await.expect("loaded");
    recording.control.resume().await.expect("resumed");
    recording
}

#[tokio::test]
async fn restore_loads_paged_memory_then_sets_the_limits_of_this_host() {
    let recording = restore("1.16.1", full_config(Start::Restore)).await;
    recording.assert_equals(include_str!("golden/restore-paged-1.16.1.json"));
}

#[tokio::test]
async fn restore_before_1_13_names_dirty_tracking_differently() {
    let recording = restore("1.12.1", config(Start::Restore)).await;
    recording.assert_equals(include_str!("golden/restore-paged-1.12.1.json"));
}

#[tokio::test]
async fn restore_can_map_memory_from_a_file() {
    let pages = Pages::Mapped(MAPPED_PATH.to_owned());
    let config = config(Start::Restore);
    let mut recording = Recording::start("1.16.1", &config, Some(pages)).await;
    assert!(!recording.control.sends_handshake());
    recording.control.load(state_file()).await.expect("loaded");
    recording.assert_equals(include_str!("golden/restore-mapped-1.16.1.json"));
}

async fn snapshot(version: &str, memory_mib: u32) -> Recording {
    let mut config = config(Start::Boot);
    config.size.memory_mib = memory_mib;
    let recording = Recording::start(version, &config, None).await;
    recording.control.pause().await.expect("paused");
    let (state, _file) = empty_file();
    recording.control.save(state).await.expect("saved");
    recording.control.resume().await.expect("resumed");
    recording
}

#[tokio::test]
async fn snapshot_writes_the_changed_pages() {
    let recording = snapshot("1.16.1", 8192).await;
    recording.assert_equals(include_str!("golden/snapshot-diff.json"));
}

#[tokio::test]
async fn snapshot_is_full_where_the_version_writes_wrong_diffs() {
    let recording = snapshot("1.14.1", 8192).await;
    let create = recording
        .fake
        .requests()
        .into_iter()
        .find(|(call, _)| call == "PUT /snapshot/create");
    let (_, body) = create.expect("sent");
    assert_eq!(body["snapshot_type"], "Full");
}

#[tokio::test]
async fn statistics_of_the_balloon_are_read() {
    let recording = Recording::start("1.16.1", &config(Start::Boot), None).await;
    let text = include_str!("golden/answers/balloon-statistics.json");
    let reaction = Reaction::Answer(200, text.to_owned());
    recording.fake.react("GET /balloon/statistics", reaction);
    let statistics = recording
        .control
        .balloon_statistics()
        .await
        .expect("answered");
    assert_eq!(statistics.actual_mib, 0);
    assert_eq!(statistics.available_memory, Some(400_000_000));
    assert_eq!(statistics.disk_caches, None);
}
