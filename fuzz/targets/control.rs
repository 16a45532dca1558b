//! The walker of control messages: any bytes, never a system call.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bowline_transport::fuzzing::walk_control(bytes));
