//! Conversions between rows of the database and types of the REST API.

use wrenn_api_types as rest;
use wrenn_control::clock;
use wrenn_db::{ApiKey, Sandbox, Template};

/// Row that the REST API returns.
pub(crate) trait IntoRest {
    /// Type of the REST API.
    type Rest;

    /// Converts the row.
    fn into_rest(self) -> Self::Rest;
}

impl IntoRest for Sandbox {
    type Rest = rest::Sandbox;

    fn into_rest(self) -> rest::Sandbox {
        let given = |text: String| (!text.is_empty()).then_some(text);
        rest::Sandbox {
            id: self.id.into(),
            status: self.status,
            template: self.template,
            vcpus: self.size.vcpus,
            memory_mb: self.size.memory_mib,
            disk_size_mb: self.size.disk_mib,
            timeout_sec: self.timeout_sec,
            on_timeout: self.on_timeout,
            auto_resume: self.auto_resume,
            egress: self.egress,
            guest_ip: given(self.guest_ip),
            host_ip: given(self.host_ip),
            metadata: self.metadata,
            error: given(self.error),
            warning: given(self.warning),
            boot: self.boot,
            cpu: given(self.options.cpu),
            isolation: rest::Isolation::of_accel(self.options.accel),
            created_at: clock::timestamp(self.created_at),
            started_at: clock::optional_timestamp(self.started_at),
            last_active_at: clock::optional_timestamp(self.last_active_at),
            last_updated: clock::timestamp(self.last_updated),
            expires_at: clock::optional_timestamp(self.expires_at),
        }
    }
}

impl IntoRest for ApiKey {
    type Rest = rest::ApiKey;

    fn into_rest(self) -> rest::ApiKey {
        rest::ApiKey {
            id: self.id,
            name: self.name,
            prefix: self.key_prefix,
            scopes: self.scopes.as_slice().to_vec(),
            created_at: clock::timestamp(self.created_at),
            last_used_at: clock::optional_timestamp(self.last_used_at),
        }
    }
}

impl IntoRest for Template {
    type Rest = rest::Template;

    fn into_rest(self) -> rest::Template {
        let given = |n: u32| (n > 0).then_some(n);
        rest::Template {
            name: self.name,
            kind: self.kind,
            vcpus: given(self.vcpus),
            memory_mb: given(self.memory_mb),
            disk_size_mb: given(self.disk_size_mb),
            generation: given(self.generation),
            size_bytes: self.size_bytes,
            created_at: clock::timestamp(self.created_at),
        }
    }
}
