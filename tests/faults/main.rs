//! Calls that fail, whichever one it is: the reactor goes on, or says cleanly
//! what is over.

#[path = "../support/mod.rs"]
mod support;

mod injected;
mod journal;
mod load;
mod outside;
mod panics;
mod peers;
mod scenarios;
