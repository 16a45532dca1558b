//! Processes that the system keeps from running.

use std::time::Duration;

use bowline::testing::Simulation;
use bowline::{Context, Protocol, Transport};

use crate::support::DescriptorLedger;

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let me = cx.transport.handle();
        cx.reactor
            .call_later(Duration::from_secs(1), move |reactor| {
                reactor.get(me).expect("connected").write(b"late ");
            });
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

#[test]
fn suspended_process_does_nothing_until_it_is_resumed_or_killed() {
    let ledger = DescriptorLedger::open();
    let mut simulation = Simulation::new(1);
    let processes = [simulation.spawn().unwrap(), simulation.spawn().unwrap()];
    let [(_, one), (_, other)] =
        processes.map(|process| simulation.connect(process, Echo).unwrap());
    simulation.run();
    for process in processes {
        simulation.suspend(process);
    }
    for client in [&one, &other] {
        client.send(b"hello").unwrap();
    }
    simulation.advance(Duration::from_secs(2));
    assert_eq!(simulation.next_deadline(), None);
    assert!(one.take().bytes.is_empty() && other.take().bytes.is_empty());

    simulation.resume(processes[0]);
    simulation.kill(processes[1]);
    simulation.run();
    let mut answer = one.take().bytes;
    answer.sort_unstable();
    assert_eq!(answer, b" aeehlllot");
    assert!(!simulation.is_alive(processes[1]));
    assert!(other.take().bytes.is_empty() && other.is_at_end());
    drop((simulation, one, other));
    ledger.assert_balanced();
}
