//! Builds a template, step by step; each step's result is kept under its own key and reused.
//!
//! | step     | made by                               | key                                | time, measured |
//! |----------|---------------------------------------|------------------------------------|----------------|
//! | kernel   | apt, `dpkg-deb`, this crate           | kernel part of the recipe          | 3 s            |
//! | packages | `mmdebstrap`                          | release and packages               | 35 s; 15 s above another's |
//! | rootfs   | `tar`, this crate, `mkfs.ext4 -d`     | packages, envd, guest files        | 6 s            |
//!
//! A step that fails leaves nothing but what it had in `tmp/`, which it removes. A template that was there before stays
//! usable until the last step renames the new one's record into place.

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

use wrenn_proto::TemplateName;

pub use command::{CommandError, Stop};

use crate::{
    ImageStore, KernelFormatError, Recipe, StoreError, StoreLock, Template,
    store::{KERNEL_FILES, ROOTFS_FILE, TemplateRecord, io_error},
};

/// What a build needs to know.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The guest agent, a static executable.
    pub envd: PathBuf,
    /// The kernel's first program (`wrenn-init`), a static executable.
    pub init: PathBuf,
    /// Ends the build before its time.
    pub stop: Stop,
}

/// Who shows how far a build is.
pub trait Progress {
    /// A step begins.
    fn step(&self, name: &str);
    /// A line that a tool printed.
    fn line(&self, text: &str);
    /// The step is done.
    fn done(&self, name: &str, elapsed: Duration);
}

/// What a build did.
#[derive(Debug, Clone)]
pub struct BuildReport {
    /// The template.
    pub template: Template,
    /// Steps that had to be done; none if everything was there.
    pub steps: Vec<(String, Duration)>,
}

/// Why a template was not built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// There is no recipe of this name.
    #[error("no recipe makes a template `{0}`; known: {known}", known = known_recipes())]
    UnknownRecipe(TemplateName),
    /// A program for the guest cannot be read.
    #[error("could not read {path}, which goes into the guest: {source}")]
    Program {
        /// Where it was looked for.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// A program would not run in the guest.
    #[error("{0} is not a static x86-64 executable, so it cannot run in the guest")]
    NotStatic(PathBuf),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A tool failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The kernel's file is not understood.
    #[error("the kernel package's image cannot be used: {0}")]
    Kernel(#[from] KernelFormatError),
    /// Something is missing in a package.
    #[error("the package {package} has no {what}")]
    Missing {
        /// The package.
        package: String,
        /// What was looked for.
        what: String,
    },
    /// The host has no Debian mirror for the release.
    #[error("apt on this host has no sources for `{0}`; add them to /etc/apt/sources.list")]
    NoSources(String),
    /// Something in the image would make guests talk to the world.
    #[error("{path} in the image names `{word}`: guests must not contact it by themselves")]
    PhonesHome {
        /// The file in the image.
        path: String,
        /// What it names.
        word: &'static str,
    },
}

/// Builds the template `name`, or finds that it is there already.
///
/// Blocks for a minute or more the first time. `_lock` is the store's: two builders of one store take turns.
///
/// # Errors
/// See [`BuildError`]; the store is as it was before, but for steps that were completed.
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
    let rootfs_key = recipe.rootfs_key(&programs);
    let kernel_dir = store.kernel_dir(&kernel_key);
    store.discard_unless_whole(&kernel_dir, &KERNEL_FILES)?;
    builder.ensure("kernel", &kernel_dir, |builder, dir| {
        kernel::build(builder, &programs.init, dir)
    })?;
    let rootfs_dir = store.rootfs_dir(&rootfs_key);
    store.discard_unless_whole(&rootfs_dir, &[ROOTFS_FILE])?;
    if !rootfs_dir.exists() {
        let layer = builder.ensure_layer(&recipe)?;
        let step = format!("rootfs of {}", recipe.name);
        builder.ensure(&step, &rootfs_dir, |builder, dir| {
            rootfs::build(builder, &layer, &programs, dir)
        })?;
    }
    let steps = builder.steps;
    let record = TemplateRecord {
        kernel_key,
        rootfs_key,
        vcpus: recipe.vcpus,
        memory_mib: recipe.memory_mib,
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

/// What the steps share.
pub(crate) struct Builder<'a> {
    store: &'a ImageStore,
    recipe: &'a Recipe,
    progress: &'a dyn Progress,
    stop: &'a Stop,
    steps: Vec<(String, Duration)>,
}

impl Builder<'_> {
    /// Runs a tool to its end and returns what it wrote on standard output.
    fn run(&self, tool: &mut Command, deadline: Duration) -> Result<String, CommandError> {
        command::run(tool, deadline, self.progress, self.stop)
    }

    /// Makes the packages of a recipe, and of the one below it first.
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

    /// Makes `target` if it is not there: `work` builds under a temporary name, which is synced and renamed.
    ///
    /// `work` gets a directory. If `target` is to be a file, it is the one of the same name in that directory.
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
            // The error of the step counts, if there is one.
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
        // One call for all files of the result: there may be some, and they are large.
        let dir = fs::File::open(temporary)?;
        nix::unistd::syncfs(dir)?;
        fs::rename(built, target)
    };
    sync().map_err(io_error("put in place", target))
}

/// A template that is what it was keeps the time it was made.
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

/// An ELF file for x86-64 without an interpreter (`elf(5)`: machine at 18, program headers at 32, 54 and 56).
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
