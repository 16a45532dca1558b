//! Programs that others wrote at the other end.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};

use bowline::{Reactor, Transports, UnixSeqpacket};

use crate::harness::{Origin, Script, Scripts};
use crate::support::{is_missing, run_until};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn socat_connects_and_is_answered() {
    let place = Origin::Accepted.place();
    if is_missing("socat", "socat") {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let script = Script::echo();
    let notes = script.notes();
    reactor
        .listen(UnixSeqpacket::at(path.clone()), Scripts::of(script))
        .unwrap();
    let there = format!("UNIX-CONNECT:{},type=5", path.display());
    let mut child = Killed(
        Command::new("socat")
            .args(["-", &there])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut input = child.0.stdin.take().unwrap();
    input.write_all(b"to a socket of packets\n").unwrap();
    run_until(&mut reactor, |_| notes.count() == 1);
    assert_eq!(notes.data(), [b"to a socket of packets\n"]);
    let mut line = String::new();
    // The answer has left when the next turns are over.
    run_until(&mut reactor, |reactor| {
        reactor.get(notes.handle()).unwrap().counts().sent == 1
    });
    let mut output = BufReader::new(child.0.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "to a socket of packets\n");
    drop(input);
    run_until(&mut reactor, |_| notes.is_lost());
    assert_eq!(notes.lost(), ["closed cleanly"]);
}

#[test]
fn socat_listens_and_answers() {
    let place = Origin::Connected.place();
    if is_missing("socat", "socat") {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let here = format!("UNIX-LISTEN:{},type=5", path.display());
    let _child = Killed(Command::new("socat").args([&here, "PIPE"]).spawn().unwrap());
    let script = Script::new().on_made(|transport, _| {
        transport.send(b"there and back");
    });
    let notes = script.notes();
    // It may take a while until it listens.
    run_until(&mut reactor, |_| path.exists());
    let factory = Scripts {
        again: 100_000,
        ..Scripts::of(script)
    };
    reactor.connect(UnixSeqpacket::to(path), factory).unwrap();
    run_until(&mut reactor, |_| notes.count() == 1);
    assert_eq!(notes.data(), [b"there and back"]);
}

/// Python's own sockets: packets with descriptors in both directions, no bytes, and the end.
#[test]
fn python_passes_descriptors_with_its_packets() {
    const PROGRAM: &str = "
import os, socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
r, w = os.pipe()
socket.send_fds(s, [b'write here'], [w])
os.close(w)
assert os.read(r, 100) == b'through the pipe', 'nothing came through the pipe'
s.send(b'')
s.send(b'and last')
data, fds, flags, _ = socket.recv_fds(s, 100, 10)
assert (data, len(fds)) == (b'yours again', 2), (data, fds)
assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), flags
os.write(fds[0], b'back')
s.shutdown(socket.SHUT_WR)
assert s.recv(100) == b'', 'there was more'
";
    let place = Origin::Accepted.place();
    if is_missing("python3", "python3") {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    let path = place.path();
    let (reading, writing) = crate::harness::pipe();
    let mut ours = Some(writing);
    let script = Script::new().on_packet(move |transport, _, packet| {
        if packet.data == b"and last" {
            let both = vec![ours.take().unwrap().into(), crate::harness::pipe().0.into()];
            transport
                .send_with_descriptors(b"yours again", both)
                .unwrap();
        }
    });
    let notes = script.notes();
    reactor
        .listen(UnixSeqpacket::at(path.clone()), Scripts::of(script))
        .unwrap();
    let mut child = Killed(
        Command::new("python3")
            .args(["-c", PROGRAM])
            .arg(&path)
            .spawn()
            .unwrap(),
    );
    run_until(&mut reactor, |_| notes.count() == 1);
    let pipe = notes.change(|told| told.received[0].descriptors.pop().unwrap());
    rustix::io::write(&pipe, b"through the pipe").unwrap();
    drop(pipe);
    run_until(&mut reactor, |_| notes.is_lost());
    assert_eq!(notes.data(), [&b"write here"[..], b"", b"and last"]);
    assert_eq!(notes.lost(), ["closed cleanly"]);
    assert!(child.0.wait().unwrap().success());
    let mut back = [0; 10];
    assert_eq!(rustix::io::read(&reading, &mut back).unwrap(), 4);
}
