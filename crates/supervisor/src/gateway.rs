//! Resources of the supervisor in the sandbox's network namespace: the TAP device and the services
//! at the gateway address.

pub mod mmds;
pub mod ntp;

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, UdpSocket},
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
pub(crate) struct Services([JoinHandle<()>; 2]);

impl Drop for Services {
    fn drop(&mut self) {
        for service in &self.0 {
            service.abort();
        }
    }
}

/// Starts the time service and the metadata service at the guest's gateway.
pub(crate) fn serve(netns: &Path, mmds: Mmds) -> Result<Services, SupervisorError> {
    let socket = in_namespace(netns, || {
        let address = SocketAddr::from((guest::GATEWAY_IP, wrenn_proto::ntp::PORT));
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
    .and_then(tokio::net::UdpSocket::from_std)
    .map_err(SupervisorError::io("listen for the guest's time requests"))?;
    let listener = in_namespace(netns, || {
        let address = SocketAddr::from((guest::METADATA_IP, guest::METADATA_PORT));
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })
    .and_then(tokio::net::TcpListener::from_std)
    .map_err(SupervisorError::io(
        "listen for the guest's metadata requests",
    ))?;
    Ok(Services([
        tokio::spawn(ntp::serve(socket)),
        tokio::spawn(mmds::serve::serve(listener, mmds)),
    ]))
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
