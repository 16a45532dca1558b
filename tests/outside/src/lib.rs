//! What a program brings that is not content with the layers and kinds of bowline:
//! a layer that changes bytes, and a kind of connection that is no socket.

#![forbid(unsafe_code)]

mod fifos;
mod scramble;

pub use crate::fifos::{FifoPair, Fifos, FifosTo};
pub use crate::scramble::{Codec, Frame, Kind as FrameKind, Scramble, Settings, proof};
