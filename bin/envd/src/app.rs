//! State of the plain HTTP routes.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    connections::Connections, cpu_use::CpuUse, mmds::Mmds, page_cache::PageCache, ports::Ports,
    settings::Settings,
};

/// State that is shared by all calls.
#[derive(Clone)]
pub struct App {
    /// Settings from the host.
    pub settings: Arc<Settings>,
    /// Client connections.
    pub connections: Arc<Connections>,
    /// Size of the page cache in snapshots.
    pub page_cache: Arc<PageCache>,
    /// Forwarding of loopback ports.
    pub ports: Arc<Ports>,
    /// Client of the metadata service.
    pub mmds: Arc<Mmds>,
    /// CPU usage of the guest.
    pub cpu_use: Arc<CpuUse>,
}

impl App {
    /// Creates the state of a guest agent that has just started. Loopback ports are forwarded on
    /// `forward_address`.
    #[must_use]
    pub fn new(forward_address: IpAddr, metadata_address: SocketAddr) -> Self {
        let settings = Arc::<Settings>::default();
        Self {
            connections: Arc::default(),
            page_cache: Arc::default(),
            ports: Arc::new(Ports::new(forward_address)),
            mmds: Arc::new(Mmds::new(metadata_address, settings.clone())),
            cpu_use: Arc::default(),
            settings,
        }
    }
}
