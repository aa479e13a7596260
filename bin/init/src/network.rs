//! Setup of the guest's network link through rtnetlink(7). The link is the same in every sandbox.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use wrenn_proto::guest::{GATEWAY_IP, IP as GUEST_IP};

const LINK: &str = "eth0";
const PREFIX_LENGTH: u8 = 30;

/// Parameter of the kernel command line with the MTU of the link.
const MTU: &str = "wrenn.mtu=";

/// `RT_TABLE_MAIN` of `linux/rtnetlink.h`.
const MAIN_TABLE: u8 = 254;

/// Index of the loopback interface, which every kernel creates first.
const LOOPBACK_INDEX: u32 = 1;

/// Sets up `lo`, `eth0` and the route to the gateway. IPv6 exists only within the guest, because
/// programs listen on `::1`.
pub(crate) fn configure() -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let ask = |message| request(&socket, message);
    ask(set_up(LOOPBACK_INDEX))?;
    let index = fs::read_to_string(format!("/sys/class/net/{LINK}/ifindex"))?;
    let index = index.trim().parse().map_err(io::Error::other)?;
    fs::write(format!("/proc/sys/net/ipv6/conf/{LINK}/disable_ipv6"), "1").ok();
    if let Some(mtu) = mtu(&fs::read_to_string("/proc/cmdline")?) {
        fs::write(format!("/sys/class/net/{LINK}/mtu"), mtu)?;
    }
    ask(address(index))?;
    ask(set_up(index))?;
    ask(default_route())
}

/// Returns the MTU on the kernel command line; `None` if the host does not set one.
fn mtu(cmdline: &str) -> Option<&str> {
    let words = cmdline.split_whitespace();
    let mut values = words.filter_map(|word| word.strip_prefix(MTU));
    values.find(|value| value.parse::<u32>().is_ok())
}

fn set_up(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(message)
}

fn address(index: u32) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = PREFIX_LENGTH;
    message.header.index = index;
    let broadcast = Ipv4Addr::from(u32::from(GUEST_IP) | (u32::MAX >> PREFIX_LENGTH));
    message.attributes = vec![
        AddressAttribute::Local(IpAddr::V4(GUEST_IP)),
        AddressAttribute::Address(IpAddr::V4(GUEST_IP)),
        AddressAttribute::Broadcast(broadcast),
    ];
    RouteNetlinkMessage::NewAddress(message)
}

fn default_route() -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = MAIN_TABLE;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY_IP))];
    RouteNetlinkMessage::NewRoute(message)
}

/// Sends a request and waits for the kernel's reply.
fn request(socket: &Socket, payload: RouteNetlinkMessage) -> io::Result<()> {
    let mut message = NetlinkMessage::from(payload);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    if !matches!(
        message.payload,
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::SetLink(_))
    ) {
        message.header.flags |= NLM_F_CREATE | NLM_F_REPLACE;
    }
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
    match answer.map_err(io::Error::other)?.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mtu_is_a_number_on_the_command_line() {
        assert_eq!(mtu("quiet wrenn.mtu=1400 panic=-1\n"), Some("1400"));
        assert_eq!(mtu("quiet wrenn.mtu=large panic=-1"), None);
        assert_eq!(mtu("quiet"), None);
    }
}
