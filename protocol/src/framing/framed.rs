//! A protocol made of a framer and a receiver.

use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::context::Context;
use crate::descriptors::ReceivedDescriptors;
use crate::framing::buffer::Found;
use crate::framing::receiver::Changes;
use crate::framing::{FrameBuffer, FrameContext, FrameReceiver, Framer, Framing, FramingError};
use crate::log;
use crate::policies::Timeout;
use crate::protocol::{AfterReadClosed, AfterTruncation, Protocol};
use crate::reason::CloseReason;
use crate::transport::Transport;

/// A [`Protocol`] that cuts what it receives into frames and calls a
/// [`FrameReceiver`]; see the [module](crate::framing).
#[derive(Debug)]
pub struct Framed<F, R> {
    buffer: FrameBuffer<F>,
    mode: Mode,
    descriptors: Descriptors,
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

/// What is done with descriptors.
#[derive(Debug)]
enum Descriptors {
    /// The receiver is given each as it arrives.
    Loose,
    /// They are delivered with their frame.
    WithFrame(WithFrame),
}

/// Descriptors that are delivered with their frame.
#[derive(Debug)]
struct WithFrame {
    max: usize,
    /// The present frame has more than `max`; that is to be said when its
    /// bytes are there.
    exceeded: bool,
    /// Some of the present frame's were lost on the way to us.
    truncated: bool,
    /// How long an unfinished frame's are kept.
    deadline: Option<Duration>,
    /// There from the first descriptor on.
    timeout: Option<Timeout>,
}

impl<F: Framer, R> Framed<F, R> {
    /// How many descriptors a frame may come with, if not
    /// [set](Self::max_descriptors).
    pub const MAX_DESCRIPTORS: usize = 16;

    /// How long the descriptors of a frame wait for the rest of it, if not
    /// [set](Self::descriptor_deadline).
    pub const DESCRIPTOR_DEADLINE: Duration = Duration::from_secs(30);

    /// Delivers frames to `receiver`. Descriptors, on transports that pass
    /// them, are delivered as they arrive, before the frames of the same read.
    pub fn new(framer: F, receiver: R) -> Self {
        Self {
            buffer: FrameBuffer::new(framer),
            mode: Mode::Frames,
            descriptors: Descriptors::Loose,
            receiver,
        }
    }

    /// Delivers frames to `receiver`, each together with exactly its
    /// descriptors.
    ///
    /// To that end no read goes further than the framer knows the present frame
    /// to go ([`Transport::set_read_limit`] is taken over), so that descriptors
    /// received meanwhile were sent with this frame's bytes: a peer has to send
    /// a frame's descriptors with its own bytes, best with the first, as
    /// [`send_frame_with_descriptors`] does. This costs two reads or more for
    /// each frame: a length-prefixed one takes two, a netstring about as many as
    /// its length has digits, a line about half as many as it has bytes.
    ///
    /// [`send_frame_with_descriptors`]: FrameContext::send_frame_with_descriptors
    pub fn with_descriptors(framer: F, receiver: R) -> Self {
        Self {
            descriptors: Descriptors::WithFrame(WithFrame {
                max: Self::MAX_DESCRIPTORS,
                exceeded: false,
                truncated: false,
                deadline: Some(Self::DESCRIPTOR_DEADLINE),
                timeout: None,
            }),
            ..Self::new(framer, receiver)
        }
    }

    /// Sets how many descriptors a frame may come with, 16 unless set; one with
    /// more breaks the framing. Nothing happens unless this was made
    /// [`with_descriptors`](Self::with_descriptors).
    #[must_use]
    pub fn max_descriptors(mut self, count: usize) -> Self {
        if let Descriptors::WithFrame(it) = &mut self.descriptors {
            it.max = count;
        }
        self
    }

    /// Sets how long the descriptors of a frame wait for the rest of it, from
    /// the first one on; 30 seconds unless set, `None` for as long as it takes.
    /// After that the connection is
    /// [aborted](crate::Transport::abort_connection), and they are closed.
    ///
    /// It is the time for one frame: a peer that sends one after the other, and
    /// finishes each, can always have descriptors on the way. It begins anew
    /// when reading goes on after a pause. Nothing happens unless this was made [`with_descriptors`](Self::with_descriptors).
    #[must_use]
    pub fn descriptor_deadline(mut self, deadline: Option<Duration>) -> Self {
        if let Descriptors::WithFrame(it) = &mut self.descriptors {
            it.deadline = deadline;
        }
        self
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
    /// rest. The one place where frames are delivered from: whatever a callback
    /// changes is seen here before the next.
    fn deliver_all<T>(&mut self, cx: &mut Context<'_, T>, mut input: &[u8])
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        loop {
            if !cx.transport.is_open_for_reading() || self.mode == Mode::Failed {
                self.buffer.clear();
                self.close_descriptors(cx);
                break;
            }
            if cx.transport.is_reading_paused() {
                self.buffer.keep(&mut input);
                self.buffer.shrink();
                break;
            }
            match self.mode {
                Mode::Frames => {
                    if let Some(limit) = self.exceeded_limit() {
                        let error = FramingError::TooManyDescriptors { limit };
                        self.fail(cx, &mut input, error);
                        continue;
                    }
                    match self.buffer.find(&mut input) {
                        Ok(Some(found)) => self.deliver_frame(cx, &mut input, found),
                        Ok(None) => break,
                        Err(error) => self.fail(cx, &mut input, error),
                    }
                }
                Mode::Raw { left } => {
                    if !self.buffer.descriptors.is_empty() {
                        self.deliver_stranded_descriptor(cx);
                    } else if let Some(found) = self.buffer.find_raw(input, left) {
                        self.deliver_raw(cx, &mut input, found, left);
                    } else {
                        self.buffer.shrink();
                        break;
                    }
                }
                Mode::Failed => {}
            }
        }
        self.limit_reads(cx);
    }

    fn deliver_frame<T>(&mut self, cx: &mut Context<'_, T>, input: &mut &[u8], found: Found)
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        if self.was_truncated() {
            self.close_descriptors(cx);
            self.call(cx, input, found, Usable::Whole, |receiver, cx, frame| {
                receiver.frame_truncated(cx, frame);
            });
            return;
        }
        if self.buffer.descriptors.is_empty() {
            self.call(cx, input, found, Usable::Whole, |receiver, cx, frame| {
                receiver.frame_received(cx, frame);
            });
            return;
        }
        let mut descriptors = std::mem::take(&mut self.buffer.descriptors);
        let mut offered = ReceivedDescriptors::new(&mut descriptors);
        self.call(cx, input, found, Usable::Whole, |receiver, cx, frame| {
            receiver.frame_with_descriptors(cx, frame, &mut offered);
        });
        cx.transport.close_unclaimed(offered.collect());
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
        self.call(
            cx,
            input,
            found,
            Usable::FromByte(0),
            |receiver, cx, data| {
                receiver.raw_data_received(cx, data);
            },
        );
    }

    /// Delivers one descriptor of a frame that is raw data now.
    fn deliver_stranded_descriptor<T>(&mut self, cx: &mut Context<'_, T>)
    where
        T: Transport + ?Sized,
        R: FrameReceiver<T, F>,
    {
        let fd = self.buffer.descriptors.remove(0);
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
        let Some(rest) = self.buffer.find_raw(input, u64::MAX) else {
            // Descriptors without a byte: no transport delivers that.
            return cx.transport.lose_connection();
        };
        self.call(
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
    fn call<T, A>(
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
                descriptors: &mut buffer.descriptors,
                changes: Changes::default(),
            },
        };
        let answer = callback(&mut self.receiver, &mut frame_cx, bytes);
        let Changes {
            framing_changed,
            rest_taken,
            used,
        } = frame_cx.framing.changes;

        let unused = match (usable, used) {
            (Usable::FromByte(least), Some(used)) => found.len().saturating_sub(used.max(least)),
            _ => 0,
        };
        match found {
            Found::Kept { end, .. } => {
                buffer.start = end - unused;
                if rest_taken {
                    buffer.kept.truncate(end);
                    *input = &[];
                }
            }
            Found::Input { end, .. } => {
                let upto = if rest_taken { end } else { input.len() };
                *input = &input[end - unused..upto];
            }
        }
        if framing_changed {
            buffer.forget();
        }
        if rest_taken {
            self.close_descriptors(cx);
        }
        if self.buffer.descriptors.is_empty() {
            self.wait_no_more();
        }
        (answer, framing_changed)
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
        let at = self.buffer.start;
        let nothing = Found::Kept {
            payload: at..at,
            end: at,
        };
        self.call(
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
            self.deliver_all(cx, &[]);
        }
        answer
    }

    /// Lets no read pass the end of the present frame.
    fn limit_reads<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        if matches!(self.descriptors, Descriptors::Loose) {
            return;
        }
        let limit = match self.mode {
            // With a whole frame at hand reading is paused.
            Mode::Frames => Some(self.buffer.bytes_wanted().unwrap_or(NonZeroUsize::MIN)),
            Mode::Raw { left: u64::MAX } | Mode::Failed => None,
            Mode::Raw { left } => NonZeroUsize::new(usize::try_from(left).unwrap_or(usize::MAX)),
        };
        cx.transport.set_read_limit(limit);
    }

    fn close_descriptors<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        if !self.buffer.descriptors.is_empty() {
            let descriptors = std::mem::take(&mut self.buffer.descriptors);
            cx.transport.close_unclaimed(descriptors);
            self.wait_no_more();
        }
    }

    /// Has the frame, which has its first descriptor, be complete in time.
    fn wait_for_frame<T: Transport + ?Sized>(&mut self, cx: &mut Context<'_, T>) {
        if let Descriptors::WithFrame(it) = &mut self.descriptors
            && let Some(deadline) = it.deadline
        {
            let timeout = it.timeout.get_or_insert_with(|| {
                Timeout::with_action(move |reactor, handle| {
                    // While we do not read the peer cannot finish it.
                    if let Some(transport) = reactor.get(handle)
                        && !transport.is_reading_paused()
                    {
                        log::warn!(
                            target: log::DESCRIPTORS,
                            "{}: descriptors from {} waited {deadline:?} for the rest of their frame: closing",
                            handle.token(),
                            transport.peer(),
                        );
                        transport.abort_connection();
                    }
                })
            });
            timeout.set(cx, Some(deadline));
        }
    }

    /// The descriptors of the present frame have gone one way or the other.
    fn wait_no_more(&self) {
        if let Descriptors::WithFrame(WithFrame {
            timeout: Some(timeout),
            ..
        }) = &self.descriptors
        {
            timeout.suspend();
        }
    }

    /// Whether descriptors of the present frame were lost. Asked once.
    fn was_truncated(&mut self) -> bool {
        match &mut self.descriptors {
            Descriptors::WithFrame(it) => std::mem::take(&mut it.truncated),
            Descriptors::Loose => false,
        }
    }

    /// The limit of descriptors, if the present frame has exceeded it. Asked
    /// once.
    fn exceeded_limit(&mut self) -> Option<usize> {
        match &mut self.descriptors {
            Descriptors::WithFrame(it) => std::mem::take(&mut it.exceeded).then_some(it.max),
            Descriptors::Loose => None,
        }
    }
}

/// What the receiver may leave of the bytes it is given.
#[derive(Clone, Copy)]
enum Usable {
    Whole,
    /// All from this one on.
    FromByte(usize),
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
        self.deliver_all(cx, data);
    }

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        match (&mut self.descriptors, self.mode) {
            (_, Mode::Failed) => Err(fd),
            (Descriptors::WithFrame(it), Mode::Frames) => {
                if self.buffer.descriptors.len() >= it.max {
                    it.exceeded = true;
                    return Err(fd);
                }
                self.buffer.descriptors.push(fd);
                if self.buffer.descriptors.len() == 1 {
                    self.wait_for_frame(cx);
                }
                Ok(())
            }
            _ => self.forward(cx, |receiver, cx| receiver.file_descriptor_received(cx, fd)),
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
        if let Descriptors::WithFrame(it) = &mut self.descriptors
            && self.mode == Mode::Frames
        {
            it.truncated = after == AfterTruncation::KeepConnection;
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

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        self.notify(cx, |receiver, cx| receiver.connection_lost(cx, reason));
        self.buffer.clear();
        self.close_descriptors(cx);
        if let Descriptors::WithFrame(WithFrame {
            timeout: Some(timeout),
            ..
        }) = &mut self.descriptors
        {
            timeout.cancel(cx.reactor);
        }
    }

    fn reading_resumed(&mut self, cx: &mut Context<'_, T>) {
        if !self.buffer.descriptors.is_empty() {
            self.wait_for_frame(cx);
        }
        self.notify(cx, |receiver, cx| receiver.reading_resumed(cx));
        self.deliver_all(cx, &[]);
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, T>) {
        if let Descriptors::WithFrame(WithFrame {
            timeout: Some(timeout),
            ..
        }) = &mut self.descriptors
        {
            timeout.reattached(cx);
        }
        self.forward(cx, |receiver, cx| receiver.connection_reattached(cx));
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

    fn log_prefix(&self) -> Cow<'_, str> {
        self.receiver.log_prefix()
    }
}

#[cfg(test)]
mod tests;
