//! The order in which the addresses of a host are tried (RFC 8305). It is pure.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;

use bowline_protocol::{ConnectError, FailedAttempt};

/// The addresses that are left to try, and the errors of those that failed.
#[derive(Debug, Default)]
pub(super) struct Race {
    waiting: VecDeque<SocketAddr>,
    failed: Vec<FailedAttempt>,
}

impl Race {
    /// The families alternate, beginning with that of the first address. Within a
    /// family the given order is kept. Each address is tried once.
    pub(super) fn new(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let mut seen = HashSet::new();
        let addresses = addresses
            .into_iter()
            .filter(|address| seen.insert(*address));
        let (v4, v6): (VecDeque<_>, VecDeque<_>) = addresses
            .enumerate()
            .partition(|(_, address)| address.is_ipv4());
        let starts_with =
            |these: &VecDeque<(usize, _)>| these.front().is_some_and(|(at, _)| *at == 0);
        let (mut next, mut other) = if starts_with(&v4) { (v4, v6) } else { (v6, v4) };
        let mut waiting = VecDeque::with_capacity(next.len() + other.len());
        while let Some((_, address)) = next.pop_front() {
            waiting.push_back(address);
            if !other.is_empty() {
                std::mem::swap(&mut next, &mut other);
            }
        }
        Self {
            waiting,
            failed: Vec::new(),
        }
    }

    /// The next address to be tried.
    pub(super) fn next(&mut self) -> Option<SocketAddr> {
        self.waiting.pop_front()
    }

    pub(super) fn failed(&mut self, address: SocketAddr, error: ConnectError) {
        self.failed.push(FailedAttempt::new(address, error));
    }

    pub(super) fn has_next(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn into_failed(self) -> Vec<FailedAttempt> {
        self.failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(addresses: &[&str]) -> Vec<String> {
        let parsed = addresses
            .iter()
            .map(|text| SocketAddr::new(text.parse().unwrap(), 80));
        let mut race = Race::new(parsed);
        std::iter::from_fn(|| race.next())
            .map(|address| address.ip().to_string())
            .collect()
    }

    #[test]
    fn families_take_turns_beginning_with_the_first() {
        assert_eq!(order(&[]), [""; 0]);
        assert_eq!(order(&["1.0.0.1"]), ["1.0.0.1"]);
        assert_eq!(
            order(&["::1", "::2", "::3", "1.0.0.1", "1.0.0.2"]),
            ["::1", "1.0.0.1", "::2", "1.0.0.2", "::3"]
        );
        assert_eq!(
            order(&["1.0.0.1", "1.0.0.2", "::1"]),
            ["1.0.0.1", "::1", "1.0.0.2"]
        );
        assert_eq!(
            order(&["1.0.0.1", "::1", "::2", "::3"]),
            ["1.0.0.1", "::1", "::2", "::3"]
        );
    }

    #[test]
    fn each_address_is_tried_once() {
        assert_eq!(
            order(&["::1", "1.0.0.1", "::1", "1.0.0.1"]),
            ["::1", "1.0.0.1"]
        );
    }
}
