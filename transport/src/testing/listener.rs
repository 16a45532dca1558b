//! The simulated listener, under the real one.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use bowline_protocol::{Acceptor, Factory, ListenerHandle};
use bowline_reactor::{Interest, Reactor, Token};

use super::kernel::{Holder, SimulatedKernel, SocketId};
use super::socket::{MemorySocket, MemoryStream};
use crate::listener::{self, HandOver, Serve};

/// A listening socket of a [`SimulatedKernel`], made by
/// [`listen`](SimulatedKernel::listen). Dropping it closes it, and when nobody
/// holds a copy, whoever waits to be accepted sees the end.
///
/// Several processes may hold it and accept from it, as they share a real one:
/// each connection is accepted once.
///
/// # Examples
///
/// ```
/// use bowline_protocol::{Address, Context, Protocol, Transport};
/// use bowline_transport::testing::{MemoryPeer, Simulation};
///
/// struct Echo;
///
/// impl<T: Transport> Protocol<T> for Echo {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
///         cx.transport.write(data);
///     }
/// }
///
/// let mut simulation = Simulation::new(7);
/// let server = simulation.spawn()?;
/// let listener = simulation.kernel().listen("echo")?;
/// let reactor = simulation.reactor(server).expect("it lives");
/// listener.serve(reactor, |_: &Address| Echo)?;
///
/// let client = MemoryPeer::new(simulation.kernel().connect("echo")?);
/// client.send(b"first")?;
/// simulation.run();
/// assert_eq!(client.take().bytes, b"first");
///
/// simulation.kill(server);
/// assert!(simulation.kernel().connect("echo").is_err());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct MemoryListener {
    kernel: SimulatedKernel,
    id: SocketId,
    holder: Holder,
}

impl MemoryListener {
    pub(super) fn new(kernel: SimulatedKernel, id: SocketId) -> Self {
        let holder = kernel.hold(id);
        Self { kernel, id, holder }
    }

    /// Serves whoever connects with the protocols of a factory, in a reactor,
    /// which belongs to the kernel of this listener from then on.
    ///
    /// # Errors
    ///
    /// As [`MemorySocket::adopt`]. The listener is closed.
    pub fn serve(
        self,
        reactor: &mut Reactor,
        factory: impl Factory<MemoryStream>,
    ) -> io::Result<ListenerHandle> {
        listener::install_simulated(reactor, self, Serve::<MemoryStream, _>::new(factory))
    }

    /// Gives whoever connects to an acceptor, as descriptors of which
    /// [`MemorySocket::from_descriptor`] makes sockets.
    ///
    /// # Errors
    ///
    /// As [`serve`](Self::serve).
    pub fn hand_over(
        self,
        reactor: &mut Reactor,
        acceptor: impl Acceptor,
    ) -> io::Result<ListenerHandle> {
        listener::install_simulated(reactor, self, HandOver { acceptor })
    }

    /// Makes it a descriptor, to be passed like any other; as
    /// [`MemorySocket::into_descriptor`].
    ///
    /// # Errors
    ///
    /// `EMFILE`: this takes two descriptors. The listener is closed then.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        self.duplicate()
    }

    /// The listener that a descriptor stands for, as
    /// [`MemorySocket::from_descriptor`].
    ///
    /// # Errors
    ///
    /// Gives back a descriptor that stands for none of this thread's.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if kernel.name_of(id).is_some() => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }

    /// The name under which it listens.
    pub fn name(&self) -> String {
        // It is open as long as we hold it.
        self.kernel.name_of(self.id).unwrap_or_default()
    }

    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        let accepted: MemorySocket = self.kernel.accept(self.id, self.holder)?;
        accepted.into_descriptor()
    }

    pub(crate) fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        let place = (self.id, self.holder);
        self.kernel.watch(place, reactor, token, Interest::Readable)
    }

    pub(crate) fn unwatch(&self) {
        self.kernel.unwatch(self.id, self.holder);
    }
}

impl Drop for MemoryListener {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}
