//! Peers that nobody here wrote: Twisted, and Python's own sockets, as child
//! processes at the other end of UNIX streams.
//!
//! `tests/interop/setup` installs them. A scenario whose peer is missing is
//! reported as not run, and never as passed; with `CI=true` or
//! `BOWLINE_INTEROP=require` in the environment it fails. The versions of the
//! peers are printed.
//!
//! The harness is our own, since that of the compiler cannot say "not run". It
//! understands what `cargo test` and `cargo nextest` pass on: a part of a name,
//! `--exact`, `--skip`, `--list`.

#![allow(clippy::print_stdout, reason = "it is a test harness")]

use std::any::Any;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use crate::peer::{Needs, Peers};
use crate::support::DescriptorLedger;

#[path = "../support/mod.rs"]
mod support;

mod at_random;
mod attachment;
mod bytes;
mod closing;
mod descriptors;
mod framing;
mod handoff;
mod pair;
mod peer;
mod sockets;

/// One test.
struct Scenario {
    name: String,
    needs: Needs,
    run: Box<dyn Fn(&Peers)>,
}

impl Scenario {
    fn new(name: impl Into<String>, needs: Needs, run: impl Fn(&Peers) + 'static) -> Self {
        Self {
            name: name.into(),
            needs,
            run: Box::new(run),
        }
    }
}

fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(descriptors::scenarios());
    all.extend(bytes::scenarios());
    all.extend(closing::scenarios());
    all.extend(framing::scenarios());
    all.extend(handoff::scenarios());
    all.extend(sockets::scenarios());
    all.extend(attachment::scenarios());
    all.extend(at_random::scenarios());
    all
}

fn main() -> ExitCode {
    let arguments = Arguments::parse(env::args().skip(1));
    let peers = Peers::find();
    let chosen: Vec<_> = scenarios()
        .into_iter()
        .filter(|scenario| arguments.chooses(&scenario.name))
        .collect();
    let will_run = |scenario: &Scenario| peers.are_required() || peers.have(scenario.needs);
    if arguments.list {
        // What cannot run is listed as an ignored test is.
        for scenario in chosen {
            if will_run(&scenario) != arguments.ignored_only {
                println!("{}: test", scenario.name);
            }
        }
        return ExitCode::SUCCESS;
    }

    println!("\npeers: {peers}");
    println!("running {} tests", chosen.len());
    let started = Instant::now();
    let (mut passed, mut skipped) = (0, 0);
    let mut failed = Vec::new();
    for scenario in &chosen {
        let name = &scenario.name;
        if !will_run(scenario) {
            skipped += 1;
            println!("test {name} ... NOT RUN: {}", peers.how_to_install());
            continue;
        }
        let started = Instant::now();
        match run(scenario, &peers) {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok, {} ms", started.elapsed().as_millis());
            }
            Err(why) => {
                println!("test {name} ... FAILED: {why}");
                failed.push(name);
            }
        }
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!(
        "\ntest result: {}. {passed} passed; {} failed; {skipped} skipped; finished in {:.2}s\n",
        if failed.is_empty() { "ok" } else { "FAILED" },
        failed.len(),
        started.elapsed().as_secs_f64(),
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs one scenario, and sees to it that it leaves no descriptor open.
fn run(scenario: &Scenario, peers: &Peers) -> Result<(), String> {
    if !peers.have(scenario.needs) {
        return Err(peers.how_to_install());
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let ledger = DescriptorLedger::open();
        (scenario.run)(peers);
        ledger.assert_balanced();
    }));
    outcome.map_err(|panic| message_of(&*panic))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    if let Some(message) = panic.downcast_ref::<String>() {
        message.clone()
    } else if let Some(message) = panic.downcast_ref::<&str>() {
        (*message).into()
    } else {
        "a panic without a message".into()
    }
}

/// What the harness was asked for.
#[derive(Default)]
struct Arguments {
    parts: Vec<String>,
    skipped: Vec<String>,
    exact: bool,
    list: bool,
    ignored_only: bool,
}

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Self {
        let mut arguments = Self::default();
        let mut words = words;
        while let Some(word) = words.next() {
            match word.as_str() {
                "--exact" => arguments.exact = true,
                "--list" => arguments.list = true,
                "--ignored" => arguments.ignored_only = true,
                "--skip" => arguments.skipped.extend(words.next()),
                "--format" | "--test-threads" | "--color" | "--logfile" | "-Z" => {
                    words.next();
                }
                // Such as --nocapture: nothing is captured.
                other if other.starts_with('-') => {}
                _ => arguments.parts.push(word),
            }
        }
        arguments
    }

    fn chooses(&self, name: &str) -> bool {
        let matches = |part: &String| {
            if self.exact {
                name == part
            } else {
                name.contains(part.as_str())
            }
        };
        (self.parts.is_empty() || self.parts.iter().any(matches))
            && !self.skipped.iter().any(matches)
    }
}
