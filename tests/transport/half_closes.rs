//! Half-closes that the kernel refuses, which only its own sockets can have.

use rustix::io::Errno;

use crate::harness::{Kind, Link, Script};
use crate::support::faults::{Call, with_faults};

/// F-17, the trap: shutdown(2) fails and that is no error. The protocol goes on, and
/// hears of the peer what there is to hear.
#[test]
fn half_close_that_the_kernel_refuses_passes() {
    let name = "half_close_that_the_kernel_refuses_passes";
    with_faults(module_path!(), name, |faults| {
        for kind in [Kind::AcceptedTcpV4, Kind::AcceptedUnixPath] {
            for error in [Errno::NOTCONN, Errno::NOBUFS] {
                let mut link = Link::new(kind, Script::new());
                let _ = link.transport().write(b"all");
                faults.reset();
                faults.fail(Call::Shutdown, 0, 1, error);
                link.transport().lose_write_connection();
                faults.during(|| link.settle());
                assert_eq!(faults.fired(), 1, "{kind:?}");
                let told = ["made", "write closed"];
                assert_eq!(link.record.summary(), told, "{kind:?}, {error}");
                assert_eq!(link.peer_receives(3), b"all");
                link.peer().send(b"last words");
                link.close_peer();
                link.run_until_lost();
                let rest = ["data 10", "read closed", "lost closed cleanly"];
                assert_eq!(link.record.summary()[2..], rest, "{kind:?}, {error}");
                link.finish();
            }
        }
    });
}
