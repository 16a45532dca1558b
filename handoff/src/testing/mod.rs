//! What a simulated kernel replaces here: the sockets of channels, and those that notices
//! are sent by.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use bowline_protocol::{ListenerHandle, Protocol, UnixTransportHandle};
use bowline_reactor::{Reactor, Token};
use bowline_transport::testing::{
    MemoryDatagramSender, MemoryListener, MemorySocket, MemoryStream, SimulatedKernel,
};

use crate::channel::ChannelSocket;
use crate::restart::RestartSettings;
use crate::restart::control::MeetingPlace;
use crate::restart::predecessor::Predecessor;
use crate::restart::successor::Finder;
use crate::systemd::Notifier;
use crate::systemd::way::Way;

impl ChannelSocket for MemorySocket {
    type Transport = MemoryStream;
    type Error = io::Error;

    fn adopt(
        self,
        reactor: &mut Reactor,
        protocol: impl Protocol<MemoryStream>,
    ) -> io::Result<UnixTransportHandle> {
        Ok(Self::adopt(self, reactor, protocol)?.unix_transport())
    }
}

impl Notifier {
    /// Makes a notifier for a manager on a simulated kernel, which
    /// [receives](SimulatedKernel::datagrams) under a name. Feature `testing`.
    pub fn simulated(kernel: &SimulatedKernel, name: &str) -> Self {
        Self::over(kernel.datagram_sender(name))
    }
}

impl Way for MemoryDatagramSender {
    fn send(&self, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        Self::send(self, text, descriptors)
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        Self::watch(self, reactor, token)
    }

    fn unwatch(&self, _: &mut Reactor) {
        Self::unwatch(self);
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl RestartSettings {
    /// Makes the default settings for processes on a simulated kernel. They find each other
    /// under the name of the directory, which is not created. The program's listeners are
    /// on the simulated kernel too. Feature `testing`.
    pub fn simulated(directory: impl Into<PathBuf>, kernel: &SimulatedKernel) -> Self {
        let mut settings = Self::new(directory);
        settings.control = Rc::new(OnKernel(kernel.clone()));
        settings
    }
}

struct OnKernel(SimulatedKernel);

fn name(settings: &RestartSettings) -> String {
    settings.control_path().to_string_lossy().into_owned()
}

impl MeetingPlace for OnKernel {
    fn prepare(&self, _: &RestartSettings) -> io::Result<()> {
        Ok(())
    }

    fn connect(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        finder: Finder,
    ) -> io::Result<()> {
        match self.0.connect(&name(settings)) {
            Ok(socket) => drop(socket.adopt(reactor, finder.channel())?),
            Err(_) => finder.found_nobody(reactor),
        }
        Ok(())
    }

    fn listen(
        &self,
        reactor: &mut Reactor,
        settings: &RestartSettings,
        predecessor: &Rc<Predecessor>,
    ) -> io::Result<ListenerHandle> {
        let listener = self.0.listen(&name(settings))?;
        listener.serve(reactor, predecessor.factory())
    }

    fn adopt(
        &self,
        reactor: &mut Reactor,
        _: &RestartSettings,
        predecessor: &Rc<Predecessor>,
        fd: OwnedFd,
    ) -> io::Result<ListenerHandle> {
        let listener = MemoryListener::from_descriptor(fd);
        let listener = listener.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        listener.serve(reactor, predecessor.factory())
    }
}
