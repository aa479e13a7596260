#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::collections::HashMap;

use super::{
    load::{ConfigError, first_file},
    *,
};

struct Sources {
    dir: tempfile::TempDir,
    env: HashMap<&'static str, String>,
}

impl Sources {
    /// Uses a separate data directory, so that the machine's real settings are never read.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.toml");
        std::fs::write(&empty, "").unwrap();
        let env = HashMap::from([("WRENN_CONFIG", empty.display().to_string())]);
        Self { dir, env }
    }

    fn env(mut self, name: &'static str, value: &str) -> Self {
        self.env.insert(name, value.to_owned());
        self
    }

    fn file(self, text: &str) -> Self {
        let path = self.dir.path().join("named.toml");
        std::fs::write(&path, text).unwrap();
        let path = path.display().to_string();
        self.env("WRENN_CONFIG", &path)
    }

    fn load(&self, flags: Layer) -> Result<Settings, ConfigError> {
        load(flags, None, |name| self.env.get(name).cloned())
    }

    fn error(&self) -> String {
        self.load(Layer::default()).unwrap_err().to_string()
    }
}

fn other_host_limits() -> HostLimits {
    HostLimits {
        memory_commit_percent: 300,
        memory_reserve_mib: 1000,
        disk_reserve_mib: Some(2000),
        disk_budget_mib: Some(3000),
        sandbox_disk_budget_mib: Some(4000),
        sandbox: SandboxLimits {
            disk_mib_per_sec: 11,
            disk_ops_per_sec: 12,
            network_mbit_per_sec: 13,
            connections: 14,
            swap_mib: 15,
        },
        cgroups: CgroupPolicy::Optional,
    }
}

fn other_object_store() -> ObjectStoreConfig {
    ObjectStoreConfig {
        url: "s3://b/p".to_owned(),
        endpoint: Some("http://e".to_owned()),
        region: Some("r".to_owned()),
        retry: Duration::from_secs(17),
        cache_bytes: 16 << 20,
    }
}

fn other_subnets() -> Subnets {
    let block = |text: &str| text.parse().unwrap();
    Subnets::new(block("10.3.0.0/16"), block("10.4.0.0/16")).unwrap()
}

#[test]
fn paths_are_made_absolute() {
    let flags = Layer {
        dir: Some("data".into()),
        envd: Some("./envd".into()),
        ..Layer::default()
    };
    let settings = Sources::new().load(flags).unwrap();
    let here = std::env::current_dir().unwrap();
    assert_eq!(settings.dir, here.join("data"));
    assert_eq!(settings.images_dir, here.join("data/images"));
    assert_eq!(settings.envd, Some(here.join("envd")));
}

#[test]
fn precedence_is_flag_environment_file_default() {
    let flags = Layer {
        api_url: Some("http://flag".into()),
        ..Layer::default()
    };
    let default = Sources::new();
    let settings = default.load(Layer::default()).unwrap();
    assert_eq!(settings.api_url, "http://127.0.0.1:8000");

    let file = Sources::new().file(r#"api_url = "http://file""#);
    assert_eq!(file.load(Layer::default()).unwrap().api_url, "http://file");

    let both = file.env("WRENN_API_URL", "http://env");
    assert_eq!(both.load(Layer::default()).unwrap().api_url, "http://env");
    assert_eq!(both.load(flags).unwrap().api_url, "http://flag");
}

#[test]
fn every_variable_reaches_its_setting() {
    let sources = Sources::new()
        .env("WRENN_DIR", "/d")
        .env("WRENN_LISTEN", "0.0.0.0:1")
        .env("WRENN_TRAFFIC_LISTEN", "127.0.0.1:3")
        .env("WRENN_AGENT_LISTEN", "127.0.0.1:2")
        .env("WRENN_AGENT_URL", "http://a")
        .env("WRENN_IMAGES_DIR", "/i")
        .env("WRENN_API_URL", "http://u")
        .env("WRENN_API_KEY", "wrn_k")
        .env("DATABASE_URL", "postgres://p")
        .env("WRENN_ACCEL", "tcg")
        .env("WRENN_VMM", "firecracker")
        .env("WRENN_FIRECRACKER", "/fc")
        .env("WRENN_KVM_CHECK", "false")
        .env("WRENN_KERNEL_ARGS", "a=b c")
        .env("WRENN_CPU", "max,-avx512f")
        .env("WRENN_EGRESS", "allow")
        .env("WRENN_EGRESS_LIMIT", "any")
        .env("WRENN_EGRESS_OPEN", "10.1.0.0/16")
        .env("WRENN_EGRESS_CLOSED", "10.2.0.0/16")
        .env("WRENN_SUBNETS", "10.3.0.0/16, 10.4.0.0/16")
        .env("WRENN_DNS", "192.0.2.1, 192.0.2.2")
        .env("WRENN_MAX_CLIENTS", "10")
        .env("WRENN_MAX_CLIENTS_PER_PEER", "5")
        .env("WRENN_MAX_BUFFERED_MIB", "3")
        .env("WRENN_RETENTION_DAYS", "0")
        .env("WRENN_MAX_LIFETIME_SEC", "60")
        .env("WRENN_MEMORY_COMMIT_PERCENT", "300")
        .env("WRENN_MEMORY_RESERVE_MB", "1000")
        .env("WRENN_DISK_RESERVE_MB", "2000")
        .env("WRENN_DISK_BUDGET_MB", "3000")
        .env("WRENN_SANDBOX_DISK_BUDGET_MB", "4000")
        .env("WRENN_DISK_MB_PER_SEC", "11")
        .env("WRENN_DISK_OPS_PER_SEC", "12")
        .env("WRENN_NETWORK_MBIT_PER_SEC", "13")
        .env("WRENN_SANDBOX_CONNECTIONS", "14")
        .env("WRENN_SANDBOX_SWAP_MB", "15")
        .env("WRENN_CGROUPS", "optional")
        .env("WRENN_STORE_URL", "s3://b/p")
        .env("WRENN_STORE_ENDPOINT", "http://e")
        .env("WRENN_STORE_REGION", "r")
        .env("WRENN_STORE_CACHE_MB", "16")
        .env("WRENN_STORE_RETRY_SEC", "17")
        .env("WRENN_LOG", "debug")
        .env("WRENN_ENVD", "/e");
    assert_eq!(
        sources.load(Layer::default()).unwrap(),
        Settings {
            dir: "/d".into(),
            listen: "0.0.0.0:1".parse().unwrap(),
            traffic_listen: "127.0.0.1:3".parse().unwrap(),
            agent_listen: "127.0.0.1:2".parse().unwrap(),
            agent_url: "http://a".into(),
            images_dir: "/i".into(),
            api_url: "http://u".into(),
            api_key: Some("wrn_k".into()),
            database_url: "postgres://p".into(),
            accel: AccelChoice::Tcg,
            vmm: VmmChoice::Firecracker,
            firecracker: Some("/fc".into()),
            kvm_check: false,
            kernel_args: "a=b c".into(),
            cpu: Some("max,-avx512f".parse().unwrap()),
            egress: Egress::Allow,
            egress_limit: EgressLimit::Any,
            egress_open: vec!["10.1.0.0/16".parse().unwrap()],
            egress_closed: vec!["10.2.0.0/16".parse().unwrap()],
            subnets: Some(other_subnets()),
            dns: Some(vec![
                "192.0.2.1".parse().unwrap(),
                "192.0.2.2".parse().unwrap()
            ]),
            limits: Limits {
                max_clients: 10,
                max_clients_per_peer: 5,
                max_buffered_bytes: 3 << 20,
                retention: None,
                max_lifetime_sec: 60,
                ..Limits::default()
            },
            host_limits: other_host_limits(),
            object_store: Some(other_object_store()),
            log: "debug".into(),
            envd: Some("/e".into()),
        }
    );
}

#[test]
fn every_key_of_the_file_reaches_its_setting() {
    let sources = Sources::new().file(
        r#"
        dir = "/d"
        listen = "[::]:1"
        traffic_listen = "127.0.0.1:3"
        agent_listen = "127.0.0.1:2"
        agent_url = "http://a"
        images_dir = "/i"
        api_key = "wrn_k"
        database_url = "postgres://p"
        accel = "kvm"
        vmm = "qemu"
        firecracker = "/fc"
        kvm_check = false
        kernel_args = "a=b c"
        cpu = "Haswell"
        egress = "allow"
        egress_limit = "never"
        egress_open = ["10.1.0.0/16"]
        egress_closed = ["10.2.0.0/16"]
        subnets = ["10.3.0.0/16", "10.4.0.0/16"]
        dns = ["192.0.2.1"]
        max_clients = 10
        max_clients_per_peer = 5
        max_buffered_mib = 4
        retention_days = 2
        max_lifetime_sec = 70
        memory_commit_percent = 300
        memory_reserve_mb = 1000
        disk_reserve_mb = 2000
        disk_budget_mb = 3000
        sandbox_disk_budget_mb = 4000
        disk_mb_per_sec = 11
        disk_ops_per_sec = 12
        network_mbit_per_sec = 13
        sandbox_connections = 14
        sandbox_swap_mb = 15
        cgroups = "optional"
        store_url = "s3://b/p"
        store_endpoint = "http://e"
        store_region = "r"
        store_cache_mb = 16
        store_retry_sec = 17
        log = "warn"
        envd = "/e"
        "#,
    );
    assert_eq!(
        sources.load(Layer::default()).unwrap(),
        Settings {
            dir: "/d".into(),
            listen: "[::]:1".parse().unwrap(),
            traffic_listen: "127.0.0.1:3".parse().unwrap(),
            agent_listen: "127.0.0.1:2".parse().unwrap(),
            agent_url: "http://a".into(),
            images_dir: "/i".into(),
            api_url: "http://[::1]:1".into(),
            api_key: Some("wrn_k".into()),
            database_url: "postgres://p".into(),
            accel: AccelChoice::Kvm,
            vmm: VmmChoice::Qemu,
            firecracker: Some("/fc".into()),
            kvm_check: false,
            kernel_args: "a=b c".into(),
            cpu: Some("Haswell".parse().unwrap()),
            egress: Egress::Allow,
            egress_limit: EgressLimit::Never,
            egress_open: vec!["10.1.0.0/16".parse().unwrap()],
            egress_closed: vec!["10.2.0.0/16".parse().unwrap()],
            subnets: Some(other_subnets()),
            dns: Some(vec!["192.0.2.1".parse().unwrap()]),
            limits: Limits {
                max_clients: 10,
                max_clients_per_peer: 5,
                max_buffered_bytes: 4 << 20,
                retention: Some(Duration::from_secs(172_800)),
                max_lifetime_sec: 70,
                ..Limits::default()
            },
            host_limits: other_host_limits(),
            object_store: Some(other_object_store()),
            log: "warn".into(),
            envd: Some("/e".into()),
        }
    );
}

#[test]
fn paths_and_urls_follow_the_directory_and_the_listeners() {
    let settings = Sources::new()
        .env("WRENN_DIR", "/d")
        .env("WRENN_LISTEN", "0.0.0.0:81")
        .env("WRENN_AGENT_LISTEN", "192.0.2.7:82")
        .load(Layer::default())
        .unwrap();
    assert_eq!(settings.images_dir, Path::new("/d/images"));
    assert_eq!(settings.database_url, "sqlite:///d/wrenn.db?mode=rwc");
    assert_eq!(
        sqlite_url(Path::new("/a?b#c%d")),
        "sqlite:///a%3Fb%23c%25d?mode=rwc"
    );
    assert_eq!(settings.key_file(), Path::new("/d/api-key"));
    assert_eq!(settings.e2b_key_file(), Path::new("/d/e2b-api-key"));
    assert_eq!(settings.api_url, "http://127.0.0.1:81");
    // A public API listener does not make the ports of guests public.
    assert_eq!(settings.traffic_listen.to_string(), "127.0.0.1:8001");
    assert_eq!(settings.agent_url, "http://192.0.2.7:82");
}

#[test]
fn empty_variable_is_ignored() {
    let settings = Sources::new()
        .env("WRENN_API_KEY", "")
        .env("WRENN_ACCEL", "")
        .load(Layer::default())
        .unwrap();
    assert_eq!(settings.api_key, None);
    assert_eq!(settings.accel, AccelChoice::Auto);
}

#[test]
fn invalid_variable_is_named_with_its_value() {
    let listen = Sources::new().env("WRENN_LISTEN", "nowhere").error();
    assert!(listen.starts_with("WRENN_LISTEN=`nowhere`: "), "{listen}");
    let accel = Sources::new().env("WRENN_ACCEL", "xen").error();
    assert!(accel.starts_with("WRENN_ACCEL=`xen`: "), "{accel}");
    let vmm = Sources::new().env("WRENN_VMM", "xen").error();
    assert!(vmm.starts_with("WRENN_VMM=`xen`: "), "{vmm}");
    let check = Sources::new().env("WRENN_KVM_CHECK", "maybe").error();
    assert!(check.starts_with("WRENN_KVM_CHECK=`maybe`: "), "{check}");
    let cpu = Sources::new().env("WRENN_CPU", "max avx2").error();
    assert!(cpu.starts_with("WRENN_CPU=`max avx2`: "), "{cpu}");
    let cpu = Sources::new().file("cpu = \"max,avx2\"\n").error();
    assert!(cpu.contains("named.toml: line 1: "), "{cpu}");
    let egress = Sources::new().env("WRENN_EGRESS", "maybe").error();
    assert!(egress.starts_with("WRENN_EGRESS=`maybe`: "), "{egress}");
    let clients = Sources::new().env("WRENN_MAX_CLIENTS", "0").error();
    assert!(clients.starts_with("WRENN_MAX_CLIENTS=`0`: "), "{clients}");
}

#[test]
fn an_unknown_key_is_named_with_its_file_and_line() {
    let error = Sources::new()
        .file("accel = \"tcg\"\nlisten_on = 1\n")
        .error();
    assert!(error.contains("named.toml: line 2: "), "{error}");
    assert!(error.contains("`listen_on`"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_named_file_that_is_missing_is_an_error() {
    let error = Sources::new()
        .env("WRENN_CONFIG", "/no/such/wrenn.toml")
        .error();
    assert!(error.contains("/no/such/wrenn.toml"), "{error}");
}

#[test]
fn first_existing_default_file_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let log = || {
        first_file([a.clone(), b.clone()])
            .unwrap()
            .log
            .unwrap_or_default()
    };
    assert_eq!(log(), "");
    std::fs::write(&b, "log = \"b\"").unwrap();
    assert_eq!(log(), "b");
    std::fs::write(&a, "log = \"a\"").unwrap();
    assert_eq!(log(), "a");
}

#[test]
fn ranges_are_addresses_or_blocks_and_an_error_names_the_setting() {
    let settings = Sources::new()
        .env("WRENN_EGRESS_OPEN", "10.1.2.3, 10.2.3.4/16")
        .load(Layer::default())
        .unwrap();
    let texts: Vec<_> = settings
        .egress_open
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(texts, ["10.1.2.3/32", "10.2.0.0/16"]);
    for (name, value) in [
        ("WRENN_EGRESS_LIMIT", "some"),
        ("WRENN_EGRESS_OPEN", "10.0.0.0/33"),
        ("WRENN_EGRESS_CLOSED", "example.com"),
        ("WRENN_SUBNETS", "10.1.0.0/16"),
        ("WRENN_SUBNETS", "10.1.0.0/16,10.1.0.0/16"),
        ("WRENN_DNS", "nowhere"),
    ] {
        let error = Sources::new().env(name, value).error();
        assert!(error.starts_with(&format!("{name}=`{value}`: ")), "{error}");
    }
    let error = Sources::new()
        .file("egress_open = [\"10.0.0.0/40\"]")
        .error();
    assert!(
        error.contains("line 1: ") && error.contains("10.0.0.0/40"),
        "{error}"
    );
    let error = Sources::new()
        .file("subnets = [\"10.0.0.0/24\", \"10.1.0.0/16\"]")
        .error();
    assert!(error.contains("10.0.0.0/24 is too small"), "{error}");
}
