//! Where the processes of a program find each other: a UNIX socket in its directory, or
//! what stands for one.

use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::rc::Rc;

use bowline_protocol::{ListenerHandle, UnixAddress};
use bowline_reactor::Reactor;
use bowline_transport::{Transports, Unix, effective_user};

use super::predecessor::Predecessor;
use super::settings::RestartSettings;
use super::successor::Finder;

/// The name of the control socket, as a file and among the listeners.
pub(super) const CONTROL: &str = "control";

/// Where a process listens for its successor, and looks for its predecessor.
pub(crate) trait MeetingPlace {
    /// Makes sure that nobody else can be found there.
    fn prepare(&self, settings: &RestartSettings) -> io::Result<()>;

    /// Looks for a predecessor; the finder is told of it.
    fn connect(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        finder: Finder,
    ) -> io::Result<()>;

    /// Listens for successors. One of several who do so at once succeeds.
    fn listen(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        predecessor: &Rc<Predecessor>,
    ) -> io::Result<ListenerHandle>;

    /// Goes on listening for successors where the predecessor did.
    fn adopt(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        predecessor: &Rc<Predecessor>,
        fd: OwnedFd,
    ) -> io::Result<ListenerHandle>;
}

impl fmt::Debug for dyn MeetingPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MeetingPlace")
    }
}

/// A UNIX socket in the directory, which is made.
pub(super) struct InDirectory;

impl MeetingPlace for InDirectory {
    fn prepare(&self, settings: &RestartSettings) -> io::Result<()> {
        private_directory(&settings.directory)
    }

    fn connect(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        finder: Finder,
    ) -> io::Result<()> {
        let there = Unix::to(UnixAddress::Path(settings.control_path()));
        reactor.connect(there.timeout(settings.answer), finder)?;
        Ok(())
    }

    fn listen(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        predecessor: &Rc<Predecessor>,
    ) -> io::Result<ListenerHandle> {
        let here = Unix::at(settings.control_path()).mode(0o600);
        Ok(reactor.listen(here, predecessor.factory())?)
    }

    fn adopt(
        &self,
        reactor: &mut Reactor,
        _: &RestartSettings,
        predecessor: &Rc<Predecessor>,
        fd: OwnedFd,
    ) -> io::Result<ListenerHandle> {
        Ok(reactor.listen(Unix::listening(fd), predecessor.factory())?)
    }
}

/// Makes the directory with mode 0700, or checks that it is one like that.
fn private_directory(path: &Path) -> io::Result<()> {
    let name = path.display();
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{name}: {error}"));
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result.map_err(named)?,
    }
    let found = fs::symlink_metadata(path).map_err(named)?;
    if !found.is_dir() || found.uid() != effective_user() || found.mode() & 0o077 != 0 {
        let why = "the directory of the control socket has to be ours and ours alone";
        let denied = io::Error::new(io::ErrorKind::PermissionDenied, why);
        return Err(named(denied));
    }
    Ok(())
}
