//! Policies: which worker gets a connection.

use std::net::SocketAddr;

use super::WorkerId;

/// Chooses the worker that gets a connection. Any closure of this shape is a policy,
/// for example one that sends a client to the same worker each time.
pub trait PoolPolicy: 'static {
    /// Returns the place in `candidates` of the worker that gets the connection. With
    /// `None`, or with a place that does not exist, the connection waits.
    ///
    /// `candidates` are the workers that have room and have not refused this
    /// connection. There is at least one, and they are in the order of their ids.
    fn choose(&mut self, offer: &Offer<'_>, candidates: &[Candidate]) -> Option<usize>;
}

impl<F> PoolPolicy for F
where
    F: FnMut(&Offer<'_>, &[Candidate]) -> Option<usize> + 'static,
{
    fn choose(&mut self, offer: &Offer<'_>, candidates: &[Candidate]) -> Option<usize> {
        self(offer, candidates)
    }
}

/// A connection that a policy chooses a worker for.
#[derive(Debug)]
#[non_exhaustive]
pub struct Offer<'a> {
    /// Its peer, over TCP.
    pub peer: Option<SocketAddr>,
    /// Its [label](super::PassedConnection::label).
    pub label: u32,
    /// The bytes that [were read of it](super::PassedConnection::read).
    pub read: &'a [u8],
}

/// A worker that has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// The worker.
    pub worker: WorkerId,
    /// How many connections it last said that it has.
    pub live: u32,
    /// How many connections it was given and has not answered.
    pub in_flight: usize,
    /// The most connections that it may have unanswered.
    pub window: usize,
}

impl Candidate {
    /// How many connections it has or is about to have.
    pub fn load(&self) -> usize {
        self.live as usize + self.in_flight
    }
}

/// Takes one worker after the other, and skips those without room.
#[derive(Debug, Default)]
pub struct RoundRobin {
    last: Option<WorkerId>,
}

impl RoundRobin {
    /// Begins with the oldest worker.
    pub fn new() -> Self {
        Self::default()
    }
}

impl PoolPolicy for RoundRobin {
    fn choose(&mut self, _: &Offer<'_>, candidates: &[Candidate]) -> Option<usize> {
        let next = candidates
            .iter()
            .position(|candidate| Some(candidate.worker) > self.last)
            .unwrap_or(0);
        self.last = Some(candidates.get(next)?.worker);
        Some(next)
    }
}

/// Takes the worker with the fewest [connections](Candidate::load). Equals take turns.
#[derive(Debug, Default)]
pub struct LeastLoaded {
    last: Option<WorkerId>,
}

impl LeastLoaded {
    /// Begins with the oldest worker.
    pub fn new() -> Self {
        Self::default()
    }
}

impl PoolPolicy for LeastLoaded {
    fn choose(&mut self, _: &Offer<'_>, candidates: &[Candidate]) -> Option<usize> {
        let last = self.last;
        let (place, chosen) = candidates.iter().enumerate().min_by_key(|(_, candidate)| {
            // Of equals, those after the last one come first.
            (candidate.load(), Some(candidate.worker) <= last)
        })?;
        self.last = Some(chosen.worker);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(loads: &[(u64, u32, usize)]) -> Vec<Candidate> {
        let candidate = |&(id, live, in_flight)| Candidate {
            worker: WorkerId(id),
            live,
            in_flight,
            window: 64,
        };
        loads.iter().map(candidate).collect()
    }

    fn choices(
        policy: &mut impl PoolPolicy,
        loads: &[(u64, u32, usize)],
        count: usize,
    ) -> Vec<u64> {
        let offer = Offer {
            peer: None,
            label: 0,
            read: &[],
        };
        let candidates = candidates(loads);
        let mut choose = || {
            let place = policy.choose(&offer, &candidates).expect("there are some");
            candidates[place].worker.0
        };
        (0..count).map(|_| choose()).collect()
    }

    #[test]
    fn round_robin_goes_round_whoever_has_room() {
        let mut policy = RoundRobin::new();
        let three = [(1, 9, 9), (2, 0, 0), (5, 0, 0)];
        assert_eq!(choices(&mut policy, &three, 4), [1, 2, 5, 1]);
        assert_eq!(choices(&mut policy, &three[1..], 3), [2, 5, 2]);
        assert_eq!(choices(&mut policy, &three[..1], 2), [1, 1]);
    }

    #[test]
    fn any_closure_is_a_policy() {
        let mut last = |_: &Offer<'_>, candidates: &[Candidate]| candidates.len().checked_sub(1);
        let three = [(1, 0, 0), (2, 0, 0), (5, 0, 0)];
        assert_eq!(choices(&mut last, &three, 2), [5, 5]);
        assert_eq!(WorkerId(5).to_string(), "worker 5");
    }

    #[test]
    fn least_loaded_counts_what_is_on_its_way() {
        let mut policy = LeastLoaded::new();
        assert_eq!(
            choices(&mut policy, &[(1, 5, 0), (2, 2, 2), (3, 0, 6)], 2),
            [2, 2]
        );
        // Equals take turns.
        assert_eq!(
            choices(&mut policy, &[(1, 1, 0), (2, 0, 1), (3, 1, 0)], 4),
            [3, 1, 2, 3]
        );
    }
}
