//! A load on the broker, and the plot of what each subscriber got.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::{Address, Context, Producer, ProducerKind, ProducerRef, Protocol, Reactor};
use bowline::{Transport, TransportHandle, Transports};
use plotters::prelude::*;

use crate::common;
use crate::{Slow, broker};

/// What is published, beside the name of the topic.
const TEXT: &str = "a message of some length, as they are: sixty-four bytes of it, no more";
/// How many lines the publisher writes when it is asked for more.
const PORTION: u64 = 32;
/// How often the counts are looked at.
const EVERY: Duration = Duration::from_millis(50);
/// How long those that read may take for what is left at the end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A subscriber, as the load sees it.
#[derive(Clone, Default)]
struct Heard {
    messages: Rc<Cell<u64>>,
    lost: Rc<Cell<u64>>,
    handle: Rc<Cell<Option<TransportHandle>>>,
}

/// What a run has seen.
struct Run {
    slow: Slow,
    /// The last is the one that stops for a while.
    heard: Vec<Heard>,
    ready: Cell<usize>,
    published: Rc<Cell<u64>>,
    is_over: Rc<Cell<bool>>,
    /// Seconds since the beginning; published, heard by one that reads, by the one that
    /// stops.
    samples: RefCell<Vec<(f64, [u64; 3])>>,
}

/// Subscribes, and counts what comes.
struct Subscriber {
    heard: Heard,
    run: Rc<Run>,
    number: usize,
    start: Rc<dyn Fn(&mut Reactor)>,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Subscriber {
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, LineFramer>) {
        self.heard.handle.set(Some(cx.transport.handle()));
        // When it hears the last of these, the broker knows of the first.
        let me = self.number;
        let lines = format!("sub load\nsub ready-{me}\npub ready-{me} !\n");
        cx.transport.write(lines.as_bytes());
    }

    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let count = |cell: &Cell<u64>, more: u64| cell.set(cell.get() + more);
        if let Some(lost) = line.strip_prefix(b"lost ") {
            let lost = String::from_utf8_lossy(lost).parse();
            count(&self.heard.lost, lost.expect("a number"));
        } else if line.starts_with(b"msg load ") {
            count(&self.heard.messages, 1);
        } else if line.starts_with(b"msg ready-") {
            let run = &self.run;
            run.ready.set(run.ready.get() + 1);
            if run.ready.get() == run.heard.len() {
                let start = Rc::clone(&self.start);
                cx.reactor.defer(move |reactor| start(reactor));
            }
        }
    }
}

/// Publishes as fast as it may, until it is over.
struct Publisher {
    published: Rc<Cell<u64>>,
    is_over: Rc<Cell<bool>>,
}

impl<T: Transport> Protocol<T> for Publisher {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let lines = Lines {
            published: Rc::clone(&self.published),
            is_over: Rc::clone(&self.is_over),
            portion: format!("pub load {TEXT}\n").repeat(PORTION as usize),
        };
        cx.transport
            .register_producer(ProducerRef::boxed(lines), ProducerKind::Pull)
            .expect("it is the first one, and the connection is there");
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

struct Lines {
    published: Rc<Cell<u64>>,
    is_over: Rc<Cell<bool>>,
    portion: String,
}

impl Producer for Lines {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        if self.is_over.get() {
            cx.transport.unregister_producer();
            return;
        }
        cx.transport.write(self.portion.as_bytes());
        self.published.set(self.published.get() + PORTION);
    }
}

/// One run for each policy, and the plot of both.
pub(crate) fn run(long: Duration, subscribers: usize, plot: Option<&Path>) -> common::Result {
    let runs = [Slow::Drop, Slow::Wait].map(|slow| measure(slow, long, subscribers.max(2)));
    let [dropping, waiting] = runs;
    let runs = [dropping?, waiting?];
    println!("policy   published  heard by one  by the one that stopped  lost");
    for run in &runs {
        let (quick, stopped) = (&run.heard[0], &run.heard[run.heard.len() - 1]);
        println!(
            "{:<8} {:>9} {:>13} {:>24} {:>5}",
            format!("{:?}", run.slow).to_lowercase(),
            run.published.get(),
            quick.messages.get(),
            stopped.messages.get(),
            stopped.lost.get()
        );
    }
    if let Some(path) = plot {
        draw(path, &runs, long)?;
    }
    if let Some(run) = runs.iter().find(|run| !run.is_whole()) {
        return Err(format!("{:?}: messages were lost that nobody has counted", run.slow).into());
    }
    Ok(())
}

impl Run {
    /// Each subscriber has heard everything, or of what it has missed.
    fn is_whole(&self) -> bool {
        let all = |it: &Heard| it.messages.get() + it.lost.get() == self.published.get();
        let quick = &self.heard[..self.heard.len() - 1];
        self.heard.iter().all(all) && quick.iter().all(|it| it.lost.get() == 0)
    }

    fn sample(&self, at: f64) {
        let of = |at: usize| self.heard[at].messages.get();
        let counts = [self.published.get(), of(0), of(self.heard.len() - 1)];
        self.samples.borrow_mut().push((at, counts));
    }
}

fn measure(slow: Slow, long: Duration, subscribers: usize) -> common::Result<Run> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("broker");
    let mut reactor = Reactor::new()?;
    reactor.listen_unix(path.as_path(), broker(slow))?;
    let run = Rc::new(Run {
        slow,
        heard: (0..subscribers).map(|_| Heard::default()).collect(),
        ready: Cell::new(0),
        published: Rc::default(),
        is_over: Rc::default(),
        samples: RefCell::default(),
    });
    let (begun, at) = (Rc::clone(&run), path.clone());
    let start: Rc<dyn Fn(&mut Reactor)> = Rc::new(move |reactor| begin(reactor, &begun, &at, long));
    for number in 0..subscribers {
        let (run, start) = (Rc::clone(&run), Rc::clone(&start));
        reactor.connect_unix(path.as_path(), move |_: &Address| {
            let subscriber = Subscriber {
                heard: run.heard[number].clone(),
                run: Rc::clone(&run),
                number,
                start: Rc::clone(&start),
            };
            Framed::new(LineFramer::with_delimiter(b"\n"), subscriber)
        })?;
    }
    reactor.call_later(long + PATIENCE, |reactor| {
        reactor.fail(std::io::Error::other("the last messages do not come"));
    });
    reactor.run()?;
    drop((reactor, start));
    Rc::try_unwrap(run).map_err(|_| "somebody goes on".into())
}

/// Everybody has subscribed: the load, and the pause of the last one.
fn begin(reactor: &mut Reactor, run: &Rc<Run>, path: &Path, long: Duration) {
    let (published, is_over) = (Rc::clone(&run.published), Rc::clone(&run.is_over));
    let connected = reactor.connect_unix(path, move |_: &Address| Publisher {
        published: Rc::clone(&published),
        is_over: Rc::clone(&is_over),
    });
    if let Err(error) = connected {
        return reactor.fail(std::io::Error::other(error));
    }
    let stopping = run.heard[run.heard.len() - 1].handle.get();
    let stopping = stopping.expect("it has subscribed");
    reactor.call_later(long / 3, move |reactor| {
        if let Some(stopping) = reactor.get(stopping) {
            stopping.pause_producing();
        }
    });
    reactor.call_later(2 * long / 3, move |reactor| {
        if let Some(stopping) = reactor.get(stopping) {
            stopping.resume_producing();
        }
    });
    let is_over = Rc::clone(&run.is_over);
    reactor.call_later(long, move |_| is_over.set(true));
    let (run, began) = (Rc::clone(run), reactor.now());
    reactor.call_every(EVERY, move |reactor, _| {
        let now = reactor.now();
        run.sample(now.saturating_duration_since(began).as_secs_f64());
        if run.is_over.get() && run.is_whole() {
            // It runs: this is one of its callbacks.
            let _ = reactor.stop();
        }
    });
}

/// How many messages a second there were over time, a chart for each policy.
fn draw(path: &Path, runs: &[Run], long: Duration) -> common::Result {
    let area = SVGBackend::new(path, (900, 320 * runs.len() as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let long = long.as_secs_f64();
    for (run, area) in runs.iter().zip(area.split_evenly((runs.len(), 1))) {
        let samples = run.samples.borrow();
        let rates = |of: usize| {
            let pairs = samples.windows(3).filter(|it| it[2].0 > it[0].0);
            let rate = move |it: &[(f64, [u64; 3])]| {
                let count = it[2].1[of].saturating_sub(it[0].1[of]) as f64;
                (it[1].0, count / (it[2].0 - it[0].0) / 1e3)
            };
            pairs
                .map(rate)
                .filter(|(at, _)| *at <= long * 1.1)
                .collect::<Vec<_>>()
        };
        let lines = [
            ("published", BLACK),
            ("heard by one that reads", BLUE),
            ("heard by the one that stops", RED),
        ];
        let most = (0..lines.len())
            .flat_map(rates)
            .map(|it| it.1)
            .fold(1.0, f64::max);
        let title = match run.slow {
            Slow::Drop => "drop: the others go on",
            Slow::Wait => "wait: nothing is lost, and nobody goes on",
        };
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(35)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..long * 1.1, 0.0..most * 1.25)?;
        let mesh = &mut chart.configure_mesh();
        mesh.x_desc("seconds")
            .y_desc("thousand messages a second")
            .draw()?;
        let stopped = [(long / 3.0, 0.0), (2.0 * long / 3.0, most * 1.25)];
        chart.draw_series([Rectangle::new(stopped, RED.mix(0.08).filled())])?;
        for (of, (label, color)) in lines.into_iter().enumerate() {
            let series = chart.draw_series(LineSeries::new(rates(of), color.stroke_width(2)))?;
            let line = move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color);
            series.label(label).legend(line);
        }
        let labels = &mut chart.configure_series_labels();
        labels
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
    }
    area.present()?;
    Ok(())
}
