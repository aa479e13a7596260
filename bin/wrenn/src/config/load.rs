//! Reads the environment and the settings file into layers and merges them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;
use serde::{Deserialize as _, Deserializer, de::Error as _};
use wrenn_agent::{CgroupPolicy, Subnets};
use wrenn_model::InvalidCpuModel;

use super::{AccelChoice, DEFAULT_DIR, Layer, SYSTEM_FILE, Settings, VmmChoice};

/// Errors of loading the settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The settings file cannot be read.
    #[error("failed to read the settings file {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// The content of a settings file is invalid.
    #[error("{}: {message}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Line, key and problem.
        message: String,
    },
    /// An environment variable has an invalid value.
    #[error("{name}=`{value}`: {message}")]
    Variable {
        /// Name of the variable.
        name: &'static str,
        /// Value of the variable.
        value: String,
        /// Expected value.
        message: String,
    },
}

/// Merges flags, environment and file. `config` is the file given by a flag; `env` looks up a
/// variable.
pub(crate) fn load(
    flags: Layer,
    config: Option<&Path>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Settings, ConfigError> {
    // An empty variable counts as unset: this is how a shell script clears one.
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    let upper = flags.or(environment(&env)?);
    let named = config
        .map(Path::to_owned)
        .or_else(|| env("WRENN_CONFIG").map(PathBuf::from));
    let file = match named {
        Some(path) => read_file(&path)?.ok_or_else(|| ConfigError::Read {
            path,
            source: io::ErrorKind::NotFound.into(),
        })?,
        None => {
            let dir = upper.dir.clone().unwrap_or_else(|| DEFAULT_DIR.into());
            first_file([SYSTEM_FILE.into(), dir.join("wrenn.toml")])?
        }
    };
    Ok(Settings::from_layer(upper.or(file)))
}

/// Reads the first of `paths` that exists.
pub(super) fn first_file(paths: [PathBuf; 2]) -> Result<Layer, ConfigError> {
    for path in paths {
        if let Some(layer) = read_file(&path)? {
            return Ok(layer);
        }
    }
    Ok(Layer::default())
}

fn read_file(path: &Path) -> Result<Option<Layer>, ConfigError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(source) => {
            return Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    toml::from_str(&text)
        .map(Some)
        .map_err(|e| ConfigError::File {
            path: path.to_owned(),
            message: one_line(&e, &text),
        })
}

/// Formats a parse error as `line 3: unknown field ...`: the parser's own text spans several lines.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => {
            let line = text
                .get(..span.start)
                .unwrap_or(text)
                .matches('\n')
                .count()
                .saturating_add(1);
            format!("line {line}: {message}")
        }
        None => message,
    }
}

fn environment(env: &dyn Fn(&str) -> Option<String>) -> Result<Layer, ConfigError> {
    Ok(Layer {
        dir: env("WRENN_DIR").map(PathBuf::from),
        listen: parse(env, "WRENN_LISTEN", address)?,
        traffic_listen: parse(env, "WRENN_TRAFFIC_LISTEN", address)?,
        agent_listen: parse(env, "WRENN_AGENT_LISTEN", address)?,
        agent_url: env("WRENN_AGENT_URL"),
        images_dir: env("WRENN_IMAGES_DIR").map(PathBuf::from),
        api_url: env("WRENN_API_URL"),
        api_key: env("WRENN_API_KEY"),
        database_url: env("DATABASE_URL"),
        accel: parse(env, "WRENN_ACCEL", |s| {
            <AccelChoice as clap::ValueEnum>::from_str(s, false)
                .map_err(|_| "expected `auto`, `kvm` or `tcg`".to_owned())
        })?,
        vmm: parse(env, "WRENN_VMM", |s| {
            <VmmChoice as clap::ValueEnum>::from_str(s, false)
                .map_err(|_| "expected `auto`, `qemu` or `firecracker`".to_owned())
        })?,
        firecracker: env("WRENN_FIRECRACKER").map(PathBuf::from),
        kvm_check: parse(env, "WRENN_KVM_CHECK", |s| match s {
            "0" | "false" => Ok(false),
            "1" | "true" => Ok(true),
            _ => Err("expected `true` or `false`".to_owned()),
        })?,
        kernel_args: env("WRENN_KERNEL_ARGS"),
        cpu: parse(env, "WRENN_CPU", |s| {
            s.parse().map_err(|e: InvalidCpuModel| e.to_string())
        })?,
        egress: parse(env, "WRENN_EGRESS", str::parse)?,
        egress_limit: parse(env, "WRENN_EGRESS_LIMIT", str::parse)?,
        egress_open: parse(env, "WRENN_EGRESS_OPEN", |s| blocks(s.split(',')))?,
        egress_closed: parse(env, "WRENN_EGRESS_CLOSED", |s| blocks(s.split(',')))?,
        subnets: parse(env, "WRENN_SUBNETS", |s| subnets(s.split(',')))?,
        dns: parse(env, "WRENN_DNS", |s| {
            s.split(',')
                .map(|ip| ip.trim().parse())
                .collect::<Result<_, _>>()
                .map_err(|_| "expected comma-separated IP addresses".to_owned())
        })?,
        max_clients: parse(env, "WRENN_MAX_CLIENTS", at_least_one)?,
        max_clients_per_peer: parse(env, "WRENN_MAX_CLIENTS_PER_PEER", at_least_one)?,
        max_buffered_mib: parse(env, "WRENN_MAX_BUFFERED_MIB", at_least_one)?,
        max_lifetime_sec: parse(env, "WRENN_MAX_LIFETIME_SEC", at_least_one)?,
        retention_days: parse(env, "WRENN_RETENTION_DAYS", |s| {
            s.parse()
                .map_err(|_| "expected a number of days, 0 to keep all".to_owned())
        })?,
        memory_commit_percent: parse(env, "WRENN_MEMORY_COMMIT_PERCENT", at_least_one)?,
        memory_reserve_mb: parse(env, "WRENN_MEMORY_RESERVE_MB", mebibytes)?,
        disk_reserve_mb: parse(env, "WRENN_DISK_RESERVE_MB", mebibytes)?,
        disk_budget_mb: parse(env, "WRENN_DISK_BUDGET_MB", mebibytes)?,
        sandbox_disk_budget_mb: parse(env, "WRENN_SANDBOX_DISK_BUDGET_MB", mebibytes)?,
        disk_mb_per_sec: parse(env, "WRENN_DISK_MB_PER_SEC", number)?,
        disk_ops_per_sec: parse(env, "WRENN_DISK_OPS_PER_SEC", number)?,
        network_mbit_per_sec: parse(env, "WRENN_NETWORK_MBIT_PER_SEC", number)?,
        sandbox_connections: parse(env, "WRENN_SANDBOX_CONNECTIONS", number)?,
        sandbox_swap_mb: parse(env, "WRENN_SANDBOX_SWAP_MB", number)?,
        cgroups: parse(env, "WRENN_CGROUPS", str::parse)?,
        store_url: env("WRENN_STORE_URL"),
        store_endpoint: env("WRENN_STORE_ENDPOINT"),
        store_region: env("WRENN_STORE_REGION"),
        store_cache_mb: parse(env, "WRENN_STORE_CACHE_MB", at_least_one)?,
        store_retry_sec: parse(env, "WRENN_STORE_RETRY_SEC", at_least_one)?,
        log: env("WRENN_LOG"),
        envd: env("WRENN_ENVD").map(PathBuf::from),
    })
}

/// Parses ranges: `10.1.0.0/16`, or a single address. Bits after the prefix are dropped.
fn blocks<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<Ipv4Net>, String> {
    let block = |text: &str| {
        let text = text.trim();
        let address = text.parse::<std::net::Ipv4Addr>().map(Ipv4Net::from);
        let block = address.or_else(|_| text.parse::<Ipv4Net>().map(|block| block.trunc()));
        block.map_err(|_| format!("`{text}` is not an IPv4 address or range such as 10.1.0.0/16"))
    };
    texts.map(block).collect()
}

/// Parses the subnets of sandboxes: that of the guests, then that of the links.
fn subnets<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Subnets, String> {
    let blocks = blocks(texts)?;
    let [guests, links] = blocks.as_slice() else {
        return Err("expected two ranges such as 10.11.0.0/16,10.12.0.0/16".to_owned());
    };
    Subnets::new(*guests, *links).map_err(|error| error.to_string())
}

/// Reads ranges of the settings file.
pub(super) fn blocks_of_file<'de, D: Deserializer<'de>>(
    file: D,
) -> Result<Option<Vec<Ipv4Net>>, D::Error> {
    let texts = Vec::<String>::deserialize(file)?;
    let blocks = blocks(texts.iter().map(String::as_str));
    blocks.map(Some).map_err(D::Error::custom)
}

/// Reads the subnets of sandboxes in the settings file.
pub(super) fn subnets_of_file<'de, D: Deserializer<'de>>(
    file: D,
) -> Result<Option<Subnets>, D::Error> {
    let texts = Vec::<String>::deserialize(file)?;
    let subnets = subnets(texts.iter().map(String::as_str));
    subnets.map(Some).map_err(D::Error::custom)
}

/// Parses an address such as `127.0.0.1:8000`.
pub(crate) fn address(s: &str) -> Result<std::net::SocketAddr, String> {
    s.parse()
        .map_err(|_| "expected an address and port such as 127.0.0.1:8000".to_owned())
}

/// Reads the policy for a host without cgroup controllers in the settings file.
pub(super) fn cgroups_of_file<'de, D: Deserializer<'de>>(
    file: D,
) -> Result<Option<CgroupPolicy>, D::Error> {
    let text = String::deserialize(file)?;
    text.parse().map(Some).map_err(D::Error::custom)
}

/// Parses a number; 0 means no limit.
fn number(s: &str) -> Result<u32, String> {
    s.parse()
        .map_err(|_| "expected a number, 0 for no limit".to_owned())
}

/// Parses a size in MiB.
fn mebibytes<T: std::str::FromStr>(s: &str) -> Result<T, String> {
    s.parse().map_err(|_| "expected a number of MiB".to_owned())
}

/// Parses a number of at least 1.
fn at_least_one<T: std::str::FromStr>(s: &str) -> Result<T, String> {
    s.parse()
        .map_err(|_| "expected a number of at least 1".to_owned())
}

fn parse<T>(
    env: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, ConfigError> {
    env(name)
        .map(|value| {
            read(&value).map_err(|message| ConfigError::Variable {
                name,
                value,
                message,
            })
        })
        .transpose()
}
