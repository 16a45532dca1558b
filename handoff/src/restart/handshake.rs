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
    /// Everything is said.
    Done,
    /// Ended without.
    Failed,
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
    /// The channel is gone.
    Lost,
    /// The present step took too long.
    TooLate,
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
            Announcing, Asked, Committed, Done, Failed, Following, Moving, Parting, Preparing,
            Taking,
        };
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
            // Nobody to hang up on.
            (Committed | Following | Announcing, Heard::Lost) => (Failed, &[Do::Resume]),
            (_, Heard::Lost) => (Failed, &[]),
            (Committed | Following | Announcing, _) => (Failed, &[Do::HangUp, Do::Resume]),
            _ => (Failed, &[Do::HangUp]),
        };
        *self = next;
        actions
    }

    /// How long the present step may take; moving has deadlines of its own.
    pub(crate) fn patience(self, patience: Patience) -> Option<Duration> {
        match self {
            Self::Asked | Self::Taking { .. } | Self::Committed => Some(patience.answer),
            Self::Preparing => Some(patience.ready),
            Self::Parting => Some(patience.manager + patience.answer),
            // Announcing has a limit of its own.
            Self::Moving | Self::Following | Self::Announcing | Self::Done | Self::Failed => None,
        }
    }

    /// Whether connections move.
    pub(crate) fn is_moving(self) -> bool {
        matches!(self, Self::Moving | Self::Following)
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
    /// Has asked.
    Asking,
    /// Takes listeners: so many batches are here, of so many.
    Receiving { received: u32, batches: u32 },
    /// Adopts and binds.
    Adopting,
    /// The same, and the predecessor has died meanwhile.
    Orphaned,
    /// Has said `Ready`; connections arrive.
    Ready,
    /// Serves; more connections arrive.
    Serving,
    /// The predecessor has nothing more.
    Done,
    /// Ended without.
    Failed,
}

/// What happened, as the one that takes over sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
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
    /// The channel is gone, without any of these before: the predecessor has died.
    Lost,
    /// The present step took too long.
    TooLate,
}

/// What the one that takes over does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
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
        use Taking::{Adopting, Asking, Done, Failed, Orphaned, Ready, Receiving, Serving};
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
            // The predecessor has died, and it is all here: nobody else is going to
            // serve.
            (Ready, Told::Lost) | (Orphaned, Told::Adopted) => (Done, &[Act::Serve, Act::Finish]),
            (Serving, Told::Lost) => (Done, &[Act::Finish]),
            // Not yet for us to know what the program makes of it.
            (Adopting | Orphaned, Told::Lost) => (Orphaned, &[]),
            (Serving, _) => (Failed, &[Act::Withdraw, Act::HangUp, Act::Fail]),
            (_, Told::Lost) => (Failed, &[Act::Fail]),
            _ => (Failed, &[Act::HangUp, Act::Fail]),
        };
        *self = next;
        acts.to_vec()
    }

    /// How long the present step may take. While it is ready the predecessor may
    /// have its reasons; while it serves, it serves.
    pub(crate) fn patience(self, patience: Patience) -> Option<Duration> {
        match self {
            Self::Asking | Self::Receiving { .. } | Self::Ready => Some(patience.answer),
            Self::Adopting | Self::Orphaned | Self::Serving | Self::Done | Self::Failed => None,
        }
    }

    /// Whether connections may come.
    pub(crate) fn is_receiving(self) -> bool {
        matches!(self, Self::Ready | Self::Serving)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both machines, and what is on its way between them.
    #[derive(Clone)]
    struct Both {
        old: Offering,
        new: Taking,
        old_accepts: bool,
        new_accepts: bool,
        new_failed: bool,
        finished: bool,
        has_left: bool,
        to_old: Vec<Heard>,
        to_new: Vec<Told>,
    }

    impl Both {
        fn new(batches: u32) -> Self {
            Self {
                old: Offering::Asked,
                new: Taking::Asking,
                old_accepts: true,
                new_accepts: false,
                new_failed: false,
                finished: false,
                has_left: false,
                to_old: vec![Heard::Take(Ok(batches))],
                to_new: Vec::new(),
            }
        }

        fn old_hears(&mut self, heard: Heard, batches: u32) {
            for action in self.old.hear(heard) {
                match *action {
                    Do::Refuse(refusal) => self.to_new.push(Told::Refused(refusal)),
                    Do::Offer => self.to_new.push(Told::Offer(batches)),
                    Do::Send(batch) => self.to_new.push(Told::Listeners(batch)),
                    Do::Commit => {
                        self.old_accepts = false;
                        self.to_new.push(Told::Commit);
                    }
                    Do::Move => self.to_old.push(Heard::Moved),
                    Do::Finish => {
                        self.finished = true;
                        self.to_new.push(Told::Done);
                    }
                    Do::Announce => self.to_old.push(Heard::Announced(true)),
                    Do::Leave => self.has_left = true,
                    Do::Resume => self.old_accepts = true,
                    Do::HangUp => self.to_new.push(Told::Abort),
                }
            }
        }

        fn new_hears(&mut self, told: Told) {
            for act in self.new.hear(told) {
                match act {
                    Act::Acknowledge(batch) => self.to_old.push(Heard::Taken(batch)),
                    Act::Adopt => self.to_new.push(Told::Adopted),
                    Act::SayReady => self.to_old.push(Heard::Ready),
                    Act::SaySo => self.to_old.push(Heard::Serving),
                    Act::Serve => self.new_accepts = true,
                    Act::Withdraw => self.new_accepts = false,
                    Act::HangUp => self.to_old.push(Heard::Abort),
                    Act::Fail => self.new_failed = true,
                    Act::Finish => self.to_old.push(Heard::Parted),
                }
            }
        }

        /// One message is delivered; false when none is on its way.
        fn step(&mut self, batches: u32) -> bool {
            if !self.to_new.is_empty() {
                let told = self.to_new.remove(0);
                self.new_hears(told);
            } else if !self.to_old.is_empty() {
                let heard = self.to_old.remove(0);
                self.old_hears(heard, batches);
            } else {
                return false;
            }
            true
        }

        fn settle(&mut self, batches: u32) {
            while self.step(batches) {}
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
            let mut both = Both::new(batches);
            both.settle(batches);
            assert_eq!((both.old, both.new), (Offering::Done, Taking::Done));
            assert!(both.new_accepts && !both.old_accepts && both.finished && both.has_left);
        }
    }

    /// Cuts the story after each step, in each of the ways that it can end.
    #[test]
    fn somebody_accepts_however_it_ends() {
        for batches in [0, 3] {
            for after in 0..40 {
                let mut both = Both::new(batches);
                for _ in 0..after {
                    both.step(batches);
                }

                // The new one dies; what it said before is still heard.
                let mut dead = both.clone();
                dead.to_new.clear();
                dead.to_old.push(Heard::Lost);
                while !dead.to_old.is_empty() {
                    let heard = dead.to_old.remove(0);
                    dead.old_hears(heard, batches);
                    dead.to_new.clear();
                }
                // Died after everything was handed over: another story.
                assert!(dead.old_accepts || dead.finished, "{after}: {:?}", dead.old);

                // The old one dies.
                let mut dead = both.clone();
                dead.to_old.clear();
                dead.to_new.push(Told::Lost);
                while !dead.to_new.is_empty() {
                    let told = dead.to_new.remove(0);
                    dead.new_hears(told);
                    dead.to_old.clear();
                }
                assert!(
                    dead.new_accepts || dead.new_failed,
                    "{after}: {:?}",
                    dead.new
                );

                // Either loses its patience, and the other learns of it.
                let mut late = both.clone();
                late.old_hears(Heard::TooLate, batches);
                late.settle(batches);
                assert!(
                    late.old_accepts != late.new_accepts,
                    "{after}: {:?}",
                    late.old
                );
                let mut late = both.clone();
                if late.new.patience(PATIENCE).is_some() {
                    late.new_hears(Told::TooLate);
                    late.settle(batches);
                    assert!(
                        late.old_accepts && !late.new_accepts,
                        "{after}: {:?}",
                        late.new
                    );
                }
            }
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
        use Offering::{Asked, Committed, Done, Failed, Following, Moving, Preparing};
        for from in [Asked, PARTLY_TAKEN, Preparing, Moving] {
            assert_eq!(offering(from, Heard::Lost), (Failed, vec![]), "{from:?}");
            for heard in [Heard::Abort, Heard::TooLate, Heard::Taken(9)] {
                let answer = offering(from, heard);
                assert_eq!(answer, (Failed, vec![Do::HangUp]), "{from:?} {heard:?}");
            }
        }
        for from in [Committed, Following] {
            let resumed = offering(from, Heard::Lost);
            assert_eq!(resumed, (Failed, vec![Do::Resume]), "{from:?}");
            for heard in [Heard::Abort, Heard::TooLate, Heard::Ready] {
                let answer = offering(from, heard);
                let wanted = (Failed, vec![Do::HangUp, Do::Resume]);
                assert_eq!(answer, wanted, "{from:?} {heard:?}");
            }
        }
        for from in [Done, Failed] {
            for heard in [Heard::Lost, Heard::Abort, Heard::Ready, Heard::Take(Ok(1))] {
                assert_eq!(offering(from, heard), (from, vec![]), "{heard:?}");
            }
        }
    }

    #[test]
    fn steps_of_the_one_that_takes_over_follow_each_other() {
        use Taking::{Adopting, Asking, Done, Orphaned, Ready, Serving};
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
            (Ready, Told::Lost, Done, vec![Act::Serve, Act::Finish]),
            (Serving, Told::Lost, Done, vec![Act::Finish]),
            (Adopting, Told::Lost, Orphaned, vec![]),
            (Orphaned, Told::Lost, Orphaned, vec![]),
            (Orphaned, Told::Adopted, Done, vec![Act::Serve, Act::Finish]),
        ] {
            assert_eq!(taking(from, told), (to, acts), "{from:?} {told:?}");
        }
    }

    #[test]
    fn the_one_that_takes_over_lets_go_if_it_ends_at_any_step() {
        use Taking::{Adopting, Asking, Done, Failed, Orphaned, Ready, Serving};
        let gives_up = (Failed, vec![Act::HangUp, Act::Fail]);
        for from in [Asking, PARTLY_RECEIVED, Adopting, Orphaned, Ready] {
            for told in [Told::Abort, Told::TooLate, Told::NotAdopted, Told::Done] {
                assert_eq!(taking(from, told), gives_up, "{from:?} {told:?}");
            }
        }
        for from in [Asking, PARTLY_RECEIVED] {
            let gone = taking(from, Told::Lost);
            assert_eq!(gone, (Failed, vec![Act::Fail]), "{from:?}");
        }
        assert_eq!(
            taking(Asking, Told::Refused(Refusal::Busy)),
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
            Announcing, Asked, Committed, Done, Failed, Following, Moving, Parting, Preparing,
        };
        let limits = Patience {
            answer: Duration::from_secs(1),
            ready: Duration::from_secs(2),
            manager: Duration::from_secs(3),
        };
        for step in [Asked, PARTLY_TAKEN, Committed] {
            assert_eq!(step.patience(limits), Some(limits.answer), "{step:?}");
        }
        assert_eq!(Preparing.patience(limits), Some(limits.ready));
        let parting = limits.manager + limits.answer;
        assert_eq!(Parting.patience(limits), Some(parting));
        for step in [Moving, Following, Announcing, Done, Failed] {
            assert_eq!(step.patience(limits), None, "{step:?}");
        }
        let moving = [
            Asked,
            PARTLY_TAKEN,
            Preparing,
            Moving,
            Committed,
            Following,
            Announcing,
            Parting,
            Done,
            Failed,
        ]
        .map(Offering::is_moving);
        let wanted = [3, 5].map(|place| place as usize);
        assert!((0..moving.len()).all(|place| moving[place] == wanted.contains(&place)));
        for step in [Taking::Asking, PARTLY_RECEIVED, Taking::Ready] {
            assert_eq!(step.patience(limits), Some(limits.answer), "{step:?}");
        }
        for step in [
            Taking::Adopting,
            Taking::Orphaned,
            Taking::Serving,
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
        use Offering::{Announcing, Done, Failed, Following, Parting};
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
        assert_eq!(step(Announcing, Heard::Lost), (Failed, vec![Do::Resume]));
        assert_eq!(
            step(Announcing, Heard::Abort),
            (Failed, vec![Do::HangUp, Do::Resume])
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
        assert_eq!(old.hear(Heard::Taken(2)), [Do::HangUp]);
        let mut old = Offering::Preparing;
        assert_eq!(old.hear(Heard::Serving), [Do::HangUp]);
        let mut old = Offering::Moving;
        assert_eq!(old.hear(Heard::Ready), [Do::HangUp]);
        let mut old = Offering::Following;
        assert_eq!(old.hear(Heard::Ready), [Do::HangUp, Do::Resume]);
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
