//! Connections in memory, for the tests of protocols.
//!
//! A [`SimulatedKernel`] holds both ends of each connection, and everything that is on
//! its way between them. The transport on top, [`MemoryStream`], is the real one; only
//! the socket at its bottom is simulated. [`Pump`] puts protocols on such transports.
//! It has a reactor whose clock stands still, and turns it until nothing is left to do.
//! [`MemoryPeer`] puts the other end into the hands of a test.
//!
//! A [`Simulation`] has several such reactors. They play processes that are connected,
//! pass each other descriptors, and die.
//!
//! | kind | here | in the hands of a test |
//! |---|---|---|
//! | streams | [`Memory`] | [`MemoryPeer`] |
//! | packets | [`MemoryPackets`] | [`MemoryPacketPeer`] |
//! | UDP, with loss, copies and another order | [`MemoryUdp`] | [`MemoryDatagramPeer`] |
//! | UNIX datagrams | [`MemoryUnixDatagram`] | [`MemoryDatagramPeer`] |
//! | pipes and FIFOs | [`Pipe`](crate::Pipe), on descriptors that stand for their ends | [`MemoryPipe`] |
//! | children | [`adopt_process`](crate::Transports::adopt_process) | [`MemoryProcess`] |
//!
//! Bytes, datagrams and descriptors travel by the rules of Linux.

use std::fmt::Debug;

use bowline_protocol::{Address, UnixAddress};

mod children;
mod datagrams;
mod kernel;
mod listener;
mod packets;
mod peer;
mod pipes;
mod ports;
mod pump;
mod random;
mod simulation;
mod socket;
mod stand_in;

pub use self::children::{ChildPipe, MemoryProcess};
pub use self::datagrams::{MemoryDatagramSender, MemoryDatagrams};
pub use self::kernel::{Delivery, KernelSettings, SimulatedKernel, SocketId};
pub use self::listener::{MemoryListen, MemoryListener};
pub use self::packets::{
    MemoryPacketConnect, MemoryPacketListen, MemoryPacketListener, MemoryPacketPeer,
    MemoryPacketPort, MemoryPacketSocket, MemoryPackets, PacketRead,
};
pub use self::peer::{MemoryPeer, PeerRead};
pub use self::pipes::{FifoMode, MemoryPipe};
pub use self::ports::{
    DatagramRead, MemoryDatagramEndpoint, MemoryDatagramKind, MemoryDatagramPeer,
    MemoryDatagramSocket, MemoryUdp, MemoryUdpPort, MemoryUnixDatagram, MemoryUnixDatagramPort,
};
pub use self::pump::Pump;
pub use self::random::Random;
pub use self::simulation::{Points, ProcessId, Simulation};
pub use self::socket::{Memory, MemoryConnect, MemoryHandle, MemorySocket, MemoryStream};
pub(crate) use self::stand_in::StandIn;

/// What a descriptor stands for that was made of a socket or a listener in memory.
pub(crate) fn describe(fd: std::os::fd::BorrowedFd<'_>) -> Option<crate::SocketDescription> {
    let (kernel, id) = SimulatedKernel::unpark(fd)?;
    if let Some((family, host, _)) = kernel.names_of_port(id) {
        return Some(crate::SocketDescription {
            address: host.or_else(|| {
                (family == kernel::PortFamily::Unix).then(|| UnixAddress::Unnamed.into())
            }),
            is_stream: false,
            is_packets: false,
            is_listening: false,
        });
    }
    let name = kernel.name_of(id);
    if name.is_none() && kernel.shape_of(id).is_none() {
        // An end of a pipe, or a process.
        return None;
    }
    let is_listening = name.is_some();
    let address = name.map_or(UnixAddress::Unnamed, |name| {
        UnixAddress::Abstract(name.into_bytes())
    });
    let is_packets = kernel.shape_of(id) == Some(kernel::Shape::Packets);
    Some(crate::SocketDescription {
        address: Some(Address::Unix(address)),
        is_stream: !is_packets,
        is_packets,
        is_listening,
    })
}

/// After how many turns it is given up: what does not come to rest within these never
/// will.
const MOST_TURNS: usize = 1_000_000;

/// Has `it` make turns until one says that nothing is left to do.
#[track_caller]
fn run_to_rest<T: Debug>(it: &mut T, turn: fn(&mut T) -> bool) {
    for _ in 0..MOST_TURNS {
        if !turn(it) {
            return;
        }
    }
    panic!("not at rest after {MOST_TURNS} turns: {it:?}");
}

#[cfg(test)]
mod tests;
