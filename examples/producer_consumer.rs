//! A producer that is much faster than its consumer, over a real socket: first
//! one that pushes until it is paused, then one that is asked for each portion.
//!
//! ```text
//! cargo run --release --example producer_consumer -- --plot buffered.svg
//! ```
//!
//! In a terminal it shows, while it runs, how much is buffered against the
//! watermarks, and where the producer was paused (P) and resumed (R); the plot
//! shows the same for the whole run. At the end it says how much was buffered
//! at the most: not more than the high watermark and one write, however long
//! the transfer.
//!
//! The socket is a UNIX one because its kernel buffer is small (some 200 KiB).
//! Over TCP the first few MiB would disappear in the kernel.

#![allow(clippy::print_stdout)]

mod common;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;
use std::time::{Duration, Instant};

use bowline::{Address, AfterReadClosed, CloseReason, Context, ProducerKind, ProducerRef};
use bowline::{Protocol, Reactor, Transport, TransportHandle, Transports, Watermarks};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use plotters::prelude::*;

use crate::common::Arguments;

const HELP: &str = "
A fast producer and a slow consumer, and what is buffered between them.

Usage: producer_consumer [--bytes SIZE] [--rate SIZE/s] [--plot FILE]

  --bytes SIZE   how much each producer produces [default: 256MiB]
  --rate SIZE/s  how fast it is consumed [default: 20MiB/s]
  --plot FILE    write a plot of the run there (SVG)

A SIZE is a number with KiB, MiB or GiB behind it, or of bytes.
";

/// Above the one a push producer is paused, at the other it is resumed.
const HIGH: usize = 1024 * 1024;
const LOW: usize = 256 * 1024;

/// What a producer writes at a time.
static PORTION: [u8; 64 * 1024] = [b'x'; 64 * 1024];

/// How often the buffer is looked at, beside each pause and resumption.
const SAMPLE_EVERY: Duration = Duration::from_millis(10);

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let bytes = arguments.option("--bytes")?.unwrap_or(Size(256 << 20));
    let rate = arguments.option("--rate")?.unwrap_or(Size(20 << 20));
    let plot = arguments.option::<PathBuf>("--plot")?;
    arguments.finish()?;

    let mut reactor = Reactor::new()?;
    let directory = tempfile::tempdir()?;
    let demo = Rc::new(RefCell::new(Demo {
        bytes: bytes.0,
        rate: rate.0.max(1),
        path: directory.path().join("socket"),
        runs: Vec::new(),
        view: View::new(bytes.0),
    }));
    let consuming = Rc::clone(&demo);
    let listener = reactor.listen_unix(&*demo.borrow().path, move |_: &Address| Consumer {
        demo: Rc::clone(&consuming),
        started: None,
    })?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    start_next_run(&mut reactor, &demo);
    sample(&mut reactor, &demo);
    reactor.run()?;

    let demo = demo.borrow();
    demo.view.clear();
    println!("        consumed       in  pauses  resumes     asked  most buffered");
    for run in &demo.runs {
        println!("{run}");
    }
    if let Some(path) = plot {
        draw(&path, &demo.runs)?;
        println!("plot in {}", path.display());
    }
    demo.runs.iter().try_for_each(|run| run.check(demo.bytes))
}

/// All there is to know, shared by the callbacks.
struct Demo {
    bytes: u64,
    /// Bytes per second.
    rate: u64,
    path: PathBuf,
    /// The last one is running.
    runs: Vec<Run>,
    view: View,
}

type SharedDemo = Rc<RefCell<Demo>>;

/// What happened with one producer.
struct Run {
    kind: ProducerKind,
    started: Instant,
    /// The connection whose buffer is looked at.
    transport: Option<TransportHandle>,
    /// Seconds since the start, and bytes buffered then.
    samples: Vec<(f64, usize)>,
    pauses: Vec<(f64, usize)>,
    resumes: Vec<(f64, usize)>,
    /// How often a pull producer was asked.
    asked: u64,
    consumed: u64,
    /// How long it took, once it is over.
    took: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    None,
    Paused,
    Resumed,
}

impl Demo {
    fn run(&mut self) -> &mut Run {
        self.runs
            .last_mut()
            .expect("one is begun before anything else")
    }

    /// Notes how much is buffered now.
    fn note(&mut self, now: Instant, buffered: usize, mark: Mark) {
        let run = self.run();
        let sample = ((now - run.started).as_secs_f64(), buffered);
        run.samples.push(sample);
        match mark {
            Mark::None => {}
            Mark::Paused => run.pauses.push(sample),
            Mark::Resumed => run.resumes.push(sample),
        }
        self.view.mark(mark);
    }
}

/// Begins with the next kind of producer, or ends.
fn start_next_run(reactor: &mut Reactor, demo: &SharedDemo) {
    let mut state = demo.borrow_mut();
    let kind = match state.runs.len() {
        0 => ProducerKind::Push,
        1 => ProducerKind::Pull,
        _ => {
            // An error says that it is stopping already.
            let _ = reactor.stop();
            return;
        }
    };
    state.runs.push(Run {
        kind,
        started: reactor.now(),
        transport: None,
        samples: Vec::new(),
        pauses: Vec::new(),
        resumes: Vec::new(),
        asked: 0,
        consumed: 0,
        took: None,
    });
    let producing = Rc::clone(demo);
    let left = state.bytes;
    let connected = reactor.connect_unix(&*state.path, move |_: &Address| Producer {
        demo: Rc::clone(&producing),
        kind,
        left,
    });
    if let Err(error) = connected {
        log::error!("cannot connect: {error}");
        let _ = reactor.stop();
    }
}

/// Produces as fast as it is let.
struct Producer {
    demo: SharedDemo,
    kind: ProducerKind,
    left: u64,
}

impl<T: Transport> Protocol<T> for Producer {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.demo.borrow_mut().run().transport = Some(cx.transport.handle());
        cx.transport
            .set_watermarks(Watermarks::default().low(LOW).high(HIGH));
        cx.transport
            .register_producer(ProducerRef::Protocol, self.kind)
            .expect("it is the first one, and the connection is there");
        if self.kind == ProducerKind::Push {
            self.produce(cx);
        }
    }

    fn pause_producing(&mut self, cx: &mut Context<'_, T>) {
        self.note(cx, Mark::Paused);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        match self.kind {
            ProducerKind::Push => {
                self.note(cx, Mark::Resumed);
                self.produce(cx);
            }
            ProducerKind::Pull => {
                self.demo.borrow_mut().run().asked += 1;
                self.write_portion(cx);
                self.note(cx, Mark::None);
            }
        }
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        log::info!("producer: {reason}, {} bytes not produced", self.left);
    }
}

impl Producer {
    /// Pushes until there is nothing left or the buffer is full: `write` says
    /// so at once, and `pause_producing` follows for those who do not look.
    fn produce<T: Transport>(&mut self, cx: &mut Context<'_, T>) {
        while self.left > 0 && self.write_portion(cx) {}
    }

    /// Writes one portion; whether there is room for more.
    fn write_portion<T: Transport>(&mut self, cx: &mut Context<'_, T>) -> bool {
        let length = self.left.min(PORTION.len() as u64);
        self.left -= length;
        let status = cx.transport.write(&PORTION[..length as usize]);
        if self.left == 0 {
            // What is buffered still goes out.
            cx.transport.unregister_producer();
            cx.transport.lose_connection();
        }
        status.is_ready()
    }

    fn note<T: Transport>(&self, cx: &Context<'_, T>, mark: Mark) {
        let buffered = cx.transport.unsent_bytes();
        let now = cx.reactor.now();
        self.demo.borrow_mut().note(now, buffered, mark);
    }
}

/// Consumes as slowly as it was told to, by pausing its own connection.
struct Consumer {
    demo: SharedDemo,
    started: Option<Instant>,
}

impl<T: Transport> Protocol<T> for Consumer {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.started = Some(cx.reactor.now());
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let now = cx.reactor.now();
        let elapsed = now - self.started.unwrap_or(now);
        let mut demo = self.demo.borrow_mut();
        let run = demo.run();
        run.consumed += data.len() as u64;
        let due = Duration::from_secs_f64(run.consumed as f64 / demo.rate as f64);
        if let Some(ahead) = due.checked_sub(elapsed) {
            cx.transport.pause_producing();
            let me = cx.transport.handle();
            cx.reactor.call_later(ahead, move |reactor| {
                if let Some(transport) = reactor.get(me) {
                    transport.resume_producing();
                }
            });
        }
    }

    fn read_connection_lost(&mut self, _: &mut Context<'_, T>) -> AfterReadClosed {
        AfterReadClosed::EndConnection
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        if !reason.is_clean() {
            // Interrupted. An error says that it is stopping already.
            let _ = cx.reactor.stop();
            return;
        }
        let now = cx.reactor.now();
        let mut demo = self.demo.borrow_mut();
        let run = demo.run();
        run.took = Some(now - run.started);
        drop(demo);
        start_next_run(cx.reactor, &self.demo);
    }
}

/// Looks at the buffer, shows it, and comes again.
fn sample(reactor: &mut Reactor, demo: &SharedDemo) {
    let mut state = demo.borrow_mut();
    if let Some(handle) = state.run().transport
        && let Some(transport) = reactor.get(handle)
    {
        let buffered = transport.unsent_bytes();
        state.note(reactor.now(), buffered, Mark::None);
        let Demo { runs, view, .. } = &mut *state;
        if let Some(run) = runs.last() {
            view.show(run, buffered);
        }
    }
    let demo = Rc::clone(demo);
    reactor.call_later(SAMPLE_EVERY, move |reactor| sample(reactor, &demo));
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = self.took.map_or_else(
            || "interrupted".into(),
            |took| format!("{:.2} s", took.as_secs_f64()),
        );
        write!(
            f,
            "{:<5} {:>10} {took:>8} {:>7} {:>8} {:>9} {:>14}",
            name(self.kind),
            Size(self.consumed).to_string(),
            self.pauses.len(),
            self.resumes.len(),
            self.asked,
            Size(self.most_buffered() as u64).to_string(),
        )
    }
}

impl Run {
    fn most_buffered(&self) -> usize {
        self.samples
            .iter()
            .map(|sample| sample.1)
            .max()
            .unwrap_or(0)
    }

    /// What the flow control promises. An interrupted run promises nothing.
    fn check(&self, bytes: u64) -> common::Result {
        if self.took.is_none() {
            return Ok(());
        }
        let kind = name(self.kind);
        if self.consumed != bytes {
            return Err(format!("{kind}: {} of {bytes} bytes arrived", self.consumed).into());
        }
        if self.most_buffered() > HIGH + PORTION.len() {
            return Err(format!("{kind}: {} bytes were buffered", self.most_buffered()).into());
        }
        // The end can come while it is paused.
        if self.pauses.len() - self.resumes.len().min(self.pauses.len()) > 1 {
            return Err(format!("{kind}: a pause without its resumption").into());
        }
        Ok(())
    }
}

fn name(kind: ProducerKind) -> &'static str {
    match kind {
        ProducerKind::Push => "push",
        ProducerKind::Pull => "pull",
    }
}

/// The live view; nothing unless the standard error is a terminal.
struct View {
    progress: ProgressBar,
    levels: ProgressBar,
    marks: ProgressBar,
    /// The last samples, and what happened in each.
    recent: VecDeque<(usize, Mark)>,
    /// What happened since the last sample shown.
    pending: Mark,
}

impl View {
    const COLUMNS: usize = 60;

    fn new(bytes: u64) -> Self {
        let lines = MultiProgress::new();
        let plain = || {
            ProgressBar::new_spinner()
                .with_style(ProgressStyle::with_template("{msg}").expect("a template"))
        };
        let bar = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}");
        Self {
            progress: lines.add(ProgressBar::new(bytes).with_style(bar.expect("a template"))),
            levels: lines.add(plain()),
            marks: lines.add(plain()),
            recent: VecDeque::new(),
            pending: Mark::None,
        }
    }

    fn mark(&mut self, mark: Mark) {
        if mark != Mark::None {
            self.pending = mark;
        }
    }

    fn show(&mut self, run: &Run, buffered: usize) {
        const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let mark = std::mem::replace(&mut self.pending, Mark::None);
        self.recent.push_back((buffered, mark));
        if self.recent.len() > Self::COLUMNS {
            self.recent.pop_front();
        }
        let levels = self.recent.iter().map(|(bytes, _)| {
            let level = bytes * LEVELS.len() / (HIGH + PORTION.len());
            LEVELS[level.min(LEVELS.len() - 1)]
        });
        let marks = self.recent.iter().map(|(_, mark)| match mark {
            Mark::None => ' ',
            Mark::Paused => 'P',
            Mark::Resumed => 'R',
        });
        self.progress.set_message(name(run.kind));
        self.progress.set_position(run.consumed);
        self.levels.set_message(format!(
            "{:<width$} {} buffered (low {}, high {})",
            levels.collect::<String>(),
            Size(buffered as u64),
            Size(LOW as u64),
            Size(HIGH as u64),
            width = Self::COLUMNS,
        ));
        self.marks.set_message(format!(
            "{:<width$} {} pauses, {} resumes",
            marks.collect::<String>(),
            run.pauses.len(),
            run.resumes.len(),
            width = Self::COLUMNS,
        ));
    }

    fn clear(&self) {
        for line in [&self.progress, &self.levels, &self.marks] {
            line.finish_and_clear();
        }
    }
}

/// Plots what was buffered over time, one chart for each run.
fn draw(path: &Path, runs: &[Run]) -> common::Result {
    let kib = |bytes: usize| bytes as f64 / 1024.0;
    let area = SVGBackend::new(path, (1000, 360 * runs.len().max(1) as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    for (run, area) in runs.iter().zip(area.split_evenly((runs.len(), 1))) {
        let end = run.samples.last().map_or(1.0, |sample| sample.0).max(0.001);
        let top = kib(HIGH + 2 * PORTION.len());
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{} producer", name(run.kind)), ("sans-serif", 20))
            .margin(10)
            .x_label_area_size(35)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..end, 0.0..top)?;
        chart
            .configure_mesh()
            .x_desc("seconds")
            .y_desc("KiB buffered")
            .light_line_style(WHITE)
            .draw()?;
        for (watermark, color) in [(HIGH, RED), (LOW, GREEN)] {
            let line = [(0.0, kib(watermark)), (end, kib(watermark))];
            chart.draw_series(LineSeries::new(line, color.mix(0.5)))?;
        }
        let scaled = |&(at, bytes): &(f64, usize)| (at, kib(bytes));
        chart.draw_series(LineSeries::new(run.samples.iter().map(scaled), BLUE))?;
        for (marks, color, label) in [
            (&run.pauses, RED, "pauses"),
            (&run.resumes, GREEN, "resumes"),
        ] {
            chart
                .draw_series(
                    marks
                        .iter()
                        .map(|mark| Circle::new(scaled(mark), 3, color.filled())),
                )?
                .label(format!("{} {label}", marks.len()))
                .legend(move |(x, y)| Circle::new((x + 10, y), 3, color.filled()));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
    }
    area.present()?;
    Ok(())
}

/// A number of bytes, as people write it.
#[derive(Clone, Copy)]
struct Size(u64);

impl FromStr for Size {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim_end_matches("/s");
        let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
        let found = units
            .iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
        let (number, shift) = found.unwrap_or((text, 0));
        Ok(Self(number.trim().parse::<u64>()? << shift))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        if self.0 < 1 << 20 {
            write!(f, "{:.0} KiB", bytes / f64::from(1 << 10))
        } else {
            write!(f, "{:.2} MiB", bytes / f64::from(1 << 20))
        }
    }
}
