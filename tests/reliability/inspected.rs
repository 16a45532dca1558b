//! A look inside a program with many connections.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream as StdTcpStream;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::{Duration, Instant};

use bowline::inspect::Inspector;
use bowline::{Context, Protocol, Reactor, Transport, Transports, Unix};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::figures::{Bound, Figures, is_full, scaled};
use crate::support::{DescriptorLedger, run_until, socketpair};

const PATIENCE: Duration = Duration::from_secs(60);
/// How many descriptors are described in a turn at the most.
const PORTION: usize = 256;

struct Quiet;

impl<T: Transport> Protocol<T> for Quiet {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// How long others had the processor so far, in place of this thread.
fn lent_to_others() -> Duration {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has it");
    let waited = times.split_ascii_whitespace().nth(1);
    let waited = waited.and_then(|waited| waited.parse().ok());
    Duration::from_nanos(waited.expect("Linux counts it"))
}

/// What somebody was answered, and the longest turn until that was there: in all, and less
/// what others had the processor in it.
struct Look {
    answer: String,
    longest: Duration,
    own: Duration,
}

fn look<S: Read + Write>(
    reactor: &mut Reactor,
    mut client: S,
    request: &str,
    is_all: impl Fn(&[u8]) -> bool,
) -> Look {
    client.write_all(request.as_bytes()).unwrap();
    let (mut answer, mut longest, mut own) = (Vec::new(), Duration::ZERO, Duration::ZERO);
    let began = Instant::now();
    while !is_all(&answer) {
        assert!(began.elapsed() < PATIENCE, "{} bytes", answer.len());
        let (lent, turned) = (lent_to_others(), Instant::now());
        reactor.turn(Some(Duration::ZERO));
        let took = turned.elapsed();
        longest = longest.max(took);
        own = own.max(took.saturating_sub(lent_to_others() - lent));
        // Nothing comes while there is nothing to read.
        let _ = client.read_to_end(&mut answer);
    }
    Look {
        answer: String::from_utf8(answer).unwrap(),
        longest,
        own,
    }
}

/// The lines of a list, and how many of them one turn made at the most.
fn listed(answer: &str) -> (usize, usize) {
    let mut by_turn = BTreeMap::<u64, usize>::new();
    let mut tokens = Vec::new();
    for line in answer.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        if line["kind"] == "UNIX" {
            tokens.push(line["token"].as_u64().unwrap());
            *by_turn.entry(line["turn"].as_u64().unwrap()).or_default() += 1;
        }
    }
    let count = tokens.len();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), count, "one is listed twice");
    (count, by_turn.into_values().max().unwrap_or(0))
}

/// Reliability T-47: it is looked into a program with ten thousand connections, in each of
/// the three ways.
#[test]
fn a_look_at_ten_thousand_connections_makes_no_turn_long() {
    let ledger = DescriptorLedger::alone();
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("up to the maximum is allowed");
    let (connections, rounds) = (scaled(1_000, 10_000), scaled(2, 50));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inspect");
    let mut reactor = Reactor::new().unwrap();
    Inspector::on_socket(&mut reactor, &path).unwrap();
    let page = Inspector::on_address(&mut reactor, ([127, 0, 0, 1], 0).into()).unwrap();
    for _ in 0..connections / 2 {
        let (one, other) = socketpair();
        reactor.adopt(Unix, one.into(), Quiet).unwrap();
        reactor.adopt(Unix, other.into(), Quiet).unwrap();
    }
    run_until(&mut reactor, |reactor| reactor.is_idle());
    let (mut least, mut most_at_once, mut looks) = (usize::MAX, 0, 0);
    let open = reactor
        .kind_counts()
        .iter()
        .map(|it| it.open())
        .sum::<u64>() as usize;
    let mut longest = BTreeMap::<&str, (Duration, Duration)>::new();
    for _ in 0..rounds {
        for way in ["list", "summary", "page", "metrics"] {
            let look = look_in(&mut reactor, way, &path, &page);
            looks += 1;
            let seen = longest.entry(way).or_default();
            *seen = (seen.0.max(look.own), seen.1.max(look.longest));
            if way == "list" {
                let (count, at_once) = listed(&look.answer);
                least = least.min(count);
                most_at_once = most_at_once.max(at_once);
            }
        }
    }
    let mut figures = Figures::of("T-47")
        .must("connections", open, Bound::AtLeast, connections)
        .must("looks at all of them", looks, Bound::AtLeast, rounds * 4)
        .must("listed, each once", least, Bound::AtLeast, connections)
        .must(
            "listed in one turn at most",
            most_at_once,
            Bound::AtMost,
            PORTION,
        );
    for (way, (own, all)) in longest {
        let what = format!("longest turn, {way}, less what others had the processor");
        figures = figures
            .measured(&what, own.as_secs_f64() * 1e3, "ms", Bound::Below, 5.0)
            .remark(&format!("longest turn of all, {way}: {all:.1?}"));
    }
    if !is_full() {
        figures.remark("short form: the targets are of ten thousand");
    }
    drop((reactor, folder));
    setrlimit(Resource::Nofile, limit).expect("it was so");
    drop(ledger);
}

fn look_in(
    reactor: &mut Reactor,
    way: &str,
    path: &std::path::Path,
    page: &bowline::inspect::Page,
) -> Look {
    let url = page.url();
    let secret = &url[url.len() - 34..];
    if way == "list" || way == "summary" {
        let client = StdUnixStream::connect(path).unwrap();
        client.set_nonblocking(true).unwrap();
        return match way {
            "list" => look(reactor, client, "{\"get\":\"descriptors\"}\n", |answer| {
                answer.ends_with(b"}}\n")
            }),
            _ => look(reactor, client, "{\"get\":\"summary\"}\n", |answer| {
                answer.ends_with(b"}\n")
            }),
        };
    }
    let client = StdTcpStream::connect(page.address()).unwrap();
    client.set_nonblocking(true).unwrap();
    match way {
        "page" => {
            let request = format!("GET {secret}events HTTP/1.1\r\n\r\n");
            look(reactor, client, &request, |answer| {
                answer.ends_with(b"\n\n") && answer.windows(6).any(|it| it == b"data: ")
            })
        }
        _ => {
            let request = format!("GET {secret}metrics HTTP/1.1\r\n\r\n");
            let last = b"bowline_truncations_total ";
            look(reactor, client, &request, |answer| {
                answer.ends_with(b"\n") && answer.windows(last.len()).any(|it| it == last)
            })
        }
    }
}
