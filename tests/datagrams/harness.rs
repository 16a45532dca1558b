//! A protocol that notes what it is told, and a socket of each kind with a plain one at
//! the other end.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as StdUnixAddress, UnixDatagram as StdUnixDatagram};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bowline::{
    Address, AtDrain, CloseReason, Context, Credentials, Datagram, DatagramHandle,
    DatagramProtocol, DatagramTransport, Reactor, Transports, Udp, UdpHandle, UdpTransport,
    UnixAddress, UnixDatagram, UnixDatagramHandle, UnixDatagramTransport, UnsentDatagram,
};
use tempfile::TempDir;

use crate::support::DescriptorLedger;

/// What one protocol was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) started: usize,
    pub(crate) received: Vec<Received>,
    pub(crate) refused: Vec<ErrorKind>,
    pub(crate) failed: Vec<(Vec<u8>, Option<Address>, io::Error, usize)>,
    pub(crate) resumed: usize,
    pub(crate) draining: usize,
    pub(crate) stopped: Vec<String>,
    /// Its callbacks, in order.
    pub(crate) calls: Vec<&'static str>,
}

#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) data: Vec<u8>,
    pub(crate) from: Address,
    pub(crate) length: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) lost_descriptors: bool,
    pub(crate) credentials: Option<Credentials>,
    pub(crate) pidfd: Option<OwnedFd>,
}

/// The notes of a protocol, which outlive it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Rc<RefCell<Told>>);

impl Notes {
    pub(crate) fn told<R>(&self, look: impl FnOnce(&Told) -> R) -> R {
        look(&self.0.borrow())
    }

    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut Told) -> R) -> R {
        change(&mut self.0.borrow_mut())
    }

    /// The bytes of all datagrams.
    pub(crate) fn data(&self) -> Vec<Vec<u8>> {
        self.told(|told| told.received.iter().map(|it| it.data.clone()).collect())
    }

    pub(crate) fn count(&self) -> usize {
        self.told(|told| told.received.len())
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.told(|told| !told.stopped.is_empty())
    }

    fn call(&self, name: &'static str) {
        self.change(|told| told.calls.push(name));
    }
}

type OnDatagram = Box<dyn FnMut(&mut dyn DatagramTransport, &mut Reactor, &mut Datagram<'_>)>;
type OnCall = Box<dyn FnMut(&mut dyn DatagramTransport, &mut Reactor)>;

/// Notes what it is told, and does what a test wants in its callbacks.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) notes: Notes,
    on_datagram: Option<OnDatagram>,
    on_start: Option<OnCall>,
    on_room: Option<OnCall>,
    on_stop: Option<OnCall>,
    leaves_descriptors: bool,
    is_busy: Rc<std::cell::Cell<bool>>,
    at_drain: Option<AtDrain>,
}

impl Script {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Answers each datagram with itself.
    pub(crate) fn echo() -> Self {
        Self::new().on_datagram(|transport, _, datagram| {
            transport.send_to(datagram.data, datagram.from);
        })
    }

    pub(crate) fn notes(&self) -> Notes {
        self.notes.clone()
    }

    pub(crate) fn on_datagram(
        mut self,
        call: impl FnMut(&mut dyn DatagramTransport, &mut Reactor, &mut Datagram<'_>) + 'static,
    ) -> Self {
        self.on_datagram = Some(Box::new(call));
        self
    }

    pub(crate) fn on_start(
        mut self,
        call: impl FnMut(&mut dyn DatagramTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.on_start = Some(Box::new(call));
        self
    }

    pub(crate) fn on_room(
        mut self,
        call: impl FnMut(&mut dyn DatagramTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.on_room = Some(Box::new(call));
        self
    }

    pub(crate) fn on_stop(
        mut self,
        call: impl FnMut(&mut dyn DatagramTransport, &mut Reactor) + 'static,
    ) -> Self {
        self.on_stop = Some(Box::new(call));
        self
    }

    pub(crate) fn leave_descriptors(mut self) -> Self {
        self.leaves_descriptors = true;
        self
    }

    /// Is not idle for as long as the answer holds true.
    pub(crate) fn busy(mut self, is_busy: &Rc<std::cell::Cell<bool>>) -> Self {
        self.is_busy = Rc::clone(is_busy);
        self
    }

    pub(crate) fn at_drain(mut self, answer: AtDrain) -> Self {
        self.at_drain = Some(answer);
        self
    }
}

impl<T: DatagramTransport> DatagramProtocol<T> for Script {
    fn started(&mut self, cx: &mut Context<'_, T>) {
        self.notes.change(|told| told.started += 1);
        self.notes.call("started");
        if let Some(call) = &mut self.on_start {
            call(cx.transport.as_dyn(), cx.reactor);
        }
    }

    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        self.notes.call("datagram");
        let descriptors = match self.leaves_descriptors {
            true => Vec::new(),
            false => datagram.descriptors.by_ref().collect(),
        };
        let received = Received {
            data: datagram.data.to_vec(),
            from: datagram.from.to_address(),
            length: datagram.length,
            descriptors,
            lost_descriptors: datagram.lost_descriptors,
            credentials: datagram.credentials,
            pidfd: datagram.pidfd.take(),
        };
        assert_eq!(
            datagram.is_truncated(),
            received.length > received.data.len()
        );
        self.notes.change(|told| told.received.push(received));
        if let Some(call) = &mut self.on_datagram {
            call(cx.transport.as_dyn(), cx.reactor, datagram);
        }
    }

    fn connection_refused(&mut self, _: &mut Context<'_, T>, error: &io::Error) {
        self.notes.call("refused");
        self.notes.change(|told| told.refused.push(error.kind()));
    }

    fn send_failed(
        &mut self,
        _: &mut Context<'_, T>,
        datagram: UnsentDatagram<'_>,
        error: &io::Error,
    ) {
        self.notes.call("failed");
        let error = match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => error.kind().into(),
        };
        let failed = (
            datagram.data.to_vec(),
            datagram.to.map(|to| to.to_address()),
            error,
            datagram.descriptors.len(),
        );
        self.notes.change(|told| told.failed.push(failed));
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.notes.call("resumed");
        self.notes.change(|told| told.resumed += 1);
        if let Some(call) = &mut self.on_room {
            call(cx.transport.as_dyn(), cx.reactor);
        }
    }

    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        self.notes.change(|told| told.draining += 1);
        self.at_drain.unwrap_or(AtDrain::LoseWhenIdle)
    }

    fn is_idle(&self) -> bool {
        !self.is_busy.get()
    }

    fn stopped(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.notes.call("stopped");
        self.notes
            .change(|told| told.stopped.push(reason.to_string()));
        if let Some(call) = &mut self.on_stop {
            call(cx.transport.as_dyn(), cx.reactor);
        }
    }
}

/// The kinds of datagram sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    UdpV4,
    UdpV6,
    UnixPath,
    UnixAbstract,
}

pub(crate) const KINDS: [Kind; 4] = [Kind::UdpV4, Kind::UdpV6, Kind::UnixPath, Kind::UnixAbstract];

/// A plain socket, under the control of a test.
#[derive(Debug)]
pub(crate) enum Plain {
    Udp(UdpSocket),
    Unix(StdUnixDatagram),
}

/// Where plain sockets and ours are.
pub(crate) struct Place {
    pub(crate) kind: Kind,
    directory: TempDir,
    used: std::cell::Cell<usize>,
    /// Last: what a test makes is gone before it.
    _ledger: Option<DescriptorLedger>,
}

static NAMES: AtomicUsize = AtomicUsize::new(0);

impl Kind {
    pub(crate) fn is_udp(self) -> bool {
        matches!(self, Self::UdpV4 | Self::UdpV6)
    }

    /// For one test, which leaves as many descriptors open as there were before.
    pub(crate) fn place(self) -> Place {
        let ledger = DescriptorLedger::open();
        Place {
            _ledger: Some(ledger),
            ..self.place_beside()
        }
    }

    /// Beside another.
    pub(crate) fn place_beside(self) -> Place {
        Place {
            kind: self,
            directory: tempfile::tempdir().unwrap(),
            used: std::cell::Cell::new(0),
            _ledger: None,
        }
    }
}

impl Place {
    /// An address that nobody has yet.
    pub(crate) fn address(&self) -> Address {
        let number = self.used.get();
        self.used.set(number + 1);
        match self.kind {
            Kind::UdpV4 => Address::Inet(([127, 0, 0, 1], 0).into()),
            Kind::UdpV6 => Address::Inet("[::1]:0".parse().unwrap()),
            Kind::UnixPath => {
                let path = self.directory.path().join(number.to_string());
                Address::Unix(UnixAddress::Path(path))
            }
            Kind::UnixAbstract => {
                let number = NAMES.fetch_add(1, Ordering::Relaxed);
                let name = format!("bowline-{}-{number}", std::process::id());
                Address::Unix(UnixAddress::Abstract(name.into_bytes()))
            }
        }
    }

    /// Listens with a protocol; answers the socket's name.
    pub(crate) fn listen(
        &self,
        reactor: &mut Reactor,
        protocol: Script,
    ) -> (DatagramHandle, Address) {
        let handle = self.listen_at(reactor, &self.address(), protocol).unwrap();
        let address = reactor.get(handle).unwrap().host();
        (handle, address)
    }

    pub(crate) fn listen_at(
        &self,
        reactor: &mut Reactor,
        address: &Address,
        protocol: Script,
    ) -> Result<DatagramHandle, bowline::error::ListenError> {
        match address {
            Address::Inet(address) => {
                let handle = reactor.listen(Udp::at(*address), protocol)?;
                Ok(of_udp(reactor, handle))
            }
            Address::Unix(address) => {
                let handle = reactor.listen(UnixDatagram::at(address.clone()), protocol)?;
                Ok(of_unix(reactor, handle))
            }
            _ => unreachable!("there are no others"),
        }
    }

    /// Connects to an address, from one of its own.
    pub(crate) fn connect(
        &self,
        reactor: &mut Reactor,
        peer: &Address,
        protocol: Script,
    ) -> Result<DatagramHandle, bowline::error::ListenError> {
        match (peer, self.address()) {
            (Address::Inet(peer), _) => {
                let handle = reactor.connect(Udp::to(*peer), protocol)?;
                Ok(of_udp(reactor, handle))
            }
            (Address::Unix(peer), Address::Unix(own)) => {
                let endpoint = UnixDatagram::to(peer.clone()).bind_address(own);
                let handle = reactor.connect(endpoint, protocol)?;
                Ok(of_unix(reactor, handle))
            }
            _ => unreachable!("there are no others"),
        }
    }

    /// A plain socket with an address.
    pub(crate) fn plain(&self) -> Plain {
        match self.address() {
            Address::Inet(address) => Plain::Udp(UdpSocket::bind(address).unwrap()),
            Address::Unix(address) => {
                Plain::Unix(StdUnixDatagram::bind_addr(&std_address(&address)).unwrap())
            }
            _ => unreachable!("there are no others"),
        }
    }
}

pub(crate) fn of_udp(reactor: &mut Reactor, handle: UdpHandle) -> DatagramHandle {
    reactor.get(handle).unwrap().handle()
}

pub(crate) fn of_unix(reactor: &mut Reactor, handle: UnixDatagramHandle) -> DatagramHandle {
    reactor.get(handle).unwrap().handle()
}

pub(crate) fn std_address(address: &UnixAddress) -> StdUnixAddress {
    match address {
        UnixAddress::Path(path) => StdUnixAddress::from_pathname(path).unwrap(),
        UnixAddress::Abstract(name) => StdUnixAddress::from_abstract_name(name).unwrap(),
        UnixAddress::Unnamed => unreachable!("nothing can be sent there"),
    }
}

pub(crate) fn own_address(address: &StdUnixAddress) -> UnixAddress {
    if let Some(path) = address.as_pathname() {
        UnixAddress::Path(path.to_owned())
    } else if let Some(name) = address.as_abstract_name() {
        UnixAddress::Abstract(name.to_owned())
    } else {
        UnixAddress::Unnamed
    }
}

impl Plain {
    pub(crate) fn address(&self) -> Address {
        match self {
            Self::Udp(socket) => socket.local_addr().unwrap().into(),
            Self::Unix(socket) => own_address(&socket.local_addr().unwrap()).into(),
        }
    }

    #[track_caller]
    pub(crate) fn send(&self, data: &[u8], to: &Address) {
        let sent = match (self, to) {
            (Self::Udp(socket), Address::Inet(to)) => socket.send_to(data, to),
            (Self::Unix(socket), Address::Unix(to)) => socket.send_to_addr(data, &std_address(to)),
            _ => unreachable!("of another family"),
        };
        assert_eq!(sent.unwrap(), data.len());
    }

    /// What waits, if anything does, with its sender.
    pub(crate) fn try_receive(&self) -> Option<(Vec<u8>, Address)> {
        let mut data = vec![0; 70_000];
        let (length, from) = match self {
            Self::Udp(socket) => {
                socket.set_nonblocking(true).unwrap();
                let (length, from) = received(socket.recv_from(&mut data))?;
                (length, Address::Inet(from))
            }
            Self::Unix(socket) => {
                socket.set_nonblocking(true).unwrap();
                let (length, from) = received(socket.recv_from(&mut data))?;
                (length, Address::Unix(own_address(&from)))
            }
        };
        data.truncate(length);
        Some((data, from))
    }

    /// All that waits.
    pub(crate) fn receive_all(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.try_receive())
            .map(|it| it.0)
            .collect()
    }

    pub(crate) fn connect(&self, peer: &Address) {
        match (self, peer) {
            (Self::Udp(socket), Address::Inet(peer)) => socket.connect(peer).unwrap(),
            (Self::Unix(socket), Address::Unix(peer)) => {
                socket.connect_addr(&std_address(peer)).unwrap();
            }
            _ => unreachable!("of another family"),
        }
    }
}

impl AsFd for Plain {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Udp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

fn received<A>(result: io::Result<(usize, A)>) -> Option<(usize, A)> {
    match result {
        Ok(received) => Some(received),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

/// Runs a test over each kind.
#[allow(
    clippy::print_stderr,
    reason = "a failure has to say of which kind it is"
)]
pub(crate) fn over_all(test: impl Fn(Place)) {
    for kind in KINDS {
        eprintln!("over {kind:?}");
        test(kind.place());
    }
}

/// A port of UDP at which nobody listens.
pub(crate) fn dead_port() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap()
}

#[track_caller]
pub(crate) fn get(reactor: &mut Reactor, handle: DatagramHandle) -> &mut dyn DatagramTransport {
    reactor.get(handle).expect("it is open")
}

/// The views of both kinds, so that traits are used where a test needs no others.
pub(crate) fn udp_options(reactor: &mut Reactor, handle: UdpHandle) -> &mut dyn UdpTransport {
    reactor.get(handle).expect("it is open")
}

pub(crate) fn unix_options(
    reactor: &mut Reactor,
    handle: UnixDatagramHandle,
) -> &mut dyn UnixDatagramTransport {
    reactor.get(handle).expect("it is open")
}
