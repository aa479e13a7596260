//! Template source of tests: one template, `minimal`, made of small files in an image directory.

use std::{fs, path::PathBuf};

use wrenn_agent::{Template, TemplateError, TemplateSource};
use wrenn_model::TemplateName;

/// Source of the template `minimal`.
#[derive(Debug)]
pub struct OneTemplate {
    kernel: PathBuf,
    rootfs: PathBuf,
}

impl OneTemplate {
    /// Creates the template's files in `dir/images`, where the image store has them. The root file
    /// system is the beginning of one that was created in 1970.
    ///
    /// # Panics
    /// If a file cannot be written.
    #[must_use]
    pub fn new(dir: &std::path::Path) -> Self {
        let images = dir.join("images");
        let kernel = images.join("kernels/key/vmlinux");
        let rootfs = images.join("rootfs/key/rootfs.ext4");
        for path in [&kernel, &rootfs] {
            fs::create_dir_all(path.parent().expect("a directory")).expect("created");
        }
        fs::write(&kernel, "kernel").expect("written");
        let mut image = vec![0; 1024 * 1024];
        image[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        fs::write(&rootfs, image).expect("written");
        Self { kernel, rootfs }
    }
}

impl TemplateSource for OneTemplate {
    fn template(&self, name: &TemplateName) -> Result<Template, TemplateError> {
        if name.as_str() != "minimal" {
            return Err(TemplateError::NotFound(name.clone()));
        }
        Ok(Template {
            name: name.clone(),
            kernel: self.kernel.clone(),
            initrd: self.kernel.clone(),
            rootfs: self.rootfs.clone(),
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
