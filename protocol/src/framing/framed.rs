//! A protocol made of a framer and a receiver.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bowline_reactor::Description;

use self::bounds::Bounds;
use crate::context::Context;
use crate::descriptors::ReceivedDescriptors;
use crate::framing::buffer::Found;
use crate::framing::pairing::Arrivals;
use crate::framing::receiver::Changes;
use crate::framing::{
    FrameBuffer, FrameContext, FrameReceiver, Framer, Framing, FramingError, Pairing, Unclaimed,
};
use crate::protocol::{AfterReadClosed, AfterTruncation, AtDrain, Protocol};
use crate::reason::{CloseReason, Remains};
use crate::transport::Transport;

mod bounds;

/// A [`Protocol`] that cuts what it receives into frames and calls a
/// [`FrameReceiver`]; see the [module](crate::framing).
#[derive(Debug)]
pub struct Framed<F, R> {
    buffer: FrameBuffer<F>,
    mode: Mode,
    arrivals: Arrivals,
    /// There where it is not as for most, or something has waited.
    bounds: Option<Box<Bounds>>,
    receiver: R,
}

/// How the next bytes are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Frames,
    /// As they come, this many; `u64::MAX` is without end.
    Raw {
        left: u64,
    },
    /// Not at all: the peer broke the framing.
    Failed,
}

impl Mode {
    fn name(&self) -> &'static str {
        match self {
            Self::Frames => "frames",
            Self::Raw { .. } => "raw",
            Self::Failed => "failed",
        }
    }
}

impl<F: Framer, R> Framed<F, R> {
    /// How many descriptors a frame may come with, unless
    /// [set](Self::max_descriptors).
    pub const MAX_DESCRIPTORS: usize = bounds::PER_FRAME;

    /// How many descriptors may wait for frames that claim them, unless
    /// [set](Self::max_waiting).
    pub const MAX_WAITING: usize = bounds::WAITING;

    /// How long descriptors wait for their frame, unless
    /// [set](Self::descriptor_deadline).
    pub const DESCRIPTOR_DEADLINE: Duration = bounds::DEADLINE;

    /// Delivers frames to `receiver`. Unless another [`pairing`](Self::pairing) is set,
    /// descriptors are delivered as they arrive, before the frames of the same read.
    pub fn new(framer: F, receiver: R) -> Self {
        Self {
            buffer: FrameBuffer::new(framer),
            mode: Mode::Frames,
            arrivals: Arrivals::default(),
            bounds: None,
            receiver,
        }
    }

    /// Sets the rule that says which descriptors belong to a frame. The default is
    /// [`Pairing::Loose`]: none do. A receiver can [change](Framing::set_pairing) the
    /// rule later.
    #[must_use]
    pub fn pairing(mut self, pairing: Pairing) -> Self {
        self.arrivals.pairing = pairing;
        self
    }

    /// Sets how many descriptors a frame may come with, or claim; default 16. A frame
    /// with more breaks the framing. This does not apply if the receiver says what a
    /// frame claims, nor with [`Pairing::Loose`].
    #[must_use]
    pub fn max_descriptors(mut self, count: usize) -> Self {
        self.bounds_mut().per_frame = count;
        self
    }

    /// Sets how many descriptors may wait for frames that [claim](Pairing::Claimed) them,
    /// counted when all whole frames have taken theirs; default 64. More break the
    /// framing.
    #[must_use]
    pub fn max_waiting(mut self, count: usize) -> Self {
        self.bounds_mut().waiting = count;
        self
    }

    /// Sets how long descriptors wait for their frame to become whole, or to come and
    /// claim them; default 30 seconds. `None` waits for as long as it takes.
    ///
    /// After that time they are closed, and the connection is
    /// [aborted](crate::AnyConnection::abort_connection), which is logged. The receiver's
    /// [`framing_failed`](FrameReceiver::framing_failed) is called before its
    /// `connection_lost`.
    ///
    /// Each descriptor has this time, so a peer that sends one after the other can always
    /// have some on the way. The time begins anew when reading goes on after a pause.
    #[must_use]
    pub fn descriptor_deadline(mut self, deadline: Option<Duration>) -> Self {
        self.bounds_mut().deadline = deadline;
        self
    }

    /// Calls `act` with the receiver and with everything that its callbacks can reach. So
    /// a timer, which gets here through `call_protocol`, can send frames and change how
    /// the following bytes are cut, as a callback can.
    ///
    /// No callback is made inside this call. If a change makes frames whole, they are
    /// delivered when the loop comes to this connection again, in the same turn or the
    /// next.
    ///
    /// # Examples
    ///
    /// ```
    /// use bowline::framing::{FrameReceiver, Framed, LineFramer};
    /// use bowline::{Context, Transport};
    ///
    /// /// To be called through `call_protocol`, every minute for instance.
    /// fn ask<T: Transport, R: FrameReceiver<T, LineFramer>>(
    ///     framed: &mut Framed<LineFramer, R>,
    ///     cx: &mut Context<'_, T>,
    /// ) {
    ///     let sent = framed.call(cx, |_, cx| cx.send_frame(b"still there?"));
    ///     assert!(sent.is_ok(), "there is no CR LF in it");
    /// }
    /// ```
    pub fn call<T, A>(
        &mut self,
        cx: &mut Context<'_, T>,
        act: impl FnOnce(&mut R, &mut FrameContext<'_, T, F>) -> A,
    ) -> A
    where
        T: Transport + ?Sized,
    {
        let (answer, framing_changed) = self.notify(cx, act);
        if framing_changed {
            if !cx.transport.is_reading_paused() {
                let rest = self.buffer.take_rest(&mut &[][..]);
                self.arrivals.unreceive(rest.len());
                cx.transport.push_back(rest);
            }
            self.limit_reads(cx);
        }
        answer
    }

    /// The receiver.
    pub fn receiver(&self) -> &R {
        &self.receiver
    }

    /// The receiver.
    pub fn receiver_mut(&mut self) -> &mut R {
        &mut self.receiver
    }

    /// The framer.
    pub fn framer(&self) -> &F {
        self.buffer.framer()
    }

    /// Delivers what can be delivered of what is kept and of `input`, keeps the
    /// rest, and says when that was all of a read.
    fn deliver_all<T>(&mut self, cx: &mut Context<'_, T>, input: &[u8])
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        if self.deliver(cx, input) {
            let ((), framing_changed) = self.notify(cx, |receiver, cx| receiver.read_delivered(cx));
            if framing_changed {
                self.deliver(cx, &[]);
            }
        }
        self.limit_reads(cx);
        self.limit_waiting(cx);
    }

    /// The one place where frames are delivered from: whatever a callback changes
    /// is seen here before the next. Returns whether everything that can be delivered was.
    fn deliver<T>(&mut self, cx: &mut Context<'_, T>, mut input: &[u8]) -> bool
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        loop {
            if !cx.transport.is_open_for_reading() || self.mode == Mode::Failed {
                self.buffer.clear();
                self.close_descriptors(cx);
                return false;
            }
            if cx.transport.is_reading_paused() {
                self.buffer.keep(&mut input);
                self.buffer.shrink();
                return false;
            }
            match self.mode {
                Mode::Frames => {
                    if !self.arrivals.is_empty() && self.settle_arrivals(cx, &mut input) {
                        continue;
                    }
                    match self.buffer.find(&mut input) {
                        Ok(Some(found)) => self.deliver_frame(cx, &mut input, found),
                        Ok(None) => match self.too_many_waiting() {
                            None => return true,
                            Some(error) => self.fail(cx, &mut input, error),
                        },
                        Err(error) => self.fail(cx, &mut input, error),
                    }
                }
                Mode::Raw { left } => {
                    let found = self.buffer.find_raw(input, left);
                    if self.is_stranded(input, found.as_ref(), left) {
                        self.deliver_stranded_descriptor(cx);
                    } else if let Some(found) = found {
                        self.deliver_raw(cx, &mut input, found, left);
                    } else {
                        self.buffer.shrink();
                        match self.too_many_waiting() {
                            None => return true,
                            Some(error) => self.fail(cx, &mut input, error),
                        }
                    }
                }
                Mode::Failed => {}
            }
        }
    }

    /// Looks at what waits where one frame has ended and the next was not yet
    /// found. Returns whether a callback was made.
    #[inline(never)]
    fn settle_arrivals<T>(&mut self, cx: &mut Context<'_, T>, input: &mut &[u8]) -> bool
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        let unclaimed = match self.arrivals.pairing {
            Pairing::Loose => {
                self.deliver_stranded_descriptor(cx);
                return true;
            }
            Pairing::Exact | Pairing::ByLastByte => return false,
            Pairing::Claimed(unclaimed) => unclaimed,
        };
        let position = self.arrivals.position(self.buffer.len() + input.len());
        self.arrivals.drop_lost(position);
        let count = self.arrivals.due(position);
        match unclaimed {
            _ if count == 0 => {}
            Unclaimed::Wait => {}
            Unclaimed::Close => {
                let closed = self.arrivals.take_first(count);
                cx.transport.close_unclaimed(closed);
            }
            Unclaimed::Fail => {
                self.fail(cx, input, FramingError::DescriptorsUnclaimed { count });
                return true;
            }
        }
        false
    }

    /// What is wrong where more wait for a frame than may.
    fn too_many_waiting(&self) -> Option<FramingError> {
        let count = self.arrivals.len();
        match self.arrivals.pairing {
            Pairing::Claimed(_) => (count > self.most_waiting())
                .then_some(FramingError::DescriptorsUnclaimed { count }),
            _ => {
                let limit = self.most_per_frame();
                (count > limit).then_some(FramingError::TooManyDescriptors { limit })
            }
        }
    }

    fn deliver_frame<T>(&mut self, cx: &mut Context<'_, T>, input: &mut &[u8], found: Found)
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        if self.arrivals.may_own() {
            return self.deliver_frame_with_its_own(cx, input, found);
        }
        self.call_with(cx, input, found, Usable::Whole, |receiver, cx, frame| {
            receiver.frame_received(cx, frame);
        });
    }

    /// As [`deliver_frame`](Self::deliver_frame), where it may have descriptors.
    #[inline(never)]
    fn deliver_frame_with_its_own<T>(
        &mut self,
        cx: &mut Context<'_, T>,
        input: &mut &[u8],
        found: Found,
    ) where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        match self.owned_by(input, &found) {
            Ok(Owned::Offered(count)) => {
                self.arrivals.offer(count);
                self.call_with(cx, input, found, Usable::Whole, |receiver, cx, frame| {
                    receiver.frame_received(cx, frame);
                });
                self.close_left(cx);
            }
            Ok(Owned::Truncated(count)) => {
                let closed = self.arrivals.take_first(count);
                cx.transport.close_unclaimed(closed);
                self.call_with(cx, input, found, Usable::Whole, |receiver, cx, frame| {
                    receiver.frame_truncated(cx, frame);
                });
            }
            Err(error) => self.fail(cx, input, error),
        }
    }

    /// Which of what has arrived is the frame's.
    fn owned_by(&self, input: &[u8], found: &Found) -> Result<Owned, FramingError> {
        let arrivals = &self.arrivals;
        let limit = self.most_per_frame();
        let count = match arrivals.pairing {
            Pairing::Claimed(_) => match self.buffer.framer.claims(self.buffer.whole(input, found))
            {
                None => return Ok(Owned::Offered(Arrivals::ANY)),
                Some(count) => count,
            },
            _ => arrivals.due(arrivals.position(self.buffer.left(input, found))),
        };
        if count > limit {
            return Err(FramingError::TooManyDescriptors { limit });
        }
        let received = arrivals.available(count);
        if received == count {
            return Ok(Owned::Offered(count));
        }
        match arrivals.pairing {
            // All of one frame's are lost together.
            Pairing::Claimed(_) if received == 0 && !arrivals.is_empty() => Ok(Owned::Truncated(1)),
            Pairing::Claimed(_) => Err(FramingError::DescriptorsMissing {
                claimed: count,
                received,
            }),
            _ => Ok(Owned::Truncated(count)),
        }
    }

    /// Whether something has arrived that is to be told before the raw bytes
    /// that were `found`.
    fn is_stranded(&self, input: &[u8], found: Option<&Found>, left: u64) -> bool {
        if self.arrivals.is_empty() {
            return false;
        }
        match (self.arrivals.pairing, found) {
            (Pairing::Loose, _) => true,
            _ if left == u64::MAX => true,
            (Pairing::Claimed(_), _) | (_, None) => false,
            (_, Some(found)) => {
                let end = self.arrivals.position(self.buffer.left(input, found));
                self.arrivals.due(end) > 0
            }
        }
    }

    fn deliver_raw<T>(
        &mut self,
        cx: &mut Context<'_, T>,
        input: &mut &[u8],
        found: Found,
        left: u64,
    ) where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        let count = found.len() as u64;
        self.mode = match left {
            u64::MAX => Mode::Raw { left },
            _ if left == count => Mode::Frames,
            _ => Mode::Raw { left: left - count },
        };
        if let Pairing::Claimed(_) = self.arrivals.pairing {
            self.arrivals.offer(Arrivals::ANY);
        }
        self.call_with(
            cx,
            input,
            found,
            Usable::FromByte(0),
            |receiver, cx, data| {
                receiver.raw_data_received(cx, data);
            },
        );
        self.close_left(cx);
    }

    /// Delivers the first descriptor to no frame.
    fn deliver_stranded_descriptor<T>(&mut self, cx: &mut Context<'_, T>)
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        // That it was lost was told when it was.
        let Some(fd) = self.arrivals.take_first(1).pop() else {
            return;
        };
        let (answer, _) = self.notify(cx, |receiver, cx| receiver.file_descriptor_received(cx, fd));
        if let Err(fd) = answer {
            cx.transport.close_unclaimed(vec![fd]);
        }
    }

    fn fail<T>(&mut self, cx: &mut Context<'_, T>, input: &mut &[u8], error: FramingError)
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        self.mode = Mode::Failed;
        self.close_descriptors(cx);
        if !self.buffer.is_empty() {
            // The receiver is shown one slice.
            self.buffer.keep(input);
        }
        self.buffer.forget();
        let rest = self.buffer.find_raw(input, u64::MAX);
        let rest = rest.unwrap_or_else(|| self.buffer.find_nothing());
        self.call_with(
            cx,
            input,
            rest,
            Usable::FromByte(1),
            |receiver, cx, rest| {
                receiver.framing_failed(cx, error, rest);
            },
        );
    }

    /// Calls the receiver with the bytes that were `found`, then does what it
    /// asked for.
    fn call_with<T, A>(
        &mut self,
        cx: &mut Context<'_, T>,
        input: &mut &[u8],
        found: Found,
        usable: Usable,
        callback: impl FnOnce(&mut R, &mut FrameContext<'_, T, F>, &[u8]) -> A,
    ) -> (A, bool)
    where
        T: Transport + ?Sized,
    {
        let buffer = &mut self.buffer;
        let (bytes, rest) = match &found {
            Found::Kept { payload, end } => (
                &buffer.kept[payload.clone()],
                [&buffer.kept[*end..], *input],
            ),
            Found::Input { payload, end } => (&input[payload.clone()], [&input[*end..], &[]]),
        };
        let mut frame_cx = FrameContext {
            transport: &mut *cx.transport,
            reactor: &mut *cx.reactor,
            framing: Framing {
                framer: &mut buffer.framer,
                mode: &mut self.mode,
                rest,
                arrivals: &mut self.arrivals,
                changes: Changes::default(),
            },
        };
        let answer = callback(&mut self.receiver, &mut frame_cx, bytes);
        let changes = frame_cx.framing.changes;
        self.buffer.pass(input, &found, usable, &changes);
        if changes.rest_taken {
            self.close_descriptors(cx);
        }
        (answer, changes.framing_changed)
    }

    /// Calls the receiver without bytes. Also answers whether that changed how
    /// kept bytes are to be seen.
    fn notify<T, A>(
        &mut self,
        cx: &mut Context<'_, T>,
        callback: impl FnOnce(&mut R, &mut FrameContext<'_, T, F>) -> A,
    ) -> (A, bool)
    where
        T: Transport + ?Sized,
    {
        let nothing = self.buffer.find_nothing();
        self.call_with(
            cx,
            &mut &[][..],
            nothing,
            Usable::Whole,
            |receiver, cx, _| callback(receiver, cx),
        )
    }

    /// As [`notify`](Self::notify), and delivers what follows from changes.
    fn forward<T, A>(
        &mut self,
        cx: &mut Context<'_, T>,
        callback: impl FnOnce(&mut R, &mut FrameContext<'_, T, F>) -> A,
    ) -> A
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        let (answer, framing_changed) = self.notify(cx, callback);
        if framing_changed {
            self.deliver(cx, &[]);
            self.limit_reads(cx);
            self.limit_waiting(cx);
        }
        answer
    }

    /// Lets no read pass the end of the present frame, where that is the rule.
    fn limit_reads<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        let is_exact = self.arrivals.pairing == Pairing::Exact;
        if !is_exact && !self.arrivals.limits_reads {
            return;
        }
        self.arrivals.limits_reads = is_exact;
        let limit = match self.mode {
            _ if !is_exact => None,
            // With a whole frame at hand reading is paused.
            Mode::Frames => Some(self.buffer.bytes_wanted().unwrap_or(NonZeroUsize::MIN)),
            Mode::Raw { left: u64::MAX } | Mode::Failed => None,
            Mode::Raw { left } => NonZeroUsize::new(usize::try_from(left).unwrap_or(usize::MAX)),
        };
        cx.transport.set_read_limit(limit);
    }

    /// Whether a descriptor is told by itself, and not behind those that are still to be.
    fn offers_each(&self) -> bool {
        let is_loose = matches!(
            (self.mode, self.arrivals.pairing),
            (Mode::Raw { left: u64::MAX }, _) | (_, Pairing::Loose)
        );
        is_loose && self.arrivals.is_empty()
    }

    /// Has the oldest of what waits find its frame in time.
    #[inline]
    fn limit_waiting<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        if !self.arrivals.is_empty() || self.bounds.is_some() {
            let since = self.arrivals.since();
            if self.bounds.as_ref().and_then(|it| it.since()) != since {
                self.bounds_mut().follow(cx, since);
            }
            self.arrivals.shrink();
        }
    }

    fn bounds_mut(&mut self) -> &mut Bounds {
        self.bounds.get_or_insert_default()
    }

    fn most_per_frame(&self) -> usize {
        let bounds = self.bounds.as_ref();
        bounds.map_or(Self::MAX_DESCRIPTORS, |it| it.per_frame)
    }

    fn most_waiting(&self) -> usize {
        let bounds = self.bounds.as_ref();
        bounds.map_or(Self::MAX_WAITING, |it| it.waiting)
    }

    /// What the receiver has left of a frame's is closed.
    fn close_left<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        let left = self.arrivals.withdraw();
        if !left.is_empty() {
            cx.transport.close_unclaimed(left);
        }
    }

    fn close_descriptors<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        if !self.arrivals.is_empty() {
            cx.transport.close_unclaimed(self.arrivals.take_all());
        }
    }
}

/// Which of the descriptors that have arrived are a frame's.
enum Owned {
    /// The first so many, to be taken by the receiver.
    Offered(usize),
    /// The first so many, some of which were lost on the way.
    Truncated(usize),
}

/// What the receiver may leave of the bytes it is given.
#[derive(Clone, Copy)]
enum Usable {
    Whole,
    /// All from this one on.
    FromByte(usize),
}

impl<F: Framer> FrameBuffer<F> {
    /// Goes on behind what was `found`, as far as the callback used it.
    #[inline]
    fn pass(&mut self, input: &mut &[u8], found: &Found, usable: Usable, changes: &Changes) {
        let unused = match (usable, changes.used) {
            (Usable::FromByte(least), Some(used)) => found.len().saturating_sub(used.max(least)),
            _ => 0,
        };
        match *found {
            Found::Kept { end, .. } => {
                self.start = end - unused;
                if changes.rest_taken {
                    self.kept.truncate(end);
                    *input = &[];
                }
            }
            Found::Input { end, .. } => {
                let upto = if changes.rest_taken { end } else { input.len() };
                *input = &input[end - unused..upto];
            }
        }
        if changes.framing_changed {
            self.forget();
        }
    }
}

impl Found {
    fn len(&self) -> usize {
        let (Self::Kept { payload, .. } | Self::Input { payload, .. }) = self;
        payload.len()
    }
}

impl<T, F, R> Protocol<T> for Framed<F, R>
where
    T: Transport + ?Sized,
    F: Framer,
    R: FrameReceiver<T, F>,
{
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.forward(cx, |receiver, cx| receiver.connection_made(cx));
        self.limit_reads(cx);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.arrivals.note_received(data.len());
        self.deliver_all(cx, data);
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        if self.mode == Mode::Failed {
            return Err(fd);
        }
        if self.offers_each() {
            return self.forward(cx, |receiver, cx| receiver.file_descriptor_received(cx, fd));
        }
        self.arrivals.push_all([fd], cx.reactor.now());
        Ok(())
    }

    /// As the default does, but that what waits for its frame is kept at once: no callback
    /// comes between.
    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let mut refused = Vec::new();
        while cx.transport.is_open_for_reading() && descriptors.len() > 0 {
            if self.mode != Mode::Failed && !self.offers_each() {
                self.arrivals.push_all(descriptors, cx.reactor.now());
                break;
            }
            let fd = descriptors.next();
            let refusal = fd.and_then(|fd| self.file_descriptor_received(cx, fd).err());
            refused.extend(refusal);
        }
        cx.transport.close_unclaimed(refused);
        if cx.transport.is_open_for_reading() {
            self.data_received(cx, data);
        }
    }

    fn descriptors_truncated(
        &mut self,
        cx: &mut Context<'_, T>,
        received: usize,
    ) -> AfterTruncation {
        let after = self.forward(cx, |receiver, cx| {
            receiver.descriptors_truncated(cx, received)
        });
        if after == AfterTruncation::KeepConnection && self.arrivals.pairing != Pairing::Loose {
            self.arrivals.push_lost(cx.reactor.now());
        }
        after
    }

    fn descriptors_sent(&mut self, cx: &mut Context<'_, T>, count: usize) {
        self.forward(cx, |receiver, cx| receiver.descriptors_sent(cx, count));
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        self.forward(cx, |receiver, cx| receiver.read_connection_lost(cx))
    }

    fn write_connection_lost(&mut self, cx: &mut Context<'_, T>) {
        self.forward(cx, |receiver, cx| receiver.write_connection_lost(cx));
    }

    fn connection_broken(&mut self, cx: &mut Context<'_, T>, remains: Remains) {
        self.forward(cx, |receiver, cx| receiver.connection_broken(cx, remains));
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        if self.bounds.as_ref().is_some_and(|it| it.has_expired()) {
            let count = self.arrivals.len();
            self.fail(
                cx,
                &mut &[][..],
                FramingError::DescriptorsUnclaimed { count },
            );
        }
        self.notify(cx, |receiver, cx| receiver.connection_lost(cx, reason));
        self.buffer.clear();
        self.close_descriptors(cx);
        if let Some(bounds) = &mut self.bounds {
            bounds.cancel(cx.reactor);
        }
    }

    fn draining(&mut self, cx: &mut Context<'_, T>) -> AtDrain {
        self.forward(cx, |receiver, cx| receiver.draining(cx))
    }

    fn is_idle(&self) -> bool {
        // The rest of what has begun to come is worth waiting for.
        self.buffer.is_empty() && self.receiver.is_idle()
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        self.arrivals.restart(cx.reactor.now());
        self.notify(cx, |receiver, cx| receiver.reading_resumed(cx));
        self.deliver_all(cx, &[]);
    }

    fn has_undelivered(&mut self) -> bool {
        let has_descriptor = !self.arrivals.is_empty();
        match self.mode {
            Mode::Frames if self.arrivals.pairing == Pairing::Loose && has_descriptor => true,
            // What is no whole frame was delivered as far as it can be.
            Mode::Frames => !self.buffer.is_empty() && self.buffer.bytes_wanted().is_none(),
            Mode::Raw { .. } => !self.buffer.is_empty() || has_descriptor,
            Mode::Failed => false,
        }
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        if let Some(bounds) = &self.bounds {
            bounds.reattached(cx);
        }
        self.forward(cx, |receiver, cx| receiver.connection_reattached(cx));
    }

    fn connection_secured(&mut self, cx: &mut Context<'_, T>) {
        self.forward(cx, |receiver, cx| receiver.connection_secured(cx));
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        self.forward(cx, |receiver, cx| receiver.pause_producing(cx));
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        self.forward(cx, |receiver, cx| receiver.resume_producing(cx));
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, T>) {
        self.forward(cx, |receiver, cx| receiver.stop_producing(cx));
    }

    fn part(&mut self, id: TypeId) -> Option<&mut dyn Any> {
        if id == TypeId::of::<Self>() {
            Some(self)
        } else if id == TypeId::of::<R>() {
            Some(&mut self.receiver)
        } else {
            None
        }
    }

    fn into_part(self: Box<Self>, id: TypeId) -> Option<Box<dyn Any>> {
        if id == TypeId::of::<Self>() {
            Some(self)
        } else if id == TypeId::of::<R>() {
            Some(Box::new(self.receiver))
        } else {
            None
        }
    }

    fn describe(&self, description: &mut Description) {
        description
            .section_of::<F>()
            .set("mode", self.mode.name())
            .set("pairing", self.arrivals.pairing.name())
            .set("undelivered_bytes", self.buffer.len())
            .set("waiting_descriptors", self.arrivals.len());
        self.receiver.describe(description);
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        self.receiver.log_prefix()
    }
}

#[cfg(test)]
mod tests;
