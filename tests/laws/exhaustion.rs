//! Failure is contained: a listener survives the lack of descriptors. In a
//! process of its own, which the test binary runs of itself.

use std::io::Read;
use std::os::unix::net::UnixStream as Peer;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bowline::{Address, Reactor, Transports, UnixAddress};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::{DEADLINE, DescriptorLedger, Record, Recorder, open_descriptors, run_until};

const CASE: &str = "BOWLINE_TEST_EXHAUSTION";

fn run_child(case: &str) {
    // Its pipes would be found by the tests that count descriptors meanwhile.
    let ledger = DescriptorLedger::open();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "exhaustion::child", "--nocapture"])
        .env(CASE, case)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{case}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ledger.assert_balanced();
}

/// Contract M-06.
#[test]
fn listener_recovers_without_a_new_client_when_descriptors_return() {
    run_child("recovers");
}

/// Contract L-07, W-49.
#[test]
fn listener_without_descriptors_does_not_spin() {
    run_child("does not spin");
}

#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let recorder = Recorder::new(&record);
    reactor
        .listen_unix(UnixAddress::Path(path.clone()), move |_: &Address| {
            recorder.clone()
        })
        .unwrap();
    // The alarm, which the retry will want, is a descriptor too.
    reactor.call_later(Duration::from_millis(1), |_| {});
    run_until(&mut reactor, |reactor| reactor.delayed_calls().count() == 0);
    let clients: Vec<Peer> = (0..10).map(|_| Peer::connect(&path).unwrap()).collect();
    // Not one more than there are.
    let highest = *open_descriptors().last().unwrap();
    let before = getrlimit(Resource::Nofile);
    let fillers: Vec<std::fs::File> = (0..)
        .map(|_| std::fs::File::open("/dev/null").unwrap())
        .take(highest as usize + 1 - open_descriptors().len())
        .collect();
    let limit = Rlimit {
        current: Some(highest as u64 + 1),
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    assert!(
        std::fs::File::open("/dev/null").is_err(),
        "there are descriptors left"
    );
    match case.as_str() {
        "does not spin" => {
            let turns = reactor.statistics().turns;
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(500) {
                reactor.turn(Some(Duration::from_millis(500)));
            }
            let turns = reactor.statistics().turns - turns;
            assert!(turns <= 10, "{turns} wake-ups in half a second");
            assert!(record.summary().is_empty(), "accepted out of nothing");
            // Each retry shed one client: it sees the end rather than silence.
            let shed = reactor.descriptor_counts().shed;
            assert!((1..=turns).contains(&shed), "{shed} shed");
            let mut ended = 0;
            for mut client in &clients {
                client.set_nonblocking(true).unwrap();
                ended += u64::from(matches!(client.read(&mut [0]), Ok(0)));
            }
            assert_eq!(ended, shed);
        }
        "recovers" => {
            let began = Instant::now();
            while reactor.descriptor_counts().shed == 0 {
                reactor.turn(Some(Duration::from_millis(200)));
                assert!(began.elapsed() < DEADLINE);
            }
            setrlimit(Resource::Nofile, before).unwrap();
            let shed = reactor.descriptor_counts().shed as usize;
            // Nobody new connects.
            run_until(&mut reactor, |_| {
                record.summary().len() == clients.len() - shed
            });
            assert_eq!(reactor.descriptor_counts().shed as usize, shed);
        }
        other => panic!("no case {other}"),
    }
    drop(fillers);
}
