//! Sending files.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::rc::Rc;
use std::time::Duration;

use bowline::error::{FileSendError, FileSendErrorKind, RegisterProducerError};
use bowline::{
    Context, FileSender, FileSent, ProducerKind, ProducerRef, Transport, TransportState, Watermarks,
};

use crate::harness::{Buffers, Kind, Link, Script, over_every_kind, pattern};

over_every_kind!(
    a_file_arrives_whole_and_its_end_is_told,
    a_file_is_read_no_faster_than_it_leaves,
    a_file_is_not_sent_beside_another_producer,
    losing_the_connection_is_told_to_the_sender,
    a_file_that_cannot_be_read_leaves_the_connection,
);

type Told = Rc<RefCell<Vec<Result<FileSent, FileSendError>>>>;

fn noting(
    told: &Told,
) -> impl FnOnce(&mut Context<'_, dyn Transport>, Result<FileSent, FileSendError>) + use<> + 'static
{
    let told = Rc::clone(told);
    move |_, result| told.borrow_mut().push(result)
}

/// How many bytes were sent, and the last of them.
#[track_caller]
fn sent(told: &Told) -> (u64, Option<u8>) {
    let told = told.borrow();
    let [Ok(sent)] = told.as_slice() else {
        panic!("{told:?}");
    };
    (sent.bytes, sent.last_byte)
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

/// What was asked of it, and how much.
struct Watched<R> {
    inner: R,
    reads: Rc<RefCell<Vec<usize>>>,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reads.borrow_mut().push(buffer.len());
        self.inner.read(buffer)
    }
}

/// Contract P-21.
fn a_file_arrives_whole_and_its_end_is_told(kind: Kind) {
    for length in [0, 1, 16_384, 16_385, 1_000_000] {
        let mut link = Link::new(kind, Script::new());
        let content = pattern(length);
        let told = Told::default();
        let done = noting(&told);
        // The close waits for the file.
        let transport = link.transport();
        FileSender::new(file(&content))
            .send(transport, move |cx, result| {
                assert!(matches!(cx.transport.unsent_bytes(), 0));
                done(cx, result);
            })
            .unwrap();
        transport.lose_connection();
        assert!(told.borrow().is_empty(), "told inside the call");
        let (received, _) = link.peer_receives_all();
        assert!(received == content, "{} of {length} bytes", received.len());
        link.run_until_lost();
        assert_eq!(sent(&told), (length as u64, content.last().copied()));
        link.finish();
    }
}

/// Contract P-21, W-40: 16,384 bytes at a time unless set, each when everything before
/// has left.
fn a_file_is_read_no_faster_than_it_leaves(kind: Kind) {
    for (set, chunk) in [(None, 16_384), (Some(100_000), 100_000), (Some(0), 1)] {
        let mut link = Link::with_buffers(kind, Buffers::Small, Script::new());
        let reads: Rc<RefCell<Vec<usize>>> = Rc::default();
        let source = Watched {
            inner: io::repeat(7),
            reads: Rc::clone(&reads),
        };
        let mut sender = FileSender::new(source);
        if let Some(bytes) = set {
            sender = sender.chunk_size(bytes);
        }
        sender
            .send(link.transport(), |_, result| {
                assert!(matches!(
                    result.unwrap_err().kind,
                    FileSendErrorKind::ConnectionLost
                ));
            })
            .unwrap();
        assert!(reads.borrow().is_empty(), "read inside the call");
        if chunk == 1 {
            // Endless, but a turn has an end.
            link.turn();
            assert!((1..10_000).contains(&reads.borrow().len()));
        } else {
            // The peer does not read.
            link.settle();
            let unsent = link.transport().unsent_bytes();
            assert!((1..=chunk).contains(&unsent), "{unsent} bytes wait");
            let before = reads.borrow().len();
            link.peer_receives(before * chunk);
            link.settle();
            assert!(reads.borrow().len() > before, "it does not go on");
        }
        assert!(reads.borrow().iter().all(|bytes| *bytes == chunk));
        link.transport().abort_connection();
        link.run_until_lost();
        link.finish();
    }
}

/// Contract P-21, P-01.
fn a_file_is_not_sent_beside_another_producer(kind: Kind) {
    let mut link = Link::new(kind, Script::new());
    let transport = link.transport();
    transport
        .register_producer(ProducerRef::Protocol, ProducerKind::Push)
        .unwrap();
    let refused = FileSender::new(io::empty()).send(transport, |_, _| panic!("it was never begun"));
    assert_eq!(refused, Err(RegisterProducerError::AlreadyRegistered));
    transport.unregister_producer();

    // One after the other, from where the first one ends.
    let told = Told::default();
    let (first, second) = (noting(&told), noting(&told));
    FileSender::new(file(b"one, "))
        .send(link.transport(), move |cx, result| {
            first(cx, result);
            FileSender::new(file(b"two"))
                .send(cx.transport, move |cx, result| {
                    second(cx, result);
                    cx.transport.lose_connection();
                })
                .unwrap();
        })
        .unwrap();
    assert_eq!(link.peer_receives_all().0, b"one, two");
    link.run_until_lost();
    assert_eq!(told.borrow().len(), 2);
    link.finish();
}

/// Contract P-21: stopped early.
fn losing_the_connection_is_told_to_the_sender(kind: Kind) {
    let told = Told::default();
    let seen = Rc::clone(&told);
    let script = Script::new().lost(move |_, _| {
        assert_eq!(seen.borrow().len(), 1, "the sender is told first");
    });
    let mut link = Link::new(kind, script);
    let done = noting(&told);
    FileSender::new(io::repeat(1))
        .send(link.transport(), done)
        .unwrap();
    link.settle();
    link.transport().abort_connection();
    link.run_until_lost();
    {
        let told = told.borrow();
        let [Err(error)] = told.as_slice() else {
            panic!("{told:?}");
        };
        assert!(matches!(error.kind, FileSendErrorKind::ConnectionLost));
        assert!(error.sent.bytes > 0);
        assert_eq!(error.sent.last_byte, Some(1));
    }
    link.finish();
}

/// Contract P-21.
fn a_file_that_cannot_be_read_leaves_the_connection(kind: Kind) {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
    let mut link = Link::new(kind, Script::new());
    let told = Told::default();
    FileSender::new(file(b"readable").chain(Broken))
        .send(link.transport(), noting(&told))
        .unwrap();
    assert_eq!(link.peer_receives(8), b"readable");
    link.settle();
    {
        let told = told.borrow();
        let [Err(error)] = told.as_slice() else {
            panic!("{told:?}");
        };
        let FileSendErrorKind::Read(cause) = &error.kind else {
            panic!("{error:?}");
        };
        assert_eq!(cause.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(error.sent.bytes, 8);
    }
    assert_eq!(link.transport().state(), TransportState::Connected);
    // Nobody is registered any more.
    link.transport().write(b"and on");
    link.transport().lose_connection();
    assert_eq!(link.peer_receives_all().0, b"and on");
    link.run_until_lost();
    link.finish();
}

/// Contract P-21 (Twisted: `transform`).
#[test]
fn each_portion_is_transformed_before_it_is_sent() {
    let mut link = Link::new(Kind::AdoptedSocketpair, Script::new());
    let told = Told::default();
    FileSender::new(file(b"a.b.c"))
        .chunk_size(2)
        .transform(|portion| {
            portion.make_ascii_uppercase();
            portion.push(b'|');
        })
        .send(link.transport(), noting(&told))
        .unwrap();
    assert_eq!(link.peer_receives(8), b"A.|B.|C|");
    link.settle();
    assert_eq!(sent(&told), (8, Some(b'|')));
    link.transport().lose_connection();
    link.run_until_lost();
    link.finish();
}

#[test]
fn a_portion_beyond_the_limit_of_unsent_bytes_is_refused() {
    let mut link = Link::new(Kind::AdoptedSocketpair, Script::new());
    link.transport()
        .set_watermarks(Watermarks::default().limit(1_000));
    let told = Told::default();
    FileSender::new(io::repeat(1))
        .send(link.transport(), noting(&told))
        .unwrap();
    link.settle();
    assert!(matches!(
        told.borrow().as_slice(),
        [Err(FileSendError {
            kind: FileSendErrorKind::Refused,
            ..
        })]
    ));
    assert_eq!(link.transport().state(), TransportState::Connected);
    link.transport().abort_connection();
    link.run_until_lost();
    link.finish();
}

/// What has nothing to be read yet is asked again, by the clock.
#[test]
fn a_pipe_that_is_empty_is_asked_again() {
    struct Pipe(Rc<Cell<Option<&'static [u8]>>>);
    impl Read for Pipe {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let mut ready = self.0.take().ok_or(io::ErrorKind::WouldBlock)?;
            ready.read(buffer)
        }
    }
    let mut link = Link::new(Kind::AdoptedSocketpair, Script::new());
    let content = Rc::new(Cell::new(None));
    let told = Told::default();
    FileSender::new(Pipe(Rc::clone(&content)))
        .send(link.transport(), noting(&told))
        .unwrap();
    link.settle();
    content.set(Some(&b"late"[..]));
    link.clock.advance(Duration::from_secs(1));
    assert_eq!(link.peer_receives(4), b"late");
    assert!(told.borrow().is_empty());
    content.set(Some(b""));
    link.clock.advance(Duration::from_secs(1));
    link.settle();
    assert_eq!(sent(&told), (4, Some(b'e')));
    link.transport().lose_connection();
    link.run_until_lost();
    link.finish();
}
