//! Sealed memory: bytes that are passed as a descriptor.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};

use bowline::descriptor::{SealedMemory, SealedMemoryErrorKind};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::support::DescriptorLedger;

/// A memory file of these bytes, with these seals.
fn memory(bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("theirs", flags).unwrap());
    file.write_all(bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

const ALL: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::WRITE)
    .union(SealFlags::SEAL);

#[test]
fn bytes_are_the_same_on_both_sides_and_nobody_can_change_them() {
    let _ledger = DescriptorLedger::open();
    for length in [0, 1, 4_095, 4_096, 4_097, 3_000_000] {
        let bytes: Vec<u8> = (0..length).map(|it| it as u8).collect();
        let sent = SealedMemory::new("ours", &bytes).unwrap();
        assert_eq!(&sent[..], bytes);
        let copy = sent.as_fd().try_clone_to_owned().unwrap();
        let received = SealedMemory::from_descriptor(copy, length).unwrap();
        assert_eq!(&received[..], bytes);
        let fd: OwnedFd = sent.into_descriptor();
        let flags = rustix::io::fcntl_getfd(&fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let mut file = File::from(fd);
        assert!(file.write_all(b"x").is_err());
        assert!(file.set_len(length as u64 + 1).is_err());
        assert!(length == 0 || file.set_len(0).is_err());
        assert!(rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).is_err());
        // What was mapped stays, whoever closes what.
        drop(file);
        assert_eq!(received.len(), length);
        let debug = format!("{received:?}");
        assert!(debug.contains(&length.to_string()), "{debug}");
    }
}

#[test]
fn what_can_still_change_is_refused_and_handed_back() {
    let _ledger = DescriptorLedger::open();
    let partly = [
        SealFlags::empty(),
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
        SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
        SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL,
    ];
    for seals in partly {
        let refused = SealedMemory::from_descriptor(memory(b"bytes", seals), 100).unwrap_err();
        assert!(matches!(refused.kind, SealedMemoryErrorKind::NotSealed));
        let error = refused.to_string();
        assert!(error.contains("no sealed memory"), "{error}");
        assert_eq!(File::from(refused.fd).metadata().unwrap().len(), 5);
    }
    // What cannot be sealed at all.
    let (pipe, _writing) = std::io::pipe().unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    for fd in [pipe.into(), OwnedFd::from(file)] {
        let refused = SealedMemory::from_descriptor(fd, 100).unwrap_err();
        assert!(matches!(refused.kind, SealedMemoryErrorKind::NotSealed));
    }
    assert_eq!(
        &SealedMemory::from_descriptor(memory(b"bytes", ALL), 5).unwrap()[..],
        b"bytes"
    );
}

#[test]
fn what_is_longer_than_wanted_is_refused_before_it_is_mapped() {
    let _ledger = DescriptorLedger::open();
    let refused = SealedMemory::from_descriptor(memory(b"bytes", ALL), 4).unwrap_err();
    assert!(matches!(
        refused.kind,
        SealedMemoryErrorKind::TooLong { length: 5 }
    ));
    let error = std::io::Error::from(refused);
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    // A file of holes takes no memory, and says that it has a petabyte.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let holes = File::from(rustix::fs::memfd_create("holes", flags).unwrap());
    holes.set_len(1 << 50).unwrap();
    rustix::fs::fcntl_add_seals(&holes, ALL).unwrap();
    let refused = SealedMemory::from_descriptor(holes.into(), 1 << 30).unwrap_err();
    assert!(matches!(
        refused.kind,
        SealedMemoryErrorKind::TooLong { .. }
    ));
}

#[test]
fn names_are_cut_and_checked() {
    let _ledger = DescriptorLedger::open();
    assert!(SealedMemory::new("a\0b", b"").is_err());
    assert!(SealedMemory::new(&"ä".repeat(200), b"x").is_ok());
}
