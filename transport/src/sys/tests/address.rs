//! Names of sockets, pure and against the kernel.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::net::{SocketAddr, SocketAddrV6};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use proptest::prelude::*;

use super::expect_error;
use crate::sys::{MAX_NAME_BYTES, SocketName};

fn path(bytes: &[u8]) -> SocketName {
    SocketName::UnixPath(OsString::from_vec(bytes.to_vec()).into())
}

#[track_caller]
fn expect_round_trip(name: &SocketName) {
    let encoded = name.encode().unwrap();
    assert_eq!(SocketName::decode(encoded.as_bytes()), *name);
}

/// The bytes of a C struct without padding.
fn bytes_of<T>(value: &T) -> &[u8] {
    // SAFETY: pointer and size are those of `value`, all of whose bytes are
    // initialised: the callers' structs have no padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Contract T-04, with the scope of an IPv6 address.
#[test]
fn ip_names_are_the_c_structs() {
    let v4 = libc::sockaddr_in {
        sin_family: libc::AF_INET as _,
        sin_port: 8080_u16.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([192, 0, 2, 7]),
        },
        sin_zero: [0; 8],
    };
    let name = SocketName::Inet("192.0.2.7:8080".parse().unwrap());
    assert_eq!(name.encode().unwrap().as_bytes(), bytes_of(&v4));
    assert_eq!(SocketName::decode(bytes_of(&v4)), name);

    let address: std::net::Ipv6Addr = "fe80::1:2".parse().unwrap();
    let v6 = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as _,
        sin6_port: 443_u16.to_be(),
        sin6_flowinfo: 0x0123_4567,
        sin6_addr: libc::in6_addr {
            s6_addr: address.octets(),
        },
        sin6_scope_id: 9,
    };
    let name = SocketName::Inet(SocketAddrV6::new(address, 443, 0x0123_4567, 9).into());
    assert_eq!(name.encode().unwrap().as_bytes(), bytes_of(&v6));
    assert_eq!(SocketName::decode(bytes_of(&v6)), name);
}

#[test]
fn unix_names_round_trip() {
    expect_round_trip(&SocketName::UnixUnnamed);
    for length in [1, 2, 50, MAX_NAME_BYTES] {
        expect_round_trip(&path(&vec![b'p'; length]));
        expect_round_trip(&SocketName::UnixAbstract(vec![b'a'; length]));
        expect_round_trip(&SocketName::UnixAbstract(vec![0; length]));
    }
    expect_round_trip(&path(b"\xFF\xFE not text"));
    expect_round_trip(&SocketName::UnixAbstract(Vec::new()));
    expect_round_trip(&SocketName::UnixAbstract(b"a\0b\0".to_vec()));
}

#[test]
fn lengths_count_what_the_kernel_counts() {
    let length = |name: SocketName| name.encode().unwrap().as_bytes().len();
    assert_eq!(length(SocketName::UnixUnnamed), 2);
    assert_eq!(length(path(b"/run/x")), 2 + 6 + 1);
    assert_eq!(length(path(&[b'p'; MAX_NAME_BYTES])), 110);
    assert_eq!(length(SocketName::UnixAbstract(b"x".to_vec())), 2 + 1 + 1);
    assert_eq!(
        length(SocketName::UnixAbstract(vec![1; MAX_NAME_BYTES])),
        110
    );
}

#[test]
fn names_that_cannot_be_are_refused() {
    for name in [
        path(b""),
        path(b"/run/a\0b"),
        path(b"\0abstract"),
        path(&[b'p'; MAX_NAME_BYTES + 1]),
        path(&[b'p'; 5000]),
        SocketName::UnixAbstract(vec![b'a'; MAX_NAME_BYTES + 1]),
        SocketName::Other(16),
    ] {
        expect_error(name.encode().map(|_| ()), ErrorKind::InvalidInput);
    }
}

#[test]
fn path_ends_at_its_nul_or_at_the_end() {
    let family = (libc::AF_UNIX as u16).to_ne_bytes();
    let decode = |path: &[u8]| SocketName::decode(&[&family, path].concat());
    assert_eq!(decode(b"/run/x\0"), path(b"/run/x"));
    assert_eq!(decode(b"/run/x"), path(b"/run/x"));
    assert_eq!(decode(b"/run/x\0rest\0\0"), path(b"/run/x"));
    // What another program may bind: 108 bytes, and no NUL.
    assert_eq!(decode(&[b'p'; 108]), path(&[b'p'; 108]));
    assert_eq!(decode(b""), SocketName::UnixUnnamed);
    assert_eq!(decode(b"\0"), SocketName::UnixAbstract(Vec::new()));
    assert_eq!(decode(b"\0x\0"), SocketName::UnixAbstract(b"x\0".to_vec()));
}

#[test]
fn short_names_are_of_another_kind() {
    assert_eq!(SocketName::decode(&[]), SocketName::UnixUnnamed);
    let family = (libc::AF_INET as u16).to_ne_bytes();
    assert_eq!(SocketName::decode(&family), SocketName::Other(2));
    let mut bytes = (libc::AF_INET6 as u16).to_ne_bytes().to_vec();
    bytes.resize(27, 0);
    assert_eq!(SocketName::decode(&bytes), SocketName::Other(10));
    assert_eq!(SocketName::decode(&[16, 0, 1, 2]), SocketName::Other(16));
}

proptest! {
    #[test]
    fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..130)) {
        SocketName::decode(&bytes);
    }

    #[test]
    fn unix_bytes_come_back(rest in prop::collection::vec(any::<u8>(), 1..107)) {
        let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        bytes.extend(&rest);
        match SocketName::decode(&bytes) {
            SocketName::UnixAbstract(name) => prop_assert_eq!(&rest[1..], name),
            SocketName::UnixPath(path) => {
                let name = path.into_os_string().into_vec();
                prop_assert!(rest.starts_with(&name));
                prop_assert!(rest.len() == name.len() || rest[name.len()] == 0);
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn ip_names_round_trip(address: SocketAddr) {
        expect_round_trip(&SocketName::Inet(address));
    }

    #[test]
    fn paths_round_trip(bytes in prop::collection::vec(1_u8.., 1..=MAX_NAME_BYTES)) {
        let name = SocketName::UnixPath(PathBuf::from(OsString::from_vec(bytes)));
        expect_round_trip(&name);
    }
}
