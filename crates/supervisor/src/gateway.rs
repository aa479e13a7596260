//! Resources of the supervisor in the sandbox's network namespace: the TAP device and the services
//! at the gateway address.

mod dns;
pub mod mmds;
pub mod ntp;

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    path::Path,
};

use tokio::task::JoinHandle;
use wrenn_proto::guest;

use self::mmds::Mmds;
use crate::SupervisorError;

/// Opens the sandbox's TAP device, which the agent has created.
pub(crate) fn open_tap(netns: &Path) -> Result<OwnedFd, SupervisorError> {
    in_namespace(netns, || wrenn_sys::tap::open(guest::TAP_NAME))
        .map_err(SupervisorError::io("open the sandbox's TAP device"))
}

/// Running services. Dropping this value ends them.
pub(crate) struct Services(Vec<JoinHandle<()>>);

impl Drop for Services {
    fn drop(&mut self) {
        for service in &self.0 {
            service.abort();
        }
    }
}

/// Starts the time service, the metadata service and, with `dns_upstreams`, the DNS forwarder at the
/// guest's gateway.
pub(crate) fn serve(
    netns: &Path,
    mmds: Mmds,
    dns_upstreams: &[IpAddr],
) -> Result<Services, SupervisorError> {
    let time = udp(netns, (guest::GATEWAY_IP, wrenn_proto::ntp::PORT).into())
        .map_err(SupervisorError::io("listen for the guest's time requests"))?;
    let metadata = tcp(netns, (guest::METADATA_IP, guest::METADATA_PORT).into()).map_err(
        SupervisorError::io("listen for the guest's metadata requests"),
    )?;
    let mut services = vec![
        tokio::spawn(ntp::serve(time)),
        tokio::spawn(mmds::serve::serve(metadata, mmds)),
    ];
    if !dns_upstreams.is_empty() {
        let address = (guest::GATEWAY_IP, guest::DNS_PORT).into();
        let failed = || SupervisorError::io("listen for the guest's DNS requests");
        let socket = udp(netns, address).map_err(failed())?;
        let listener = tcp(netns, address).map_err(failed())?;
        let upstreams = dns::upstreams(dns_upstreams);
        services.push(tokio::spawn(dns::serve(socket, listener, upstreams)));
    }
    Ok(Services(services))
}

fn udp(netns: &Path, address: SocketAddr) -> io::Result<tokio::net::UdpSocket> {
    let socket = in_namespace(netns, || {
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    tokio::net::UdpSocket::from_std(socket?)
}

fn tcp(netns: &Path, address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let listener = in_namespace(netns, || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    tokio::net::TcpListener::from_std(listener?)
}

/// Runs `work` on a separate thread in a network namespace. A descriptor opened by `work` stays in
/// that namespace, regardless of the thread that uses it.
fn in_namespace<T: Send>(
    netns: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let namespace = fs::File::open(netns)?;
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
                work()
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
}
