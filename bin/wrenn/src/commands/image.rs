//! `wrenn image …`: templates that sandboxes are created from. Operates on the store's directory,
//! so the service need not run.

mod progress;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use wrenn_agent::template_snapshot::TemplateSnapshotConfig;
use wrenn_image::{
    BuildOptions, BuildReport, ImageStore, Progress, Recipe, Stop, StoreLock, Template, build,
};
use wrenn_model::TemplateName;

use self::progress::{PlainProgress, TerminalProgress};
use crate::{
    config::{Layer, Settings},
    images::{self, InUse},
    interrupt::Interrupts,
    output, vmm,
};

/// Commands of `wrenn image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build templates from Debian packages; templates that are up to date are skipped
    Build(BuildArgs),
    /// List templates
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Remove templates and the files that only they use
    Rm(RmArgs),
}

/// Location of the image store.
#[derive(Debug, Args)]
struct StoreArgs {
    /// Directory of kernels, root file systems and templates [env: WRENN_IMAGES_DIR] [default:
    /// `images` in the data directory]
    #[arg(long, value_name = "DIR")]
    images_dir: Option<PathBuf>,
}

/// Arguments of `wrenn image build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Templates to build [default: all built-in templates]
    names: Vec<TemplateName>,
    /// Static binary of the guest agent [env: WRENN_ENVD] [default: `envd` in the directory of this
    /// program]
    #[arg(long, value_name = "FILE")]
    envd: Option<PathBuf>,
    /// Do not create a template snapshot; sandboxes then boot instead of being restored from it
    #[arg(long = "no-warm")]
    no_template_snapshot: bool,
    /// Show the output of the build tools
    #[arg(short, long)]
    verbose: bool,
    /// Print the templates as JSON
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
    /// Templates to remove
    #[arg(required = true)]
    names: Vec<TemplateName>,
    #[command(flatten)]
    store: StoreArgs,
}

impl ImageCommand {
    /// Copies the settings among the flags to `layer`.
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

/// Runs the command and returns the exit code.
pub(crate) fn run(settings: &Settings, command: ImageCommand) -> anyhow::Result<i32> {
    match command {
        ImageCommand::Build(args) => build_templates(settings, &args),
        ImageCommand::Ls(args) => ls(settings, &args),
        ImageCommand::Rm(args) => rm(settings, &args),
    }
}

fn build_templates(settings: &Settings, args: &BuildArgs) -> anyhow::Result<i32> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "`wrenn image build` requires root (for file owners and device nodes in the root file system); run `sudo wrenn image build`"
        );
    }
    let progress: Arc<dyn Progress + Send + Sync> = if output::stderr_is_terminal() {
        Arc::new(TerminalProgress::new(args.verbose))
    } else {
        Arc::new(PlainProgress::new(args.verbose))
    };
    let ends = Ends::default();
    on_a_runtime(async {
        let mut interrupts = Interrupts::new()?;
        let mut building = std::pin::pin!(build_all(settings, args, &progress, &ends));
        tokio::select! {
            built = &mut building => return built.map(|()| 0),
            _ = interrupts.recv() => ends.end(),
        }
        // A second signal does not wait for the cleanup, which the next build then does.
        tokio::select! {
            ended = building => ended.map(|()| 0),
            again = interrupts.recv() => Ok(again.exit_code()),
        }
    })?
}

/// Cancels the current step of a build.
#[derive(Default)]
struct Ends {
    tools: Stop,
    guest: CancellationToken,
}

impl Ends {
    fn end(&self) {
        self.tools.stop();
        self.guest.cancel();
    }
}

async fn build_all(
    settings: &Settings,
    args: &BuildArgs,
    progress: &Arc<dyn Progress + Send + Sync>,
    ends: &Ends,
) -> anyhow::Result<()> {
    let envd = images::find_envd(settings)?;
    let init = images::find_init(&envd)?;
    let options = BuildOptions {
        envd,
        init,
        stop: ends.tools.clone(),
    };
    let store = open(&settings.images_dir)?;
    let lock = Arc::new(lock(&store).await?);
    let names = match &args.names[..] {
        [] => Recipe::ALL
            .iter()
            .map(|recipe| recipe.name.parse())
            .collect::<Result<_, _>>()?,
        names => names.to_vec(),
    };
    // Finding it out runs programs.
    let decision = (!args.no_template_snapshot).then(|| vmm::decide(settings));
    let mut built = Vec::new();
    for name in &names {
        let report = {
            let (store, lock, name) = (store.clone(), Arc::clone(&lock), name.clone());
            let (options, progress) = (options.clone(), Arc::clone(progress));
            let building = move || build(&store, &lock, &name, &options, &*progress);
            tokio::task::spawn_blocking(building).await??
        };
        if let Some(decision) = &decision {
            make_template_snapshot(settings, decision, &lock, name, &**progress, &ends.guest)
                .await?;
        }
        if !args.json {
            print_report(&report)?;
        }
        built.push(report.template);
    }
    if args.json {
        let shown: Vec<_> = built.iter().map(TemplateJson::from).collect();
        output::json(&shown)?;
    }
    Ok(())
}

/// Waits for the exclusive lock on the store.
async fn lock(store: &ImageStore) -> anyhow::Result<StoreLock> {
    let store = store.clone();
    let waits = || output::error("waiting for another `wrenn image` command to finish");
    Ok(tokio::task::spawn_blocking(move || store.lock(waits)).await??)
}

/// Prints the result of a build in one line.
fn print_report(report: &BuildReport) -> anyhow::Result<()> {
    let name = &report.template.name;
    let size = output::bytes(report.template.size_bytes);
    let took = report.steps.iter().map(|(_, took)| took.as_secs_f64());
    let seconds: f64 = took.sum();
    if report.steps.is_empty() {
        output::line(format_args!("{name} is up to date ({size})"))?;
    } else {
        output::line(format_args!("{name} built in {seconds:.1} s ({size})"))?;
    }
    Ok(())
}

/// Creates the template snapshot, unless it is up to date: boots the template once and snapshots
/// the guest.
async fn make_template_snapshot(
    settings: &Settings,
    decision: &vmm::Decision,
    lock: &StoreLock,
    name: &TemplateName,
    progress: &dyn Progress,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let step = format!("snapshot of {name}");
    if let Some(why) = decision.impossible() {
        bail!("{why}");
    }
    let config = template_snapshot_config(settings, decision, stop)?;
    let began = std::time::Instant::now();
    let made = wrenn_agent::template_snapshot::make(config, lock, name, || progress.step(&step))
        .await
        .with_context(|| {
            format!("failed to create the template snapshot of `{name}` (`--no-warm` skips it)")
        })?;
    if made {
        progress.done(&step, began.elapsed());
    }
    Ok(())
}

fn template_snapshot_config(
    settings: &Settings,
    decision: &vmm::Decision,
    stop: &CancellationToken,
) -> anyhow::Result<TemplateSnapshotConfig> {
    let in_use = in_use(settings)?;
    Ok(TemplateSnapshotConfig {
        in_use: in_use.builds(),
        images_dir: settings.images_dir.clone(),
        vmm: decision.config(settings),
        cpu: decision.cpu(settings),
        wrenn_exe: std::env::current_exe().context("failed to locate this program's executable")?,
        stop: stop.clone(),
    })
}

fn in_use(settings: &Settings) -> anyhow::Result<InUse> {
    InUse::read(&settings.dir, &settings.images_dir).with_context(|| {
        format!(
            "failed to read the sandboxes and snapshots in {}",
            settings.dir.display()
        )
    })
}

fn on_a_runtime<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the async runtime")?;
    Ok(runtime.block_on(work))
}

fn ls(settings: &Settings, args: &LsArgs) -> anyhow::Result<i32> {
    let templates = if settings.images_dir.is_dir() {
        open(&settings.images_dir)?.templates()?
    } else {
        Vec::new()
    };
    if args.json {
        let shown: Vec<TemplateJson<'_>> = templates.iter().map(TemplateJson::from).collect();
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
    let decision = vmm::decide(settings);
    let removing = async {
        let lock = lock(&store).await?;
        for name in &args.names {
            let in_use = in_use(settings)?;
            store.remove(&lock, name, |path| in_use.holds(path))?;
            let config = template_snapshot_config(settings, &decision, &CancellationToken::new())?;
            wrenn_agent::template_snapshot::remove(config, &lock, name).await?;
            output::line(name)?;
        }
        Ok(0)
    };
    on_a_runtime(removing)?
}

fn open(dir: &Path) -> anyhow::Result<ImageStore> {
    ImageStore::open(dir)
        .with_context(|| format!("failed to open the images directory {}", dir.display()))
}

/// Template in JSON output.
#[derive(Debug, Serialize)]
struct TemplateJson<'a> {
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

impl<'a> From<&'a Template> for TemplateJson<'a> {
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
