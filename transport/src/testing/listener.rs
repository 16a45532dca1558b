//! The simulated listener, under the real one.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use bowline_protocol::{Acceptor, Address, Factory, ListenerHandle, Protocol, UnixAddress};
use bowline_reactor::{Interest, Reactor, Token};

use super::kernel::{Holder, Shape, SimulatedKernel, SocketId};
use super::socket::{MemorySocket, MemoryStream};
use crate::Transports;
use crate::endpoint::{Listen, ListenAt, ListeningSocket};
use crate::error::{AdoptError, AdoptErrorKind, ListenError, ListenStep};
use crate::kinds::Plain;

/// A listening socket of a [`SimulatedKernel`]. [`listen`](SimulatedKernel::listen)
/// makes it. Dropping it closes it. Once the last copy is closed, connections that wait
/// to be accepted end.
///
/// Several processes may hold it and accept from it, as they share a real one. Each
/// connection is accepted once.
///
/// # Examples
///
/// ```
/// use bowline::testing::{MemoryPeer, Simulation};
/// use bowline::{Address, Context, Protocol, Transport};
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
///
/// Feature `testing`.
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

    /// Accepts connections in a reactor and serves them with the protocols of a factory.
    /// The reactor belongs to the kernel of this listener from then on.
    ///
    /// # Errors
    ///
    /// As [`MemorySocket::adopt`]. The listener is closed.
    pub fn serve(
        self,
        reactor: &mut Reactor,
        factory: impl Factory<Protocol: Protocol<MemoryStream>>,
    ) -> io::Result<ListenerHandle> {
        reactor.listen(self, factory)
    }

    /// Accepts connections and gives them to an acceptor, as descriptors.
    /// [`MemorySocket::from_descriptor`] makes sockets of them.
    ///
    /// # Errors
    ///
    /// As [`serve`](Self::serve).
    pub fn hand_over(
        self,
        reactor: &mut Reactor,
        acceptor: impl Acceptor,
    ) -> io::Result<ListenerHandle> {
        reactor.accept(self, acceptor)
    }

    /// Makes it a descriptor that stands for it and can be passed like any other, as
    /// [`MemorySocket::into_descriptor`] does.
    ///
    /// # Errors
    ///
    /// `EMFILE`, since this takes two descriptors. The listener is closed then.
    pub fn into_descriptor(self) -> io::Result<OwnedFd> {
        self.duplicate()
    }

    /// Makes a listener of the descriptor that stands for it, as
    /// [`MemorySocket::from_descriptor`] does.
    ///
    /// # Errors
    ///
    /// Gives the descriptor back if it stands for no listener of this thread.
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match SimulatedKernel::unpark(fd.as_fd()) {
            Some((kernel, id)) if is_listener(&kernel, id) => Ok(Self::new(kernel, id)),
            _ => Err(fd),
        }
    }

    /// The name under which it listens.
    pub fn name(&self) -> String {
        // It is open as long as we hold it.
        self.kernel.name_of(self.id).unwrap_or_default()
    }
}

fn is_listener(kernel: &SimulatedKernel, id: SocketId) -> bool {
    kernel.name_of(id).is_some() && kernel.shape_of(id) == Some(Shape::Stream)
}

impl ListeningSocket for MemoryListener {
    type Accepted = MemorySocket;

    fn address(&self) -> io::Result<Address> {
        Ok(address_of(&self.name()))
    }

    fn accept(&mut self, _: bool) -> io::Result<(MemorySocket, Address)> {
        let socket = self.kernel.accept(self.id, self.holder)?;
        Ok((socket, Address::Unix(UnixAddress::Unnamed)))
    }

    fn accept_descriptor(&mut self, may_block: bool) -> io::Result<(OwnedFd, Address)> {
        let (socket, peer) = self.accept(may_block)?;
        Ok((socket.into_descriptor()?, peer))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn watch(&self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        let place = (self.id, self.holder);
        self.kernel.watch(place, reactor, token, Interest::Readable)
    }

    fn unwatch(&self, _: &mut Reactor) {
        self.kernel.unwatch(self.id, self.holder);
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.kernel.park(self.id)
    }

    fn into_descriptor(self) -> OwnedFd {
        self.duplicate()
            .expect("two descriptors are left for a listener that is detached")
    }

    fn close(self) {}
}

/// It listens already.
impl Listen for MemoryListener {
    type Socket = Self;
    type Wrap = Plain;
    type Error = io::Error;

    const SHARES_QUEUE: bool = true;

    fn open(self) -> io::Result<(Self, Plain)> {
        Ok((self, Plain))
    }

    fn not_installed(_: Self, _: Address, error: io::Error) -> io::Error {
        error
    }
}

/// Where to listen in memory. [`Memory::at`](super::Memory::at) makes it.
///
/// Feature `testing`.
#[derive(Clone, Debug)]
#[must_use = "nothing listens before it is given to `listen` or `accept`"]
pub struct MemoryListen {
    kernel: SimulatedKernel,
    name: String,
}

impl MemoryListen {
    pub(super) fn new(kernel: SimulatedKernel, name: String) -> Self {
        Self { kernel, name }
    }
}

impl Listen for MemoryListen {
    type Socket = MemoryListener;
    type Wrap = Plain;
    type Error = ListenError;

    const SHARES_QUEUE: bool = true;

    fn open(self) -> Result<(MemoryListener, Plain), ListenError> {
        match self.kernel.listen(&self.name) {
            Ok(listener) => Ok((listener, Plain)),
            Err(error) => Err(ListenError {
                address: address_of(&self.name),
                step: ListenStep::Bind,
                error,
            }),
        }
    }

    fn not_installed(_: MemoryListener, address: Address, error: io::Error) -> ListenError {
        ListenError {
            address,
            step: ListenStep::Watch,
            error,
        }
    }
}

impl ListenAt for MemoryListen {
    fn address(&self) -> Address {
        address_of(&self.name)
    }

    fn take(self, fd: OwnedFd) -> Result<(MemoryListener, Plain), AdoptError> {
        match MemoryListener::from_descriptor(fd) {
            Ok(listener) => Ok((listener, Plain)),
            Err(fd) => Err(AdoptError {
                kind: AdoptErrorKind::NotListening,
                fd,
            }),
        }
    }
}

fn address_of(name: &str) -> Address {
    Address::Unix(UnixAddress::Abstract(name.as_bytes().to_vec()))
}

impl Drop for MemoryListener {
    fn drop(&mut self) {
        self.kernel.close(self.id, self.holder);
    }
}
