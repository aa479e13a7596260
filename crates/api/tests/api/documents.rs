//! The OpenAPI document and the routes that it documents.

use std::collections::BTreeSet;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::support::{Control, FakeAgent};

/// All operations below a sandbox. Both prefixes have all of them.
const SANDBOX: [&str; 22] = [
    "get /",
    "post /",
    "delete /{id}",
    "get /{id}",
    "post /{id}/exec",
    "get /{id}/exec/stream",
    "post /{id}/files/list",
    "post /{id}/files/mkdir",
    "post /{id}/files/read",
    "post /{id}/files/remove",
    "post /{id}/files/stream/read",
    "post /{id}/files/stream/write",
    "post /{id}/files/write",
    "post /{id}/fork",
    "get /{id}/metrics",
    "post /{id}/pause",
    "post /{id}/ping",
    "get /{id}/processes",
    "delete /{id}/processes/{process}",
    "get /{id}/processes/{process}/stream",
    "get /{id}/pty",
    "post /{id}/resume",
];

const OTHERS: [&str; 17] = [
    "get /health",
    "get /openapi.yaml",
    "delete /v1/unknown-sandboxes/{id}",
    "get /v1/api-keys",
    "get /v1/host",
    "get /v1/host/sandboxes/{id}/log",
    "get /v1/unknown-sandboxes",
    "post /v1/unknown-sandboxes/{id}/adopt",
    "post /v1/api-keys",
    "delete /v1/api-keys/{key_id}",
    "get /v1/snapshots",
    "post /v1/snapshots",
    "delete /v1/snapshots/{name}",
    "post /v1/snapshots/{name}/push",
    "post /v1/snapshots/{name}/pull",
    "get /v1/snapshots/{name}",
    "get /v1/templates",
];

/// Operations of the E2B API.
const E2B: [&str; 22] = [
    "delete /sandboxes/{id}",
    "delete /templates/{name}",
    "get /sandboxes",
    "get /sandboxes/metrics",
    "get /sandboxes/{id}",
    "get /sandboxes/{id}/metrics",
    "get /snapshots",
    "get /templates",
    "get /templates/aliases/{name}",
    "get /v2/sandboxes",
    "get /v2/templates",
    "post /sandboxes",
    "post /sandboxes/{id}/connect",
    "post /sandboxes/{id}/fork",
    "post /sandboxes/{id}/pause",
    "post /sandboxes/{id}/refreshes",
    "post /sandboxes/{id}/resume",
    "post /sandboxes/{id}/snapshots",
    "post /sandboxes/{id}/timeout",
    "post /v2/sandboxes",
    "post /v2/sandboxes/{id}/connect",
    "put /sandboxes/{id}/network",
];

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

async fn served(control: &Control) -> Value {
    let response = control
        .request(Method::GET, "/openapi.yaml")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/yaml");
    yaml_serde::from_str(&response.text().await.unwrap()).unwrap()
}

fn operations(document: &Value) -> Vec<(String, String, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    let mut all = Vec::new();
    for (path, item) in paths {
        for method in METHODS {
            if let Some(operation) = item.get(method) {
                all.push((method.to_owned(), path.clone(), operation));
            }
        }
    }
    all
}

#[tokio::test]
async fn document_has_exactly_the_routes() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let document = served(&control).await;
    let told: BTreeSet<String> = operations(&document)
        .iter()
        .map(|(method, path, _)| format!("{method} {path}"))
        .collect();
    let others = OTHERS.iter().chain(&E2B);
    let mut wanted: BTreeSet<String> = others.map(|&text| text.to_owned()).collect();
    for prefix in ["/v1/sandboxes", "/v1/capsules"] {
        for text in SANDBOX {
            let (method, path) = text.split_once(' ').unwrap();
            let path = if path == "/" { "" } else { path };
            wanted.insert(format!("{method} {prefix}{path}"));
        }
    }
    assert_eq!(told, wanted);
}

#[tokio::test]
async fn documented_routes_are_served_and_other_methods_rejected() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let document = served(&control).await;
    let told: BTreeSet<(String, String)> = operations(&document)
        .into_iter()
        .map(|(method, path, _)| (method, path))
        .collect();
    for path in document["paths"].as_object().unwrap().keys() {
        let real = path
            .replace("{id}", "sb-00000000")
            .replace("{process}", "1")
            .replace("{name}", "nonesuch")
            .replace("{key_id}", "nonesuch");
        for method in METHODS {
            let verb = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let (status, body) = control.call(verb, &real, &Value::Null).await;
            let message = body["error"]["message"].as_str();
            let message = message.or(body["message"].as_str()).unwrap_or_default();
            if told.contains(&(method.to_owned(), path.clone())) {
                assert_ne!(status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
                assert!(
                    !message.contains("no such route"),
                    "{method} {path}: {message}"
                );
            } else if status == StatusCode::NOT_IMPLEMENTED {
                // Part of the E2B API, and not implemented.
                assert_eq!(body["code"], 501, "{method} {path}: {body}");
            } else {
                assert_eq!(
                    status,
                    StatusCode::METHOD_NOT_ALLOWED,
                    "{method} {path}: {body}"
                );
            }
        }
    }
}

/// A route that is not registered with `routes!` is missing in the document.
#[test]
fn routes_are_registered_in_one_way() {
    fn look(dir: &std::path::Path, handlers: &mut usize) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look(&path, handlers);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.contains(".route("), "{}", path.display());
            assert!(!text.contains(".route_service("), "{}", path.display());
            *handlers += text.matches("#[utoipa::path(").count();
        }
    }
    let mut handlers = 0;
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    look(&source, &mut handlers);
    assert_eq!(handlers, SANDBOX.len() + OTHERS.len() + E2B.len());
}

/// `openapi/v1.yaml` shows each change of the API in review. `make openapi` writes it.
#[tokio::test]
async fn served_document_is_the_committed_one() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let response = control.request(Method::GET, "/openapi.yaml").send().await;
    let served = response.unwrap().text().await.unwrap();
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/v1.yaml");
    if std::env::var_os("WRENN_WRITE_OPENAPI").is_some() {
        std::fs::write(&file, &served).unwrap();
    }
    let frozen = std::fs::read_to_string(&file).unwrap_or_default();
    let differing = frozen
        .lines()
        .zip(served.lines())
        .find(|(old, new)| old != new);
    assert!(
        frozen == served,
        "openapi/v1.yaml is not the served document; run `make openapi`: {differing:?}"
    );
}

#[tokio::test]
async fn document_is_complete() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let document = served(&control).await;
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let place = format!("{method} {path}");
        let id = operation["operationId"].as_str().unwrap();
        assert!(ids.insert(id.to_owned()), "{place}: {id} twice");
        assert!(
            !operation["summary"].as_str().unwrap_or_default().is_empty(),
            "{place}"
        );
        let responses = operation["responses"].as_object().unwrap();
        assert!(
            responses
                .keys()
                .any(|code| code.starts_with('2') || code == "101"),
            "{place}"
        );
        let open = path == "/health";
        assert_eq!(responses.contains_key("401"), !open, "{place}");
        let named: BTreeSet<_> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|p| p["in"] == "path")
            .map(|p| p["name"].as_str().unwrap().to_owned())
            .collect();
        let in_path: BTreeSet<_> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(str::to_owned)
            .collect();
        assert_eq!(named, in_path, "{place}");
    }
    // Every reference resolves.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for name in [
        "Sandbox",
        "CreateSandbox",
        "ForkSandbox",
        "CreateSnapshot",
        "Template",
        "OnTimeout",
        "ErrorBody",
    ] {
        assert!(schemas.contains_key(name), "{name}");
    }
    assert_eq!(
        document["components"]["securitySchemes"]["api_key"]["name"],
        "X-API-Key"
    );
}
