//! vhost-user with QEMU: its storage daemon as the device of a front-end of ours, its machine
//! as the front-end of a device of ours.

pub(crate) mod channel;
mod machine;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use bowline::descriptor::EventCounter;
use bowline::framing::FrameEncoder as _;
use bowline::{Reactor, Transports, Unix, UnixStream, UnixTransport, UnixTransportHandle};
use bowline_peers::vhost_user::{
    BackEndContext, FrontEnd, FrontEndError, FrontEndReply, MemoryRegion, VhostUserAnswer,
    VhostUserDevice, VhostUserFramer, VhostUserHeader, VhostUserRequest, VringAddress, back_end,
    features, front_end,
};
use rustix::fs::MemfdFlags;

use crate::programs::{Program, has};
use crate::suite::{Heard, Limit, Message, Outcome, Rule, Sample, Served, Trial};
use crate::support::{DescriptorLedger, run_until};

/// A device that tells what it is asked.
struct Teller(Heard);

impl<T: UnixTransport> VhostUserDevice<T> for Teller {
    fn request_received(
        &mut self,
        _: &mut BackEndContext<'_, T>,
        request: VhostUserRequest,
    ) -> VhostUserAnswer {
        use VhostUserRequest as Request;
        match request {
            Request::SetMemTable(regions) => {
                let text = format!("memory {}", regions.len());
                self.0.message(text, regions.into_iter().map(|it| it.fd));
            }
            Request::SetVringKick { index, fd } => self.0.message(format!("kick {index}"), fd),
            Request::SetVringCall { index, fd } => self.0.message(format!("call {index}"), fd),
            Request::SetLogBase { size, fd, .. } => self.0.message(format!("log {size}"), [fd]),
            Request::SetInflightFd { region, fd } => {
                self.0.message(format!("inflight {}", region.queues), [fd]);
            }
            Request::SetBackendReqFd(fd) => self.0.message("channel", [fd]),
            Request::AddMemReg(region) => {
                self.0
                    .message(format!("more {:x}", region.guest), [region.fd]);
            }
            Request::Other {
                request,
                descriptors,
                ..
            } => self.0.message(format!("other {request}"), descriptors),
            Request::SetConfig { bytes, .. } => {
                self.0.message(format!("config {}", bytes.len()), []);
            }
            other => self.0.message(format!("{other:?}"), []),
        }
        VhostUserAnswer::Done
    }
}

/// A message as a front-end sends it.
fn message(request: u32, payload: &[u8], descriptors: usize, heard: &str) -> Message {
    let header = VhostUserHeader {
        request,
        is_reply: false,
        needs_reply: false,
    };
    let mut bytes = Vec::new();
    VhostUserFramer::new()
        .with_max_payload(usize::MAX)
        .encode(&header, payload, 0, &mut bytes)
        .expect("short");
    Message::new(bytes, descriptors, heard)
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|it| it.to_ne_bytes()).collect()
}

fn memory(count: usize) -> Message {
    let mut payload = (count as u64).to_ne_bytes().to_vec();
    for region in 0..count as u64 {
        for word in [region << 12, 0x1000, region << 12, 0] {
            payload.extend(word.to_ne_bytes());
        }
    }
    message(5, &payload, count, &format!("memory {count}"))
}

fn config(length: u32) -> Message {
    let head = [0, length, 0].map(u32::to_ne_bytes).concat();
    let payload = [head, vec![7; length as usize]].concat();
    message(25, &payload, 0, &format!("config {length}"))
}

struct Requests;

impl Sample for Requests {
    fn rule(&self) -> Rule {
        Rule::Claimed
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let framed = back_end(Teller(heard.clone()));
        Served::by(|socket| reactor.adopt(Unix, socket, framed).expect("a socket"))
    }

    fn messages(&self) -> Vec<Message> {
        vec![
            message(3, &[], 0, "SetOwner"),
            message(13, &0_u64.to_ne_bytes(), 1, "call 0"),
            memory(3),
            message(12, &0x101_u64.to_ne_bytes(), 0, "kick 1"),
            message(6, &words(&[4_096, 0]), 1, "log 4096"),
            message(32, &words(&[4_096, 0, 128 << 16 | 2]), 1, "inflight 2"),
            message(21, &[], 1, "channel"),
            message(37, &words(&[0, 0x4000, 0x1000, 0x4000, 0]), 1, "more 4000"),
            // An address of the front-end's, of no use to us.
            message(6, &words(&[4_096]), 0, "other 6"),
            message(12, &2_u64.to_ne_bytes(), 1, "kick 2"),
        ]
    }

    fn outcome(&self, trial: Trial) -> Outcome {
        match trial {
            // QEMU closes them, too.
            Trial::SecondSet | Trial::TooMany | Trial::Stray => Outcome::Paired,
            _ => self.rule().outcome(trial),
        }
    }

    fn limits(&self) -> Vec<Limit> {
        vec![
            Limit {
                of: "descriptors",
                within: memory(8),
                beyond: memory(9),
            },
            Limit {
                of: "bytes",
                within: config(4_096 - 12),
                beyond: config(4_096 - 11),
            },
        ]
    }
}

suite!(requests, Requests);

type Answer = Result<FrontEndReply, FrontEndError>;

/// Connects a front-end to a device that takes one at a time, so that nobody can look first
/// whether it listens. That its file is there does not mean so yet.
#[track_caller]
fn connect(reactor: &mut Reactor, device: &Program, socket: &Path) -> UnixTransportHandle {
    let connected = RefCell::new(None);
    device.wait(reactor, "a listener", |_| {
        *connected.borrow_mut() = StdUnixStream::connect(socket).ok();
        connected.borrow().is_some()
    });
    let connected = connected.into_inner().expect("it is connected");
    let front_end = front_end(|_, _| {});
    let adopted = reactor.adopt(Unix, connected.into(), front_end);
    adopted.expect("a stream")
}

/// Asks, and waits for the answer.
#[track_caller]
fn ask(reactor: &mut Reactor, handle: UnixTransportHandle, request: VhostUserRequest) -> Answer {
    let answer = Rc::new(RefCell::new(None));
    let shared = Rc::clone(&answer);
    reactor.call_protocol::<UnixStream, FrontEnd>(handle, move |front_end, cx| {
        front_end.ask(cx, request, move |_, answer| {
            *shared.borrow_mut() = Some(answer)
        });
    });
    run_until(reactor, |_| answer.borrow().is_some());
    let answer = answer.borrow_mut().take();
    answer.expect("told")
}

#[test]
fn answers_come_in_order_and_their_lack_is_told() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, theirs) = crate::support::socketpair();
        let handle = reactor
            .adopt(Unix, ours.into(), front_end(|_, _| {}))
            .expect("a socket");
        let answers = Rc::new(RefCell::new(Vec::new()));
        for request in [VhostUserRequest::GetFeatures, VhostUserRequest::GetQueueNum] {
            let answers = Rc::clone(&answers);
            reactor.call_protocol::<UnixStream, FrontEnd>(handle, move |front_end, cx| {
                front_end.ask(cx, request, move |_, it| answers.borrow_mut().push(it));
            });
        }
        crate::support::settle(&mut reactor);
        let reply = |request: u32, value: u64| {
            let head = [request, 1 | 4, 8].map(u32::to_ne_bytes).concat();
            [head, value.to_ne_bytes().to_vec()].concat()
        };
        // The second is no answer to the second question.
        let bytes = [reply(1, 77), reply(15, 1)].concat();
        crate::suite::send(&theirs, &bytes, &[]);
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
        let answers = answers.borrow();
        assert!(
            matches!(answers[0], Ok(FrontEndReply::Value(77))),
            "{answers:?}"
        );
        assert!(
            matches!(answers[1], Err(FrontEndError::Malformed)),
            "{answers:?}"
        );
    }
    ledger.assert_balanced();
}

/// Where the parts of the ring are in the memory of what would be a guest.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEAD: u64 = 0x3000;
const STATUS: u64 = 0x3800;
const DATA: u64 = 0x4000;
const SIZE: u64 = 0x10000;

/// Where the guest has it, and where we would have it.
const GUEST: u64 = 0x8000_0000;
const USER: u64 = 0x7f00_0000_0000;

/// Puts one request into the ring: to read the sectors from this one on.
fn put_request(memory: &File, sector: u64) {
    let write = |bytes: &[u8], at: u64| memory.write_all_at(bytes, at).expect("room");
    write(
        &[&0_u64.to_le_bytes()[..], &sector.to_le_bytes()].concat(),
        HEAD,
    );
    for (number, (address, length, flags)) in [(HEAD, 16, 1), (DATA, 1_024, 3), (STATUS, 1, 2)]
        .into_iter()
        .enumerate()
    {
        let at = TABLE + 16 * number as u64;
        write(&(GUEST + address).to_le_bytes(), at);
        write(&u32::to_le_bytes(length), at + 8);
        write(&u16::to_le_bytes(flags), at + 12);
        write(&(number as u16 + 1).to_le_bytes(), at + 14);
    }
    write(&[0xff], STATUS);
    write(&[0, 0], AVAILABLE + 4);
    write(&[1, 0], AVAILABLE + 2);
}

#[test]
fn storage_daemon_of_qemu_reads_sectors_into_our_memory() {
    let _ledger = DescriptorLedger::open();
    if !has("qemu-storage-daemon", "qemu-system-common") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let (image, socket) = (
        directory.path().join("image"),
        directory.path().join("socket"),
    );
    let sectors: Vec<u8> = (0..64 * 512_u32).map(|place| (place / 7) as u8).collect();
    std::fs::write(&image, &sectors).expect("written");
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("file,node-name=f,filename={}", image.display()))
        .args(["--export", &export]);
    let mut reactor = Reactor::new().expect("a reactor");
    let daemon = Program::start(&mut command);
    let mut before = None;
    for round in 0..4 {
        let handle = connect(&mut reactor, &daemon, &socket);
        read_two_sectors(&mut reactor, handle, &sectors, round);
        before.get_or_insert_with(|| daemon.open_descriptors());
        reactor.get(handle).expect("connected").lose_connection();
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
    }
    daemon.wait_for_descriptors_at_most(&mut reactor, before.expect("of four"));
}

/// A whole session of a front-end.
#[track_caller]
fn read_two_sectors(
    reactor: &mut Reactor,
    handle: UnixTransportHandle,
    sectors: &[u8],
    sector: u64,
) {
    use VhostUserRequest as Request;
    let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("made");
    rustix::fs::ftruncate(&memory, SIZE).expect("room");
    let region = MemoryRegion {
        guest: GUEST,
        size: SIZE,
        user: USER,
        offset: 0,
        fd: memory.try_clone().expect("a number"),
    };
    let memory = File::from(memory);
    put_request(&memory, sector);
    let (kick, call) = (
        EventCounter::new().expect("made"),
        EventCounter::new().expect("made"),
    );
    let theirs = |counter: &EventCounter| OwnedFd::from(counter.try_clone().expect("a number"));
    let offered = ask(reactor, handle, Request::GetFeatures);
    let Ok(FrontEndReply::Value(offered)) = offered else {
        panic!("{offered:?}");
    };
    assert!(offered & features::PROTOCOL_FEATURES != 0, "{offered:x}");
    let protocol = features::PROTOCOL_CONFIG | features::PROTOCOL_REPLY_ACK;
    let offered = ask(reactor, handle, Request::GetProtocolFeatures);
    assert!(matches!(offered, Ok(FrontEndReply::Value(it)) if it & protocol == protocol));
    let (index, number) = (0, 8);
    let address = VringAddress {
        descriptors: USER + TABLE,
        used: USER + USED,
        available: USER + AVAILABLE,
        log: None,
    };
    let features = features::VERSION_1 | features::PROTOCOL_FEATURES;
    let begin: VecDeque<_> = [
        Request::SetProtocolFeatures(protocol),
        Request::SetOwner,
        Request::SetFeatures(features),
        Request::SetMemTable(vec![region]),
        Request::SetVringNum { index, number },
        Request::SetVringBase { index, number: 0 },
        Request::SetVringAddr { index, address },
        Request::SetVringCall {
            index,
            fd: Some(theirs(&call)),
        },
        Request::SetVringKick {
            index,
            fd: Some(theirs(&kick)),
        },
        Request::SetVringEnable { index, is_on: true },
    ]
    .into();
    for (place, request) in begin.into_iter().enumerate() {
        let what = format!("{request:?}");
        let answer = ask(reactor, handle, request);
        let is_right = match place {
            0 => matches!(answer, Ok(FrontEndReply::Sent)),
            _ => matches!(answer, Ok(FrontEndReply::Done)),
        };
        assert!(is_right, "{what}: {answer:?}");
    }
    let config = Request::GetConfig {
        offset: 0,
        size: 60,
        flags: 0,
    };
    match ask(reactor, handle, config) {
        Ok(FrontEndReply::Config(bytes)) => {
            assert_eq!(bytes.len(), 60);
            assert_eq!(bytes[..8], (sectors.len() as u64 / 512).to_le_bytes());
        }
        other => panic!("{other:?}"),
    }
    kick.add(1).expect("room");
    // It may call before there is anything, too.
    let mut calls = 0;
    run_until(reactor, |_| {
        calls += call.take().expect("a counter");
        let mut used = [0; 2];
        memory.read_exact_at(&mut used, USED + 2).expect("there");
        calls > 0 && used == [1, 0]
    });
    let mut status = [0xff];
    memory.read_exact_at(&mut status, STATUS).expect("there");
    assert_eq!(status, [0], "it went well");
    let mut data = vec![0; 1_024];
    memory.read_exact_at(&mut data, DATA).expect("there");
    let at = sector as usize * 512;
    assert_eq!(data, sectors[at..at + 1_024]);
    let stopped = ask(reactor, handle, Request::GetVringBase { index });
    assert!(
        matches!(
            stopped,
            Ok(FrontEndReply::Vring {
                index: 0,
                number: 1
            })
        ),
        "{stopped:?}"
    );
}
