//! The objects that exist; pure.

use std::collections::HashMap;

use super::DISPLAY;
use super::interfaces::{Interface, Signature, WL_DISPLAY};

/// The first number of a server's objects; below it are the client's.
const FIRST_OF_SERVER: u32 = 0xff00_0000;

/// How many objects a peer may have created and not destroyed. libwayland does not limit a
/// client.
pub(super) const MAX_OBJECTS: usize = 1 << 20;

/// Which end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

/// The objects of a connection.
#[derive(Debug)]
pub(super) struct Objects {
    pub(super) end: End,
    known: HashMap<u32, Object>,
    next: u32,
    /// Numbers of ours that can be used again.
    free: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Object {
    interface: &'static Interface,
    /// We have destroyed it, and the peer may not know yet. Its messages are parsed, for
    /// their descriptors, and dropped.
    is_gone: bool,
}

impl Objects {
    pub(super) fn new(end: End) -> Self {
        let display = Object {
            interface: &WL_DISPLAY,
            is_gone: false,
        };
        Self {
            end,
            known: HashMap::from([(DISPLAY, display)]),
            next: match end {
                End::Client => DISPLAY + 1,
                End::Server => FIRST_OF_SERVER,
            },
            free: Vec::new(),
        }
    }

    /// Returns the interface of an object, and whether the program has destroyed it.
    pub(super) fn get(&self, id: u32) -> Option<(&'static Interface, bool)> {
        let object = self.known.get(&id)?;
        Some((object.interface, object.is_gone))
    }

    pub(super) fn new_id(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Whether this end uses this number.
    fn is_ours(&self, id: u32) -> bool {
        (id >= FIRST_OF_SERVER) == (self.end == End::Server)
    }

    /// Adds an object that the peer has created. It must use a number of the peer.
    pub(super) fn made_by_peer(&mut self, id: u32, interface: &'static Interface) -> bool {
        !self.is_ours(id) && self.add(id, interface)
    }

    /// Adds an object. Returns whether its number was free and there was room.
    pub(super) fn add(&mut self, id: u32, interface: &'static Interface) -> bool {
        let is_new = id != 0 && !self.known.contains_key(&id) && self.known.len() < MAX_OBJECTS;
        if is_new {
            let is_gone = false;
            self.known.insert(id, Object { interface, is_gone });
        }
        is_new
    }

    /// Notes that an object is gone: the peer has said so, or we have. Returns whether
    /// `wl_display.delete_id` has to return its number.
    pub(super) fn destroyed(&mut self, id: u32) -> bool {
        match (self.end, self.is_ours(id)) {
            // The client gives its number again when it hears that.
            (End::Server, false) => self.known.remove(&id).is_some(),
            (End::Client, true) => {
                if let Some(object) = self.known.get_mut(&id) {
                    object.is_gone = true;
                }
                false
            }
            (_, is_ours) => {
                if self.known.remove(&id).is_some() && is_ours {
                    self.free.push(id);
                }
                false
            }
        }
    }

    /// Notes that the server knows that an object is gone.
    pub(super) fn deleted(&mut self, id: u32) {
        if self.known.remove(&id).is_some() && self.is_ours(id) {
            self.free.push(id);
        }
    }

    /// Returns the messages of an interface that this end receives.
    pub(super) fn received(&self, interface: &'static Interface) -> &'static [Signature] {
        match self.end {
            End::Client => interface.events,
            End::Server => interface.requests,
        }
    }

    pub(super) fn sent(&self, interface: &'static Interface) -> &'static [Signature] {
        match self.end {
            End::Client => interface.requests,
            End::Server => interface.events,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wayland::interfaces::{WL_SHM, WL_SURFACE};

    #[test]
    fn number_is_given_again_when_the_server_has_said_that_it_is_free() {
        let mut client = Objects::new(End::Client);
        let id = client.new_id();
        assert_eq!(id, 2);
        assert!(client.add(id, &WL_SURFACE));
        assert!(!client.destroyed(id));
        assert!(client.get(id).is_some_and(|(_, is_gone)| is_gone));
        assert_eq!(client.new_id(), 3, "it may still be spoken of");
        client.deleted(id);
        assert!(client.get(id).is_none());
        assert_eq!(client.new_id(), 2);
    }

    #[test]
    fn peer_makes_only_objects_of_its_own_numbers_and_each_once() {
        let mut server = Objects::new(End::Server);
        assert!(server.made_by_peer(2, &WL_SHM));
        for id in [0, 1, 2, FIRST_OF_SERVER] {
            assert!(!server.made_by_peer(id, &WL_SHM), "{id}");
        }
        assert!(server.destroyed(2), "the client has to be told");
        assert!(!server.destroyed(2));
        assert!(server.made_by_peer(2, &WL_SHM));
        assert_eq!(server.new_id(), FIRST_OF_SERVER);
    }
}
