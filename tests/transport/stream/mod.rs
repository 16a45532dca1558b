//! What every kind of stream transport does alike: each behaviour is a test of
//! its own over each kind.

mod broken;
mod closing;
mod draining;
mod half_close;
mod lingering;
mod reading;
mod writing;
