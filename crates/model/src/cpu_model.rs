//! CPU models of VMs.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Maximum length of a CPU model, in bytes.
const MAX_BYTES: usize = 512;

/// CPU model of a VM, in QEMU's notation: a name, followed by features that are added (`+avx2`),
/// removed (`-pcid`) or set (`vendor=AuthenticAMD`), separated by commas.
///
/// A value has this form. Only the VMM knows whether it has such a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuModel(String);

/// Reason why a string is not a CPU model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid CPU model `{0}`: expected a name such as `host` or `Haswell-v4`, then features such as `+avx2`, `-pcid` or `vendor=AuthenticAMD`, separated by commas"
)]
pub struct InvalidCpuModel(String);

impl CpuModel {
    /// Returns the model as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CpuModel {
    type Err = InvalidCpuModel;

    fn from_str(s: &str) -> Result<Self, InvalidCpuModel> {
        let mut parts = s.split(',');
        let is_named = parts.next().is_some_and(is_word);
        if is_named && parts.all(is_feature) && s.len() <= MAX_BYTES {
            Ok(Self(s.to_owned()))
        } else {
            Err(InvalidCpuModel(s.chars().take(80).collect()))
        }
    }
}

fn is_feature(part: &str) -> bool {
    match part.split_once('=') {
        Some((name, value)) => is_word(name) && is_word(value),
        None => part.strip_prefix(['+', '-']).is_some_and(is_word),
    }
}

/// True for a name or a value. It does not begin like an option.
fn is_word(text: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_alphanumeric();
    let is_next = |byte: u8| is_first(byte) || b"._-".contains(&byte);
    text.bytes().next().is_some_and(is_first) && text.bytes().all(is_next)
}

impl TryFrom<String> for CpuModel {
    type Error = InvalidCpuModel;

    fn try_from(s: String) -> Result<Self, InvalidCpuModel> {
        s.parse()
    }
}

impl From<CpuModel> for String {
    fn from(model: CpuModel) -> Self {
        model.0
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_features_is_a_model() {
        for text in [
            "host",
            "max",
            "Nehalem-v1,+arat",
            "Haswell-v4,-pcid,-tsc-deadline",
            "qemu64,+sse4.1,vendor=AuthenticAMD,x2apic=off",
        ] {
            let model: CpuModel = text.parse().expect(text);
            assert_eq!(model.to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_rejected_with_its_beginning() {
        for text in [
            "",
            "+avx",
            "-cpu",
            "host ",
            "host,avx",
            "host,",
            "host,,+avx",
            "host,+",
            "host,+-avx",
            "host,a=",
            "host,a=b=c",
            "a/b",
            "ä",
        ] {
            let error = text.parse::<CpuModel>().expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
        let long = format!("host,{}", ["+a"; 300].join(","));
        assert!(long.parse::<CpuModel>().is_err());
    }

    #[test]
    fn json_is_checked_as_well() {
        let model: CpuModel = serde_json::from_str(r#""max,-avx""#).expect("valid");
        assert_eq!(
            serde_json::to_string(&model).expect("plain"),
            r#""max,-avx""#
        );
        assert!(serde_json::from_str::<CpuModel>(r#""max avx""#).is_err());
    }
}
