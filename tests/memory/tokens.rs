//! Names of descriptors: whatever was closed and replaced inside of a batch of
//! events, each event reaches the descriptor that it is for, or none.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bowline::Reactor;
use bowline::descriptor::{Descriptor, Next, Readiness, Token};
use bowline::testing::{Random, ReadinessSource};

use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures, scaled};

/// How many descriptors are registered at a time: few, so that their slots are
/// reused all the time.
const DESCRIPTORS: usize = 40;
/// How many events come at once: most descriptors have several, and most of
/// those that go have events left.
const BATCH: usize = 100;
/// How long names of descriptors that are gone go on being reported, as those
/// of sockets are that another process holds.
const REMEMBERED: usize = 200;

/// What is going on, and what should.
struct World {
    random: Random,
    alive: Vec<Token>,
    gone: VecDeque<Token>,
    /// The events of this turn that have not come yet.
    coming: VecDeque<Token>,
    /// Those that asked for a turn by themselves; their events come with it.
    again: HashSet<Token>,
    events: usize,
    delivered: usize,
    for_nobody: usize,
    misdelivered: usize,
}

impl World {
    /// Whether the event that comes next is for this one; those for
    /// descriptors that are gone come to nobody.
    fn is_next(&mut self, token: Token) -> bool {
        if self.again.contains(&token) {
            // These turns come after the events; what came for it is latched.
            while let Some(next) = self.coming.pop_front() {
                self.skip(next);
            }
            return self.again.remove(&token);
        }
        while let Some(next) = self.coming.pop_front() {
            if next == token {
                return true;
            }
            self.skip(next);
        }
        false
    }

    fn skip(&mut self, token: Token) {
        if self.again.contains(&token) {
            self.delivered += 1;
        } else if self.alive.contains(&token) {
            self.misdelivered += 1;
        } else {
            self.for_nobody += 1;
        }
    }

    fn forget(&mut self, token: Token) {
        self.alive.retain(|alive| *alive != token);
        self.again.remove(&token);
        self.gone.push_back(token);
        if self.gone.len() > REMEMBERED {
            self.gone.pop_front();
        }
    }
}

struct Numbered {
    token: Token,
    world: Rc<RefCell<World>>,
}

impl Numbered {
    fn register(reactor: &mut Reactor, world: &Rc<RefCell<World>>) {
        let vacancy = reactor.vacancy().expect("a slot");
        let token = vacancy.token();
        let world = Rc::clone(world);
        world.borrow_mut().alive.push(token);
        vacancy.install(Box::new(Self { token, world }));
    }
}

impl Descriptor for Numbered {
    fn ready(&mut self, reactor: &mut Reactor, _: Readiness) -> Next {
        let mut world = self.world.borrow_mut();
        if world.is_next(self.token) {
            world.delivered += 1;
        } else {
            world.misdelivered += 1;
        }
        let choice = world.random.below(10);
        match choice {
            // Another one goes, with the events that it has left.
            0..=2 => {
                let alive = world.alive.len();
                let victim = world.random.below(alive);
                let victim = world.alive[victim];
                if victim != self.token {
                    reactor.remove(victim);
                    world.forget(victim);
                    drop(world);
                    Self::register(reactor, &self.world);
                }
            }
            // This one goes.
            3 => {
                world.forget(self.token);
                drop(world);
                Self::register(reactor, &self.world);
                return Next::Remove;
            }
            4 if !world.again.contains(&self.token) => {
                world.again.insert(self.token);
                return Next::Again;
            }
            _ => {}
        }
        Next::Keep
    }

    fn facet(&mut self) -> &mut dyn Any {
        self
    }
}

/// Reports events for those that are there and for those that were.
struct Source(Rc<RefCell<World>>);

impl ReadinessSource for Source {
    fn poll(&mut self, events: &mut Vec<(Token, Readiness)>) {
        let world = &mut *self.0.borrow_mut();
        for _ in 0..BATCH {
            let is_stale = !world.gone.is_empty() && world.random.chance(30);
            let token = if is_stale {
                world.gone[world.random.below(world.gone.len())]
            } else {
                world.alive[world.random.below(world.alive.len())]
            };
            events.push((token, Readiness::READABLE));
            world.coming.push_back(token);
        }
        world.events += BATCH;
    }

    fn has_events(&self) -> bool {
        true
    }
}

/// Reliability T-22: descriptors close and replace each other inside of the
/// batch that holds their events; none reaches a newer occupant of a slot.
#[test]
fn event_reaches_the_descriptor_it_is_for_or_none() {
    let ledger = DescriptorLedger::open();
    let all = scaled(1_000_000, 10_000_000);
    let mut reactor = Reactor::new().unwrap();
    let world = Rc::new(RefCell::new(World {
        random: Random::new(22),
        alive: Vec::new(),
        gone: VecDeque::new(),
        coming: VecDeque::new(),
        again: HashSet::new(),
        events: 0,
        delivered: 0,
        for_nobody: 0,
        misdelivered: 0,
    }));
    for _ in 0..DESCRIPTORS {
        Numbered::register(&mut reactor, &world);
    }
    reactor.set_readiness_source(Source(Rc::clone(&world)));
    while world.borrow().events < all {
        reactor.turn(Some(Duration::ZERO));
        // What has not come by now comes to nobody.
        let world = &mut *world.borrow_mut();
        while let Some(left) = world.coming.pop_front() {
            world.skip(left);
        }
        assert_eq!(world.alive.len(), DESCRIPTORS);
    }
    {
        let world = world.borrow();
        // Those that were latched for one that went before its turn are not told apart.
        assert!(reactor.statistics().stale_events as usize <= world.for_nobody);
        Figures::of("T-22")
            .must("events", world.events, Bound::AtLeast, all)
            .must(
                "events of descriptors that were gone",
                world.for_nobody,
                Bound::AtLeast,
                all / 10,
            )
            .must("misdelivered", world.misdelivered, Bound::Exactly, 0);
    }
    drop(reactor);
    ledger.assert_balanced();
}
