//! A client of NATS, by its line protocol: one stream of JetStream, written and read.
//!
//! Each connection makes the stream if it is not there, asks for everything behind the last
//! line that we have, and says again what is not known to be stored. The broker knows a
//! line that was said twice by its `Nats-Msg-Id`.

use std::rc::Rc;
use std::time::Duration;

use bowline::policies::Timeout;
use bowline::{AtDrain, CloseReason, Context, PeriodicCall, Protocol, Transport};

use crate::{KEPT, Room, Shared};

/// A broker that says nothing for so long is away, however open its connection is.
const PATIENCE: Duration = Duration::from_millis(2_000);
const PING_EVERY: Duration = Duration::from_millis(500);
/// The longest control line; a message has a limit of its own.
const MAX_CONTROL: usize = 64 * 1024;
const MAX_MESSAGE: usize = 1024 * 1024;
/// For how long the broker knows what it has stored, in nanoseconds: an hour.
const DUPLICATE_WINDOW: u64 = 3_600_000_000_000;

/// The subject of all lines.
const SUBJECT: &str = "chat.room";

pub(crate) struct Nats {
    room: Shared,
    inbox: String,
    is_greeted: bool,
    input: Vec<u8>,
    patience: Timeout,
    pings: Option<PeriodicCall>,
}

/// A message of the broker's.
struct Message<'a> {
    subject: &'a str,
    reply: &'a str,
    body: &'a [u8],
}

/// A line to be stored, whose answer has `key` in its subject.
pub(crate) fn publish(room: &Room, key: u64, text: &str) -> Vec<u8> {
    let (id, inbox) = (room.id, inbox_of(room));
    let headers = format!("NATS/1.0\r\nNats-Msg-Id: {id:016x}-{key}\r\n\r\n");
    let (of_headers, all) = (headers.len(), headers.len() + text.len());
    let control = format!("HPUB {SUBJECT} {inbox}.k.{key} {of_headers} {all}");
    format!("{control}\r\n{headers}{text}\r\n").into_bytes()
}

/// Where answers come, of this connection alone: a consumer of an earlier one may still
/// send, and is somewhere else in the stream.
fn inbox_of(room: &Room) -> String {
    format!("_INBOX.{:016x}.{}", room.id, room.connections)
}

impl Nats {
    pub(crate) fn new(room: &Shared) -> Self {
        room.borrow_mut().connections += 1;
        Self {
            inbox: inbox_of(&room.borrow()),
            is_greeted: false,
            room: Rc::clone(room),
            input: Vec::new(),
            patience: Timeout::new(),
            pings: None,
        }
    }

    fn request<T: Transport>(&self, cx: &mut Context<'_, T>, api: &str, name: &str, body: &str) {
        let (inbox, length) = (&self.inbox, body.len());
        let text = format!("PUB $JS.API.{api} {inbox}.{name} {length}\r\n{body}\r\n");
        cx.transport.write(text.as_bytes());
    }

    /// The broker has said who it is.
    fn greet<T: Transport>(&self, cx: &mut Context<'_, T>) {
        let hello = r#"{"verbose":false,"pedantic":false,"headers":true,"no_responders":true}"#;
        let inbox = &self.inbox;
        // A consumer sends only where somebody listens by exactly that name.
        let text = format!("CONNECT {hello}\r\nSUB {inbox}.> 1\r\nSUB lines{inbox} 2\r\n");
        cx.transport.write(text.as_bytes());
        let replicas = self.room.borrow().replicas;
        let config = format!(
            r#"{{"name":"CHAT","subjects":["{SUBJECT}"],"storage":"file","retention":"limits","discard":"old","max_msgs":{KEPT},"duplicate_window":{DUPLICATE_WINDOW},"num_replicas":{replicas}}}"#
        );
        self.request(cx, "STREAM.CREATE.CHAT", "stream", &config);
    }

    /// The stream is there: reads it from behind what we have.
    fn read_on<T: Transport>(&self, cx: &mut Context<'_, T>) {
        let (inbox, from) = (&self.inbox, self.room.borrow().last() + 1);
        let config = format!(
            r#"{{"stream_name":"CHAT","config":{{"deliver_subject":"lines{inbox}","deliver_policy":"by_start_sequence","opt_start_seq":{from},"ack_policy":"none","replay_policy":"instant"}}}}"#
        );
        self.request(cx, "CONSUMER.CREATE.CHAT", "consumer", &config);
    }

    /// It reads: says all that is not known to be stored, in order.
    fn write_on<T: Transport>(&self, cx: &mut Context<'_, T>) {
        let room = &mut *self.room.borrow_mut();
        for (key, (_, text)) in &room.unstored {
            cx.transport.write(&publish(room, *key, text));
        }
        room.nats = Some(cx.transport.handle());
        log::info!("the broker is here");
    }

    fn message<T: Transport>(&self, cx: &mut Context<'_, T>, message: &Message<'_>) {
        let text = String::from_utf8_lossy(message.body);
        if message.subject == SUBJECT {
            // $JS.ACK.stream.consumer.deliveries.NUMBER...
            let number = message
                .reply
                .split('.')
                .nth(5)
                .and_then(|it| it.parse().ok());
            let number = number.unwrap_or_default();
            return (self.room.borrow_mut()).deliver(cx.reactor, number, text.into_owned());
        }
        let what = message
            .subject
            .strip_prefix(&self.inbox)
            .unwrap_or_default();
        if message.body.is_empty() || text.contains(r#""error":"#) {
            // JetStream is not there yet, or has no leader. Again, with a pause.
            log::warn!("the broker refuses {what}: {text}");
            return cx.transport.abort_connection();
        }
        match what {
            ".stream" => self.read_on(cx),
            ".consumer" => self.write_on(cx),
            key => {
                let key = key.strip_prefix(".k.").and_then(|key| key.parse().ok());
                if let (Some(key), Some(number)) = (key, sequence(&text)) {
                    self.room.borrow_mut().stored(cx.reactor, key, number);
                }
            }
        }
    }

    /// Takes one thing off the input; how long it was. `None`: it is not all there.
    fn take_one<T: Transport>(&mut self, cx: &mut Context<'_, T>, input: &[u8]) -> Option<usize> {
        let end = input.windows(2).position(|bytes| bytes == b"\r\n")?;
        let line = String::from_utf8_lossy(&input[..end]).into_owned();
        let words: Vec<&str> = line.split_whitespace().collect();
        let (kind, of_headers) = match words.first() {
            Some(&"MSG") => ("MSG", 0),
            Some(&"HMSG") if words.len() >= 5 => ("HMSG", words[words.len() - 2].parse().ok()?),
            Some(&"INFO") if !self.is_greeted => {
                self.is_greeted = true;
                self.greet(cx);
                return Some(end + 2);
            }
            Some(&"PING") => {
                cx.transport.write(b"PONG\r\n");
                return Some(end + 2);
            }
            Some(&"-ERR") => {
                log::warn!("the broker says {line}");
                return Some(end + 2);
            }
            _ => return Some(end + 2),
        };
        let all: usize = words
            .last()?
            .parse()
            .ok()
            .filter(|all| *all <= MAX_MESSAGE)?;
        let body = input.get(end + 2..end + 2 + all)?;
        // And its end of line.
        input.get(end + 2 + all + 1)?;
        let lengths = if kind == "HMSG" { 2 } else { 1 };
        let message = Message {
            subject: words.get(1)?,
            reply: if words.len() == 4 + lengths {
                words[3]
            } else {
                ""
            },
            body: body.get(of_headers..)?,
        };
        self.message(cx, &message);
        Some(end + 2 + all + 2)
    }
}

/// The number in `{"stream":"CHAT", "seq":7}`.
fn sequence(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once(r#""seq":"#)?;
    let rest = rest.trim_start();
    let end = rest
        .find(|it: char| !it.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

impl<T: Transport> Protocol<T> for Nats {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let me = cx.transport.handle();
        self.patience.set(cx, Some(PATIENCE));
        let pings = cx.reactor.call_every(PING_EVERY, move |reactor, _| {
            if let Some(transport) = reactor.get(me) {
                transport.write(b"PING\r\n");
            }
        });
        self.pings = Some(pings);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.patience.reset(cx.reactor);
        self.input.extend_from_slice(data);
        let input = std::mem::take(&mut self.input);
        let mut used = 0;
        while let Some(length) = self.take_one(cx, &input[used..]) {
            used += length;
        }
        self.input = input[used..].to_vec();
        if self.input.len() > MAX_CONTROL + MAX_MESSAGE {
            log::warn!("the broker makes no sense");
            cx.transport.abort_connection();
        }
    }

    /// The members that drain may have lines that are not stored: theirs comes first.
    fn draining(&mut self, _: &mut Context<'_, T>) -> AtDrain {
        AtDrain::DoNotWait
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        log::warn!("the broker is away: {reason}");
        self.room.borrow_mut().nats = None;
        self.patience.cancel(cx.reactor);
        if let Some(pings) = self.pings.take() {
            pings.stop(cx.reactor);
        }
    }
}
