//! Typed names of registered descriptors.

use std::any::Any;
use std::fmt;
use std::hash::{Hash, Hasher};

use crate::token::Token;

/// A typed name of a registered descriptor: its [`Token`] and the view that
/// the holder has of it.
///
/// `Handle<dyn Transport>` reaches any transport, `Handle<dyn UnixTransport>` one
/// that passes descriptors. A handle is `Copy` and owns nothing. It compares and
/// hashes by its token. [`Reactor::get`](crate::Reactor::get) turns it into a
/// reference, or into `None` when the descriptor is gone.
pub struct Handle<T: ?Sized> {
    token: Token,
    view: fn(&mut dyn Any) -> Option<&mut T>,
}

impl<T: ?Sized> Handle<T> {
    /// A handle on the descriptor named `token`. `view` is given the descriptor's
    /// [facet](crate::Descriptor::facet), and answers what the holder may see.
    pub fn new(token: Token, view: fn(&mut dyn Any) -> Option<&mut T>) -> Self {
        Self { token, view }
    }

    /// The descriptor's name, without the type.
    pub fn token(self) -> Token {
        self.token
    }

    pub(crate) fn view(self, facet: &mut dyn Any) -> Option<&mut T> {
        (self.view)(facet)
    }
}

impl<T: ?Sized> From<Handle<T>> for Token {
    fn from(handle: Handle<T>) -> Self {
        handle.token
    }
}

impl<T: ?Sized> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: ?Sized> Copy for Handle<T> {}

impl<T: ?Sized> PartialEq for Handle<T> {
    fn eq(&self, other: &Self) -> bool {
        self.token == other.token
    }
}

impl<T: ?Sized> Eq for Handle<T> {}

impl<T: ?Sized> PartialOrd for Handle<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: ?Sized> Ord for Handle<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.token.cmp(&other.token)
    }
}

impl<T: ?Sized> Hash for Handle<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.token.hash(state);
    }
}

impl<T: ?Sized> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handle").field(&self.token).finish()
    }
}
