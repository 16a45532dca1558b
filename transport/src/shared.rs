//! The state that all transports of one reactor share.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

use bowline_reactor::{Reactor, Token};

use crate::closer::closable;
use crate::datagram::{Arrivals, SendQueue};
use crate::log;
use crate::resolver::{Resolver, SharedResolver, SystemResolver};
use crate::sys::{self, Ancillary, ControlBuffer, SendBatch};
use crate::write_buffer::{CHUNK_BYTES, Storage};

/// How much one read can take. A default UNIX socket holds three times as much. A
/// larger buffer would leave the cache.
pub(crate) const READ_BYTES: usize = 65_536;

/// The first size of a buffer of copied bytes.
const FIRST_BYTES: usize = 4_096;

/// How many unused buffers are kept beside the last one: at most 4 MiB.
const MAX_SPARE: usize = 64;

/// How many unused queues of datagrams are kept, of at most 128 KiB each.
const MAX_SPARE_QUEUES: usize = 16;

/// The defaults of [`TransportBudgets`].
const READ_BYTES_PER_TURN: usize = 4 * READ_BYTES;
const WRITES_PER_TURN: u32 = 8;
const NOTICES_PER_TURN: u32 = 64;
const ACCEPTS_PER_TURN: u32 = 100;

/// How many descriptor numbers peers leave to the program by default. It is enough for
/// a log file, a lookup, and a child with its pipes.
const RESERVE: usize = 16;

/// Accepting checks for room first once it is this close to the reserve.
const NEAR: i32 = 64 + FOR_THE_CONNECTED;

/// How many numbers listeners leave for received descriptors, if peers send any. It is
/// as many as one connection may have closed unclaimed.
const FOR_THE_CONNECTED: i32 = 64;

/// The shared state. Each reactor has one.
pub(crate) struct Shared {
    /// Taken out for a read, until its callbacks have returned. Callbacks never nest,
    /// so nobody else needs them meanwhile. They are made anew after a callback that
    /// panicked.
    buffers: Cell<Option<Box<ReadBuffers>>>,
    pub(crate) send_control: RefCell<ControlBuffer>,
    /// As `buffers`, for datagrams.
    arrivals: Cell<Option<Box<Arrivals>>>,
    pub(crate) send_batch: RefCell<SendBatch>,
    #[expect(clippy::vec_box, reason = "boxed when lent, and moved as such")]
    send_queues: RefCell<Vec<Box<SendQueue>>>,
    /// The buffer that was returned last. If connections send one after the other, the
    /// same buffer serves them all.
    last: Cell<Option<Box<Storage>>>,
    #[expect(clippy::vec_box, reason = "boxed when lent, and moved as such")]
    spare: RefCell<Vec<Box<Storage>>>,
    pub(crate) ledger: Ledger,
    #[cfg(feature = "inspect")]
    pub(crate) kinds: crate::kind_counts::Kinds,
    pub(crate) budgets: Cell<TransportBudgets>,
    /// A spare descriptor. When descriptors have run out, it is given up, to accept and
    /// close one connection.
    reserve: RefCell<Option<OwnedFd>>,
    /// Whether opening it failed the last time.
    is_reserve_missed: Cell<bool>,
    /// Finds the addresses of hosts. Made when first asked for.
    resolver: RefCell<Option<SharedResolver>>,
    pub(crate) numbers: Numbers,
    /// Connections about to be detached. Nothing may happen to them any more.
    held: RefCell<Vec<Token>>,
    /// The length of `held`, so that the usual check is a comparison.
    holds: Cell<usize>,
}

/// The buffers of a read: 64 KiB for bytes, and the descriptors that came beside them.
///
/// All connections of a reactor share them. A layer that does not deliver something now
/// has to keep it elsewhere.
#[derive(Debug)]
pub struct ReadBuffers {
    pub(crate) data: PageAligned,
    pub(crate) control: ControlBuffer,
    pub(crate) ancillary: Ancillary,
}

/// [`READ_BYTES`] bytes that start a page. Bulk reads into such a buffer are about 5 %
/// faster.
#[repr(align(4096))]
pub(crate) struct PageAligned([u8; READ_BYTES]);

impl ReadBuffers {
    /// How many bytes one read can take.
    pub const CAPACITY: usize = READ_BYTES;

    /// The bytes. Those that were read, or are to be delivered, come first.
    pub fn bytes(&mut self) -> &mut [u8; READ_BYTES] {
        &mut self.data.0
    }

    /// The descriptors that came beside the bytes, and are delivered with them. A layer
    /// that keeps the bytes back takes these out. It puts them in again when it delivers
    /// the bytes that they belong to. Only
    /// [`receive`](crate::PassDescriptors::receive) may have some here.
    pub fn descriptors(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.ancillary.descriptors
    }

    #[cold]
    fn new() -> Box<Self> {
        Box::new(Self {
            data: PageAligned([0; READ_BYTES]),
            control: ControlBuffer::new(),
            ancillary: Ancillary::new(),
        })
    }
}

impl PageAligned {
    #[inline(always)]
    pub(crate) fn get(&self, length: usize) -> &[u8] {
        &self.0[..length]
    }

    #[inline(always)]
    pub(crate) fn get_mut(&mut self, length: usize) -> &mut [u8] {
        &mut self.0[..length]
    }
}

impl fmt::Debug for PageAligned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageAligned").finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn of(reactor: &mut Reactor) -> Rc<Self> {
        reactor.extension(|| Self {
            buffers: Cell::new(None),
            send_control: RefCell::new(ControlBuffer::new()),
            arrivals: Cell::new(None),
            send_batch: RefCell::new(SendBatch::default()),
            send_queues: RefCell::new(Vec::new()),
            last: Cell::new(None),
            spare: RefCell::new(Vec::new()),
            ledger: Ledger::default(),
            #[cfg(feature = "inspect")]
            kinds: Default::default(),
            budgets: Cell::new(TransportBudgets::default()),
            held: RefCell::new(Vec::new()),
            holds: Cell::new(0),
            reserve: RefCell::new(None),
            is_reserve_missed: Cell::new(false),
            resolver: RefCell::new(None),
            numbers: Numbers::new(),
        })
    }

    /// Takes the buffers for a read. They are returned after its callbacks.
    #[inline]
    pub(crate) fn take_buffers(&self) -> Box<ReadBuffers> {
        self.buffers.take().unwrap_or_else(ReadBuffers::new)
    }

    #[inline(always)]
    pub(crate) fn return_buffers(&self, buffers: Box<ReadBuffers>) {
        // The cell is empty meanwhile, so there is nothing to drop.
        mem::forget(self.buffers.replace(Some(buffers)));
    }

    /// Takes the room for received datagrams, if it was returned.
    #[inline]
    pub(crate) fn take_arrivals(&self) -> Option<Box<Arrivals>> {
        self.arrivals.take()
    }

    #[inline]
    pub(crate) fn return_arrivals(&self, arrivals: Box<Arrivals>) {
        self.arrivals.set(Some(arrivals));
    }

    /// Takes an empty queue for datagrams to be sent.
    #[inline]
    pub(crate) fn take_send_queue(&self) -> Box<SendQueue> {
        self.send_queues.borrow_mut().pop().unwrap_or_default()
    }

    /// Takes back an empty queue.
    #[inline]
    pub(crate) fn return_send_queue(&self, queue: Box<SendQueue>) {
        let mut queues = self.send_queues.borrow_mut();
        // One large queue: whoever sends much in a turn does so again in the next.
        let is_kept =
            queue.is_small() || queue.is_kept_once() && queues.iter().all(|kept| kept.is_small());
        if queues.len() < MAX_SPARE_QUEUES && is_kept {
            queues.push(queue);
        }
    }

    /// Takes memory for bytes to be sent, if some was returned just now.
    #[inline(always)]
    pub(crate) fn take_last_storage(&self) -> Option<Box<Storage>> {
        self.last.take()
    }

    /// Takes memory for bytes to be sent.
    pub(crate) fn take_storage(&self) -> Box<Storage> {
        let last = self.take_last_storage();
        last.or_else(|| self.spare.borrow_mut().pop())
            .unwrap_or_else(|| Storage::with_capacity(FIRST_BYTES))
    }

    /// Takes back empty memory.
    #[inline(always)]
    pub(crate) fn return_storage(&self, storage: Box<Storage>) {
        if (FIRST_BYTES..=CHUNK_BYTES).contains(&storage.capacity())
            && let Some(earlier) = self.last.replace(Some(storage))
        {
            self.keep_spare(earlier);
        }
    }

    #[cold]
    fn keep_spare(&self, storage: Box<Storage>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < MAX_SPARE {
            spare.push(storage);
        }
    }

    /// Closes received descriptors that are offered to nobody.
    pub(crate) fn refuse_received(&self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let count = self.close_received(descriptors);
        Ledger::add(&self.ledger.refused, count);
    }

    /// Closes received descriptors that nobody took, and returns how many there were.
    pub(crate) fn close_received(&self, descriptors: impl IntoIterator<Item = OwnedFd>) -> usize {
        let mut count = 0;
        // The peer may have made the last close block.
        sys::close_all(descriptors.into_iter().filter_map(|fd| {
            count += 1;
            closable(fd)
        }));
        Ledger::add(&self.ledger.unclaimed, count);
        count
    }

    /// Leaves the connection `token` as it is, until [`release`](Self::release) is
    /// called as often.
    pub(crate) fn hold(&self, token: Token) {
        let mut held = self.held.borrow_mut();
        held.push(token);
        self.holds.set(held.len());
    }

    pub(crate) fn release(&self, token: Token) {
        let mut held = self.held.borrow_mut();
        if let Some(place) = held.iter().position(|it| *it == token) {
            held.swap_remove(place);
        }
        self.holds.set(held.len());
    }

    #[inline]
    pub(crate) fn is_held(&self, token: Token) -> bool {
        self.holds.get() > 0 && self.held.borrow().contains(&token)
    }

    /// The resolver for hosts.
    pub(crate) fn resolver(&self) -> SharedResolver {
        let mut resolver = self.resolver.borrow_mut();
        let resolver = resolver.get_or_insert_with(|| Rc::new(RefCell::new(SystemResolver::new())));
        Rc::clone(resolver)
    }

    pub(crate) fn set_resolver(&self, resolver: impl Resolver) {
        let earlier = self.resolver.replace(Some(Rc::new(RefCell::new(resolver))));
        // The earlier one is dropped once nothing is borrowed.
        drop(earlier);
    }

    /// Opens the spare descriptor. A failure is logged once, until it succeeds again.
    pub(crate) fn fill_reserve(&self) {
        let mut reserve = self.reserve.borrow_mut();
        if reserve.is_some() {
            return;
        }
        match open_anything() {
            Ok(fd) => {
                *reserve = Some(fd);
                if self.is_reserve_missed.replace(false) {
                    log::debug!(target: log::TRANSPORT, "there is a reserve descriptor again");
                }
            }
            Err(error) => {
                if !self.is_reserve_missed.replace(true) {
                    log::warn!(
                        target: log::TRANSPORT,
                        "cannot take a reserve descriptor: {error}"
                    );
                }
            }
        }
    }

    /// Gives the spare descriptor up, and returns whether there was one.
    pub(crate) fn spend_reserve(&self) -> bool {
        self.reserve.borrow_mut().take().is_some()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("ledger", &self.ledger)
            .finish_non_exhaustive()
    }
}

/// How near the process is to having no descriptor number left.
///
/// The kernel gives out the lowest free number. So a high number means that all below
/// are taken. Looking at it costs a comparison, where counting would cost a walk.
#[derive(Debug)]
pub(crate) struct Numbers {
    /// How many of the highest numbers are left to the program itself.
    reserve: Cell<usize>,
    /// How many numbers below those are left for the descriptors of one read, so that
    /// the kernel always has room for them. If the kernel had to close some, that could
    /// make us wait; our own closes cannot. Zero until a peer sends any.
    message: Cell<usize>,
    /// The lowest number of both. Looked up when it seems to be reached.
    first_reserved: Cell<i32>,
    is_near: Cell<bool>,
}

impl Numbers {
    fn new() -> Self {
        let numbers = Self {
            reserve: Cell::new(RESERVE),
            message: Cell::new(0),
            first_reserved: Cell::new(i32::MAX),
            is_near: Cell::new(false),
        };
        numbers.look_up();
        numbers
    }

    pub(crate) fn reserve(&self) -> usize {
        self.reserve.get()
    }

    pub(crate) fn set_reserve(&self, count: usize) {
        self.reserve.set(count);
        self.message.set(0);
        self.look_up();
    }

    /// Whether `fd`, which was just made, is one of the reserve. Each descriptor that a
    /// peer causes is checked.
    #[inline]
    pub(crate) fn is_reserved(&self, fd: BorrowedFd<'_>) -> bool {
        sys::reaches(fd, self.first_reserved.get().saturating_sub(NEAR)) && self.is_really(fd)
    }

    #[cold]
    fn is_really(&self, fd: BorrowedFd<'_>) -> bool {
        self.look_up();
        let first = self.first_reserved.get();
        if sys::reaches(fd, first.saturating_sub(NEAR)) {
            self.is_near.set(true);
        }
        sys::reaches(fd, first)
    }

    /// Notes that peers send descriptors.
    #[inline]
    pub(crate) fn expect_descriptors(&self) {
        if self.message.get() == 0 && self.reserve.get() > 0 {
            self.message.set(sys::MAX_DESCRIPTORS);
            self.look_up();
        }
    }

    /// Whether the reserve is near, so that it is better to ask
    /// [`has_room`](Self::has_room) first.
    #[inline]
    pub(crate) fn is_near(&self) -> bool {
        self.is_near.get()
    }

    /// Notes that no number was left.
    pub(crate) fn ran_out(&self) {
        self.look_up();
        self.is_near.set(true);
    }

    /// Whether a connection may be accepted. A number has to be free outside of the
    /// reserve. If peers send descriptors, some more have to be free for the connected
    /// ones. Otherwise a flood of clients would leave none, and cost these peers their
    /// descriptors. `any` is an open descriptor.
    #[cold]
    pub(crate) fn has_room(&self, any: BorrowedFd<'_>) -> bool {
        self.look_up();
        let first = self.first_reserved.get();
        let Ok(lowest) = sys::lowest_free(any) else {
            return self.reserve.get() == 0;
        };
        self.is_near.set(lowest >= first.saturating_sub(NEAR));
        let for_the_connected = match self.message.get() {
            0 => 0,
            // Not all of a small table.
            _ => FOR_THE_CONNECTED.min(first / 8),
        };
        lowest < first.saturating_sub(for_the_connected)
    }

    fn look_up(&self) {
        let limit = sys::descriptor_limit().unwrap_or(u64::MAX);
        // Not all of a small table.
        let reserve = (limit / 3).min(self.reserve.get().saturating_add(self.message.get()) as u64);
        let first = match reserve {
            0 => i32::MAX,
            _ => i32::try_from(limit - reserve).unwrap_or(i32::MAX),
        };
        self.first_reserved.set(first);
    }
}

fn open_anything() -> io::Result<OwnedFd> {
    File::open("/dev/null").map(OwnedFd::from)
}

/// How much one transport or listener may do in a turn, before it is the others' turn.
/// See [`Transports::set_transport_budgets`](crate::Transports::set_transport_budgets).
///
/// The rest is done in the next turn, whose poll then does not wait. A budget of zero
/// counts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransportBudgets {
    /// How many bytes one connection reads. The default is 256 KiB, four full reads. The
    /// read that reaches the budget is the last one. A read counts as 8 KiB at the least,
    /// so by default there are no more than 32. A greedy peer then delays the others by
    /// some tens of microseconds.
    pub read_bytes: usize,
    /// How often one connection sends, at most some 200 KiB each time. The default is 8.
    pub writes: u32,
    /// How many callbacks of one connection are not about a read, but about producers
    /// and notices. The default is 64.
    pub notices: u32,
    /// How many connections one listener accepts. The default is 100. (Twisted starts
    /// with 100 too, and changes it.)
    pub accepts: u32,
}

bowline_reactor::setters!(TransportBudgets {
    read_bytes: usize,
    writes: u32,
    notices: u32,
    accepts: u32,
});

impl Default for TransportBudgets {
    fn default() -> Self {
        Self {
            read_bytes: READ_BYTES_PER_TURN,
            writes: WRITES_PER_TURN,
            notices: NOTICES_PER_TURN,
            accepts: ACCEPTS_PER_TURN,
        }
    }
}

/// Counters of descriptors, for one reactor.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) opened: Cell<u64>,
    pub(crate) closed: Cell<u64>,
    pub(crate) passed: Cell<u64>,
    pub(crate) unsent: Cell<u64>,
    pub(crate) received: Cell<u64>,
    pub(crate) unclaimed: Cell<u64>,
    pub(crate) truncations: Cell<u64>,
    pub(crate) refused: Cell<u64>,
    pub(crate) shed: Cell<u64>,
}

/// Counters of descriptors in one reactor. See
/// [`Transports::descriptor_counts`](crate::Transports::descriptor_counts).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DescriptorCounts {
    /// Sockets that transports and listeners came to own. They were accepted, connected,
    /// bound or adopted.
    pub opened: u64,
    /// Sockets of these that were closed or detached.
    pub closed: u64,
    /// Descriptors that left to a peer.
    pub passed: u64,
    /// Descriptors that were queued and closed unsent.
    pub unsent: u64,
    /// Descriptors that came from a peer.
    pub received: u64,
    /// Received descriptors that nobody took. They were closed.
    pub unclaimed: u64,
    /// Unclaimed descriptors that were offered to no protocol. They were beyond a limit,
    /// in the [reserve](crate::Transports::set_descriptor_reserve), beside lost ones, or
    /// a connection's own socket.
    pub refused: u64,
    /// Reads in which the kernel lost descriptors (`MSG_CTRUNC`).
    pub truncations: u64,
    /// Connections that were accepted and closed at once, since descriptors had run out.
    pub shed: u64,
}

impl DescriptorCounts {
    /// How many sockets transports and listeners own now.
    pub fn open(&self) -> u64 {
        self.opened - self.closed
    }

    /// How many received descriptors protocols have taken so far.
    pub fn claimed(&self) -> u64 {
        self.received - self.unclaimed
    }
}

impl Ledger {
    #[inline]
    pub(crate) fn add(counter: &Cell<u64>, count: usize) {
        counter.set(counter.get() + count as u64);
    }

    pub(crate) fn counts(&self) -> DescriptorCounts {
        DescriptorCounts {
            opened: self.opened.get(),
            closed: self.closed.get(),
            passed: self.passed.get(),
            unsent: self.unsent.get(),
            received: self.received.get(),
            unclaimed: self.unclaimed.get(),
            truncations: self.truncations.get(),
            refused: self.refused.get(),
            shed: self.shed.get(),
        }
    }
}
