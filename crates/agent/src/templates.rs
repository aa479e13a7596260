//! Where the agent finds templates.

use wrenn_image::{ImageStore, StoreError};
use wrenn_proto::TemplateName;

pub use wrenn_image::Template;

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// There is none of this name.
    #[error("template: there is no template `{0}` on this host")]
    NotFound(TemplateName),
    /// It is there but broken; the text says how.
    #[error("the templates of this host cannot be read: {0}")]
    Unreadable(String),
}

/// Where the agent finds templates: the image store, or a test's own.
pub trait TemplateSource: Send + Sync + 'static {
    /// One template. May block for a few file operations.
    ///
    /// # Errors
    /// See [`TemplateError`].
    fn template(&self, name: &TemplateName) -> Result<Template, TemplateError>;

    /// All templates that can be used, by name. May block for a few file operations.
    ///
    /// # Errors
    /// See [`TemplateError`].
    fn templates(&self) -> Result<Vec<Template>, TemplateError>;
}

impl TemplateSource for ImageStore {
    fn template(&self, name: &TemplateName) -> Result<Template, TemplateError> {
        Self::template(self, name).map_err(|error| match error {
            StoreError::NotFound { name } => TemplateError::NotFound(name),
            other => TemplateError::Unreadable(crate::sandbox::error::chain(&other)),
        })
    }

    fn templates(&self) -> Result<Vec<Template>, TemplateError> {
        let text = |error: &StoreError| crate::sandbox::error::chain(error);
        let all = self
            .each()
            .map_err(|e| TemplateError::Unreadable(text(&e)))?;
        let log = |error: &StoreError| {
            tracing::warn!(error = text(error), "a template cannot be used");
        };
        Ok(all
            .into_iter()
            .filter_map(|template| template.inspect_err(log).ok())
            .collect())
    }
}
