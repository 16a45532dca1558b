//! bowline beside a hand-written loop and beside its peers, in one run.
//!
//! ```text
//! cargo run --release -p bowline-bench -- all            everything; some minutes
//! cargo run --release -p bowline-bench -- all --quick    a short form
//!     --only A;B       works whose name contains one of these
//!     --peers A,B      these beside the limit
//!     --rounds N       how often each is measured
//!     --span MS        how long each time
//!     --write FILE     the table as Markdown, with the machine's description
//!     --svg FILE       a picture of it
//!
//! cargo run --release -p bowline-bench -- ceilings benches/CEILINGS
//!                      bowline's instructions, held against a file
//!     --write FILE     keeps what was counted, as such a file
//!     --more PERCENT   allows so much more than stands there
//!
//! cargo run --release -p bowline-bench -- growth         what one more of something costs
//!     --quick, --write FILE, --svg FILE
//! ```
//!
//! Each server is a process of its own, started fresh for every round and bound
//! to the first CPU; the generator is bound to the second. Wants two CPUs, 20,000
//! descriptors for the largest works, and valgrind for the count of
//! instructions. libuv takes part where a C compiler finds it, Twisted after
//! tests/interop/setup.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program that prints"
)]

mod ceilings;
mod child;
mod drive;
mod external;
mod growth;
mod load;
mod messages;
mod peers;
mod report;
#[allow(dead_code, reason = "the other programs use the rest")]
mod sys;
mod timers;
mod wheel;
mod works;

use std::error::Error;
use std::io::Write;
use std::time::Duration;
use std::{env, fs, io};

use crate::growth::Grown;
use crate::peers::{Family, Job, Peer, Task, Wait, passing};
use crate::report::Table;
use crate::timers::Timed;
use crate::works::Effort;

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

const USAGE: &str = "usage: bowline-bench all [--quick] [--only A;B] [--peers A,B] [--rounds N] \
                     [--span MS] [--write FILE] [--svg FILE]";

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments {
        ["all", ref options @ ..] => all(options),
        ["serve", peer, task, family, message] => Ok(serve(peer, job(task, family, message)?)?),
        ["drive", peer, task, family, message, rounds] => {
            let peer = find(&Peer::ALL, Peer::name, peer)?;
            let job = job(task, family, message)?;
            let [turns, allocations] = drive::drive(peer, job, rounds.parse()?)?;
            println!("{turns} {allocations}");
            Ok(())
        }
        ["work", peer] => Ok(passing::work(
            find(&Peer::ALL, Peer::name, peer)?,
            sys::inherited_listener(),
        )?),
        ["fetch", peer, path, count] => {
            let peer = find(&Peer::ALL, Peer::name, peer)?;
            let (arrived, seconds) = passing::fetch(peer, path.as_ref(), count.parse()?)?;
            println!("{arrived} {seconds}");
            Ok(())
        }
        ["spawn", peer, count] => {
            let peer = find(&Peer::ALL, Peer::name, peer)?;
            for value in peers::messages::spawn(peer, count.parse()?)? {
                println!("{value}");
            }
            Ok(())
        }
        ["ceilings", file] => ceilings(file, 0.0, None),
        ["ceilings", file, "--write", counts] => ceilings(file, 0.0, Some(counts)),
        ["ceilings", file, "--more", percent] => ceilings(file, percent.parse()?, None),
        ["steady", timed] => Ok(ceilings::drive(find(&Timed::ALL, Timed::name, timed)?)?),
        ["time", peer, timed, count] => time(peer, timed, count),
        ["hold", port, count] => {
            sys::raise_descriptor_limit()?;
            Ok(growth::hold(port.parse()?, count.parse()?)?)
        }
        ["growth", ref options @ ..] => growth::run(options),
        ["grow", peer, grown, size, rounds] => {
            sys::raise_descriptor_limit()?;
            let peer = find(&Peer::ALL, Peer::name, peer)?;
            let grown = find(&Grown::ALL, Grown::name, grown)?;
            let each = growth::grow(peer, grown, size.parse()?, rounds.parse()?)?;
            println!("{each}");
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}

fn ceilings(file: &str, more: f64, counts: Option<&str>) -> Result<(), Box<dyn Error>> {
    match ceilings::check(file, more, counts)? {
        true => Ok(()),
        false => Err("more instructions than the ceiling allows".into()),
    }
}

fn all(options: &[&str]) -> Result<(), Box<dyn Error>> {
    let mut effort = Effort::FULL;
    let mut peers = Peer::ALL.to_vec();
    let mut only = "";
    let mut file = None;
    let mut picture = None;
    let mut options_left = options.iter();
    while let Some(&option) = options_left.next() {
        if option == "--quick" {
            effort = Effort::QUICK;
            continue;
        }
        let value = options_left.next().ok_or("the option wants a value")?;
        match option {
            "--only" => only = value,
            "--rounds" => effort.rounds = value.parse()?,
            "--span" => effort.span = Duration::from_millis(value.parse()?),
            "--write" => file = Some(value),
            "--svg" => picture = Some(value),
            "--peers" => {
                peers = vec![Peer::Limit];
                for name in value.split(',') {
                    let peer = find(&Peer::ALL, Peer::name, name)?;
                    if peer != Peer::Limit {
                        peers.push(peer);
                    }
                }
            }
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    if sys::raise_descriptor_limit()? < 10_200 {
        return Err("10,000 connections want a limit of 10,200 open files or more".into());
    }
    sys::pin(child::GENERATOR_CPU)?;
    peers.retain(|&peer| {
        let missing = external::missing(peer);
        if let Some(missing) = missing {
            eprintln!("NOT RUN: {} {missing}", peer.name());
        }
        missing.is_none()
    });
    let mut table = Table::new(&peers);
    println!("{}", table.head());
    for work in works::all() {
        if only.split(';').any(|text| work.name.contains(text)) {
            works::run(&work, &peers, effort, &mut table);
            for line in table.lines_of(work.name) {
                println!("{line}");
            }
        }
    }
    if let Some(file) = file {
        let command = format!(
            "cargo run --release -p bowline-bench -- all {}",
            options.join(" ")
        );
        fs::write(file, table.markdown(&command))?;
    }
    if let Some(picture) = picture {
        table.draw(picture)?;
    }
    Ok(())
}

fn serve(peer: &str, job: Job) -> io::Result<()> {
    sys::raise_descriptor_limit()?;
    sys::report_memory_on_signal()?;
    let peer = find(&Peer::ALL, Peer::name, peer)?;
    if job.task == Task::Pass {
        io::stdout().write_all(b"R")?;
        io::stdout().flush()?;
        return passing::accept(peer, sys::inherited_listener());
    }
    let mut server = peers::build(peer, job, Some(sys::inherited_listener()))?;
    // The parent waits for it.
    io::stdout().write_all(b"R")?;
    io::stdout().flush()?;
    loop {
        match server.turn(Wait::Forever) {
            // Asked for its memory.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => other?,
        }
    }
}

fn time(peer: &str, timed: &str, count: &str) -> Result<(), Box<dyn Error>> {
    let peer = find(&Peer::ALL, Peer::name, peer)?;
    let timed = find(&Timed::ALL, Timed::name, timed)?;
    for value in peers::time(peer, timed, count.parse()?)? {
        println!("{value}");
    }
    Ok(())
}

fn job(task: &str, family: &str, message: &str) -> io::Result<Job> {
    Ok(Job {
        task: find(&Task::ALL, Task::name, task)?,
        family: find(&Family::ALL, Family::name, family)?,
        message: message.parse().map_err(io::Error::other)?,
    })
}

fn find<T: Copy>(all: &[T], name_of: fn(T) -> &'static str, name: &str) -> io::Result<T> {
    let found = all.iter().copied().find(|&one| name_of(one) == name);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no {name}")))
}
