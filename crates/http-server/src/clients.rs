//! Clients of a listener: who they are, how many there are, and which of them make room for others.
//!
//! Owns the table of connections. Each connection holds a [`Slot`] while it exists. A new client
//! takes the place of a connection that waits for its own client: the one that has been idle for the
//! longest time, or else one whose request head does not arrive. A connection that answers a request
//! is never closed for another.
//!
//! | new client | room is made by | no room |
//! |---|---|---|
//! | its peer has [`Limits::clients_per_peer`] connections | a connection of this peer | rejected |
//! | there are [`Limits::clients`] connections | any connection | waits |
//!
//! A peer is an IPv4 address, or the /64 network of an IPv6 address: one machine may choose any
//! address in it.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::{
    Limits,
    connection::{Activity, STALLED},
};

/// Connections of a listener.
#[derive(Debug)]
pub(crate) struct Clients {
    limits: Limits,
    table: Mutex<Table>,
    /// Notified when a connection ends or becomes idle.
    room: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    connections: BTreeMap<u64, Client>,
    per_peer: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Client {
    peer: IpAddr,
    activity: Arc<Activity>,
}

/// Place of a connection in the table. Freed when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    clients: Arc<Clients>,
    number: u64,
    /// State of the connection.
    pub(crate) activity: Arc<Activity>,
}

/// The peer has its maximum number of connections, and none of them is idle.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Clients {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            table: Mutex::default(),
            room: Arc::default(),
        })
    }

    /// Finds a place for a new connection. Waits while all connections answer requests.
    pub(crate) async fn admit(self: &Arc<Self>, address: IpAddr) -> Result<Slot, TooMany> {
        let peer = peer(address);
        loop {
            let room = self.room.notified();
            if let Some(slot) = self.try_admit(peer)? {
                return Ok(slot);
            }
            // A connection whose request head does not arrive makes room without a notification.
            let _ = tokio::time::timeout(STALLED, room).await;
        }
    }

    fn try_admit(self: &Arc<Self>, peer: IpAddr) -> Result<Option<Slot>, TooMany> {
        let mut table = self.table();
        let count = table.per_peer.get(&peer).copied().unwrap_or(0);
        if count >= self.limits.clients_per_peer && !table.evict(Some(peer)) {
            return Err(TooMany);
        }
        if table.connections.len() >= self.limits.clients && !table.evict(None) {
            return Ok(None);
        }
        let number = table.next;
        table.next += 1;
        let activity = Activity::new(Arc::clone(&self.room));
        let client = Client {
            peer,
            activity: Arc::clone(&activity),
        };
        table.connections.insert(number, client);
        *table.per_peer.entry(peer).or_default() += 1;
        Ok(Some(Slot {
            clients: Arc::clone(self),
            number,
            activity,
        }))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

impl Table {
    /// Closes the connection that has waited for its client for the longest time. Returns false if
    /// there is none. The connection leaves the table at once, and is gone within a second.
    fn evict(&mut self, peer: Option<IpAddr>) -> bool {
        let of_peer = |client: &&Client| peer.is_none_or(|peer| client.peer == peer);
        let waiting = self.connections.iter().filter_map(|(number, client)| {
            let waiting = of_peer(&client).then(|| client.activity.waiting())??;
            Some((waiting, *number))
        });
        let Some((_, number)) = waiting.min() else {
            return false;
        };
        let Some(client) = self.remove(number) else {
            return false;
        };
        tracing::debug!(peer = %client.peer, "idle connection closed for another client");
        client.activity.evict();
        true
    }

    fn remove(&mut self, number: u64) -> Option<Client> {
        let client = self.connections.remove(&number)?;
        if let Some(count) = self.per_peer.get_mut(&client.peer) {
            *count -= 1;
            if *count == 0 {
                self.per_peer.remove(&client.peer);
            }
        }
        Some(client)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.clients.table().remove(self.number);
        self.clients.room.notify_one();
    }
}

/// Returns the peer that an address counts for.
fn peer(address: IpAddr) -> IpAddr {
    const NETWORK: u128 = !0 << 64;
    match address.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & NETWORK).into(),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_network_are_one_peer() {
        let peer_of = |text: &str| peer(text.parse().expect("an address"));
        assert_eq!(peer_of("2001:db8::1"), peer_of("2001:db8::ffff:1"));
        assert_ne!(peer_of("2001:db8::1"), peer_of("2001:db8:0:1::1"));
        assert_eq!(peer_of("::ffff:192.0.2.1"), peer_of("192.0.2.1"));
        assert_ne!(peer_of("192.0.2.1"), peer_of("192.0.2.2"));
    }

    #[tokio::test]
    async fn table_is_empty_after_the_last_connection() {
        let clients = Clients::new(Limits {
            clients: 4,
            clients_per_peer: 2,
            headers: 10,
        });
        let ip = "192.0.2.1".parse().expect("an address");
        let (one, two) = (clients.admit(ip).await, clients.admit(ip).await);
        assert_eq!(clients.admit(ip).await.err(), Some(TooMany));
        drop((one, two));
        assert!(clients.table().connections.is_empty() && clients.table().per_peer.is_empty());
        assert!(clients.admit(ip).await.is_ok());
    }
}
