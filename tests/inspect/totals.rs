//! What the connections of each listener did and hold, and the channels of each pool.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bowline::{Address, Context, Protocol, Transports, UnixTransport};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::browser::Server;
use crate::support::{DescriptorLedger, eventually};
use crate::web::{event, get, open, place, sample};
use crate::{Asker, Program, connect, fact, say};

const PATIENCE: Duration = Duration::from_secs(20);

/// What a list adds up of the listener whose factory this is, and its token.
fn of_listener(asker: &mut Asker, factory: &str) -> (Value, Value) {
    let (all, end) = asker.descriptors();
    let is_it = |it: &&Value| it["kind"] == "listener" && fact(it, "factory") == factory;
    let token = all.iter().find(is_it).expect("it is listed")["token"].clone();
    let sums = end["listeners"].as_array().expect("they are added up");
    let sum = sums.iter().find(|it| it["token"] == token);
    (sum.expect("one for each").clone(), token)
}

#[test]
fn a_listener_has_the_bytes_the_states_and_the_pauses_of_all_of_its_connections() {
    let ledger = DescriptorLedger::open();
    let program = Program::start();
    let mut asker = Asker::new(&program.socket);
    let (nothing, token) = of_listener(&mut asker, "Echo");
    assert_eq!(
        (&nothing["open"], &nothing["sent_bytes"]),
        (&json!(0), &json!(0))
    );
    let mut gone = program.connect();
    say(&mut gone, b"and more");
    let mut paused = program.connect();
    say(&mut paused, b"pause");
    let mut flooded = connect(&program.echo);
    flooded.write_all(b"flood").unwrap();
    let sum = eventually(PATIENCE, || match of_listener(&mut asker, "Echo").0 {
        sum if sum["buffered_bytes"].as_u64() > Some(0) => Ok(sum),
        sum => Err(format!("nothing waits in {sum}")),
    });
    assert_eq!(sum["open"], 3, "{sum}");
    assert_eq!(sum["states"], json!({"open": 3}), "{sum}");
    assert_eq!(sum["received_bytes"], 13 + 10 + 5, "{sum}");
    let paused_by = json!({"protocol": 1, "policy": 0, "peer": 1});
    assert_eq!(sum["paused_by"], paused_by, "{sum}");
    // Each says which listener it came by.
    let echoes = asker.connections();
    assert_eq!(echoes.len(), 3);
    assert!(
        echoes.iter().all(|it| fact(it, "listener") == token),
        "{echoes:#?}"
    );
    drop(flooded);
    drop(gone);
    let sum = eventually(PATIENCE, || match of_listener(&mut asker, "Echo").0 {
        sum if sum["open"] == 1 => Ok(sum),
        sum => Err(format!("three were open: {sum}")),
    });
    // What is over waits for nobody, and what it did is not forgotten.
    assert_eq!(sum["received_bytes"], 13 + 10 + 5, "{sum}");
    assert!(sum["sent_bytes"].as_u64() >= Some(13 + 10), "{sum}");
    assert_eq!(sum["buffered_bytes"], 0, "{sum}");
    assert_eq!(sum["paused_by"]["peer"], 0, "{sum}");
    // The other listener has connections of its own.
    let (operators, _) = of_listener(&mut asker, "Operators");
    assert_eq!(
        operators["open"], 0,
        "one that asks is out of its slot: {operators}"
    );
    let metrics = metrics_of(&program.page);
    let labels = format!("factory=\"Echo\",local=\"{}\"", program.echo.display());
    for (name, more, value) in [
        ("connections", ",state=\"open\"", 1.0),
        ("accepting", "", 1.0),
        ("received_bytes_total", "", 28.0),
        ("buffered_bytes", "", 0.0),
        ("paused", ",by=\"protocol\"", 1.0),
        ("paused", ",by=\"peer\"", 0.0),
    ] {
        let name = format!("bowline_listener_{name}{{{labels}{more}}}");
        assert_eq!(sample(&metrics, &name), Some(value), "{name}: {metrics}");
    }
    assert_eq!(
        sample(&metrics, "bowline_paused{kind=\"UNIX\",by=\"protocol\"}"),
        Some(1.0)
    );
    drop((paused, asker, program));
    ledger.assert_balanced();
}

fn metrics_of(page: &str) -> String {
    let answer = get(page, &format!("{}metrics", place(page).1));
    answer.split_once("\r\n\r\n").expect("a body").1.to_owned()
}

/// Answers each descriptor with two.
struct Doubles;

impl<T: UnixTransport> Protocol<T> for Doubles {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn file_descriptor_received(
        &mut self,
        cx: &mut Context<'_, T>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let second = fd.try_clone().unwrap();
        for fd in [fd, second] {
            cx.transport.send_file_descriptor(fd.into()).unwrap();
        }
        cx.transport.write(b"two");
        Ok(())
    }
}

fn pass(stream: &UnixStream, file: &File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    let bytes = [IoSlice::new(b"one")];
    sendmsg(stream, &bytes, &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn a_listener_and_its_kind_have_the_descriptors_that_came_and_went() {
    let ledger = DescriptorLedger::open();
    let program = Program::start_of(None, |reactor, path| {
        reactor.listen_unix(path, |_: &Address| Doubles).unwrap();
    });
    let file = File::open("/dev/null").unwrap();
    let mut clients = [connect(&program.echo), connect(&program.echo)];
    for client in &mut clients {
        pass(client, &file);
        // Who reads without room for descriptors has none.
        client.read_exact(&mut [0; 3]).unwrap();
    }
    let mut asker = Asker::new(&program.socket);
    let passed = |sum: &Value| {
        let count = |name: &str| sum[name].as_u64().unwrap();
        (count("received_descriptors"), count("sent_descriptors"))
    };
    let (sum, _) = of_listener(&mut asker, "Doubles");
    assert_eq!(passed(&sum), (2, 4), "{sum}");
    // Of one that has ended as of one that is open, and of both by kind.
    drop(clients);
    let sum = eventually(PATIENCE, || match of_listener(&mut asker, "Doubles").0 {
        sum if sum["open"] == 0 => Ok(sum),
        sum => Err(format!("two were open: {sum}")),
    });
    assert_eq!(passed(&sum), (2, 4), "{sum}");
    let metrics = metrics_of(&program.page);
    let labels = format!("factory=\"Doubles\",local=\"{}\"", program.echo.display());
    for (labels, of) in [(labels.as_str(), "listener_"), ("kind=\"UNIX\"", "")] {
        for (way, count) in [("received", 2.0), ("sent", 4.0)] {
            let name = format!("bowline_{of}{way}_descriptors_total{{{labels}}}");
            assert_eq!(sample(&metrics, &name), Some(count), "{name}: {metrics}");
        }
    }
    drop((asker, file, program));
    ledger.assert_balanced();
}

/// What the workers have is theirs to tell. The pool knows what has passed to them, also
/// to one that is gone.
#[test]
fn a_pool_has_the_descriptors_and_the_bytes_that_passed_to_its_workers() {
    let pool = Server::start("prefork", &["--serve", "--workers", "2"]);
    for _ in 0..10 {
        let mut client = TcpStream::connect(&pool.address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(client.read(&mut [0; 100]).unwrap() > 0);
    }
    let value = |metrics: &str, name: &str| {
        let name = format!("bowline_pool_{name}{{pool=\"0\"}}");
        sample(metrics, &name).unwrap_or_else(|| panic!("no {name} in {metrics}"))
    };
    let before = metrics_of(&pool.page);
    assert_eq!(value(&before, "sent_descriptors_total"), 10.0);
    assert_eq!(value(&before, "queued_descriptors"), 0.0);
    assert!(value(&before, "sent_bytes_total") > 0.0);
    assert!(value(&before, "received_bytes_total") > 0.0);
    let (mut stream, mut read) = (open(&pool.page), String::new());
    write!(stream, "GET {}events HTTP/1.1\r\n\r\n", place(&pool.page).1).unwrap();
    let shown = event(&mut stream, &mut read);
    assert_eq!(shown["pools"][0]["sent_descriptors"], 10, "{shown}");
    assert_eq!(shown["pools"][0]["open"], 2, "{shown}");
    // The listener says which pool it is of.
    let all = shown["descriptors"].as_array().unwrap();
    let listener = all.iter().find(|it| fact(it, "accepting") == "by the pool");
    assert_eq!(
        fact(listener.expect("it describes itself"), "pool"),
        shown["pools"][0]["pool"]
    );
    let worker = all.iter().find(|it| fact(it, "peer_role") == "worker");
    let pid = fact(worker.expect("a channel"), "pid").as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    let deaths = "bowline_pool_worker_events_total{pool=\"0\",event=\"deaths\"}";
    let after = eventually(PATIENCE, || match metrics_of(&pool.page) {
        text if sample(&text, deaths) == Some(1.0) => Ok(text),
        text => Err(text),
    });
    assert_eq!(value(&after, "sent_descriptors_total"), 10.0);
    for name in ["sent_bytes_total", "received_bytes_total"] {
        assert!(
            value(&after, name) >= value(&before, name),
            "{name}: {after}"
        );
    }
}
