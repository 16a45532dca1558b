//! Clients of a pool, in the reactor of the test: each makes one connection,
//! asks with its number, and reads the answer to the end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use bowline::Tcp;
use bowline::handoff::pool::{PassedConnection, Pool};
use bowline::{
    Address, AnyConnection as _, BuildContext, CloseReason, ConnectError, Context, Factory,
    Protocol, Reactor, TcpStream, Transport, Transports,
};

/// What became of the clients so far.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Who has answered whom.
    pub(crate) answered: BTreeMap<u32, u32>,
    /// Who has ended without an answer, and by which port of its own.
    pub(crate) failed: BTreeMap<u32, u16>,
    /// By which port each has come.
    ports: BTreeMap<u32, u16>,
    running: usize,
    next: u32,
}

impl Outcome {
    pub(crate) fn done(&self) -> usize {
        self.answered.len() + self.failed.len()
    }
}

/// Clients that come one after the other, some at a time.
#[derive(Clone)]
pub(crate) struct Clients {
    pub(crate) outcome: Rc<RefCell<Outcome>>,
    addresses: Rc<Vec<SocketAddr>>,
    total: Rc<Cell<u32>>,
}

impl Clients {
    /// `total` clients of these addresses in turn, `at_a_time` together.
    pub(crate) fn start(
        reactor: &mut Reactor,
        addresses: Vec<SocketAddr>,
        total: u32,
        at_a_time: usize,
    ) -> Self {
        let clients = Self {
            outcome: Rc::default(),
            addresses: Rc::new(addresses),
            total: Rc::new(Cell::new(total)),
        };
        for _ in 0..at_a_time {
            clients.start_next(reactor);
        }
        clients
    }

    pub(crate) fn are_done(&self) -> bool {
        self.outcome.borrow().done() == self.total() as usize
    }

    /// How many have connected so far.
    pub(crate) fn connected(&self) -> usize {
        self.outcome.borrow().ports.len()
    }

    pub(crate) fn total(&self) -> u32 {
        self.total.get()
    }

    /// As many again, when all are done.
    pub(crate) fn go_on(&self, reactor: &mut Reactor, more: u32) {
        self.total.set(self.total.get() + more);
        for _ in 0..more {
            self.start_next(reactor);
        }
    }

    fn start_next(&self, reactor: &mut Reactor) {
        let mut outcome = self.outcome.borrow_mut();
        if outcome.next == self.total.get() {
            return;
        }
        let number = outcome.next;
        outcome.next += 1;
        outcome.running += 1;
        let address = self.addresses[number as usize % self.addresses.len()];
        let client = Client {
            clients: self.clone(),
            number,
        };
        reactor
            .connect(Tcp::to(address).no_delay(true), client)
            .expect("there is room");
    }

    fn ended(&self, reactor: &mut Reactor, number: u32, process: Option<u32>) {
        let mut outcome = self.outcome.borrow_mut();
        outcome.running -= 1;
        match process {
            Some(process) => {
                outcome.answered.insert(number, process);
            }
            None => {
                let port = outcome.ports.get(&number).copied().unwrap_or(0);
                outcome.failed.insert(number, port);
            }
        }
        drop(outcome);
        self.start_next(reactor);
    }
}

struct Client {
    clients: Clients,
    number: u32,
}

struct Request {
    clients: Clients,
    number: u32,
    answer: Vec<u8>,
}

impl Factory for Client {
    type Protocol = Request;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Request> {
        Some(Request {
            clients: self.clients.clone(),
            number: self.number,
            answer: Vec::new(),
        })
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, _: &ConnectError) {
        self.clients.ended(cx.reactor, self.number, None);
    }
}

impl Protocol<TcpStream> for Request {
    fn connection_made(&mut self, cx: &mut Context<'_, TcpStream>) {
        let port = cx.transport.host().as_inet().expect("TCP").port();
        let mut outcome = self.clients.outcome.borrow_mut();
        outcome.ports.insert(self.number, port);
        drop(outcome);
        cx.transport.write(format!("{}\n", self.number).as_bytes());
    }

    fn data_received(&mut self, _: &mut Context<'_, TcpStream>, data: &[u8]) {
        self.answer.extend_from_slice(data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, TcpStream>, _: &CloseReason) {
        let answer = std::str::from_utf8(&self.answer).unwrap_or_default();
        let process = answer
            .strip_suffix('\n')
            .and_then(|answer| answer.split_once(' '))
            .filter(|(number, _)| number.parse() == Ok(self.number))
            .and_then(|(_, process)| process.parse().ok());
        self.clients.ended(cx.reactor, self.number, process);
    }
}

/// Reads the first piece of what the client says, then gives the connection to
/// the pool with it.
struct Front {
    pool: Pool,
    read: Vec<u8>,
}

impl Protocol<TcpStream> for Front {
    fn data_received(&mut self, cx: &mut Context<'_, TcpStream>, data: &[u8]) {
        self.read.extend_from_slice(data);
        cx.transport.pause_producing();
        let handle = cx.transport.handle();
        cx.reactor.detach::<Self>(handle, |reactor, detached| {
            let Ok(mut detached) = detached else { return };
            let pool = detached.protocol.pool.clone();
            let read = std::mem::take(&mut detached.protocol.read);
            let connection = PassedConnection::from_detached(detached, read);
            pool.dispatch(reactor, connection.expect("nothing is queued"));
        });
    }
}

/// Two listeners of the pool: one passes connections as they are, the other with
/// what it has read of them.
pub(crate) fn listen(reactor: &mut Reactor, pool: &Pool) -> Vec<SocketAddr> {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let plain = reactor
        .accept(Tcp::at(any), pool.acceptor(0))
        .expect("listens");
    let pool = pool.clone();
    let front = move |_: &Address| Front {
        pool: pool.clone(),
        read: Vec::new(),
    };
    let reading = reactor.listen_tcp(any, front).expect("listens");
    [plain, reading]
        .iter()
        .map(|listener| {
            let listener = reactor.get(*listener).expect("it listens");
            listener.address().as_inet().expect("over TCP")
        })
        .collect()
}
