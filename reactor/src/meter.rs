//! What the loop measures about itself: with the feature `inspect`, and nothing without.

#[cfg(feature = "inspect")]
mod births;
#[cfg(feature = "inspect")]
mod histogram;
#[cfg_attr(
    not(feature = "inspect"),
    allow(dead_code, unreachable_pub, reason = "nothing is measured")
)]
mod kinds;
#[cfg(feature = "inspect")]
mod on;
#[cfg(feature = "inspect")]
mod turns;

#[cfg(not(feature = "inspect"))]
mod off;

pub(crate) use self::kinds::{Ran, phase};
#[cfg(feature = "inspect")]
pub(crate) use self::on::Meter;
#[cfg(feature = "inspect")]
pub use self::{
    histogram::Histogram,
    kinds::{Budget, CallbackKind},
    on::{Measurements, SlowCallback, SlowLimits, SlowTurn},
    turns::{TurnRecord, TurnTimes},
};
#[cfg(not(feature = "inspect"))]
pub(crate) use self::{
    kinds::{Budget, CallbackKind},
    off::Meter,
};
