//! What users write compiles with every name of the root in scope, and calls what they
//! mean.

// A trait among them with a method of a transport's name would make every call below
// ambiguous.
#[allow(unused_imports)]
use bowline::*;

use bowline::layers::StreamTransport;

use crate::support::{DescriptorLedger, run_until_quiet};

/// By the bound that says least.
fn by_transport<T: Transport>(cx: &mut Context<'_, T>, data: &[u8]) -> WriteStatus {
    let status = cx.transport.write(data);
    cx.transport.lose_connection();
    status
}

/// By the bound of those who write about any stream.
fn by_stream<T: StreamTransport>(cx: &mut Context<'_, T>, data: &[u8]) -> WriteStatus {
    let status = cx.transport.write(data);
    cx.transport.pause_producing();
    cx.transport.resume_producing();
    cx.transport.lose_connection();
    status
}

/// By the types themselves.
fn by_tcp(cx: &mut Context<'_, TcpStream>, data: &[u8]) -> WriteStatus {
    let _ = cx.transport.set_no_delay(true);
    let status = cx.transport.write(data);
    cx.transport.lose_connection();
    status
}

fn by_unix(cx: &mut Context<'_, UnixStream>, data: &[u8]) -> WriteStatus {
    let _ = cx.transport.unsent_descriptors();
    let status = cx.transport.write(data);
    cx.transport.lose_connection();
    status
}

type Answer<T> = fn(&mut Context<'_, T>, &[u8]) -> WriteStatus;

struct Answering<T>(Answer<T>);

impl<T: Transport> Protocol<T> for Answering<T> {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        assert_eq!((self.0)(cx, data), WriteStatus::Ready);
    }
}

#[test]
fn no_call_of_a_transport_is_ambiguous() {
    let ledger = DescriptorLedger::open();
    let unix: [Answer<UnixStream>; 3] = [by_transport, by_stream, by_unix];
    for answer in unix {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut reactor = Reactor::new().unwrap();
        reactor
            .adopt_unix_stream(ours.into(), Answering(answer))
            .unwrap();
        echoed(reactor, theirs);
    }
    let tcp: [Answer<TcpStream>; 3] = [by_transport, by_stream, by_tcp];
    for answer in tcp {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let mut reactor = Reactor::new().unwrap();
        reactor
            .adopt_tcp_stream(ours.into(), Answering(answer))
            .unwrap();
        echoed(reactor, theirs);
    }
    ledger.assert_balanced();
}

/// Sends a word, runs the loop until it has nothing left to do, and reads the word.
fn echoed(mut reactor: Reactor, mut theirs: impl std::io::Read + std::io::Write) {
    theirs.write_all(b"word").unwrap();
    run_until_quiet(&mut reactor);
    let mut answer = [0; 4];
    theirs.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"word");
}
