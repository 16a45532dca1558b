//! The life of a socket's path (T-32, R-25).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};

use super::client::Server;
use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures};

/// Who else has the path of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Nobody,
    /// A file that is no socket.
    AFile,
    /// Another program that listens there.
    ALiveSocket,
    /// One that listened there, and is gone.
    ADeadSocket,
}

/// Reliability T-32: upgrades, then an end, with and without somebody else's file
/// at the path: in all orders the path is removed by whoever serves last, if the
/// file is still the one that the first has made, and never otherwise. Who starts then
/// takes what nobody listens at any more, and nothing else.
#[test]
fn path_belongs_to_whoever_serves_last() {
    use Other::{ADeadSocket, AFile, ALiveSocket, Nobody};
    let _ledger = DescriptorLedger::open();
    let (mut orders, mut of_two) = (0, 0);
    for upgrades in [0, 1, 3] {
        for is_killed in [false, true] {
            for other in [Nobody, AFile, ALiveSocket, ADeadSocket] {
                check(upgrades, is_killed, other);
                orders += 1;
                of_two += usize::from(other != Nobody);
            }
        }
    }
    Figures::of("T-32")
        .must("orders with the right owner", orders, Bound::Exactly, 24)
        .must("of them with two owners", of_two, Bound::Exactly, 18);
}

fn check(upgrades: usize, is_killed: bool, other: Other) {
    let order = format!("{upgrades} upgrades, killed: {is_killed}, other: {other:?}");
    let is_foreign = other != Other::Nobody;
    let mut server = Server::start();
    let path = server.path("socket");
    let inode = |path: &std::path::Path| fs::symlink_metadata(path).map(|file| file.ino());
    let first = inode(&path).expect("bound");
    let mut another = None;
    for upgrade in 0..upgrades {
        if is_foreign && upgrade + 1 == upgrades {
            // In the middle of it: the last one finds it when it takes over.
            another = exchange(&path, other);
        }
        server.restart();
        if !is_foreign {
            assert_eq!(inode(&path).expect("there"), first, "{order}");
            server.connect_unix().echo(b"through the same path");
        }
    }
    if is_foreign && upgrades == 0 {
        another = exchange(&path, other);
    }
    let before = inode(&path).expect("there");
    if is_killed {
        server.kill();
    } else {
        server.stop();
    }
    let after = inode(&path).ok();
    match (is_killed, is_foreign) {
        (false, false) => assert_eq!(after, None, "{order}"),
        (true, false) => assert_eq!(after, Some(first), "{order}"),
        (_, true) => assert_eq!(after, Some(before), "{order}"),
    }
    assert!(
        !server.path("control/control").exists() || is_killed,
        "{order}"
    );
    // The next one: replaces what is stale, and leaves what is somebody's, or no socket.
    let next = server.start_stranger();
    if matches!(other, Other::AFile | Other::ALiveSocket) {
        server.wait_for(&format!("{next} not started: cannot listen"));
        assert_eq!(inode(&path).ok(), Some(before), "{order}");
    } else {
        server.wait_for(&format!("{next} serves"));
        let file = fs::symlink_metadata(&path).expect("bound");
        assert!(file.file_type().is_socket(), "{order}");
        server.connect_unix().echo(b"bound anew");
        server.stop();
        assert!(!path.exists(), "{order}");
    }
    if let Some(another) = another {
        // What came before are those who looked whether anybody listens.
        UnixStream::connect(&path).expect("it is reached by its path");
        another.set_nonblocking(true).expect("a socket");
        assert!(another.accept().is_ok(), "{order}");
    }
}

/// Puts what is somebody else's in its place; whoever listens there.
fn exchange(path: &std::path::Path, other: Other) -> Option<UnixListener> {
    fs::remove_file(path).expect("there");
    match other {
        Other::Nobody => unreachable!("nothing is exchanged"),
        Other::AFile => {
            fs::write(path, "not a socket").expect("ours");
            None
        }
        Other::ALiveSocket => Some(UnixListener::bind(path).expect("ours")),
        Other::ADeadSocket => {
            drop(UnixListener::bind(path).expect("ours"));
            None
        }
    }
}

/// Whoever can write into the directory could put a socket of their own there.
#[test]
fn directory_that_others_may_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;

    use bowline::Reactor;
    use bowline::handoff::restart::{Listeners, Program, Restart, RestartSettings};

    struct Nothing;

    impl Program for Nothing {
        fn listen(&mut self, _: &mut Reactor, _: &mut Listeners<'_>) -> std::io::Result<()> {
            Ok(())
        }
    }

    let _ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().expect("temporary directory");
    let mut reactor = Reactor::new().expect("epoll");
    let mut begin = |path: &std::path::Path| {
        Restart::begin(&mut reactor, RestartSettings::new(path), Nothing)
            .map(|_| ())
            .map_err(|error| error.kind())
    };
    let open = directory.path().join("open");
    fs::create_dir(&open).expect("ours");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o711)).expect("ours");
    let denied = Err(std::io::ErrorKind::PermissionDenied);
    assert_eq!(begin(&open), denied);
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&open, &link).expect("ours");
    assert_eq!(begin(&link), denied);
    let new = directory.path().join("new");
    assert_eq!(begin(&new), Ok(()));
    let mode = fs::metadata(&new).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}
