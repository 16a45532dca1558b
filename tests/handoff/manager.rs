//! The manager's side of notices: our own notifier and systemd's program say them, and
//! processes that are not admitted, or say nonsense.

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::Inherited;
use bowline::handoff::systemd::{
    Applied, DescriptorStore, Dropped, Notice, NoticeHandler, NoticeSocket, Notifier, Said,
};
use bowline::{Credentials, Reactor, Transports, UnixAddress};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::support::{DEADLINE, DescriptorLedger, is_missing, run_until, wait_for_closes};

/// What a manager has heard.
#[derive(Debug)]
struct Heard {
    notices: Vec<String>,
    senders: Vec<u32>,
    dropped: Vec<Dropped>,
    store: DescriptorStore,
    applied: Vec<Applied>,
    /// Whom it listens to; nobody in particular if there is nobody.
    admitted: Option<u32>,
}

#[derive(Clone)]
struct Manager(Rc<RefCell<Heard>>);

impl Manager {
    fn new(most: usize) -> Self {
        Self(Rc::new(RefCell::new(Heard {
            notices: Vec::new(),
            senders: Vec::new(),
            dropped: Vec::new(),
            store: DescriptorStore::new(most),
            applied: Vec::new(),
            admitted: None,
        })))
    }

    fn notices(&self) -> Vec<String> {
        self.0.borrow().notices.clone()
    }

    fn dropped(&self) -> Vec<Dropped> {
        self.0.borrow().dropped.clone()
    }
}

impl NoticeHandler for Manager {
    fn admits(&mut self, sender: &Credentials) -> bool {
        let heard = self.0.borrow();
        heard.admitted.is_none_or(|pid| sender.pid == Some(pid))
    }

    fn notice_received(
        &mut self,
        _: &mut Reactor,
        sender: &Credentials,
        notice: &Notice,
        descriptors: Vec<OwnedFd>,
    ) {
        let mut heard = self.0.borrow_mut();
        heard.notices.push(notice.as_str().to_owned());
        heard
            .senders
            .push(sender.pid.expect("it is of this namespace"));
        let applied = heard.store.apply(notice, descriptors);
        heard.applied.push(applied);
    }

    fn notice_dropped(&mut self, _: &mut Reactor, _: Option<&Credentials>, why: Dropped) {
        self.0.borrow_mut().dropped.push(why);
    }
}

struct Stage {
    reactor: Reactor,
    manager: Manager,
    variable: String,
    directory: tempfile::TempDir,
    _ledger: DescriptorLedger,
}

impl Stage {
    fn new(most: usize) -> Self {
        let ledger = DescriptorLedger::open();
        let directory = tempfile::tempdir().unwrap();
        let mut reactor = Reactor::new().unwrap();
        let manager = Manager::new(most);
        let here = NoticeSocket::at(directory.path().join("notify")).mode(0o600);
        let variable = here.environment().into_string().unwrap();
        reactor.listen(here, manager.clone()).unwrap();
        Self {
            reactor,
            manager,
            variable,
            directory,
            _ledger: ledger,
        }
    }

    fn notifier(&self) -> Notifier {
        Notifier::connect(&self.variable).unwrap()
    }

    /// Sends bytes as they are, with descriptors.
    fn send(&self, data: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let socket = UnixDatagram::unbound().unwrap();
        socket.connect(self.path()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let data = [IoSlice::new(data)];
        rustix::net::sendmsg(&socket, &data, &mut control, SendFlags::empty()).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("notify")
    }

    fn hear(&mut self, count: usize) {
        let manager = self.manager.clone();
        run_until(&mut self.reactor, |_| {
            manager.notices().len() + manager.dropped().len() >= count
        });
        assert_eq!(manager.notices().len() + manager.dropped().len(), count);
    }
}

/// The ends of a pipe, the one for reading first.
fn pipe() -> (File, OwnedFd) {
    let (reading, writing) = std::io::pipe().unwrap();
    let reading = File::from(OwnedFd::from(reading));
    rustix::io::ioctl_fionbio(&reading, true).unwrap();
    (reading, writing.into())
}

/// Whether nobody has the other end any more.
fn is_closed(mut reading: &File) -> bool {
    matches!(reading.read(&mut [0]), Ok(0))
}

#[test]
fn what_our_notifier_says_is_heard_and_what_it_stores_is_kept() {
    let mut stage = Stage::new(3);
    let notifier = stage.notifier();
    notifier.send(&Notice::new().ready().status("up")).unwrap();
    let pipes: Vec<_> = (0..5).map(|_| pipe()).collect();
    let borrowed: Vec<_> = pipes.iter().map(|it| it.1.as_fd()).collect();
    let store = Notice::new().store("web").unwrap();
    notifier.send_with(&store, &borrowed[..2]).unwrap();
    let store = Notice::new().store("log").unwrap();
    notifier.send_with(&store, &borrowed[2..]).unwrap();
    notifier
        .send(&Notice::new().remove_stored("web").unwrap())
        .unwrap();
    drop(borrowed);
    let (readings, writings): (Vec<_>, Vec<_>) = pipes.into_iter().unzip();
    drop(writings);
    stage.hear(4);
    let heard = stage.manager.0.borrow();
    assert_eq!(heard.notices[0], "READY=1\nSTATUS=up\n");
    assert_eq!(heard.senders, [std::process::id(); 4]);
    let numbers: Vec<_> = heard
        .applied
        .iter()
        .map(|it| (it.stored, it.refused, it.removed, it.unclaimed))
        .collect();
    // Three at the most are kept at a time.
    let expected = [(0, 0, 0, 0), (2, 0, 0, 0), (1, 2, 0, 0), (0, 0, 2, 0)];
    assert_eq!(numbers, expected);
    assert_eq!(heard.store.names().collect::<Vec<_>>(), ["log"]);
    let open: Vec<_> = readings.iter().map(|it| !is_closed(it)).collect();
    assert_eq!(open, [false, false, true, false, false]);
    drop(heard);
    let store = std::mem::replace(
        &mut stage.manager.0.borrow_mut().store,
        DescriptorStore::new(0),
    );
    let mut inherited = Inherited::from(store);
    assert!(inherited.claim("log").is_some() && inherited.is_empty());
}

#[test]
fn a_barrier_is_answered_behind_what_was_said_before() {
    let mut stage = Stage::new(1);
    let notifier = stage.notifier();
    notifier.attach(&mut stage.reactor).unwrap();
    let is_through = Rc::new(std::cell::Cell::new(None));
    for number in 0..50 {
        let notice = Notice::new().status(&number.to_string());
        notifier.send(&notice).unwrap();
    }
    let (noted, manager) = (Rc::clone(&is_through), stage.manager.clone());
    let told = move |_: &mut Reactor, result: std::io::Result<()>| {
        result.unwrap();
        noted.set(Some(manager.notices().len()));
    };
    notifier
        .barrier(&mut stage.reactor, Duration::from_secs(5), told)
        .unwrap();
    let noted = Rc::clone(&is_through);
    run_until(&mut stage.reactor, |_| noted.get().is_some());
    assert_eq!(is_through.get(), Some(50), "all of it was heard by then");
    assert!(stage.manager.dropped().is_empty());
}

#[test]
fn who_is_not_admitted_is_not_heard_and_its_descriptors_are_closed() {
    let mut stage = Stage::new(8);
    stage.manager.0.borrow_mut().admitted = Some(1);
    let (reading, writing) = pipe();
    stage.send(b"READY=1\nFDSTORE=1", &[writing.as_fd(), writing.as_fd()]);
    stage.send(b"BARRIER=1", &[writing.as_fd()]);
    drop(writing);
    stage.hear(2);
    wait_for_closes();
    assert_eq!(stage.manager.dropped(), [Dropped::NotAdmitted; 2]);
    assert!(is_closed(&reading));
    stage.manager.0.borrow_mut().admitted = Some(std::process::id());
    stage.send(b"READY=1", &[]);
    stage.hear(3);
    assert_eq!(stage.manager.notices(), ["READY=1\n"]);
}

#[test]
fn nonsense_is_dropped_with_its_descriptors_and_costs_nothing_else() {
    let mut stage = Stage::new(8);
    let (reading, writing) = pipe();
    let one = [writing.as_fd()];
    let two = [writing.as_fd(), writing.as_fd()];
    let long = [b"STATUS=".as_slice(), &[b'x'; 4_096]].concat();
    let fits = [b"STATUS=".as_slice(), &[b'x'; 4_096 - 7]].concat();
    let all: [(&[u8], &[BorrowedFd<'_>], Option<Dropped>); 12] = [
        (b"", &one, Some(Dropped::Malformed)),
        (b"\xff\xfe", &one, Some(Dropped::Malformed)),
        (b"READY=1\0STATUS=x", &[], Some(Dropped::Malformed)),
        (b"no field at all", &[], Some(Dropped::Malformed)),
        (&long, &one, Some(Dropped::TooLong)),
        (&fits, &[], None),
        (b"BARRIER=1", &[], Some(Dropped::Barrier)),
        (b"BARRIER=1", &two, Some(Dropped::Barrier)),
        (b"BARRIER=1\nREADY=1", &one, Some(Dropped::Barrier)),
        (b"BARRIER=yes", &one, Some(Dropped::Barrier)),
        // Nobody said that these are to be kept; and a name that is none.
        (b"STATUS=and here they are", &two, None),
        (b"FDSTORE=1\nFDNAME=a:b", &one, None),
    ];
    for (data, descriptors, _) in all {
        stage.send(data, descriptors);
        let count = stage.manager.notices().len() + stage.manager.dropped().len();
        stage.hear(count + 1);
    }
    let expected: Vec<_> = all.iter().filter_map(|it| it.2).collect();
    assert_eq!(stage.manager.dropped(), expected);
    assert_eq!(stage.manager.notices().len(), 3);
    let heard = stage.manager.0.borrow();
    let last = &heard.applied[1..];
    assert_eq!((last[0].unclaimed, last[1].refused), (2, 1));
    assert!(heard.store.is_empty());
    drop(writing);
    wait_for_closes();
    assert!(is_closed(&reading));
}

/// A file that somebody sends under no name is kept as systemd keeps it.
#[test]
fn descriptors_without_a_name_have_that_of_systemd() {
    let mut stage = Stage::new(8);
    let (_reading, writing) = pipe();
    stage.send(b"FDSTORE=1\n", &[writing.as_fd()]);
    stage.send(b"FDSTOREREMOVE=1\n", &[]);
    stage.hear(2);
    let mut heard = stage.manager.0.borrow_mut();
    assert_eq!(heard.store.names().collect::<Vec<_>>(), ["stored"]);
    assert_eq!(heard.store.take("stored").len(), 1);
}

#[test]
fn names_of_the_abstract_namespace_are_told_to_services() {
    let _ledger = DescriptorLedger::open();
    let name = UnixAddress::from(format!("@bowline-manager-{}", std::process::id()).as_str());
    let mut reactor = Reactor::new().unwrap();
    let manager = Manager::new(0);
    let here = NoticeSocket::at(name);
    let variable = here.environment().into_string().unwrap();
    assert!(variable.starts_with('@'));
    reactor.listen(here, manager.clone()).unwrap();
    let notifier = Notifier::connect(&variable).unwrap();
    notifier.send(&Notice::new().stopping()).unwrap();
    run_until(&mut reactor, |_| !manager.notices().is_empty());
}

/// systemd's own program, which waits for its barrier to be answered.
#[test]
fn systemd_notify_is_heard_and_answered() {
    if is_missing("systemd-notify", "systemd") {
        return;
    }
    let mut stage = Stage::new(1);
    let mut command = Command::new("systemd-notify");
    command
        .args([
            "--ready",
            "--status=all is well",
            "--pid=4711",
            "WATCHDOG_USEC=3000",
        ])
        .env("NOTIFY_SOCKET", &stage.variable)
        .stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    let began = Instant::now();
    let status = loop {
        stage.reactor.turn(Some(Duration::from_millis(10)));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < DEADLINE, "its barrier is not answered");
    };
    assert!(status.success());
    let notices = stage.manager.notices();
    assert_eq!(notices.len(), 1, "{notices:?}");
    let notice = Notice::parse(notices[0].as_bytes()).unwrap();
    let said: Vec<_> = notice.said().collect();
    for expected in [
        Said::Ready,
        Said::Status("all is well"),
        Said::MainPid(4_711),
        Said::WatchdogInterval(Duration::from_millis(3)),
    ] {
        assert!(said.contains(&expected), "{said:?}");
    }
    assert!(stage.manager.dropped().is_empty());
}

/// As systemd does: one open file is kept once, whatever its name, and one whose other end
/// has closed is not kept on, unless its service said so.
#[test]
fn what_is_kept_already_or_has_no_other_end_is_not_kept() {
    let mut stage = Stage::new(4);
    let (reading, writing) = pipe();
    let copy = writing.try_clone().unwrap();
    stage.send(b"FDSTORE=1\nFDNAME=one", &[writing.as_fd(), copy.as_fd()]);
    stage.send(b"FDSTORE=1\nFDNAME=two", &[copy.as_fd()]);
    let (deaf, unpolled) = pipe();
    stage.send(b"FDSTORE=1\nFDNAME=un\nFDPOLL=0", &[unpolled.as_fd()]);
    // What has no other end is not without one.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let file = File::open("/dev/null").unwrap();
    stage.send(b"FDSTORE=1\nFDNAME=more", &[listener.as_fd(), file.as_fd()]);
    stage.hear(4);
    drop((writing, copy, unpolled));
    {
        let heard = stage.manager.0.borrow();
        let counts: Vec<_> = heard
            .applied
            .iter()
            .map(|it| (it.stored, it.duplicates))
            .collect();
        assert_eq!(counts, [(1, 1), (0, 1), (1, 0), (2, 0)]);
        assert_eq!(
            heard.store.names().collect::<Vec<_>>(),
            ["one", "un", "more", "more"]
        );
    }
    // Nobody reads these two any more.
    drop((reading, deaf));
    let (reading, writing) = pipe();
    stage.send(b"FDSTORE=1\nFDNAME=last", &[writing.as_fd()]);
    stage.hear(5);
    let mut heard = stage.manager.0.borrow_mut();
    let last = *heard.applied.last().unwrap();
    assert_eq!(
        (last.removed, last.stored, last.refused),
        (1, 1, 0),
        "its place is free"
    );
    assert_eq!(
        heard.store.names().collect::<Vec<_>>(),
        ["un", "more", "more", "last"]
    );
    drop((reading, writing));
    assert_eq!(heard.store.remove_hung_up(), 1);
    let names: Vec<_> = heard.store.take_all().into_iter().map(|it| it.0).collect();
    assert_eq!(names, ["un", "more", "more"]);
}
