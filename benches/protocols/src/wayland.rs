//! A compositor that takes surfaces and pools, and shows nothing.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use bowline::{
    Address, CloseReason, Linger, Reactor, Transports as _, Unix, UnixStream, UnixTransport as _,
};
use bowline_peers::wayland::{
    Argument, Interface, WaylandContext, WaylandMessage, WaylandPeer, WaylandSendError, interfaces,
    server,
};
use rustix::event::{PollFd, PollFlags, poll};
use wayland_server::backend::{ClientData, ClientId, DisconnectReason};
use wayland_server::protocol::wl_callback::WlCallback;
use wayland_server::protocol::wl_compositor::{self, WlCompositor};
use wayland_server::protocol::wl_shm::{self, WlShm};
use wayland_server::protocol::wl_shm_pool::{self, WlShmPool};
use wayland_server::protocol::wl_surface::{self, WlSurface};
use wayland_server::{Client, DataInit, Dispatch, Display, DisplayHandle, GlobalDispatch, New};

use crate::generator::{Wire, borrowed, files, word};
use crate::peer::{Peer, Process};
use crate::{Outcome, Session, Work};

pub(crate) const PEERS: &[Peer] = &[
    Peer::rust("bowline"),
    Peer::rust("bowline, trusting"),
    Peer::rust("wayland-server"),
    Peer {
        name: "libwayland",
        source: Some(("with_libwayland.c", "libwayland-dev", "wayland-server")),
    },
];

/// Frames at once, or pools.
const MANY: usize = 100;

pub(crate) const WORKS: &[Work] = &[
    Work {
        name: "301 requests at once",
        kind: "wayland",
        times: 60,
        messages: 3 * MANY + 1,
        connect,
        detail: (0, 3 * MANY),
    },
    Work {
        name: "a frame at once: 4 requests, 2 events",
        kind: "wayland",
        times: 3_000,
        messages: 4,
        connect,
        detail: (0, 0),
    },
    Work {
        name: "a pool at once: 2 requests, 1 descriptor",
        kind: "wayland",
        times: 3_000,
        messages: 3,
        connect,
        detail: (1, 1),
    },
    Work {
        name: "100 pools at once: 201 requests, 100 descriptors",
        kind: "wayland",
        times: 60,
        messages: 2 * MANY + 1,
        connect,
        detail: (1, MANY),
    },
];

pub(crate) fn serve(peer: &str, socket: &Path) -> Outcome {
    match peer {
        "bowline" => with_bowline(socket, Linger::Clear),
        "bowline, trusting" => with_bowline(socket, Linger::Keep),
        _ => with_wayland_server(socket),
    }
}

static GLOBALS: [(&Interface, u32); 2] =
    [(&interfaces::WL_COMPOSITOR, 4), (&interfaces::WL_SHM, 1)];

struct Ours {
    /// Of sockets that a client passes, which may be trusted or not.
    linger: Linger,
    callbacks: Vec<u32>,
    seen: u64,
    serial: u32,
}

type Cx<'a> = WaylandContext<'a, UnixStream>;

impl Ours {
    fn handle(
        &mut self,
        cx: &mut Cx<'_>,
        message: &mut WaylandMessage<'_>,
    ) -> Result<(), WaylandSendError> {
        match (message.interface.name, message.name()) {
            ("wl_display", "sync") => {
                self.serial += 1;
                cx.send(message.object(0), "done", [Argument::Uint(self.serial)])?;
            }
            ("wl_display", "get_registry") => {
                for (number, (interface, version)) in (1..).zip(GLOBALS) {
                    let name = Argument::String(Some(interface.name.as_bytes()));
                    let global = [Argument::Uint(number), name, Argument::Uint(version)];
                    cx.send(message.object(0), "global", global)?;
                }
            }
            ("wl_registry", "bind") => {
                let global = GLOBALS[message.uint(0) as usize - 1].0;
                cx.register(message.object(3), global);
            }
            ("wl_surface", "attach") => self.seen += u64::from(message.object(0)),
            ("wl_surface", "damage_buffer") => self.seen += message.int(2) as u64,
            ("wl_surface", "frame") => self.callbacks.push(message.object(0)),
            ("wl_surface", "commit") => {
                for callback in self.callbacks.drain(..) {
                    cx.send(callback, "done", [Argument::Uint(1)])?;
                }
            }
            ("wl_shm", "create_pool") => drop(message.take_descriptor(1)),
            _ => {}
        }
        Ok(())
    }
}

impl WaylandPeer<UnixStream> for Ours {
    fn connection_made(&mut self, cx: &mut Cx<'_>) {
        cx.transport.set_received_linger(self.linger);
    }

    fn message_received(&mut self, cx: &mut Cx<'_>, message: &mut WaylandMessage<'_>) {
        self.handle(cx, message).expect("well-formed");
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
        let _ = reactor.stop();
    }
}

fn with_bowline(socket: &Path, linger: Linger) -> Outcome {
    let mut reactor = Reactor::new()?;
    reactor.listen(Unix::at(socket), move |_: &Address| {
        server(Ours {
            linger,
            callbacks: Vec::new(),
            seen: 0,
            serial: 0,
        })
    })?;
    reactor.run()?;
    Ok(())
}

#[derive(Default)]
struct Theirs {
    callbacks: Vec<WlCallback>,
    seen: u64,
}

struct TheirClient;

impl ClientData for TheirClient {
    fn initialized(&self, _: ClientId) {}

    fn disconnected(&self, _: ClientId, _: DisconnectReason) {
        std::process::exit(0);
    }
}

impl GlobalDispatch<WlCompositor, ()> for Theirs {
    fn bind(
        _: &mut Self,
        _: &DisplayHandle,
        _: &Client,
        new: New<WlCompositor>,
        (): &(),
        init: &mut DataInit<'_, Self>,
    ) {
        init.init(new, ());
    }
}

impl GlobalDispatch<WlShm, ()> for Theirs {
    fn bind(
        _: &mut Self,
        _: &DisplayHandle,
        _: &Client,
        new: New<WlShm>,
        (): &(),
        init: &mut DataInit<'_, Self>,
    ) {
        init.init(new, ());
    }
}

macro_rules! dispatch {
    ($object:ty, $request:ty, |$state:ident, $received:ident, $init:ident| $act:expr) => {
        impl Dispatch<$object, ()> for Theirs {
            fn request(
                $state: &mut Self,
                _: &Client,
                _: &$object,
                $received: $request,
                (): &(),
                _: &DisplayHandle,
                $init: &mut DataInit<'_, Self>,
            ) {
                $act
            }
        }
    };
}

dispatch!(
    WlCompositor,
    wl_compositor::Request,
    |_state, request, init| {
        if let wl_compositor::Request::CreateSurface { id } = request {
            init.init(id, ());
        }
    }
);
dispatch!(WlShm, wl_shm::Request, |_state, request, init| {
    if let wl_shm::Request::CreatePool { id, fd, .. } = request {
        drop::<OwnedFd>(fd);
        init.init(id, ());
    }
});
dispatch!(
    WlShmPool,
    wl_shm_pool::Request,
    |_state, _request, _init| {}
);
dispatch!(
    WlCallback,
    wayland_server::protocol::wl_callback::Request,
    |_state, _request, _init| {}
);
dispatch!(
    WlSurface,
    wl_surface::Request,
    |state, request, init| match request {
        wl_surface::Request::Attach { buffer, .. } => state.seen += u64::from(buffer.is_some()),
        wl_surface::Request::DamageBuffer { width, .. } => state.seen += width as u64,
        wl_surface::Request::Frame { callback } => state.callbacks.push(init.init(callback, ())),
        wl_surface::Request::Commit =>
            for callback in state.callbacks.drain(..) {
                callback.done(1);
            },
        _ => {}
    }
);

fn with_wayland_server(socket: &Path) -> Outcome {
    let mut display = Display::<Theirs>::new()?;
    let mut handle = display.handle();
    handle.create_global::<Theirs, WlCompositor, ()>(4, ());
    handle.create_global::<Theirs, WlShm, ()>(1, ());
    let stream = UnixListener::bind(socket)?.accept()?.0;
    handle.insert_client(stream, Arc::new(TheirClient))?;
    let mut state = Theirs::default();
    loop {
        {
            let ready = display.backend();
            let mut watched = [PollFd::from_borrowed_fd(ready.poll_fd(), PollFlags::IN)];
            poll(&mut watched, None)?;
        }
        display.dispatch_clients(&mut state)?;
        display.flush_clients()?;
    }
}

/// The numbers of objects.
const DISPLAY: u32 = 1;
const REGISTRY: u32 = 2;
const COMPOSITOR: u32 = 3;
const SHM: u32 = 4;
const SURFACE: u32 = 5;
/// Pools have the next ones, and callbacks two behind those by turns: no server takes a
/// number before those below it.
const POOL: u32 = 6;

fn length(bytes: &[u8]) -> Option<usize> {
    Some(word(bytes, 4)? as usize >> 16)
}

fn put(out: &mut Vec<u8>, object: u32, opcode: u32, arguments: &[u32]) {
    let size = 8 + 4 * arguments.len() as u32;
    for word in [object, size << 16 | opcode].iter().chain(arguments) {
        out.extend(word.to_ne_bytes());
    }
}

fn put_bind(out: &mut Vec<u8>, global: u32, interface: &str, version: u32, id: u32) {
    let mut arguments = vec![global, interface.len() as u32 + 1];
    let mut text = interface.as_bytes().to_vec();
    text.resize((text.len() + 1).next_multiple_of(4), 0);
    arguments.extend(text.chunks(4).filter_map(|chunk| word(chunk, 0)));
    arguments.extend([version, id]);
    put(out, REGISTRY, 0, &arguments);
}

struct Requests {
    wire: Wire,
    /// What is sent before the last request, in calls of their own where descriptors are.
    messages: Vec<Vec<u8>>,
    files: Vec<OwnedFd>,
    /// The last request ends in a callback, whose number is put there: of a frame, with its
    /// commit, or of the display.
    is_frame: bool,
    callbacks: [u32; 2],
    /// How many numbers of objects come back.
    deleted: usize,
}

fn connect(process: &Process, work: &Work) -> Outcome<Box<dyn Session>> {
    let mut wire = Wire::connect(process)?;
    let mut out = Vec::new();
    put(&mut out, DISPLAY, 1, &[REGISTRY]);
    wire.send(&out, &[])?;
    out.clear();
    for (interface, version, id) in [("wl_compositor", 4, COMPOSITOR), ("wl_shm", 1, SHM)] {
        // The globals come in any order; the text begins behind its length.
        let global = loop {
            let event = wire.next(length)?;
            if event[16..].starts_with(format!("{interface}\0").as_bytes()) {
                break word(event, 8).ok_or("a short event")?;
            }
        };
        put_bind(&mut out, global, interface, version, id);
    }
    put(&mut out, COMPOSITOR, 0, &[SURFACE]);
    wire.send(&out, &[])?;
    let (descriptors, count) = work.detail;
    let mut messages = Vec::new();
    for number in 0..count as u32 {
        let mut message = Vec::new();
        match (descriptors, number % 3) {
            (0, 0) => put(&mut message, SURFACE, 1, &[0, 0, 0]),
            (0, 1) => put(&mut message, SURFACE, 9, &[0, 0, 1, 1]),
            (0, _) => put(&mut message, SURFACE, 6, &[]),
            _ => {
                put(&mut message, SHM, 0, &[POOL + number, 4_096]);
                put(&mut message, POOL + number, 1, &[]);
            }
        }
        messages.push(message);
    }
    if descriptors == 0 {
        messages = vec![messages.concat()];
    }
    Ok(Box::new(Requests {
        wire,
        messages,
        files: files(descriptors)?,
        is_frame: count == 0,
        callbacks: [0, 1].map(|turn| POOL + (descriptors * count) as u32 + turn),
        deleted: descriptors * count + 1,
    }))
}

impl Session for Requests {
    fn run(&mut self, times: usize) -> Outcome {
        let files = borrowed(&self.files);
        for _ in 0..times {
            let [callback, next] = self.callbacks;
            self.callbacks = [next, callback];
            let mut last = Vec::new();
            if self.is_frame {
                put(&mut last, SURFACE, 1, &[0, 0, 0]);
                put(&mut last, SURFACE, 9, &[0, 0, 1, 1]);
                put(&mut last, SURFACE, 3, &[callback]);
                put(&mut last, SURFACE, 6, &[]);
            } else {
                for message in &self.messages {
                    self.wire.send(message, &files)?;
                }
                put(&mut last, DISPLAY, 0, &[callback]);
            }
            self.wire.send(&last, &[])?;
            let (mut deleted, mut is_done) = (0, false);
            while deleted < self.deleted || !is_done {
                let event = self.wire.next(length)?;
                match (word(event, 0), word(event, 4).map(|it| it & 0xffff)) {
                    (Some(DISPLAY), Some(1)) => deleted += 1,
                    (Some(object), Some(0)) if object == callback => is_done = true,
                    // Formats, and whatever else is said unasked.
                    (Some(SHM), _) => {}
                    _ => return Err(format!("said: {}", event.escape_ascii()).into()),
                }
            }
        }
        Ok(())
    }
}
