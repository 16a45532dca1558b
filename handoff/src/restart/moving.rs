//! Live connections that move to a successor.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::rc::{Rc, Weak};

use bowline_protocol::PassedDescriptor;
use bowline_reactor::{Handle, Reactor, Token};
use bowline_transport::endpoint::{SocketTransport, TransportFor};
use bowline_transport::{
    DetachError, Detached, LayerState, Stays, Transports, Unsent, UnsentDescriptors,
    describe_socket,
};

use super::messages::{LayerRecord, Record};
use crate::log;
use crate::wire::MAX_DESCRIPTORS;

/// The most connections in one batch. A connection is not served from when it is detached
/// here until it is adopted there, so a batch is small.
const BATCH_CONNECTIONS: usize = 64;

/// The most bytes in one batch that holds more than one connection.
const BATCH_BYTES: usize = 1 << 20;

/// A protocol whose connections can move to a successor in the middle of their life.
///
/// To move a connection, it is taken apart. What the kernel holds for it moves with the
/// socket. Unsent bytes are taken along automatically, each queued descriptor with the
/// bytes it belongs to. The *protocol* has to say itself what it holds:
/// [`pack`](Self::pack).
///
/// This is the same for streams and for packets. A connection of packets stays if it was
/// paused in the middle of what one read has brought, or if it is half closed.
pub trait Movable: Sized + 'static {
    /// The name of this kind of connection. The successor gets it in
    /// [`Program::connection_moved`](super::Program::connection_moved).
    const KIND: &'static str;

    /// Returns what another process needs to go on from exactly here. With `None`, this
    /// connection stays until it ends.
    ///
    /// Called when the connection is detached. Bytes that were received and not used are
    /// [`Packed::unread`]. Descriptors that the protocol holds for the connection move as
    /// [`Packed::descriptors`]. It is better to keep a connection here if it is half
    /// closed.
    fn pack(&mut self) -> Option<Packed>;

    /// The successor did not take the connection, and this protocol goes on with it. What
    /// was packed comes back, above all its descriptors. Once the connection is whole
    /// again, the protocol is told that its transport has another handle
    /// ([`connection_reattached`](bowline_protocol::Protocol::connection_reattached)).
    fn unpack(&mut self, packed: Packed);
}

/// What a protocol passes on when its connection moves.
#[derive(Debug, Default)]
pub struct Packed {
    /// Its state, in a form that the successor's version of the program understands. If
    /// versions differ too much, change [`format`](super::RestartSettings::format).
    pub state: Vec<u8>,
    /// Bytes that were received and not used. Over there, give them to
    /// [`push_back`](bowline_protocol::Transport::push_back) when the connection is made,
    /// for example.
    pub unread: Vec<u8>,
    /// Descriptors that the protocol holds.
    pub descriptors: Vec<OwnedFd>,
}

/// A connection that has moved here.
#[derive(Debug)]
#[non_exhaustive]
pub struct Moved {
    /// The [`Movable::KIND`] of its protocol in the predecessor.
    pub kind: String,
    /// The socket. Give it to [`Transports::adopt`].
    pub fd: OwnedFd,
    /// What was not sent. Give it to
    /// [`with_unsent`](bowline_transport::endpoint::Adopt::with_unsent).
    pub unsent: Unsent,
    /// What its protocol in the predecessor has packed, for the protocol here.
    pub packed: Packed,
    /// The states of its layers in the predecessor, the topmost first. Layers without a
    /// state are left out. Give each to the layer of its name that is put on the socket,
    /// such as [`TlsServer::resume`]. States that are not taken are lost.
    ///
    /// [`TlsServer::resume`]: https://docs.rs/bowline-tls/latest/bowline_tls/struct.TlsServer.html#method.resume
    pub layers: Vec<LayerState>,
}

impl Moved {
    /// Encodes it for yet another process: its record, and its descriptors, the socket
    /// first.
    pub(crate) fn into_record(self) -> (Record, Vec<PassedDescriptor>) {
        let Unsent {
            bytes,
            descriptors: groups,
        } = self.unsent;
        let mut descriptors = vec![self.fd.into()];
        let mut queued = Vec::new();
        for group in groups {
            let range = group.message.map(|it| it.start as u32..it.end as u32);
            queued.push((range, group.descriptors.len() as u32));
            descriptors.extend(group.descriptors);
        }
        let held = self.packed.descriptors.len() as u32;
        descriptors.extend(self.packed.descriptors.into_iter().map(Into::into));
        let mut layers = Vec::new();
        for layer in self.layers {
            layers.push(LayerRecord {
                name: layer.name,
                state: layer.state,
                descriptors: layer.descriptors.len() as u32,
            });
            descriptors.extend(layer.descriptors.into_iter().map(Into::into));
        }
        let record = Record {
            kind: self.kind,
            state: self.packed.state,
            unread: self.packed.unread,
            unsent: bytes,
            queued,
            held,
            layers,
        };
        (record, descriptors)
    }
}

/// Keeps a connection on the list of those that move. Keep it in the connection's protocol,
/// so that it is dropped with it.
#[derive(Debug)]
#[must_use = "the connection leaves the list when it is dropped"]
pub struct MoveTicket {
    list: Weak<RefCell<MoveList>>,
    id: u64,
}

impl Drop for MoveTicket {
    fn drop(&mut self) {
        if let Some(list) = self.list.upgrade() {
            list.borrow_mut().connections.remove(&self.id);
        }
    }
}

/// A connection that was taken apart.
type DetachedPart = Detached<Box<dyn Any>>;

/// The connections that are to move.
#[derive(Default)]
pub(crate) struct MoveList {
    connections: BTreeMap<u64, Listed>,
    next: u64,
    /// How many connections were looked at and stayed, by reason.
    stayed: BTreeMap<Stays, usize>,
}

#[derive(Clone, Copy)]
struct Listed {
    token: Token,
    /// How many bytes it has not sent, if nobody has told it to close.
    unsent: fn(&mut Reactor, Token) -> Option<usize>,
    /// The type of its protocol.
    part: TypeId,
    own: fn(DetachedPart) -> Option<Box<dyn Parts>>,
}

/// A connection that was taken apart, whatever its types.
trait Parts {
    /// Returns its record, and copies of its descriptors, the socket first; or the reason
    /// why it stays.
    fn record(&mut self) -> Result<(Record, Vec<PassedDescriptor>), Stays>;

    /// Puts it together again.
    fn roll_back(self: Box<Self>, reactor: &mut Reactor) -> Option<Token>;
}

struct Apart<T, P> {
    detached: Detached<P>,
    packed: Option<Packed>,
    transport: std::marker::PhantomData<fn() -> T>,
}

impl<T: TransportFor<P>, P: Movable> Parts for Apart<T, P> {
    fn record(&mut self) -> Result<(Record, Vec<PassedDescriptor>), Stays> {
        record_of(&mut self.detached, &mut self.packed, P::KIND, P::pack)
    }

    fn roll_back(mut self: Box<Self>, reactor: &mut Reactor) -> Option<Token> {
        if let Some(packed) = self.packed.take() {
            self.detached.protocol.unpack(packed);
        }
        match reactor.reattach::<T, P>(self.detached) {
            Ok(handle) => Some(handle.into()),
            Err(error) => {
                log::error!(target: log::HANDOFF, "a connection that came back is lost: {error}");
                None
            }
        }
    }
}

/// As [`Parts::record`]. What was packed is kept, to be given back.
fn record_of<P>(
    detached: &mut Detached<P>,
    kept: &mut Option<Packed>,
    kind: &str,
    pack: impl FnOnce(&mut P) -> Option<Packed>,
) -> Result<(Record, Vec<PassedDescriptor>), Stays> {
    if detached.producer.is_some() {
        return Err(Stays::Producer);
    }
    *kept = pack(&mut detached.protocol);
    let Some(packed) = kept else {
        return Err(Stays::Protocol);
    };
    let refused = |error: io::Error| {
        log::warn!(target: log::HANDOFF, "a connection cannot be given away now: {error}");
        Stays::System
    };
    let mut record = Record {
        kind: kind.to_owned(),
        state: packed.state.clone(),
        // What the transport was given back comes behind what the protocol
        // has kept.
        unread: [packed.unread.as_slice(), &detached.unread].concat(),
        unsent: detached.unsent.clone(),
        ..Record::default()
    };
    let mut descriptors = copies(detached, packed, &mut record).map_err(refused)?;
    // Last, so that nothing can fail behind it: a cipher lets go of its keys.
    for layer in detached.pack()? {
        record.layers.push(LayerRecord {
            name: layer.name,
            state: layer.state,
            descriptors: layer.descriptors.len() as u32,
        });
        descriptors.extend(layer.descriptors.into_iter().map(PassedDescriptor::from));
    }
    Ok((record, descriptors))
}

/// Copies a connection's descriptors, except those of its layers.
fn copies<P>(
    detached: &Detached<P>,
    packed: &Packed,
    record: &mut Record,
) -> io::Result<Vec<PassedDescriptor>> {
    let mut descriptors = vec![PassedDescriptor::from(detached.fd.try_clone()?)];
    for group in &detached.descriptors {
        let range = group.message.clone();
        let range = range.map(|range| range.start as u32..range.end as u32);
        let count = group.descriptors.len() as u32;
        record.queued.push((range, count));
        for descriptor in &group.descriptors {
            descriptors.push(descriptor.as_fd().try_clone_to_owned()?.into());
        }
    }
    for descriptor in &packed.descriptors {
        descriptors.push(descriptor.try_clone()?.into());
    }
    record.held = packed.descriptors.len() as u32;
    Ok(descriptors)
}

impl MoveList {
    /// Puts a connection on the list.
    pub(crate) fn add<T: TransportFor<P>, P: Movable>(
        list: &Rc<RefCell<Self>>,
        token: Token,
    ) -> MoveTicket {
        let mut this = list.borrow_mut();
        let id = this.next;
        this.next += 1;
        let listed = Listed {
            token,
            unsent: unsent::<T>,
            part: TypeId::of::<P>(),
            own: own::<T, P>,
        };
        this.connections.insert(id, listed);
        MoveTicket {
            list: Rc::downgrade(list),
            id,
        }
    }

    fn note(&mut self, reason: Stays) {
        *self.stayed.entry(reason).or_default() += 1;
    }

    /// Returns how many connections were looked at and stayed, by reason.
    pub(crate) fn stayed(&self) -> BTreeMap<Stays, usize> {
        self.stayed.clone()
    }

    /// Returns how many connections are on the list.
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Returns the number after the last connection on the list.
    pub(crate) fn end(&self) -> u64 {
        self.next
    }

    /// Returns the first connections in `range`, at most a batch of them.
    fn next_batch(&self, range: Range<u64>) -> Vec<(u64, Listed)> {
        self.connections
            .range(range.start..range.end.max(range.start))
            .take(BATCH_CONNECTIONS)
            .map(|(id, listed)| (*id, *listed))
            .collect()
    }
}

fn unsent<T: SocketTransport>(reactor: &mut Reactor, token: Token) -> Option<usize> {
    let handle = Handle::<T>::new(token, |facet| facet.downcast_mut());
    reactor.get(handle)?.unsent_while_open()
}

/// What was detached, as what it is.
fn own<T: TransportFor<P>, P: Movable>(detached: DetachedPart) -> Option<Box<dyn Parts>> {
    Some(Box::new(Apart::<T, P> {
        detached: detached.downcast().ok()?,
        packed: None,
        transport: std::marker::PhantomData,
    }))
}

/// A batch on its way, and how to undo it.
#[derive(Default)]
pub(crate) struct Batch {
    connections: Vec<(u64, Box<dyn Parts>)>,
}

/// The contents of a batch.
#[derive(Debug, Default)]
pub(crate) struct Packet {
    pub(crate) records: Vec<Record>,
    pub(crate) descriptors: Vec<PassedDescriptor>,
}

impl Batch {
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Splits it into one packet for each connection.
    pub(crate) fn split(self) -> impl Iterator<Item = Self> {
        self.connections.into_iter().map(|one| Self {
            connections: vec![one],
        })
    }

    /// Detaches the first connections in `range`. Gives `then` the batch, and the last
    /// connection that was looked at; `None` if there are none.
    ///
    /// Connections that do not want to move, or do not fit, go on where they are.
    pub(crate) fn collect(
        reactor: &mut Reactor,
        list: &Rc<RefCell<MoveList>>,
        range: Range<u64>,
        max_bytes: usize,
        then: impl FnOnce(&mut Reactor, Option<(Self, Packet, u64)>) + 'static,
    ) {
        let candidates = list.borrow().next_batch(range);
        if candidates.is_empty() {
            reactor.defer(|reactor| then(reactor, None));
            return;
        }
        let mut last = 0;
        let mut bytes = 0;
        let mut taken = Vec::new();
        for (id, listed) in candidates {
            last = id;
            // Those that are closing have said what they want.
            let Some(unsent) = (listed.unsent)(reactor, listed.token) else {
                list.borrow_mut().note(Stays::Closing);
                continue;
            };
            bytes += unsent;
            if bytes > BATCH_BYTES && !taken.is_empty() {
                last = id - 1;
                break;
            }
            taken.push((id, listed));
        }
        let parts = taken.iter().map(|(_, it)| (it.token, it.part));
        let parts: Vec<_> = parts.collect();
        let list = Rc::clone(list);
        reactor.detach_all(parts, move |reactor, detached| {
            let taken = taken.into_iter().zip(detached);
            let apart = taken
                .filter_map(|((id, listed), detached)| match detached {
                    Ok(detached) => Some((id, (listed.own)(detached)?)),
                    Err(DetachError::WrongProtocol) => {
                        log::error!(target: log::HANDOFF, "a connection was listed with another type than it has");
                        None
                    }
                    Err(DetachError::NotDetachable) => {
                        list.borrow_mut().note(Stays::Layer);
                        None
                    }
                    Err(_) => None,
                })
                .collect();
            let (batch, packet, seen) = Self::pack(reactor, &list, apart, last, max_bytes);
            then(reactor, Some((batch, packet, seen)));
        });
    }

    /// Packs as many connections as fit. The rest go on where they are, and are looked at
    /// again. Returns the last connection that needs no second look.
    fn pack(
        reactor: &mut Reactor,
        list: &Rc<RefCell<MoveList>>,
        apart: Vec<(u64, Box<dyn Parts>)>,
        last: u64,
        max_bytes: usize,
    ) -> (Self, Packet, u64) {
        let mut batch = Self::default();
        let mut packet = Packet::default();
        let mut bytes = 0;
        let mut seen = last;
        let mut is_full = false;
        for (id, mut parts) in apart {
            if is_full {
                Self::return_one(reactor, list, id, parts);
                continue;
            }
            let (record, descriptors) = match parts.record() {
                Ok(packed) => packed,
                Err(reason) => {
                    log::debug!(target: log::HANDOFF, "a connection stays here: {reason}");
                    list.borrow_mut().note(reason);
                    Self::return_one(reactor, list, id, parts);
                    continue;
                }
            };
            let size = record.size();
            if size > max_bytes || record.descriptors() > MAX_DESCRIPTORS {
                log::warn!(
                    target: log::HANDOFF,
                    "a connection stays here: {size} bytes and {} descriptors are too many for one message",
                    record.descriptors()
                );
                list.borrow_mut().note(Stays::TooLarge);
                Self::return_one(reactor, list, id, parts);
                continue;
            }
            let limit = BATCH_BYTES.min(max_bytes);
            if !packet.records.is_empty()
                && (bytes + size > limit
                    || packet.descriptors.len() + descriptors.len() > MAX_DESCRIPTORS)
            {
                is_full = true;
                seen = id - 1;
                Self::return_one(reactor, list, id, parts);
                continue;
            }
            bytes += size;
            packet.records.push(record);
            packet.descriptors.extend(descriptors);
            batch.connections.push((id, parts));
        }
        (batch, packet, seen)
    }

    fn return_one(
        reactor: &mut Reactor,
        list: &Rc<RefCell<MoveList>>,
        id: u64,
        parts: Box<dyn Parts>,
    ) {
        if let Some(token) = parts.roll_back(reactor)
            && let Some(listed) = list.borrow_mut().connections.get_mut(&id)
        {
            listed.token = token;
        }
    }

    /// Puts the connections at these places together again. The others stay on their way.
    pub(crate) fn return_refused(
        &mut self,
        reactor: &mut Reactor,
        list: &Rc<RefCell<MoveList>>,
        refused: &[u32],
    ) {
        let all = std::mem::take(&mut self.connections);
        for (at, (id, parts)) in all.into_iter().enumerate() {
            if refused.contains(&(at as u32)) {
                list.borrow_mut().note(Stays::Refused);
                Self::return_one(reactor, list, id, parts);
            } else {
                self.connections.push((id, parts));
            }
        }
    }

    /// Puts all of them together again.
    pub(crate) fn roll_back(self, reactor: &mut Reactor, list: &Rc<RefCell<MoveList>>) {
        for (id, parts) in self.connections {
            Self::return_one(reactor, list, id, parts);
        }
    }
}

/// Returns the descriptor if it can be a connection: a socket of streams or packets, a
/// pipe, a terminal, a file. The program would have to lose any other, since the
/// predecessor has let go of it by then.
fn may_be_connection(fd: OwnedFd) -> Option<OwnedFd> {
    if let Ok(socket) = describe_socket(fd.as_fd()) {
        let has_connections = socket.is_stream || socket.is_packets;
        return (has_connections && !socket.is_listening).then_some(fd);
    }
    let file = File::from(fd);
    let kind = file.metadata().ok()?.file_type();
    let is_any = kind.is_fifo() || kind.is_char_device() || kind.is_file();
    is_any.then(|| file.into())
}

/// Returns the connections of a batch that has arrived. `None` is a connection that is
/// refused: it is not wanted, or has a descriptor that no connection has.
pub(crate) fn unpack(
    records: Vec<Record>,
    descriptors: Vec<OwnedFd>,
    is_wanted: impl Fn(&Moved) -> bool,
) -> Vec<Option<Moved>> {
    let mut descriptors = descriptors.into_iter();
    let mut take = move |count: usize| -> Option<Vec<OwnedFd>> {
        let taken: Vec<_> = descriptors.by_ref().take(count).collect();
        (taken.len() == count).then_some(taken)
    };
    records
        .into_iter()
        .map(|record| {
            // All of them are taken, so that the next has its own.
            let mut socket = take(1)?;
            let mut groups = Vec::new();
            for (range, count) in &record.queued {
                let range = range.clone();
                let range = range.map(|range| range.start as usize..range.end as usize);
                let group = take(*count as usize)?.into_iter().map(Into::into);
                groups.push(UnsentDescriptors::new(range, group.collect()));
            }
            let held = take(record.held as usize)?;
            let mut layers = Vec::new();
            for layer in record.layers {
                let descriptors = take(layer.descriptors as usize)?;
                layers.push(LayerState {
                    name: layer.name,
                    state: layer.state,
                    descriptors,
                });
            }
            let fd = may_be_connection(socket.pop()?)?;
            let moved = Moved {
                kind: record.kind,
                fd,
                unsent: Unsent {
                    bytes: record.unsent,
                    descriptors: groups,
                },
                packed: Packed {
                    state: record.state,
                    unread: record.unread,
                    descriptors: held,
                },
                layers,
            };
            is_wanted(&moved).then_some(moved)
        })
        .collect()
}
