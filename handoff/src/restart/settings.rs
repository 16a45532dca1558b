//! How a program is restarted.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

#[cfg(doc)]
use super::Program;
use super::control::{CONTROL, InDirectory, MeetingPlace};
use super::handshake::Patience;
use crate::inherited::Inherited;
use crate::systemd::Notifier;

/// How a program is restarted.
#[derive(Debug)]
#[non_exhaustive]
pub struct RestartSettings {
    /// The directory of the control socket, for this program alone: made if it
    /// is not there.
    pub directory: PathBuf,
    /// What the states of moved connections look like, in numbers of the
    /// program's own: a predecessor of another format refuses. Default 0.
    pub format: u32,
    /// How long one answer of the other process may take, its greeting included;
    /// default 10 s.
    pub answer: Duration,
    /// How long it is looked for somebody who hands over, beside the looks themselves,
    /// where one cannot: it serves another successor, ends, is about to serve, or starts
    /// cold at the same moment. It is looked again after 1 ms, and after twice as long
    /// each time, up to 500 ms; with the default of 10 s that is 29 times. Zero is for
    /// one look only. Then the program is [not started](Program::not_started).
    pub search: Duration,
    /// How long a successor that was started may take until it asks to take
    /// over; default 30 s.
    pub start: Duration,
    /// How long a successor may take until it is ready; default 60 s.
    pub ready: Duration,
    /// How long the connections that stay with the predecessor have until they
    /// are cut; default 30 s.
    pub drain: Duration,
    /// How long the service manager may take until it has room for a notice that a
    /// restart waits for: a predecessor does not end before its manager knows who is the
    /// main process, and that it is ready. Default 30 s;
    /// [told](Program::manager_not_told) when it has passed.
    pub manager: Duration,
    /// Descriptors from elsewhere, systemd above all, that
    /// [`Program::listen`] may claim too.
    pub inherited: Inherited,
    /// The service manager, to be told of restarts: `RELOADING` when a
    /// successor is started, `READY` when one of the two serves, `MAINPID`
    /// when it is the new one.
    pub notifier: Option<Rc<Notifier>>,
    pub(crate) control: Rc<dyn MeetingPlace>,
}

bowline_reactor::setters!(RestartSettings {
    directory: PathBuf,
    format: u32,
    answer: Duration,
    search: Duration,
    start: Duration,
    ready: Duration,
    drain: Duration,
    manager: Duration,
    inherited: Inherited,
    notifier: Option<Rc<Notifier>>,
});

impl RestartSettings {
    /// The defaults, with the control socket in `directory`.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            format: 0,
            answer: Duration::from_secs(10),
            search: Duration::from_secs(10),
            start: Duration::from_secs(30),
            ready: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            manager: Duration::from_secs(30),
            inherited: Inherited::new(),
            notifier: None,
            control: Rc::new(InDirectory),
        }
    }

    pub(crate) fn control_path(&self) -> PathBuf {
        self.directory.join(CONTROL)
    }

    pub(super) fn patience(&self) -> Patience {
        Patience {
            answer: self.answer,
            ready: self.ready,
            manager: self.manager,
        }
    }
}
