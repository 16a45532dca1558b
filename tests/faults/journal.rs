//! What the library has said of a fault: log lines, reasons, errors.

use std::cell::RefCell;
use std::sync::Once;

use log::{Level, LevelFilter, Log, Metadata, Record};

thread_local! {
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Journal;

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("bowline::")
    }

    fn log(&self, record: &Record<'_>) {
        // Of trouble only: below, everything is said.
        if self.enabled(record.metadata()) && record.level() <= Level::Warn {
            note(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Begins anew.
pub(crate) fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Journal).expect("there is no other");
        log::set_max_level(LevelFilter::Debug);
    });
    LINES.take();
}

/// Takes down that something was said: an error, the reason of an end.
pub(crate) fn note(line: String) {
    // A spin that logs is found by its turns; it need not fill the memory too.
    LINES.with_borrow_mut(|lines| {
        if lines.len() < 1000 {
            lines.push(line);
        }
    });
}

pub(crate) fn lines() -> Vec<String> {
    LINES.with_borrow(Clone::clone)
}
