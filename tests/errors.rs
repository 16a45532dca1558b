//! An error's text names its cause: whoever prints it, and nothing else, says why.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use bowline::descriptor::{
    DescriptorKind, SealedMemoryError, SealedMemoryErrorKind, WrongDescriptor,
};
use bowline::endpoint::{EndpointError, ServerEndpoint};
use bowline::error::{
    AdoptError, AdoptErrorKind, CallError, DelayedCallError, DetachError, FailedAttempt,
    FileSendError, ListenError, LookupError, NotSent, ReactorError, ReattachError,
    RegisterProducerError, RemoteError, RunError, SendDescriptorError, SendDescriptorErrorKind,
    SendRefusal, ThreadCallError, TriggerError,
};
use bowline::framing::{EncodeError, FramingError, SendFrameError, SendFrameErrorKind};
use bowline::handoff::channel::ChannelError;
use bowline::handoff::restart::{Refusal, RestartError};
use bowline::handoff::systemd::{ActivationError, Notice, NoticeError};
use bowline::handoff::wire::{SendError, SendErrorKind, WireError};
use bowline::inspect::{InspectError, OperateError};
use bowline::process::{
    ChildCommand, ProcessContext, ProcessProtocol, ProcessStatus, SignalError, SpawnError,
};
use bowline::testing::MemoryStream;
use bowline::tls::{LoadError, MoveError, StartTlsError, TlsError, rustls};
use bowline::{
    Address, CloseReason, ConnectError, FileSender, Reactor, TransportHandle, Transports,
};
use bowline_peers::dbus::DbusError;
use bowline_peers::haproxy::TakeError;
use bowline_peers::node::{NodeSendError, NodeSendErrorKind};
use bowline_peers::oci::ConsoleError;
use bowline_peers::vhost_user::FrontEndError;
use bowline_peers::wayland::{WaylandSendError, WaylandSendErrorKind};

mod support;

use support::{Recorder, run_until};

/// As what `check` answers is called.
fn wrong_descriptor() -> WrongDescriptor {
    DescriptorKind::Pipe.check(file()).unwrap_err()
}

const WHY: &str = "out of quills";

fn why() -> io::Error {
    io::Error::other(WHY)
}

fn file() -> OwnedFd {
    fs::File::open("/dev/null").unwrap().into()
}

/// One of each, or of each variant that has a cause.
fn errors() -> Vec<Box<dyn Error>> {
    let address = ([192, 0, 2, 1], 80).into();
    vec![
        Box::new(ReactorError::NotRunning),
        Box::new(RunError::Failed(why())),
        Box::new(TriggerError),
        Box::new(delayed_call_error()),
        Box::new(remote_error()),
        Box::new(ThreadCallError::NoThread(why())),
        Box::new(LookupError::Failed(why())),
        Box::new(ConnectError::Refused(why())),
        Box::new(ConnectError::Unreachable(why())),
        Box::new(ConnectError::TimedOutByKernel(why())),
        Box::new(ConnectError::Bind(why())),
        Box::new(ConnectError::Os(why())),
        Box::new(ConnectError::Handshake(CloseReason::Lost(why()))),
        Box::new(ConnectError::Lookup(LookupError::Failed(why()))),
        Box::new(ConnectError::Lookup(LookupError::NoAddress)),
        Box::new(ConnectError::AllFailed(vec![FailedAttempt::new(
            address,
            ConnectError::Refused(why()),
        )])),
        Box::new(RegisterProducerError::NotConnected),
        Box::new(SendDescriptorErrorKind::QueueFull),
        Box::new(SendDescriptorError {
            kind: SendDescriptorErrorKind::QueueFull,
            descriptors: Vec::new(),
        }),
        Box::new(CloseReason::Lost(why())),
        Box::new(NotSent { sent: 7 }),
        Box::new(SendRefusal::QueueFull),
        Box::new(SignalError::ExitedAlready),
        Box::new(SignalError::Os(why())),
        Box::new(spawn_error()),
        Box::new(FramingError::BadLength),
        Box::new(EncodeError::ContainsDelimiter),
        Box::new(SendFrameErrorKind::Encode(EncodeError::ContainsDelimiter)),
        Box::new(SendFrameError {
            kind: SendFrameErrorKind::Encode(EncodeError::ContainsDelimiter),
            descriptors: Vec::new(),
        }),
        Box::new(file_send_error()),
        Box::new(listen_error()),
        Box::new(AdoptError {
            kind: AdoptErrorKind::Os(why()),
            fd: file(),
        }),
        Box::new(io::Error::from(AdoptError {
            kind: AdoptErrorKind::NotASocket,
            fd: file(),
        })),
        Box::new(DetachError::Lost),
        Box::new(CallError::WrongProtocol),
        Box::new(reattach_error()),
        Box::new(OperateError::Unsupported),
        Box::new(InspectError::Place("here".into())),
        Box::new(MoveError::Os(why())),
        Box::new(MoveError::Taken),
        Box::new(RestartError::Spawn(why())),
        Box::new(RestartError::Listen(why())),
        Box::new(RestartError::Control(why())),
        Box::new(RestartError::Refused(Refusal::Format)),
        Box::new(RestartError::LookedInVain {
            looks: 2,
            last: Box::new(RestartError::Control(why())),
        }),
        Box::new(ChannelError::Framing(FramingError::BadLength)),
        Box::new(ChannelError::Wire(WireError::Truncated)),
        Box::new(ChannelError::Credentials(why())),
        Box::new(WireError::Truncated),
        Box::new(SendError {
            kind: SendErrorKind::Wire(WireError::Truncated),
            descriptors: Vec::new(),
        }),
        Box::new(SendError {
            kind: SendErrorKind::Transport(SendDescriptorErrorKind::QueueFull),
            descriptors: Vec::new(),
        }),
        Box::new(ActivationError::Descriptor {
            number: 7,
            error: why(),
        }),
        Box::new(notice_error()),
        Box::new(wrong_descriptor()),
        Box::new(ConsoleError::Wrong(wrong_descriptor())),
        Box::new(DbusError::Framing(FramingError::BadLength)),
        Box::new(FrontEndError::Failed(7)),
        Box::new(WaylandSendError {
            kind: WaylandSendErrorKind::NoObject,
            descriptors: Vec::new(),
        }),
        Box::new(EndpointError::from(why())),
        Box::new(SealedMemoryError {
            kind: SealedMemoryErrorKind::Os(why()),
            fd: file(),
        }),
        Box::new("tcp:".parse::<ServerEndpoint>().unwrap_err()),
        Box::new(TlsError::Certificate(why_of_rustls())),
        Box::new(TlsError::Peer(why_of_rustls())),
        Box::new(TlsError::Configuration(why_of_rustls())),
        Box::new(TlsError::CutOff),
        Box::new(StartTlsError::Configuration(why_of_rustls())),
        Box::new(LoadError::Unusable(why_of_rustls())),
        Box::new(LoadError::File {
            path: "/nonexistent".into(),
            error: rustls::pki_types::pem::Error::Io(why()),
        }),
        Box::new(TakeError::NotASocket(why())),
        Box::new(TakeError::Lost(why())),
        Box::new(TakeError::Framing(FramingError::BadLength)),
        Box::new(NodeSendError {
            kind: NodeSendErrorKind::NotPassable,
            handle: None,
        }),
    ]
}

fn why_of_rustls() -> rustls::Error {
    rustls::Error::General(WHY.into())
}

fn delayed_call_error() -> DelayedCallError {
    let mut reactor = Reactor::new().unwrap();
    let call = reactor.call_later(std::time::Duration::ZERO, |_| {});
    call.cancel(&mut reactor).unwrap();
    call.cancel(&mut reactor).unwrap_err()
}

fn notice_error() -> NoticeError {
    Notice::new().remove_stored("a:b").unwrap_err()
}

fn spawn_error() -> SpawnError {
    struct Never;
    impl ProcessProtocol for Never {
        fn child_data_received(&mut self, _: &mut ProcessContext<'_>, _: u32, _: &[u8]) {
            unreachable!("it was not started");
        }

        fn process_ended(&mut self, _: &mut ProcessContext<'_>, _: ProcessStatus) {
            unreachable!("it was not started");
        }
    }
    let command = ChildCommand::new(Command::new("/nowhere/at/all"));
    let mut reactor = Reactor::new().unwrap();
    reactor.spawn_process(command, Never).unwrap_err()
}

fn remote_error() -> RemoteError {
    let remote = Reactor::new().unwrap().remote();
    remote.call_from_thread(|_| {}).unwrap_err()
}

/// A reactor with a connection, and its other end.
fn connected() -> (Reactor, TransportHandle, StdUnixStream) {
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let handle = reactor
        .adopt_unix_stream(ours.into(), Recorder::default())
        .unwrap();
    let handle = reactor.get(handle).unwrap().handle();
    (reactor, handle, theirs)
}

/// A file that cannot be read.
struct Broken;

impl io::Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(why())
    }
}

fn file_send_error() -> FileSendError {
    let (mut reactor, handle, _theirs) = connected();
    let told = Rc::new(RefCell::new(None));
    let result = Rc::clone(&told);
    FileSender::new(Broken)
        .send(reactor.get(handle).unwrap(), move |_, it| {
            *result.borrow_mut() = it.err();
        })
        .unwrap();
    run_until(&mut reactor, |_| told.borrow().is_some());
    told.take().unwrap()
}

fn listen_error() -> ListenError {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut reactor = Reactor::new().unwrap();
    reactor
        .listen_tcp(taken.local_addr().unwrap(), |_: &Address| {
            Recorder::default()
        })
        .unwrap_err()
}

fn reattach_error() -> ReattachError<Recorder> {
    let (mut reactor, handle, _theirs) = connected();
    let told = Rc::new(RefCell::new(None));
    let result = Rc::clone(&told);
    reactor.detach(handle, move |_, it| *result.borrow_mut() = it.ok());
    run_until(&mut reactor, |_| told.borrow().is_some());
    let detached = told.take().unwrap();
    let mut error = reactor.reattach::<MemoryStream, _>(detached).unwrap_err();
    error.kind = AdoptErrorKind::Os(why());
    error
}

#[test]
fn text_of_every_error_names_its_cause() {
    let mut with_cause = 0;
    for error in errors() {
        let text = error.to_string();
        let mut cause = error.source();
        with_cause += u32::from(cause.is_some());
        while let Some(error) = cause {
            assert!(text.contains(&error.to_string()), "{text}, of {error}");
            cause = error.source();
        }
        assert!(!text.ends_with('.'), "{text}");
    }
    assert!(with_cause >= 20, "{with_cause}");
    // Where the cause is no error by itself.
    let text = reattach_error().to_string();
    assert!(text.ends_with(WHY), "{text}");
    let text = ConnectError::AllFailed(vec![FailedAttempt::new(
        ([192, 0, 2, 1], 80).into(),
        ConnectError::TimedOut,
    )]);
    let text = text.to_string();
    assert!(text.ends_with("192.0.2.1:80: connecting took longer than its timeout"));
}

#[test]
fn no_error_type_is_missing_above() {
    let tested = fs::read_to_string(file!()).unwrap();
    let mut types = BTreeSet::new();
    for package in [
        "reactor",
        "protocol",
        "transport",
        "handoff",
        "tls",
        "inspect",
        "peers",
    ] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        find(&root.join(package).join("src"), &mut types);
    }
    assert!(types.len() >= 24, "{types:?}");
    for name in types {
        assert!(tested.contains(&name), "{name} has no row in the table");
    }
}

/// The types that are errors in the sources of a folder.
fn find(folder: &Path, types: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, types);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.lines().filter(|line| line.starts_with("impl"));
            let names =
                names.filter_map(|line| line.split_once("Error for ")?.1.split(['<', ' ']).next());
            types.extend(names.map(String::from));
        }
    }
}
