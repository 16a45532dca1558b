//! The tables in the README of `bowline-peers`. That of the suite, of framings and of what is
//! asked of them, is made from the samples, and nothing in it was not asked. That of lines is
//! counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::suite::{Outcome, Question, Sample, Trial};

/// A framing by its module.
type Framing = (&'static str, Box<dyn Sample>);

macro_rules! framings {
    ($($name:literal: $($first:ident $(:: $rest:ident)+),+;)+) => {
        vec![$(
            ($name, vec![$(
                (
                    concat!(stringify!($first) $(, "::", stringify!($rest))+),
                    $crate::$first $(::$rest)+::sample(),
                ),
            )+]),
        )+]
    };
}

/// All framings, those of a row with the same answers.
fn rows() -> Vec<(&'static str, Vec<Framing>)> {
    framings! {
        "D-Bus": dbus::service, dbus::client;
        "Wayland": wayland::requests;
        "vhost-user": vhost_user::requests;
        "vhost-user, of a back-end": vhost_user::channel::requests;
        "imsg, the older dialect": imsg::legacy, imsg::legacy_to_be_learned,
            imsg::current_to_be_learned, imsg::legacy_met_with_the_other_dialect;
        "imsg, the newer": imsg::current;
        "HAProxy's listeners": haproxy::records;
        "HAProxy's connections": haproxy::connections;
        "Node": node::lines;
        "varlink": varlink::service, varlink::client;
        "the console socket": oci::console;
        "notify": notify::notices;
    }
}

/// Framings of no protocol, one for each rule.
fn rules() -> Vec<Framing> {
    let mut rows = framings! {
        "rules": rules::claimed, rules::claimed_or_waiting, rules::exact, rules::by_last_byte;
    };
    rows.remove(0).1
}

/// What this program asks, by module: the tests that it has.
fn asked() -> BTreeMap<String, BTreeSet<String>> {
    let own = std::env::current_exe().expect("Linux knows");
    let list = Command::new(own).arg("--list").output().expect("it starts");
    let list = String::from_utf8(list.stdout).expect("text");
    let tests = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let mut asked: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (module, test) in tests.filter_map(|test| test.rsplit_once("::")) {
        if Question::ALL.iter().any(|question| question.test() == test) {
            let tests = asked.entry(module.to_owned()).or_default();
            tests.insert(test.to_owned());
        }
    }
    asked
}

/// Why it is not asked this, if it is not.
fn reason(sample: &dyn Sample, question: Question) -> Option<&'static str> {
    let mut unasked = sample.unasked().into_iter();
    unasked.find_map(|(it, reason)| (it == question).then_some(reason))
}

#[test]
fn each_framing_is_asked_everything_or_says_why_not() {
    let asked = asked();
    let protocols = rows().into_iter().flat_map(|(_, framings)| framings);
    let framings: Vec<_> = protocols.chain(rules()).collect();
    let names: BTreeSet<_> = framings.iter().map(|it| it.0.to_owned()).collect();
    let modules: BTreeSet<_> = asked.keys().cloned().collect();
    assert_eq!(names, modules, "the table has others than the suite");
    for (name, sample) in &framings {
        for question in Question::ALL {
            let is_asked = asked[*name].contains(question.test());
            let reason = reason(&**sample, question);
            assert_ne!(
                is_asked,
                reason.is_some(),
                "{name}: {question:?}, {reason:?}"
            );
        }
    }
}

/// In the words of the README.
fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Paired => "own",
        Outcome::Differs(..0) => "fewer",
        Outcome::Differs(_) => "more",
        Outcome::Dealt(dealt) if dealt.iter().all(|count| *count == 0) => "closed",
        Outcome::Dealt(dealt) if dealt[0] > 0 => "the first has all",
        Outcome::Dealt(_) => "the last has all",
        Outcome::Shifted => "waits",
        Outcome::Dropped => "dropped",
        Outcome::Refused => "refused",
        Outcome::RefusedBehind => "own, then refused",
    }
}

fn cell(sample: &dyn Sample, question: Question) -> String {
    if let Some(reason) = reason(sample, question) {
        return format!("*{reason}*");
    }
    let trial = match question {
        Question::Cut => Trial::Cut,
        Question::Early => Trial::Lumped,
        Question::Late => Trial::Late,
        Question::TwoSets => match sample.messages().iter().any(|it| it.descriptors > 1) {
            true => Trial::TwoSets,
            false => Trial::SecondSet,
        },
        Question::TooFew => Trial::TooFew,
        Question::TooMany => Trial::TooMany,
        Question::Stray => Trial::Stray,
        Question::Limit => {
            let limits: Vec<_> = sample.limits().iter().map(|limit| limit.of).collect();
            let beyond = sample.outcome(Trial::Beyond);
            return format!("{}: {}", limits.join(", "), word(&beyond));
        }
        Question::Lines => return "refused".into(),
        Question::LastWords => return "heard".into(),
    };
    word(&sample.outcome(trial)).into()
}

fn head(question: Question) -> &'static str {
    match question {
        Question::Cut => "cut anywhere",
        Question::Early => "all early",
        Question::Late => "late",
        Question::TwoSets => "in two sets",
        Question::TooFew => "one too few",
        Question::TooMany => "one too many",
        Question::Stray => "with a plain one",
        Question::Limit => "beyond a limit",
        Question::Lines => "in the lines",
        Question::LastWords => "last words",
    }
}

fn line(cells: impl IntoIterator<Item = String>) -> String {
    let cells = cells.into_iter().map(|cell| format!(" {cell} |"));
    format!("|{}\n", cells.collect::<String>())
}

#[test]
fn table_of_the_readme_is_that_of_the_suite() {
    let mut table = line(
        ["protocol".into()]
            .into_iter()
            .chain(Question::ALL.map(|it| head(it).into())),
    );
    table += &format!("|{}\n", "---|".repeat(Question::ALL.len() + 1));
    for (name, framings) in rows() {
        let answers = |(_, sample): &Framing| Question::ALL.map(|it| cell(&**sample, it));
        let first = answers(&framings[0]);
        for framing in &framings {
            assert_eq!(
                answers(framing),
                first,
                "{} has a row of its own",
                framing.0
            );
        }
        table += &line([name.to_owned()].into_iter().chain(first));
    }
    assert!(README.contains(&table), "the table should be:\n{table}");
}

const README: &str = include_str!("../../peers/README.md");

/// Lines without comments, blank lines and tests, of a file or of all in a folder.
fn lines(place: &Path) -> usize {
    if place.is_dir() {
        let entries = fs::read_dir(place).expect("it is there");
        return entries
            .map(|entry| lines(&entry.expect("read").path()))
            .sum();
    }
    if place.ends_with("tests.rs") {
        return 0;
    }
    let text = fs::read_to_string(place).expect("text");
    let (code, _) = text.split_once("\n#[cfg(test)]\n").unwrap_or((&text, ""));
    let is_code = |line: &&str| !line.is_empty() && !line.starts_with("//");
    code.lines().map(str::trim).filter(is_code).count()
}

/// As it is written: 1,249.
fn written(number: usize) -> String {
    match number {
        1_000.. => format!("{},{:03}", number / 1_000, number % 1_000),
        _ => number.to_string(),
    }
}

#[test]
fn lines_of_the_readme_are_those_of_the_tree() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let framing = |place: &str| lines(&root.join("peers/src").join(place));
    for (name, place, example) in [
        ("D-Bus", "dbus", "dbus_memfd"),
        ("Wayland", "wayland", "wayland_shm"),
        ("vhost-user", "vhost_user", "vhost_user_blk"),
        ("imsg", "imsg.rs", "tmux_command"),
        (
            "HAProxy's listeners and connections",
            "haproxy",
            "haproxy_takeover",
        ),
        ("Node's IPC and cluster workers", "node", "node_worker"),
        ("the console socket", "oci.rs", "oci_console"),
        ("varlink", "varlink", "varlink_files"),
        ("notify", "", "supervise"),
    ] {
        let framing = match place {
            "" => "in `bowline` itself".to_owned(),
            _ => written(framing(place)),
        };
        let program = lines(&root.join(format!("examples/{example}.rs")));
        let row = format!("\n| {name} | {framing} | `{example}` {program} |");
        assert!(README.contains(&row), "the row should begin so: {row}");
    }
}
