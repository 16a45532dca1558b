//! What a program tells about itself, and what it is told.

use std::io;
use std::time::Duration;

use bowline_reactor::{GracefulStop, Reactor};
use bowline_transport::LayerState;

use super::error::RestartError;
use super::listeners::Listeners;
use super::moving::Moved;
#[cfg(doc)]
use super::{Movable, Restart, RestartSettings};

/// A program that can be restarted while it serves.
///
/// As with all callbacks, none of these is called from inside another.
pub trait Program: 'static {
    /// Listens on everything that the program serves, with `listeners`. Listeners that a
    /// predecessor or systemd had are adopted by name; the others are bound. Nothing is
    /// accepted before this has returned `Ok`. If there is a predecessor, nothing is
    /// accepted before it has stopped accepting.
    ///
    /// Called once.
    ///
    /// # Errors
    ///
    /// Those of listening. Then the program [is not started](Self::not_started), and a
    /// predecessor goes on.
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()>;

    /// The program serves, and no other process does: it was started cold, or its
    /// predecessor has handed over everything. Called once.
    fn serving(&mut self, reactor: &mut Reactor, start: Start) {
        let _ = (reactor, start);
    }

    /// The program will not serve, since it could not listen or take over. Called once,
    /// instead of [`serving`](Self::serving), after the error was logged. By default the
    /// reactor [fails](Reactor::fail): it stops, and [`run`](Reactor::run) returns the
    /// error.
    fn not_started(&mut self, reactor: &mut Reactor, error: &RestartError) {
        reactor.fail(error.to_io());
    }

    /// A successor has failed, and this process serves as before. Called once for each that
    /// was started or had asked, after the error was logged and
    /// [counted](Restart::successors_failed).
    fn successor_failed(&mut self, reactor: &mut Reactor, error: &RestartError) {
        let _ = (reactor, error);
    }

    /// The service manager did not accept a notice about a restart within
    /// [`RestartSettings::manager`]. The restart goes on without it. The notice is still
    /// sent, if there is room while this process lives. Logged at `error`. By default
    /// nothing happens.
    fn manager_not_told(&mut self, reactor: &mut Reactor, error: &RestartError) {
        let _ = (reactor, error);
    }

    /// Everything was handed over. No more connections arrive. Those that are left here are
    /// to be served to their end, within [`RestartSettings::drain`]. Called once.
    ///
    /// By default the reactor [stops gracefully](Reactor::stop_gracefully): each connection
    /// is told to [drain](bowline_protocol::Protocol::draining). When `within` has passed,
    /// the reactor [stops](Reactor::stop_now) in any case.
    fn handed_over(&mut self, reactor: &mut Reactor, within: Duration) {
        // An error says that it has stopped already.
        let _ = reactor.stop_gracefully(GracefulStop::new().deadline(within));
    }

    /// Whether connections of this [kind](Movable::KIND) can be taken over. By default none
    /// can.
    fn takes(&self, kind: &str) -> bool {
        let _ = kind;
        false
    }

    /// Whether a connection can be taken over with the states of its layers. It is of a
    /// kind that the program takes. By default it can be if its layers have no states. If
    /// not, it stays with the predecessor. Nothing is taken yet: a layer only looks
    /// (`TlsServer::can_resume`).
    fn takes_layers(&self, kind: &str, layers: &[LayerState]) -> bool {
        let _ = kind;
        layers.is_empty()
    }

    /// A connection has moved here, of a kind that the program [takes](Self::takes). Adopt
    /// it, with its state and with its [layers](Moved::layers).
    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        let _ = (reactor, moved);
    }
}

/// How a program started to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// Nobody served before, or nobody who hands over.
    Cold,
    /// It took over from the process with this number.
    TookOver {
        /// The process ID of the predecessor, as it said itself.
        pid: u32,
        /// How many live connections have moved here.
        connections: usize,
    },
}
