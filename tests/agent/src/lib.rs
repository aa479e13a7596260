//! Parts that the tests of the host agent share with the fake supervisor.
#![forbid(unsafe_code)]

mod config;
mod one_template;

pub use config::agent_config;
pub use one_template::OneTemplate;
