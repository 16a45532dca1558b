//! Child processes: what they are given, what is told of them and when, how they end.

#[path = "../support/mod.rs"]
mod support;

mod events;
mod given;
mod harness;
mod limits;
mod programs;
mod streams;
mod terminals;
