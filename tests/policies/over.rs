//! One connection in memory, of a stream or of packets, for what holds for both.

use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use bowline::layers::StreamTransport as _;
use bowline::testing::{
    MemoryPacketPeer, MemoryPacketPort, MemoryPackets, MemoryPeer, MemoryStream, Pump,
    SimulatedKernel,
};
use bowline::{
    AnyConnection, ConnectionHandle, Detached, PacketHandle, PacketProtocol, Protocol, QueueLimits,
    TransportHandle, Transports,
};

/// What is sent over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Stream,
    Packets,
}

/// Calls a test for connections of each kind.
pub(crate) fn over_both(test: impl Fn(Kind)) {
    for kind in [Kind::Stream, Kind::Packets] {
        let result = catch_unwind(AssertUnwindSafe(|| test(kind)));
        assert!(result.is_ok(), "it failed over {kind:?}");
    }
}

/// A protocol over both.
pub(crate) trait Both: Protocol<MemoryStream> + PacketProtocol<MemoryPacketPort> {}

impl<P: Protocol<MemoryStream> + PacketProtocol<MemoryPacketPort>> Both for P {}

/// The other end of a connection.
pub(crate) enum Peer {
    Stream(MemoryPeer),
    Packets(MemoryPacketPeer),
    Gone,
}

impl Peer {
    /// Closes it, as the death of a process does.
    pub(crate) fn close(&mut self) {
        *self = Self::Gone;
    }

    /// Sends the bytes, as one packet where there are packets.
    pub(crate) fn send(&self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stream(peer) => peer.send(data),
            Self::Packets(peer) => peer.send(data).map(|()| data.len()),
            Self::Gone => panic!("the peer is gone"),
        }
    }

    /// The bytes of everything that is there.
    pub(crate) fn take(&self) -> Vec<u8> {
        match self {
            Self::Stream(peer) => peer.take().bytes,
            Self::Packets(peer) => {
                let next = || peer.receive().ok().flatten();
                std::iter::from_fn(next).flat_map(|it| it.bytes).collect()
            }
            Self::Gone => panic!("the peer is gone"),
        }
    }

    pub(crate) fn is_at_end(&self) -> bool {
        match self {
            Self::Stream(peer) => peer.is_at_end(),
            Self::Packets(peer) => peer.receive().is_ok_and(|it| it.is_none()),
            Self::Gone => panic!("the peer is gone"),
        }
    }
}

/// The name of a connection, by its kind.
#[derive(Clone, Copy)]
enum Named {
    Stream(TransportHandle),
    Packets(PacketHandle),
}

/// A connection with its protocol in a pump, and its peer.
pub(crate) struct Stage {
    pub(crate) pump: Pump,
    pub(crate) peer: Peer,
    named: Named,
}

impl Stage {
    /// The connection is made when this returns.
    pub(crate) fn new(kind: Kind, protocol: impl Both) -> Self {
        let pump = Pump::with_kernel(SimulatedKernel::new()).unwrap();
        Self::within(pump, kind, protocol)
    }

    /// The same, in a pump that there is.
    pub(crate) fn within(mut pump: Pump, kind: Kind, protocol: impl Both) -> Self {
        let (named, peer) = connect(&mut pump, kind, protocol);
        pump.run();
        Self { pump, peer, named }
    }

    pub(crate) fn connection(&mut self) -> &mut dyn AnyConnection {
        match self.named {
            Named::Stream(handle) => self.pump.reactor().get(handle).expect("it is open"),
            Named::Packets(handle) => self.pump.reactor().get(handle).expect("it is open"),
        }
    }

    pub(crate) fn handle(&mut self) -> ConnectionHandle {
        self.connection().connection_handle()
    }

    /// Writes what others would, in packets of at most 10,000 bytes where there are some.
    pub(crate) fn write(&mut self, data: &[u8]) {
        let reactor = self.pump.reactor();
        match self.named {
            Named::Stream(handle) => {
                reactor.get(handle).expect("it is open").write(data);
            }
            Named::Packets(handle) => {
                let packets = reactor.get(handle).expect("it is open");
                let any = QueueLimits::default()
                    .most(usize::MAX)
                    .most_bytes(usize::MAX);
                packets.set_queue_limits(any);
                for piece in data.chunks(10_000) {
                    assert!(packets.send(piece).is_taken());
                }
            }
        }
    }

    pub(crate) fn is_lost(&mut self) -> bool {
        let token = match self.named {
            Named::Stream(handle) => handle.token(),
            Named::Packets(handle) => handle.token(),
        };
        !self.pump.reactor().is_registered(token)
    }

    pub(crate) fn timers(&mut self) -> usize {
        crate::timers(&mut self.pump)
    }

    /// Takes the connection apart, lets `between` pass, and puts it together again.
    #[track_caller]
    pub(crate) fn take_apart<P: Both>(&mut self, between: impl FnOnce(&mut Pump)) {
        let detached: Rc<RefCell<Option<Detached<P>>>> = Rc::default();
        let taken = Rc::clone(&detached);
        let handle = self.handle();
        self.pump.reactor().detach::<P>(handle, move |_, result| {
            *taken.borrow_mut() = result.ok();
        });
        self.pump.run();
        between(&mut self.pump);
        let detached = detached.take().expect("it was open");
        let reactor = self.pump.reactor();
        self.named = match self.named {
            Named::Stream(_) => {
                let again = reactor.reattach::<MemoryStream, P>(detached);
                let token = again.expect("it is whole").token();
                Named::Stream(MemoryStream::transport_named(token))
            }
            Named::Packets(_) => {
                let again = reactor.reattach::<MemoryPacketPort, P>(detached);
                Named::Packets(again.expect("it is whole"))
            }
        };
        self.pump.run();
    }
}

/// One more connection in a pump.
fn connect(pump: &mut Pump, kind: Kind, protocol: impl Both) -> (Named, Peer) {
    match kind {
        Kind::Stream => {
            let (transport, peer) = pump.connect(protocol).unwrap();
            let handle = crate::name(pump, transport);
            (Named::Stream(handle), Peer::Stream(peer))
        }
        Kind::Packets => {
            let (ours, theirs) = pump.kernel().pair_of_packets();
            let reactor = pump.reactor();
            let handle = reactor.adopt(MemoryPackets, ours, protocol).unwrap();
            let peer = MemoryPacketPeer::new(theirs);
            (Named::Packets(handle), Peer::Packets(peer))
        }
    }
}

/// The first connection is a stage's. The others are only a peer.
pub(crate) fn another(
    stage: &mut Stage,
    kind: Kind,
    protocol: impl Both,
) -> (ConnectionHandle, Peer) {
    let (named, peer) = connect(&mut stage.pump, kind, protocol);
    let reactor = stage.pump.reactor();
    let handle = match named {
        Named::Stream(handle) => reactor.get(handle).unwrap().connection_handle(),
        Named::Packets(handle) => reactor.get(handle).unwrap().connection_handle(),
    };
    stage.pump.run();
    (handle, peer)
}
