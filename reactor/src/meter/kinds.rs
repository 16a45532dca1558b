//! Kinds of callbacks, and of what a turn may spend.

/// What kind of callback ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CallbackKind {
    /// A descriptor was called since it was ready, or since it had asked for another turn.
    Ready,
    /// A descriptor was notified, or entered, on behalf of another one.
    Notified,
    /// A call that was [deferred](crate::Reactor::defer) to the end of the turn.
    Deferred,
    /// A delayed call.
    Timer,
    /// A call of [`call_soon`](crate::Reactor::call_soon).
    Soon,
    /// A call from another thread.
    Remote,
}

impl CallbackKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Ready,
        Self::Notified,
        Self::Deferred,
        Self::Timer,
        Self::Soon,
        Self::Remote,
    ];

    /// One word, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Notified => "notified",
            Self::Deferred => "deferred",
            Self::Timer => "timer",
            Self::Soon => "soon",
            Self::Remote => "remote",
        }
    }
}

/// What just ran: its kind, and what it is called if it was a closure. If it was a
/// descriptor's, the reactor knows which.
#[derive(Clone, Copy)]
pub(crate) struct Ran {
    pub(crate) kind: CallbackKind,
    pub(crate) name: Option<fn() -> &'static str>,
}

impl Ran {
    #[inline(always)]
    pub(crate) const fn of(kind: CallbackKind) -> Self {
        Self { kind, name: None }
    }

    #[inline(always)]
    pub(crate) const fn named(kind: CallbackKind, name: fn() -> &'static str) -> Self {
        Self {
            kind,
            name: Some(name),
        }
    }
}

/// A budget of a turn that ran out, so that something waited for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Budget {
    /// [`Limits::events`](crate::Limits::events): one poll may not have fetched all.
    Events,
    /// [`Limits::calls`](crate::Limits::calls).
    Calls,
    /// [`Limits::notifications`](crate::Limits::notifications).
    Notifications,
    /// [`Limits::timers`](crate::Limits::timers).
    Timers,
    /// None of these: delayed calls were kept back, since the
    /// [loop was late](crate::Reactor#late-is-not-missed).
    Late,
}

impl Budget {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Events,
        Self::Calls,
        Self::Notifications,
        Self::Timers,
        Self::Late,
    ];

    /// One word, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Calls => "calls",
            Self::Notifications => "notifications",
            Self::Timers => "timers",
            Self::Late => "late",
        }
    }
}

/// The phases of a turn, as indices of what is kept of each.
pub(crate) mod phase {
    pub(crate) const CALLS: usize = 0;
    pub(crate) const READY: usize = 1;
    pub(crate) const NOTIFICATIONS: usize = 2;
    pub(crate) const TIMERS: usize = 3;
    pub(crate) const REST: usize = 4;
    pub(crate) const COUNT: usize = 5;
}
