//! Socket options, and the socket itself for those that have no method.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bowline::Tcp;
use bowline::{Address, CloseReason, Context, Protocol, Reactor, TcpTransport, Transports};
use rustix::net::sockopt;

use crate::support::{DescriptorLedger, run_until};

/// What one end saw of its options, made and lost.
#[derive(Debug, Default)]
struct Seen {
    at_first: Vec<(bool, bool)>,
    after_setting: Vec<(bool, bool)>,
    times: Vec<(Duration, Duration, u32)>,
    after_the_loss: Vec<(Option<io::ErrorKind>, bool)>,
    /// Whether the descriptor was open, made and lost.
    open: Vec<(bool, bool)>,
}

struct Prober {
    seen: Rc<RefCell<Seen>>,
    socket: Option<(RawFd, PathBuf)>,
}

impl Prober {
    fn new(seen: &Rc<RefCell<Seen>>) -> Self {
        let (seen, socket) = (Rc::clone(seen), None);
        Self { seen, socket }
    }
}

/// What the descriptor of this number is, if it is open.
fn open_as(number: RawFd) -> Option<PathBuf> {
    fs::read_link(format!("/proc/thread-self/fd/{number}")).ok()
}

impl<T: TcpTransport> Protocol<T> for Prober {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let mut seen = self.seen.borrow_mut();
        let transport = &mut *cx.transport;
        seen.at_first.push((
            transport.no_delay().unwrap(),
            transport.keep_alive().unwrap(),
        ));
        transport.set_no_delay(true).unwrap();
        transport.set_keep_alive(true).unwrap();
        let (idle, interval) = (Duration::from_secs(77), Duration::from_secs(7));
        transport.set_keep_alive_times(idle, interval, 3).unwrap();
        seen.after_setting.push((
            transport.no_delay().unwrap(),
            transport.keep_alive().unwrap(),
        ));
        // The socket's own, and back again.
        for is_on in [false, true] {
            transport.set_no_delay(is_on).unwrap();
            transport.set_keep_alive(is_on).unwrap();
            let socket = transport.socket_descriptor().unwrap();
            let of_socket = (
                sockopt::tcp_nodelay(socket).unwrap(),
                sockopt::socket_keepalive(socket).unwrap(),
            );
            assert_eq!(of_socket, (is_on, is_on), "set, and not in force");
            let told = (
                transport.no_delay().unwrap(),
                transport.keep_alive().unwrap(),
            );
            assert_eq!(told, of_socket, "told otherwise than it is");
        }
        let socket = transport.socket_descriptor().unwrap();
        let number = socket.as_raw_fd();
        self.socket = open_as(number).map(|what| (number, what));
        seen.times.push((
            sockopt::tcp_keepidle(socket).unwrap(),
            sockopt::tcp_keepintvl(socket).unwrap(),
            sockopt::tcp_keepcnt(socket).unwrap(),
        ));
        transport.lose_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        let asked = cx.transport.no_delay();
        let (number, socket) = self.socket.take().unwrap();
        let is_open = open_as(number).is_some_and(|now| now == socket);
        self.seen.borrow_mut().open.push((true, is_open));
        self.seen.borrow_mut().after_the_loss.push((
            asked.err().map(|error| error.kind()),
            cx.transport.socket_descriptor().is_none(),
        ));
    }
}

/// Contract T-01, T-02, T-12, T-13, F-20: the socket is closed when the loss is told.
#[test]
fn tcp_options_are_off_at_first_settable_and_gone_with_the_socket() {
    let ledger = DescriptorLedger::open();
    let seen = Rc::new(RefCell::new(Seen::default()));
    let mut reactor = Reactor::new().unwrap();
    let prober = |seen: &Rc<RefCell<Seen>>| {
        let seen = Rc::clone(seen);
        move |_: &Address| Prober::new(&seen)
    };
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), prober(&seen))
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    reactor.connect_tcp(address, prober(&seen)).unwrap();
    run_until(&mut reactor, |_| seen.borrow().after_the_loss.len() == 2);
    let seen = seen.take();
    assert_eq!(seen.at_first, [(false, false); 2]);
    assert_eq!(seen.after_setting, [(true, true); 2]);
    assert_eq!(
        seen.times,
        [(Duration::from_secs(77), Duration::from_secs(7), 3); 2]
    );
    assert_eq!(
        seen.after_the_loss,
        [(Some(io::ErrorKind::NotConnected), true); 2]
    );
    assert_eq!(seen.open, [(true, false); 2]);
    assert_eq!(reactor.statistics().panics, 0);
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn options_of_listener_and_connector_are_in_force_from_the_start() {
    let ledger = DescriptorLedger::open();
    let seen = Rc::new(RefCell::new(Seen::default()));
    let mut reactor = Reactor::new().unwrap();
    let of_accepted = Rc::clone(&seen);
    let listener = reactor
        .listen(
            Tcp::at(([127, 0, 0, 1], 0).into())
                .no_delay(true)
                .keep_alive(true),
            move |_: &Address| Prober::new(&of_accepted),
        )
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let of_connected = Rc::clone(&seen);
    reactor
        .connect(
            Tcp::to(address).no_delay(true).keep_alive(true),
            move |_: &Address| Prober::new(&of_connected),
        )
        .unwrap();
    run_until(&mut reactor, |_| seen.borrow().after_the_loss.len() == 2);
    assert_eq!(seen.borrow().at_first, [(true, true); 2]);
    drop(reactor);
    ledger.assert_balanced();
}
