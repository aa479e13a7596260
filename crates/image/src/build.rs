//! Builds a template step by step. The result of each step is stored under its own key and reused.
//!
//! | step     | made by                           | key                         | time, measured |
//! |----------|-----------------------------------|-----------------------------|----------------|
//! | kernel   | apt, `dpkg-deb`, this crate       | kernel part of the recipe   | 3 s            |
//! | packages | `mmdebstrap`                      | release and packages        | 35 s           |
//! | rootfs   | `tar`, `depmod`, this crate,      | packages, kernel modules,   | 6 s            |
//! |          | `mkfs.ext4 -d`                    | envd, guest files           |                |
//!
//! The modules in a root file system are those of the template's kernel: the kernel's package may
//! be newer when a kernel is built again, so the key contains the hash of the modules.
//!
//! A package layer on top of a base layer takes 15 s.
//!
//! A failed step removes its files in `tmp/` and leaves nothing else behind. A template that
//! existed before stays usable until the last step renames the new template's record into place.

mod command;
pub(crate) mod guest;
mod kernel;
mod packages;
mod rootfs;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use wrenn_model::TemplateName;

pub use command::{CommandError, Stop};

use crate::{
    ImageStore, KernelFormatError, Recipe, StoreError, StoreLock, Template,
    store::{KERNEL_FILES, MODULES_FILE, ROOTFS_FILE, TemplateRecord, io_error},
};

/// Inputs of a build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Path of the guest agent, a static executable.
    pub envd: PathBuf,
    /// Path of the kernel's first program (`wrenn-init`), a static executable.
    pub init: PathBuf,
    /// Handle that cancels the build.
    pub stop: Stop,
}

/// Receiver of a build's progress.
pub trait Progress {
    /// Called when a step begins.
    fn step(&self, name: &str);
    /// Called with each line that a tool printed.
    fn line(&self, text: &str);
    /// Called when a step is done.
    fn done(&self, name: &str, elapsed: Duration);
}

/// Result of a build.
#[derive(Debug, Clone)]
pub struct BuildReport {
    /// The template.
    pub template: Template,
    /// Steps that were executed, with their durations; empty if everything was up to date.
    pub steps: Vec<(String, Duration)>,
}

/// Errors of [`build`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No recipe has this name.
    #[error("no recipe for template `{0}`; known templates: {known}", known = known_recipes())]
    UnknownRecipe(TemplateName),
    /// A program for the guest cannot be read.
    #[error("failed to read guest program {path}")]
    Program {
        /// Path of the program.
        path: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// A program would not run in the guest.
    #[error("{0} is not a static x86-64 executable and cannot run in the guest")]
    NotStatic(PathBuf),
    /// An operation of the image store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A tool failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The kernel image has an unsupported format.
    #[error("failed to extract the kernel from its package")]
    Kernel(#[from] KernelFormatError),
    /// A package lacks an expected part.
    #[error("package `{package}` has no {what}")]
    Missing {
        /// Name of the package.
        package: String,
        /// Description of the missing part.
        what: String,
    },
    /// The host has no Debian mirror for the release.
    #[error("apt on this host has no package sources for `{0}`; add them to /etc/apt/sources.list")]
    NoSources(String),
    /// A file in the image would make guests contact an external server.
    #[error(
        "{path} in the image references the external server `{word}`; guests must not contact it on their own"
    )]
    PhonesHome {
        /// Path of the file in the image.
        path: String,
        /// Server that the file references.
        word: &'static str,
    },
}

/// Builds the template `name`, or returns it if it is up to date.
///
/// Blocks for a minute or more the first time. `_lock` is the store's lock, which serializes the
/// builders of a store.
///
/// # Errors
/// See [`BuildError`]. The store is unchanged, except for steps that were completed.
pub fn build(
    store: &ImageStore,
    _lock: &StoreLock,
    name: &TemplateName,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    let recipe = Recipe::named(name).ok_or_else(|| BuildError::UnknownRecipe(name.clone()))?;
    let programs = guest::Programs {
        envd: read_program(&options.envd)?,
        init: read_program(&options.init)?,
    };
    let mut builder = Builder {
        store,
        recipe: &recipe,
        progress,
        stop: &options.stop,
        steps: Vec::new(),
    };
    let kernel_key = recipe.kernel_key(&programs);
    let kernel_dir = store.kernel_dir(&kernel_key);
    let [kernel, initrd] = KERNEL_FILES;
    store.discard_unless_whole(&kernel_dir, &[kernel, initrd, MODULES_FILE])?;
    builder.ensure("kernel", &kernel_dir, |builder, dir| {
        kernel::build(builder, &programs.init, dir)
    })?;
    let modules = kernel::Modules::of(&kernel_dir)?;
    let rootfs_key = recipe.rootfs_key(&programs, &modules.sha256);
    let rootfs_dir = store.rootfs_dir(&rootfs_key);
    store.discard_unless_whole(&rootfs_dir, &[ROOTFS_FILE])?;
    if !rootfs_dir.exists() {
        let layer = builder.ensure_layer(&recipe)?;
        let step = format!("rootfs of {}", recipe.name);
        builder.ensure(&step, &rootfs_dir, |builder, dir| {
            let parts = rootfs::Parts {
                layer: &layer,
                modules: &modules,
                programs: &programs,
            };
            rootfs::build(builder, &parts, dir)
        })?;
    }
    let steps = builder.steps;
    let record = TemplateRecord {
        kernel_key,
        rootfs_key,
        vcpus: recipe.size.vcpus,
        memory_mib: recipe.size.memory_mib,
        default_user: recipe.default_user.to_owned(),
        created_unix_ms: now_unix_ms(),
    };
    let record = keep_if_same(store.record(name)?, record);
    store.put_record(name, &record)?;
    Ok(BuildReport {
        template: store.resolve(name, &record)?,
        steps,
    })
}

fn known_recipes() -> String {
    Recipe::ALL.map(|recipe| recipe.name).join(", ")
}

/// State shared by the steps of a build.
pub(crate) struct Builder<'a> {
    store: &'a ImageStore,
    recipe: &'a Recipe,
    progress: &'a dyn Progress,
    stop: &'a Stop,
    steps: Vec<(String, Duration)>,
}

impl Builder<'_> {
    /// Runs a tool to completion and returns its standard output.
    fn run(&self, tool: &mut Command, deadline: Duration) -> Result<String, CommandError> {
        command::run(tool, deadline, self.progress, self.stop)
    }

    /// Builds the package layer of a recipe, after the layer of its base recipe.
    fn ensure_layer(&mut self, recipe: &Recipe) -> Result<PathBuf, BuildError> {
        let layer = self.store.layer_path(&recipe.layer_key());
        if layer.exists() {
            return Ok(layer);
        }
        let below = match recipe.above {
            Some(below) => Some(self.ensure_layer(below)?),
            None => None,
        };
        let step = format!("packages of {}", recipe.name);
        self.ensure(&step, &layer, |builder, dir| {
            packages::build(builder, recipe, below.as_deref(), dir)
        })?;
        Ok(layer)
    }

    /// Creates `target` if it does not exist: `work` builds under a temporary name, which is then
    /// synced and renamed.
    ///
    /// `work` receives a directory. If `target` is to be a file, `work` creates a file of the same
    /// name in that directory.
    fn ensure(
        &mut self,
        name: &str,
        target: &Path,
        work: impl FnOnce(&Self, &Path) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        if target.exists() {
            return Ok(());
        }
        self.progress.step(name);
        let begun = Instant::now();
        let temporary = self.store.temporary()?;
        let built = work(self, &temporary).and_then(|()| Ok(publish(&temporary, target)?));
        if temporary.exists() {
            let removed = fs::remove_dir_all(&temporary);
            // If the step failed, its error takes precedence.
            built.and_then(|()| Ok(removed.map_err(io_error("remove", &temporary))?))?;
        } else {
            built?;
        }
        self.progress.done(name, begun.elapsed());
        self.steps.push((name.to_owned(), begun.elapsed()));
        Ok(())
    }
}

fn publish(temporary: &Path, target: &Path) -> Result<(), StoreError> {
    let inside = target
        .extension()
        .and(target.file_name())
        .map(|name| temporary.join(name));
    let built = inside.as_deref().unwrap_or(temporary);
    let sync = || {
        // One call syncs all files of the result: there can be several, and they are large.
        let dir = fs::File::open(temporary)?;
        nix::unistd::syncfs(dir)?;
        wrenn_durable::rename(built, target)
    };
    sync().map_err(io_error("publish", target))
}

/// Keeps the creation time of a template that has not changed.
fn keep_if_same(old: Option<TemplateRecord>, new: TemplateRecord) -> TemplateRecord {
    match old {
        Some(old)
            if TemplateRecord {
                created_unix_ms: old.created_unix_ms,
                ..new.clone()
            } == old =>
        {
            old
        }
        _ => new,
    }
}

fn read_program(path: &Path) -> Result<Vec<u8>, BuildError> {
    let program = fs::read(path).map_err(|source| BuildError::Program {
        path: path.to_owned(),
        source,
    })?;
    if is_static_executable(&program) {
        Ok(program)
    } else {
        Err(BuildError::NotStatic(path.to_owned()))
    }
}

/// True for an x86-64 ELF file without an interpreter (`elf(5)`: machine at offset 18, program
/// headers at 32, 54 and 56).
fn is_static_executable(file: &[u8]) -> bool {
    const X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?));
    let check = || {
        let table = u32_at(32)? as usize;
        let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
        let interpreted = (0..count).any(|i| u32_at(table + i * size) == Some(PT_INTERP));
        Some(file.starts_with(b"\x7fELF\x02\x01") && u16_at(18)? == X86_64 && !interpreted)
    };
    check().unwrap_or(false)
}

fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let dynamic = fs::read("/bin/true").expect("a program");
        assert!(!is_static_executable(&dynamic));
        assert!(!is_static_executable(b"#!/bin/sh\n"));
        assert!(!is_static_executable(b"\x7fELF\x02\x01"));
        let busybox = fs::read("/bin/busybox").expect("busybox-static is needed to build images");
        assert!(is_static_executable(&busybox));
    }

    struct Silent;
    impl Progress for Silent {
        fn step(&self, _: &str) {}
        fn line(&self, _: &str) {}
        fn done(&self, _: &str, _: Duration) {}
    }

    #[test]
    fn a_step_that_fails_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = ImageStore::open(dir.path()).expect("opened");
        let target = store.rootfs_dir("key");
        let mut builder = Builder {
            store: &store,
            recipe: &Recipe::ALL[0],
            progress: &Silent,
            stop: &Stop::default(),
            steps: vec![],
        };
        let failed = builder.ensure("rootfs", &target, |_, dir| {
            fs::write(dir.join("half"), "x").expect("written");
            Err(BuildError::NoSources("x".into()))
        });
        assert!(matches!(failed, Err(BuildError::NoSources(_))));
        assert!(!target.exists());
        assert_eq!(
            fs::read_dir(dir.path().join("tmp")).expect("there").count(),
            0
        );
        let write = |_: &Builder<'_>, dir: &Path| {
            fs::write(dir.join("whole"), "x").expect("written");
            Ok(())
        };
        builder.ensure("rootfs", &target, write).expect("made");
        assert!(target.join("whole").exists());
        builder
            .ensure("rootfs", &target, |_, _| panic!("made twice"))
            .expect("there already");
    }

    #[test]
    fn a_file_is_published_by_its_own_name() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = ImageStore::open(dir.path()).expect("opened");
        let target = store.layer_path("key");
        let mut builder = Builder {
            store: &store,
            recipe: &Recipe::ALL[0],
            progress: &Silent,
            stop: &Stop::default(),
            steps: vec![],
        };
        builder
            .ensure("packages", &target, |_, dir| {
                fs::write(dir.join("key.tar"), "x").expect("written");
                Ok(())
            })
            .expect("made");
        assert_eq!(fs::read(&target).expect("there"), b"x");
        assert_eq!(
            fs::read_dir(dir.path().join("tmp")).expect("there").count(),
            0
        );
    }

    #[test]
    fn an_unknown_recipe_and_a_missing_agent_are_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = ImageStore::open(dir.path()).expect("opened");
        let options = BuildOptions {
            envd: "/no/such/envd".into(),
            init: "/no/such/init".into(),
            stop: Stop::default(),
        };
        let lock = store.lock(|| {}).expect("locked");
        let name = |name: &str| -> TemplateName { name.parse().expect("valid") };
        let unknown = build(&store, &lock, &name("other"), &options, &Silent).expect_err("unknown");
        assert!(unknown.to_string().contains("other"), "{unknown}");
        let missing =
            build(&store, &lock, &name("minimal"), &options, &Silent).expect_err("missing");
        assert!(missing.to_string().contains("/no/such/envd"), "{missing}");
    }
}
