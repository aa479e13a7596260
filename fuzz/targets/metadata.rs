//! Response of the metadata service, as parsed by the guest agent.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wrenn_envd::{identity::is_word, mmds::metadata::Metadata};

fuzz_target!(|bytes: &[u8]| {
    let Ok(metadata) = Metadata::parse(bytes) else {
        return;
    };
    if let Some(identity) = metadata.identity() {
        assert!(!identity.sandbox_id.is_empty());
        for (_, value) in identity.variables() {
            assert!(is_word(&value));
        }
    }
    if let Some(hash) = metadata.token_hash() {
        let _ = hash.allows(Some("token"));
    }
});
