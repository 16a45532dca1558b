use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

/// Descriptors to be queued, told apart by their numbers.
struct Supply {
    all: Vec<Rc<OwnedFd>>,
    next: usize,
}

impl Supply {
    fn new(count: usize) -> Self {
        let open = |_| Rc::new(File::open("/dev/null").expect("it is there").into());
        Self {
            all: (0..count).map(open).collect(),
            next: 0,
        }
    }

    fn left(&self) -> usize {
        self.all.len() - self.next
    }

    fn take(&mut self) -> (i32, PassedDescriptor) {
        let fd = &self.all[self.next];
        self.next += 1;
        (fd.as_raw_fd(), PassedDescriptor::shared(fd))
    }

    /// Whether nobody else holds any of them.
    fn is_all_that_is_left(&self) -> bool {
        self.all.iter().all(|fd| Rc::strong_count(fd) == 1)
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Write(usize),
    Push(usize),
    PushExact {
        bytes: usize,
        descriptors: usize,
    },
    /// One call, of which the kernel takes so many bytes at the most.
    Send {
        per_message: usize,
        taken: usize,
    },
    Refuse,
    /// All that waits goes on in another queue, as it does with a connection
    /// that is moved.
    Move,
}

fn operation() -> impl Strategy<Value = Operation> {
    let bytes = prop_oneof![4 => 1..6usize, 1 => 1..200usize];
    let descriptors = prop_oneof![4 => 1..4usize, 1 => 1..12usize];
    let per_message = prop_oneof![Just(1usize), Just(2), Just(3), Just(64)];
    let taken = prop_oneof![1 => 1..4usize, 1 => 1..50usize, 2 => Just(usize::MAX)];
    prop_oneof![
        3 => bytes.clone().prop_map(Operation::Write),
        3 => descriptors.clone().prop_map(Operation::Push),
        2 => (bytes, descriptors)
            .prop_map(|(bytes, descriptors)| Operation::PushExact { bytes, descriptors }),
        5 => (per_message, taken)
            .prop_map(|(per_message, taken)| Operation::Send { per_message, taken }),
        1 => Just(Operation::Refuse),
        1 => Just(Operation::Move),
    ]
}

/// A descriptor as the model knows it.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    name: i32,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// Leaves in a call that begins between these two positions.
    Floating {
        from: u64,
        claim: u64,
    },
    Exact {
        start: u64,
        end: u64,
    },
}

/// Byte by byte and descriptor by descriptor.
#[derive(Default)]
struct Model {
    sent: u64,
    written: u64,
    waiting: VecDeque<Waiting>,
    exact_end: u64,
    /// Where the last message that has begun to leave with its descriptors ends.
    begun_end: u64,
}

impl Model {
    /// The byte that one more floating descriptor would claim.
    fn next_claim(&self) -> u64 {
        let mut claim = self.sent.max(self.exact_end);
        for waiting in self.waiting.iter().rev() {
            match waiting.place {
                Place::Floating { .. } => claim += 1,
                Place::Exact { .. } => break,
            }
        }
        claim
    }

    /// Whether every floating descriptor has a byte.
    fn is_settled(&self) -> bool {
        let is_waiting = self
            .waiting
            .back()
            .is_some_and(|last| matches!(last.place, Place::Floating { .. }));
        !is_waiting || self.next_claim() <= self.written
    }

    /// Checks one plan, and does what it says with `taken` of its bytes.
    fn send(&mut self, plan: Plan, names: &[i32], per_message: usize, taken: usize) {
        let unsent = (self.written - self.sent) as usize;
        assert!(
            (1..=unsent).contains(&plan.bytes),
            "no progress, or too far"
        );
        assert_eq!(plan.descriptors, names.len());
        let planned_end = self.sent + plan.bytes as u64;
        let mut floating = 0;
        let mut group = None;
        for name in names {
            let first = self.waiting.pop_front().expect("more than were queued");
            assert_eq!(first.name, *name, "out of order");
            match first.place {
                Place::Floating { from, claim } => {
                    floating += 1;
                    assert!(self.sent >= from, "inside an exact message before it");
                    assert!(self.sent <= claim, "later than the byte it claimed");
                }
                Place::Exact { start, end } => {
                    assert_eq!(self.sent, start, "not on the first byte");
                    assert!(planned_end <= end, "with bytes that came later");
                    group = Some(start);
                    self.begun_end = end;
                }
            }
        }
        assert!(floating == 0 || group.is_none(), "a group travels alone");
        assert!(floating <= per_message.min(plan.bytes));
        for waiting in &self.waiting {
            match waiting.place {
                Place::Exact { start, .. } => {
                    assert_ne!(Some(start), group, "a group was split");
                    assert!(planned_end <= start, "earlier bytes go by themselves");
                }
                Place::Floating { claim, .. } => {
                    assert!(planned_end <= claim, "its byte left without it");
                }
            }
        }
        self.sent += plan.bytes.min(taken) as u64;
    }
}

fn names(queue: &DescriptorQueue, count: usize) -> Vec<i32> {
    let (front, back) = queue.first(count);
    let first = front.iter().chain(back);
    first.map(|it| it.as_fd().as_raw_fd()).collect()
}

fn send(queue: &mut DescriptorQueue, model: &mut Model, per_message: usize, taken: usize) {
    let unsent = (model.written - model.sent) as usize;
    if unsent == 0 {
        return;
    }
    let plan = queue.plan(model.sent, unsent, per_message);
    model.send(plan, &names(queue, plan.descriptors), per_message, taken);
    queue.sent(plan.descriptors);
}

fn run(supply: &mut Supply, operations: Vec<Operation>) {
    supply.next = 0;
    let mut queue = DescriptorQueue::default();
    let mut model = Model::default();
    for operation in operations {
        match operation {
            Operation::Write(bytes) => model.written += bytes as u64,
            Operation::Push(count) => {
                for _ in 0..count.min(supply.left()) {
                    let (name, descriptor) = supply.take();
                    let claim = model.next_claim();
                    let from = model.exact_end;
                    model.waiting.push_back(Waiting {
                        name,
                        place: Place::Floating { from, claim },
                    });
                    queue.push(descriptor);
                }
            }
            Operation::PushExact { bytes, descriptors } => {
                let is_settled = queue.is_settled(model.sent, model.written);
                assert_eq!(is_settled, model.is_settled());
                let count = descriptors.min(supply.left());
                if !is_settled || count == 0 {
                    continue;
                }
                let start = model.written;
                let end = start + bytes as u64;
                let mut group = Vec::new();
                for _ in 0..count {
                    let (name, descriptor) = supply.take();
                    group.push(descriptor);
                    model.waiting.push_back(Waiting {
                        name,
                        place: Place::Exact { start, end },
                    });
                }
                queue.push_exact(start, end, group);
                model.exact_end = end;
                model.written = end;
            }
            Operation::Send { per_message, taken } => {
                send(&mut queue, &mut model, per_message, taken);
            }
            Operation::Refuse => {
                let unsent = (model.written - model.sent) as usize;
                if unsent > 0 {
                    let plan = queue.plan(model.sent, unsent, 64);
                    assert_eq!(plan, queue.plan(model.sent, unsent, 64));
                }
            }
            Operation::Move => {
                let taken = queue.take(model.sent);
                check_taken(&taken, &model);
                assert!(queue.is_empty());
                queue = DescriptorQueue::default();
                queue.restore(model.sent, taken);
            }
        }
        assert_eq!(queue.len(), model.waiting.len());
        assert_eq!(queue.is_empty(), model.waiting.is_empty());
        let expected: Vec<i32> = model.waiting.iter().map(|it| it.name).collect();
        assert_eq!(names(&queue, queue.len()), expected);
    }
    match supply.next % 3 {
        0 => {
            // With a byte for each, all of them leave.
            model.written += model.waiting.len() as u64;
            while model.sent < model.written {
                send(&mut queue, &mut model, 64, usize::MAX);
            }
            assert!(queue.is_empty());
        }
        1 => assert_eq!(queue.take_all().len(), model.waiting.len()),
        _ => check_taken(&queue.take(model.sent), &model),
    }
    assert!(queue.is_empty() && queue.is_settled(model.sent, model.written));
    assert!(supply.is_all_that_is_left(), "everything is closed");
}

/// What is taken out says the same as the model, in offsets.
fn check_taken(taken: &[UnsentDescriptors], model: &Model) {
    let without: Vec<_> = taken
        .iter()
        .filter(|unsent| unsent.descriptors.is_empty())
        .map(|unsent| unsent.message.clone())
        .collect();
    let left = model.begun_end.saturating_sub(model.sent) as usize;
    let begun = (left > 0).then_some(Some(0..left));
    assert_eq!(
        without,
        Vec::from_iter(begun),
        "of a message that has begun"
    );

    let mut flat = Vec::new();
    for unsent in taken {
        for descriptor in &unsent.descriptors {
            let message = unsent.message.clone();
            flat.push((descriptor.as_fd().as_raw_fd(), message));
        }
    }
    let expected: Vec<_> = model
        .waiting
        .iter()
        .map(|waiting| match waiting.place {
            Place::Floating { .. } => (waiting.name, None),
            Place::Exact { start, end } => {
                let offset = |position: u64| (position - model.sent) as usize;
                (waiting.name, Some(offset(start)..offset(end)))
            }
        })
        .collect();
    assert_eq!(flat, expected);
}

#[test]
fn descriptors_keep_to_their_bytes_in_any_list_of_operations() {
    let mut supply = Supply::new(200);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        cases: 500,
        ..ProptestConfig::default()
    });
    let supply = std::cell::RefCell::new(&mut supply);
    runner
        .run(&prop::collection::vec(operation(), 1..80), |operations| {
            run(&mut supply.borrow_mut(), operations);
            Ok(())
        })
        .unwrap();
}

#[test]
fn batch_takes_one_byte_for_each_descriptor_and_leaves_the_others_theirs() {
    let mut supply = Supply::new(5);
    let mut queue = DescriptorQueue::default();
    for _ in 0..5 {
        queue.push(supply.take().1);
    }
    let plan = queue.plan(0, 100, 2);
    assert_eq!((plan.bytes, plan.descriptors), (2, 2));
    queue.sent(2);
    let plan = queue.plan(2, 98, 64);
    assert_eq!((plan.bytes, plan.descriptors), (98, 3));
}

#[test]
fn descriptors_without_a_byte_wait_for_one() {
    let mut supply = Supply::new(3);
    let mut queue = DescriptorQueue::default();
    for _ in 0..3 {
        queue.push(supply.take().1);
    }
    let plan = queue.plan(0, 1, 64);
    assert_eq!((plan.bytes, plan.descriptors), (1, 1));
    queue.sent(1);
    assert_eq!(queue.len(), 2);
    assert!(!queue.is_settled(1, 1));
    assert!(!queue.is_settled(1, 2));
    assert!(queue.is_settled(1, 3));
}

#[test]
fn queue_of_a_burst_keeps_its_memory() {
    let fd = Rc::new(File::open("/dev/null").expect("it is there").into());
    for (count, is_kept) in [(2 * MOST_KEPT, true), (2 * MOST_KEPT + 1, false)] {
        let mut queue = DescriptorQueue {
            descriptors: VecDeque::with_capacity(count),
            ..DescriptorQueue::default()
        };
        queue.push(PassedDescriptor::shared(&fd));
        queue.sent(1);
        let kept = if is_kept { count } else { 0 };
        assert_eq!(queue.descriptors.capacity(), kept);
    }
}

#[test]
fn long_queue_gives_its_memory_back() {
    let fd = Rc::new(File::open("/dev/null").expect("it is there").into());
    let mut queue = DescriptorQueue::default();
    for _ in 0..10_000 {
        queue.push(PassedDescriptor::shared(&fd));
    }
    queue.sent(9_999);
    assert!(queue.descriptors.capacity() >= 10_000);
    queue.sent(1);
    assert_eq!(queue.descriptors.capacity(), 0);
    // Short ones do not allocate anew each time.
    queue.push(PassedDescriptor::shared(&fd));
    queue.sent(1);
    assert!(queue.descriptors.capacity() > 0);
}
