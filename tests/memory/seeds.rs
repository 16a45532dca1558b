//! What runs from a seed share: a system that starts and ends processes between
//! their turns, and the round of seeds, each of which does the same twice.

use std::fmt::Debug;
use std::time::Instant;

use bowline::testing::{ManualClock, Simulation};

use crate::support::Staged;
use crate::support::figures::scaled;

/// Replays one seed.
const SEED: &str = "BOWLINE_SEED";
/// How many of them, instead of the default.
const SEEDS: &str = "BOWLINE_SEEDS";
/// After how many turns at one time a run does not come to rest.
const MOST_TURNS: usize = 1_000_000;

/// A simulation with a system around it.
pub(crate) trait System {
    fn simulation(&mut self) -> &mut Simulation;

    /// What happens between two turns: processes start and end.
    fn act(&mut self);

    /// Whether processes are about to start or to end.
    fn is_acting(&self) -> bool;

    fn turn(&mut self) -> bool {
        self.act();
        self.simulation().turn()
    }
}

impl<S: System> Staged for S {
    fn clock(&mut self) -> &ManualClock {
        self.simulation().clock()
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        self.simulation().next_deadline()
    }

    /// Runs until nothing is left to do at this time.
    fn settle(&mut self) {
        for _ in 0..MOST_TURNS {
            if !self.turn() && !self.is_acting() {
                return;
            }
        }
        panic!("not at rest: {:?}", self.simulation());
    }
}

/// Simulates so many seeds, each twice; how many those were, and how many did the
/// same again. None if one was only replayed, because `BOWLINE_SEED` says so.
pub(crate) fn every_seed<T: Debug + PartialEq>(
    (short, full): (usize, usize),
    simulate: fn(u64) -> T,
    mut done: impl FnMut(T),
) -> Option<(usize, usize)> {
    if let Ok(seed) = std::env::var(SEED) {
        let seed = seed.parse().expect("a number");
        assert_eq!(simulate(seed), simulate(seed));
        return None;
    }
    let seeds = std::env::var(SEEDS).ok();
    let seeds = seeds.map_or_else(
        || scaled(short, full),
        |seeds| seeds.parse().expect("a number"),
    );
    let mut equal = 0;
    for seed in 0..seeds as u64 {
        let outcome = std::panic::catch_unwind(|| (simulate(seed), simulate(seed)));
        let Ok((first, second)) = outcome else {
            panic!("{SEED}={seed} replays this");
        };
        equal += usize::from(first == second);
        done(first);
    }
    Some((seeds, equal))
}

/// Prints what a round of seeds has seen.
#[allow(clippy::print_stdout, reason = "it is printed to be read")]
pub(crate) fn tell(what: std::fmt::Arguments<'_>) {
    println!("{what}");
}
