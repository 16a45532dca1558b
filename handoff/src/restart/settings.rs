//! The settings of restarts.

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
    /// The directory of the control socket, for this program alone. It is made if it does
    /// not exist.
    pub directory: PathBuf,
    /// The format of the states of moved connections, as a number that the program chooses.
    /// A predecessor with another format refuses. Default 0.
    pub format: u32,
    /// How long one answer of the other process may take, including its greeting; default
    /// 10 s.
    pub answer: Duration,
    /// How long to search for a process that hands over; default 10 s. The looks themselves
    /// do not count. A process that is found may not be able to hand over: it serves
    /// another successor, ends, is about to serve, or starts cold at the same moment. Then
    /// the search waits for 1 ms, and twice as long each time after that, up to 500 ms.
    /// With the default that makes 29 looks. With zero there is only one look. If the
    /// search fails, the program is [not started](Program::not_started).
    pub search: Duration,
    /// How long a successor that was started may take until it asks to take over; default
    /// 30 s.
    pub start: Duration,
    /// How long a successor may take until it is ready; default 60 s.
    pub ready: Duration,
    /// How long the connections that stay with the predecessor may go on before they are
    /// cut; default 30 s.
    pub drain: Duration,
    /// How long the service manager may take to have room for a notice that a restart waits
    /// for; default 30 s. A predecessor does not end before its manager knows which process
    /// is the main one, and that it is ready. When this time has passed,
    /// [`manager_not_told`](Program::manager_not_told) is called.
    pub manager: Duration,
    /// Descriptors from elsewhere, above all from systemd, that [`Program::listen`] may
    /// also claim.
    pub inherited: Inherited,
    /// The service manager, to be told of restarts: `RELOADING` when a successor is
    /// started, `READY` when one of the two serves, and `MAINPID` when that is the new one.
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
    /// Makes the default settings, with the control socket in `directory`.
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
