//! Without the feature `inspect` nothing is measured, and nothing of it is left.

use super::{Budget, Ran};
use crate::reactor::Reactor;
use crate::token::Token;

#[derive(Default)]
pub(crate) struct Meter {}

#[expect(
    clippy::needless_pass_by_ref_mut,
    clippy::unused_self,
    reason = "one that measures is changed"
)]
impl Meter {
    #[inline(always)]
    pub(crate) fn registered(&mut self, _: impl FnOnce() -> std::time::Instant, _: Token) {}
}

#[expect(
    clippy::needless_pass_by_ref_mut,
    reason = "one that measures is changed"
)]
impl Reactor {
    #[inline(always)]
    pub(crate) fn meter_turn(&mut self) {}

    #[inline(always)]
    pub(crate) fn meter_phase(&mut self, _: usize) {}

    #[inline(always)]
    pub(crate) fn meter_turned(&mut self) {}

    #[inline(always)]
    pub(crate) fn meter_ran(&mut self, _: Ran) {}

    #[inline(always)]
    pub(crate) fn meter_events(&mut self, _: &mio::Events) {}

    #[inline(always)]
    pub(crate) fn meter_leaves(&mut self, _: Token) {}

    #[inline(always)]
    pub(crate) fn meter_panicked(&mut self, _: Token) -> Option<u32> {
        None
    }

    #[inline(always)]
    pub(crate) fn meter_told(&mut self, _: Token, _: Option<u32>) {}

    #[inline(always)]
    pub(crate) fn meter_spent(&mut self, _: Budget) {}
}
