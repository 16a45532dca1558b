//! Worker pools: with real worker processes, in memory, and alone.

mod alone;
mod clients;
mod process;
pub(crate) mod raw;

mod behaviour;
mod broken;
mod children;
mod connections;
mod deaths;
mod fuzz;
mod hung;
mod sender;
mod sharing;
mod stops;
