//! Template lookup for the agent.

use std::io;

use thiserror_ext::AsReport as _;
use wrenn_image::{ImageStore, StoreError};
use wrenn_model::TemplateName;

pub use wrenn_image::Template;

/// Failure to look up a template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// No template has this name.
    #[error("`template`: template `{0}` does not exist on this host")]
    NotFound(TemplateName),
    /// The template exists but cannot be read. The text names the cause.
    #[error("failed to read the templates of this host: {0}")]
    Unreadable(String),
}

/// Source of templates: the image store, or a substitute in tests.
pub trait TemplateSource: Send + Sync + 'static {
    /// Returns one template. May block for a few file operations.
    ///
    /// # Errors
    /// See [`TemplateError`].
    fn template(&self, name: &TemplateName) -> Result<Template, TemplateError>;

    /// Returns all usable templates, sorted by name. May block for a few file operations.
    ///
    /// # Errors
    /// See [`TemplateError`].
    fn templates(&self) -> Result<Vec<Template>, TemplateError>;
}

/// Returns the minimum disk size of a sandbox of this template, in MiB: the size of its image.
pub(crate) fn image_mib(template: &Template) -> io::Result<u32> {
    let image = std::fs::metadata(&template.rootfs)?;
    Ok(u32::try_from(image.len().div_ceil(1024 * 1024)).unwrap_or(u32::MAX))
}

impl TemplateSource for ImageStore {
    fn template(&self, name: &TemplateName) -> Result<Template, TemplateError> {
        Self::template(self, name).map_err(|error| match error {
            StoreError::NotFound { name } => TemplateError::NotFound(name),
            other => TemplateError::Unreadable(other.to_report_string()),
        })
    }

    fn templates(&self) -> Result<Vec<Template>, TemplateError> {
        let text = |error: &StoreError| error.to_report_string();
        let all = self
            .each()
            .map_err(|e| TemplateError::Unreadable(text(&e)))?;
        let log = |error: &StoreError| {
            tracing::warn!(error = text(error), "template skipped, it cannot be read");
        };
        Ok(all
            .into_iter()
            .filter_map(|template| template.inspect_err(log).ok())
            .collect())
    }
}
