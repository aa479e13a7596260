//! Booting, pausing, saving and restoring a Firecracker VM.
//!
//! Independent of the process, so that it can be tested against any server of the API.
//!
//! ```text
//!            attach            boot                        pause
//!   process ────────► attached ────► running ◄───────────────────────► paused ──┐
//!                        │                      resume                   ▲  ▲   │ save
//!                        └───────────────────────────────────────────────┘  └───┘
//!                                             load
//! ```
//!
//! A step that fails leaves the VM as it was, except for a boot and a load: after those, the
//! process is unusable and must be killed.

use std::{io, os::fd::OwnedFd};

use serde_json::Value;
use wrenn_jail as jail;
use wrenn_model::MachineSize;
use wrenn_proto::{
    guest::{METADATA_IP, TAP_NAME},
    machine::Device,
    supervise::DiskRate,
};

use super::{
    api::{
        ActionType, BackendType, Balloon, BalloonStatistics, BootSource, CacheType, DRIVE_ID,
        DescribeInstance, Drive, DriveUpdate, EntropyDevice, GetBalloonStatistics, GetVersion,
        INTERFACE_ID, InstanceAction, InstanceState, IoEngine, LogLevel, Logger,
        MachineConfiguration, MemoryBackend, Metrics, MmdsConfig, MmdsContent, MmdsVersion,
        NetworkInterface, RateLimiter, Request, SnapshotCreate, SnapshotLoad, SnapshotType,
        VmState, VmUpdate,
    },
    client::{Client, Deadlines},
    files::SnapshotFiles,
    handshake::{PAGES_SOCKET, Relay},
    version::{MINIMUM, Version},
};
use crate::{ControlError, LaunchError, MachineConfig};

/// Files and sockets that a Firecracker process shares with its driver.
#[derive(Debug)]
pub struct Channels {
    /// Client of its API.
    pub client: Client,
    /// Files of its snapshots.
    pub files: SnapshotFiles,
    /// Path of its log, as Firecracker sees it.
    pub log_path: String,
    /// Path of its metrics, as Firecracker sees it.
    pub metrics_path: String,
    /// Source of its memory in a restore; `None` in a boot.
    pub pages: Option<Pages>,
}

/// Source of guest memory in a restore.
#[derive(Debug)]
pub enum Pages {
    /// Page server at the other end of this socket.
    Served(OwnedFd),
    /// File with all of the memory, by its path as Firecracker sees it.
    Mapped(String),
}

/// Control of one Firecracker process.
#[derive(Debug)]
pub struct Control {
    client: Client,
    files: SnapshotFiles,
    pages: Option<Pages>,
    version: Version,
    deadlines: Deadlines,
    size: MachineSize,
    disk_rate: DiskRate,
    metadata: Option<Value>,
}

impl Control {
    /// Waits for the API of a new process, reads its version, and sets up its log and metrics.
    ///
    /// # Errors
    /// `Deadline` if the API does not start in time; `Version` if it is too old; `Control` if a
    /// call fails.
    pub async fn attach(
        channels: Channels,
        config: &MachineConfig,
        deadlines: Deadlines,
    ) -> Result<Self, LaunchError> {
        let client = channels.client;
        match client.wait_for_start(deadlines.start).await {
            Err(ControlError::Deadline { deadline, .. }) => {
                return Err(LaunchError::Deadline(deadline));
            }
            started => started?,
        }
        let version = identify(&client, deadlines).await?;
        let logger = Logger {
            log_path: &channels.log_path,
            level: LogLevel::Warning,
            show_level: true,
            show_log_origin: false,
        };
        client.send(&logger, deadlines.configure).await?;
        let metrics = Metrics {
            metrics_path: &channels.metrics_path,
        };
        client.send(&metrics, deadlines.configure).await?;
        Ok(Self {
            client,
            files: channels.files,
            pages: channels.pages,
            version,
            deadlines,
            size: config.size,
            disk_rate: config.disk_rate,
            metadata: config.metadata.clone(),
        })
    }

    /// Version of the process.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// True if [`load`](Self::load) passes a handshake to the page server.
    #[must_use]
    pub fn sends_handshake(&self) -> bool {
        matches!(self.pages, Some(Pages::Served(_)))
    }

    /// Configures the VM and boots it.
    ///
    /// # Errors
    /// See [`Client::send`].
    pub async fn boot(&self, config: &MachineConfig) -> Result<(), ControlError> {
        self.configure(&MachineConfiguration {
            vcpu_count: config.size.vcpus,
            mem_size_mib: config.size.memory_mib,
            smt: false,
            track_dirty_pages: true,
        })
        .await?;
        self.configure(&BootSource {
            kernel_image_path: jail::KERNEL,
            initrd_path: jail::INITRD,
            boot_args: &config.kernel_args,
        })
        .await?;
        self.attach_devices(config).await?;
        if let Some(content) = &self.metadata {
            self.configure(&MmdsConfig {
                version: MmdsVersion::V2,
                network_interfaces: [INTERFACE_ID],
                ipv4_address: METADATA_IP,
            })
            .await?;
            self.configure(&MmdsContent(content)).await?;
        }
        let start = InstanceAction {
            action_type: ActionType::InstanceStart,
        };
        self.client.send(&start, self.deadlines.cpus).await
    }

    /// Attaches the devices. Their order is that of the devices in the guest.
    async fn attach_devices(&self, config: &MachineConfig) -> Result<(), ControlError> {
        self.configure(&Drive {
            drive_id: DRIVE_ID,
            path_on_host: jail::RAW_DISK,
            is_root_device: false,
            is_read_only: false,
            cache_type: CacheType::Writeback,
            io_engine: IoEngine::Sync,
            rate_limiter: RateLimiter::of_new_disk(self.disk_rate),
        })
        .await?;
        self.configure(&NetworkInterface {
            iface_id: INTERFACE_ID,
            host_dev_name: TAP_NAME,
            guest_mac: &config.guest_mac,
        })
        .await?;
        self.configure(&EntropyDevice {}).await?;
        if config.machine.devices.contains(&Device::Balloon) {
            self.configure(&Balloon::for_version(&self.version)).await?;
        }
        Ok(())
    }

    /// Pauses the virtual CPUs.
    ///
    /// # Errors
    /// See [`Client::send`].
    pub async fn pause(&self) -> Result<(), ControlError> {
        self.set_state(VmState::Paused).await
    }

    /// Resumes the virtual CPUs.
    ///
    /// # Errors
    /// See [`Client::send`].
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.set_state(VmState::Resumed).await
    }

    async fn set_state(&self, state: VmState) -> Result<(), ControlError> {
        let update = VmUpdate { state };
        self.client.send(&update, self.deadlines.cpus).await
    }

    /// Writes the state of CPUs and devices to `state`, an empty file. Returns the file with the
    /// memory that changed since the start. The VM must be paused.
    ///
    /// # Errors
    /// See [`Client::send`]; `Io` if the state cannot be copied.
    pub async fn save(&self, state: OwnedFd) -> Result<OwnedFd, ControlError> {
        let memory_mib = self.size.memory_mib;
        let is_diff = self.files.is_exact() && self.version.writes_correct_diffs(memory_mib);
        let create = SnapshotCreate {
            snapshot_type: match is_diff {
                true => SnapshotType::Diff,
                false => SnapshotType::Full,
            },
            snapshot_path: &self.files.state_path(),
            mem_file_path: &self.files.memory_path(),
        };
        let deadline = self.deadlines.create_with(memory_mib);
        self.client.send(&create, deadline).await?;
        let taken = self.files.take_state(state);
        taken.map_err(io_failed("copy the device state"))?;
        let memory = self.files.memory();
        memory.map_err(io_failed("open the saved memory"))
    }

    /// Loads the state of CPUs and devices. The virtual CPUs stay paused. Can be called once.
    ///
    /// # Errors
    /// See [`Client::send`]; `Io` if the state cannot be copied; `Failed` or `Protocol` if the
    /// process sends no valid handshake. The process is then unusable.
    pub async fn load(&mut self, state: OwnedFd) -> Result<(), ControlError> {
        // Taken in any case: if the load fails, the page server must not wait for a handshake.
        let Some(pages) = self.pages.take() else {
            let operation = "load a snapshot into a VM that was booted or loaded";
            return Err(ControlError::Unsupported { operation });
        };
        let put = self.files.put_state(state);
        put.map_err(io_failed("copy the device state"))?;
        match pages {
            Pages::Mapped(path) => self.load_from(BackendType::File, &path).await?,
            Pages::Served(pager) => {
                let relay = Relay::listen(self.client.sockets(), pager)?;
                let path = format!("{}/{PAGES_SOCKET}", jail::SOCKETS);
                let load = self.load_from(BackendType::Uffd, &path);
                relay.during(load).await?;
            }
        }
        // The limits and the metadata of the host are not those of the snapshot.
        self.configure(&DriveUpdate {
            drive_id: DRIVE_ID,
            rate_limiter: RateLimiter::replacing(self.disk_rate),
        })
        .await?;
        match &self.metadata {
            Some(content) => self.configure(&MmdsContent(content)).await,
            None => Ok(()),
        }
    }

    async fn load_from(&self, kind: BackendType, path: &str) -> Result<(), ControlError> {
        let by_name = self.version.tracks_dirty_pages_by_name();
        let load = SnapshotLoad {
            snapshot_path: &self.files.state_path(),
            mem_backend: MemoryBackend {
                backend_type: kind,
                backend_path: path,
            },
            track_dirty_pages: by_name.then_some(true),
            enable_diff_snapshots: (!by_name).then_some(true),
            resume_vm: false,
        };
        self.client.send(&load, self.deadlines.load).await
    }

    /// Returns the memory statistics of the guest.
    ///
    /// # Errors
    /// See [`Client::send`]. `Rejected` if the VM has no balloon.
    pub async fn balloon_statistics(&self) -> Result<BalloonStatistics, ControlError> {
        self.configure(&GetBalloonStatistics).await
    }

    async fn configure<R: Request>(&self, request: &R) -> Result<R::Answer, ControlError> {
        self.client.send(request, self.deadlines.configure).await
    }
}

/// Checks that the process has no VM yet, and returns its version.
async fn identify(client: &Client, deadlines: Deadlines) -> Result<Version, LaunchError> {
    let info = client.send(&DescribeInstance, deadlines.configure).await?;
    if info.state != InstanceState::NotStarted {
        return Err(LaunchError::Control(ControlError::Protocol {
            command: DescribeInstance::CALL,
            reason: format!("a new process has the state {:?}", info.state),
        }));
    }
    let found = client.send(&GetVersion, deadlines.configure).await?;
    let found = found.firecracker_version;
    Version::parse(&found).ok_or_else(|| LaunchError::Version {
        found: found.escape_debug().take(64).collect(),
        minimum: MINIMUM,
    })
}

fn io_failed(step: &'static str) -> impl FnOnce(io::Error) -> ControlError {
    move |source| ControlError::Io { step, source }
}
