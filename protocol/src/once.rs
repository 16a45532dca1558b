//! A factory of one protocol.

use std::borrow::Cow;
use std::fmt;

use crate::address::Address;
use crate::error::ConnectError;
use crate::factory::{BuildContext, Factory};
use crate::protocol::short_type_name;

/// A factory that has one protocol, for one connection.
///
/// With a connector: connects once, with this protocol. With a listener: serves the first
/// who connects, and stops listening, so that exactly one is accepted; whoever waits behind
/// is closed with the listener. Works for streams and for packets.
///
/// Without [`on_failure`](Self::on_failure) an attempt that fails drops the protocol, and
/// nobody is told.
///
/// # Examples
///
/// ```
/// use bowline::{ConnectError, Context, Once, Protocol, Transport};
///
/// struct Question;
///
/// impl<T: Transport> Protocol<T> for Question {
///     fn connection_made(&mut self, cx: &mut Context<'_, T>) {
///         cx.transport.write(b"?\n");
///     }
///
///     fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
/// }
///
/// // To be given to `reactor.connect(Tcp::to(address), ask)`, say.
/// fn once() -> Once<Question> {
///     Once::new(Question).on_failure(|cx, _question, error: &ConnectError| {
///         eprintln!("nobody to be asked: {error}");
///         cx.reactor.stop().expect("it runs");
///     })
/// }
/// ```
pub struct Once<P> {
    /// There until it is built.
    protocol: Option<P>,
    on_failure: Option<OnFailure<P>>,
}

type OnFailure<P> = Box<dyn FnOnce(&mut BuildContext<'_>, P, &ConnectError)>;

impl<P> Once<P> {
    /// A factory of `protocol`.
    pub fn new(protocol: P) -> Self {
        Self {
            protocol: Some(protocol),
            on_failure: None,
        }
    }

    /// Sets what is called when the attempt to connect fails: with the protocol, and why.
    pub fn on_failure(
        mut self,
        call: impl FnOnce(&mut BuildContext<'_>, P, &ConnectError) + 'static,
    ) -> Self {
        self.on_failure = Some(Box::new(call));
        self
    }
}

impl<P> fmt::Debug for Once<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Once")
            .field("is_built", &self.protocol.is_none())
            .finish_non_exhaustive()
    }
}

impl<P: 'static> Factory for Once<P> {
    type Protocol = P;

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<P> {
        if let Some(listener) = cx.listener() {
            listener.stop_listening();
        }
        self.protocol.take()
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        if let (Some(protocol), Some(call)) = (self.protocol.take(), self.on_failure.take()) {
            call(cx, protocol, error);
        }
    }

    fn log_prefix(&self) -> Cow<'_, str> {
        Cow::Borrowed(short_type_name::<P>())
    }
}
