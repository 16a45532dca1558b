//! Bytes go both ways, whole and in order.

use bowline::{Address, Context, Protocol, Reactor, Transport, Transports};

use crate::support::{DescriptorLedger, Record, Recorder, run_until};

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

#[test]
fn large_echo_over_tcp_comes_back_whole() {
    let ledger = DescriptorLedger::open();
    let record = Record::default();
    let mut reactor = Reactor::new().unwrap();
    let listener = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Echo)
        .unwrap();
    let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
    let recorder = Recorder::new(&record);
    reactor
        .connect_tcp(address, move |_: &Address| recorder.clone())
        .unwrap();
    run_until(&mut reactor, |_| !record.summary().is_empty());
    let sent: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    reactor.get(record.handle(0)).unwrap().write(&sent);
    run_until(&mut reactor, |_| record.data().len() >= sent.len());
    assert!(record.data() == sent);
    drop(reactor);
    ledger.assert_balanced();
}
