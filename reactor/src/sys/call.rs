//! Closures of any type, kept without a box.

use std::fmt;
use std::marker::PhantomData;
use std::mem::{self, ManuallyDrop, MaybeUninit};
use std::ptr;

use crate::reactor::Reactor;

/// A closure that is to be called once, with the reactor and an `A`; of which
/// type it is is forgotten.
///
/// What captures at most [`INLINE_BYTES`], such as a few handles or counted
/// references, is kept within; of more, there is a box. That is a `Box<dyn
/// FnOnce(&mut Reactor, A)>` of which most need no allocation, and 32 bytes
/// instead of 16.
pub(crate) struct Call<A: 'static> {
    storage: CallStorage,
    methods: &'static Methods<A>,
    /// It is as thread-bound as what it captures may be.
    captures: PhantomData<*mut ()>,
}

/// How much a closure may capture to be kept without a box.
const INLINE_BYTES: usize = 24;

type CallStorage = MaybeUninit<[u64; INLINE_BYTES / 8]>;

/// What can be done to a closure of one type.
///
/// Both functions take a storage in which a closure of that type was written
/// and from which it has not been taken; after either one it has.
struct Methods<A> {
    run: unsafe fn(&mut CallStorage, &mut Reactor, A),
    /// `None` where dropping does nothing.
    drop: Option<unsafe fn(&mut CallStorage)>,
    /// What the type is called.
    name: fn() -> &'static str,
}

impl<A: 'static> Call<A> {
    #[inline]
    pub(crate) fn new<F: FnOnce(&mut Reactor, A) + 'static>(call: F) -> Self {
        if const { fits::<F>() } {
            Self::inline(call)
        } else {
            let call = Box::new(call);
            Self::inline(move |reactor: &mut Reactor, argument| call(reactor, argument))
        }
    }

    #[inline]
    fn inline<F: FnOnce(&mut Reactor, A) + 'static>(call: F) -> Self {
        // Known to the compiler: nothing is left of it.
        assert!(const { fits::<F>() }, "what does not fit is boxed");
        let mut storage = CallStorage::uninit();
        // SAFETY: the storage is as large and as aligned as an `F` needs, by
        // the assertion above, and is written to by nobody else.
        unsafe { storage.as_mut_ptr().cast::<F>().write(call) };
        Self {
            storage,
            methods: const {
                &Methods {
                    run: run::<F, A>,
                    drop: if mem::needs_drop::<F>() {
                        Some(drop_in_place::<F>)
                    } else {
                        None
                    },
                    name: std::any::type_name::<F>,
                }
            },
            captures: PhantomData,
        }
    }

    /// How to ask what its type is called: the path of the function that it stands in.
    #[inline(always)]
    pub(crate) fn name(&self) -> fn() -> &'static str {
        self.methods.name
    }

    /// Calls it.
    #[inline]
    pub(crate) fn run(self, reactor: &mut Reactor, argument: A) {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: the methods are those of the type that `inline` wrote, and
        // nothing has taken it: this and `drop` are all that does, each at the
        // end of the call's life (`ManuallyDrop` keeps `drop` from following).
        unsafe { (this.methods.run)(&mut this.storage, reactor, argument) }
    }
}

impl<A> Drop for Call<A> {
    #[inline]
    fn drop(&mut self) {
        if let Some(drop) = self.methods.drop {
            // SAFETY: as in `run`.
            unsafe { drop(&mut self.storage) }
        }
    }
}

impl<A> fmt::Debug for Call<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").finish_non_exhaustive()
    }
}

const fn fits<F>() -> bool {
    size_of::<F>() <= size_of::<CallStorage>() && align_of::<F>() <= align_of::<CallStorage>()
}

/// # Safety
///
/// As [`Methods`] says, for the type `F`.
unsafe fn run<F: FnOnce(&mut Reactor, A), A>(
    storage: &mut CallStorage,
    reactor: &mut Reactor,
    argument: A,
) {
    // SAFETY: by the caller, there is an `F` in it, which nobody else takes. A
    // panic of the call drops it like any other value.
    let call = unsafe { storage.as_ptr().cast::<F>().read() };
    call(reactor, argument);
}

/// # Safety
///
/// As [`Methods`] says, for the type `F`.
unsafe fn drop_in_place<F>(storage: &mut CallStorage) {
    // SAFETY: by the caller, there is an `F` in it, which nobody uses
    // afterwards.
    unsafe { ptr::drop_in_place(storage.as_mut_ptr().cast::<F>()) }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::rc::Rc;

    use super::{Call, INLINE_BYTES};
    use crate::reactor::Reactor;

    /// Counts how often it is dropped.
    struct Counted(Rc<Cell<u32>>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }

    fn counted() -> (Counted, Rc<Cell<u32>>) {
        let count = Rc::new(Cell::new(0));
        (Counted(Rc::clone(&count)), count)
    }

    #[repr(align(64))]
    struct Aligned(u8);

    #[test]
    fn what_is_captured_arrives_whatever_its_size_and_alignment() {
        let mut reactor = Reactor::new().unwrap();
        let seen = Rc::new(Cell::new(0));
        let sum = Rc::clone(&seen);
        let small = [1_u8; 3];
        Call::new(move |_, more: u64| sum.set(more + u64::from(small[2]))).run(&mut reactor, 10);
        assert_eq!(seen.get(), 11);

        let sum = Rc::clone(&seen);
        let large = [7_u64; 40];
        Call::new(move |_, more: u64| sum.set(more + large.iter().sum::<u64>()))
            .run(&mut reactor, 20);
        assert_eq!(seen.get(), 300);

        let sum = Rc::clone(&seen);
        let aligned = Aligned(5);
        Call::new(move |_, more: u64| {
            // Of the whole, not of the byte alone.
            let aligned = &aligned;
            assert_eq!(std::ptr::from_ref(aligned).addr() % 64, 0);
            sum.set(more + u64::from(aligned.0));
        })
        .run(&mut reactor, 30);
        assert_eq!(seen.get(), 35);
    }

    #[test]
    fn a_closure_of_exactly_the_room_and_one_of_a_byte_more_both_run() {
        let mut reactor = Reactor::new().unwrap();
        let seen = Rc::new(Cell::new(0_u8));
        let exact = [3_u8; INLINE_BYTES - 8];
        let last = Rc::clone(&seen);
        Call::new(move |_, ()| last.set(exact[INLINE_BYTES - 9])).run(&mut reactor, ());
        assert_eq!(seen.get(), 3);
        let over = [4_u8; INLINE_BYTES - 7];
        let last = Rc::clone(&seen);
        Call::new(move |_, ()| last.set(over[INLINE_BYTES - 8])).run(&mut reactor, ());
        assert_eq!(seen.get(), 4);
    }

    #[test]
    fn what_is_captured_is_dropped_once_when_it_ran() {
        let mut reactor = Reactor::new().unwrap();
        let (value, drops) = counted();
        let call = Call::new(move |_, ()| {
            let Counted(count) = &value;
            assert_eq!(count.get(), 0);
        });
        call.run(&mut reactor, ());
        assert_eq!(drops.get(), 1);
    }

    #[test]
    fn what_is_captured_is_dropped_once_when_it_never_ran() {
        let (value, drops) = counted();
        let small = Call::new(move |_, ()| drop(value));
        let (value, drops_of_large) = counted();
        let room = [0_u8; 100];
        let large = Call::new(move |_, ()| drop((value, room)));
        assert_eq!((drops.get(), drops_of_large.get()), (0, 0));
        drop((small, large));
        assert_eq!((drops.get(), drops_of_large.get()), (1, 1));
    }

    #[test]
    fn what_is_captured_is_dropped_once_when_the_call_panics() {
        let mut reactor = Reactor::new().unwrap();
        let (value, drops) = counted();
        let call = Call::new(move |_, ()| {
            let _value = value;
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        let result = catch_unwind(AssertUnwindSafe(|| call.run(&mut reactor, ())));
        assert!(result.is_err());
        assert_eq!(drops.get(), 1);
    }

    #[test]
    fn a_place_for_a_call_takes_no_more_than_the_call() {
        assert_eq!(size_of::<Call<()>>(), INLINE_BYTES + 8);
        assert_eq!(size_of::<Option<Call<()>>>(), size_of::<Call<()>>());
    }
}
