//! What was measured, as a table, a file and a picture.

use std::fmt::Write;
use std::fs;
use std::process::Command;

use crate::peers::Peer;

/// What a number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Operations per second.
    Rate,
    /// Nanoseconds of the server's CPU time per operation.
    Cpu,
    /// Microseconds.
    P99,
    P999,
    /// User-space instructions per message.
    Instructions,
    /// Bytes per idle connection, before and after its first message.
    Fresh,
    Used,
    /// Milliseconds.
    MeanLate,
    P99Late,
}

impl Measure {
    fn name(self) -> &'static str {
        match self {
            Self::Rate => "throughput",
            Self::Cpu => "CPU efficiency",
            Self::P99 => "p99",
            Self::P999 => "p99.9",
            Self::Instructions => "instructions",
            Self::Fresh => "bytes, fresh",
            Self::Used => "bytes, after an echo",
            Self::MeanLate => "mean, ms",
            Self::P99Late => "p99, ms",
        }
    }

    /// Whether peers are given as they are, and not as a ratio to the limit
    /// for which more is better.
    fn is_absolute(self) -> bool {
        matches!(
            self,
            Self::Fresh | Self::Used | Self::MeanLate | Self::P99Late
        )
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Rate if value > 1e9 => format!("{:.2} G/s", value / 1e9),
            Self::Rate if value > 1e6 => format!("{:.2} M/s", value / 1e6),
            Self::Rate => format!("{:.1} k/s", value / 1e3),
            Self::Cpu if value < 1.0 => format!("{value:.3} ns"),
            Self::Cpu if value < 100.0 => format!("{value:.1} ns"),
            Self::Cpu => format!("{value:.0} ns"),
            Self::P99 | Self::P999 => format!("{value:.0} us"),
            Self::Instructions | Self::Fresh | Self::Used => format!("{value:.0}"),
            Self::MeanLate | Self::P99Late => format!("{value:.3}"),
        }
    }
}

/// One line: a work, a measure, and the values of each peer, round by round.
#[derive(Debug)]
pub(crate) struct Row {
    work: &'static str,
    measure: Measure,
    values: Vec<(Peer, Vec<f64>)>,
}

impl Row {
    fn of(&self, peer: Peer) -> &[f64] {
        let found = self.values.iter().find(|(other, _)| *other == peer);
        found.map_or(&[], |(_, values)| values)
    }

    /// The ratio to the limit in each round, or the values themselves.
    fn ratios(&self, peer: Peer) -> Vec<f64> {
        let values = self.of(peer);
        if self.measure.is_absolute() {
            return values.to_vec();
        }
        let pairs = values.iter().zip(self.of(Peer::Limit));
        pairs
            .map(|(value, limit)| match self.measure {
                // More than the limit's: as in the figures to reach.
                Measure::Rate | Measure::Instructions => value / limit,
                _ => limit / value,
            })
            .collect()
    }

    fn cell(&self, peer: Peer) -> String {
        if peer == Peer::Limit {
            let middle = median(self.of(peer));
            return middle.map_or_else(|| "-".into(), |value| self.measure.show(value));
        }
        let ratios = self.ratios(peer);
        let Some(middle) = median(&ratios) else {
            return "-".into();
        };
        if self.measure.is_absolute() {
            return self.measure.show(middle);
        }
        match spread(&ratios) {
            Some((low, high)) => format!("{middle:.2} ({low:.2}-{high:.2})"),
            None => format!("{middle:.2}"),
        }
    }
}

/// All lines.
#[derive(Debug)]
pub(crate) struct Table {
    peers: Vec<Peer>,
    rows: Vec<Row>,
}

impl Table {
    pub(crate) fn new(peers: &[Peer]) -> Self {
        Self {
            peers: peers.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, work: &'static str, measure: Measure, peer: Peer, value: f64) {
        let row = self
            .rows
            .iter_mut()
            .position(|row| row.work == work && row.measure == measure);
        let at = row.unwrap_or_else(|| {
            self.rows.push(Row {
                work,
                measure,
                values: Vec::new(),
            });
            self.rows.len() - 1
        });
        let values = &mut self.rows[at].values;
        match values.iter_mut().find(|(other, _)| *other == peer) {
            Some((_, values)) => values.push(value),
            None => values.push((peer, vec![value])),
        }
    }

    /// The lines of one work, as they stand now.
    pub(crate) fn lines_of(&self, work: &str) -> Vec<String> {
        let rows = self.rows.iter().filter(|row| row.work == work);
        rows.map(|row| self.line(row)).collect()
    }

    pub(crate) fn head(&self) -> String {
        let mut line = String::from("| work | measure |");
        for peer in &self.peers {
            let _ = write!(line, " {} |", peer.name());
        }
        let _ = write!(line, "\n|---|---|{}", "---|".repeat(self.peers.len()));
        line
    }

    fn line(&self, row: &Row) -> String {
        let mut line = format!("| {} | {} |", row.work, row.measure.name());
        for peer in &self.peers {
            let _ = write!(line, " {} |", row.cell(*peer));
        }
        line
    }

    /// The file for the documentation.
    pub(crate) fn markdown(&self, command: &str) -> String {
        let mut text = format!(
            "# bowline beside a hand-written loop and its peers\n\n{}\n",
            machine()
        );
        let _ = write!(
            text,
            "\nMade by `{command}`. The limit, an edge-triggered epoll loop by hand, is given as it \
             is; the others as ratios\nto it in the same round: the median, and the middle half of \
             the rounds. More is better, except for instructions, bytes and\nlateness. Server and \
             generator have a CPU each (serial work shares one), so throughput is that of the slower; \
             CPU efficiency is\nthe limit's CPU time per operation over the server's own. A dash: it cannot, or was not asked \
             to{}.\n\n{}\n",
            self.absent(),
            self.head()
        );
        for row in &self.rows {
            text.push_str(&self.line(row));
            text.push('\n');
        }
        text
    }

    /// Who was missing.
    fn absent(&self) -> String {
        let absent: Vec<_> = Peer::ALL
            .iter()
            .filter(|peer| !self.peers.contains(peer))
            .map(|peer| peer.name())
            .collect();
        match absent.is_empty() {
            true => String::new(),
            false => format!(". Not among the peers: {}", absent.join(", ")),
        }
    }

    /// Draws CPU efficiency, bars by work and peer.
    pub(crate) fn draw(&self, path: &str) -> Result<(), Box<dyn std::error::Error>> {
        use plotters::prelude::*;
        const BAR: i32 = 11;
        const LEFT: i32 = 260;
        const WIDTH: i32 = 900;
        /// Ratios are cut here.
        const MOST: f64 = 1.4;
        let rows: Vec<_> = self
            .rows
            .iter()
            .filter(|row| row.measure == Measure::Cpu && row.of(Peer::Limit).len() > 1)
            .collect();
        let others: Vec<_> = self
            .peers
            .iter()
            .filter(|peer| **peer != Peer::Limit)
            .collect();
        let group = BAR * others.len() as i32 + 10;
        let height = group * rows.len() as i32 + 60;
        let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let colors = [
            RGBColor(120, 120, 120),
            RGBColor(20, 90, 160),
            RGBColor(220, 120, 30),
            RGBColor(80, 150, 80),
            RGBColor(150, 90, 170),
            RGBColor(190, 60, 60),
            RGBColor(170, 150, 60),
        ];
        let text = ("sans-serif", 12).into_font().color(&BLACK);
        let scale = f64::from(WIDTH - LEFT - 20) / MOST;
        let at = |ratio: f64| LEFT + (ratio.min(MOST) * scale) as i32;
        let title =
            "CPU efficiency: the limit's CPU time per operation over the server's (1 = the limit)";
        area.draw(&Text::new(title, (10, 8), text.clone()))?;
        for (index, peer) in others.iter().enumerate() {
            let x = LEFT + 90 * index as i32;
            let color = colors[index % colors.len()];
            area.draw(&Rectangle::new([(x, 30), (x + 10, 40)], color.filled()))?;
            area.draw(&Text::new(peer.name(), (x + 14, 29), text.clone()))?;
        }
        for (index, row) in rows.iter().enumerate() {
            let top = 52 + group * index as i32;
            area.draw(&Text::new(
                row.work,
                (10, top + group / 2 - 12),
                text.clone(),
            ))?;
            for (bar, peer) in others.iter().enumerate() {
                let Some(ratio) = median(&row.ratios(**peer)) else {
                    continue;
                };
                let y = top + BAR * bar as i32;
                let color = colors[bar % colors.len()];
                let shape = [(LEFT, y), (at(ratio), y + BAR - 1)];
                area.draw(&Rectangle::new(shape, color.filled()))?;
            }
        }
        let line = vec![(at(1.0), 46), (at(1.0), height)];
        area.draw(&PathElement::new(line, BLACK))?;
        area.present()?;
        Ok(())
    }
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted[(sorted.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

/// The middle half.
fn spread(values: &[f64]) -> Option<(f64, f64)> {
    if values.len() < 2 {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let quarter = sorted.len() / 4;
    Some((sorted[quarter], sorted[sorted.len() - 1 - quarter]))
}

/// What it was measured on, and when.
pub(crate) fn machine() -> String {
    let said = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        let output = output.map(|output| output.stdout).unwrap_or_default();
        String::from_utf8_lossy(&output).trim().to_owned()
    };
    let information = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models = information
        .lines()
        .filter_map(|line| line.strip_prefix("model name"));
    let models: Vec<_> = models
        .map(|rest| rest.trim_start_matches([' ', '\t', ':']))
        .collect();
    format!(
        "{}, {} CPUs ({}), Linux {}, {}.",
        said("date", "+%Y-%m-%d"),
        models.len(),
        models.first().unwrap_or(&"unknown"),
        said("uname", "-r"),
        said("rustc", "--version"),
    )
}
