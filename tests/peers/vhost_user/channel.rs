//! What a back-end asks, and what is passed for migration and for going on after a crash.

use std::cell::RefCell;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;
use std::rc::Rc;

use bowline::framing::FrameEncoder as _;
use bowline::{Reactor, Transports, Unix, UnixStream, UnixTransportHandle};
use bowline_peers::vhost_user::{
    Acknowledged, BackEndChannel, BackEndRequest, FrontEndError, FrontEndReply, InflightRegion,
    VhostUserFramer, VhostUserHeader, VhostUserRequest, back_end_channel, features, front_end,
    front_end_channel,
};
use rustix::fs::MemfdFlags;

use super::{Answer, ask, connect, words};
use crate::programs::{Program, has};
use crate::suite::{Heard, Limit, Message, Outcome, Rule, Sample, Served, Trial, identity, send};
use crate::support::{DescriptorLedger, run_until, settle, socketpair};

/// A message as a back-end sends it.
fn message(request: u32, payload: &[u8], descriptors: usize, heard: &str) -> Message {
    let header = VhostUserHeader {
        request,
        is_reply: false,
        needs_reply: true,
    };
    let mut bytes = Vec::new();
    VhostUserFramer::of_back_end()
        .with_max_payload(usize::MAX)
        .encode(&header, payload, 0, &mut bytes)
        .expect("short");
    Message::new(bytes, descriptors, heard)
}

/// The front-end's end.
struct Channel;

impl Sample for Channel {
    fn rule(&self) -> Rule {
        Rule::Claimed
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let heard = heard.clone();
        let framed = front_end_channel(move |_, request| {
            match request {
                BackEndRequest::HostNotifier { index, fd, .. } => {
                    heard.message(format!("notifier {index}"), fd);
                }
                BackEndRequest::Other {
                    request,
                    descriptors,
                    ..
                } => heard.message(format!("other {request}"), descriptors),
                other => heard.message(format!("{other:?}"), []),
            }
            Ok(())
        });
        Served::by(|socket| reactor.adopt(Unix, socket, framed).expect("a socket"))
    }

    fn messages(&self) -> Vec<Message> {
        vec![
            message(2, &[], 0, "ConfigChanged"),
            message(3, &words(&[1, 4_096, 0]), 1, "notifier 1"),
            message(3, &words(&[0x102, 0, 0]), 0, "notifier 2"),
            message(4, &words(&[3]), 0, "VringCall { index: 3 }"),
            message(3, &words(&[4, 4_096, 8_192]), 1, "notifier 4"),
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
        // Of descriptors no request has more than one.
        let of = |length| message(99, &vec![7; length], 1, "other 99");
        vec![Limit {
            of: "bytes",
            within: of(4_096),
            beyond: of(4_097),
        }]
    }
}

suite!(requests, Channel);

fn memfd() -> OwnedFd {
    rustix::fs::memfd_create("passed", MemfdFlags::CLOEXEC).expect("a number is free")
}

/// A front-end's channel and a back-end's, joined.
#[test]
fn back_end_is_told_what_came_of_its_requests() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a reactor");
    let (ours, theirs) = socketpair();
    let heard = Heard::default();
    let asked = heard.clone();
    let front_end = front_end_channel(move |_, request| match request {
        BackEndRequest::HostNotifier { fd, .. } => {
            asked.message("notifier", fd);
            Ok(())
        }
        other => {
            asked.message(format!("{other:?}"), []);
            Err(7)
        }
    });
    reactor.adopt(Unix, ours.into(), front_end).expect("stream");
    let channel = back_end_channel(|_, _| {});
    let channel = reactor.adopt(Unix, theirs.into(), channel).expect("stream");
    let (index, size, offset) = (1, 4_096, 0);
    let fd = memfd();
    let given = identity(&fd);
    let notifier = BackEndRequest::HostNotifier {
        index,
        size,
        offset,
        fd: Some(fd),
    };
    let answers = Rc::new(RefCell::new(Vec::new()));
    let told = Rc::clone(&answers);
    reactor.call_protocol::<UnixStream, BackEndChannel>(channel, move |channel, cx| {
        for (request, acknowledged) in [
            (notifier, Acknowledged::Yes),
            (BackEndRequest::VringErr { index }, Acknowledged::Yes),
            (BackEndRequest::ConfigChanged, Acknowledged::No),
        ] {
            let told = Rc::clone(&told);
            channel.ask(cx, request, acknowledged, move |_, answer| {
                told.borrow_mut().push(answer)
            });
        }
        assert_eq!(channel.outstanding(), 2);
    });
    settle(&mut reactor);
    let answers = answers.borrow();
    let [sent, done, failed] = &answers[..] else {
        panic!("{answers:?}");
    };
    assert!(matches!(sent, Ok(FrontEndReply::Sent)), "{sent:?}");
    assert!(matches!(done, Ok(FrontEndReply::Done)), "{done:?}");
    assert!(
        matches!(failed, Err(FrontEndError::Failed(7))),
        "{failed:?}"
    );
    let heard = heard.take();
    assert_eq!(heard[0], ("notifier".to_owned(), vec![given]));
    let rest: Vec<_> = heard[1..].iter().map(|(text, _)| text.as_str()).collect();
    assert_eq!(rest, ["VringErr { index: 1 }", "ConfigChanged"]);
}

/// The memory of a device comes with the answer that says what it is, and an answer without
/// it is none.
#[test]
fn answer_has_its_descriptor() {
    let ledger = DescriptorLedger::open();
    {
        for count in [1, 0] {
            let mut reactor = Reactor::new().expect("a reactor");
            let (ours, theirs) = socketpair();
            let handle = reactor.adopt(Unix, ours.into(), front_end(|_, _| {}));
            let handle = handle.expect("a socket");
            let answer = Rc::new(RefCell::new(None));
            let told = Rc::clone(&answer);
            reactor.call_protocol::<UnixStream, super::FrontEnd>(handle, move |front_end, cx| {
                let request = VhostUserRequest::GetInflightFd(InflightRegion::default());
                front_end.ask(cx, request, move |_, it| *told.borrow_mut() = Some(it));
            });
            settle(&mut reactor);
            let head = [31, 1 | 4, 24].map(u32::to_ne_bytes).concat();
            let bytes = [head, words(&[4_096, 0, 128 << 16 | 2])].concat();
            let fd = memfd();
            send(&theirs, &bytes, &[fd.as_fd()][..count]);
            settle(&mut reactor);
            match answer.borrow_mut().take() {
                Some(Ok(FrontEndReply::Inflight { region, fd: given })) if count == 1 => {
                    assert_eq!(identity(given), identity(&fd));
                    let (queues, queue_size) = (region.queues, region.queue_size);
                    assert_eq!((region.size, queues, queue_size), (4_096, 2, 128));
                }
                Some(Err(FrontEndError::Lost)) if count == 0 => {}
                other => panic!("{count}: {other:?}"),
            }
            assert_eq!(reactor.get(handle).is_some(), count == 1);
        }
    }
    ledger.assert_balanced();
}

#[test]
fn storage_daemon_of_qemu_takes_a_log_and_a_channel_and_gives_memory() {
    let _ledger = DescriptorLedger::open();
    if !has("qemu-storage-daemon", "qemu-system-common") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let (image, socket) = (
        directory.path().join("image"),
        directory.path().join("socket"),
    );
    std::fs::write(&image, vec![0; 64 * 512]).expect("written");
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
    for _ in 0..3 {
        let handle = connect(&mut reactor, &daemon, &socket);
        pass_everything(&mut reactor, handle);
        before.get_or_insert_with(|| daemon.open_descriptors());
        reactor.get(handle).expect("connected").lose_connection();
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
    }
    daemon.wait_for_descriptors_at_most(&mut reactor, before.expect("of three"));
}

/// A session of a front-end that wants all of it.
#[track_caller]
fn pass_everything(reactor: &mut Reactor, handle: UnixTransportHandle) {
    use VhostUserRequest as Request;
    let is_done = |what: &str, answer: Answer| {
        assert!(
            matches!(answer, Ok(FrontEndReply::Done)),
            "{what}: {answer:?}"
        );
    };
    let protocol = features::PROTOCOL_CONFIG
        | features::PROTOCOL_REPLY_ACK
        | features::PROTOCOL_LOG_SHMFD
        | features::PROTOCOL_BACKEND_REQ;
    let offered = ask(reactor, handle, Request::GetProtocolFeatures);
    assert!(
        matches!(offered, Ok(FrontEndReply::Value(it)) if it & protocol == protocol),
        "{offered:?}"
    );
    let chosen = ask(reactor, handle, Request::SetProtocolFeatures(protocol));
    assert!(matches!(chosen, Ok(FrontEndReply::Sent)), "{chosen:?}");
    is_done("owner", ask(reactor, handle, Request::SetOwner));

    let log = memfd();
    rustix::fs::ftruncate(&log, 4_096).expect("room");
    let (size, offset) = (4_096, 0);
    let log = Request::SetLogBase {
        size,
        offset,
        fd: log,
    };
    is_done("log", ask(reactor, handle, log));

    let wanted = InflightRegion {
        queues: 1,
        queue_size: 128,
        ..InflightRegion::default()
    };
    let (region, fd) = match ask(reactor, handle, Request::GetInflightFd(wanted)) {
        Ok(FrontEndReply::Inflight { region, fd }) => (region, fd),
        other => panic!("{other:?}"),
    };
    let has = rustix::fs::fstat(&fd).expect("a file").st_size;
    assert!(
        region.size > 0 && region.offset + region.size <= has as u64,
        "{region:?}"
    );
    assert_eq!((region.queues, region.queue_size), (1, 128));
    let again = Request::SetInflightFd { region, fd };
    is_done("inflight", ask(reactor, handle, again));

    let (ours, theirs) = socketpair();
    let heard = Heard::default();
    let asked = heard.clone();
    let channel = front_end_channel(move |_, request| {
        asked.message(format!("{request:?}"), []);
        Ok(())
    });
    let channel = reactor.adopt(Unix, ours.into(), channel).expect("a stream");
    let theirs = Request::SetBackendReqFd(theirs.into());
    is_done("channel", ask(reactor, handle, theirs));
    // It says nothing of its own, and goes on.
    let config = Request::GetConfig {
        offset: 0,
        size: 60,
        flags: 0,
    };
    match ask(reactor, handle, config) {
        Ok(FrontEndReply::Config(config)) => assert_eq!(config[..8], 64_u64.to_le_bytes()),
        other => panic!("{other:?}"),
    }
    assert_eq!(heard.texts(), [""; 0]);
    reactor.get(channel).expect("open").lose_connection();
}
