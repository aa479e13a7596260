//! Ports of servers that listen only inside, made reachable from outside.
//!
//! A server on 127.0.0.1 or ::1 cannot be reached through the guest's network device. For each such port this listens on the
//! device's address and copies both ways, unless something is reachable there already. The kernel's tables of sockets
//! ([`table`], [`scan`]) are looked at once a second; [`plan`] says from them which ports need a forwarder; [`forward`] is one.
//!
//! Forwarders are tasks of this process. The original starts a `socat` for each port and forks it for each connection: a
//! megabyte or more of the guest's memory each, a program that must be in every image, and processes that outlive a freeze
//! and hold their ports. A task is a few hundred bytes, and is gone when this says so.
//!
//! - A forwarder belongs to a port and remembers the inode of its listener. A server that is started again between two looks
//!   has another inode and the same port: the forwarder stays open and leads to the new one.
//! - A listener that is gone takes its forwarder with it; connections that are open live on until an end closes them.
//! - A port that cannot be bound is tried again at each look.
//! - While a forwarder holds a port, nothing else can be bound to that port on all addresses; so for up to a second after
//!   its server has gone, a server for everyone cannot take its place.
//! - [`Ports::stop`] ends all of it, before a machine is frozen, and returns when every port is free; [`Ports::start`] begins anew.

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

/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// Until the first look: after a restore, somebody is waiting for a first command.
const FIRST_LOOK: Duration = Duration::from_millis(500);

/// Forwarded connections at once: each has two buffers of 8 KiB. More wait in the kernel.
const MAX_CONNECTIONS: usize = 1024;

/// All forwarded ports.
#[derive(Debug)]
pub struct Ports {
    outside: IpAddr,
    /// Held while they are started or stopped, so that one ends before another begins.
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: CancellationToken,
    watching: JoinHandle<()>,
}

impl Ports {
    /// Forwards nothing yet. `outside` is this machine's address.
    #[must_use]
    pub fn new(outside: IpAddr) -> Self {
        Self {
            outside,
            running: Mutex::new(None),
        }
    }

    /// Forwards what there is now and what comes. Doing it twice is fine.
    pub async fn start(&self) {
        let mut running = self.running.lock().await;
        if running.is_some() {
            return;
        }
        let stop = CancellationToken::new();
        let watching = tokio::spawn(watch(self.outside, stop.clone()));
        *running = Some(Running { stop, watching });
    }

    /// Stops looking, closes all ports and cuts all connections; returns when that is done. Doing it twice is fine.
    pub async fn stop(&self) {
        let mut running = self.running.lock().await;
        if let Some(running) = running.take() {
            running.stop.cancel();
            // It ends when it is told to.
            let _ = running.watching.await;
        }
    }
}

async fn watch(outside: IpAddr, stop: CancellationToken) {
    stop.run_until_cancelled(sleep(FIRST_LOOK)).await;
    let mut watcher = match Watcher::new(outside, stop.clone()) {
        Ok(watcher) => watcher,
        Err(error) => {
            tracing::error!(%error, "ports are not forwarded: the table of sockets cannot be read");
            return;
        }
    };
    while !stop.is_cancelled() {
        watcher.look().await;
        stop.run_until_cancelled(sleep(PERIOD)).await;
    }
    watcher.end().await;
}

/// What one run of the watch has.
struct Watcher {
    outside: IpAddr,
    scanner: Scanner,
    plan: Plan,
    forwarders: BTreeMap<u16, Forwarder>,
    limits: Limits,
    /// Problems are told once, not once a second.
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

    /// Makes the forwarders what the table says they should be.
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
            // What is known from before goes on.
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
            tracing::warn!(port, %error, "a port is not forwarded; it will be tried again");
        }
    }

    async fn end(self) {
        for forwarder in self.forwarders.into_values() {
            forwarder.close().await;
        }
    }
}
