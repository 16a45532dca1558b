//! The control channel of a restart, cut at every call on it, at either end: a message
//! that does not leave, one that has left and is not read, and, in the call after, one that
//! has arrived. One of the two processes serves, and no connection is lost or served twice.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bowline::testing::{Delivery, KernelSettings, Random, SimulatedKernel, Simulation};

use super::{Run, SERVICE};
use crate::seeds::System;
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, Staged};

/// Where the processes find each other.
const CONTROL: &str = "/simulated/control";
/// More calls of one kind than a control channel has at one end.
const MOST_CALLS: usize = 60;
const EIO: i32 = 5;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Old,
    New,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    Send,
    Read,
}

/// A call that fails, for good: whose, which, and how many of them do not before.
type Cut = (Side, Call, usize);

/// How the two come to it.
#[derive(Clone, Copy, Debug)]
struct Scene {
    seed: u64,
    has_manager: bool,
    /// Started by the other, which can kill it.
    is_child: bool,
}

/// A program with clients, old ones and such as come in the middle of it, is restarted;
/// the kernel's fingerprint, and who serves in the end.
fn restart(scene: Scene, cut: Option<Cut>) -> (u64, Side) {
    let kernel = SimulatedKernel::with_seed(scene.seed);
    kernel.set_settings(KernelSettings::default().delivery(Delivery::Random));
    let simulation = Simulation::with_kernel(kernel.clone());
    let mut run = Run::new(simulation, scene.seed, &mut Random::new(scene.seed));
    run.has_manager = scene.has_manager;
    (run.broken_percent, run.stays_percent) = (0, 0);
    run.shared.borrow_mut().has_breaks = true;
    run.manager.be_there(&kernel);
    run.manager.reads_percent = 100;
    run.start_some(1);
    run.settle();
    for client in 0..2 {
        run.add_client(1_000);
        run.prod(client, 10);
    }
    run.settle();

    let old = run.lives()[0].clone();
    match scene.is_child {
        true => run.restart(&old),
        false => run.start_some(1),
    }
    while kernel.connected(CONTROL).is_empty() {
        run.turn();
    }
    let (new_end, old_end) = kernel.connected(CONTROL)[0];
    if let Some((side, call, nth)) = cut {
        let end = match side {
            Side::Old => old_end,
            Side::New => new_end,
        };
        let error = io::Error::from_raw_os_error(EIO);
        match call {
            Call::Send => kernel.fail_send(end, nth, error),
            Call::Read => kernel.fail_read(end, nth, error),
        }
    }
    for _ in 0..10 {
        for _ in 0..3 {
            run.turn();
        }
        run.add_client(500);
    }
    run.advance(Duration::from_secs(300));
    run.add_client(500);
    run.end();

    let world = run.shared.borrow();
    let at = format!("{scene:?}, {cut:?}");
    assert!(world.wrong.is_empty(), "{at}: {:?}", world.wrong);
    assert_eq!(world.lives.len(), 2, "{at}: somebody was started once more");
    let serving: Vec<_> = run.serving().iter().map(|life| life.number).collect();
    assert_eq!(serving.len(), 1, "{at}: {serving:?} serve");
    assert_eq!(kernel.waiting(SERVICE), Some(0), "{at}");
    for (number, job) in world.jobs.iter().enumerate() {
        let outcome = job.outcome;
        assert_eq!(
            outcome,
            Some(true),
            "{at}: client {number}, {:?}",
            job.had_by
        );
    }
    let side = [Side::Old, Side::New][serving[0]];
    (kernel.fingerprint(), side)
}

/// Reliability T-37: and the new process serves whenever it has everything.
#[test]
fn one_of_two_serves_wherever_their_channel_is_cut() {
    let ledger = DescriptorLedger::open();
    let mut served = BTreeMap::new();
    for seed in 0..scaled(4, 100) as u64 {
        for (has_manager, is_child) in [(false, false), (false, true), (true, false), (true, true)]
        {
            let scene = Scene {
                seed,
                has_manager,
                is_child,
            };
            let (uncut, side) = restart(scene, None);
            assert_eq!(side, Side::New);
            for (side, call) in [
                (Side::Old, Call::Send),
                (Side::Old, Call::Read),
                (Side::New, Call::Send),
                (Side::New, Call::Read),
            ] {
                for nth in 0..MOST_CALLS {
                    let (fingerprint, serves) = restart(scene, Some((side, call, nth)));
                    if fingerprint == uncut {
                        // So many calls there are not.
                        break;
                    }
                    *served.entry((side, call, serves)).or_insert(0_usize) += 1;
                }
            }
        }
    }
    let cuts: usize = served.values().sum();
    let by_new = served
        .iter()
        .filter(|((.., serves), _)| *serves == Side::New);
    let by_new: usize = by_new.map(|(_, count)| count).sum();
    assert_eq!(served.len(), 8, "each side after each kind: {served:?}");
    Figures::of("T-37")
        .must(
            "cuts of a control channel",
            cuts,
            Bound::AtLeast,
            scaled(500, 12_000),
        )
        .must(
            "of them after which the new process serves",
            by_new,
            Bound::AtLeast,
            cuts / 2,
        );
    ledger.assert_balanced();
}
