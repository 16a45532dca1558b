//! Panics of what others wrote, and how they are contained.
//!
//! While one panic is dealt with, more of that code runs: a name for the log is
//! asked for, values are dropped. That may panic too, and is caught as well.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

use crate::log;
use crate::simulated::unless_died;

/// The value that a callback panicked with.
///
/// Dropping it never panics, whatever the value does when it is dropped.
pub struct Panic {
    message: Cow<'static, str>,
    /// In a lock that nobody takes, so that errors with a panic are `Sync`.
    payload: Mutex<Option<Payload>>,
}

type Payload = Box<dyn Any + Send>;

impl Panic {
    pub(crate) fn new(payload: Payload) -> Self {
        let message = if let Some(text) = payload.downcast_ref::<&'static str>() {
            Cow::Borrowed(*text)
        } else if let Some(text) = payload.downcast_ref::<String>() {
            Cow::Owned(text.clone())
        } else {
            Cow::Borrowed("a value that is no string")
        };
        Self {
            message,
            payload: Mutex::new(Some(payload)),
        }
    }

    /// The panic's message, if the value is a string.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The value itself, for [`std::panic::resume_unwind`] or a downcast.
    pub fn into_payload(mut self) -> Payload {
        // There until it is dropped.
        self.take_payload().unwrap_or_else(|| Box::new(()))
    }

    fn take_payload(&mut self) -> Option<Payload> {
        self.payload
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for Panic {
    fn drop(&mut self) {
        if let Some(payload) = self.take_payload()
            && let Err(another) = panic::catch_unwind(AssertUnwindSafe(|| drop(payload)))
        {
            // Whose drop may panic just as well, and so on: leaked.
            mem::forget(another);
        }
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Panic").field(&self.message()).finish()
    }
}

/// Runs `call` and catches its panic. For layers that call other people's code in the
/// middle of something that has to be finished.
///
/// # Errors
///
/// The panic.
pub fn catch_panic<R>(call: impl FnOnce() -> R) -> Result<R, Panic> {
    panic::catch_unwind(AssertUnwindSafe(call)).map_err(|payload| Panic::new(unless_died(payload)))
}

/// A value whose drop may panic. Such a panic costs a line in the log and no more.
///
/// For a value that is out of its place while other people's code runs: if that code
/// panics, the value is dropped while the panic unwinds, and a second panic would
/// abort the process.
#[derive(Debug)]
pub struct Contained<T>(Option<T>);

const NOT_TAKEN: &str = "only into_inner takes it, and that is the end of this";

impl<T> Contained<T> {
    /// Keeps `value`.
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// Gives it back.
    pub fn into_inner(mut self) -> T {
        self.0.take().expect(NOT_TAKEN)
    }
}

impl<T> Deref for Contained<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect(NOT_TAKEN)
    }
}

impl<T> DerefMut for Contained<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect(NOT_TAKEN)
    }
}

impl<T> Drop for Contained<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else {
            return;
        };
        if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| drop(value))) {
            let panic = Panic::new(payload);
            let _ = catch_panic(|| {
                log::error!(target: log::REACTOR, "panicked while being dropped: {}", panic.message());
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, resume_unwind};

    use super::*;

    /// Panics when it is dropped, with another that does.
    struct Bomb(u32);

    impl Drop for Bomb {
        fn drop(&mut self) {
            if self.0 > 0 {
                resume_unwind(Box::new(Self(self.0 - 1)));
            }
        }
    }

    #[test]
    fn payload_that_panics_when_it_is_dropped_costs_nothing() {
        let panic = catch_panic(|| resume_unwind(Box::new(Bomb(3)))).unwrap_err();
        assert_eq!(panic.message(), "a value that is no string");
        drop(panic);
        let panic = catch_panic(|| resume_unwind(Box::new(7_u32))).unwrap_err();
        assert_eq!(panic.into_payload().downcast_ref(), Some(&7_u32));
    }

    #[test]
    fn what_is_contained_may_panic_while_another_panic_unwinds() {
        let result = catch_unwind(|| {
            let _contained = Contained::new(Bomb(2));
            resume_unwind(Box::new("the first"));
        });
        assert_eq!(result.unwrap_err().downcast_ref(), Some(&"the first"));
        assert_eq!(Contained::new(7).into_inner(), 7);
    }
}
