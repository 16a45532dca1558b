//! What the protocols of the world ask of framing, each in the fewest lines that
//! say which frame has which descriptors. None is a whole protocol.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use bowline::framing::{
    Decoded, EncodeError, Envelope, FrameContext, FrameEncoder, FrameReceiver, Framed, Framer,
    FramingError, LineFramer, Pairing, Unclaimed,
};
use bowline::{AnyConnection as _, Reactor, Transport, Transports, UnixStream};

use crate::peer::{Identity, Seen, adopt, files, identity, receive_all, send_message};
use crate::support::{DescriptorLedger, run_until_quiet};

type Cx<'a, F> = FrameContext<'a, UnixStream, F>;

/// Writes down each frame by a name, and what its descriptors are.
#[derive(Clone, Default)]
struct Told(Seen);

impl Told {
    fn frame(&self, name: &str, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let identities: Vec<Identity> = descriptors.into_iter().map(identity).collect();
        self.0.push(entry(name, &identities));
    }
}

fn entry(name: &str, identities: &[Identity]) -> String {
    let inodes: Vec<_> = identities.iter().map(|it| it.1).collect();
    format!("{name} {inodes:?}")
}

/// One end with this protocol, the other in the hands of `act`, with so many files;
/// what was told when all that it has sent is there, the answers, and what the files
/// are.
#[track_caller]
fn told<F: Framer, R: FrameReceiver<UnixStream, F>>(
    count: usize,
    framed: impl FnOnce(Told) -> Framed<F, R>,
    act: impl FnOnce(&StdUnixStream, Vec<OwnedFd>),
) -> (Vec<String>, Vec<u8>, Vec<Identity>) {
    let ledger = DescriptorLedger::open();
    let told = Told::default();
    let (all, sent) = files(count);
    let mut reactor = Reactor::new().unwrap();
    let (_, peer) = adopt(&mut reactor, framed(told.clone()));
    run_until_quiet(&mut reactor);
    act(&peer, all);
    run_until_quiet(&mut reactor);
    assert_eq!(reactor.descriptor_counts().unclaimed, 0);
    let answers = receive_all(&peer).into_iter().flat_map(|it| it.data);
    let answers = answers.collect();
    drop((reactor, peer));
    ledger.assert_balanced();
    (told.0.all(), answers, sent)
}

/// D-Bus: lines, then messages, each in its own byte order, with a field that says
/// how many descriptors are theirs.
mod dbus {
    use super::*;

    enum Bus {
        Lines(LineFramer),
        Messages,
    }

    fn number(message: &[u8], at: usize) -> Option<usize> {
        let bytes = message.get(at..at + 4)?.try_into().ok()?;
        Some(match message[0] {
            b'l' => u32::from_le_bytes(bytes),
            _ => u32::from_be_bytes(bytes),
        } as usize)
    }

    /// The value of the field 9.
    fn unix_fds(message: &[u8]) -> Option<usize> {
        let end = 16 + number(message, 12)?;
        let mut at: usize = 16;
        while at < end {
            at = at.next_multiple_of(8);
            let (code, kind) = (*message.get(at)?, *message.get(at + 2)?);
            at += 4;
            match kind {
                b'u' if code == 9 => return number(message, at),
                b'u' => at += 4,
                b'g' => at += 2 + usize::from(*message.get(at)?),
                _ => at += 5 + number(message, at)?,
            }
        }
        Some(0)
    }

    impl Framer for Bus {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            let end = match self {
                Self::Lines(lines) => return lines.decode(input),
                Self::Messages if input.len() < 16 => 16,
                Self::Messages => {
                    let part = |at| number(input, at).expect("all of it is there");
                    let (fields, body) = (part(12), part(4));
                    16 + fields.next_multiple_of(8) + body
                }
            };
            Ok(if input.len() < end {
                let at_least = end - input.len();
                Decoded::NeedMore { at_least }
            } else {
                let (payload, consumed) = (0..end, end);
                Decoded::Frame { payload, consumed }
            })
        }

        fn claims(&self, frame: &[u8]) -> Option<usize> {
            match self {
                Self::Lines(_) => Some(0),
                Self::Messages => unix_fds(frame),
            }
        }
    }

    struct Server(Told);

    impl FrameReceiver<UnixStream, Bus> for Server {
        fn frame_received(&mut self, cx: &mut Cx<'_, Bus>, frame: &[u8]) {
            if let Bus::Messages = cx.framing.framer() {
                let name = format!("{} {}", frame[0] as char, frame[1]);
                return self.0.frame(&name, cx.framing.descriptors());
            }
            match frame.strip_prefix(b"\0").unwrap_or(frame) {
                b"NEGOTIATE_UNIX_FD" => {
                    Transport::write(cx.transport, b"AGREE_UNIX_FD\r\n");
                }
                b"BEGIN" => *cx.framing.framer_mut() = Bus::Messages,
                _ => {
                    Transport::write(cx.transport, b"OK 0123\r\n");
                }
            }
        }

        fn framing_failed(&mut self, cx: &mut Cx<'_, Bus>, error: FramingError, _: &[u8]) {
            self.0.frame(&error.to_string(), []);
            cx.transport.lose_connection();
        }
    }

    fn message(order: u8, kind: u8, descriptors: u32) -> Vec<u8> {
        let bytes = |value: u32| match order {
            b'l' => value.to_le_bytes(),
            _ => value.to_be_bytes(),
        };
        // A path, its padding, and the count.
        let mut fields = [&[1, 1, b'o', 0][..], &bytes(2), b"/a\0", &[0; 5]].concat();
        fields.extend([&[9, 1, b'u', 0][..], &bytes(descriptors)].concat());
        let mut message = vec![order, kind, 0, 1];
        for value in [3, 7, fields.len() as u32] {
            message.extend(bytes(value));
        }
        message.extend(&fields);
        message.extend([b'-'; 3]);
        message
    }

    const LINES: &[u8] = b"\0AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n";

    fn framed(told: Told) -> Framed<Bus, Server> {
        Framed::new(Bus::Lines(LineFramer::new()), Server(told))
            .pairing(Pairing::Claimed(Unclaimed::Fail))
    }

    #[test]
    fn lines_and_messages_of_both_orders_in_one_read() {
        let (told, answers, sent) = told(3, framed, |peer, all| {
            let messages = [
                message(b'l', 1, 1),
                message(b'B', 2, 0),
                message(b'B', 1, 2),
            ];
            // The lines are glued in front of the call that has the descriptors.
            send_message(peer, LINES, &[]);
            send_message(peer, &messages.concat(), &all);
        });
        let expected = [
            entry("l 1", &sent[..1]),
            entry("B 2", &[]),
            entry("B 1", &sent[1..]),
        ];
        assert_eq!(told, expected);
        assert_eq!(answers, b"OK 0123\r\nAGREE_UNIX_FD\r\n");
    }
}

/// Wayland: what a message claims only who knows the object can tell.
mod wayland {
    use super::*;

    struct Requests;

    impl Framer for Requests {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            let length = input
                .get(4..8)
                .map(|it| u32::from_ne_bytes(it.try_into().unwrap()));
            let end = length.map_or(8, |it| (it >> 16) as usize);
            if !(8..=4096).contains(&end) || end % 4 != 0 {
                return Err(FramingError::Malformed { what: "length" });
            }
            Ok(if input.len() < end {
                let at_least = end - input.len();
                Decoded::NeedMore { at_least }
            } else {
                let (payload, consumed) = (0..end, end);
                Decoded::Frame { payload, consumed }
            })
        }
    }

    impl FrameEncoder for Requests {
        /// Object and opcode.
        type Header = (u32, u16);

        fn envelope(
            &self,
            (object, opcode): &(u32, u16),
            arguments: &[u8],
            _: usize,
        ) -> Result<Envelope<'_>, EncodeError> {
            let length = arguments.len() as u32 + 8;
            let word = length << 16 | u32::from(*opcode);
            let head = [object.to_ne_bytes(), word.to_ne_bytes()].concat();
            Ok(Envelope::new(&head, b""))
        }

        /// libwayland's.
        fn max_descriptors(&self) -> usize {
            28
        }
    }

    struct Compositor(Told);

    impl FrameReceiver<UnixStream, Requests> for Compositor {
        fn connection_made(&mut self, cx: &mut Cx<'_, Requests>) {
            let passed = |count| files(count).0.into_iter().map(Into::into).collect();
            let keymap = (3, 0);
            let refused = cx.send_frame_of_with_descriptors(&keymap, b"", passed(29));
            assert_eq!(refused.unwrap_err().descriptors.len(), 29);
            cx.send_frame_of_with_descriptors(&keymap, b"", passed(28))
                .unwrap();
        }

        fn frame_received(&mut self, cx: &mut Cx<'_, Requests>, request: &[u8]) {
            // The schema: requests with an odd number bring that many.
            let opcode = usize::from(request[4]);
            let count = if opcode % 2 == 1 { opcode } else { 0 };
            let taken = cx.framing.descriptors().take(count);
            self.0.frame(&format!("opcode {opcode}"), taken);
        }
    }

    #[test]
    fn requests_take_what_their_schema_says_of_what_was_sent_ahead() {
        let request = |opcode| {
            let mut out = Vec::new();
            Requests.encode(&(1, opcode), b"args", 0, &mut out).unwrap();
            out
        };
        let (told, answers, sent) = told(
            4,
            |told| {
                Framed::new(Requests, Compositor(told)).pairing(Pairing::Claimed(Unclaimed::Wait))
            },
            |peer, all| {
                let requests = [request(0), request(1), request(2)].concat();
                send_message(peer, &requests, &all);
                send_message(peer, &request(3), &[]);
            },
        );
        let expected = [
            entry("opcode 0", &[]),
            entry("opcode 1", &sent[..1]),
            entry("opcode 2", &[]),
            entry("opcode 3", &sent[1..]),
        ];
        assert_eq!(told, expected);
        assert_eq!(answers.len(), 8, "one event, the other was refused");
    }
}

/// vhost-user: descriptors come with the header, and none of another message's.
mod vhost_user {
    use super::*;

    struct Requests;

    impl Framer for Requests {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            let size = input
                .get(8..12)
                .map(|it| u32::from_ne_bytes(it.try_into().unwrap()));
            let end = 12 + size.unwrap_or(0) as usize;
            Ok(if input.len() < end {
                let at_least = end - input.len();
                Decoded::NeedMore { at_least }
            } else {
                let (payload, consumed) = (0..end, end);
                Decoded::Frame { payload, consumed }
            })
        }
    }

    struct BackEnd(Told);

    impl FrameReceiver<UnixStream, Requests> for BackEnd {
        fn frame_received(&mut self, cx: &mut Cx<'_, Requests>, request: &[u8]) {
            let name = format!("request {}", request[0]);
            self.0.frame(&name, cx.framing.descriptors());
        }
    }

    #[test]
    fn requests_have_what_came_with_their_own_header() {
        let request = |kind: u32, payload: &[u8]| {
            let words = [kind, 1, payload.len() as u32];
            [&words.map(u32::to_ne_bytes).concat(), payload].concat()
        };
        let (told, _, sent) = told(
            3,
            |told| {
                Framed::new(Requests, BackEnd(told))
                    .pairing(Pairing::Exact)
                    .max_descriptors(8)
            },
            |peer, mut all| {
                send_message(peer, &request(1, b""), &[]);
                let table = request(5, &[7; 70]);
                // The header with two regions, and the rest in its own time.
                let regions: Vec<_> = all.drain(..2).collect();
                send_message(peer, &table[..12], &regions);
                send_message(peer, &table[12..], &[]);
                send_message(peer, &request(12, b"kick"), &all);
                send_message(peer, &request(18, b""), &[]);
            },
        );
        let expected = [
            entry("request 1", &[]),
            entry("request 5", &sent[..2]),
            entry("request 12", &sent[2..]),
            entry("request 18", &[]),
        ];
        assert_eq!(told, expected);
    }
}

/// imsg, both dialects: a flag, of a queue; and the read in which the message ends.
mod imsg {
    use super::*;

    #[derive(Clone, Copy)]
    enum Dialect {
        Old,
        New,
    }

    impl Framer for Dialect {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            let end = input.get(4..6).map_or(16, |it| {
                usize::from(u16::from_ne_bytes(it.try_into().unwrap()))
            });
            Ok(if input.len() < end {
                let at_least = end - input.len();
                Decoded::NeedMore { at_least }
            } else {
                let (payload, consumed) = (0..end, end);
                Decoded::Frame { payload, consumed }
            })
        }

        fn claims(&self, frame: &[u8]) -> Option<usize> {
            Some(usize::from(frame[6] & 1))
        }
    }

    struct Client(Told);

    impl FrameReceiver<UnixStream, Dialect> for Client {
        fn frame_received(&mut self, cx: &mut Cx<'_, Dialect>, frame: &[u8]) {
            self.0
                .frame(&frame[0].to_string(), cx.framing.descriptors());
        }
    }

    #[test]
    fn messages_that_a_flag_marks_have_one() {
        for dialect in [Dialect::Old, Dialect::New] {
            let message = |kind: u8, has_one: bool| {
                let flags = match dialect {
                    Dialect::Old => [u8::from(has_one), 0],
                    Dialect::New => [0, 0x80 * u8::from(has_one)],
                };
                let mut message = vec![0; 16];
                message[0] = kind;
                message[4..6].copy_from_slice(&16_u16.to_ne_bytes());
                message[6..8].copy_from_slice(&flags);
                message
            };
            let pairing = match dialect {
                Dialect::Old => Pairing::Claimed(Unclaimed::Close),
                Dialect::New => Pairing::ByLastByte,
            };
            let (told, _, sent) = told(
                2,
                |told| Framed::new(dialect, Client(told)).pairing(pairing),
                |peer, mut all| {
                    // Plain ones are glued in front; the old ones put some behind too.
                    send_message(peer, &message(1, false), &[]);
                    let second = vec![all.remove(0)];
                    match dialect {
                        Dialect::Old => send_message(
                            peer,
                            &[message(2, true), message(3, false)].concat(),
                            &second,
                        ),
                        Dialect::New => {
                            send_message(peer, &message(2, true), &second);
                            send_message(peer, &message(3, false), &[]);
                        }
                    }
                    send_message(peer, &message(4, true), &all);
                },
            );
            let expected = [
                entry("1", &[]),
                entry("2", &sent[..1]),
                entry("3", &[]),
                entry("4", &sent[1..]),
            ];
            assert_eq!(told, expected);
        }
    }
}

/// HAProxy's `_getsocks`, the taker: a number, then records by the batch, each
/// batch answered by how many there were before it.
mod haproxy {
    use super::*;

    enum Answers {
        Count,
        Records,
    }

    impl Framer for Answers {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
            let end = match self {
                Self::Count => 4,
                // Two counted names and four bytes.
                Self::Records => {
                    let name = input.first().map_or(0, |it| usize::from(*it));
                    let other = input.get(1 + name).map_or(0, |it| usize::from(*it));
                    6 + name + other
                }
            };
            Ok(if input.len() < end {
                let at_least = end - input.len();
                Decoded::NeedMore { at_least }
            } else {
                let (payload, consumed) = (0..end, end);
                Decoded::Frame { payload, consumed }
            })
        }

        fn claims(&self, _: &[u8]) -> Option<usize> {
            Some(usize::from(matches!(self, Self::Records)))
        }
    }

    struct Taker {
        told: Told,
        before: u32,
        now: u32,
    }

    impl FrameReceiver<UnixStream, Answers> for Taker {
        fn frame_received(&mut self, cx: &mut Cx<'_, Answers>, frame: &[u8]) {
            if let Answers::Count = cx.framing.framer() {
                *cx.framing.framer_mut() = Answers::Records;
                return self.told.frame(&format!("{} to come", frame[0]), []);
            }
            self.now += 1;
            self.told.frame("record", cx.framing.descriptors());
        }

        fn read_delivered(&mut self, cx: &mut Cx<'_, Answers>) {
            if self.now > self.before {
                cx.transport.write(&self.before.to_ne_bytes());
                self.before = self.now;
            }
        }
    }

    #[test]
    fn each_batch_of_records_is_answered_once() {
        let (told, answers, sent) = told(
            5,
            |told| {
                let (before, now) = (0, 0);
                let taker = Taker { told, before, now };
                Framed::new(Answers::Count, taker).pairing(Pairing::Claimed(Unclaimed::Fail))
            },
            |peer, mut all| {
                send_message(peer, &5_u32.to_ne_bytes(), &[]);
                let record = [&[2][..], b"ns", &[0], &[0; 4]].concat();
                let second = all.split_off(3);
                send_message(peer, &record.repeat(3), &all);
                send_message(peer, &record.repeat(2), &second);
            },
        );
        let mut expected = vec![entry("5 to come", &[])];
        expected.extend(sent.iter().map(|it| entry("record", &[*it])));
        assert_eq!(told, expected);
        assert_eq!(answers, [0_u32, 3].map(u32::to_ne_bytes).concat());
    }
}

/// Node's IPC: lines of JSON, of which those with a handle claim one; one too many
/// shifts nothing.
mod node {
    use super::*;

    struct Child(Told);

    impl FrameReceiver<UnixStream, LineFramer> for Child {
        fn frame_received(&mut self, cx: &mut Cx<'_, LineFramer>, line: &[u8]) {
            let has_one = line.windows(11).any(|it| it == b"NODE_HANDLE");
            let taken = cx.framing.descriptors().take(usize::from(has_one));
            self.0
                .frame(if has_one { "handle" } else { "plain" }, taken);
            if has_one {
                cx.send_frame(br#"{"cmd":"NODE_HANDLE_ACK"}"#).unwrap();
            }
        }
    }

    #[test]
    fn lines_with_a_handle_have_theirs() {
        let (told, answers, sent) = told(
            2,
            |told| {
                Framed::new(LineFramer::with_delimiter(b"\n"), Child(told))
                    .pairing(Pairing::Claimed(Unclaimed::Close))
            },
            |peer, mut all| {
                let handle = b"{\"cmd\":\"NODE_HANDLE\"}\n";
                send_message(peer, b"{}\n", &[]);
                send_message(peer, handle, &[all.remove(0)]);
                send_message(peer, b"{}\n{}\n", &[]);
                send_message(peer, handle, &all);
            },
        );
        let expected = [
            entry("plain", &[]),
            entry("handle", &sent[..1]),
            entry("plain", &[]),
            entry("plain", &[]),
            entry("handle", &sent[1..]),
        ];
        assert_eq!(told, expected);
        assert_eq!(answers.iter().filter(|it| **it == b'\n').count(), 2);
    }
}

/// varlink: a message has what came with the read that ends in it; after an upgrade
/// there are no messages any more.
mod varlink {
    use super::*;

    struct Service(Told);

    impl FrameReceiver<UnixStream, LineFramer> for Service {
        fn frame_received(&mut self, cx: &mut Cx<'_, LineFramer>, call: &[u8]) {
            let name = String::from_utf8_lossy(call);
            self.0.frame(&name, cx.framing.descriptors());
            if call == b"upgrade" {
                cx.framing.set_raw_mode();
            }
        }

        fn raw_data_received(&mut self, _: &mut Cx<'_, LineFramer>, data: &[u8]) {
            self.0.frame(&format!("raw {}", data.escape_ascii()), []);
        }
    }

    #[test]
    fn message_in_which_the_read_ends_has_them() {
        let (told, _, sent) = told(
            3,
            |told| {
                Framed::new(LineFramer::with_delimiter(&b"\0"[..]), Service(told))
                    .pairing(Pairing::ByLastByte)
            },
            |peer, mut all| {
                send_message(peer, b"plain\0", &[]);
                // sd-varlink puts them on the first byte of both.
                send_message(peer, b"before\0one\0", &[all.remove(0)]);
                send_message(peer, b"tw", &all);
                send_message(peer, b"o\0upgrade\0a\0b", &[]);
            },
        );
        let expected = [
            entry("plain", &[]),
            entry("before", &[]),
            entry("one", &sent[..1]),
            entry("two", &sent[1..]),
            entry("upgrade", &[]),
            entry("raw a\\x00b", &[]),
        ];
        assert_eq!(told, expected);
    }
}
