//! Control messages and framing: nothing lost, nothing doubled, nothing with
//! the wrong message.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;

use bowline::{Context, Protocol, Reactor, ReceivedDescriptors, Transports, UnixStream};

use crate::peer::{file, send};
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, run_until, run_until_quiet, socketpair};

/// Counts bytes and descriptors.
struct Counter(Rc<Cell<(usize, usize)>>);

impl Protocol<UnixStream> for Counter {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, data: &[u8]) {
        let (bytes, descriptors) = self.0.get();
        self.0.set((bytes + data.len(), descriptors));
    }

    fn descriptors_received(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        descriptors: &mut ReceivedDescriptors<'_>,
        data: &[u8],
    ) {
        let (bytes, so_far) = self.0.get();
        self.0.set((bytes, so_far + descriptors.count()));
        self.data_received(cx, data);
    }
}

/// Reliability T-7: all messages that were there before we looked are read,
/// although the kernel reports them once and stops each read behind one.
#[test]
fn all_messages_sent_before_we_look_are_seen() {
    let ledger = DescriptorLedger::open();
    let most = 500;
    let passed = file();
    let (mut messages, mut seen) = (0, 0);
    for count in (1..=most).step_by(scaled(7, 1)) {
        let mut reactor = Reactor::new().unwrap();
        let (ours, peer) = socketpair();
        // As much as the kernel allows: each message takes 768 bytes of it.
        rustix::net::sockopt::set_socket_send_buffer_size(&peer, 1 << 20).unwrap();
        let counted = Rc::new(Cell::new((0, 0)));
        reactor
            .adopt_unix_stream(ours.into(), Counter(Rc::clone(&counted)))
            .unwrap();
        run_until_quiet(&mut reactor);
        for _ in 0..count {
            send(&peer, b"x", &[passed.as_fd()]).expect("room");
        }
        run_until(&mut reactor, |_| counted.get() == (count, count));
        messages += count;
        seen += counted.get().1;
    }
    Figures::of("T-7").must("messages seen", seen, Bound::Exactly, messages);
    drop(passed);
    ledger.assert_balanced();
}
