//! A last word to clients that are declined.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bowline_protocol::{
    AfterReadClosed, Context, Packet, PacketProtocol, PacketTransport, Protocol, Transport,
};

/// How long a declined client has to read the word and close. If it has sent something,
/// and we closed first, a reset would destroy the word.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many clients may have that time at once. A flood of them must not hold
/// descriptors.
const MOST: usize = 64;

/// The words of a listener to clients that it declines.
#[derive(Default)]
pub(super) struct Farewells {
    /// The word for the next client.
    word: Option<Box<[u8]>>,
    /// How many clients are being told. Shared with them; `Some` from the first one on.
    open: Option<Rc<Cell<usize>>>,
}

impl Farewells {
    pub(super) fn say_next(&mut self, word: &[u8]) {
        self.word = Some(word.into());
    }

    /// Drops the word, since the client is served.
    #[inline]
    pub(super) fn forget(&mut self) {
        self.word = None;
    }

    /// The word for the client at hand, if there is one and not too many are being
    /// told.
    pub(super) fn next(&mut self) -> Option<Farewell> {
        let word = self.word.take()?;
        let open = self.open.get_or_insert_default();
        if open.get() >= MOST {
            return None;
        }
        open.set(open.get() + 1);
        let open = Rc::clone(open);
        Some(Farewell { word, open })
    }
}

/// The protocol of a declined connection. It sends its word, and reads until the client
/// is gone.
#[allow(unnameable_types, reason = "nobody outside of this crate has one")]
#[derive(Debug)]
pub struct Farewell {
    word: Box<[u8]>,
    open: Rc<Cell<usize>>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        self.open.set(self.open.get() - 1);
    }
}

impl<T: Transport> Protocol<T> for Farewell {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(&self.word);
        cx.transport.lose_write_connection();
        let me = cx.transport.handle();
        cx.reactor.call_later(PATIENCE, move |reactor| {
            if let Some(transport) = reactor.get(me) {
                transport.abort_connection();
            }
        });
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::KeepWriting
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Farewell {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.send(&self.word);
        cx.transport.lose_write_connection();
        let me = cx.transport.handle();
        cx.reactor.call_later(PATIENCE, move |reactor| {
            if let Some(transport) = reactor.get(me) {
                transport.abort_connection();
            }
        });
    }

    fn packet_received(&mut self, _: &mut Context<'_, T>, _: &mut Packet<'_>) {}

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::KeepWriting
    }
}
