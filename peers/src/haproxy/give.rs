//! The end that gives listeners.

use std::collections::VecDeque;
use std::fmt;

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::{PassedDescriptor, Reactor, UnixTransport};

use super::framing::{GetsocksFramer, GetsocksPart, ListenerName, MAX_BATCH};

/// Makes a protocol that gives listeners to a process that asks for them, as HAProxy does
/// on its stats socket. It is for the factory of a listening UNIX socket. Only processes
/// that may have the listeners should be able to connect
/// ([`mode`](bowline::endpoint::UnixListen::mode) 0600).
///
/// `listeners` is called for each request, and returns what to give. The connection ends
/// when everything has been sent. Any request other than `_getsocks` is answered with a
/// line that says so, and ends the connection.
///
/// HAProxy starts with listeners of this program if it is run as `haproxy -x PATH`. It
/// recognises them by their addresses. It binds what is in its configuration and was not
/// given. It closes what was given and is not in its configuration. It must be given at
/// least one.
pub fn give_listeners(
    listeners: impl FnMut(&mut Reactor) -> Vec<GivenListener> + 'static,
) -> Framed<GetsocksFramer, Giver> {
    let giver = Giver {
        listeners: Box::new(listeners),
        left: VecDeque::new(),
        max_batch: MAX_BATCH,
    };
    // Who asks sends no descriptors, in no part.
    Framed::new(GetsocksFramer::new(GetsocksPart::Request), giver)
        .pairing(Pairing::Claimed(Unclaimed::Fail))
}

/// A listener to give.
#[derive(Debug)]
pub struct GivenListener {
    /// The listening socket. If it is [shared](PassedDescriptor::shared), we keep it as
    /// well.
    pub fd: PassedDescriptor,
    /// Where it belongs, besides its address. HAProxy compares it.
    pub name: ListenerName,
}

impl<F: Into<PassedDescriptor>> From<F> for GivenListener {
    /// Makes one in the network namespace of this process, bound to no interface.
    fn from(fd: F) -> Self {
        Self {
            fd: fd.into(),
            name: ListenerName::default(),
        }
    }
}

type Listeners = Box<dyn FnMut(&mut Reactor) -> Vec<GivenListener>>;

/// The receiver that [`give_listeners`] puts into its [`Framed`].
pub struct Giver {
    listeners: Listeners,
    left: VecDeque<GivenListener>,
    max_batch: usize,
}

impl Giver {
    /// Sets how many listeners are sent at once, from 1 to 252; default 252.
    pub fn set_max_batch(&mut self, count: usize) {
        self.max_batch = count.clamp(1, MAX_BATCH);
    }

    fn begin<T: UnixTransport>(&mut self, cx: &mut FrameContext<'_, T, GetsocksFramer>) {
        self.left = (self.listeners)(cx.reactor).into();
        let Ok(count) = i32::try_from(self.left.len()) else {
            return cx.transport.abort_connection();
        };
        // In a call of its own, since it is read without its descriptors.
        cx.transport.write(&count.to_ne_bytes());
        let acknowledgements = GetsocksPart::Acknowledgements;
        cx.framing.framer_mut().set_part(acknowledgements);
        self.send_batch(cx);
    }

    fn send_batch<T: UnixTransport>(&mut self, cx: &mut FrameContext<'_, T, GetsocksFramer>) {
        let count = self.left.len().min(self.max_batch);
        if count > 0 {
            let (mut records, mut descriptors) = (Vec::new(), Vec::with_capacity(count));
            for GivenListener { fd, name } in self.left.drain(..count) {
                let framer = cx.framing.framer();
                if let Err(error) = framer.encode(&name, b"", 1, &mut records) {
                    log::warn!(target: "bowline::peers", "a listener was not given: {error}");
                    return cx.transport.abort_connection();
                }
                descriptors.push(fd);
            }
            let sent = cx.transport.write_with_descriptors(&records, descriptors);
            if let Err(error) = sent {
                log::warn!(target: "bowline::peers", "listeners were not given: {error}");
                return cx.transport.abort_connection();
            }
        }
        if self.left.is_empty() {
            // As HAProxy, which does not wait for the last acknowledgement.
            cx.transport.lose_connection();
        }
    }
}

impl<T: UnixTransport> FrameReceiver<T, GetsocksFramer> for Giver {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, GetsocksFramer>, frame: &[u8]) {
        match cx.framing.framer().part() {
            GetsocksPart::Request if frame == b"_getsocks" => self.begin(cx),
            GetsocksPart::Request => {
                cx.transport
                    .write(b"Unknown command; only _getsocks is served.\n");
                cx.transport.lose_connection();
            }
            // Which number it says does not matter, to HAProxy neither.
            _ => self.send_batch(cx),
        }
    }
}

impl fmt::Debug for Giver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Giver")
            .field("left", &self.left)
            .field("max_batch", &self.max_batch)
            .finish_non_exhaustive()
    }
}
