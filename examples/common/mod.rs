//! What the examples share: the command line and addresses.

// Each example uses a part of it.
#![allow(dead_code)]

use std::env;
use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bowline::{ListenerHandle, Reactor};

/// How long those wait that stop with their children, or restart.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// What `main` returns: any error ends the program with its text.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

/// Any error, shown as its text: `main` prints the debug form.
pub(crate) struct Failure(Box<dyn Error>);

impl<E: Into<Box<dyn Error>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The command line: `--name VALUE` and `--flag`.
pub(crate) struct Arguments {
    left: Vec<String>,
}

impl Arguments {
    /// Reads the command line; for `--help` prints `help` and exits.
    pub(crate) fn parse(help: &str) -> Self {
        let left: Vec<_> = env::args().skip(1).collect();
        // What stands behind `--` is for somebody else.
        let mut own = left.iter().take_while(|argument| *argument != "--");
        if own.any(|argument| argument == "--help") {
            println!("{}", help.trim());
            std::process::exit(0);
        }
        Self { left }
    }

    /// Takes `--name VALUE`, if it is there.
    pub(crate) fn option<T: FromStr>(&mut self, name: &str) -> Result<Option<T>>
    where
        T::Err: fmt::Display,
    {
        let Some(position) = self.left.iter().position(|argument| argument == name) else {
            return Ok(None);
        };
        self.left.remove(position);
        if position == self.left.len() {
            return Err(format!("{name} needs a value").into());
        }
        let value = self.left.remove(position);
        let parsed = value.parse();
        Ok(Some(
            parsed.map_err(|error| format!("{name} {value}: {error:#}"))?,
        ))
    }

    /// Takes `--name`; whether it was there.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let before = self.left.len();
        self.left.retain(|argument| argument != name);
        self.left.len() < before
    }

    /// Takes what stands behind `--`.
    pub(crate) fn rest(&mut self) -> Vec<String> {
        match self.left.iter().position(|argument| argument == "--") {
            Some(position) => self.left.split_off(position).split_off(1),
            None => Vec::new(),
        }
    }

    /// Nothing may be left over.
    pub(crate) fn finish(self) -> Result {
        match self.left.first() {
            None => Ok(()),
            Some(argument) => Err(format!("unknown argument {argument}; try --help").into()),
        }
    }
}

/// Prints where `listener` listens: the real port, where port 0 was asked for.
/// To be called last, as whoever reads it may send a signal at once.
pub(crate) fn print_address(reactor: &mut Reactor, listener: ListenerHandle) {
    if let Some(listener) = reactor.get(listener) {
        println!("listening on {}", listener.address());
    }
}
