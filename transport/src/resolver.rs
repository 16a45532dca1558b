//! Host names, and the resolvers that find their addresses.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV6, ToSocketAddrs};
use std::panic;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bowline_protocol::LookupError;
use bowline_reactor::{
    AtShutdown, DelayedCall, Reactor, ThreadPool, ThreadPoolSettings, catch_panic,
};

use crate::shared::Shared;

/// How long looking a name up may take by default. (Twisted: 60 s.)
pub(crate) const LOOKUP_TIMEOUT: Duration = Duration::from_secs(60);

/// Finds the addresses of hosts.
///
/// A reactor has the [`SystemResolver`], unless
/// [`Transports::set_resolver`](crate::Transports::set_resolver) gives it another: a
/// cache, a DNS client of your own, or a table for tests. A closure
/// `FnMut(&str, u16) -> io::Result<Vec<SocketAddr>>` is a resolver that knows its
/// answers at once.
///
/// # Examples
///
/// ```
/// use std::io;
/// use std::net::SocketAddr;
/// use bowline::{Reactor, Transports};
///
/// let mut reactor = Reactor::new()?;
/// reactor.set_resolver(|host: &str, port: u16| match host {
///     "database" => Ok(vec![SocketAddr::from(([10, 0, 0, 7], port))]),
///     _ => Err(io::Error::from(io::ErrorKind::NotFound)),
/// });
/// reactor.resolve("database", 5432, |reactor, addresses| {
///     println!("{addresses:?}");
///     reactor.stop().expect("it runs: this is one of its callbacks");
/// });
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Resolver: 'static {
    /// Finds the addresses of `host`, which is as the user gave it. It is never empty
    /// and never an IP address.
    ///
    /// [Give](Answer::give) the addresses to `answer`, with `port`, now or at any later
    /// time. They are tried in the order you give; the families need not alternate.
    ///
    /// Called by the loop, never inside another callback. It must not block. A panic
    /// fails only this lookup.
    fn resolve(&mut self, reactor: &mut Reactor, host: &str, port: u16, answer: Answer);
}

impl<F> Resolver for F
where
    F: FnMut(&str, u16) -> io::Result<Vec<SocketAddr>> + 'static,
{
    fn resolve(&mut self, reactor: &mut Reactor, host: &str, port: u16, answer: Answer) {
        answer.give(reactor, self(host, port));
    }
}

/// Takes the answer of a [`Resolver`].
///
/// If it is dropped without an answer, the caller waits until its time is over.
#[derive(Debug)]
pub struct Answer {
    pending: Rc<Pending>,
}

impl Answer {
    /// Gives the answer to whoever waits for it. Nothing is called before this returns. If
    /// nobody waits any more, nothing happens.
    pub fn give(self, reactor: &mut Reactor, addresses: io::Result<Vec<SocketAddr>>) {
        let result = match addresses {
            Ok(addresses) if addresses.is_empty() => Err(LookupError::NoAddress),
            Ok(addresses) => Ok(addresses),
            Err(error) => Err(LookupError::Failed(error)),
        };
        self.pending.end(reactor, result);
    }

    /// Whether somebody still waits for the answer.
    pub fn is_wanted(&self) -> bool {
        self.pending.wanted.load(Ordering::Relaxed)
    }
}

/// A lookup in progress. See [`Transports::resolve`](crate::Transports::resolve).
/// Dropping it does not end the lookup.
#[derive(Clone, Debug)]
pub struct Lookup {
    pending: Rc<Pending>,
}

impl Lookup {
    /// Cancels the lookup, so that its callback is not called. Does nothing if it was
    /// called already.
    pub fn cancel(&self, reactor: &mut Reactor) {
        drop(self.pending.take(reactor));
    }
}

type LookupDone = Box<dyn FnOnce(&mut Reactor, Result<Vec<SocketAddr>, LookupError>)>;

/// A lookup that has no answer yet.
struct Pending {
    /// The callback, until it is called or the lookup cancelled.
    done: Cell<Option<LookupDone>>,
    timeout: Cell<Option<DelayedCall>>,
    /// Whether `done` is still there. Other threads ask this.
    wanted: Arc<AtomicBool>,
}

impl Pending {
    fn take(&self, reactor: &mut Reactor) -> Option<LookupDone> {
        self.wanted.store(false, Ordering::Relaxed);
        if let Some(timeout) = self.timeout.take() {
            // This timer may be the one that has just fired.
            let _ = timeout.cancel(reactor);
        }
        self.done.take()
    }

    fn end(self: &Rc<Self>, reactor: &mut Reactor, result: Result<Vec<SocketAddr>, LookupError>) {
        if !self.wanted.load(Ordering::Relaxed) {
            return;
        }
        // Until then the lookup can still be cancelled, so the deferred call checks
        // again.
        let pending = Rc::clone(self);
        reactor.defer(move |reactor| {
            if let Some(done) = pending.take(reactor) {
                done(reactor, result);
            }
        });
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("wanted", &self.wanted)
            .finish_non_exhaustive()
    }
}

/// Looks a host up and calls `done` with its addresses, from the loop.
pub(crate) fn look_up(
    reactor: &mut Reactor,
    host: &str,
    port: u16,
    timeout: Option<Duration>,
    done: impl FnOnce(&mut Reactor, Result<Vec<SocketAddr>, LookupError>) + 'static,
) -> Lookup {
    let pending = Rc::new(Pending {
        done: Cell::new(Some(Box::new(done))),
        timeout: Cell::new(None),
        wanted: Arc::new(AtomicBool::new(true)),
    });
    let lookup = Lookup {
        pending: Rc::clone(&pending),
    };
    if let Some(address) = literal(host, port) {
        pending.end(reactor, Ok(vec![address]));
        return lookup;
    }
    if host.is_empty() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "host name is empty");
        pending.end(reactor, Err(LookupError::Failed(error)));
        return lookup;
    }
    if let Some(timeout) = timeout {
        // A strong reference, since a resolver may have dropped its answer.
        let late = Rc::clone(&pending);
        let call = reactor.call_later(timeout, move |reactor| {
            late.end(reactor, Err(LookupError::TimedOut));
        });
        pending.timeout.set(Some(call));
    }
    let resolver = Shared::of(reactor).resolver();
    let host: Box<str> = host.into();
    reactor.defer(move |reactor| {
        let answer = Answer {
            pending: Rc::clone(&pending),
        };
        if !answer.is_wanted() {
            return;
        }
        let asked = catch_panic(|| {
            resolver.borrow_mut().resolve(reactor, &host, port, answer);
        });
        if let Err(panic) = asked {
            let error = io::Error::other("resolver panicked");
            pending.end(reactor, Err(LookupError::Failed(error)));
            // The reactor logs and counts it like any other panic.
            panic::resume_unwind(panic.into_payload());
        }
    });
    lookup
}

/// The address, if `host` is one in writing. The scope of an IPv6 address has to be a
/// number. The system looks up scopes that are names of interfaces.
fn literal(host: &str, port: u16) -> Option<SocketAddr> {
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Some((address, port).into());
    }
    let address = format!("[{host}]:{port}").parse::<SocketAddrV6>();
    address.ok().map(SocketAddr::V6)
}

/// Asks the system with `getaddrinfo`, and so everything that is configured behind it,
/// such as the hosts file and DNS.
///
/// `getaddrinfo` blocks, so it runs in threads, ten at the most. They are a pool of
/// their own. So if a name server does not answer, neither the loop nor other work in
/// [`Reactor::call_in_thread`] has to wait. A lookup that nobody waits for any more
/// goes on in its thread until the system gives up. A reactor that stops does not wait
/// for it.
#[derive(Debug)]
pub struct SystemResolver {
    pool: ThreadPool,
}

impl SystemResolver {
    /// A resolver with threads of its own.
    pub fn new() -> Self {
        Self::with_pool(ThreadPool::new(
            ThreadPoolSettings::default().at_shutdown(AtShutdown::Abandon),
        ))
    }

    /// A resolver that uses the threads of `pool`.
    pub fn with_pool(pool: ThreadPool) -> Self {
        Self { pool }
    }
}

impl Default for SystemResolver {
    fn default() -> Self {
        Self::new()
    }
}

impl Resolver for SystemResolver {
    fn resolve(&mut self, reactor: &mut Reactor, host: &str, port: u16, answer: Answer) {
        let host = host.to_owned();
        let wanted = Arc::clone(&answer.pending.wanted);
        self.pool.call_in_thread(
            reactor,
            move || {
                if !wanted.load(Ordering::Relaxed) {
                    // The lookup was cancelled while it waited for a thread.
                    return Ok(Vec::new());
                }
                let addresses = (host.as_str(), port).to_socket_addrs()?;
                Ok(addresses.collect())
            },
            move |reactor, result| {
                answer.give(
                    reactor,
                    result.unwrap_or_else(|error| Err(io::Error::other(error))),
                );
            },
        );
    }
}

/// A resolver that lookups share.
pub(crate) type SharedResolver = Rc<RefCell<dyn Resolver>>;

#[cfg(test)]
mod tests {
    use super::*;

    /// Contract C-13.
    #[test]
    fn addresses_in_writing_are_told_from_names() {
        for written in ["192.0.2.1", "::1", "2001:db8::7", "::ffff:192.0.2.1"] {
            let address = literal(written, 80).expect(written);
            assert_eq!(address.ip(), written.parse::<std::net::IpAddr>().unwrap());
            assert_eq!(address.port(), 80);
        }
        let Some(SocketAddr::V6(scoped)) = literal("fe80::1%3", 80) else {
            panic!("an address with a scope");
        };
        assert_eq!(scoped.scope_id(), 3);
        for name in [
            "",
            "localhost",
            "192.0.2",
            "1",
            "example.org",
            "fe80::1%eth0",
            "[::1]",
            "::1]:8",
            "a:b",
        ] {
            assert_eq!(literal(name, 80), None, "{name}");
        }
    }
}
