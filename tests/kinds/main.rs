//! The tables of what each kind can do (`src/guide/kinds.md`), held against what happens:
//! each cell is tried on a real descriptor, with a plain one at the other end.

mod messages;
mod streams;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bowline::Reactor;

/// Whether a type has a trait. The inherent constant exists only if it has.
macro_rules! has {
    ($type:ty: $name:path) => {{
        #[allow(dead_code, reason = "unused if the type has it")]
        trait Not {
            const HAS: bool = false;
        }
        impl<T: ?Sized> Not for T {}
        struct Asked<T: ?Sized>(std::marker::PhantomData<T>);
        #[allow(dead_code, reason = "unused if the type does not have it")]
        impl<T: ?Sized + $name> Asked<T> {
            const HAS: bool = true;
        }
        <Asked<$type>>::HAS
    }};
}
pub(crate) use has;

/// What one cell says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    /// It does what its documentation says.
    Yes,
    /// There is no such method on this type, or nothing can cause this callback.
    Missing,
    /// The call answers with an error.
    Refused,
    /// The call compiles, and nothing follows from it.
    Nothing,
    /// A half-close that the other side does not see.
    Ours,
}

impl Cell {
    fn parse(text: &str) -> Self {
        match text {
            "yes" => Self::Yes,
            "-" => Self::Missing,
            "refused" => Self::Refused,
            "nothing" => Self::Nothing,
            "ours only" => Self::Ours,
            other => panic!("the words of the table do not have {other:?}"),
        }
    }

    /// `Yes`, or else `Nothing`.
    pub(crate) fn yes_if(happened: bool) -> Self {
        if happened { Self::Yes } else { Self::Nothing }
    }

    /// For a callback: `Yes`, or else `Missing`.
    pub(crate) fn called_if(happened: bool) -> Self {
        if happened { Self::Yes } else { Self::Missing }
    }
}

impl Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "yes",
            Self::Missing => "-",
            Self::Refused => "refused",
            Self::Nothing => "nothing",
            Self::Ours => "ours only",
        })
    }
}

/// How long something is waited for that the table promises, and how long for what it
/// says will not come.
const PROMISED: Duration = Duration::from_secs(10);
const NOT_PROMISED: Duration = Duration::from_millis(15);

/// Turns the reactor until `is_done`; false if that is not so in `patience`.
pub(crate) fn until(
    reactor: &mut Reactor,
    expected: Cell,
    mut is_done: impl FnMut(&mut Reactor) -> bool,
) -> bool {
    let patience = match expected {
        Cell::Yes | Cell::Ours => PROMISED,
        Cell::Missing | Cell::Refused | Cell::Nothing => NOT_PROMISED,
    };
    let began = Instant::now();
    loop {
        if is_done(reactor) {
            return true;
        }
        if began.elapsed() > patience {
            return false;
        }
        reactor.turn(Some(Duration::from_millis(2)));
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The methods of a trait, as its source declares them.
pub(crate) fn methods_of(path: &str, name: &str) -> Vec<String> {
    let source = read(path);
    let start = source.find(&format!("\npub trait {name}"));
    let body = &source[start.unwrap_or_else(|| panic!("{path} has no {name}")) + 1..];
    let body = &body[..body.find("\n}").expect("it ends")];
    let names = body.lines().filter_map(|line| {
        let rest = line.strip_prefix("    fn ")?;
        Some(rest.split(['(', '<']).next()?.to_owned())
    });
    names.collect()
}

/// One table of the page: what each row says of each column.
pub(crate) struct Table {
    pub(crate) columns: Vec<String>,
    rows: BTreeMap<String, Vec<Cell>>,
}

impl Table {
    /// The table under a heading. A row's name is what its link says.
    pub(crate) fn under(heading: &str) -> Self {
        let page = read("src/guide/kinds.md");
        let mark = format!("\n# {heading}\n");
        let from = page.find(&mark).expect("the page has the heading") + mark.len();
        let section = page[from..].split("\n# ").next().unwrap_or_default();
        let mut lines = section.lines().filter(|line| line.starts_with('|'));
        let cells = |line: &str| -> Vec<String> {
            let inside = line.trim_matches('|');
            inside
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        };
        let columns = cells(lines.next().expect("it has a head"));
        let mut rows = BTreeMap::new();
        for line in lines.skip(1) {
            let cells = cells(line);
            let name = cells[0]
                .split('`')
                .nth(1)
                .expect("a name in code")
                .to_owned();
            let values: Vec<_> = cells[1..].iter().map(|cell| Cell::parse(cell)).collect();
            assert_eq!(values.len(), columns.len() - 1, "cells of {name}");
            assert!(rows.insert(name.clone(), values).is_none(), "{name} twice");
        }
        Self {
            columns: columns[1..].to_vec(),
            rows,
        }
    }

    /// Fails unless its rows are these, in any order.
    #[track_caller]
    pub(crate) fn assert_rows(&self, mut wanted: Vec<String>) {
        wanted.sort();
        wanted.dedup();
        let found: Vec<_> = self.rows.keys().cloned().collect();
        assert_eq!(found, wanted, "the rows are not the methods of the traits");
    }

    /// Tries every cell of a column; those that are wrong.
    pub(crate) fn check(
        &self,
        column: &str,
        mut seen: impl FnMut(&str, Cell) -> Cell,
    ) -> Vec<String> {
        let at = self.columns.iter().position(|it| it == column);
        let at = at.unwrap_or_else(|| panic!("the table has no column {column}"));
        let mut wrong = Vec::new();
        for (row, cells) in &self.rows {
            let said = cells[at];
            let seen = seen(row, said);
            if seen != said {
                wrong.push(format!(
                    "{row}, {column}: the table says {said}, it is {seen}"
                ));
            }
        }
        wrong
    }
}

/// Fails with all cells that are wrong.
#[track_caller]
pub(crate) fn assert_right(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
