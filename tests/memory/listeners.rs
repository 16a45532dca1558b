//! Listeners of a simulated kernel: the real ones on top, so that what is shown here
//! is what the kernel below does.

use std::cell::Cell;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use bowline::process::describe_socket;
use bowline::testing::{
    Delivery, KernelSettings, MemoryListener, MemoryPeer, MemorySocket, ProcessId, SimulatedKernel,
    Simulation,
};
use bowline::{Address, BuildContext, Context, ListenerHandle, Protocol, Transport, Transports};

use crate::support::DescriptorLedger;

/// Says who it is.
struct Named(&'static str);

impl<T: Transport> Protocol<T> for Named {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(self.0.as_bytes());
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

fn serve(
    simulation: &mut Simulation,
    process: ProcessId,
    listener: MemoryListener,
    name: &'static str,
) -> ListenerHandle {
    let reactor = simulation.reactor(process).unwrap();
    listener
        .serve(reactor, move |_: &Address| Named(name))
        .unwrap()
}

fn client(simulation: &Simulation) -> MemoryPeer {
    MemoryPeer::new(simulation.kernel().connect("it").unwrap())
}

fn hears(client: &MemoryPeer) -> String {
    String::from_utf8(client.take().bytes).unwrap()
}

#[test]
fn name_is_taken_while_somebody_holds_its_listener() {
    let _ledger = DescriptorLedger::open();
    let kernel = SimulatedKernel::new();
    let refused = kernel.connect("it").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let listener = kernel.listen("it").unwrap();
    assert_eq!(listener.name(), "it");
    let taken = kernel.listen("it").unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AddrInUse);
    let other = kernel.listen("another").unwrap();
    assert_eq!(kernel.open_listeners(), 2);
    drop((listener, other));
    assert_eq!(kernel.open_listeners(), 0);
    assert!(kernel.connect("it").is_err());
    assert!(kernel.listen("it").is_ok());
}

/// Each client is accepted once, by whoever is first; one that is held takes none.
#[test]
fn several_processes_share_a_listener() {
    let _ledger = DescriptorLedger::open();
    for delivery in [Delivery::Batch, Delivery::OneAtATime, Delivery::Random] {
        let kernel = SimulatedKernel::with_seed(7);
        kernel.set_settings(
            KernelSettings::default()
                .delivery(delivery)
                .passing_errors_percent(30),
        );
        let mut simulation = Simulation::with_kernel(kernel);
        let first = simulation.spawn().unwrap();
        let second = simulation.spawn().unwrap();
        let listener = simulation.kernel().listen("it").unwrap();
        let listener = serve(&mut simulation, first, listener, "first");
        // As it is passed on.
        let control = simulation.reactor(first).unwrap().get(listener).unwrap();
        let copy = control.duplicate().unwrap();
        let described = describe_socket(copy.as_fd()).unwrap();
        assert!(described.is_listening && described.is_stream);
        assert_eq!(described.address.unwrap(), control.address());
        let copy = MemoryListener::from_descriptor(copy).unwrap();
        serve(&mut simulation, second, copy, "second");

        let mut served = [0, 0];
        for _ in 0..100 {
            let client = client(&simulation);
            simulation.run();
            match &*hears(&client) {
                "first" => served[0] += 1,
                "second" => served[1] += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(served.iter().all(|count| *count > 0), "{served:?}");
        assert_eq!(simulation.kernel().waiting("it"), Some(0));

        let control = simulation.reactor(first).unwrap().get(listener).unwrap();
        control.hold_accepting();
        for _ in 0..20 {
            let client = client(&simulation);
            simulation.run();
            assert_eq!(hears(&client), "second");
        }
        simulation.kill(second);
        let waits = client(&simulation);
        simulation.run();
        assert_eq!(hears(&waits), "");
        assert_eq!(simulation.kernel().waiting("it"), Some(1));
        let control = simulation.reactor(first).unwrap().get(listener).unwrap();
        control.release_accepting();
        simulation.run();
        assert_eq!(hears(&waits), "first");
    }
}

#[test]
fn who_waits_sees_the_end_when_the_last_holder_closes() {
    let _ledger = DescriptorLedger::open();
    let kernel = SimulatedKernel::new();
    let listener = kernel.listen("it").unwrap();
    let copy = MemoryListener::from_descriptor(listener.into_descriptor().unwrap()).unwrap();
    let client = MemoryPeer::new(kernel.connect("it").unwrap());
    client.send(b"unread").unwrap();
    assert!(!client.is_at_end());
    drop(copy);
    let reset = client.receive(1).unwrap_err();
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
    assert!(client.is_at_end());
    drop(client);
    assert_eq!((kernel.open_sockets(), kernel.open_listeners()), (0, 0));
}

/// As an acceptor passes them on.
#[test]
fn clients_are_handed_over_as_descriptors() {
    let _ledger = DescriptorLedger::open();
    let mut simulation = Simulation::new(7);
    let server = simulation.spawn().unwrap();
    let worker = simulation.spawn().unwrap();
    let listener = simulation.kernel().listen("it").unwrap();
    let accepted: Rc<Cell<Option<OwnedFd>>> = Rc::default();
    let slot = Rc::clone(&accepted);
    let acceptor = move |_: &mut BuildContext<'_>, fd: OwnedFd, _: &Address| {
        drop(slot.replace(Some(fd)));
    };
    let reactor = simulation.reactor(server).unwrap();
    listener.hand_over(reactor, acceptor).unwrap();
    let client = client(&simulation);
    simulation.run();
    let fd = accepted.take().expect("accepted");
    // A connection is no listener.
    let fd = MemoryListener::from_descriptor(fd).unwrap_err();
    let socket = MemorySocket::from_descriptor(fd).unwrap();
    let reactor = simulation.reactor(worker).unwrap();
    socket.adopt(reactor, Named("worker")).unwrap();
    simulation.run();
    assert_eq!(hears(&client), "worker");
    drop(client);
    simulation.run();
    assert_eq!(simulation.kernel().open_sockets(), 0);
}

/// A listener that is detached is closed here, and goes on elsewhere.
#[test]
fn listener_moves_from_one_process_to_another() {
    let _ledger = DescriptorLedger::open();
    let mut simulation = Simulation::new(7);
    let first = simulation.spawn().unwrap();
    let second = simulation.spawn().unwrap();
    let listener = simulation.kernel().listen("it").unwrap();
    let listener = serve(&mut simulation, first, listener, "first");
    simulation.run();
    let moved: Rc<Cell<Option<OwnedFd>>> = Rc::default();
    let slot = Rc::clone(&moved);
    let reactor = simulation.reactor(first).unwrap();
    reactor.detach_listener(listener, move |_, fd| {
        drop(slot.replace(Some(fd.expect("it listens"))));
    });
    simulation.run();
    let waits = client(&simulation);
    simulation.run();
    let moved = MemoryListener::from_descriptor(moved.take().expect("detached")).unwrap();
    serve(&mut simulation, second, moved, "second");
    simulation.run();
    assert_eq!(hears(&waits), "second");
}
