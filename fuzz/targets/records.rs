//! Records of TLS: what a peer that has the keys says, in any order, cut or changed, with
//! the connection given to another process in between; and what another process says that
//! it gives away. Nothing panics, and what arrives unchanged is what was sealed.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bowline_tls::fuzzing::records(data));
