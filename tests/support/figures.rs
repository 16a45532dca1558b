//! What a test of the reliability table has seen, in lines that
//! `tests/reliability/run` reads.
//!
//! A test belongs to the table when its documentation says `Reliability T-n`;
//! it prints one line for each figure:
//!
//! ```text
//! T-9: growth of memory = 2.5 MiB (< 10)
//! ```
//!
//! The table holds the figure against the bound. What must hold on any machine
//! is a failure of the test as well; what a loaded machine can miss is not.

#![allow(clippy::print_stdout, reason = "figures are printed to be read")]

use std::fmt;

/// What tests scale by: `cargo test` runs the short form, `BOWLINE_RELIABILITY=full`
/// the one that the targets speak of.
pub(crate) fn is_full() -> bool {
    std::env::var_os("BOWLINE_RELIABILITY").is_some_and(|tier| tier == "full")
}

/// How much to do, by the form of the run.
pub(crate) fn scaled<T>(short: T, full: T) -> T {
    if is_full() { full } else { short }
}

/// The figures of one row.
#[derive(Clone, Copy)]
pub(crate) struct Figures(&'static str);

/// How a figure is to stand to its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    Exactly,
    AtLeast,
    AtMost,
    Below,
}

impl Bound {
    fn holds(self, seen: f64, bound: f64) -> bool {
        match self {
            Self::Exactly => seen == bound,
            Self::AtLeast => seen >= bound,
            Self::AtMost => seen <= bound,
            Self::Below => seen < bound,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exactly => "=",
            Self::AtLeast => ">=",
            Self::AtMost => "<=",
            Self::Below => "<",
        })
    }
}

impl Figures {
    /// Those of the row `id`, `T-9`.
    pub(crate) fn of(id: &'static str) -> Self {
        Self(id)
    }

    /// A figure that must hold wherever the test runs.
    #[track_caller]
    pub(crate) fn must(self, what: &str, seen: usize, bound: Bound, than: usize) -> Self {
        self.print(what, seen as f64, "", bound, than as f64);
        assert!(
            bound.holds(seen as f64, than as f64),
            "{}: {what}: {seen}, not {bound} {than}",
            self.0
        );
        self
    }

    /// A figure that depends on the machine and on what else it does: time,
    /// memory. `unit` is `ms` and the like. Only the table says that it was missed.
    pub(crate) fn measured(
        self,
        what: &str,
        seen: f64,
        unit: &str,
        bound: Bound,
        than: f64,
    ) -> Self {
        self.print(what, seen, unit, bound, than);
        self
    }

    /// Why a figure is missed, or what the table has to say beside it.
    pub(crate) fn remark(self, text: &str) -> Self {
        println!("\n{}: remark: {text}", self.0);
        self
    }

    fn print(self, what: &str, seen: f64, unit: &str, bound: Bound, than: f64) {
        let space = if unit.is_empty() { "" } else { " " };
        // At the start of a line, which the harness of the tests does not keep.
        println!(
            "\n{}: {what} = {}{space}{unit} ({bound} {than})",
            self.0,
            (seen * 1000.0).round() / 1000.0
        );
    }
}
