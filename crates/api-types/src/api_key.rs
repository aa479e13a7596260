//! API keys.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_model::Scope;

/// Body of `POST /v1/api-keys`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApiKey {
    /// Purpose of the key, chosen by the user.
    pub name: String,
    /// Create a key in the format that E2B's clients expect: `e2b_` and 40 hexadecimal digits;
    /// default false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub e2b: bool,
    /// Scopes of the key, at most those of the key of this request, which are the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scopes: Option<Vec<Scope>>,
}

/// API key without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    /// Id of the key, used to delete it.
    pub id: String,
    /// Purpose of the key.
    pub name: String,
    /// First eight characters of the secret.
    pub prefix: String,
    /// Scopes of the key. Absent in answers of releases before 0.2.0, whose keys have all scopes.
    #[serde(default = "all_scopes")]
    pub scopes: Vec<Scope>,
    /// Time of creation.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Time of the last use. Updated at most once per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_used_at: Option<Timestamp>,
}

fn all_scopes() -> Vec<Scope> {
    Scope::ALL.to_vec()
}

/// Response of `POST /v1/api-keys`. The secret is shown only here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedApiKey {
    /// Secret: `wrn_` and 32 hexadecimal digits, or `e2b_` and 40. Cannot be retrieved later.
    pub key: String,
    /// Record of the key.
    pub api_key: ApiKey,
}
