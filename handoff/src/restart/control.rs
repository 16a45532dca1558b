//! Where the processes of a program find each other: a UNIX socket in its
//! directory, or a listener of a simulated kernel.

use std::io;
use std::os::fd::OwnedFd;

use bowline_protocol::{ListenerHandle, UnixAddress};
use bowline_reactor::Reactor;
#[cfg(feature = "testing")]
use bowline_transport::testing::MemoryListener;
use bowline_transport::{Transports, Unix};

use super::successor::Finder;
use super::{Restart, predecessor, private_directory};

/// Looks for a predecessor; the finder is told of it.
pub(super) fn connect(reactor: &mut Reactor, restart: &Restart, finder: Finder) -> io::Result<()> {
    #[cfg(feature = "testing")]
    if let Some(kernel) = &restart.shared.settings.kernel {
        match kernel.connect(&simulated_name(restart)) {
            Ok(socket) => drop(socket.adopt(reactor, finder.channel())?),
            Err(_) => finder.found_nobody(reactor),
        }
        return Ok(());
    }
    let there = Unix::to(UnixAddress::Path(restart.control_path()));
    reactor.connect(there.timeout(restart.shared.settings.answer), finder)?;
    Ok(())
}

/// Listens for successors. One of several who do so at once succeeds.
pub(super) fn listen(reactor: &mut Reactor, restart: &Restart) -> io::Result<ListenerHandle> {
    #[cfg(feature = "testing")]
    if let Some(kernel) = &restart.shared.settings.kernel {
        let listener = kernel.listen(&simulated_name(restart))?;
        return listener.serve(reactor, predecessor::factory(restart));
    }
    let here = Unix::at(restart.control_path()).mode(0o600);
    Ok(reactor.listen(here, predecessor::factory(restart))?)
}

/// Goes on listening for successors where the predecessor did.
pub(super) fn adopt(
    reactor: &mut Reactor,
    restart: &Restart,
    fd: OwnedFd,
) -> io::Result<ListenerHandle> {
    #[cfg(feature = "testing")]
    if restart.shared.settings.kernel.is_some() {
        let listener = MemoryListener::from_descriptor(fd);
        let listener = listener.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        return listener.serve(reactor, predecessor::factory(restart));
    }
    Ok(reactor.listen(Unix::listening(fd), predecessor::factory(restart))?)
}

/// Makes sure that nobody else can be found there.
pub(super) fn prepare(settings: &super::RestartSettings) -> io::Result<()> {
    #[cfg(feature = "testing")]
    if settings.kernel.is_some() {
        return Ok(());
    }
    private_directory(&settings.directory)
}

#[cfg(feature = "testing")]
fn simulated_name(restart: &Restart) -> String {
    restart.control_path().to_string_lossy().into_owned()
}
