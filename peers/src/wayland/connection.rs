//! Either end of a connection.

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

/// How many descriptors libwayland keeps that no message has claimed.
const MAX_WAITING: usize = 1_024;

/// `wl_display.error`, its codes, and `wl_display.delete_id`.
const ERROR: u16 = 0;
const DELETE_ID: u16 = 1;
const INVALID_OBJECT: u32 = 0;
const INVALID_METHOD: u32 = 1;

/// A protocol of a client, for a connector or [`adopt`](bowline::Transports::adopt).
pub fn client<P>(peer: P) -> Framed<WaylandFramer, WaylandConnection<P>> {
    connection(End::Client, peer)
}

/// A protocol of a compositor, for the factory of a listener.
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

/// The callbacks of one end of a connection. All the promises of
/// [`Protocol`](bowline::Protocol) hold.
pub trait WaylandPeer<T: UnixTransport + ?Sized>: 'static {
    /// The connection is there. Called once, first.
    fn connection_made(&mut self, cx: &mut WaylandContext<'_, T>) {
        let _ = cx;
    }

    /// A message has come: a request for a compositor, an event for a client. Its arguments
    /// are as its signature says. The objects that it makes are there already. An object
    /// that it destroys is there until this returns.
    ///
    /// The new object of `wl_registry.bind` is not there yet: its interface is an argument.
    /// See [`WaylandContext::register`].
    ///
    /// `wl_display.delete_id` is not told, nor what comes from objects that were destroyed
    /// here. Arguments that were not taken are dropped, which closes descriptors.
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

/// A message was not sent; hands back its descriptors.
#[derive(Debug)]
pub struct WaylandSendError {
    /// Why.
    pub kind: WaylandSendErrorKind,
    /// The descriptors among its arguments, in order.
    pub descriptors: Vec<PassedDescriptor>,
}

/// Why a message was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WaylandSendErrorKind {
    /// There is no such object, or it is gone.
    NoObject,
    /// Its interface has no request, or event, of this name.
    NoMessage,
    /// The arguments are not those of the signature, or a new object's number is taken.
    Arguments,
    /// It is too long for the peer, or has too many descriptors.
    TooLong,
    /// The transport refuses.
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

/// Everything a callback of a [`WaylandPeer`] can reach.
#[derive(Debug)]
pub struct WaylandContext<'a, T: ?Sized> {
    /// The connection's transport.
    pub transport: &'a mut T,
    /// The reactor that drives it.
    pub reactor: &'a mut Reactor,
    objects: &'a mut Objects,
}

impl<T: UnixTransport + ?Sized> WaylandContext<'_, T> {
    /// A number for an object that this end makes. It is there once a message was sent that
    /// makes it. Numbers of objects that are gone are given again, when the peer knows it.
    pub fn new_id(&mut self) -> u32 {
        self.objects.new_id()
    }

    /// What an object is. `None` if there is none of this number, or it was destroyed here.
    pub fn interface(&self, object: u32) -> Option<&'static Interface> {
        let (interface, is_gone) = self.objects.get(object)?;
        (!is_gone).then_some(interface)
    }

    /// Sends the message of this name from, or for, an object: a request of a client, an
    /// event of a compositor. It is one call, with its descriptors on its first byte.
    ///
    /// Objects that it makes are there from here on; one that it destroys is gone.
    ///
    /// # Errors
    ///
    /// It is not as the object's interface says, or cannot be sent. Nothing is sent, and the
    /// descriptors come back.
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

    /// Binds a global of the registry, as a client; the number of the new object.
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

    /// Adds an object that the peer has made by a message which does not fix its interface,
    /// `wl_registry.bind`. If the number is not one that the peer may give, that is an error
    /// of the peer's, the connection ends, and the answer is `false`.
    pub fn register(&mut self, id: u32, interface: &'static Interface) -> bool {
        let is_new = self.objects.made_by_peer(id, interface);
        if !is_new {
            self.fail(DISPLAY, INVALID_OBJECT, &format!("invalid new id {id}"));
        }
        is_new
    }

    /// Ends the connection because of an error of the client's, as a compositor, and says
    /// which: a code of the object's interface, and a text for people. As a client it only
    /// ends the connection.
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

    /// What a message of this name is, if it may be sent.
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

    /// Says something of the display's own.
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

/// The receiver of [`client`] and [`server`].
#[derive(Debug)]
pub struct WaylandConnection<P> {
    peer: P,
    objects: Objects,
}

type Cx<'a, T> = FrameContext<'a, T, WaylandFramer>;

impl<P: 'static> WaylandConnection<P> {
    /// The peer.
    pub fn peer(&self) -> &P {
        &self.peer
    }

    /// The peer.
    pub fn peer_mut(&mut self) -> &mut P {
        &mut self.peer
    }

    /// Calls `act` with the peer and with what its callbacks can reach: for timers, which get
    /// here through [`call_protocol`](bowline::Transports::call_protocol), for a part of the
    /// type `WaylandConnection<P>`.
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

    /// What a frame says, or what is wrong with it: of which object, by which code.
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
