//! From an echo server to passing a live connection to another process.
