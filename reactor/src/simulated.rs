//! What of a simulation reaches into the loop: without the feature `testing` nothing.
//! With it, `testing/simulated.rs` stands here.

use std::any::Any;
use std::iter;

use crate::descriptor::Readiness;
use crate::token::Token;

/// No descriptors but those of the kernel.
#[derive(Default)]
pub(crate) struct Source;

impl Source {
    #[inline(always)]
    #[expect(
        clippy::needless_pass_by_ref_mut,
        clippy::unused_self,
        reason = "one that simulates is changed"
    )]
    pub(crate) fn poll(&mut self) -> Option<iter::Empty<(Token, Readiness)>> {
        None
    }

    #[inline(always)]
    #[expect(clippy::unused_self, reason = "one that simulates is asked")]
    pub(crate) fn has_events(&self) -> bool {
        false
    }
}

/// No process dies but with all that runs in it.
#[inline(always)]
pub(crate) fn unless_died(payload: Box<dyn Any + Send>) -> Box<dyn Any + Send> {
    payload
}
