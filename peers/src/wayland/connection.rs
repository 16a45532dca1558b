//! Both ends of a connection.

use std::fmt;

use bowline::framing::{
    EncodeError, FrameContext, FrameEncoder as _, FrameReceiver, Framed, FramingError, Pairing,
    Unclaimed,
};
use bowline::{CloseReason, Context, PassedDescriptor, Reactor, UnixTransport, WriteStatus};

use super::DISPLAY;
use super::arguments::{Argument, WaylandMessage, read};
use super::framing::{WaylandFramer, WaylandHeader};
use super::interfaces::{Interface, Signature};
use super::objects::{End, Objects};

/// How many unclaimed descriptors libwayland keeps.
const MAX_WAITING: usize = 1_024;

/// The opcodes of `wl_display.error`, with its codes, and of `wl_display.delete_id`.
const ERROR: u16 = 0;
const DELETE_ID: u16 = 1;
const INVALID_OBJECT: u32 = 0;
const INVALID_METHOD: u32 = 1;

/// Makes the protocol of a client, for a connector or
/// [`adopt`](bowline::Transports::adopt).
pub fn client<P>(peer: P) -> Framed<WaylandFramer, WaylandConnection<P>> {
    connection(End::Client, peer)
}

/// Makes the protocol of a compositor, for the factory of a listener.
pub fn server<P>(peer: P) -> Framed<WaylandFramer, WaylandConnection<P>> {
    connection(End::Server, peer)
}

fn connection<P>(end: End, peer: P) -> Framed<WaylandFramer, WaylandConnection<P>> {
    let connection = WaylandConnection {
        peer,
        objects: Objects::new(end),
    };
    Framed::new(WaylandFramer::new(), connection)
        .pairing(Pairing::Claimed(Unclaimed::Wait))
        .max_waiting(MAX_WAITING)
}

/// The callbacks of one end of a connection. Everything that
/// [`Protocol`](bowline::Protocol) promises holds for them.
pub trait WaylandPeer<T: UnixTransport + ?Sized>: 'static {
    /// The connection has been made. Called once, first.
    fn connection_made(&mut self, cx: &mut WaylandContext<'_, T>) {
        let _ = cx;
    }

    /// A message has arrived: a request at a compositor, an event at a client. Its
    /// arguments fit its signature. Objects that it creates exist already. An object that
    /// it destroys exists until this returns.
    ///
    /// The new object of `wl_registry.bind` does not exist yet, since its interface is an
    /// argument. See [`WaylandContext::register`].
    ///
    /// This is not called for `wl_display.delete_id`, nor for messages from objects that
    /// were destroyed here. Arguments that are not taken are dropped, which closes
    /// descriptors.
    fn message_received(
        &mut self,
        cx: &mut WaylandContext<'_, T>,
        message: &mut WaylandMessage<'_>,
    );

    /// The connection has ended. Called once, last.
    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        let _ = (reactor, reason);
    }
}

/// Why a message was not sent. Returns its descriptors.
#[derive(Debug)]
pub struct WaylandSendError {
    /// The reason.
    pub kind: WaylandSendErrorKind,
    /// The descriptors among its arguments, in order.
    pub descriptors: Vec<PassedDescriptor>,
}

/// The reason why a message was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WaylandSendErrorKind {
    /// The object does not exist, or was destroyed.
    NoObject,
    /// Its interface has no request, or event, of this name.
    NoMessage,
    /// The arguments do not fit the signature, or the number of a new object is in use.
    Arguments,
    /// The message is too long for the peer, or has too many descriptors.
    TooLong,
    /// The transport refuses it.
    Transport,
}

impl fmt::Display for WaylandSendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            WaylandSendErrorKind::NoObject => "there is no such object",
            WaylandSendErrorKind::NoMessage => "its interface has no message of this name",
            WaylandSendErrorKind::Arguments => "the arguments are not those of the signature",
            WaylandSendErrorKind::TooLong => "message is too long",
            WaylandSendErrorKind::Transport => "the transport takes no message",
        })
    }
}

impl std::error::Error for WaylandSendError {}

/// What a callback of a [`WaylandPeer`] can use.
#[derive(Debug)]
pub struct WaylandContext<'a, T: ?Sized> {
    /// The connection's transport.
    pub transport: &'a mut T,
    /// The reactor.
    pub reactor: &'a mut Reactor,
    objects: &'a mut Objects,
}

impl<T: UnixTransport + ?Sized> WaylandContext<'_, T> {
    /// Returns a number for an object that this end creates. The object exists once a
    /// message that creates it was sent. Numbers of destroyed objects are used again, once
    /// the peer knows that they are gone.
    pub fn new_id(&mut self) -> u32 {
        self.objects.new_id()
    }

    /// Returns the interface of an object. `None` if there is no object with this number,
    /// or if it was destroyed here.
    pub fn interface(&self, object: u32) -> Option<&'static Interface> {
        let (interface, is_gone) = self.objects.get(object)?;
        (!is_gone).then_some(interface)
    }

    /// Sends a message to, or from, an object: a client sends the request `name`, a
    /// compositor the event. It is sent in one call, with its descriptors on its first
    /// byte.
    ///
    /// Objects that it creates exist from then on. An object that it destroys is gone.
    ///
    /// # Errors
    ///
    /// The message does not fit the object's interface, or it cannot be sent. Nothing is
    /// sent, and the error returns the descriptors.
    pub fn send<'b>(
        &mut self,
        object: u32,
        name: &str,
        arguments: impl Into<Vec<Argument<'b>>>,
    ) -> Result<WriteStatus, WaylandSendError> {
        let mut arguments = arguments.into();
        let found = self.check(object, name, &arguments);
        let mut bytes = Vec::new();
        arguments.iter().for_each(|it| it.write(&mut bytes));
        let descriptors = |it: &mut Argument<'b>| match it {
            Argument::Descriptor(fd) => fd.take(),
            _ => None,
        };
        let descriptors: Vec<_> = arguments.iter_mut().filter_map(descriptors).collect();
        let (opcode, signature) = match found {
            Ok(found) => found,
            Err(kind) => return Err(WaylandSendError { kind, descriptors }),
        };
        let header = WaylandHeader { object, opcode };
        let status = self.write(&header, &bytes, descriptors)?;
        if let Some(interface) = signature.creates {
            for it in &arguments {
                if let Argument::NewId(id) = it {
                    self.objects.add(*id, interface);
                }
            }
        }
        if signature.destroys {
            self.destroyed(object);
        }
        Ok(status)
    }

    /// Binds a global of the registry, as a client. Returns the number of the new object.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub fn bind(
        &mut self,
        registry: u32,
        global: u32,
        interface: &'static Interface,
        version: u32,
    ) -> Result<u32, WaylandSendError> {
        let id = self.objects.new_id();
        let arguments = [
            Argument::Uint(global),
            Argument::String(Some(interface.name.as_bytes())),
            Argument::Uint(version),
            Argument::NewId(id),
        ];
        self.send(registry, "bind", arguments)?;
        self.objects.add(id, interface);
        Ok(id)
    }

    /// Adds an object that the peer has created with a message that does not fix its
    /// interface: `wl_registry.bind`. Returns `false` if the peer may not use this number;
    /// then the connection ends with an error.
    pub fn register(&mut self, id: u32, interface: &'static Interface) -> bool {
        let is_new = self.objects.made_by_peer(id, interface);
        if !is_new {
            self.fail(DISPLAY, INVALID_OBJECT, &format!("invalid new id {id}"));
        }
        is_new
    }

    /// Ends the connection. A compositor tells the client the error: a code of the object's
    /// interface, and a text for people.
    pub fn fail(&mut self, object: u32, code: u32, text: &str) {
        log::debug!(target: "bowline::peers", "{}: {text}", self.transport.peer());
        if self.objects.end == End::Server {
            let arguments = [
                Argument::Object(object),
                Argument::Uint(code),
                Argument::String(Some(text.as_bytes())),
            ];
            let mut bytes = Vec::new();
            arguments.iter().for_each(|it| it.write(&mut bytes));
            self.say(ERROR, &bytes);
        }
        self.transport.lose_connection();
    }

    /// Returns the message of this name, if it may be sent.
    fn check(
        &self,
        object: u32,
        name: &str,
        arguments: &[Argument<'_>],
    ) -> Result<(u16, &'static Signature), WaylandSendErrorKind> {
        let interface = self.interface(object);
        let interface = interface.ok_or(WaylandSendErrorKind::NoObject)?;
        let mut signatures = self.objects.sent(interface).iter().enumerate();
        let found = signatures.find(|(_, signature)| signature.name == name);
        let (opcode, signature) = found.ok_or(WaylandSendErrorKind::NoMessage)?;
        let is_right = |((letter, may_be_missing), it): ((char, bool), &Argument<'_>)| {
            letter == it.letter()
                && (may_be_missing || it.is_there())
                && !matches!(it, Argument::NewId(id) if self.objects.get(*id).is_some())
                && !matches!(it, Argument::String(Some(text)) if text.contains(&0))
        };
        if signature.letters().count() != arguments.len()
            || !signature.letters().zip(arguments).all(is_right)
        {
            return Err(WaylandSendErrorKind::Arguments);
        }
        let opcode = u16::try_from(opcode).map_err(|_| WaylandSendErrorKind::NoMessage)?;
        Ok((opcode, signature))
    }

    fn write(
        &mut self,
        header: &WaylandHeader,
        bytes: &[u8],
        descriptors: Vec<PassedDescriptor>,
    ) -> Result<WriteStatus, WaylandSendError> {
        use bowline::framing::SendFrameErrorKind;
        let framer = WaylandFramer::new();
        if descriptors.is_empty() {
            let sent = framer.send_to(self.transport, header, bytes);
            return sent.map_err(|_: EncodeError| WaylandSendError {
                kind: WaylandSendErrorKind::TooLong,
                descriptors,
            });
        }
        let sent = framer.send_with_descriptors_to(self.transport, header, bytes, descriptors);
        sent.map_err(|error| WaylandSendError {
            kind: match error.kind {
                SendFrameErrorKind::Encode(_) => WaylandSendErrorKind::TooLong,
                _ => WaylandSendErrorKind::Transport,
            },
            descriptors: error.descriptors,
        })
    }

    /// Sends an event of the display.
    fn say(&mut self, opcode: u16, bytes: &[u8]) {
        let object = DISPLAY;
        let header = WaylandHeader { object, opcode };
        // A text that is too long for a message is not said.
        let _ = WaylandFramer::new().send_to(self.transport, &header, bytes);
    }

    fn destroyed(&mut self, object: u32) {
        if self.objects.destroyed(object) {
            self.say(DELETE_ID, &object.to_ne_bytes());
        }
    }
}

/// The receiver that [`client`] and [`server`] put into their [`Framed`].
#[derive(Debug)]
pub struct WaylandConnection<P> {
    peer: P,
    objects: Objects,
}

type Cx<'a, T> = FrameContext<'a, T, WaylandFramer>;

impl<P: 'static> WaylandConnection<P> {
    /// Returns the peer.
    pub fn peer(&self) -> &P {
        &self.peer
    }

    /// Returns the peer.
    pub fn peer_mut(&mut self) -> &mut P {
        &mut self.peer
    }

    /// Calls `act` with the peer and the context of its callbacks. A timer gets here with
    /// [`call_protocol`](bowline::Transports::call_protocol), for the type
    /// `WaylandConnection<P>`.
    pub fn call<T, A>(
        &mut self,
        cx: &mut Context<'_, T>,
        act: impl FnOnce(&mut P, &mut WaylandContext<'_, T>) -> A,
    ) -> A
    where
        T: UnixTransport + ?Sized,
    {
        let mut cx = WaylandContext {
            transport: &mut *cx.transport,
            reactor: &mut *cx.reactor,
            objects: &mut self.objects,
        };
        act(&mut self.peer, &mut cx)
    }

    /// Parses a frame. The error says what is wrong: of which object, the code, and a text.
    fn understand<'a, T: UnixTransport + ?Sized>(
        &self,
        cx: &mut Cx<'_, T>,
        frame: &'a [u8],
    ) -> Result<Option<WaylandMessage<'a>>, (u32, u32, String)> {
        let (WaylandHeader { object, opcode }, bytes) = WaylandHeader::of(frame);
        let Some((interface, is_gone)) = self.objects.get(object) else {
            return match self.objects.end {
                End::Server => Err((DISPLAY, INVALID_OBJECT, format!("invalid object {object}"))),
                // As libwayland: the server may speak of what was destroyed here.
                End::Client => Ok(None),
            };
        };
        let name = interface.name;
        let signatures = self.objects.received(interface);
        let signature = signatures.get(usize::from(opcode)).ok_or_else(|| {
            let text = format!("invalid method {opcode}, object {name}@{object}");
            (object, INVALID_METHOD, text)
        })?;
        let arguments = read(signature, bytes, cx.framing.descriptors()).ok_or_else(|| {
            let text = format!("invalid arguments for {name}@{object}.{}", signature.name);
            (object, INVALID_METHOD, text)
        })?;
        Ok((!is_gone).then_some(WaylandMessage {
            object,
            interface,
            opcode,
            signature,
            arguments,
        }))
    }
}

impl<T, P> FrameReceiver<T, WaylandFramer> for WaylandConnection<P>
where
    T: UnixTransport + ?Sized,
    P: WaylandPeer<T>,
{
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        self.call(&mut cx.as_context(), |peer, cx| peer.connection_made(cx));
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, frame: &[u8]) {
        let understood = self.understand(cx, frame);
        self.call(&mut cx.as_context(), |peer, cx| match understood {
            Ok(Some(mut message)) => deliver(peer, cx, &mut message),
            Ok(None) => {}
            Err((object, code, text)) => cx.fail(object, code, &text),
        });
    }

    fn framing_failed(&mut self, cx: &mut Cx<'_, T>, error: FramingError, _: &[u8]) {
        self.call(&mut cx.as_context(), |_, cx| {
            cx.fail(DISPLAY, INVALID_METHOD, &error.to_string());
        });
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, reason: &CloseReason) {
        self.peer.connection_lost(cx.reactor, reason);
    }
}

fn deliver<T, P>(peer: &mut P, cx: &mut WaylandContext<'_, T>, message: &mut WaylandMessage<'_>)
where
    T: UnixTransport + ?Sized,
    P: WaylandPeer<T>,
{
    if cx.objects.end == End::Client && message.object == DISPLAY && message.opcode == DELETE_ID {
        return cx.objects.deleted(message.uint(0));
    }
    if let Some(interface) = message.signature.creates {
        for it in &message.arguments {
            if let Argument::NewId(id) = it
                && !cx.register(*id, interface)
            {
                return;
            }
        }
    }
    peer.message_received(cx, message);
    if message.signature.destroys {
        cx.destroyed(message.object);
    }
}
