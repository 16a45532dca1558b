//! The streams of children: flow control both ways, closing, protocols of their own.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Command;
use std::rc::Rc;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::process::{ChildCommand, CollectOutput, ProcessContext};
use bowline::{
    AnyConnection as _, CloseReason, Context, Limits, Pipe, Producer, ProducerKind, ProducerRef,
    Protocol, Reactor, Transport, Transports, UnixStream, UnixTransport, WriteStatus,
};

use crate::harness::{Script, assert_nothing_left, pattern, run, shell, spawn, stream};
use crate::support::{
    DEADLINE, DescriptorLedger, Record as PlainRecord, Recorder, eventually, run_until,
    run_until_quiet,
};

fn cat() -> ChildCommand<'static> {
    ChildCommand::new(Command::new("cat"))
}

/// many times what a pipe holds, there and back, with a child that does not
/// read while nobody reads it; everything that was written before the close.
#[test]
fn whatever_is_written_before_the_close_comes_back() {
    let _ledger = DescriptorLedger::open();
    let sent = pattern(5_000_000);
    let all = sent.clone();
    let script = Script::new().made(move |cx| {
        assert_eq!(cx.write(&all), WriteStatus::Full);
        assert!(cx.close_stdin());
        assert_eq!(cx.write(b"too late"), WriteStatus::Refused);
    });
    let record = run(cat(), script);
    assert!(record.data(1) == sent);
    assert_eq!(record.count("lost 0, closed cleanly"), 1);
}

/// an error to the writer, never silence.
#[test]
fn a_write_to_what_is_no_stream_is_refused() {
    let _ledger = DescriptorLedger::open();
    let script = Script::new().made(|cx| {
        assert_eq!(cx.write(b"no input"), WriteStatus::Refused);
        assert_eq!(cx.write_to_child(1, b"an output"), WriteStatus::Refused);
        assert_eq!(cx.write_to_child(7, b"nothing"), WriteStatus::Refused);
        assert!(!cx.close_stdin() && !cx.close_child_fd(7));
        assert!(cx.stream(0).is_none());
    });
    run(shell("exit 0").null(0), script);
}

/// any of them, and with nothing else known of them the child goes on.
#[test]
fn each_stream_is_closed_by_itself() {
    let _ledger = DescriptorLedger::open();
    let script = Script::new()
        .made(|cx| {
            assert!(cx.close_stdout() && cx.close_child_fd(5));
        })
        .data(|cx, number, _| {
            assert_eq!(number, 2);
            cx.lose_connection();
        });
    // Says what becomes of each write.
    let child = "trap '' PIPE; while echo 2>/dev/null; do :; done; \
                 while echo 2>/dev/null >&5; do :; done; echo both >&2; \
                 cat; while echo >&2; do :; done; exit 9";
    let record = run(shell(child).read_from(5), script);
    assert_eq!(record.statuses()[0].code(), Some(9));
    assert_eq!(record.count("lost"), 4);
}

/// Takes what is asked for from a list, and says how often it was told what.
struct Pieces {
    left: Vec<Vec<u8>>,
    told: Rc<RefCell<Vec<&'static str>>>,
    is_paused: bool,
}

impl Pieces {
    fn write(&mut self, transport: &mut dyn Transport, once: bool) {
        while let Some(piece) = self.left.pop() {
            let _ = transport.write(&piece);
            if once || self.is_paused || transport.is_producer_paused() {
                return;
            }
        }
        transport.stop_consuming();
    }
}

impl Producer for Pieces {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.told.borrow_mut().push("resume");
        self.is_paused = false;
        let once = self.told.borrow().first() == Some(&"pull");
        self.write(cx.transport, once);
    }

    fn pause_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        self.told.borrow_mut().push("pause");
        self.is_paused = true;
    }

    fn stop_producing(&mut self, _: &mut Context<'_, dyn Transport>) {
        self.told.borrow_mut().push("stop");
    }
}

/// of either kind.
#[test]
fn producers_feed_a_child_no_faster_than_it_reads() {
    let _ledger = DescriptorLedger::open();
    for kind in [ProducerKind::Pull, ProducerKind::Push] {
        let sent = pattern(1_000_000);
        let told = Rc::new(RefCell::new(Vec::new()));
        if kind == ProducerKind::Pull {
            told.borrow_mut().push("pull");
        }
        let mut left: Vec<Vec<u8>> = sent.chunks(40_000).map(<[u8]>::to_vec).collect();
        left.reverse();
        let most = Rc::new(Cell::new(0));
        let seen = Rc::clone(&most);
        let mut producer = Some(Pieces {
            left,
            told: Rc::clone(&told),
            is_paused: false,
        });
        let script = Script::new()
            .made(move |cx| {
                let stdin = cx.stream(0).unwrap();
                let mut pieces = producer.take().unwrap();
                if kind == ProducerKind::Push {
                    // So much that it is told to pause.
                    while let Some(piece) = pieces.left.pop()
                        && stdin.write(&piece).is_ready()
                    {}
                }
                stdin
                    .register_producer(ProducerRef::boxed(pieces), kind)
                    .unwrap();
            })
            .data(move |cx, _, _| {
                if let Some(stdin) = cx.stream(0) {
                    seen.set(seen.get().max(stdin.unsent_bytes()));
                }
            });
        let record = run(cat(), script);
        assert!(record.data(1) == sent, "{kind:?}");
        let told = told.take();
        let pauses = told.iter().filter(|it| **it == "pause").count();
        assert_eq!(pauses > 0, kind == ProducerKind::Push, "{told:?}");
        assert!(most.get() <= 65_536 + 80_000, "{}", most.get());
    }
}

/// by its number; it is stopped when the child does not read any more.
#[test]
fn a_process_protocol_is_the_producer_of_a_stream() {
    let _ledger = DescriptorLedger::open();
    let script = Script::new()
        .made(|cx| {
            let stdin = cx.stream(0).unwrap();
            let _ = stdin.write(&[b'x'; 200_000]);
            stdin
                .register_producer(ProducerRef::Protocol, ProducerKind::Push)
                .unwrap();
        })
        .resumed(|cx| {
            let _ = cx.write(&[b'y'; 200_000]);
        });
    let child = "head -c 300000 | wc -c; exec 0<&-; exit 0";
    let record = run(shell(child), script);
    let (paused, resumed) = (record.place("paused 0"), record.place("resumed 0"));
    assert!(paused < resumed && resumed < record.place("stopped 0"));
    assert!(record.place("stopped 0") < record.place("lost 0, connection lost"));
    assert_eq!(record.text(1), "300000\n");
}

/// what the child has written before the first turn is held too, even if a stream
/// of it comes first: the budget of the turn may be spent before the process is told.
#[test]
fn a_pause_at_the_beginning_holds_what_is_there_already() {
    let _ledger = DescriptorLedger::open();
    for notifications in [1, 2, 16_384] {
        let mut reactor = Reactor::new().unwrap();
        reactor.set_limits(Limits::default().notifications(notifications));
        // Each is owed a notification of its own, before the child's.
        let others: Vec<_> = (0..4).map(|_| StdUnixStream::pair().unwrap()).collect();
        for (ours, _) in &others {
            let ours = ours.try_clone().unwrap();
            reactor
                .adopt_unix_stream(ours.into(), Recorder::default())
                .unwrap();
        }
        let script = Script::new().made(|cx| cx.pause_producing());
        let record = script.record();
        let directory = tempfile::tempdir().unwrap();
        let done = directory.path().join("done");
        let child = format!("echo early; echo there >&2; : > {}", done.display());
        let process = spawn(&mut reactor, shell(&child), script);
        // Its output lies in its pipes before the first turn.
        eventually(DEADLINE, || std::fs::metadata(&done));
        run_until_quiet(&mut reactor);
        let read = (record.data(1).len(), record.data(2).len());
        assert_eq!(read, (0, 0), "{notifications} notifications a turn");
        let script = |_: &mut Script, cx: &mut ProcessContext<'_>| cx.resume_producing();
        reactor.call_process_protocol(process, script, |_, error| panic!("{error}"));
        run_until(&mut reactor, |_| record.is_over());
        let all = (record.text(1), record.text(2));
        assert_eq!(all, ("early\n".into(), "there\n".into()));
    }
}

/// the child waits when its pipe is full, and nothing is lost.
#[test]
fn a_pause_of_all_that_is_read_holds_the_child() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new().made(|cx| cx.pause_producing());
    let record = script.record();
    let child = "head -c 1000000 /dev/zero; head -c 300000 /dev/zero >&2";
    let process = spawn(&mut reactor, shell(child), script);
    run_until_quiet(&mut reactor);
    assert_eq!((record.data(1).len(), record.data(2).len()), (0, 0));
    assert!(!record.has_exited());
    let script = |_: &mut Script, cx: &mut ProcessContext<'_>| cx.resume_producing();
    reactor.call_process_protocol(process, script, |_, error| panic!("{error}"));
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(
        (record.data(1).len(), record.data(2).len()),
        (1_000_000, 300_000)
    );
    assert_nothing_left(&reactor);
}

/// A child is a producer as a connection is one: what it writes waits for who takes it.
#[test]
fn a_child_writes_no_faster_than_its_consumer_takes() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (reading, writing) = std::io::pipe().unwrap();
    let record = PlainRecord::default();
    let consumer = reactor
        .adopt(Pipe, writing.into(), Recorder::new(&record))
        .unwrap();
    let sent = Rc::new(Cell::new(0));
    let most = Rc::new(Cell::new(0));
    let (count, unsent) = (Rc::clone(&sent), Rc::clone(&most));
    let script = Script::new()
        .made(move |cx| {
            let process = cx.process.handle();
            let consumer = cx.get(consumer).unwrap();
            consumer
                .register_producer(process.into(), ProducerKind::Push)
                .unwrap();
        })
        .data(move |cx, _, data| {
            count.set(count.get() + data.len());
            let consumer = cx.get(consumer).unwrap();
            let _ = consumer.write(data);
            unsent.set(unsent.get().max(consumer.unsent_bytes()));
        })
        .ended(move |cx| cx.get(consumer).unwrap().stop_consuming());
    let ends = script.record();
    spawn(&mut reactor, shell("head -c 3000000 /dev/zero"), script);
    run_until(&mut reactor, |reactor| {
        reactor
            .get(consumer)
            .is_some_and(|it| it.is_producer_paused())
    });
    run_until_quiet(&mut reactor);
    assert!(sent.get() < 3_000_000 && !ends.has_exited(), "it waits");
    let reader =
        std::thread::spawn(move || std::io::copy(&mut { reading }, &mut std::io::sink()).unwrap());
    run_until(&mut reactor, |_| ends.is_over() && record.is_lost());
    assert_eq!(reader.join().unwrap(), 3_000_000);
    // The pause is told when the callback has returned, and holds from the next turn on.
    let bound = 65_536 + reactor.transport_budgets().read_bytes;
    assert!(most.get() <= bound, "{}", most.get());
    assert_nothing_left(&reactor);
}

/// without a write of ours; the child goes on.
#[test]
fn a_child_that_closes_its_input_is_noticed() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let child = shell("exec 0<&-; cat <&3; exit 1").write_to(3);
    let process = spawn(&mut reactor, child, script);
    run_until(&mut reactor, |_| record.count("lost") > 0);
    run_until_quiet(&mut reactor);
    assert_eq!(record.events(), ["made", "lost 0, connection lost"]);
    stream(&mut reactor, process, 3).lose_connection();
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.count("lost 0"), 1);
}

/// read in pieces and up to the end, which is clean, though the child goes on
/// for long.
#[test]
fn a_child_that_closes_its_output_goes_on() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let script = Script::new();
    let record = script.record();
    let child = shell("head -c 200000 /dev/zero; exec >&- 2>&-; cat >/dev/null; exit 6");
    let process = spawn(&mut reactor, child, script);
    run_until(&mut reactor, |_| record.count("lost") == 2);
    run_until_quiet(&mut reactor);
    assert_eq!(record.data(1).len(), 200_000);
    assert_eq!(record.count("lost 1, closed cleanly"), 1);
    assert_eq!(record.count("lost 2, closed cleanly"), 1);
    assert!(!record.has_exited());
    stream(&mut reactor, process, 0).lose_connection();
    run_until(&mut reactor, |_| record.is_over());
    assert_eq!(record.statuses()[1].code(), Some(6));
}

/// Fills one pipe while we wait with the other: the classic deadlock.
#[test]
fn a_child_that_fills_its_error_output_before_it_reads_is_fed() {
    let _ledger = DescriptorLedger::open();
    let sent = pattern(1_000_000);
    let all = sent.clone();
    let script = Script::new().made(move |cx| {
        let _ = cx.write(&all);
        cx.close_stdin();
    });
    let record = run(shell("head -c 1000000 /dev/zero >&2; cat"), script);
    assert!(record.data(1) == sent);
    assert_eq!(record.data(2).len(), 1_000_000);
}

/// Lines of one stream, and how it ended.
struct Lines(Rc<RefCell<Vec<String>>>);

impl<T: Transport> FrameReceiver<T, LineFramer> for Lines {
    fn frame_received(&mut self, _: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let line = String::from_utf8_lossy(line).into_owned();
        self.0.borrow_mut().push(line);
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, LineFramer>, _: &CloseReason) {
        self.0.borrow_mut().push("(lost)".into());
    }
}

/// A protocol of its own is told in the place of the process protocol, and the end waits
/// for its stream.
#[test]
fn a_stream_has_a_protocol_of_its_own() {
    let _ledger = DescriptorLedger::open();
    let lines = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&lines);
    let framer = || LineFramer::with_delimiter(b"\n".as_slice());
    let script = Script::new()
        .made(|cx| {
            assert_eq!(cx.write(b"in"), WriteStatus::Ready);
            cx.close_stdin();
        })
        .ended(move |_| assert_eq!(seen.borrow().last().unwrap(), "(lost)"));
    let command = shell("printf 'one\\ntw'; cat >&2; sleep 0.05; printf 'o\\nthree\\n'");
    let command = command.read_from_with(1, Framed::new(framer(), Lines(Rc::clone(&lines))));
    let record = run(command, script);
    assert_eq!(lines.take(), ["one", "two", "three", "(lost)"]);
    assert_eq!(
        (record.text(1), record.text(2)),
        (String::new(), "in".into())
    );
    assert_eq!(record.count("lost"), 2, "those that are told by number");
}

/// It is taken out of the process, which ends without it.
#[test]
fn a_stream_that_was_detached_is_none_of_the_processs() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let record = PlainRecord::default();
    let script = Script::new();
    let ends = script.record();
    let command = shell("echo kept; exec cat").null(2);
    let command = command.read_from_with(1, Recorder::new(&record));
    let process = spawn(&mut reactor, command, script);
    let handle = reactor.get(process).unwrap().stream(1).unwrap();
    let taken = Rc::new(RefCell::new(None));
    let place = Rc::clone(&taken);
    reactor.detach::<Recorder>(handle, move |_, result| {
        *place.borrow_mut() = Some(result.unwrap());
    });
    run_until(&mut reactor, |reactor| {
        reactor.get(process).unwrap().stream(1).is_none()
    });
    stream(&mut reactor, process, 0).lose_connection();
    run_until(&mut reactor, |_| ends.is_over());
    let detached = taken.take().unwrap();
    assert_eq!(record.data(), b"");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut std::fs::File::from(detached.fd), &mut text).unwrap();
    assert_eq!(text, "kept\n");
}

/// Says what it receives, and sends a descriptor.
struct Passes {
    record: PlainRecord,
    file: Option<std::fs::File>,
}

impl Protocol<UnixStream> for Passes {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        let file = self.file.take().unwrap();
        cx.transport
            .write_with_descriptors(b"f", vec![std::os::fd::OwnedFd::from(file).into()])
            .unwrap();
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        Recorder::new(&self.record).data_received(cx, data);
    }
}

/// What only a socket can: a descriptor to the child, which writes into what it got.
#[test]
fn a_child_is_sent_descriptors_over_its_socket() {
    const NUMBER: u32 = 3;
    struct Writes;
    impl Protocol<UnixStream> for Writes {
        fn file_descriptor_received(
            &mut self,
            cx: &mut Context<'_, UnixStream>,
            fd: std::os::fd::OwnedFd,
        ) -> Result<(), std::os::fd::OwnedFd> {
            std::io::Write::write_all(&mut std::fs::File::from(fd), b"from the child").unwrap();
            let _ = cx.transport.write(b"done");
            cx.transport.lose_connection();
            Ok(())
        }
        fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}
        fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, _: &CloseReason) {
            cx.reactor.stop().unwrap();
        }
    }
    if std::env::var_os("BOWLINE_TEST_TAKES").is_some() {
        let fd = bowline::process::take_granted(NUMBER).unwrap();
        let mut reactor = Reactor::new().unwrap();
        reactor.adopt_unix_stream(fd, Writes).unwrap();
        reactor.run().unwrap();
        return;
    }
    let _ledger = DescriptorLedger::open();
    let file = tempfile::tempfile().unwrap();
    let record = PlainRecord::default();
    let passes = Passes {
        record: record.clone(),
        file: Some(file.try_clone().unwrap()),
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "streams::a_child_is_sent_descriptors_over_its_socket";
    command.args(["--exact", name, "--test-threads=1"]);
    command.env("BOWLINE_TEST_TAKES", "1");
    let command = ChildCommand::new(command).socket_with(NUMBER, passes);
    let ends = run(command, Script::new());
    assert!(ends.statuses()[1].is_success(), "{}", ends.text(1));
    assert_eq!(record.data(), b"done");
    let mut file = file;
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    std::io::Read::read_to_string(&mut file, &mut text).unwrap();
    assert_eq!(text, "from the child");
}

/// output, error output, exit value, input; and no more than was said.
#[test]
fn a_child_is_run_for_its_output() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let outputs = Rc::new(RefCell::new(Vec::new()));
    let collect = || {
        let outputs = Rc::clone(&outputs);
        CollectOutput::new(move |_, output| outputs.borrow_mut().push(output))
    };
    let input = pattern(300_000);
    for (script, collect) in [
        ("cat; echo no >&2; exit 2", collect().input(input.clone())),
        ("echo some; kill -KILL $$", collect()),
        ("exec cat /dev/zero", collect().limit(1_000)),
    ] {
        reactor.spawn_process(shell(script), collect).unwrap();
    }
    run_until(&mut reactor, |_| outputs.borrow().len() == 3);
    assert_nothing_left(&reactor);
    let outputs = outputs.take();
    let find = |code, signal| {
        let mut found = outputs.iter().filter(|it| {
            (it.status.code(), it.status.signal(), it.is_cut) == (code, signal, false)
        });
        found.next().expect("one of them")
    };
    let first = find(Some(2), None);
    assert!(first.stdout == input && first.stderr == b"no\n");
    let second = find(None, Some(9));
    assert!(second.stdout == b"some\n" && second.stderr.is_empty());
    let cut = outputs.iter().find(|it| it.is_cut).expect("one of them");
    assert_eq!((cut.stdout.len(), cut.status.is_success()), (1_000, false));
}
