//! Links, addresses and routes, configured over netlink.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use futures::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoVeth, LinkAttribute, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
    },
};

use super::surroundings::{Route, RouteKind, Surroundings, is_internal};

/// Netlink socket. It belongs to the namespace that the calling thread was in when it was opened.
pub(super) struct Netlink {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Kernel error code for a missing device: `-errno` of `ENODEV`.
const NO_SUCH_DEVICE: i32 = -nix::libc::ENODEV;

impl Netlink {
    /// Opens a netlink socket. Must be called inside a tokio runtime.
    pub(super) fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Returns the index of a link, or `None` if no link has this name.
    pub(super) async fn index(&self, name: &str) -> Result<Option<u32>, rtnetlink::Error> {
        let request = self.handle.link().get().match_name(name.to_owned());
        match request.execute().try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if is_no_such_device(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the routes and links of this namespace.
    pub(super) async fn surroundings(&self) -> Result<Surroundings, rtnetlink::Error> {
        let (mut names, mut mtus) = (BTreeMap::new(), BTreeMap::new());
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            let (mut name, mut mtu) = (String::new(), 0);
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name = text,
                    LinkAttribute::Mtu(number) => mtu = number,
                    _ => {}
                }
            }
            if !is_internal(&name) {
                mtus.insert(name.clone(), mtu);
            }
            names.insert(link.header.index, name);
        }
        let mut routes = Vec::new();
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut messages = self.handle.route().get(all).execute();
        while let Some(message) = messages.try_next().await? {
            routes.extend(route(&message, &names));
        }
        Ok(Surroundings { routes, mtus })
    }

    /// Creates a veth pair: `name` in this namespace, `peer` in another.
    pub(super) async fn add_veth(
        &self,
        name: &str,
        peer: &str,
        peer_ns: BorrowedFd<'_>,
        mtu: u32,
    ) -> Result<(), rtnetlink::Error> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer)
            .mtu(mtu)
            .setns_by_fd(peer_ns.as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(
            rtnetlink::packet_route::link::InfoKind::Veth,
        )
        .name(name)
        .mtu(mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
        self.handle.link().add(message).execute().await
    }

    /// Applies changes to a link.
    pub(super) async fn set(&self, message: LinkMessage) -> Result<(), rtnetlink::Error> {
        self.handle.link().set(message).execute().await
    }

    /// Sets a link up.
    pub(super) async fn set_up(&self, index: u32) -> Result<(), rtnetlink::Error> {
        self.set(LinkUnspec::new_with_index(index).up().build())
            .await
    }

    /// Removes a link together with its peer and its routes. Succeeds if it does not exist.
    pub(super) async fn remove(&self, name: &str) -> Result<(), rtnetlink::Error> {
        let Some(index) = self.index(name).await? else {
            return Ok(());
        };
        match self.handle.link().del(index).execute().await {
            Err(error) if !is_no_such_device(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Adds an address to a link.
    pub(super) async fn add_address(
        &self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), rtnetlink::Error> {
        let request = self.handle.address().add(index, address.into(), prefix);
        request.execute().await
    }

    /// Adds a route via `gateway`, to one address or, with `None`, as the default route.
    pub(super) async fn add_route(
        &self,
        index: u32,
        destination: Option<Ipv4Addr>,
        gateway: Ipv4Addr,
    ) -> Result<(), rtnetlink::Error> {
        let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .output_interface(index);
        if let Some(destination) = destination {
            route = route.destination_prefix(destination, 32);
        }
        self.handle.route().add(route.build()).execute().await
    }

    /// Adds a permanent neighbour entry with a fixed hardware address.
    pub(super) async fn add_neighbour(
        &self,
        index: u32,
        address: Ipv4Addr,
        mac: &[u8],
    ) -> Result<(), rtnetlink::Error> {
        let request = self.handle.neighbours().add(index, address.into());
        request.link_layer_address(mac).execute().await
    }
}

/// Converts a route. `None` for routes that do not matter: those of sandboxes and of loopback, and
/// broadcast addresses.
fn route(message: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<Route> {
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => RouteKind::Nowhere,
        _ => return None,
    };
    let mut route = Route {
        destination: Ipv4Net::default(),
        kind,
        links: Vec::new(),
        direct: true,
        table: message.header.table.into(),
        metric: 0,
    };
    let mut address = Ipv4Addr::UNSPECIFIED;
    let name = |index: &u32| names.get(index).cloned();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(destination)) => address = *destination,
            RouteAttribute::Oif(index) => route.links.extend(name(index)),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => route.direct = false,
            RouteAttribute::MultiPath(hops) => {
                let indices = hops.iter().map(|hop| &hop.interface_index);
                route.links.extend(indices.filter_map(name));
                route.direct = false;
            }
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            _ => {}
        }
    }
    // An address of the host may belong to loopback.
    let ignored = |link: &String| is_internal(link) && !(kind == RouteKind::Local && link == "lo");
    if !route.links.is_empty() && route.links.iter().all(ignored) {
        return None;
    }
    let prefix = message.header.destination_prefix_length;
    route.destination = Ipv4Net::new(address, prefix).ok()?.trunc();
    Some(route)
}

fn is_no_such_device(error: &rtnetlink::Error) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == NO_SUCH_DEVICE)
}
