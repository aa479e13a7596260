//! `wrenn image …`: what sandboxes are made from. Works on the store's directory, so the service need not run.

mod progress;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use wrenn_agent::warm::WarmConfig;
use wrenn_image::{BuildOptions, ImageStore, Progress, Template, build};
use wrenn_proto::TemplateName;

use self::progress::{PlainProgress, TerminalProgress};
use crate::{
    accel,
    config::{Layer, Settings},
    images::{self, InUse},
    output,
};

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageVerb {
    /// Build a template from Debian packages; does nothing if it is up to date
    Build(BuildArgs),
    /// List templates
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove templates and what only they need
    Rm(RmArgs),
}

/// Where images are.
#[derive(Debug, Args)]
struct StoreArgs {
    /// Kernels, root file systems and templates [env: WRENN_IMAGES_DIR] [default: images in the data directory]
    #[arg(long, value_name = "DIR")]
    images_dir: Option<PathBuf>,
}

/// Arguments of `wrenn image build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Template
    #[arg(default_value = "minimal")]
    name: TemplateName,
    /// The guest agent's static binary [env: WRENN_ENVD] [default: `envd` beside this program]
    #[arg(long, value_name = "FILE")]
    envd: Option<PathBuf>,
    /// Do not boot it once: its sandboxes will boot instead of being restored
    #[arg(long)]
    no_warm: bool,
    /// Show what the tools print
    #[arg(short, long)]
    verbose: bool,
    /// Print the template as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// Arguments of `wrenn image ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// Arguments of `wrenn image rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Templates
    #[arg(required = true)]
    names: Vec<TemplateName>,
    #[command(flatten)]
    store: StoreArgs,
}

impl ImageVerb {
    /// The settings among the flags.
    pub(crate) fn settings(&self, layer: &mut Layer) {
        let store = match self {
            Self::Build(args) => {
                layer.envd.clone_from(&args.envd);
                &args.store
            }
            Self::Ls(args) => &args.store,
            Self::Rm(args) => &args.store,
        };
        layer.images_dir.clone_from(&store.images_dir);
    }
}

/// Runs the verb; answers with the exit code.
pub(crate) fn run(settings: &Settings, verb: ImageVerb) -> anyhow::Result<i32> {
    match verb {
        ImageVerb::Build(args) => build_template(settings, &args),
        ImageVerb::Ls(args) => ls(settings, &args),
        ImageVerb::Rm(args) => rm(settings, &args),
    }
}

fn build_template(settings: &Settings, args: &BuildArgs) -> anyhow::Result<i32> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "`wrenn image build` needs root, for the owners and devices in a root file system: sudo wrenn image build"
        );
    }
    let envd = images::find_envd(settings)?;
    let store = open(&settings.images_dir)?;
    let progress: Box<dyn Progress> = if output::stderr_is_terminal() {
        Box::new(TerminalProgress::new(args.verbose))
    } else {
        Box::new(PlainProgress::new(args.verbose))
    };
    let init = images::find_init(&envd)?;
    let report = build(&store, &args.name, &BuildOptions { envd, init }, &*progress)?;
    if !args.no_warm {
        warm(settings, &args.name, &*progress)?;
    }
    if args.json {
        output::json(&Shown::from(&report.template))?;
        return Ok(0);
    }
    let seconds: f64 = report
        .steps
        .iter()
        .map(|(_, took)| took.as_secs_f64())
        .sum();
    let size = output::bytes(report.template.size_bytes);
    if report.steps.is_empty() {
        output::line(format_args!("{} is up to date ({size})", args.name))?;
    } else {
        output::line(format_args!(
            "{} built in {seconds:.1} s ({size})",
            args.name
        ))?;
    }
    Ok(0)
}

/// Boots the template once and freezes it, unless that was done.
fn warm(settings: &Settings, name: &TemplateName, progress: &dyn Progress) -> anyhow::Result<()> {
    const STEP: &str = "booted guest";
    let config = warm_config(settings)?;
    let began = std::time::Instant::now();
    let make = wrenn_agent::warm::make(config, name, || progress.step(STEP));
    let made = on_a_runtime(make)?
        .with_context(|| format!("cannot boot `{name}` once; `--no-warm` goes without"))?;
    if made {
        progress.done(STEP, began.elapsed());
    }
    Ok(())
}

fn warm_config(settings: &Settings) -> anyhow::Result<WarmConfig> {
    Ok(WarmConfig {
        images_dir: settings.images_dir.clone(),
        accel: accel::decide(settings.accel).accel,
        wrenn_exe: std::env::current_exe().context("cannot find this program's own file")?,
    })
}

fn on_a_runtime<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    Ok(runtime.block_on(work))
}

fn ls(settings: &Settings, args: &LsArgs) -> anyhow::Result<i32> {
    let templates = if settings.images_dir.is_dir() {
        open(&settings.images_dir)?.templates()?
    } else {
        Vec::new()
    };
    if args.json {
        let shown: Vec<Shown<'_>> = templates.iter().map(Shown::from).collect();
        output::json(&shown)?;
        return Ok(0);
    }
    let now = Timestamp::now();
    let rows = templates.iter().map(|t| row(t, now)).collect();
    output::table(&["name", "vcpus", "memory", "user", "size", "age"], rows)?;
    Ok(0)
}

fn rm(settings: &Settings, args: &RmArgs) -> anyhow::Result<i32> {
    let store = open(&settings.images_dir)?;
    for name in &args.names {
        let in_use = InUse::read(&settings.dir).with_context(|| {
            format!(
                "cannot see which sandboxes are in {}",
                settings.dir.display()
            )
        })?;
        store.remove(name, |path| in_use.holds(path))?;
        on_a_runtime(wrenn_agent::warm::remove(warm_config(settings)?, name))??;
        output::line(name)?;
    }
    Ok(0)
}

fn open(dir: &Path) -> anyhow::Result<ImageStore> {
    ImageStore::open(dir)
        .with_context(|| format!("cannot use the images directory {}", dir.display()))
}

/// A template as scripts see it.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    name: &'a TemplateName,
    vcpus: u32,
    memory_mb: u32,
    size_bytes: u64,
    created_at: Option<Timestamp>,
    default_user: &'a str,
    kernel: &'a Path,
    initrd: &'a Path,
    rootfs: &'a Path,
}

impl<'a> From<&'a Template> for Shown<'a> {
    fn from(t: &'a Template) -> Self {
        Self {
            name: &t.name,
            vcpus: t.vcpus,
            memory_mb: t.memory_mib,
            size_bytes: t.size_bytes,
            created_at: Timestamp::from_millisecond(t.created_unix_ms).ok(),
            default_user: &t.default_user,
            kernel: &t.kernel,
            initrd: &t.initrd,
            rootfs: &t.rootfs,
        }
    }
}

fn row(template: &Template, now: Timestamp) -> Vec<String> {
    let created = Timestamp::from_millisecond(template.created_unix_ms);
    vec![
        template.name.to_string(),
        template.vcpus.to_string(),
        format!("{} MiB", template.memory_mib),
        template.default_user.clone(),
        output::bytes(template.size_bytes),
        created.map_or_else(|_| String::new(), |at| output::age(at, now)),
    ]
}
