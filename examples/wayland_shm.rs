//! A compositor without a screen: what clients draw into shared memory is read there, and
//! a line is printed for each frame.
//!
//! ```text
//! cargo run --example wayland_shm -- --display /tmp/wayland --frames 60
//! WAYLAND_DISPLAY=/tmp/wayland weston-simple-shm
//! ```
//!
//! It has what a client needs to show one window: `wl_compositor`, `wl_shm`, `xdg_wm_base`.
//! A client passes its memory once, as a descriptor (`wl_shm.create_pool`), and from then on
//! only says which part of it is to be shown. A frame is asked for every 16 milliseconds.
//! There is no input.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod common;

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bowline::process::monotonic_microseconds;
use bowline::{
    Address, AnyConnection as _, CloseReason, Reactor, Transport, Transports, Unix, UnixStream,
    signal,
};
use bowline_peers::wayland::{
    Argument, Interface, WaylandConnection, WaylandContext, WaylandMessage, WaylandPeer,
    WaylandSendError, display_path, interfaces, server,
};

use common::{Arguments, Inspect};

const HELP: &str = "
A Wayland compositor without a screen.

Usage: wayland_shm [OPTIONS]

  --display PATH   where it listens [default: by WAYLAND_DISPLAY]
  --frames N       ends after so many frames
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this
";

/// What the registry offers: numbers are places, from 1.
static GLOBALS: [(&Interface, u32); 3] = [
    (&interfaces::WL_COMPOSITOR, 4),
    (&interfaces::WL_SHM, 1),
    (&interfaces::XDG_WM_BASE, 1),
];

/// How much of a client's memory is looked at.
const MOST: u64 = 1 << 28;

/// A part of a client's memory. 32 bits for each pixel, of which the first is blue.
struct Buffer {
    memory: Rc<File>,
    offset: u64,
    width: u32,
    height: u32,
    stride: u32,
}

#[derive(Default)]
struct Surface {
    /// What is shown with the next commit.
    attached: Option<u32>,
    callbacks: Vec<u32>,
    /// Its window: an `xdg_surface` and an `xdg_toplevel`.
    window: Option<(u32, u32)>,
    is_configured: bool,
}

#[derive(Default)]
struct Client {
    /// How many more frames of all clients are shown, if that is limited.
    left: Rc<Cell<Option<u64>>>,
    pools: HashMap<u32, Rc<File>>,
    buffers: HashMap<u32, Buffer>,
    surfaces: HashMap<u32, Surface>,
    /// The surface of each `xdg_surface`.
    windows: HashMap<u32, u32>,
    serial: u32,
}

type Cx<'a> = WaylandContext<'a, UnixStream>;
type Sent = Result<(), WaylandSendError>;

impl Client {
    fn handle(&mut self, cx: &mut Cx<'_>, message: &mut WaylandMessage<'_>) -> Sent {
        let id = message.object;
        match (message.interface.name, message.name()) {
            ("wl_display", "sync") => {
                let serial = self.next_serial();
                cx.send(message.object(0), "done", [Argument::Uint(serial)])?;
            }
            ("wl_display", "get_registry") => {
                for (number, (interface, version)) in (1..).zip(GLOBALS) {
                    let name = Argument::String(Some(interface.name.as_bytes()));
                    let global = [Argument::Uint(number), name, Argument::Uint(version)];
                    cx.send(message.object(0), "global", global)?;
                }
            }
            ("wl_registry", "bind") => self.bind(cx, message)?,
            ("wl_shm", "create_pool") => self.create_pool(cx, message),
            ("wl_shm_pool", "create_buffer") => self.create_buffer(cx, message),
            ("wl_shm_pool", "destroy") => drop(self.pools.remove(&id)),
            ("wl_buffer", "destroy") => drop(self.buffers.remove(&id)),
            ("wl_compositor", "create_surface") => {
                self.surfaces.insert(message.object(0), Surface::default());
            }
            ("wl_surface", "destroy") => drop(self.surfaces.remove(&id)),
            ("wl_surface", "commit") => self.commit(cx, id)?,
            ("xdg_wm_base", "get_xdg_surface") => {
                self.windows.insert(message.object(0), message.object(1));
            }
            ("wl_surface" | "xdg_surface", name) => {
                let surface = self.windows.get(&id).copied().unwrap_or(id);
                if let Some(surface) = self.surfaces.get_mut(&surface) {
                    match name {
                        "attach" => surface.attached = Some(message.object(0)),
                        "frame" => surface.callbacks.push(message.object(0)),
                        "get_toplevel" => surface.window = Some((id, message.object(0))),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn next_serial(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }

    fn bind(&self, cx: &mut Cx<'_>, message: &WaylandMessage<'_>) -> Sent {
        let (number, name, id) = (message.uint(0), message.string(1), message.object(3));
        let global = GLOBALS.get(number.wrapping_sub(1) as usize);
        match global {
            Some((interface, _)) if interface.name == name => {
                if cx.register(id, interface) && interface.name == "wl_shm" {
                    for format in [0, 1] {
                        cx.send(id, "format", [Argument::Uint(format)])?;
                    }
                }
            }
            _ => cx.fail(
                message.object,
                0,
                &format!("no global {number} is a {name}"),
            ),
        }
        Ok(())
    }

    /// Takes memory, of which there has to be as much as is said.
    fn create_pool(&mut self, cx: &mut Cx<'_>, message: &mut WaylandMessage<'_>) {
        let (id, size) = (message.object(0), message.int(2));
        let memory = File::from(message.take_descriptor(1));
        let has = memory.metadata().map_or(0, |it| it.len());
        if u64::try_from(size).is_ok_and(|size| (1..=has).contains(&size)) {
            self.pools.insert(id, Rc::new(memory));
        } else {
            // The number is `wl_shm.error.invalid_fd`; below, `invalid_stride`.
            cx.fail(message.object, 2, "there is less memory than that");
        }
    }

    fn create_buffer(&mut self, cx: &mut Cx<'_>, message: &WaylandMessage<'_>) {
        let numbers = [1, 2, 3, 4].map(|place| u32::try_from(message.int(place)));
        let (Some(memory), [Ok(offset), Ok(width), Ok(height), Ok(stride)]) =
            (self.pools.get(&message.object), numbers)
        else {
            return cx.fail(message.object, 1, "a negative size");
        };
        let buffer = Buffer {
            memory: Rc::clone(memory),
            offset: offset.into(),
            width,
            height,
            stride,
        };
        let size = u64::from(stride) * u64::from(height);
        let has = buffer.memory.metadata().map_or(0, |it| it.len()).min(MOST);
        if buffer.offset + size > has || u64::from(width) * 4 > stride.into() {
            return cx.fail(message.object, 1, "a buffer beyond its pool, or too large");
        }
        self.buffers.insert(message.object(0), buffer);
    }

    fn commit(&mut self, cx: &mut Cx<'_>, id: u32) -> Sent {
        let serial = self.next_serial();
        let Some(surface) = self.surfaces.get_mut(&id) else {
            return Ok(());
        };
        if let (Some((window, toplevel)), false) = (surface.window, surface.is_configured) {
            // The client may choose its size.
            surface.is_configured = true;
            let size = [Argument::Int(0), Argument::Int(0), Argument::Array(b"")];
            cx.send(toplevel, "configure", size)?;
            cx.send(window, "configure", [Argument::Uint(serial)])?;
        }
        let callbacks = std::mem::take(&mut surface.callbacks);
        if let Some((id, buffer)) = surface
            .attached
            .take()
            .and_then(|id| Some((id, self.buffers.get(&id)?)))
        {
            if let Err(error) = show(buffer) {
                eprintln!("not shown: {error}");
            }
            cx.send(id, "release", [])?;
            self.left
                .update(|left| left.map(|left| left.saturating_sub(1)));
            if self.left.get() == Some(0) {
                // It may be stopping already.
                let _ = cx.reactor.stop();
            }
        }
        if !callbacks.is_empty() {
            call_back(cx, callbacks);
        }
        Ok(())
    }
}

/// Asks for the next frame, when it is time.
fn call_back(cx: &mut Cx<'_>, callbacks: Vec<u32>) {
    let handle = cx.transport.handle();
    cx.reactor
        .call_later(Duration::from_millis(16), move |reactor| {
            let done = move |_: &mut Client, cx: &mut Cx<'_>| {
                // What clients move by.
                let milliseconds = (monotonic_microseconds() / 1_000) as u32;
                for callback in callbacks {
                    // Its client may have gone on without it.
                    let _ = cx.send(callback, "done", [Argument::Uint(milliseconds)]);
                }
            };
            type Connection = WaylandConnection<Client>;
            reactor.call_protocol_or::<UnixStream, Connection>(
                handle,
                |connection, cx| connection.call(cx, done),
                // The client has left.
                |_, _| {},
            );
        });
}

/// Reads what is to be shown.
fn show(buffer: &Buffer) -> io::Result<()> {
    let mut pixels = vec![0; (buffer.stride * buffer.height) as usize];
    buffer.memory.read_exact_at(&mut pixels, buffer.offset)?;
    let add = |sum: u32, byte: &u8| sum.wrapping_mul(31).wrapping_add((*byte).into());
    let sum = pixels.iter().fold(0, add);
    println!("frame {}x{}, {sum:08x}", buffer.width, buffer.height);
    Ok(())
}

impl WaylandPeer<UnixStream> for Client {
    fn message_received(&mut self, cx: &mut Cx<'_>, message: &mut WaylandMessage<'_>) {
        if let Err(error) = self.handle(cx, message) {
            eprintln!("a client is lost: {error}");
            cx.transport.abort_connection();
        }
    }

    fn connection_lost(&mut self, _: &mut Reactor, reason: &CloseReason) {
        println!("a client has left: {reason}");
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let display = arguments.option::<PathBuf>("--display")?;
    let display = display
        .or_else(display_path)
        .ok_or("--display PATH, please")?;
    let left = Rc::new(Cell::new(arguments.option("--frames")?));
    arguments.finish()?;

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    reactor.on_signals(&[signal::SIGTERM, signal::SIGINT], |reactor, _| {
        let _ = reactor.stop();
    })?;
    let here = Unix::at(display.as_path()).mode(0o600);
    reactor.listen(here, move |_: &Address| {
        server(Client {
            left: Rc::clone(&left),
            ..Client::default()
        })
    })?;
    reactor.run()?;
    Ok(())
}
