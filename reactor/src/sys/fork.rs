//! How a process knows that it was forked.
//!
//! References: pthread_atfork(3).

#![allow(unsafe_code)]

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often this process, or those that it was forked from, came about by a fork
/// since they first had a reactor. To compare that costs no system call.
static FORKS: AtomicU32 = AtomicU32::new(0);
static REGISTERED: Once = Once::new();

extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// The number of this process, which it shares with none that it was forked from.
pub(crate) fn generation() -> u32 {
    REGISTERED.call_once(|| {
        // SAFETY: the function is one of this program, which stays loaded, and does
        // nothing but an atomic addition, which is allowed after a fork.
        let result = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
        // ENOMEM, with which forks go unnoticed, is the only error.
        debug_assert_eq!(result, 0);
    });
    FORKS.load(Ordering::Relaxed)
}

/// [`generation`], once it was asked for.
#[inline]
pub(crate) fn known_generation() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::cell::Cell;
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Duration;

    use crate::{
        Descriptor, Interest, Next, Reactor, ReactorError, Readiness, RunError, Token, Turn,
    };

    struct Reads(UnixStream, Rc<Cell<usize>>);

    impl Descriptor for Reads {
        fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
            let count = self.0.read(&mut [0; 8]).unwrap_or(0);
            self.1.set(self.1.get() + count);
            Next::Keep
        }
        fn source(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
        fn facet(&mut self) -> &mut dyn Any {
            self
        }
    }

    /// Runs `child` in a forked process; whether it came to its end.
    fn in_a_fork(child: impl FnOnce()) -> bool {
        // SAFETY: the child has this thread only. It calls the allocator, which the
        // C library makes usable after a fork, and locks nothing that another
        // thread could have had.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: takes a number; should anything hang, it ends the child. Beside
                // many others, and under a sanitizer, a child can need seconds.
                unsafe { libc::alarm(60) };
                let is_over = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).is_ok();
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

    type Child = fn(Reactor, Token);

    const CHILDREN: [(&str, Child); 4] = [
        ("drops it", |reactor, _| drop(reactor)),
        ("runs it", |mut reactor, _| {
            reactor.call_soon(|_| panic!("it does not run"));
            assert_eq!(reactor.turn(Some(Duration::ZERO)), Turn::Stopped);
            assert_eq!(reactor.turn(None), Turn::Stopped);
            assert_eq!(reactor.start(), Err(ReactorError::Forked));
            assert!(matches!(reactor.run(), Err(RunError::Forked)));
        }),
        (
            "stops it and removes what there is",
            |mut reactor, token| {
                let _ = reactor.stop();
                reactor.remove(token);
                assert_eq!(reactor.turn(None), Turn::Stopped);
            },
        ),
        ("makes its own", |parents, _| {
            let (ours, mut peer) = UnixStream::pair().expect("there is room");
            let count = Rc::new(Cell::new(0));
            let counted = Rc::clone(&count);
            let mut reactor = Reactor::new().expect("there is room");
            let reads = |_| -> Box<dyn Descriptor> { Box::new(Reads(ours, counted)) };
            reactor
                .register(Interest::Readable, reads)
                .expect("a socket");
            drop(parents);
            peer.write_all(b"x").expect("it is open");
            reactor.turn(Some(Duration::from_secs(5)));
            assert_eq!(count.get(), 1);
        }),
    ];

    fn reads(reactor: &mut Reactor) -> (Token, UnixStream, Rc<Cell<usize>>) {
        let (ours, peer) = UnixStream::pair().unwrap();
        let count = Rc::new(Cell::new(0));
        let counted = Rc::clone(&count);
        let build = |_| -> Box<dyn Descriptor> { Box::new(Reads(ours, counted)) };
        let token = reactor.register(Interest::Readable, build).unwrap();
        (token, peer, count)
    }

    /// A reactor with all that does not survive a fork, and what its child goes on
    /// with.
    #[test]
    fn a_forked_child_goes_on_with_what_it_keeps_and_the_parent_with_all() {
        let mut reactor = Reactor::new().unwrap();
        let (kept, mut peer, count) = reads(&mut reactor);
        let (other, mut other_peer, other_count) = reads(&mut reactor);
        reactor.start().unwrap();
        let fired = Rc::new(Cell::new(0));
        let (firing, late) = (Rc::clone(&fired), Duration::from_millis(50));
        reactor.call_later(late, move |_| firing.set(firing.get() + 1));
        let told = Rc::new(Cell::new(None));
        let (telling, remote) = (Rc::clone(&told), reactor.remote());
        let (go, wait) = std::sync::mpsc::channel::<()>();
        reactor.call_in_thread(
            move || {
                let _ = wait.recv();
            },
            move |_, result| telling.set(Some(result.is_ok())),
        );
        // Sets the timer of the parent.
        reactor.turn(Some(Duration::from_millis(1)));
        // Ready before the fork, and not reported yet.
        peer.write_all(b"x").unwrap();
        let (mut copy, both) = (Some(reactor), Rc::clone(&count));
        let ended = in_a_fork(|| {
            let mut reactor = copy.take().expect("it is there");
            reactor.after_fork(&[kept]).expect("it is forked");
            assert_eq!(reactor.registered(), 1);
            assert!(!reactor.is_registered(other));
            let again = reactor.after_fork(&[]).unwrap_err();
            let again = again.get_ref().and_then(|it| it.downcast_ref());
            assert_eq!(again, Some(&ReactorError::NotForked));
            let turn_until = |reactor: &mut Reactor, is_done: &dyn Fn() -> bool| {
                while !is_done() {
                    assert_eq!(reactor.turn(Some(Duration::from_secs(5))), Turn::Continue);
                }
            };
            turn_until(&mut reactor, &|| both.get() == 1);
            turn_until(&mut reactor, &|| told.get() == Some(false));
            turn_until(&mut reactor, &|| fired.get() == 1);
            assert!(remote.call_from_thread(|_| {}).is_err(), "the parent's");
            // Threads of its own, which wake it.
            let done = Rc::new(Cell::new(0));
            let set = Rc::clone(&done);
            reactor.call_in_thread(|| 7, move |_, it| set.set(it.unwrap_or(0)));
            turn_until(&mut reactor, &|| done.get() == 7);
            reactor.stop().expect("it runs");
            while reactor.turn(None) == Turn::Continue {}
        });
        assert!(ended);
        let mut reactor = copy.take().expect("the parent's");
        let error = reactor.after_fork(&[]).unwrap_err();
        let error = error.get_ref().and_then(|it| it.downcast_ref());
        assert_eq!(error, Some(&ReactorError::NotForked));
        assert_eq!(reactor.registered(), 2);
        go.send(()).unwrap();
        for peer in [&mut peer, &mut other_peer] {
            peer.write_all(b"x").unwrap();
        }
        let is_done = || (count.get(), other_count.get(), fired.get()) == (1, 1, 1);
        while !is_done() || told.get() != Some(true) {
            reactor.turn(Some(Duration::from_secs(5)));
        }
    }

    #[test]
    fn a_child_that_was_forked_inside_a_callback_does_not_go_on_there() {
        let mut reactor = Reactor::new().unwrap();
        reactor.start().unwrap();
        let ended = Rc::new(Cell::new(false));
        let set = Rc::clone(&ended);
        reactor.call_soon(move |reactor| {
            set.set(in_a_fork(|| {
                let error = reactor.after_fork(&[]).unwrap_err();
                let error = error.get_ref().and_then(|it| it.downcast_ref());
                assert_eq!(error, Some(&ReactorError::AlreadyRunning));
            }));
        });
        reactor.turn(Some(Duration::ZERO));
        assert!(ended.get());
    }

    /// The poller is the parent's too: a child that dropped its copy took the
    /// parent's descriptors out of it.
    #[test]
    fn what_a_forked_child_does_with_its_copy_is_not_felt_by_the_parent() {
        for (what, child) in CHILDREN {
            let (ours, mut peer) = UnixStream::pair().unwrap();
            let count = Rc::new(Cell::new(0));
            let counted = Rc::clone(&count);
            let mut reactor = Reactor::new().unwrap();
            let token = reactor
                .register(Interest::Readable, |_| Box::new(Reads(ours, counted)))
                .unwrap();
            reactor.start().unwrap();
            reactor.call_later(Duration::from_millis(1), |_| {});
            reactor.turn(Some(Duration::ZERO));
            let mut copy = Some(reactor);
            let is_over = in_a_fork(|| child(copy.take().expect("it is there"), token));
            assert!(is_over, "the child that {what}");
            // The closure took it in the child only.
            let mut reactor = copy.take().expect("the parent's");
            peer.write_all(b"x").unwrap();
            reactor.turn(Some(Duration::from_secs(5)));
            reactor.turn(Some(Duration::from_millis(5)));
            assert_eq!(count.get(), 1, "the child {what}");
        }
    }

    /// Whatever other threads of the parent do at the fork.
    #[test]
    fn threads_begin_in_a_forked_child() {
        super::generation();
        let is_over = AtomicBool::new(false);
        let joins = || {
            let count = Arc::new(AtomicU32::new(0));
            let [one, other] = [None, Some(64 << 10)].map(|stack_bytes| {
                let count = Arc::clone(&count);
                let work = move || {
                    count.fetch_add(1, Ordering::Relaxed);
                    // A panic that nothing is said of.
                    std::panic::resume_unwind(Box::new(()));
                };
                crate::start_thread("begins", stack_bytes, work).expect("there is room")
            });
            one.join();
            while !other.is_finished() {
                std::thread::yield_now();
            }
            drop(other);
            assert_eq!(count.load(Ordering::Relaxed), 2);
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        let threads = [(); 8].map(|()| std::thread::spawn(|| {}));
                        let _ = threads.map(|it| it.join().is_ok());
                    }
                });
            }
            let all = (0..200).all(|_| in_a_fork(joins));
            is_over.store(true, Ordering::Relaxed);
            assert!(all, "a thread did not begin");
        });
    }
}
