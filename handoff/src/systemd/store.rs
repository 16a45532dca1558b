//! Descriptors that are kept for a service, between its lives.

use std::fmt;
use std::os::fd::OwnedFd;

use bowline_transport::close_received;

use super::notice::{Notice, check_name};
use crate::inherited::Inherited;
use crate::log;

/// What systemd calls descriptors that come without a name.
const UNNAMED: &str = "stored";

/// The descriptors that a manager keeps for one service, by name and bounded, as systemd
/// does for `FileDescriptorStoreMax=`.
///
/// Several may have the same name. Unlike systemd's, it keeps those whose other end has
/// closed, and does not notice that it has one already.
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
    kept: Vec<(String, OwnedFd)>,
}

/// What a notice has done to a [`DescriptorStore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// How many descriptors are kept now that were not before.
    pub stored: usize,
    /// How many came to be kept, and were closed: beyond what is kept, or under a name that
    /// is none.
    pub refused: usize,
    /// How many were kept and are closed.
    pub removed: usize,
    /// How many came with a notice that does not say what for, and were closed.
    pub unclaimed: usize,
}

impl DescriptorStore {
    /// A store of `most` descriptors at the most. 0 keeps none.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            kept: Vec::new(),
        }
    }

    /// Does what a notice says about descriptors (`FDSTORE`, `FDNAME`, `FDSTOREREMOVE`), of
    /// which some came with it. What is not kept is closed, and never in a way that could
    /// hold up the loop.
    pub fn apply(&mut self, notice: &Notice, descriptors: Vec<OwnedFd>) -> Applied {
        let mut applied = Applied::default();
        let name = notice.get("FDNAME");
        if notice.says_yes("FDSTOREREMOVE") {
            applied.removed = name.map_or(0, |name| self.remove(name));
        }
        if !notice.says_yes("FDSTORE") {
            applied.unclaimed = descriptors.len();
            descriptors.into_iter().for_each(close_received);
            return applied;
        }
        let name = name.unwrap_or(UNNAMED);
        let is_name = check_name(name).is_ok();
        for fd in descriptors {
            if is_name && self.kept.len() < self.most {
                self.kept.push((name.to_owned(), fd));
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

    /// Closes those of a name; answers how many.
    pub fn remove(&mut self, name: &str) -> usize {
        let removed = self.take(name);
        let count = removed.len();
        removed.into_iter().for_each(close_received);
        count
    }

    /// Takes those of a name out, in the order in which they came.
    pub fn take(&mut self, name: &str) -> Vec<OwnedFd> {
        let (taken, kept) = std::mem::take(&mut self.kept)
            .into_iter()
            .partition(|(found, _)| found == name);
        self.kept = kept;
        let taken: Vec<(String, OwnedFd)> = taken;
        taken.into_iter().map(|(_, fd)| fd).collect()
    }

    /// Takes all out, for who [starts the service
    /// again](bowline_transport::spawn_with_listen_fds).
    pub fn take_all(&mut self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.kept)
    }

    /// The name of each that is kept, in the order in which they came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kept.iter().map(|(name, _)| name.as_str())
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is.
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
        for (_, fd) in self.take_all() {
            // It came from a service.
            close_received(fd);
        }
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
