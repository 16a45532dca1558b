//! The steps of taking over, as pure values: what was said goes in, what is to
//! be done comes out.

use std::time::Duration;

use super::messages::Refusal;
use crate::wire::MAX_DESCRIPTORS;

/// Where the process that serves stands with one that wants to take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offering {
    /// Connected, and has not asked.
    Asked,
    /// It takes listeners: so many batches are acknowledged, of so many.
    Taking { taken: u32, batches: u32 },
    /// It adopts and binds.
    Preparing,
    /// It is ready; connections move, while new ones still come here.
    Moving,
    /// It was told that the listeners are its own, and has not said that it serves.
    Committed,
    /// It serves; the connections that came meanwhile move.
    Following,
    /// Everything has moved; the service manager is told who is the main process.
    Announcing,
    /// It has everything. It says when the service manager knows of it, or as good as.
    Parting,
    /// The channel has broken here. If it has everything, it takes the baton and serves:
    /// that costs no connection. It is given the time for it.
    Waiting(Given),
    /// It comes no further. The baton says which of the two serves.
    Deciding { given: Given, is_cut: bool },
    /// The successor has the baton, since its channel has ended: so will ours.
    Overtaken(Given),
    /// The same, and it has. The service manager is told who is the main process.
    Yielding,
    /// Everything is said.
    Done,
    /// Ended without.
    Failed,
}

impl Offering {
    /// A few words for who looks on.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Asked => "connected",
            Self::Taking { .. } => "takes listeners",
            Self::Preparing => "adopts and binds",
            Self::Moving => "takes connections",
            Self::Committed => "is told to serve",
            Self::Following => "serves, takes connections",
            Self::Announcing => "serves, is announced",
            Self::Parting => "serves",
            Self::Waiting(_) | Self::Deciding { .. } => "is not heard",
            Self::Overtaken(_) | Self::Yielding => "has taken over",
            Self::Done => "has everything",
            Self::Failed => "failed",
        }
    }
}

/// What the one that serves has given away by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// It accepts.
    Nothing,
    /// It does not accept any more.
    Listeners,
    /// The same, and the service manager is being told.
    Everything,
    /// The same, and it has been.
    Announced,
}

/// What happened, as the one that serves sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// `Take`; whether it can be served, and in how many batches.
    Take(Result<u32, Refusal>),
    /// `Taken`.
    Taken(u32),
    /// `Ready`.
    Ready,
    /// `Serving`.
    Serving,
    /// Nothing more is to move.
    Moved,
    /// The service manager has been told, or cannot be: `true`. There is none: `false`.
    Announced(bool),
    /// `Parted`.
    Parted,
    /// `Abort`, or a message that has no business here.
    Abort,
    /// The channel has ended at the other end: the successor has died, or its channel has
    /// broken there.
    Lost,
    /// The channel has broken here: the successor lives, for all that is known.
    Broken,
    /// The present step took too long.
    TooLate,
    /// Whether the baton is ours.
    Decided(bool),
}

/// What the one that serves does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Do {
    /// Says no, and hangs up.
    Refuse(Refusal),
    /// Says how much comes.
    Offer,
    /// Sends a batch of listeners.
    Send(u32),
    /// Stops accepting, and says `Commit`.
    Commit,
    /// Moves connections.
    Move,
    /// Tells the service manager of the new main process.
    Announce,
    /// Says `Done`, and lets go of the listeners.
    Finish,
    /// Hangs up and begins to drain.
    Leave,
    /// Takes the baton, if it is there.
    Decide,
    /// Leaves the listeners to the successor, for good.
    Yield,
    /// Takes everything back, if it was given away: goes on accepting.
    Resume,
    /// Says `Abort` and hangs up, if there is still somebody.
    HangUp,
}

/// How long the steps may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// One answer.
    pub(crate) answer: Duration,
    /// Adopting, binding, and whatever else a program does before it serves.
    pub(crate) ready: Duration,
    /// Until the service manager has taken a notice.
    pub(crate) manager: Duration,
}

impl Offering {
    /// What follows.
    pub(crate) fn hear(&mut self, heard: Heard) -> &'static [Do] {
        use Offering::{
            Announcing, Asked, Committed, Deciding, Done, Failed, Following, Moving, Overtaken,
            Parting, Preparing, Taking, Waiting, Yielding,
        };
        let is_cut = matches!(heard, Heard::Lost | Heard::Broken);
        let decide = |given| (Deciding { given, is_cut }, &[Do::Decide] as &[Do]);
        let (next, actions): (Self, &'static [Do]) = match (*self, heard) {
            // Whatever comes then is too late.
            (Done | Failed, _) => (*self, &[]),
            (Asked, Heard::Take(Err(refusal))) => (
                Failed,
                match refusal {
                    Refusal::Busy => &[Do::Refuse(Refusal::Busy)],
                    Refusal::Format => &[Do::Refuse(Refusal::Format)],
                    Refusal::NotServing => &[Do::Refuse(Refusal::NotServing)],
                },
            ),
            (Asked, Heard::Take(Ok(0))) => (Preparing, &[Do::Offer]),
            (Asked, Heard::Take(Ok(batches))) => {
                (Taking { taken: 0, batches }, &[Do::Offer, Do::Send(0)])
            }
            (Taking { taken, batches }, Heard::Taken(batch)) if batch == taken => {
                if taken + 1 == batches {
                    (Preparing, &[])
                } else {
                    let taken = taken + 1;
                    (
                        Taking { taken, batches },
                        SEND.get(taken as usize).map_or(&[], |it| it),
                    )
                }
            }
            (Preparing, Heard::Ready) => (Moving, &[Do::Move]),
            (Moving, Heard::Moved) => (Committed, &[Do::Commit]),
            (Committed, Heard::Serving) => (Following, &[Do::Move]),
            (Following, Heard::Moved) => (Announcing, &[Do::Announce]),
            (Announcing, Heard::Announced(true)) => (Parting, &[Do::Finish]),
            (Announcing, Heard::Announced(false)) => (Done, &[Do::Finish, Do::Leave]),
            // It has everything, whatever becomes of it.
            (Parting, _) => (Done, &[Do::Leave]),
            // It has nothing yet, nor has it the baton.
            (Asked, Heard::Lost | Heard::Broken) => (Failed, &[]),
            (Asked, _) => (Failed, &[Do::HangUp]),
            (Preparing | Moving, Heard::Broken) => (Waiting(Given::Nothing), &[]),
            (Committed | Following, Heard::Broken) => (Waiting(Given::Listeners), &[]),
            (Announcing, Heard::Broken) => (Waiting(Given::Everything), &[]),
            // It may have everything by now, and take the baton where it cannot hear us.
            (Taking { .. } | Preparing | Moving, _) => decide(Given::Nothing),
            (Committed | Following, _) => decide(Given::Listeners),
            (Announcing, _) => decide(Given::Everything),
            (Waiting(_) | Deciding { .. } | Overtaken(_) | Yielding, _) => {
                self.after_the_cut(heard)
            }
        };
        *self = next;
        actions
    }

    /// What follows where one of the two has to take the baton.
    fn after_the_cut(self, heard: Heard) -> (Self, &'static [Do]) {
        use Offering::{Deciding, Done, Failed, Overtaken, Waiting, Yielding};
        match (self, heard) {
            (Waiting(_), Heard::Announced(_)) => (Waiting(Given::Announced), &[]),
            (Waiting(given), Heard::TooLate) => (
                Deciding {
                    given,
                    is_cut: true,
                },
                &[Do::Decide],
            ),
            (Deciding { given, .. }, Heard::Decided(true)) => match given {
                Given::Nothing => (Failed, &[Do::HangUp]),
                _ => (Failed, &[Do::HangUp, Do::Resume]),
            },
            (Deciding { given, is_cut }, Heard::Decided(false)) if !is_cut => {
                (Overtaken(given), &[])
            }
            (Deciding { given, .. }, Heard::Decided(false))
            | (Overtaken(given), Heard::Lost | Heard::Broken | Heard::TooLate) => match given {
                Given::Nothing | Given::Listeners => (Yielding, &[Do::Yield, Do::Announce]),
                Given::Everything => (Yielding, &[Do::Yield]),
                Given::Announced => (Done, &[Do::Yield, Do::Finish, Do::Leave]),
            },
            (Overtaken(_), Heard::Announced(_)) => (Overtaken(Given::Announced), &[]),
            (Yielding, Heard::Announced(_)) => (Done, &[Do::Finish, Do::Leave]),
            _ => (self, &[]),
        }
    }

    /// How long the present step may take; moving has deadlines of its own.
    pub(crate) fn patience(self, patience: Patience) -> Option<Duration> {
        match self {
            Self::Asked
            | Self::Taking { .. }
            | Self::Committed
            | Self::Waiting(_)
            | Self::Overtaken(_) => Some(patience.answer),
            Self::Preparing => Some(patience.ready),
            Self::Parting => Some(patience.manager + patience.answer),
            // Announcing has a limit of its own.
            Self::Moving
            | Self::Following
            | Self::Announcing
            | Self::Deciding { .. }
            | Self::Yielding
            | Self::Done
            | Self::Failed => None,
        }
    }

    /// Whether connections move.
    pub(crate) fn is_moving(self) -> bool {
        matches!(self, Self::Moving | Self::Following)
    }

    /// Whether nothing comes of it any more.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }
}

/// The most batches of listeners: 16,192 of them.
const MOST_BATCHES: usize = 64;

/// In how many batches so many listeners are sent; `None` if they are too many.
pub(crate) fn batches(listeners: usize) -> Option<u32> {
    let batches = listeners.div_ceil(MAX_DESCRIPTORS);
    (batches <= MOST_BATCHES).then_some(batches as u32)
}

/// `Send` of each batch, so that the machine needs no memory of its own.
static SEND: [[Do; 1]; MOST_BATCHES] = {
    let mut all = [[Do::Send(0)]; MOST_BATCHES];
    let mut at = 0;
    while at < MOST_BATCHES {
        all[at] = [Do::Send(at as u32)];
        at += 1;
    }
    all
};

/// Where a process that wants to take over stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taking {
    /// Looks for one that serves.
    Looking,
    /// Nobody does: takes the place where its own successors look.
    Settling,
    /// Somebody was there, or takes the place at the same moment, and hands nothing over:
    /// looks again after a while.
    Resting,
    /// Has the place, and starts cold.
    Alone,
    /// Has asked.
    Asking,
    /// Takes listeners: so many batches are here, of so many.
    Receiving { received: u32, batches: u32 },
    /// Adopts and binds.
    Adopting,
    /// The same, and the channel is gone meanwhile.
    Orphaned,
    /// Has said `Ready`; connections arrive.
    Ready,
    /// Serves; more connections arrive.
    Serving,
    /// The channel is gone. The baton says which of the two serves.
    Deciding { accepts: bool },
    /// The predecessor has nothing more.
    Done,
    /// Ended without.
    Failed,
}

impl Taking {
    /// A few words for who looks on.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Looking | Self::Resting => "looks for who serves",
            Self::Settling | Self::Alone => "starts",
            Self::Asking => "has asked",
            Self::Receiving { .. } => "takes listeners",
            Self::Adopting | Self::Orphaned => "adopts and binds",
            Self::Ready => "takes connections",
            Self::Serving => "serves, takes connections",
            Self::Deciding { .. } => "hears nothing",
            Self::Done => "has everything",
            Self::Failed => "failed",
        }
    }
}

/// What happened, as the one that takes over sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// One that serves, or has not told its end yet.
    Found,
    /// There is nobody.
    Nobody,
    /// The place is ours: `true`. Another was there before.
    Settled(bool),
    /// It is time to look again: `true`. It was looked often enough.
    Rested(bool),
    /// It cannot be looked for one, or the place not be had, whoever is there.
    Cannot,
    /// `Refused`, and why.
    Refused(Refusal),
    /// `Offer`.
    Offer(u32),
    /// `Listeners`, all of whose descriptors arrived.
    Listeners(u32),
    /// The program has adopted and bound everything, and the loop has turned.
    Adopted,
    /// The program could not.
    NotAdopted,
    /// `Commit`.
    Commit,
    /// `Done`.
    Done,
    /// `Abort`, or a message that has no business here.
    Abort,
    /// The channel has ended at the other end: the predecessor has died, or its channel
    /// has broken there.
    Lost,
    /// The channel has broken here: the predecessor lives, for all that is known.
    Broken,
    /// The present step took too long.
    TooLate,
    /// Whether the baton is ours.
    Decided(bool),
}

/// What the one that takes over does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Looks for one that serves.
    Look,
    /// Takes the place.
    Settle,
    /// Lets go of what came, and looks again later, unless that was often enough.
    Rest,
    /// Starts, alone.
    StartCold,
    /// Asks for everything.
    Ask,
    /// Acknowledges a batch of listeners.
    Acknowledge(u32),
    /// Has the program adopt and bind.
    Adopt,
    /// Says `Ready`.
    SayReady,
    /// Accepts, and owns the socket files.
    Serve,
    /// Says `Serving`.
    SaySo,
    /// Takes the baton, if it is there.
    Decide,
    /// Is done: all that was on its way has arrived.
    Finish,
    /// Stops accepting, and leaves the socket files to their owner.
    Withdraw,
    /// Says `Abort` and hangs up, if there is still somebody.
    HangUp,
    /// Tells the program that it is not to be.
    Fail,
}

impl Taking {
    /// What follows.
    pub(crate) fn hear(&mut self, told: Told) -> Vec<Act> {
        use Taking::{
            Adopting, Asking, Deciding, Done, Failed, Orphaned, Ready, Receiving, Serving,
        };
        if let Some((next, acts)) = self.look(told) {
            *self = next;
            return acts.to_vec();
        }
        let (next, acts): (Self, &[Act]) = match (*self, told) {
            (Done | Failed, _) => (*self, &[]),
            (Asking, Told::Refused(_)) => (Failed, &[Act::Fail]),
            (Asking, Told::Offer(0)) => (Adopting, &[Act::Adopt]),
            (Asking, Told::Offer(batches)) => (
                Receiving {
                    received: 0,
                    batches,
                },
                &[],
            ),
            (Receiving { received, batches }, Told::Listeners(batch)) if batch == received => {
                let received = received + 1;
                let mut acts = vec![Act::Acknowledge(batch)];
                if received == batches {
                    *self = Adopting;
                    acts.push(Act::Adopt);
                } else {
                    *self = Receiving { received, batches };
                }
                return acts;
            }
            (Adopting, Told::Adopted) => (Ready, &[Act::SayReady]),
            (Ready, Told::Commit) => (Serving, &[Act::SaySo, Act::Serve]),
            (Serving, Told::Done) => (Done, &[Act::Finish]),
            // It is all here, and perhaps nobody else is going to serve. Where the
            // predecessor is, what has moved is here none the less.
            (Ready, Told::Lost | Told::Broken) | (Orphaned, Told::Adopted) => {
                (Deciding { accepts: false }, &[Act::Decide])
            }
            (Serving, Told::Lost | Told::Broken) => (Deciding { accepts: true }, &[Act::Decide]),
            (Deciding { accepts: false }, Told::Decided(true)) => {
                (Done, &[Act::Serve, Act::Finish])
            }
            (Deciding { accepts: true }, Told::Decided(true)) => (Done, &[Act::Finish]),
            (Deciding { accepts: false }, _) => (Failed, &[Act::Fail]),
            (Deciding { accepts: true }, _) => (Failed, &[Act::Withdraw, Act::Fail]),
            // Not yet for us to know what the program makes of it.
            (Adopting | Orphaned, Told::Lost | Told::Broken) => (Orphaned, &[]),
            (Serving, _) => (Failed, &[Act::Withdraw, Act::HangUp, Act::Fail]),
            (_, Told::Lost | Told::Broken) => (Failed, &[Act::Fail]),
            _ => (Failed, &[Act::HangUp, Act::Fail]),
        };
        *self = next;
        acts.to_vec()
    }

    /// What follows while nothing is in the program's hands yet: to look again then costs
    /// nobody anything.
    fn look(self, told: Told) -> Option<(Self, &'static [Act])> {
        use Taking::{Alone, Asking, Done, Failed, Looking, Receiving, Resting, Settling};
        Some(match (self, told) {
            (Looking, Told::Found) => (Asking, &[Act::Ask]),
            (Looking, Told::Nobody) => (Settling, &[Act::Settle]),
            (Settling, Told::Settled(true)) => (Alone, &[Act::StartCold]),
            (Resting, Told::Rested(true)) => (Looking, &[Act::Look]),
            (Looking | Asking | Receiving { .. }, Told::Lost)
            | (Settling, Told::Settled(false))
            | (Asking, Told::Refused(Refusal::Busy))
            | (Asking | Receiving { .. }, Told::Refused(Refusal::NotServing)) => {
                (Resting, &[Act::Rest])
            }
            (Resting, Told::Rested(false)) | (Looking | Settling, Told::Cannot) => {
                (Failed, &[Act::Fail])
            }
            (Alone, Told::Adopted) => (Done, &[]),
            (Alone, Told::NotAdopted) => (Failed, &[]),
            // What a channel says that was given up.
            (Resting | Alone, _) => (self, &[]),
            _ => return None,
        })
    }

    /// How long the present step may take. While it is ready the predecessor may
    /// have its reasons; while it serves, it serves.
    pub(crate) fn patience(self, patience: Patience) -> Option<Duration> {
        match self {
            Self::Asking | Self::Receiving { .. } | Self::Ready => Some(patience.answer),
            // What a look waits for has limits of its own.
            Self::Looking
            | Self::Settling
            | Self::Resting
            | Self::Alone
            | Self::Adopting
            | Self::Orphaned
            | Self::Serving
            | Self::Deciding { .. }
            | Self::Done
            | Self::Failed => None,
        }
    }

    /// Whether connections may come.
    pub(crate) fn is_receiving(self) -> bool {
        matches!(self, Self::Ready | Self::Serving)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Both machines, and what is on its way between them.
    #[derive(Clone, Debug)]
    struct Both {
        batches: u32,
        has_manager: bool,
        old: Side<Offering, Heard>,
        new: Side<Taking, Told>,
        baton: Option<&'static str>,
        /// The new one has what it takes to serve.
        has_everything: bool,
    }

    /// One of the two.
    #[derive(Clone, Debug)]
    struct Side<S, M> {
        step: S,
        accepts: bool,
        is_dead: bool,
        /// Its program was told that all is over.
        is_over: bool,
        /// What arrives over the channel.
        inbox: Vec<M>,
        /// What it hears beside that, at its own time.
        local: Vec<M>,
        /// Its end of the channel is open.
        is_open: bool,
    }

    impl<S, M> Side<S, M> {
        fn new(step: S, accepts: bool) -> Self {
            Self {
                step,
                accepts,
                is_dead: false,
                is_over: false,
                inbox: Vec::new(),
                local: Vec::new(),
                is_open: true,
            }
        }

        fn send_to<T, N>(&self, other: &mut Side<T, N>, message: N) {
            if self.is_open && other.is_open && !other.is_dead {
                other.inbox.push(message);
            }
        }

        /// The next that it hears: of the channel or beside it.
        fn next(&mut self, is_local: bool) -> Option<M> {
            let from = match is_local {
                true => &mut self.local,
                false => &mut self.inbox,
            };
            (!self.is_dead && !from.is_empty()).then(|| from.remove(0))
        }

        /// Its end is no more, with what it has not read; the last messages of those that
        /// it has written had not left.
        fn close<T, N: PartialEq>(&mut self, other: &mut Side<T, N>, unsent: usize, end: N) {
            if !std::mem::replace(&mut self.is_open, false) {
                return;
            }
            self.inbox.clear();
            if other.is_open && !other.inbox.contains(&end) {
                let left = other.inbox.len().saturating_sub(unsent);
                other.inbox.truncate(left);
                other.inbox.push(end);
            }
        }
    }

    /// What can go wrong.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        /// A channel breaks at this end, with so many messages of it that had not left.
        OldBreaks(usize),
        NewBreaks(usize),
        /// Either loses its patience.
        OldIsLate,
        NewIsLate,
        OldDies(usize),
        NewDies(usize),
    }

    const BREAKS_AND_DELAYS: &[Fault] = &[
        Fault::OldBreaks(0),
        Fault::OldBreaks(1),
        Fault::OldBreaks(9),
        Fault::NewBreaks(0),
        Fault::NewBreaks(1),
        Fault::NewBreaks(9),
        Fault::OldIsLate,
        Fault::NewIsLate,
    ];

    const DEATHS: &[Fault] = &[
        Fault::OldDies(0),
        Fault::OldDies(9),
        Fault::NewDies(0),
        Fault::NewDies(9),
    ];

    impl Both {
        fn new(batches: u32, has_manager: bool) -> Self {
            let mut this = Self {
                batches,
                has_manager,
                old: Side::new(Offering::Asked, true),
                new: Side::new(Taking::Asking, false),
                baton: None,
                has_everything: false,
            };
            this.old.inbox.push(Heard::Take(Ok(batches)));
            this
        }

        fn takes_baton(&mut self, who: &'static str) -> bool {
            *self.baton.get_or_insert(who) == who
        }

        fn old_hears(&mut self, heard: Heard) {
            for action in self.old.step.hear(heard) {
                let (old, new) = (&mut self.old, &mut self.new);
                match *action {
                    Do::Refuse(refusal) => old.send_to(new, Told::Refused(refusal)),
                    Do::Offer => old.send_to(new, Told::Offer(self.batches)),
                    Do::Send(batch) => old.send_to(new, Told::Listeners(batch)),
                    Do::Commit => {
                        old.accepts = false;
                        old.send_to(new, Told::Commit);
                    }
                    Do::Move => old.local.push(Heard::Moved),
                    Do::Announce if self.has_manager => old.local.push(Heard::Announced(true)),
                    Do::Announce => self.old_hears(Heard::Announced(false)),
                    Do::Finish => {
                        old.accepts = false;
                        old.send_to(new, Told::Done);
                    }
                    Do::Leave => {
                        old.is_over = true;
                        old.close(new, 0, Told::Lost);
                    }
                    Do::Decide => {
                        let is_ours = self.takes_baton("old");
                        self.old_hears(Heard::Decided(is_ours));
                    }
                    Do::Yield => old.accepts = false,
                    Do::Resume => old.accepts = true,
                    Do::HangUp => {
                        old.send_to(new, Told::Abort);
                        old.close(new, 0, Told::Lost);
                    }
                }
            }
        }

        fn new_hears(&mut self, told: Told) {
            for act in self.new.step.hear(told) {
                let (old, new) = (&mut self.old, &mut self.new);
                match act {
                    Act::Acknowledge(batch) => new.send_to(old, Heard::Taken(batch)),
                    Act::Adopt => {
                        self.has_everything = true;
                        new.local.push(Told::Adopted);
                    }
                    Act::SayReady => new.send_to(old, Heard::Ready),
                    Act::SaySo => new.send_to(old, Heard::Serving),
                    Act::Serve => new.accepts = true,
                    Act::Withdraw => new.accepts = false,
                    Act::Decide => {
                        let is_ours = self.takes_baton("new");
                        self.new_hears(Told::Decided(is_ours));
                    }
                    Act::HangUp => {
                        new.send_to(old, Heard::Abort);
                        new.close(old, 0, Heard::Lost);
                    }
                    // What it finds when it looks again is another take-over.
                    Act::Fail | Act::Rest => new.is_over = true,
                    Act::Finish => new.send_to(old, Heard::Parted),
                    Act::Look | Act::Settle | Act::StartCold | Act::Ask => {
                        unreachable!("it has found one")
                    }
                }
            }
        }

        fn suffer(&mut self, fault: Fault) {
            let (old, new) = (&mut self.old, &mut self.new);
            match fault {
                Fault::OldBreaks(unsent) if old.is_open => {
                    old.close(new, unsent, Told::Lost);
                    old.local.push(Heard::Broken);
                }
                Fault::NewBreaks(unsent) if new.is_open => {
                    new.close(old, unsent, Heard::Lost);
                    new.local.push(Told::Broken);
                }
                Fault::OldDies(unsent) => {
                    old.close(new, unsent, Told::Lost);
                    old.is_dead = true;
                }
                Fault::NewDies(unsent) => {
                    new.close(old, unsent, Heard::Lost);
                    new.is_dead = true;
                }
                Fault::OldIsLate if old.step.patience(PATIENCE).is_some() => {
                    self.old_hears(Heard::TooLate);
                }
                Fault::NewIsLate if new.step.patience(PATIENCE).is_some() => {
                    self.new_hears(Told::TooLate);
                }
                _ => {}
            }
        }

        /// What can happen next, each by itself; nothing once they are at rest.
        fn successors(&self) -> Vec<Self> {
            let mut all = Vec::new();
            for is_local in [false, true] {
                let mut next = self.clone();
                if let Some(heard) = next.old.next(is_local) {
                    next.old_hears(heard);
                    all.push(next);
                }
                let mut next = self.clone();
                if let Some(told) = next.new.next(is_local) {
                    next.new_hears(told);
                    all.push(next);
                }
            }
            if all.is_empty() {
                // Time passes.
                let mut next = self.clone();
                if !self.old.is_dead && self.old.step.patience(PATIENCE).is_some() {
                    next.old_hears(Heard::TooLate);
                    all.push(next);
                } else if !self.new.is_dead && self.new.step.patience(PATIENCE).is_some() {
                    next.new_hears(Told::TooLate);
                    all.push(next);
                }
            }
            all
        }

        fn settle(&mut self) {
            while let Some(next) = self.successors().into_iter().next() {
                *self = next;
            }
        }
    }

    /// Goes every way from `both` that there is with these many faults of those given,
    /// each at any moment, and calls `check` where it comes to rest.
    fn explore(both: Both, faults: usize, of: &[Fault], mut check: impl FnMut(&Both, &[Fault])) {
        let mut seen = HashSet::new();
        let mut stack = vec![(both, Vec::new())];
        while let Some((both, suffered)) = stack.pop() {
            if !seen.insert(format!("{both:?}{suffered:?}")) {
                continue;
            }
            let next = both.successors();
            if next.is_empty() {
                check(&both, &suffered);
            }
            stack.extend(next.into_iter().map(|next| (next, suffered.clone())));
            if suffered.len() < faults {
                for fault in of {
                    let mut next = both.clone();
                    next.suffer(*fault);
                    stack.push((next, [suffered.as_slice(), &[*fault]].concat()));
                }
            }
        }
    }

    #[test]
    fn listeners_go_in_batches_up_to_the_most_there_can_be() {
        let counted = [0, 1, 253, 254, 16_192, 16_193].map(batches);
        let wanted = [Some(0), Some(1), Some(1), Some(2), Some(64), None];
        assert_eq!(counted, wanted);
    }

    #[test]
    fn everything_is_handed_over_in_any_number_of_batches() {
        for batches in [0, 1, 2, 63, 64] {
            let mut both = Both::new(batches, true);
            both.settle();
            let Both { old, new, .. } = both;
            assert_eq!((old.step, new.step), (Offering::Done, Taking::Done));
            assert!(new.accepts && !new.is_over && !old.accepts && old.is_over);
        }
    }

    /// The channel is cut at every message, before and behind it, at either end or at
    /// both; either end loses its patience at any step; and what the two hear of that
    /// comes in every order: one of them serves, and knows it.
    #[test]
    fn one_of_two_that_live_serves_wherever_the_channel_is_cut() {
        for has_manager in [false, true] {
            let both = Both::new(2, has_manager);
            let mut outcomes = [0, 0];
            explore(both, 2, BREAKS_AND_DELAYS, |both, suffered| {
                let Both { old, new, .. } = both;
                let serve = [old.accepts, new.accepts];
                let told = [!old.is_over, !new.is_over];
                assert_eq!(serve, told, "{suffered:?}: {both:?}");
                assert_eq!(serve[0], !serve[1], "{suffered:?}: {both:?}");
                outcomes[usize::from(serve[1])] += 1;
            });
            assert!(outcomes.iter().all(|many| *many > 50), "{outcomes:?}");
        }
    }

    /// Whoever is left serves, if it has everything and the other did not have it for
    /// good: whatever else goes wrong before and after. Two never do.
    #[test]
    fn who_is_left_serves_when_the_other_dies_at_any_moment() {
        let all = [BREAKS_AND_DELAYS, DEATHS].concat();
        for has_manager in [false, true] {
            let both = Both::new(1, has_manager);
            let mut outcomes = [0, 0, 0];
            explore(both, 2, &all, |both, suffered| {
                let Both { old, new, .. } = both;
                let serve = [old.accepts && !old.is_dead, new.accepts && !new.is_dead];
                assert_ne!(serve, [true, true], "{suffered:?}: {both:?}");
                let gave_up = suffered.contains(&Fault::NewIsLate);
                let is_news = both.has_everything && both.baton != Some("old") && !gave_up;
                if old.is_dead && !new.is_dead {
                    assert!(new.accepts || !is_news, "{suffered:?}: {both:?}");
                    assert_ne!(new.accepts, new.is_over, "{suffered:?}: {both:?}");
                } else if new.is_dead && !old.is_dead {
                    let is_gone = old.step == Offering::Done;
                    assert_ne!(old.accepts, is_gone, "{suffered:?}: {both:?}");
                    assert_eq!(old.is_over, is_gone, "{suffered:?}: {both:?}");
                }
                outcomes[serve.iter().position(|it| *it).unwrap_or(2)] += 1;
            });
            assert!(outcomes.iter().all(|many| *many > 20), "{outcomes:?}");
        }
    }

    const PATIENCE: Patience = Patience {
        answer: Duration::from_secs(1),
        ready: Duration::from_secs(1),
        manager: Duration::from_secs(1),
    };

    /// Lets the one that serves hear what it does next, from any step.
    fn offering(mut from: Offering, heard: Heard) -> (Offering, Vec<Do>) {
        let actions = from.hear(heard).to_vec();
        (from, actions)
    }

    fn taking(mut from: Taking, told: Told) -> (Taking, Vec<Act>) {
        let acts = from.hear(told);
        (from, acts)
    }

    const PARTLY_TAKEN: Offering = Offering::Taking {
        taken: 1,
        batches: 3,
    };

    const PARTLY_RECEIVED: Taking = Taking::Receiving {
        received: 1,
        batches: 3,
    };

    #[test]
    fn steps_of_the_one_that_serves_follow_each_other() {
        use Offering::{Announcing, Asked, Committed, Following, Moving, Preparing};
        let taking = |taken, batches| Offering::Taking { taken, batches };
        for (from, heard, to, actions) in [
            (Asked, Heard::Take(Ok(0)), Preparing, vec![Do::Offer]),
            (
                Asked,
                Heard::Take(Ok(2)),
                taking(0, 2),
                vec![Do::Offer, Do::Send(0)],
            ),
            (
                taking(0, 2),
                Heard::Taken(0),
                taking(1, 2),
                vec![Do::Send(1)],
            ),
            (
                taking(1, 3),
                Heard::Taken(1),
                taking(2, 3),
                vec![Do::Send(2)],
            ),
            (taking(1, 2), Heard::Taken(1), Preparing, vec![]),
            (Preparing, Heard::Ready, Moving, vec![Do::Move]),
            (Moving, Heard::Moved, Committed, vec![Do::Commit]),
            (Committed, Heard::Serving, Following, vec![Do::Move]),
            (Following, Heard::Moved, Announcing, vec![Do::Announce]),
        ] {
            assert_eq!(offering(from, heard), (to, actions), "{from:?} {heard:?}");
        }
        let last = MOST_BATCHES as u32;
        for batch in 0..last - 1 {
            let next = offering(taking(batch, last), Heard::Taken(batch));
            assert_eq!(next, (taking(batch + 1, last), vec![Do::Send(batch + 1)]));
        }
    }

    #[test]
    fn the_one_that_serves_goes_on_if_it_ends_at_any_step() {
        use Offering::{
            Announcing, Asked, Committed, Deciding, Done, Failed, Following, Moving, Preparing,
        };
        assert_eq!(offering(Asked, Heard::Lost), (Failed, vec![]));
        for heard in [Heard::Abort, Heard::TooLate, Heard::Taken(9)] {
            let answer = offering(Asked, heard);
            assert_eq!(answer, (Failed, vec![Do::HangUp]), "{heard:?}");
        }
        for (from, given) in [
            (PARTLY_TAKEN, Given::Nothing),
            (Preparing, Given::Nothing),
            (Moving, Given::Nothing),
            (Committed, Given::Listeners),
            (Following, Given::Listeners),
            (Announcing, Given::Everything),
        ] {
            for heard in [Heard::Lost, Heard::Abort, Heard::TooLate, Heard::Taken(9)] {
                let is_cut = heard == Heard::Lost;
                let deciding = Deciding { given, is_cut };
                let answer = offering(from, heard);
                assert_eq!(
                    answer,
                    (deciding, vec![Do::Decide]),
                    "{from:?} hears {heard:?}"
                );
                let goes_on = match given {
                    Given::Nothing => vec![Do::HangUp],
                    _ => vec![Do::HangUp, Do::Resume],
                };
                let answer = offering(deciding, Heard::Decided(true));
                assert_eq!(answer, (Failed, goes_on), "{from:?}");
            }
        }
        for from in [Done, Failed] {
            for heard in [Heard::Lost, Heard::Abort, Heard::Ready, Heard::Take(Ok(1))] {
                assert_eq!(offering(from, heard), (from, vec![]), "{heard:?}");
            }
        }
    }

    /// It has everything it takes to serve, and learns of it.
    #[test]
    fn the_one_that_serves_leaves_the_baton_for_a_while_if_its_own_channel_breaks() {
        use Offering::{
            Announcing, Asked, Committed, Deciding, Failed, Following, Moving, Preparing, Waiting,
        };
        for (from, given) in [
            (Preparing, Given::Nothing),
            (Moving, Given::Nothing),
            (Committed, Given::Listeners),
            (Following, Given::Listeners),
            (Announcing, Given::Everything),
        ] {
            let waits = (Waiting(given), vec![]);
            assert_eq!(offering(from, Heard::Broken), waits, "{from:?}");
            let is_cut = true;
            let decides = (Deciding { given, is_cut }, vec![Do::Decide]);
            assert_eq!(offering(Waiting(given), Heard::TooLate), decides);
            assert_eq!(offering(Waiting(given), Heard::Moved), waits, "{from:?}");
        }
        let announced = (Waiting(Given::Announced), vec![]);
        let waiting = Waiting(Given::Everything);
        assert_eq!(offering(waiting, Heard::Announced(true)), announced);
        // Those that have not.
        let (given, is_cut) = (Given::Nothing, true);
        let decides = (Deciding { given, is_cut }, vec![Do::Decide]);
        assert_eq!(offering(PARTLY_TAKEN, Heard::Broken), decides);
        assert_eq!(offering(Asked, Heard::Broken), (Failed, vec![]));
    }

    /// It has the baton, so its channel has ended, as ours is going to.
    #[test]
    fn the_one_that_serves_leaves_to_a_successor_that_has_the_baton() {
        use Offering::{Announcing, Deciding, Done, Overtaken, Yielding};
        for (given, actions) in [
            (Given::Nothing, vec![Do::Yield, Do::Announce]),
            (Given::Listeners, vec![Do::Yield, Do::Announce]),
            // The service manager is being told already, or has been.
            (Given::Everything, vec![Do::Yield]),
            (Given::Announced, vec![Do::Yield, Do::Finish, Do::Leave]),
        ] {
            let next = match given {
                Given::Announced => Done,
                _ => Yielding,
            };
            let yields = (next, actions);
            let is_cut = Deciding {
                given,
                is_cut: true,
            };
            assert_eq!(offering(is_cut, Heard::Decided(false)), yields);
            let is_open = Deciding {
                given,
                is_cut: false,
            };
            let answer = offering(is_open, Heard::Decided(false));
            assert_eq!(answer, (Overtaken(given), vec![]));
            for heard in [Heard::Lost, Heard::Broken, Heard::TooLate] {
                assert_eq!(offering(Overtaken(given), heard), yields, "{heard:?}");
            }
            // What it had said before.
            for heard in [Heard::Serving, Heard::Moved, Heard::Abort] {
                for from in [Overtaken(given), Yielding] {
                    assert_eq!(offering(from, heard), (from, vec![]), "{heard:?}");
                }
            }
        }
        let leaves = (Done, vec![Do::Finish, Do::Leave]);
        for told in [true, false] {
            assert_eq!(offering(Yielding, Heard::Announced(told)), leaves);
            let overtaken = Overtaken(Given::Everything);
            let announced = (Overtaken(Given::Announced), vec![]);
            assert_eq!(offering(overtaken, Heard::Announced(told)), announced);
        }
        assert_eq!(
            offering(Announcing, Heard::Announced(false)),
            leaves,
            "as one that has said everything"
        );
    }

    #[test]
    fn steps_of_the_one_that_takes_over_follow_each_other() {
        use Taking::{Adopting, Asking, Deciding, Done, Orphaned, Ready, Serving};
        let ready = Deciding { accepts: false };
        let serving = Deciding { accepts: true };
        let receiving = |received, batches| Taking::Receiving { received, batches };
        for (from, told, to, acts) in [
            (Asking, Told::Offer(0), Adopting, vec![Act::Adopt]),
            (Asking, Told::Offer(2), receiving(0, 2), vec![]),
            (
                receiving(0, 2),
                Told::Listeners(0),
                receiving(1, 2),
                vec![Act::Acknowledge(0)],
            ),
            (
                receiving(1, 2),
                Told::Listeners(1),
                Adopting,
                vec![Act::Acknowledge(1), Act::Adopt],
            ),
            (Adopting, Told::Adopted, Ready, vec![Act::SayReady]),
            (Ready, Told::Commit, Serving, vec![Act::SaySo, Act::Serve]),
            (Serving, Told::Done, Done, vec![Act::Finish]),
            // Whoever has everything serves, if there is nobody else.
            (Ready, Told::Lost, ready, vec![Act::Decide]),
            (Serving, Told::Lost, serving, vec![Act::Decide]),
            (Ready, Told::Broken, ready, vec![Act::Decide]),
            (Serving, Told::Broken, serving, vec![Act::Decide]),
            (Adopting, Told::Lost, Orphaned, vec![]),
            (Adopting, Told::Broken, Orphaned, vec![]),
            (Orphaned, Told::Lost, Orphaned, vec![]),
            (Orphaned, Told::Adopted, ready, vec![Act::Decide]),
            (
                ready,
                Told::Decided(true),
                Done,
                vec![Act::Serve, Act::Finish],
            ),
            (serving, Told::Decided(true), Done, vec![Act::Finish]),
        ] {
            assert_eq!(taking(from, told), (to, acts), "{from:?} {told:?}");
        }
    }

    #[test]
    fn one_that_looks_takes_over_starts_cold_or_looks_again() {
        use Taking::{Alone, Asking, Done, Failed, Looking, Resting, Settling};
        let rests = (Resting, vec![Act::Rest]);
        for (from, told, to, acts) in [
            (Looking, Told::Found, Asking, vec![Act::Ask]),
            (Looking, Told::Nobody, Settling, vec![Act::Settle]),
            (Settling, Told::Settled(true), Alone, vec![Act::StartCold]),
            (Alone, Told::Adopted, Done, vec![]),
            (Alone, Told::NotAdopted, Failed, vec![]),
            (Resting, Told::Rested(true), Looking, vec![Act::Look]),
            (Resting, Told::Rested(false), Failed, vec![Act::Fail]),
            (Looking, Told::Cannot, Failed, vec![Act::Fail]),
            (Settling, Told::Cannot, Failed, vec![Act::Fail]),
        ] {
            assert_eq!(taking(from, told), (to, acts), "{from:?} {told:?}");
        }
        for (from, told) in [
            (Looking, Told::Lost),
            (Settling, Told::Settled(false)),
            (Asking, Told::Lost),
            (PARTLY_RECEIVED, Told::Lost),
            (Asking, Told::Refused(Refusal::Busy)),
            (Asking, Told::Refused(Refusal::NotServing)),
            (PARTLY_RECEIVED, Told::Refused(Refusal::NotServing)),
        ] {
            assert_eq!(taking(from, told), rests, "{from:?} {told:?}");
        }
        // Nothing that is told late begins anything.
        for from in [Resting, Alone] {
            for told in [Told::Lost, Told::Abort, Told::Offer(1), Told::TooLate] {
                assert_eq!(taking(from, told), (from, vec![]), "{from:?} {told:?}");
            }
        }
    }

    #[test]
    fn the_one_that_takes_over_lets_go_if_it_ends_at_any_step() {
        use Taking::{Adopting, Asking, Deciding, Done, Failed, Orphaned, Ready, Serving};
        let gives_up = (Failed, vec![Act::HangUp, Act::Fail]);
        for from in [Asking, PARTLY_RECEIVED, Adopting, Orphaned, Ready] {
            for told in [Told::Abort, Told::TooLate, Told::NotAdopted, Told::Done] {
                assert_eq!(taking(from, told), gives_up, "{from:?} {told:?}");
            }
        }
        for from in [Asking, PARTLY_RECEIVED] {
            let gone = taking(from, Told::Broken);
            assert_eq!(gone, (Failed, vec![Act::Fail]), "{from:?}");
        }
        for (accepts, acts) in [
            (false, vec![Act::Fail]),
            (true, vec![Act::Withdraw, Act::Fail]),
        ] {
            let lost = taking(Deciding { accepts }, Told::Decided(false));
            assert_eq!(lost, (Failed, acts));
        }
        assert_eq!(
            taking(Asking, Told::Refused(Refusal::Format)),
            (Failed, vec![Act::Fail]),
            "the other has hung up"
        );
        assert_eq!(
            taking(Serving, Told::Abort),
            (Failed, vec![Act::Withdraw, Act::HangUp, Act::Fail])
        );
        for from in [Done, Failed] {
            for told in [Told::Lost, Told::Abort, Told::Commit] {
                assert_eq!(taking(from, told), (from, vec![]), "{told:?}");
            }
        }
    }

    #[test]
    fn steps_that_wait_for_the_other_have_a_limit() {
        use Offering::{
            Announcing, Asked, Committed, Deciding, Done, Failed, Following, Moving, Overtaken,
            Parting, Preparing, Waiting, Yielding,
        };
        let given = Given::Nothing;
        let is_cut = true;
        let deciding = Deciding { given, is_cut };
        let limits = Patience {
            answer: Duration::from_secs(1),
            ready: Duration::from_secs(2),
            manager: Duration::from_secs(3),
        };
        let waiting = Waiting(given);
        for step in [Asked, PARTLY_TAKEN, Committed, waiting, Overtaken(given)] {
            assert_eq!(step.patience(limits), Some(limits.answer), "{step:?}");
        }
        assert_eq!(Preparing.patience(limits), Some(limits.ready));
        let parting = limits.manager + limits.answer;
        assert_eq!(Parting.patience(limits), Some(parting));
        for step in [
            Moving, Following, Announcing, deciding, Yielding, Done, Failed,
        ] {
            assert_eq!(step.patience(limits), None, "{step:?}");
        }
        let all = [
            Asked,
            PARTLY_TAKEN,
            Preparing,
            Moving,
            Committed,
            Following,
            Announcing,
            Parting,
            waiting,
            deciding,
            Overtaken(given),
            Yielding,
            Done,
            Failed,
        ];
        let wanted = [Moving, Following];
        assert!(all.iter().all(|it| it.is_moving() == wanted.contains(it)));
        let wanted = [Done, Failed];
        assert!(all.iter().all(|it| it.is_over() == wanted.contains(it)));
        for step in [Taking::Asking, PARTLY_RECEIVED, Taking::Ready] {
            assert_eq!(step.patience(limits), Some(limits.answer), "{step:?}");
        }
        for step in [
            Taking::Looking,
            Taking::Settling,
            Taking::Resting,
            Taking::Alone,
            Taking::Adopting,
            Taking::Orphaned,
            Taking::Serving,
            Taking::Deciding { accepts: true },
            Taking::Done,
            Taking::Failed,
        ] {
            assert_eq!(step.patience(limits), None, "{step:?}");
        }
        let receiving = [
            Taking::Asking,
            PARTLY_RECEIVED,
            Taking::Adopting,
            Taking::Orphaned,
            Taking::Ready,
            Taking::Serving,
            Taking::Done,
            Taking::Failed,
        ]
        .map(Taking::is_receiving);
        assert_eq!(
            receiving,
            [false, false, false, false, true, true, false, false]
        );
    }

    #[test]
    fn refusal_says_why_and_leaves_the_old_one_alone() {
        for refusal in [Refusal::Busy, Refusal::Format, Refusal::NotServing] {
            let mut old = Offering::Asked;
            assert_eq!(old.hear(Heard::Take(Err(refusal))), [Do::Refuse(refusal)]);
            assert_eq!(old.hear(Heard::Ready), []);
        }
        let mut new = Taking::Asking;
        assert_eq!(new.hear(Told::Refused(Refusal::Format)), [Act::Fail]);
    }

    /// It has everything: nothing that happens then is taken back.
    #[test]
    fn manager_is_told_before_the_successor_and_left_after_it() {
        use Offering::{Announcing, Done, Following, Parting};
        let step = |from: Offering, heard| {
            let mut machine = from;
            let actions = machine.hear(heard).to_vec();
            (machine, actions)
        };
        assert_eq!(
            step(Following, Heard::Moved),
            (Announcing, vec![Do::Announce])
        );
        assert_eq!(
            step(Announcing, Heard::Announced(true)),
            (Parting, vec![Do::Finish])
        );
        // Nobody is to be told.
        assert_eq!(
            step(Announcing, Heard::Announced(false)),
            (Done, vec![Do::Finish, Do::Leave])
        );
        for heard in [Heard::Parted, Heard::Lost, Heard::TooLate, Heard::Abort] {
            assert_eq!(step(Parting, heard), (Done, vec![Do::Leave]), "{heard:?}");
        }
    }

    #[test]
    fn what_has_no_business_here_ends_it() {
        let mut old = Offering::Taking {
            taken: 1,
            batches: 3,
        };
        assert_eq!(old.hear(Heard::Taken(2)), [Do::Decide]);
        let mut old = Offering::Preparing;
        assert_eq!(old.hear(Heard::Serving), [Do::Decide]);
        let mut old = Offering::Moving;
        assert_eq!(old.hear(Heard::Ready), [Do::Decide]);
        let mut old = Offering::Following;
        assert_eq!(old.hear(Heard::Ready), [Do::Decide]);
        let mut new = Taking::Receiving {
            received: 0,
            batches: 2,
        };
        assert_eq!(new.hear(Told::Listeners(1)), [Act::HangUp, Act::Fail]);
        let mut new = Taking::Serving;
        assert_eq!(
            new.hear(Told::Offer(1)),
            [Act::Withdraw, Act::HangUp, Act::Fail]
        );
    }
}
