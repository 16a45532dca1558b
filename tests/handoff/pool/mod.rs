//! Worker pools, with real worker processes.

mod clients;
mod process;

mod deaths;
mod hung;
