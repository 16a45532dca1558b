//! The transports of [bowline]. The reactor drives them, and they feed protocols.
//!
//! [`Transports`] adds listening, connecting, adopting, detaching and child processes
//! to the [`Reactor`](bowline_reactor::Reactor). [`FileDescriptor`] is the base trait
//! of transports, [`Stream`] is the plain transport, and [`SendmsgMixin`] is the layer
//! that passes descriptors. Most programs depend on the facade crate `bowline`, and
//! never name this one.
//!
//! # Features
//!
//! - `testing`: connections in memory, for the tests of protocols, in the module
//!   `testing`.
//!
//! [bowline]: https://docs.rs/bowline

#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[macro_use]
mod transport_impl;

#[macro_use]
mod stream;
#[macro_use]
mod sendmsg;

mod child;
mod closer;
mod connection;
mod connector;
mod datagram;
mod descriptor_queue;
mod detach;
pub mod endpoint;
mod error;
mod establish;
mod event_counter;
mod file_descriptor;
#[cfg(feature = "inspect")]
mod kind_counts;
mod kinds;
mod layer_state;
mod link;
mod listener;
mod listener_group;
mod log;
#[cfg(feature = "inspect")]
mod operation;
mod process;
mod resolver;
mod sealed_memory;
mod shared;
#[cfg(not(feature = "testing"))]
mod stand_in;
mod sys;
mod terminal;
#[cfg(feature = "testing")]
pub mod testing;
mod transports;
mod wanted;
mod write_buffer;

/// For the fuzz targets, which are built with `--cfg fuzzing`. No public API.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    /// Walks `bytes` as the control messages of a read.
    pub fn walk_control(bytes: &[u8]) {
        crate::sys::fuzz_control(bytes);
    }
}

#[cfg(not(feature = "testing"))]
use crate::stand_in::StandIn;
#[cfg(feature = "testing")]
use crate::testing::StandIn;

pub use crate::child::{
    ChildCommand, ChildProcess, ChildWatch, CollectOutput, Pidfd, ProcessOutput, ProcessSettings,
    RunningChild, SpawnError, SpawnStep,
};
pub use crate::closer::{close_all, close_received, descriptors_closing};
pub use crate::datagram::{
    AfterSendError, Arrivals, DatagramSocket, Outgoing, OutgoingDatagram, PacketSocket, Port,
};
pub use crate::descriptor_queue::UnsentDescriptors;
pub use crate::detach::{Detached, ReattachError, Unsent};
pub use crate::error::{
    AdoptError, AdoptErrorKind, CallError, DetachError, ListenError, ListenStep,
};
pub use crate::event_counter::EventCounter;
pub use crate::file_descriptor::{
    DescriptorSocket, FileDescriptor, PassDescriptors, Received, ReceivedLimits, Socket,
};
#[cfg(feature = "inspect")]
pub use crate::kind_counts::{KindCounts, Tally};
pub use crate::kinds::*;
pub use crate::layer_state::{LayerState, Stays};
pub use crate::link::Link;
pub use crate::listener_group::ListenerGroup;
#[cfg(feature = "inspect")]
pub use crate::operation::{OperateError, Operation};
pub use crate::process::{
    SocketDescription, describe_socket, effective_user, exit_descriptor, is_passing_shortage,
    is_stream_connection, monotonic_microseconds, own_pidfd_inode, remove_environment,
    send_datagram, spawn_with_descriptors, spawn_with_listen_fds, take_granted,
};
pub use crate::resolver::{Answer, Lookup, Resolver, SystemResolver};
pub use crate::sealed_memory::{SealedMemory, SealedMemoryError, SealedMemoryErrorKind};
pub use crate::sendmsg::SendmsgMixin;
pub use crate::shared::{DescriptorCounts, ReadBuffers, TransportBudgets};
pub use crate::stream::{Stream, StreamTransport};
pub use crate::sys::take_inherited;
pub use crate::terminal::{set_terminal_size, terminal_size};
pub use crate::transports::Transports;
pub use crate::wanted::{
    DescriptorKind, DescriptorsOfKind, WrongDescriptor, is_hung_up, is_same_open_file,
};
