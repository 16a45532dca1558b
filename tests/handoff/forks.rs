//! What a forked child does with its parent's notifier.

#![allow(unsafe_code, reason = "no safe package forks")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use bowline::handoff::systemd::{Notice, Notifier};
use bowline::{GracefulStop, Reactor};

use crate::support::{DescriptorLedger, run_until};
use crate::systemd::Manager;

/// Runs `child` in a forked process; whether it came to its end.
fn in_a_fork(child: impl FnOnce()) -> bool {
    // SAFETY: the child has this thread only. It calls the allocator, which the C library
    // makes usable after a fork, and locks nothing that another thread could have had.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: takes a number; should anything hang, it ends the child.
            unsafe { libc::alarm(10) };
            let is_over = catch_unwind(AssertUnwindSafe(child)).is_ok();
            // SAFETY: ends the child without what is the parent's to be done.
            unsafe { libc::_exit(i32::from(!is_over)) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: the status is written to a place that outlives the call.
            let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
            waited == pid && status == 0
        }
    }
}

/// Notices that wait, and a manager that has room for them again.
struct Waiting {
    _directory: tempfile::TempDir,
    manager: Manager,
    reactor: Reactor,
    notifier: Notifier,
}

impl Waiting {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (manager, path) = Manager::at_path(&directory);
        manager.socket.set_nonblocking(true).unwrap();
        let other = Notifier::connect(&path).unwrap();
        while other.send(&Notice::new().status("somebody else")).is_ok() {}
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let notifier = Notifier::connect(&path).unwrap();
        notifier.attach(&mut reactor).unwrap();
        for number in 0..3 {
            let notice = Notice::new().status(&number.to_string());
            notifier.send(&notice).unwrap();
        }
        assert_eq!(notifier.waiting(), 3);
        let this = Self {
            _directory: directory,
            manager,
            reactor,
            notifier,
        };
        this.read();
        this
    }

    /// What the manager has got, but for what somebody else says.
    fn read(&self) -> Vec<String> {
        let all = std::iter::from_fn(|| self.manager.try_receive());
        all.map(|(text, _)| text)
            .filter(|text| text != "STATUS=somebody else\n")
            .collect()
    }
}

/// Each notice leaves once, from the parent, whatever the child does: it left from the
/// child as well.
#[test]
fn notices_that_wait_leave_from_the_parent_only() {
    type Deed = fn(&mut Option<(Reactor, Notifier)>);
    let deeds: [(&str, Deed, &[&str]); 5] = [
        ("drops all", |both| drop(both.take()), &[]),
        (
            "drops the reactor and says something",
            |both| {
                let (reactor, notifier) = both.take().unwrap();
                drop(reactor);
                notifier.send(&Notice::new().status("child")).unwrap();
                assert_eq!(notifier.waiting(), 0);
            },
            &["STATUS=child\n"],
        ),
        (
            "goes on with a reactor",
            |both| {
                let (mut reactor, _notifier) = both.take().unwrap();
                reactor.after_fork(&[]).unwrap();
                for _ in 0..3 {
                    reactor.turn(Some(Duration::ZERO));
                }
            },
            &[],
        ),
        (
            "says something before it goes on",
            |both| {
                let (mut reactor, notifier) = both.take().unwrap();
                notifier.send(&Notice::new().status("child")).unwrap();
                reactor.after_fork(&[]).unwrap();
                assert!(!notifier.is_attached());
                notifier.attach(&mut reactor).unwrap();
                assert!(notifier.is_attached());
            },
            &["STATUS=child\n"],
        ),
        (
            "attaches it elsewhere, and stops",
            |both| {
                let (old, notifier) = both.take().unwrap();
                let mut reactor = Reactor::new().unwrap();
                notifier.attach(&mut reactor).unwrap();
                // Which lets go of what it was attached to.
                drop(old);
                assert!(notifier.is_attached());
                reactor.call_soon(|reactor| {
                    reactor.stop_gracefully(GracefulStop::new()).unwrap();
                });
                reactor.run().unwrap();
            },
            &[],
        ),
    ];
    for (what, deed, says) in deeds {
        let ledger = DescriptorLedger::open();
        let Waiting {
            _directory,
            manager,
            reactor,
            notifier,
        } = Waiting::new();
        let mut both = Some((reactor, notifier));
        assert!(in_a_fork(|| deed(&mut both)), "{what}");
        let (reactor, notifier) = both.take().unwrap();
        let mut waiting = Waiting {
            _directory,
            manager,
            reactor,
            notifier,
        };
        assert_eq!(waiting.read(), says, "{what}");
        assert_eq!(waiting.notifier.waiting(), 3, "{what}");
        let notifier = waiting.notifier.clone();
        run_until(&mut waiting.reactor, |_| notifier.waiting() == 0);
        let all = ["STATUS=0\n", "STATUS=1\n", "STATUS=2\n"];
        assert_eq!(waiting.read(), all, "{what}");
        drop((waiting, notifier));
        ledger.assert_balanced();
    }
}
