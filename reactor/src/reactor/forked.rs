//! How a forked child goes on with what it has of its parent's reactor.

use std::io;
use std::mem;

use super::{Reactor, drop_each};
use crate::error::ReactorError;
use crate::log;
use crate::panic::catch_panic;
use crate::remote::RemoteHandle;
use crate::slots::Slot;
use crate::sys;
use crate::thread_pool;
use crate::token::Token;

impl Reactor {
    /// Makes a forked child's copy of its parent's reactor the child's own. It goes on
    /// with the descriptors in `keep` and no others.
    ///
    /// Call it in the child, between turns, before anything else is done with the
    /// reactor. See [Forks](Self#forks).
    ///
    /// | what | in the child |
    /// |---|---|
    /// | descriptors in `keep` | a poller of its own watches them; present readiness is reported |
    /// | all others | the child's copies are closed and dropped. Nobody is told: the connections go on in the parent |
    /// | delayed and periodic calls, `call_soon`, triggers | kept: they run in both processes |
    /// | signal handlers | dropped: signals have their default effect, until they are handled anew |
    /// | [`RemoteHandle`]s | refuse calls (`RemoteError`); [`remote`](Self::remote) gives out new ones. The parent runs the calls that were waiting |
    /// | calls in threads | told [`ThreadCallError::Forked`](crate::ThreadCallError::Forked): the work is the parent's. Pools start threads of their own, which begin in any case |
    /// | threads that std starts | may never run, if another thread of the parent began or ended at the fork: std's lock for that stays taken |
    /// | names (tokens, handles), `extension`s, statistics, limits | as they were |
    ///
    /// The state of the reactor stays. One that was turned by hand is turned on; one
    /// that had ended is run.
    ///
    /// The child shares what it keeps with the parent, for as long as the parent has it:
    ///
    /// - Both accept from a listener that both have, and each client comes to one of
    ///   them.
    /// - Only one of them may read and write a connection. The other takes it apart and
    ///   drops the socket, or leaves it alone. Closing it does no harm to the other: a
    ///   shared connection is never made to reset.
    /// - The parent removes a UNIX listener's file, unless it has disowned the file and
    ///   the child owns it (`Listener::own_socket_file`).
    ///
    /// # Errors
    ///
    /// An `io::Error` with [`ReactorError::NotForked`] or, inside a callback,
    /// [`ReactorError::AlreadyRunning`]; those of epoll_create1(2) and eventfd(2).
    /// Nothing has changed then. Those of epoll_ctl(2): a descriptor that could not be
    /// watched is dropped, and all the rest is done.
    pub fn after_fork(&mut self, keep: &[Token]) -> io::Result<()> {
        if !self.is_forked() {
            return Err(io::Error::other(ReactorError::NotForked));
        }
        if self.is_turning() {
            return Err(io::Error::other(ReactorError::AlreadyRunning));
        }
        let poll = mio::Poll::new()?;
        let remote = RemoteHandle::new(mio::Waker::new(poll.registry(), Token::WAKER.to_mio())?);
        self.drop_all_but(keep);
        drop_each(mem::replace(&mut self.remote, remote).close(true));
        drop_each(mem::take(&mut self.remote_calls));
        self.alarm = None;
        self.make_room_for_events();
        self.poll = poll;
        // From here on it is ours: what is watched is watched by our poller.
        self.process = sys::generation();
        let result = self.watch_all_anew();
        thread_pool::forget_threads(self);
        log::debug!(target: log::REACTOR, "forked, going on with {} descriptors", self.slots.len());
        result
    }

    fn drop_all_but(&mut self, keep: &[Token]) {
        for token in self.slots.tokens() {
            if !keep.contains(&token)
                && let Err(panic) = catch_panic(|| self.discard(token))
            {
                self.log_panic(token, &panic);
            }
        }
        self.slots.recycle();
    }

    fn watch_all_anew(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for token in self.slots.tokens() {
            if let Some(entry) = self.slots.get_mut(token).and_then(Slot::entry_mut) {
                entry.forked();
            }
            match self.watch_anew(token, Self::watch) {
                Ok(()) => self.notify(token),
                Err(error) => {
                    log::error!(target: log::REACTOR, "{token}: cannot be watched: {error}");
                    self.remove(token);
                    result = Err(error);
                }
            }
        }
        result
    }
}
