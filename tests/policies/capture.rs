//! The log lines of the running thread.

use std::cell::RefCell;
use std::sync::Once;

type Watcher = Box<dyn Fn(&str)>;

thread_local! {
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
}

struct Capture;

impl log::Log for Capture {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("bowline::")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("{}: {}", record.level(), record.args());
            WATCHER.with_borrow(|watcher| watcher.iter().for_each(|watch| watch(&line)));
            LINES.with_borrow_mut(|lines| lines.push(line));
        }
    }

    fn flush(&self) {}
}

/// Begins to keep what is logged.
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Capture).expect("there is no other");
        log::set_max_level(log::LevelFilter::Debug);
    });
    LINES.take();
}

/// Has somebody see each line at the moment when it is written.
#[allow(dead_code, reason = "this file is used by several test binaries")]
pub(crate) fn watch(watcher: impl Fn(&str) + 'static) {
    WATCHER.set(Some(Box::new(watcher)));
}

/// What was logged with this in it.
pub(crate) fn lines(about: &str) -> Vec<String> {
    LINES.with_borrow(|lines| {
        let matching = lines.iter().filter(|line| line.contains(about));
        matching.cloned().collect()
    })
}
