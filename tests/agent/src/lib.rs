//! Parts that the tests of the host agent share with the fake supervisor.
#![forbid(unsafe_code)]

mod one_template;

pub use one_template::OneTemplate;
