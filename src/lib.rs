//! The facade.
pub use bowline_protocol::*;
pub use bowline_reactor::*;
pub use bowline_transport::*;
