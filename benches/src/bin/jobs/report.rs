//! What was measured, as a table, a file and a picture.

use std::fmt::Write;
use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::servers::{self, Peer};

/// What a number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    RestartFailed,
    EndedUnderRequest,
    ClosedUntold,
    StreamsCut,
    IdleLost,
    RestartLate,
    /// Milliseconds.
    GoneAfter,
    /// Milliseconds.
    Gap,
    KilledReset,
    KilledBeyond,
    KilledLate,
    StoppedFailed,
    HungFailed,
    /// A second.
    NewConnections,
    /// Microseconds.
    NewConnectionCpu,
    /// A second.
    Requests,
    /// Microseconds.
    RequestCpu,
}

impl Measure {
    const ALL: [Self; 17] = [
        Self::RestartFailed,
        Self::EndedUnderRequest,
        Self::ClosedUntold,
        Self::StreamsCut,
        Self::IdleLost,
        Self::RestartLate,
        Self::GoneAfter,
        Self::Gap,
        Self::KilledReset,
        Self::KilledBeyond,
        Self::KilledLate,
        Self::StoppedFailed,
        Self::HungFailed,
        Self::NewConnections,
        Self::NewConnectionCpu,
        Self::Requests,
        Self::RequestCpu,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RestartFailed => "restarts: requests failed",
            Self::EndedUnderRequest => "restarts: reused connections ended under a request",
            Self::ClosedUntold => "restarts: kept connections closed untold",
            Self::StreamsCut => "restarts: streams cut",
            Self::IdleLost => "restarts: idle connections lost, of 10",
            Self::RestartLate => "restarts: no answer within 5 s *",
            Self::GoneAfter => "restarts: old process gone after, ms *",
            Self::Gap => "a worker killed each second: longest gap, ms *",
            Self::KilledReset => "killed: new connections reset",
            Self::KilledBeyond => "killed: failed beyond these and the worker's own",
            Self::KilledLate => "killed: no answer within 5 s *",
            Self::StoppedFailed => "a worker stopped: new connections failed",
            Self::HungFailed => "a worker hung for 3 s, then killed: of 800 failed",
            Self::NewConnections => "new connections a second *",
            Self::NewConnectionCpu => "CPU each, us *",
            Self::Requests => "kept connections: requests a second *",
            Self::RequestCpu => "CPU each, us * ",
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::NewConnectionCpu | Self::RequestCpu => format!("{value:.1}"),
            Self::NewConnections | Self::Requests => format!("{:.1} k", value / 1e3),
            _ => thousands(value),
        }
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// All numbers.
pub(crate) struct Table {
    peers: Vec<Peer>,
    values: Vec<(Measure, Peer, f64)>,
    stopped: Duration,
    /// How often all were restarted, and how many workers killed.
    restarts: usize,
    kills: usize,
    load: String,
}

impl Table {
    pub(crate) fn new(stopped: Duration, restarts: usize, kills: usize) -> Self {
        Self {
            peers: Vec::new(),
            values: Vec::new(),
            stopped,
            restarts,
            kills,
            load: load_average(),
        }
    }

    pub(crate) fn add_peer(&mut self, peer: Peer) {
        self.peers.push(peer);
    }

    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    pub(crate) fn add(&mut self, measure: Measure, peer: Peer, value: f64) {
        self.values.push((measure, peer, value));
    }

    fn value(&self, measure: Measure, peer: Peer) -> Option<f64> {
        let mut found = self.values.iter();
        let found = found.find(|(of, by, _)| *of == measure && *by == peer)?;
        Some(found.2)
    }

    fn sum(&self, measures: &[Measure], peer: Peer) -> Option<f64> {
        let values = measures.iter().map(|it| self.value(*it, peer));
        values.sum()
    }

    fn title(&self, measure: Measure) -> String {
        match measure {
            Measure::StoppedFailed => {
                let seconds = self.stopped.as_secs();
                let most = thousands((seconds * 200) as f64);
                format!("a worker stopped for {seconds} s: of {most} new connections failed")
            }
            other => other.name().trim_end().to_owned(),
        }
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from("| |");
        for peer in &self.peers {
            let _ = write!(text, " {} |", peer.name());
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(self.peers.len()));
        for measure in Measure::ALL {
            let of = |peer: &Peer| self.value(measure, *peer);
            if !self.peers.iter().any(|peer| of(peer).is_some()) {
                continue;
            }
            let _ = write!(text, "\n| {} |", self.title(measure));
            for peer in &self.peers {
                let value = of(peer).map_or_else(|| "-".to_owned(), |value| measure.show(value));
                let _ = write!(text, " {value} |");
            }
        }
        text.push('\n');
        text
    }

    /// The whole file.
    pub(crate) fn document(&self, arguments: &str) -> String {
        let versions: Vec<String> = self
            .peers
            .iter()
            .filter_map(|peer| servers::version(*peer))
            .collect();
        format!(
            "# What a restart and a dead worker cost

{} {}.

Made by `cargo run --release -p bowline-bench --features jobs --bin jobs -- {arguments}`, which fills this file
again. {} restarts and {} kills of each. Two workers each, HTTP/1.1 in the clear, one generator
for all; what each row is, and how each server is set up, is in [README.md](README.md#jobs). **Rows with a star are times
and rates: on a machine whose load average is above its number of CPUs they say little.** A dash: it
has no workers that could die one by one.

{}",
            machine(&self.load),
            versions.join(", "),
            self.restarts,
            self.kills,
            self.markdown()
        )
    }

    /// Six small diagrams, of what matters most.
    pub(crate) fn picture(&self) -> String {
        use Measure::{
            ClosedUntold, EndedUnderRequest, Gap, GoneAfter, HungFailed, IdleLost, KilledBeyond,
            KilledReset, NewConnectionCpu, RestartFailed, StoppedFailed, StreamsCut,
        };
        let stopped = self.title(StoppedFailed).replacen('a', "A", 1);
        let panels: [(&str, &[Measure], &str); 6] = [
            (
                "Restarts: connections and requests that ended untold",
                &[
                    RestartFailed,
                    EndedUnderRequest,
                    ClosedUntold,
                    StreamsCut,
                    IdleLost,
                ],
                "",
            ),
            (&stopped, &[StoppedFailed], ""),
            (
                "A worker hung for 3 s, then killed: of 800 new connections failed",
                &[HungFailed],
                "",
            ),
            (
                "A worker killed each second: failed beyond its own",
                &[KilledReset, KilledBeyond],
                "",
            ),
            ("Restarts: old process gone after", &[GoneAfter], " ms"),
            match self.values.iter().any(|it| it.0 == NewConnectionCpu) {
                true => (
                    "CPU time for each new connection",
                    &[NewConnectionCpu],
                    " us",
                ),
                false => ("A worker killed each second: longest gap", &[Gap], " ms"),
            },
        ];
        let rows = self.peers.len() as u32;
        let (width, line, head) = (490, 17, 34);
        let height = head + rows * line + 18;
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            2 * width,
            3 * height + 26
        );
        for (index, (title, measures, unit)) in panels.iter().enumerate() {
            let (x, y) = (index as u32 % 2 * width, index as u32 / 2 * height);
            self.panel(&mut text, (x, y), title, measures, unit);
        }
        let _ = write!(
            text,
            "<text x=\"10\" y=\"{}\" fill=\"#666\">Shorter is better. Load average {} when it \
             began: counts stand, times say little above the number of CPUs.</text>\n</svg>\n",
            3 * height + 12,
            self.load
        );
        text
    }

    fn panel(
        &self,
        text: &mut String,
        (x, y): (u32, u32),
        title: &str,
        measures: &[Measure],
        unit: &str,
    ) {
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" font-weight=\"bold\">{title}</text>",
            x + 10,
            y + 22
        );
        let values = self.peers.iter().map(|peer| self.sum(measures, *peer));
        let most = values.flatten().fold(1.0, f64::max);
        for (row, peer) in self.peers.iter().enumerate() {
            let y = y + 34 + row as u32 * 17;
            let color = match peer {
                Peer::Bowline | Peer::BowlineStays | Peer::BowlineAccepting => "#1f6feb",
                _ => "#8c959f",
            };
            let value = self.sum(measures, *peer);
            // A little of each, so that a small one is seen beside none.
            let length = value.map_or(0.0, |value| {
                if value == 0.0 {
                    0.0
                } else {
                    2.0 + 230.0 * value / most
                }
            });
            let label = value.map_or_else(
                || "-".to_owned(),
                |value| {
                    let number = match measures {
                        [one] => one.show(value),
                        _ => thousands(value),
                    };
                    format!("{number}{unit}")
                },
            );
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
                 <rect x=\"{}\" y=\"{}\" width=\"{length:.0}\" height=\"12\" fill=\"{color}\"/>\
                 <text x=\"{:.0}\" y=\"{}\">{label}</text>",
                x + 165,
                y + 11,
                peer.name(),
                x + 172,
                y + 1,
                f64::from(x) + 177.0 + length,
                y + 11
            );
        }
    }
}

/// The day, and the machine: its load average was this when it began.
pub(crate) fn machine(load: &str) -> String {
    let output = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        let text = output.map(|it| String::from_utf8_lossy(&it.stdout).trim().to_owned());
        text.unwrap_or_else(|_| "?".into())
    };
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{}, {processors} CPUs, Linux {}, load average {load} when it began.",
        output("date", "+%Y-%m-%d"),
        output("uname", "-r"),
    )
}

/// Of the last minute.
pub(crate) fn load_average() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("?").to_owned()
}
