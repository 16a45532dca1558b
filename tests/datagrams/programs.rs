//! Programs that others wrote at the other end.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;

use bowline::{
    Context, Datagram, DatagramProtocol, DatagramTransport, Reactor, Transports, Udp, UnixDatagram,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::harness::Script;
use crate::support::{DescriptorLedger, is_missing, run_until};

/// Answers questions about one name, as a server of DNS (RFC 1035).
struct Responder {
    asked: Rc<Cell<usize>>,
}

const A: u16 = 1;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const NO_SUCH_NAME: u8 = 3;
const NAME: &[u8] = b"\x04boat\x07example\0";

/// What a text of its name says: more than the 512 bytes that there were once.
fn text() -> Vec<u8> {
    let piece = |letter: u8| [[200].as_slice(), &[letter; 200]].concat();
    [piece(b'a'), piece(b'b'), piece(b'c')].concat()
}

/// The answer to one question; nothing to what is none.
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    let header = question.first_chunk::<12>()?;
    // One question, of the usual kind.
    if header[2] & 0xf8 != 0 || header[4..6] != [0, 1] {
        return None;
    }
    let end = 12 + question[12..].iter().position(|byte| *byte == 0)? + 1;
    let (name, rest) = (&question[12..end], question.get(end..end + 4)?);
    let data = match (name, u16::from_be_bytes([rest[0], rest[1]])) {
        (NAME, A) => Some(Ipv4Addr::new(192, 0, 2, 7).octets().to_vec()),
        (NAME, AAAA) => Some(
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)
                .octets()
                .to_vec(),
        ),
        (NAME, TXT) => Some(text()),
        _ => None,
    };
    let code = if name == NAME { 0 } else { NO_SUCH_NAME };
    let mut reply = header[..2].to_vec();
    // An answer with authority; recursion is what the question says of it.
    reply.extend([
        0x84 | header[2] & 1,
        code,
        0,
        1,
        0,
        u8::from(data.is_some()),
    ]);
    reply.extend([0; 4]);
    reply.extend(&question[12..end + 4]);
    if let Some(data) = data {
        // The name of the question, its type and class, for a minute.
        reply.extend([0xc0, 12]);
        reply.extend(rest);
        reply.extend([0, 0, 0, 60]);
        reply.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
        reply.extend(data);
    }
    Some(reply)
}

impl<T: DatagramTransport> DatagramProtocol<T> for Responder {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        if let Some(answer) = answer(datagram.data) {
            self.asked.set(self.asked.get() + 1);
            cx.transport.send_to(&answer, datagram.from);
        }
    }
}

/// A child that is gone with its test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().unwrap();
        let output = child.stdout.as_ref().unwrap();
        let flags = fcntl_getfl(output).unwrap();
        fcntl_setfl(output, flags | OFlags::NONBLOCK).unwrap();
        Self(child)
    }

    /// What it has written by now, behind what it had.
    fn read(&mut self, all: &mut Vec<u8>) {
        // There may be nothing yet.
        let _ = self.0.stdout.as_mut().unwrap().read_to_end(all);
    }

    /// Turns the reactor until it has ended; its output.
    fn output(mut self, reactor: &mut Reactor) -> String {
        let mut all = Vec::new();
        let mut status = None;
        run_until(reactor, |_| {
            self.read(&mut all);
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        self.read(&mut all);
        let text = String::from_utf8(all).unwrap();
        assert!(status.unwrap().success(), "{text}");
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Over IPv4 and IPv6: addresses of both kinds, a long text, a name that there is not.
#[test]
fn dig_is_answered() {
    let _ledger = DescriptorLedger::open();
    if is_missing("dig", "bind9-dnsutils") {
        return;
    }
    for here in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
    ] {
        let mut reactor = Reactor::new().unwrap();
        let asked = Rc::new(Cell::new(0));
        let responder = Responder {
            asked: Rc::clone(&asked),
        };
        let port = reactor
            .listen(Udp::at((here, 0).into()), responder)
            .unwrap();
        let port = reactor.get(port).unwrap().host().as_inet().unwrap().port();
        let mut dig = |arguments: &[&str]| {
            let mut command = Command::new("dig");
            command
                .arg(format!("@{here}"))
                .args(["-p", &port.to_string()]);
            // Whoever answers late has failed; the user's settings are not of this test.
            command
                .args(["-r", "+tries=1", "+timeout=9", "+notcp"])
                .args(arguments);
            Running::start(&mut command).output(&mut reactor)
        };
        let short = dig(&[
            "+short",
            "boat.example",
            "A",
            "boat.example",
            "AAAA",
            "boat.example",
            "TXT",
        ]);
        let text = ["a", "b", "c"].map(|letter| format!("\"{}\"", letter.repeat(200)));
        let expected = format!("192.0.2.7\n2001:db8::7\n{}\n", text.join(" "));
        assert_eq!(short, expected, "over {here}");
        let missing = dig(&["nothing.example"]);
        assert!(missing.contains("status: NXDOMAIN"), "{missing}");
        assert!(missing.contains("flags: qr aa rd;"), "{missing}");
        assert_eq!(asked.get(), 4, "over {here}");
    }
}

/// Writes lines to `socat`, which sends each as a datagram, until each has come back.
fn is_echoed_to(reactor: &mut Reactor, socat: &mut Command) {
    let mut socat = Running::start(socat);
    let mut all = Vec::new();
    for line in ["one\n", "another\n"] {
        socat
            .0
            .stdin
            .as_mut()
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
        let before = all.len();
        run_until(reactor, |_| {
            socat.read(&mut all);
            all.len() >= before + line.len()
        });
        assert_eq!(&all[before..], line.as_bytes());
    }
}

#[test]
fn socat_sends_datagrams_and_is_answered() {
    let _ledger = DescriptorLedger::open();
    if is_missing("socat", "socat") {
        return;
    }
    let mut reactor = Reactor::new().unwrap();
    for here in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
    ] {
        let port = reactor
            .listen(Udp::at((here, 0).into()), Script::echo())
            .unwrap();
        let address = reactor.get(port).unwrap().host().as_inet().unwrap();
        let to = match here {
            IpAddr::V4(_) => format!("UDP4:{address}"),
            IpAddr::V6(_) => format!("UDP6:{address}"),
        };
        is_echoed_to(&mut reactor, Command::new("socat").args(["-", &to]));
    }
    let directory = tempfile::tempdir().unwrap();
    let (path, own) = (directory.path().join("echo"), directory.path().join("own"));
    reactor
        .listen(UnixDatagram::at(path.clone()), Script::echo())
        .unwrap();
    let to = format!("UNIX-SENDTO:{},bind={}", path.display(), own.display());
    is_echoed_to(&mut reactor, Command::new("socat").args(["-", &to]));
}

/// A UNIX datagram comes back from where it was sent, however many processes `socat`
/// makes for that.
#[test]
fn socat_receives_datagrams_and_answers() {
    let _ledger = DescriptorLedger::open();
    if is_missing("socat", "socat") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (path, own) = (directory.path().join("cat"), directory.path().join("own"));
    let from = format!("UNIX-RECVFROM:{},fork", path.display());
    let _socat = Running::start(Command::new("socat").args([&from, "EXEC:cat"]));
    let mut reactor = Reactor::new().unwrap();
    run_until(&mut reactor, |_| path.exists());
    let script = Script::new();
    let notes = script.notes();
    let to = UnixDatagram::to(path).bind_address(own);
    let handle = reactor.connect(to, script).unwrap();
    for number in 1..=3 {
        let message = format!("datagram {number}");
        reactor.get(handle).unwrap().send(message.as_bytes());
        run_until(&mut reactor, |_| notes.count() == number);
        assert_eq!(notes.data()[number - 1], message.as_bytes());
    }
}
