//! Live TCP connections handed to and from Twisted.
//!
//! A passed socket is shared: two processes hold it until one of them closes
//! its copy. Ours is only closed then. Twisted shuts it down, for the other
//! holder too, whenever it closes in an orderly way.

use std::io::{self, Read, Write};
use std::net::TcpStream as StdTcpStream;
use std::os::fd::OwnedFd;

use bowline::Tcp;
use bowline::{Address, BuildContext, Context, Protocol, Transport, TransportHandle, Transports};

use crate::Scenario;
use crate::pair::{Direction, Pair, both_directions, number};
use crate::peer::Peers;
use crate::support::{DEADLINE, run_until};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        both_directions("we_accept_and_twisted_serves", we_accept),
        both_directions("twisted_accepts_and_we_serve", twisted_accepts),
        both_directions("twisted_ends_it_for_all_holders", twisted_ends_it),
    ]
    .into_iter()
    .flatten()
    .collect()
}

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Turns the reactor until the client has its word back.
#[track_caller]
fn assert_echoed(pair: &mut Pair, mut client: &StdTcpStream, word: &str) {
    client.set_nonblocking(true).expect("a socket");
    client.write_all(word.as_bytes()).expect("there is room");
    let mut echoed = vec![0; word.len()];
    pair.wait("the client has its answer", |_| {
        client.peek(&mut vec![0; word.len()]).ok() == Some(word.len())
    });
    client.read_exact(&mut echoed).expect("it is there");
    assert_eq!(echoed, word.as_bytes());
}

/// Our copy is closed when it has left, and the client does not notice.
fn we_accept(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    let worker = pair.transport().unix_handle();
    let listener = pair
        .reactor
        .accept(Tcp::at(([127, 0, 0, 1], 0).into()), {
            move |cx: &mut BuildContext<'_>, socket: OwnedFd, _: &Address| {
                let worker = cx.reactor.get(worker).expect("it is connected");
                worker
                    .send_file_descriptor(socket.into())
                    .expect("there is room");
                worker.write(b"c");
            }
        })
        .expect("listens");
    let address = pair.reactor.get(listener).expect("it listens").address();
    let client = StdTcpStream::connect(address.as_inet().expect("TCP")).expect("connects");
    // Sent before anybody serves it: it waits in the kernel.
    (&client).write_all(b"early ").expect("there is room");
    pair.wait("it has arrived", |pair| pair.peer_received() == 1);
    pair.tell("adopt");
    pair.wait("the client has its answer", |_| {
        client.set_nonblocking(true).expect("a socket");
        client.peek(&mut [0; 6]).ok() == Some(6)
    });
    (&client).read_exact(&mut [0; 6]).expect("it is there");
    assert_echoed(&mut pair, &client, "ping");
    let counts = pair.reactor.descriptor_counts();
    assert_eq!((counts.passed, counts.unsent), (1, 0));
}

/// A connection of Twisted's, adopted by us.
fn adopt(pair: &mut Pair) -> (StdTcpStream, TransportHandle) {
    pair.tell("listen_tcp");
    pair.wait("it listens", |pair| !pair.peer.told("port").is_empty());
    let port = number(&pair.peer.told("port")[0]) as u16;
    let client = StdTcpStream::connect(("127.0.0.1", port)).expect("connects");
    pair.wait_for("held");
    pair.tell("pass_held write=1");
    pair.wait("it has arrived", |pair| pair.record.data().len() == 1);
    let socket = pair.record.take_descriptors().pop().expect("it came first");
    let adopted = pair
        .reactor
        .adopt_tcp_stream(socket, Echo)
        .expect("a connected socket");
    (client, adopted)
}

/// E-17: we serve what Twisted holds still, and ending our part leaves it as it
/// was.
fn twisted_accepts(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    let (client, adopted) = adopt(&mut pair);
    assert_echoed(&mut pair, &client, "served by us");
    let transport = pair.reactor.get(adopted).expect("it is there");
    transport.lose_connection();
    run_until(&mut pair.reactor, |reactor| reactor.get(adopted).is_none());
    pair.tell("resume_held");
    assert_echoed(&mut pair, &client, "served by Twisted");
}

/// W-25, from the other side: what Twisted closes is gone for us.
fn twisted_ends_it(peers: &Peers, direction: Direction) {
    let mut pair = Pair::with_twisted(peers, direction, "receiver");
    let (client, adopted) = adopt(&mut pair);
    assert_echoed(&mut pair, &client, "served by us");
    pair.tell("lose_held");
    run_until(&mut pair.reactor, |reactor| reactor.get(adopted).is_none());
    client.set_nonblocking(false).expect("a socket");
    client.set_read_timeout(Some(DEADLINE)).expect("a socket");
    match (&client).read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}
