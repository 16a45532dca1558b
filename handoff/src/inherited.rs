//! Named descriptors that another process has given us.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use bowline_protocol::Address;
use bowline_transport::endpoint::ListenAt;
use bowline_transport::{SocketDescription, describe_socket};

use crate::log;

/// Descriptors that this process was given, by name. They come from systemd
/// ([`systemd::inherited`](crate::systemd::inherited)), from a predecessor, or from
/// another process that keeps them.
///
/// Each is claimed once, by name, and belongs to the claimer from then on. When this is
/// dropped, unclaimed ones are closed, each with a warning in the log that describes
/// it.
#[derive(Default)]
pub struct Inherited {
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    fd: OwnedFd,
}

impl Inherited {
    /// No descriptors, as in a program that was started by hand.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a descriptor under a name. Several may have the same name.
    pub fn add(&mut self, name: impl Into<String>, fd: OwnedFd) {
        let name = name.into();
        self.entries.push(Entry { name, fd });
    }

    /// Takes the first descriptor of that name, of whatever kind.
    pub fn claim(&mut self, name: &str) -> Option<OwnedFd> {
        self.claim_where(name, |_| true)
    }

    /// Takes the first listening stream socket of that name at that address.
    ///
    /// Port 0 fits every port, and an unnamed UNIX address fits every UNIX address, so
    /// that only the name matters. A socket of that name at another address stays
    /// unclaimed, and the log says so: the configuration has changed.
    pub fn claim_listener(&mut self, name: &str, address: &Address) -> Option<OwnedFd> {
        self.claim_where(name, |entry| {
            describe_socket(entry.fd.as_fd())
                .is_ok_and(|found| found.is_stream && found.is_listening && is_at(&found, address))
        })
    }

    /// Takes the first socket of that name on which an endpoint can go on.
    pub(crate) fn claim_for(&mut self, name: &str, endpoint: &impl ListenAt) -> Option<OwnedFd> {
        let place = endpoint.address();
        self.claim_where(name, |entry| {
            describe_socket(entry.fd.as_fd()).is_ok_and(|found| {
                found.is_listening && endpoint.is_like(&found) && is_at(&found, &place)
            })
        })
    }

    fn claim_where(&mut self, name: &str, fits: impl Fn(&Entry) -> bool) -> Option<OwnedFd> {
        let position = self
            .entries
            .iter()
            .position(|entry| entry.name == name && fits(entry))?;
        Some(self.entries.remove(position).fd)
    }

    /// The names of the unclaimed descriptors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.name.as_str())
    }

    /// How many descriptors are unclaimed.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no descriptor is unclaimed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Appends all descriptors of `other`.
    pub fn append(&mut self, mut other: Self) {
        self.entries.append(&mut other.entries);
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        for entry in self.entries.drain(..) {
            log::warn!(
                target: log::HANDOFF,
                "inherited descriptor {:?} ({}) was not claimed: closed",
                entry.name,
                describe(&entry.fd)
            );
        }
    }
}

impl fmt::Debug for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.entries.iter().map(|entry| (&entry.name, &entry.fd)))
            .finish()
    }
}

fn is_at(found: &SocketDescription, wanted: &Address) -> bool {
    match (&found.address, wanted) {
        (Some(Address::Inet(found)), Address::Inet(wanted)) => {
            found.ip() == wanted.ip() && (wanted.port() == 0 || found.port() == wanted.port())
        }
        (Some(Address::Unix(found)), Address::Unix(wanted)) => {
            *wanted == bowline_protocol::UnixAddress::Unnamed || found == wanted
        }
        _ => false,
    }
}

fn describe(fd: &OwnedFd) -> String {
    match describe_socket(fd.as_fd()) {
        Err(_) => "no socket".into(),
        Ok(socket) => {
            let kind = match (socket.is_stream, socket.is_listening) {
                (_, true) => "listener",
                (true, false) => "stream",
                (false, false) => "socket",
            };
            match socket.address {
                Some(address) => format!("{kind} at {address}"),
                None => kind.into(),
            }
        }
    }
}
