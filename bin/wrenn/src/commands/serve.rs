//! `wrenn up`, `wrenn server`, `wrenn agent`: the services.
//!
//! Owns the settings of the processes, their start, and their shutdown by a signal within a
//! deadline. Sandboxes intentionally outlive the services; the last line of output states how many
//! keep running.

mod run_on;

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use wrenn_agent::{AgentConfig, AgentError, EgressCeiling};
use wrenn_api::Listening;
use wrenn_control::ControlConfig;
use wrenn_model::{Boundary, CpuModel, Egress};
use wrenn_proto::supervise::Accel;

use super::sandbox::egress_parser;
use crate::{
    config::{self, AccelChoice, Layer, Settings, VmmChoice},
    data_dir, descriptors, images,
    interrupt::Interrupts,
    logging, nameservers, output,
    service::Service,
    vmm,
};

/// Time that each service has to finish its current work; the services' own deadlines are shorter.
const STOP_TIMEOUT: Duration = Duration::from_secs(45);

/// Interval at which the control plane polls the agent.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Logging arguments of all services.
#[derive(Debug, Args)]
struct LogArgs {
    /// Log as JSON, one object per line [filter: WRENN_LOG]
    #[arg(long)]
    log_json: bool,
}

/// Arguments of the control plane.
#[derive(Debug, Args)]
struct ControlArgs {
    /// Listen address of the REST API [env: WRENN_LISTEN] [default: 127.0.0.1:8000]
    #[arg(long, value_name = "ADDRESS", value_parser = config::address)]
    listen: Option<SocketAddr>,
    /// Listen address for requests to ports of sandboxes [env: WRENN_TRAFFIC_LISTEN] [default:
    /// 127.0.0.1:8001]
    #[arg(long, value_name = "ADDRESS", value_parser = config::address)]
    traffic_listen: Option<SocketAddr>,
    /// Database [env: DATABASE_URL] [default: SQLite in the data directory]
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
}

/// Arguments of the host agent.
#[derive(Debug, Args)]
struct HostArgs {
    /// Listen address of the host agent [env: WRENN_AGENT_LISTEN] [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDRESS", value_parser = config::address)]
    agent_listen: Option<SocketAddr>,
    /// Accelerator for guests [env: WRENN_ACCEL] [default: auto]
    #[arg(long, value_enum)]
    accel: Option<AccelChoice>,
    /// VMM of guests that boot [env: WRENN_VMM] [default: auto]
    #[arg(long, value_enum)]
    vmm: Option<VmmChoice>,
    /// CPU model of guests that boot in QEMU, in its notation [env: WRENN_CPU] [default: `host` with
    /// hardware virtualization, otherwise a model with AVX2]
    #[arg(long, value_name = "MODEL")]
    cpu: Option<CpuModel>,
    /// Directory of kernels, root file systems and templates [env: WRENN_IMAGES_DIR] [default:
    /// `images` in the data directory]
    #[arg(long, value_name = "DIR")]
    images_dir: Option<PathBuf>,
}

/// Arguments that the control plane and the host agent share.
#[derive(Debug, Args)]
struct EgressArgs {
    /// Default network access of sandboxes beyond the host [env: WRENN_EGRESS] [default: deny]
    #[arg(long, value_name = "POLICY", value_parser = egress_parser())]
    egress: Option<Egress>,
}

/// Arguments of `wrenn up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    egress: EgressArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// Arguments of `wrenn server`.
#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    #[command(flatten)]
    control: ControlArgs,
    /// URL of the host agent [env: WRENN_AGENT_URL] [default: http://127.0.0.1:50051]
    #[arg(long, value_name = "URL")]
    agent_url: Option<String>,
    #[command(flatten)]
    egress: EgressArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// Arguments of `wrenn agent`.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    egress: EgressArgs,
    #[command(flatten)]
    log: LogArgs,
}

impl ControlArgs {
    fn settings(&self, layer: &mut Layer) {
        layer.listen = self.listen;
        layer.traffic_listen = self.traffic_listen;
        layer.database_url.clone_from(&self.database_url);
    }
}

impl HostArgs {
    fn settings(&self, layer: &mut Layer) {
        layer.agent_listen = self.agent_listen;
        layer.accel = self.accel;
        layer.vmm = self.vmm;
        layer.cpu.clone_from(&self.cpu);
        layer.images_dir.clone_from(&self.images_dir);
    }
}

impl UpArgs {
    /// Copies the settings among the flags to `layer`.
    pub(crate) fn settings(&self, layer: &mut Layer) {
        self.control.settings(layer);
        self.host.settings(layer);
        layer.egress = self.egress.egress;
    }
}

impl ServerArgs {
    /// Copies the settings among the flags to `layer`.
    pub(crate) fn settings(&self, layer: &mut Layer) {
        self.control.settings(layer);
        layer.agent_url.clone_from(&self.agent_url);
        layer.egress = self.egress.egress;
    }
}

impl AgentArgs {
    /// Copies the settings among the flags to `layer`.
    pub(crate) fn settings(&self, layer: &mut Layer) {
        self.host.settings(layer);
        layer.egress = self.egress.egress;
    }
}

/// Runs the control plane and the host agent in this process.
pub(crate) async fn up(settings: &Settings, args: UpArgs) -> anyhow::Result<i32> {
    let interrupts = Interrupts::new()?;
    require_root("up")?;
    begin(settings, &args.log)?;
    require_free(settings.listen, "--listen or WRENN_LISTEN")?;
    require_free(
        settings.traffic_listen,
        "--traffic-listen or WRENN_TRAFFIC_LISTEN",
    )?;
    require_free(
        settings.agent_listen,
        "--agent-listen or WRENN_AGENT_LISTEN",
    )?;
    let (config, accel) = agent_config(settings).await?;
    let token = config.token.clone();
    let agent = start_agent(config).await?;
    let agent_url = format!("http://{}", agent.address);
    let (control, traffic) =
        start_control(control_config(settings, agent_url.clone(), token.clone())).await?;
    output::line(format_args!(
        "wrenn: listening on http://{} ({accel})",
        control.address
    ))?;
    print_isolation(accel)?;
    print_client_settings(settings, traffic)?;
    warn_missing_template(settings);
    run_until_signal(vec![control, agent], interrupts, || async {
        run_on::count(&agent_url, &token).await
    })
    .await
}

/// Runs the control plane only.
pub(crate) async fn server(settings: &Settings, args: ServerArgs) -> anyhow::Result<i32> {
    let interrupts = Interrupts::new()?;
    begin(settings, &args.log)?;
    require_free(settings.listen, "--listen or WRENN_LISTEN")?;
    require_free(
        settings.traffic_listen,
        "--traffic-listen or WRENN_TRAFFIC_LISTEN",
    )?;
    let token = data_dir::agent_token(settings)?;
    let config = control_config(settings, settings.agent_url.clone(), token);
    let (control, traffic) = start_control(config).await?;
    output::line(format_args!(
        "wrenn: listening on http://{}",
        control.address
    ))?;
    print_client_settings(settings, traffic)?;
    run_until_signal(vec![control], interrupts, || async { None }).await
}

/// Runs the host agent only.
pub(crate) async fn agent(settings: &Settings, args: AgentArgs) -> anyhow::Result<i32> {
    let interrupts = Interrupts::new()?;
    require_root("agent")?;
    begin(settings, &args.log)?;
    require_free(
        settings.agent_listen,
        "--agent-listen or WRENN_AGENT_LISTEN",
    )?;
    let (config, accel) = agent_config(settings).await?;
    let token = config.token.clone();
    let agent = start_agent(config).await?;
    let url = format!("http://{}", agent.address);
    output::line(format_args!("wrenn: agent listening on {url} ({accel})"))?;
    print_isolation(accel)?;
    warn_missing_template(settings);
    run_until_signal(vec![agent], interrupts, || async {
        run_on::count(&url, &token).await
    })
    .await
}

/// Initialization that every service performs first.
fn begin(settings: &Settings, log: &LogArgs) -> anyhow::Result<()> {
    logging::init(&settings.log, log.log_json)?;
    descriptors::raise();
    data_dir::create(&settings.dir)
}

async fn start_agent(config: AgentConfig) -> anyhow::Result<Service> {
    Service::start("host agent", |ready, stop| async move {
        let ready = move |address| {
            // The receiver is gone if the start was abandoned.
            let _ = ready.send(address);
        };
        let in_use = |error| match error {
            AgentError::InUse(dir) => anyhow!(
                "another `wrenn up` or `wrenn agent` is using {}; stop it, or choose another directory with --dir or WRENN_DIR",
                dir.display()
            ),
            other => other.into(),
        };
        wrenn_agent::serve(config, ready, stop).await.map_err(in_use)
    })
    .await
}

/// Starts the control plane. Also returns the address on which it accepts requests to ports of
/// sandboxes.
async fn start_control(config: ControlConfig) -> anyhow::Result<(Service, SocketAddr)> {
    let (traffic_sender, traffic) = tokio::sync::oneshot::channel();
    let control = Service::start("control plane", |ready, stop| async move {
        let ready = move |listening: Listening| {
            // The receiver is gone if the start was abandoned.
            let _ = traffic_sender.send(listening.traffic);
            let _ = ready.send(listening.api);
        };
        wrenn_api::serve(config, ready, stop).await?;
        Ok(())
    })
    .await?;
    let traffic = traffic
        .await
        .context("the control plane did not report its traffic address")?;
    Ok((control, traffic))
}

/// Prints a warning if guests are not isolated by hardware virtualization.
fn print_isolation(accel: Accel) -> anyhow::Result<()> {
    if let Some(note) = Boundary::of_accel(&accel.to_string()).note() {
        tracing::warn!(%accel, "{note}");
        output::line(format_args!("wrenn: warning: {note}"))?;
    }
    Ok(())
}

/// Prints the keys and the address that clients need.
fn print_client_settings(settings: &Settings, traffic: SocketAddr) -> anyhow::Result<()> {
    output::line(format_args!("API key: {}", settings.key_file().display()))?;
    output::line(format_args!("sandbox traffic: http://{traffic}"))?;
    output::line(format_args!(
        "E2B API key: {}",
        settings.e2b_key_file().display()
    ))?;
    Ok(())
}

fn control_config(settings: &Settings, agent_url: String, agent_token: String) -> ControlConfig {
    ControlConfig {
        listen: settings.listen,
        traffic_listen: settings.traffic_listen,
        database_url: settings.database_url.clone(),
        agent_url,
        agent_token,
        default_egress: settings.egress,
        first_key_file: Some(settings.key_file()),
        first_e2b_key_file: Some(settings.e2b_key_file()),
        poll_interval: POLL_INTERVAL,
        limits: settings.limits,
    }
}

async fn agent_config(settings: &Settings) -> anyhow::Result<(AgentConfig, Accel)> {
    let decision = vmm::decide(settings);
    if let Some(why) = decision.impossible() {
        bail!("{why}");
    }
    let nameservers = nameservers::Files::default().nameservers(settings);
    tracing::info!(servers = ?nameservers.servers, source = nameservers.source, "name servers of this machine");
    let cpu = decision.checked_cpu(settings).await?;
    let vmm = decision.config(settings);
    let accel = vmm.boot_accel();
    tracing::info!(vmm = %vmm.boots, %accel, %cpu, "VMM of guests that boot");
    let config = AgentConfig {
        listen: settings.agent_listen,
        data_dir: settings.dir.clone(),
        images_dir: settings.images_dir.clone(),
        token: data_dir::agent_token(settings)?,
        vmm,
        cpu,
        default_egress: settings.egress == Egress::Allow,
        egress_ceiling: EgressCeiling {
            limit: settings.egress_limit,
            open: settings.egress_open.clone(),
            closed: settings.egress_closed.clone(),
        },
        subnets: settings.subnets,
        wrenn_exe: std::env::current_exe().context("failed to locate this program's executable")?,
        dns: nameservers.servers,
        snapshots_dir: None,
        template_snapshots: true,
        prefetch: true,
        keep_page_cache: false,
        boot: wrenn_agent::BootPolicy::default(),
        limits: settings.host_limits.clone(),
        object_store: settings.object_store.clone(),
    };
    Ok((config, accel))
}

/// Waits for a signal or for a service that ends unexpectedly, then stops all services in order.
async fn run_until_signal<F>(
    mut services: Vec<Service>,
    mut interrupts: Interrupts,
    count: impl FnOnce() -> F,
) -> anyhow::Result<i32>
where
    F: Future<Output = Option<usize>>,
{
    let failed = {
        let ends = services.iter_mut().map(|service| Box::pin(service.ended()));
        tokio::select! {
            (error, ..) = futures::future::select_all(ends) => Some(error),
            _ = interrupts.recv() => None,
        }
    };
    if let Some(error) = failed {
        // There is nothing to wait for; dropping the other services ends them.
        return Err(error);
    }
    let left = count().await;
    let stop = async {
        let mut result = Ok(());
        for service in services {
            result = result.and(service.stop(STOP_TIMEOUT).await);
        }
        result
    };
    tokio::select! {
        stopped = stop => stopped?,
        again = interrupts.recv() => return Ok(again.exit_code()),
    }
    output::line(match left {
        Some(0) | None => "wrenn: stopped".to_owned(),
        Some(1) => {
            "wrenn: stopped; 1 sandbox keeps running and is adopted at the next start".to_owned()
        }
        Some(n) => {
            format!("wrenn: stopped; {n} sandboxes keep running and are adopted at the next start")
        }
    })?;
    Ok(0)
}

fn require_root(command: &str) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "`wrenn {command}` requires root (for network namespaces, cgroups and virtual machines); run `sudo wrenn {command}`"
    );
}

/// Checks that a port is free. A port in use is the most common failure at a start, so it has its
/// own message.
fn require_free(address: SocketAddr, setting: &str) -> anyhow::Result<()> {
    match TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            bail!(
                "{address} is already in use (is Wrenn already running?); choose another address with {setting}"
            )
        }
        Err(e) => {
            Err(e).with_context(|| format!("failed to listen on {address} (set by {setting})"))
        }
    }
}

fn warn_missing_template(settings: &Settings) {
    let names = images::template_names(&settings.images_dir).unwrap_or_default();
    if !names.iter().any(|name| name == "minimal") {
        output::error(format_args!(
            "wrenn: template `minimal` is not built yet; run `wrenn image build --images-dir {}`",
            settings.images_dir.display()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_in_use_is_reported_with_its_setting() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("bound");
        let error = require_free(address, "--listen")
            .expect_err("taken")
            .to_string();
        assert!(error.contains(&address.to_string()), "{error}");
        assert!(error.contains("--listen"), "{error}");
        drop(taken);
        require_free(address, "--listen").expect("free now");
    }
}
