//! What is built with: the versions that `Cargo.lock` pins.

use std::fs;
use std::path::Path;

use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures};

/// The versions of a package in a lock file, as numbers: `0.4.12-rc.1` has none.
fn versions(lock: &str, package: &str) -> Vec<Option<[u64; 3]>> {
    let named = format!("name = \"{package}\"");
    lock.split("[[package]]")
        .filter(|entry| entry.lines().any(|line| line == named))
        .map(|entry| {
            let mut lines = entry.lines();
            let text = lines.find_map(|line| line.strip_prefix("version = \""))?;
            let numbers = text.trim_end_matches('"').split('.').map(str::parse);
            let numbers: Vec<u64> = numbers.collect::<Result<_, _>>().ok()?;
            numbers.try_into().ok()
        })
        .collect()
}

/// Reliability T-40: slab has no version with the read out of bounds that 0.4.11
/// mended, and libc none of its 1.0-alpha, whose types are others.
#[test]
fn pinned_versions_are_those_meant() {
    // A file that is open for a moment would be seen by tests in other threads.
    let _ledger = DescriptorLedger::open();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    let lock = fs::read_to_string(path).expect("it is kept with the source");
    let slab = versions(&lock, "slab");
    let libc = versions(&lock, "libc");
    let is_old = |version: &&Option<[u64; 3]>| version.is_none_or(|it| it < [0, 4, 11]);
    let is_other = |version: &&Option<[u64; 3]>| version.is_none_or(|it| it[..2] != [0, 2]);
    Figures::of("T-40")
        .must("versions of slab", slab.len(), Bound::AtLeast, 1)
        .must(
            "below 0.4.11",
            slab.iter().filter(is_old).count(),
            Bound::Exactly,
            0,
        )
        .must("versions of libc", libc.len(), Bound::AtLeast, 1)
        .must(
            "other than 0.2",
            libc.iter().filter(is_other).count(),
            Bound::Exactly,
            0,
        );
}
