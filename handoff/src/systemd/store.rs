//! Descriptors that are kept for a service while it does not run.

use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};

use bowline_transport::{close_received, is_hung_up, is_same_open_file};

use super::notice::{Notice, check_name};
use crate::inherited::Inherited;
use crate::log;

/// The name that systemd gives to descriptors that come without one.
const UNNAMED: &str = "stored";

/// A bounded store of the descriptors that a manager keeps for one service, by name.
/// systemd has one with `FileDescriptorStoreMax=`.
///
/// Several descriptors may have the same name. A descriptor that is kept already, under any
/// name, is not kept twice. A descriptor whose other end has closed is useless and is
/// closed, unless it came with `FDPOLL=0`
/// ([`store_without_polling`](super::Notice::store_without_polling)). Each method that
/// stores or takes descriptors looks for those. At other times,
/// [`remove_hung_up`](Self::remove_hung_up) does.
///
/// # Examples
///
/// ```
/// use bowline::handoff::systemd::{DescriptorStore, Notice};
///
/// let mut store = DescriptorStore::new(16);
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let applied = store.apply(&Notice::new().store("web")?, vec![listener.into()]);
/// assert_eq!((applied.stored, store.len()), (1, 1));
///
/// // When the service is started again.
/// assert_eq!(store.take("web").len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DescriptorStore {
    most: usize,
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    name: String,
    fd: OwnedFd,
    /// Whether it is closed when its other end closes.
    is_polled: bool,
}

/// What a notice has done to a [`DescriptorStore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// How many descriptors are kept now that were not kept before.
    pub stored: usize,
    /// How many were to be kept and were closed: there was no room, or the name is not
    /// valid.
    pub refused: usize,
    /// How many were kept and are now closed: they were to be removed, or their other end
    /// has closed.
    pub removed: usize,
    /// How many were to be kept and were closed, since they are kept already.
    pub duplicates: usize,
    /// How many came with a notice that does not say what they are for, and were closed.
    pub unclaimed: usize,
}

impl DescriptorStore {
    /// Makes a store for at most `most` descriptors. 0 keeps none.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            kept: Vec::new(),
        }
    }

    /// Does what a notice says about descriptors (`FDSTORE`, `FDNAME`, `FDPOLL`,
    /// `FDSTOREREMOVE`). `descriptors` came with it. Those that are not kept are closed, in
    /// a way that never blocks the loop.
    pub fn apply(&mut self, notice: &Notice, descriptors: Vec<OwnedFd>) -> Applied {
        let mut applied = Applied {
            removed: self.remove_hung_up(),
            ..Applied::default()
        };
        let name = notice.get("FDNAME");
        if notice.says_yes("FDSTOREREMOVE") {
            applied.removed += name.map_or(0, |name| self.remove(name));
        }
        if !notice.says_yes("FDSTORE") {
            applied.unclaimed = descriptors.len();
            descriptors.into_iter().for_each(close_received);
            return applied;
        }
        let name = name.unwrap_or(UNNAMED);
        let is_name = check_name(name).is_ok();
        let is_polled = notice.get("FDPOLL") != Some("0");
        for fd in descriptors {
            if self.has(&fd) {
                close_received(fd);
                applied.duplicates += 1;
            } else if is_name && self.kept.len() < self.most {
                let name = name.to_owned();
                self.kept.push(Kept {
                    name,
                    fd,
                    is_polled,
                });
                applied.stored += 1;
            } else {
                close_received(fd);
                applied.refused += 1;
            }
        }
        if applied.refused > 0 {
            log::debug!(
                target: log::HANDOFF,
                "{} descriptors to be kept as {name:?} were closed: {} of {} are kept",
                applied.refused,
                self.kept.len(),
                self.most,
            );
        }
        applied
    }

    fn has(&self, fd: &OwnedFd) -> bool {
        let is_it = |kept: &Kept| is_same_open_file(kept.fd.as_fd(), fd.as_fd());
        self.kept.iter().any(is_it)
    }

    /// Closes the descriptors with this name. Returns how many.
    pub fn remove(&mut self, name: &str) -> usize {
        self.remove_if(|kept| kept.name == name)
    }

    /// Closes the descriptors whose other end has closed, or that are broken, except those
    /// that came with `FDPOLL=0`. Returns how many. It takes one system call for each kept
    /// descriptor.
    pub fn remove_hung_up(&mut self) -> usize {
        self.remove_if(|kept| kept.is_polled && is_hung_up(kept.fd.as_fd()))
    }

    fn remove_if(&mut self, is_to_go: impl FnMut(&Kept) -> bool) -> usize {
        let (removed, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.kept)
            .into_iter()
            .partition(is_to_go);
        self.kept = kept;
        let count = removed.len();
        removed.into_iter().for_each(|kept| close_received(kept.fd));
        count
    }

    /// Takes out the descriptors with this name, in the order in which they came.
    pub fn take(&mut self, name: &str) -> Vec<OwnedFd> {
        self.remove_hung_up();
        let (taken, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.kept)
            .into_iter()
            .partition(|kept| kept.name == name);
        self.kept = kept;
        taken.into_iter().map(|kept| kept.fd).collect()
    }

    /// Takes out all descriptors, for a caller that [starts the service
    /// again](bowline_transport::spawn_with_listen_fds).
    pub fn take_all(&mut self) -> Vec<(String, OwnedFd)> {
        self.remove_hung_up();
        let kept = std::mem::take(&mut self.kept).into_iter();
        kept.map(|kept| (kept.name, kept.fd)).collect()
    }

    /// Returns the name of each kept descriptor, in the order in which they came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kept.iter().map(|kept| kept.name.as_str())
    }

    /// Returns how many descriptors are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether no descriptor is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

impl From<DescriptorStore> for Inherited {
    fn from(mut store: DescriptorStore) -> Self {
        let mut inherited = Self::new();
        for (name, fd) in store.take_all() {
            inherited.add(name, fd);
        }
        inherited
    }
}

impl Drop for DescriptorStore {
    fn drop(&mut self) {
        // They came from a service.
        self.remove_if(|_| true);
    }
}

impl fmt::Debug for DescriptorStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DescriptorStore")
            .field("most", &self.most)
            .field("kept", &self.kept)
            .finish()
    }
}
