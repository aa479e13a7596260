//! What the supervisor does inside the sandbox's network namespace: its end of the link, and the services there.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    path::Path,
};

use tokio::task::JoinHandle;
use wrenn_proto::limits;

use crate::{
    SupervisorError,
    mmds::{self, Mmds},
    ntp,
};

/// Port of the network time protocol.
const NTP_PORT: u16 = 123;

/// Port of the metadata service.
const METADATA_PORT: u16 = 80;

/// Opens the sandbox's TAP device, which the agent made.
pub(crate) fn open_tap(netns: &Path) -> Result<OwnedFd, SupervisorError> {
    in_namespace(netns, || wrenn_sys::tap::open(limits::TAP_NAME))
        .map_err(SupervisorError::io("open the sandbox's TAP device"))
}

/// The services that run; they end when this is dropped.
pub(crate) struct Services([JoinHandle<()>; 2]);

impl Drop for Services {
    fn drop(&mut self) {
        for service in &self.0 {
            service.abort();
        }
    }
}

/// Serves time and metadata to the guest from its gateway.
pub(crate) fn serve(netns: &Path, mmds: Mmds) -> Result<Services, SupervisorError> {
    let socket = in_namespace(netns, || {
        let address = SocketAddr::from((limits::GATEWAY_IP, NTP_PORT));
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })
    .and_then(tokio::net::UdpSocket::from_std)
    .map_err(SupervisorError::io("listen for the guest's time requests"))?;
    let listener = in_namespace(netns, || {
        let address = SocketAddr::from((limits::METADATA_IP, METADATA_PORT));
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

/// Runs `work` on a thread of its own in a network namespace. What it opens stays in that namespace wherever it is used.
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
            .unwrap_or_else(|_| Err(io::Error::other("the namespace's thread panicked")))
    })
}
