//! A chat room: what one member types, the others see.
//!
//! Callbacks write to *other* connections, by their handles, and share the list
//! of members in an `Rc<RefCell<_>>`: callbacks never nest, so it is never
//! borrowed twice. Who says nothing for a while is shown out by a timer; who
//! does not read what the others say is cut off before it costs memory.
//!
//! ```text
//! cargo run --example chat -- --listen tcp:127.0.0.1:7002
//! ```
//!
//! In two other terminals, say a name first, then what you like:
//!
//! ```text
//! nc 127.0.0.1 7002
//! ```

#![allow(clippy::print_stdout)]

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::{Address, AtDrain, CloseReason, DelayedCall, Reactor, Transport};
use bowline::{TransportHandle, TransportState, Transports, Watermarks, WriteStatus};

use crate::common::{Arguments, Endpoint, Inspect};

const HELP: &str = "
A chat room for line-based clients such as nc.

Usage: chat --listen ENDPOINT [--tls CERT KEY] [--idle SECONDS]

  --tls CERT KEY   with TLS, whatever the endpoint: two PEM files
  --idle SECONDS   show out who says nothing for so long [default: 300]
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
";

/// How much may wait for a member who does not read, in bytes.
const MAX_UNSENT: usize = 256 * 1024;

/// Who is there, and under which name; none before the first line.
type Room = Rc<RefCell<BTreeMap<TransportHandle, Option<String>>>>;

type Cx<'a, T> = FrameContext<'a, T, LineFramer>;

struct Member {
    room: Room,
    name: Option<String>,
    idle: Duration,
    leaves_at: Option<DelayedCall>,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Member {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        cx.transport
            .set_watermarks(Watermarks::default().limit(MAX_UNSENT));
        let me = cx.transport.handle();
        self.room.borrow_mut().insert(me, None);
        let leave = cx.reactor.call_later(self.idle, move |reactor| {
            if let Some(transport) = reactor.get(me) {
                transport.write(b"* you have been quiet for long: bye\n");
                transport.lose_connection();
            }
        });
        self.leaves_at = Some(leave);
        cx.transport.write(b"* who are you?\n");
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, line: &[u8]) {
        if let Some(call) = self.leaves_at {
            // It may be due in this very turn: then it has its way.
            let _ = call.reset(cx.reactor, self.idle);
        }
        let text = String::from_utf8_lossy(line);
        let text = text.trim();
        match &self.name {
            Some(name) if !text.is_empty() => self.tell_others(cx, &format!("{name}: {text}\n")),
            Some(_) => {}
            None => self.join(cx, text),
        }
    }

    /// Shows the member out, so that a stop need not wait for silence.
    fn draining(&mut self, cx: &mut Cx<'_, T>) -> AtDrain {
        cx.transport.write(b"* the room closes\n");
        // Whoever does not read it holds up nobody.
        cx.transport.lose_connection_within(Duration::from_secs(5));
        AtDrain::GoOn
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        if let Some(call) = self.leaves_at.take() {
            // It may be what ended the connection.
            let _ = call.cancel(cx.reactor);
        }
        self.room.borrow_mut().remove(&cx.transport.handle());
        if let Some(name) = self.name.take() {
            self.tell_others(cx, &format!("* {name} has left\n"));
        }
    }
}

impl Member {
    fn join<T: Transport>(&mut self, cx: &mut Cx<'_, T>, name: &str) {
        let present: Vec<_> = self.room.borrow().values().flatten().cloned().collect();
        if name.is_empty() || present.iter().any(|taken| taken == name) {
            cx.transport.write(b"* another name, please\n");
            return;
        }
        let welcome = format!("* welcome, {name}; here: [{}]\n", present.join(", "));
        cx.transport.write(welcome.as_bytes());
        self.tell_others(cx, &format!("* {name} has joined\n"));
        let me = cx.transport.handle();
        self.room.borrow_mut().insert(me, Some(name.to_owned()));
        self.name = Some(name.to_owned());
    }

    fn tell_others<T: Transport>(&self, cx: &mut Cx<'_, T>, text: &str) {
        let me = cx.transport.handle();
        for (&member, name) in &*self.room.borrow() {
            if member != me
                && name.is_some()
                && let Some(member) = cx.get(member)
                && member.write(text.as_bytes()) == WriteStatus::Refused
                && member.state() == TransportState::Connected
            {
                // Does not read. Its own connection_lost follows, after this
                // callback.
                member.abort_connection();
            }
        }
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let endpoint = Endpoint::take(&mut arguments)?;
    let idle = arguments.option("--idle")?.unwrap_or(300.0);
    arguments.finish()?;
    let endpoint = endpoint.ok_or("--listen ENDPOINT, please; try --help")?;
    let idle = Duration::try_from_secs_f64(idle)?;

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let room = Room::default();
    let listener = reactor.listen(endpoint, move |_: &Address| {
        let member = Member {
            room: Rc::clone(&room),
            name: None,
            idle,
            leaves_at: None,
        };
        // The framing takes off the LF, and `trim` a CR if there is one.
        Framed::new(LineFramer::with_delimiter(b"\n"), member)
    })?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
