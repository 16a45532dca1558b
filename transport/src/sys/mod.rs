//! The system calls of the transports. Only the code here may use `unsafe`, and only the
//! code here names `libc`.
//!
//! What a backend provides; all of it is for Linux:
//! - [`recv`], [`send`], [`send_vectored`]: bytes;
//! - [`receive`] and [`send_with_descriptors`]: bytes with ancillary data, in a
//!   [`ControlBuffer`] and an [`Ancillary`];
//! - [`MessageBatch`], [`send_messages`]: several messages in one call;
//! - [`stream_socket`], [`bind`], [`listen`], [`connect`], [`accept`], and the rest of
//!   `socket`: sockets, their names and their options;
//! - `file`: pipes, terminals and regular files;
//! - [`spawn`], [`take_granted`], [`take_inherited`]: what is passed over exec, and
//!   [`CleanStart`]: how a child begins. [`Launch`]: children that are not forked;
//! - `pidfd`: processes by their descriptors, and `terminal`.
//!
//! Rules that hold for every function, so that callers need not think of them:
//! - A descriptor comes in as `BorrowedFd` and goes out as `OwnedFd`, which is made in the
//!   statement after the kernel has returned it. No number is ever returned.
//! - A call that a signal interrupts (`EINTR`) is made again.
//! - Sending never raises SIGPIPE.
//! - No call blocks, except [`read`] and [`write`] on files that may block. Sockets made
//!   here are non-blocking and close-on-exec from the start. The calls that move bytes
//!   still ask not to block each time: the flag belongs to the open file description, so
//!   another process that holds the same socket can clear it at any moment. (accept4(2) has
//!   no such flag; see [`accept_shared`].)
//! - The pointer and the length of memory that the kernel reads or writes come from one
//!   slice.

mod address;
mod cmsg;
mod datagram;
mod errno;
pub(crate) mod file;
#[cfg(test)]
mod fork_tests;
mod image;
mod launch;
mod memory;
mod msg;
mod number;
mod packet;
mod path;
mod pidfd;
mod process;
#[cfg(feature = "testing")]
pub(crate) mod simulated;
mod socket;
mod start;
mod terminal;
#[cfg(test)]
pub(crate) mod tests;

use std::io;

pub(crate) use self::address::{INET4_BYTES, NameRef, SocketName, inet4_name};
#[cfg(fuzzing)]
pub(crate) use self::cmsg::fuzz as fuzz_control;
pub(crate) use self::cmsg::{ControlBuffer, Credentials, MAX_DESCRIPTORS};
pub(crate) use self::datagram::{
    Beside, Interface4, MOST_MESSAGES, MessageBatch, OutgoingMessage, SendBatch, broadcast,
    datagram_socket, dropped, has_segmentation, is_datagram, multicast_hops, multicast_loopback,
    send_messages, send_one, set_broadcast, set_membership4, set_membership6, set_multicast_hops,
    set_multicast_interface4, set_multicast_interface6, set_multicast_loopback,
    set_receive_offload,
};
pub(crate) use self::errno::{
    is_not_a_socket, is_not_listening, is_of_a_path, is_of_an_identity, is_of_one_connection,
    is_of_segmentation, is_out_of_descriptors, is_out_of_memory, is_transient,
};
pub(crate) use self::image::{Image, own_pidfd_inode};
pub(crate) use self::launch::{Group, Launch, Launched};
pub(crate) use self::memory::{Mapping, event_counter, is_sealed, memory_file, seal};
pub(crate) use self::msg::{
    Ancillary, receive, recv, send, send_message, send_vectored, send_with_descriptors,
};
pub(crate) use self::number::{close_all, descriptor_limit, lowest_free, reaches};
pub(crate) use self::packet::{has_stamps, is_packets, is_read_closed, packet_socket, set_stamps};
pub(crate) use self::path::{FileIdentity, hold_socket_file, set_file_mode, socket_file};
pub(crate) use self::pidfd::{
    Recipient, child_wait, is_no_process, pid_of, pidfd_open, pidfd_send_signal, pidfd_wait,
    send_signal,
};
pub use self::process::take_inherited;
pub(crate) use self::process::{
    effective_user, exit_descriptor, monotonic_microseconds, remove_environment, spawn,
    spawn_announced, take_granted,
};
pub(crate) use self::socket::{
    Connecting, Family, SocketKind, accept_from, accept_queue, bind, bytes_unread, connect, cookie,
    copy_listener_options, disarm_linger, has_waiting, is_hung_up, is_listening, is_stream,
    is_unix, keep_alive, listen, local_name, no_delay, passes_rights, peer_credentials, peer_name,
    peer_pidfd, send_buffer_size, set_close_on_exec, set_keep_alive, set_keep_alive_times,
    set_linger, set_mode, set_no_delay, set_nonblocking, set_pass_credentials, set_pass_pidfd,
    set_pass_rights, set_receive_buffer_size, set_reuse_address, set_reuse_port,
    set_send_buffer_size, set_v6_only, shutdown, socket_kind, steer_group, stream_socket,
    take_error,
};
pub(crate) use self::start::{CleanStart, Reached};
pub(crate) use self::terminal::{open_terminal, set_window_size, window_size};
#[cfg(test)]
pub(crate) use self::{
    address::MAX_NAME_BYTES,
    cmsg::{CONTROL_BUFFER_BYTES, ControlMessage, walk},
    msg::ReceivedMessage,
    socket::{bytes_unsent, linger, receive_buffer_size, unpassable},
};

/// Makes a call that returns a byte count. Makes it again if a signal interrupts it.
#[inline(always)]
fn retry_count(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        // Only -1 is negative, and that is the failure.
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        if let Some(error) = failure() {
            return Err(error);
        }
    }
}

/// What the last call failed with, or nothing if a signal interrupted it.
#[cold]
fn failure() -> Option<io::Error> {
    let error = io::Error::last_os_error();
    (error.raw_os_error() != Some(libc::EINTR)).then_some(error)
}

/// Makes a call that returns zero or a descriptor number. Makes it again if a signal
/// interrupts it.
#[inline]
fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        let answer = call();
        if answer >= 0 {
            return Ok(answer);
        }
        if let Some(error) = failure() {
            return Err(error);
        }
    }
}
