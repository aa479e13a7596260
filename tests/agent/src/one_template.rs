//! Template source of tests: one template, `minimal`, made of one small file.

use std::{fs, path::PathBuf};

use wrenn_agent::{Template, TemplateError, TemplateSource};
use wrenn_model::TemplateName;

/// Source of the template `minimal`.
#[derive(Debug)]
pub struct OneTemplate(PathBuf);

impl OneTemplate {
    /// Creates the template's file in `dir`.
    ///
    /// # Panics
    /// If the file cannot be written.
    #[must_use]
    pub fn new(dir: &std::path::Path) -> Self {
        let image = dir.join("image");
        fs::write(&image, vec![0; 1024 * 1024]).expect("written");
        Self(image)
    }
}

impl TemplateSource for OneTemplate {
    fn template(&self, name: &TemplateName) -> Result<Template, TemplateError> {
        if name.as_str() != "minimal" {
            return Err(TemplateError::NotFound(name.clone()));
        }
        Ok(Template {
            name: name.clone(),
            kernel: self.0.clone(),
            initrd: self.0.clone(),
            rootfs: self.0.clone(),
            vcpus: 1,
            memory_mib: 512,
            size_bytes: 3,
            created_unix_ms: 4,
            default_user: "user".to_owned(),
        })
    }

    fn templates(&self) -> Result<Vec<Template>, TemplateError> {
        let name = "minimal".parse().expect("a name");
        Ok(vec![self.template(&name)?])
    }
}
