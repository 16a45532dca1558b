//! The broker `pubsub`.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::{DEADLINE, Example, run_to_end};

struct Client(BufReader<TcpStream>);

impl Client {
    fn of(broker: &Example) -> Self {
        Self(BufReader::new(broker.connect()))
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.get_mut(), "{line}").expect("sent");
    }

    #[track_caller]
    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line in time");
        line.trim_end().to_owned()
    }

    /// Subscribes, and waits until the broker knows.
    fn subscribe(&mut self, topic: &str) {
        // A topic of its own says so.
        let me = self.0.get_ref().local_addr().expect("a socket").port();
        self.say(&format!("sub {topic}"));
        self.say(&format!("sub {me}"));
        self.say(&format!("pub {me} here"));
        assert_eq!(self.hear(), format!("msg {me} here"));
    }
}

#[test]
fn pubsub_tells_those_who_subscribe_and_nobody_else() {
    let broker = Example::start("pubsub", &["--listen", "tcp:127.0.0.1:0"]);
    let (mut one, mut other, mut publisher) = (
        Client::of(&broker),
        Client::of(&broker),
        Client::of(&broker),
    );
    one.subscribe("news");
    one.subscribe("weather");
    other.subscribe("weather");
    publisher.say("pub news hello to some");
    publisher.say("pub weather hello to all");
    assert_eq!(one.hear(), "msg news hello to some");
    assert_eq!(one.hear(), "msg weather hello to all");
    assert_eq!(other.hear(), "msg weather hello to all");
    publisher.say("nonsense");
    assert_eq!(publisher.hear(), "error: sub, unsub, pub");
    one.say("unsub weather");
    one.subscribe("later");
    publisher.say("pub weather not for one");
    publisher.say("pub later but this");
    assert_eq!(one.hear(), "msg later but this");
    assert_eq!(other.hear(), "msg weather not for one");
    broker.stop();
}

/// Publishes until the broker reads no more, or so many messages; how many.
fn publish(publisher: &mut Client, most: u64) -> u64 {
    let stream = publisher.0.get_mut();
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .expect("a socket");
    for number in 0..most {
        let line = format!("pub news {number:0>1000}\n");
        match stream.write_all(line.as_bytes()) {
            Ok(()) => {}
            Err(error) => {
                // A part of the line may have left: it is cut off here.
                assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                return number;
            }
        }
    }
    most
}

#[test]
fn pubsub_has_a_publisher_wait_for_one_who_does_not_read() {
    let broker = Example::start("pubsub", &["--listen", "tcp:127.0.0.1:0", "--slow", "wait"]);
    let (mut sleeper, mut publisher) = (Client::of(&broker), Client::of(&broker));
    sleeper.subscribe("news");
    // Buffers of the kernel take some megabytes on the way; then it stops.
    let published = publish(&mut publisher, 100_000);
    assert!(
        published < 100_000,
        "100 MB were taken for one who does not read"
    );
    for number in 0..published {
        assert_eq!(
            sleeper.hear(),
            format!("msg news {number:0>1000}"),
            "one is missing"
        );
    }
    broker.stop();
}

#[test]
fn pubsub_drops_for_one_who_does_not_read_and_says_how_many() {
    let broker = Example::start("pubsub", &["--listen", "tcp:127.0.0.1:0", "--slow", "drop"]);
    let (mut sleeper, mut publisher) = (Client::of(&broker), Client::of(&broker));
    sleeper.subscribe("news");
    let published = publish(&mut publisher, 40_000);
    assert_eq!(published, 40_000, "the publisher goes on");
    publisher.subscribe("done");
    let (mut heard, mut lost) = (0, 0);
    let began = Instant::now();
    while heard + lost < published {
        let line = sleeper.hear();
        match line.strip_prefix("lost ") {
            Some(count) => lost += count.parse::<u64>().expect("a number"),
            None => heard += 1,
        }
        assert!(began.elapsed() < DEADLINE, "{heard} heard, {lost} lost");
    }
    assert_eq!(heard + lost, published);
    assert!(lost > 0, "40 MB were kept for one who does not read");
    broker.stop();
}

#[test]
fn pubsub_draws_a_load_in_which_nothing_is_lost_uncounted() {
    let folder = tempfile::tempdir().expect("a folder");
    let plot = folder.path().join("plot.svg");
    let arguments = ["--load", "--seconds", "0.6", "--subscribers", "4", "--plot"];
    let arguments = [&arguments[..], &[plot.to_str().expect("a path")]].concat();
    let output = run_to_end("pubsub", &arguments);
    let said = String::from_utf8(output.stdout).expect("text");
    let rows: Vec<Vec<&str>> = said
        .lines()
        .skip(1)
        .map(|it| it.split_whitespace().collect())
        .collect();
    let [drop, wait] = &rows[..] else {
        panic!("{said}");
    };
    assert_eq!((drop[0], wait[0]), ("drop", "wait"), "{said}");
    for row in [drop, wait] {
        assert_eq!(row[1], row[2], "one that reads hears everything: {said}");
        assert!(row[1].parse::<u64>().expect("a number") > 100, "{said}");
    }
    assert_eq!(wait[4], "0", "{said}");
    let plot = std::fs::read_to_string(plot).expect("it is there");
    for label in [
        "published",
        "heard by one that reads",
        "drop: the others go on",
    ] {
        assert!(plot.contains(label), "{label}");
    }
}
