//! Forwarding of loopback ports, which makes them reachable from outside the guest.
//!
//! A server on 127.0.0.1 or ::1 is not reachable through the guest's network device. For each such
//! port, envd listens on the device's address and copies in both directions, unless another server
//! is reachable on that port already. The kernel's socket tables ([`table`], [`scan`]) are scanned
//! once per second. [`plan`] derives from them the ports that need a forwarder. [`forward`] is one
//! forwarder.
//!
//! Forwarders are tasks of envd. E2B's envd starts one `socat` per port, which forks for each
//! connection. That costs at least a megabyte of the guest's memory per process, requires a program
//! in every image, and leaves processes that survive a snapshot and hold their ports. A task takes
//! a few hundred bytes and ends when envd stops it.
//!
//! - A forwarder belongs to a port and remembers the inode of its listener. A server that restarts
//!   between two scans has another inode and the same port: the forwarder stays open and connects
//!   to the new server.
//! - A forwarder ends with its listener. Open connections continue until one end closes them.
//! - If a port cannot be bound, the next scan tries again.
//! - While a forwarder holds a port, no other socket can bind that port on all addresses. After a
//!   server ends, another server can therefore not bind its port on all addresses for up to one
//!   second.
//! - [`Ports::stop`] ends all forwarding before a snapshot and returns when all ports are free.
//!   [`Ports::start`] starts it again.

pub mod forward;
pub mod plan;
pub mod scan;
pub mod table;

use std::{collections::BTreeMap, io, net::IpAddr, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, Semaphore},
    task::JoinHandle,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use self::{
    forward::{Forwarder, Limits},
    plan::Plan,
    scan::Scanner,
};

/// Time between two scans.
const PERIOD: Duration = Duration::from_secs(1);

/// Delay of the first scan. After a restore, a client waits for its first command.
const FIRST_LOOK: Duration = Duration::from_millis(500);

/// Maximum number of forwarded connections. Each has two buffers of 8 KiB. More connections wait in
/// the kernel.
const MAX_CONNECTIONS: usize = 1024;

/// All forwarded ports.
#[derive(Debug)]
pub struct Ports {
    outside: IpAddr,
    /// State while forwarding runs. Locked during start and stop, so that one run ends before the
    /// next begins.
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: CancellationToken,
    watching: JoinHandle<()>,
}

impl Ports {
    /// Creates the state without forwarding any port. `outside` is the guest's address.
    #[must_use]
    pub fn new(outside: IpAddr) -> Self {
        Self {
            outside,
            running: Mutex::new(None),
        }
    }

    /// Forwards the current and future loopback ports. May be called twice.
    pub async fn start(&self) {
        let mut running = self.running.lock().await;
        if running.is_some() {
            return;
        }
        let stop = CancellationToken::new();
        let watching = tokio::spawn(watch(self.outside, stop.clone()));
        *running = Some(Running { stop, watching });
    }

    /// Stops scanning, closes all ports and cuts all connections. Returns when that is done. May be
    /// called twice.
    pub async fn stop(&self) {
        let mut running = self.running.lock().await;
        if let Some(running) = running.take() {
            running.stop.cancel();
            // The task ends after the cancellation.
            let _ = running.watching.await;
        }
    }
}

async fn watch(outside: IpAddr, stop: CancellationToken) {
    stop.run_until_cancelled(sleep(FIRST_LOOK)).await;
    let mut watcher = match Watcher::new(outside, stop.clone()) {
        Ok(watcher) => watcher,
        Err(error) => {
            tracing::error!(%error, "failed to open the socket tables, no port is forwarded");
            return;
        }
    };
    while !stop.is_cancelled() {
        watcher.look().await;
        stop.run_until_cancelled(sleep(PERIOD)).await;
    }
    watcher.end().await;
}

/// State of one run of the watch.
struct Watcher {
    outside: IpAddr,
    scanner: Scanner,
    plan: Plan,
    forwarders: BTreeMap<u16, Forwarder>,
    limits: Limits,
    /// True after the first problem was logged, so that problems are not logged once per second.
    has_complained: bool,
}

impl Watcher {
    fn new(outside: IpAddr, cut: CancellationToken) -> io::Result<Self> {
        Ok(Self {
            outside,
            scanner: Scanner::open()?,
            plan: Plan::new(outside),
            forwarders: BTreeMap::new(),
            limits: Limits {
                connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
                cut,
            },
            has_complained: false,
        })
    }

    /// Scans the tables and updates the forwarders.
    async fn look(&mut self) {
        let Self {
            scanner,
            plan,
            forwarders,
            ..
        } = self;
        plan.clear();
        let scanned = scanner.scan(|listener| {
            let owned = forwarders.contains_key(&listener.port);
            plan.add(listener, owned);
        });
        if let Err(error) = scanned {
            // The existing forwarders continue.
            self.complain(0, &error);
            return;
        }
        self.close_unwanted().await;
        self.open_wanted().await;
    }

    async fn close_unwanted(&mut self) {
        let plan = &self.plan;
        let unwanted = self
            .forwarders
            .extract_if(.., |port, _| plan.target(*port).is_none());
        for (_, forwarder) in unwanted {
            forwarder.close().await;
        }
    }

    async fn open_wanted(&mut self) {
        let mut problem = None;
        for (port, target) in self.plan.wanted() {
            if let Some(forwarder) = self.forwarders.get(&port) {
                forwarder.aim(target);
                continue;
            }
            match Forwarder::open(self.outside, target, self.limits.clone()).await {
                Ok(forwarder) => {
                    self.forwarders.insert(port, forwarder);
                }
                Err(error) => problem = Some((port, error)),
            }
        }
        if let Some((port, error)) = problem {
            self.complain(port, &error);
        }
    }

    fn complain(&mut self, port: u16, error: &io::Error) {
        if !std::mem::replace(&mut self.has_complained, true) {
            tracing::warn!(port, %error, "port forwarding failed, will retry");
        }
    }

    async fn end(self) {
        for forwarder in self.forwarders.into_values() {
            forwarder.close().await;
        }
    }
}
