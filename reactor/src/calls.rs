//! Where the closures of delayed calls wait.
//!
//! A box for each would cost an allocation and a release per call, which is
//! more than all that the timing wheel does. So closures of one type, and that
//! is those made by one line of the program, wait in a slab of their own; its
//! places are reused, and nothing is allocated once the most that ever waited
//! at a time have been seen.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

use slab::Slab;

use crate::reactor::Reactor;

/// Closures of any types, to be called once with the reactor.
///
/// Its room is never given back, which is why [`insert`](Self::insert) wants
/// them small.
pub(crate) struct Calls {
    stores: Vec<Store>,
    by_type: HashMap<TypeId, u32, BuildHasherDefault<TypeIdHasher>>,
    /// The type that was asked for last, most likely the next one too.
    last: Option<(TypeId, u32)>,
}

/// The name of a closure in [`Calls`], to be used up once.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct CallKey {
    store: u32,
    index: u32,
}

/// The closures of one type.
struct Store {
    /// A `Slab` of them.
    slab: Box<dyn AnySlab>,
    run: fn(&mut Reactor, CallKey),
}

/// How much a closure may capture to wait in place: several handles, or some
/// counted references. What is larger is boxed, so that a crowd of them does
/// not leave its room behind.
const MOST_BYTES: usize = 64;

impl Calls {
    pub(crate) fn new() -> Self {
        Self {
            stores: Vec::new(),
            by_type: HashMap::default(),
            last: None,
        }
    }

    /// Keeps a closure until it is run or discarded.
    #[inline]
    pub(crate) fn insert<F: FnOnce(&mut Reactor) + 'static>(&mut self, call: F) -> CallKey {
        if const { size_of::<F>() > MOST_BYTES } {
            let call = Box::new(call);
            self.insert_small(move |reactor: &mut Reactor| call(reactor))
        } else {
            self.insert_small(call)
        }
    }

    #[inline]
    fn insert_small<F: FnOnce(&mut Reactor) + 'static>(&mut self, call: F) -> CallKey {
        let wanted = TypeId::of::<F>();
        let store = match self.last {
            Some((id, store)) if id == wanted => store,
            _ => self.find_or_make::<F>(wanted),
        };
        let slab = slab_of::<F>(&mut *self.stores[store as usize].slab);
        // The timers run out of names first.
        let index = slab.insert(call) as u32;
        CallKey { store, index }
    }

    #[inline(never)]
    fn find_or_make<F: FnOnce(&mut Reactor) + 'static>(&mut self, wanted: TypeId) -> u32 {
        let stores = &mut self.stores;
        let store = *self.by_type.entry(wanted).or_insert_with(|| {
            stores.push(Store {
                slab: Box::new(Slab::<F>::new()),
                run: run::<F>,
            });
            stores.len() as u32 - 1
        });
        self.last = Some((wanted, store));
        store
    }

    /// Returns what runs a closure; it is given the reactor that has it, and
    /// the same key.
    #[inline]
    pub(crate) fn runner(&self, key: &CallKey) -> fn(&mut Reactor, CallKey) {
        self.stores[key.store as usize].run
    }

    /// Drops a closure uncalled.
    #[inline]
    pub(crate) fn discard(&mut self, key: CallKey) {
        self.stores[key.store as usize].slab.discard(key.index);
    }
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls")
            .field("types", &self.stores.len())
            .finish_non_exhaustive()
    }
}

#[inline]
fn run<F: FnOnce(&mut Reactor) + 'static>(reactor: &mut Reactor, key: CallKey) {
    let store = &mut reactor.calls.stores[key.store as usize];
    let call = slab_of::<F>(&mut *store.slab).remove(key.index as usize);
    call(reactor);
}

#[inline]
fn slab_of<F: 'static>(slab: &mut dyn AnySlab) -> &mut Slab<F> {
    let slab: &mut dyn Any = slab;
    slab.downcast_mut().expect("it was found by this type")
}

trait AnySlab: Any {
    fn discard(&mut self, index: u32);
}

impl<F: 'static> AnySlab for Slab<F> {
    fn discard(&mut self, index: u32) {
        drop(self.remove(index as usize));
    }
}

/// Takes the hash for what it is: a `TypeId` is one already.
#[derive(Default)]
struct TypeIdHasher(u64);

impl Hasher for TypeIdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
