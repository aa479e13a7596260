//! Checks of request fields. Each error names its field. No I/O.

use std::collections::BTreeMap;

use wrenn_api_types::{CreateSandbox, ExecRequest, ForkSandbox, Template};
use wrenn_control::{
    host::{self, HostFacts},
    lifecycle::NewSandbox,
};
use wrenn_db::Options;
use wrenn_model::{Egress, MachineSize, TeamId, TemplateName, limits};

use crate::{
    error::{ApiError, Code},
    records::IntoRest as _,
};

/// Template of a request that names none.
const DEFAULT_TEMPLATE: &str = "minimal";

/// Memory in MiB, if neither the request nor the template gives a size.
const DEFAULT_MEMORY_MIB: u32 = 512;

/// Minimum disk size in MiB, if the template does not give one.
const MIN_DISK_MIB: u32 = 64;

/// Maximum number and sizes of metadata entries.
const MAX_METADATA: usize = 64;
const MAX_METADATA_KEY_BYTES: usize = 128;
const MAX_METADATA_VALUE_BYTES: usize = 4096;

/// Maximum number and sizes of environment entries.
const MAX_ENVS: usize = 1000;
const MAX_ENV_BYTES: usize = 128 * 1024;
const MAX_ENVS_BYTES: usize = 512 * 1024;

/// Maximum size of one argument in the guest's kernel, in bytes.
const MAX_ARG_BYTES: usize = 128 * 1024;

/// Maximum length of a path, in bytes.
const MAX_PATH_BYTES: usize = 4096;

/// Maximum length of a user name or tag, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// Maximum depth of a directory listing.
const MAX_DEPTH: i64 = 100;

/// Timeout of a foreground command in seconds, if the request gives none.
const DEFAULT_EXEC_TIMEOUT_SEC: u32 = 30;

/// Checks that a number is within bounds.
fn ranged(name: &str, value: i64, min: u32, max: u32) -> Result<u32, ApiError> {
    u32::try_from(value)
        .ok()
        .filter(|n| (min..=max).contains(n))
        .ok_or_else(|| {
            ApiError::field(
                name,
                format!("{value} is out of range, expected {min} to {max}"),
            )
        })
}

fn optional(
    name: &str,
    value: Option<i64>,
    min: u32,
    max: u32,
    default: u32,
) -> Result<u32, ApiError> {
    value.map_or(Ok(default), |n| ranged(name, n, min, max))
}

/// Checks the fields of a create that need no knowledge of the host. Returns the template's name.
pub(crate) fn create_shape(request: &CreateSandbox) -> Result<TemplateName, ApiError> {
    let name = request.template.as_deref().unwrap_or(DEFAULT_TEMPLATE);
    let template = name
        .parse()
        .map_err(|error| ApiError::field("template", error))?;
    optional("vcpus", request.vcpus, 1, limits::MAX_VCPUS, 1)?;
    optional(
        "memory_mb",
        request.memory_mb,
        limits::MIN_MEMORY_MIB,
        limits::MAX_MEMORY_MIB,
        0,
    )?;
    disk_size(request, None)?;
    timeout(request)?;
    if let Some(envs) = &request.envs {
        check_envs(envs)?;
        let bytes: usize = envs
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        if bytes > limits::MAX_SANDBOX_ENVS_BYTES {
            let max = limits::MAX_SANDBOX_ENVS_BYTES;
            let why = format!(
                "{bytes} bytes in total exceed the limit of {max}; `envs` of a command may be larger"
            );
            return Err(ApiError::field("envs", why));
        }
    }
    if let Some(metadata) = &request.metadata {
        check_metadata(metadata)?;
    }
    Ok(template)
}

/// Returns the disk size, in MiB. It is never below that of the template's image, if that is known.
fn disk_size(request: &CreateSandbox, image_mb: Option<u32>) -> Result<u32, ApiError> {
    optional(
        "disk_size_mb",
        request.disk_size_mb,
        image_mb.unwrap_or(MIN_DISK_MIB),
        limits::MAX_DISK_MIB,
        limits::DEFAULT_DISK_MIB.max(image_mb.unwrap_or(0)),
    )
}

fn timeout(request: &CreateSandbox) -> Result<u32, ApiError> {
    optional(
        "timeout_sec",
        request.timeout_sec,
        0,
        limits::MAX_TIMEOUT_SEC,
        limits::DEFAULT_TIMEOUT_SEC,
    )
}

/// Checks the fields of a team's create against the templates and capacity of the host.
pub(crate) fn create_fits(
    team: TeamId,
    request: CreateSandbox,
    template: TemplateName,
    facts: &HostFacts,
    default_egress: Egress,
) -> Result<NewSandbox, ApiError> {
    let known = facts
        .templates
        .iter()
        .find(|known| known.name == template.as_str())
        .map(|known| known.clone().into_rest());
    let Some(known) = &known else {
        let message = format!("`template`: there is no template `{template}`");
        return Err(ApiError::new(Code::NotFound, message));
    };
    let timeout_sec = timeout(&request)?;
    let size = if known.kind == host::SNAPSHOT {
        // A snapshot determines the size of the VM, whatever the request asks for.
        MachineSize {
            vcpus: known.vcpus.unwrap_or(1),
            memory_mib: known.memory_mb.unwrap_or(DEFAULT_MEMORY_MIB),
            disk_mib: known.disk_size_mb.unwrap_or(limits::DEFAULT_DISK_MIB),
        }
    } else {
        chosen_size(&request, known, facts)?
    };
    Ok(NewSandbox {
        team,
        template,
        size,
        timeout_sec,
        on_timeout: request.on_timeout.unwrap_or_default(),
        auto_resume: request.auto_resume.unwrap_or(false),
        egress: request.egress.unwrap_or(default_egress),
        envs: request.envs.unwrap_or_default().into_iter().collect(),
        metadata: request.metadata.unwrap_or_default(),
        e2b_id: false,
        options: Options::default(),
        idempotency_key: String::new(),
    })
}

/// Returns the size of a sandbox that boots: that of the request, else that of the template, within
/// the capacity of the host.
fn chosen_size(
    request: &CreateSandbox,
    known: &Template,
    host: &HostFacts,
) -> Result<MachineSize, ApiError> {
    let cpus = host.cpu_count.max(1);
    let max_vcpus = limits::MAX_VCPUS.min(cpus.saturating_mul(limits::VCPUS_PER_CPU));
    let vcpus = optional("vcpus", request.vcpus, 1, max_vcpus, 1)?;
    let vcpus = match request.vcpus {
        Some(_) => vcpus,
        None => known.vcpus.unwrap_or(1),
    };
    let max_memory = u32::try_from(host.memory_total_mib)
        .unwrap_or(u32::MAX)
        .min(limits::MAX_MEMORY_MIB);
    let default_memory = known.memory_mb.unwrap_or(DEFAULT_MEMORY_MIB);
    let memory_mib = optional(
        "memory_mb",
        request.memory_mb,
        limits::MIN_MEMORY_MIB,
        max_memory,
        default_memory,
    )?;
    Ok(MachineSize {
        vcpus,
        memory_mib,
        disk_mib: disk_size(request, known.disk_size_mb)?,
    })
}

/// Returns the number of copies of a fork.
pub(crate) fn fork_count(request: &ForkSandbox) -> Result<u32, ApiError> {
    optional("count", request.count, 1, limits::MAX_FORK_COPIES, 1)
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if metadata.len() > MAX_METADATA {
        let why = format!(
            "{} entries exceed the limit of {MAX_METADATA}",
            metadata.len()
        );
        return Err(ApiError::field("metadata", why));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_METADATA_KEY_BYTES {
            let why = format!("expected keys of 1 to {MAX_METADATA_KEY_BYTES} bytes");
            return Err(ApiError::field("metadata", why));
        }
        if value.len() > MAX_METADATA_VALUE_BYTES {
            let why = format!(
                "the value of `{key}` exceeds the limit of {MAX_METADATA_VALUE_BYTES} bytes"
            );
            return Err(ApiError::field("metadata", why));
        }
        // PostgreSQL's TEXT cannot hold a NUL character.
        no_nul("metadata", key)?;
        no_nul("metadata", value)?;
    }
    Ok(())
}

/// Checks the environment of a process.
pub(crate) fn check_envs(envs: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if envs.len() > MAX_ENVS {
        let why = format!("{} entries exceed the limit of {MAX_ENVS}", envs.len());
        return Err(ApiError::field("envs", why));
    }
    let mut total = 0;
    for (key, value) in envs {
        if key.is_empty() || key.contains('=') {
            let shown: String = key.chars().take(80).collect();
            let why = format!("invalid variable name `{shown}`: must not be empty or contain `=`");
            return Err(ApiError::field("envs", why));
        }
        no_nul("envs", key)?;
        no_nul("envs", value)?;
        let size = key.len() + value.len() + 2;
        if size > MAX_ENV_BYTES {
            let why = format!("an entry exceeds the limit of {MAX_ENV_BYTES} bytes");
            return Err(ApiError::field("envs", why));
        }
        total += size;
    }
    if total > MAX_ENVS_BYTES {
        let why = format!("exceeds the limit of {MAX_ENVS_BYTES} bytes in total");
        return Err(ApiError::field("envs", why));
    }
    Ok(())
}

/// Checks all fields of a command. Returns its timeout, in seconds.
pub(crate) fn check_exec(request: &ExecRequest) -> Result<u32, ApiError> {
    check_command(&request.cmd, &request.args)?;
    check_envs(&request.envs)?;
    check_place(request.cwd.as_deref(), request.user.as_deref())?;
    if let Some(tag) = &request.tag {
        check_tag("tag", tag)?;
    }
    let default = if request.background {
        0
    } else {
        DEFAULT_EXEC_TIMEOUT_SEC
    };
    check_exec_timeout(request.timeout_sec, default)
}

pub(crate) fn check_exec_timeout(value: Option<i64>, default: u32) -> Result<u32, ApiError> {
    optional("timeout_sec", value, 0, limits::MAX_TIMEOUT_SEC, default)
}

/// Checks a program and its arguments.
pub(crate) fn check_command(cmd: &str, args: &[String]) -> Result<(), ApiError> {
    if cmd.is_empty() {
        return Err(ApiError::field("cmd", "must not be empty"));
    }
    no_nul("cmd", cmd)?;
    for (place, arg) in args.iter().enumerate() {
        no_nul(&format!("args[{place}]"), arg)?;
    }
    if cmd.len() >= MAX_ARG_BYTES {
        let why = format!("must be shorter than {MAX_ARG_BYTES} bytes");
        return Err(ApiError::field("cmd", why));
    }
    match args.iter().position(|arg| arg.len() >= MAX_ARG_BYTES) {
        Some(place) => {
            let why = format!("must be shorter than {MAX_ARG_BYTES} bytes");
            Err(ApiError::field(&format!("args[{place}]"), why))
        }
        None => Ok(()),
    }
}

/// Checks working directory and user of a command.
pub(crate) fn check_place(cwd: Option<&str>, user: Option<&str>) -> Result<(), ApiError> {
    if let Some(cwd) = cwd {
        check_path("cwd", cwd)?;
    }
    check_user(user)
}

/// Checks a user name. A colon is rejected, because the name becomes the user of an HTTP basic
/// authorization in the guest.
pub(crate) fn check_user(user: Option<&str>) -> Result<(), ApiError> {
    let Some(user) = user else { return Ok(()) };
    let bad = user.is_empty()
        || user.len() > MAX_NAME_BYTES
        || user
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || matches!(c, ':' | '/'));
    if bad {
        return Err(ApiError::field("user", "is not a valid user name"));
    }
    Ok(())
}

/// Checks a path in the guest. The guest decides which paths are allowed: the machine belongs to
/// the user.
pub(crate) fn check_path(name: &str, path: &str) -> Result<(), ApiError> {
    if path.is_empty() {
        return Err(ApiError::field(name, "must not be empty"));
    }
    if path.len() > MAX_PATH_BYTES {
        let why = format!("exceeds the limit of {MAX_PATH_BYTES} bytes");
        return Err(ApiError::field(name, why));
    }
    no_nul(name, path)
}

/// Checks the tag of a process. Numbers are rejected, so that a tag cannot be taken for a process
/// id.
pub(crate) fn check_tag(name: &str, tag: &str) -> Result<(), ApiError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if tag.is_empty() || tag.len() > MAX_NAME_BYTES || !tag.bytes().all(plain) {
        let why = format!("expected 1 to {MAX_NAME_BYTES} letters, digits, `.`, `_`, `-`");
        return Err(ApiError::field(name, why));
    }
    if tag.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ApiError::field(
            name,
            "must not be a number: numbers are process ids",
        ));
    }
    Ok(())
}

/// Checks the depth of a directory listing.
pub(crate) fn check_depth(depth: Option<i64>) -> Result<u32, ApiError> {
    let depth = depth.unwrap_or(1);
    if !(0..=MAX_DEPTH).contains(&depth) {
        let why = format!("{depth} is out of range, expected 0 to {MAX_DEPTH} (0 counts as 1)");
        return Err(ApiError::field("depth", why));
    }
    Ok(u32::try_from(depth).unwrap_or(1).max(1))
}

/// Checks the name of an API key.
pub(crate) fn check_key_name(name: &str) -> Result<(), ApiError> {
    if name.trim().is_empty() || name.len() > MAX_METADATA_KEY_BYTES {
        let why = format!("expected 1 to {MAX_METADATA_KEY_BYTES} bytes");
        return Err(ApiError::field("name", why));
    }
    no_nul("name", name)
}

fn no_nul(name: &str, text: &str) -> Result<(), ApiError> {
    if text.contains('\0') {
        return Err(ApiError::field(name, "contains a NUL character"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
