//! Policies: layers around protocols and factories.

#[path = "../support/mod.rs"]
mod support;

mod capture;
mod forwarding;
mod idle;
mod limit;
mod over;
mod reattached;
mod reconnecting;
mod throttle;
mod traffic;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bowline::testing::{MemoryHandle, Pump};
use bowline::{
    Address, BuildContext, Factory, Listener, ListenerHandle, Origin, SocketFile, Transport,
    TransportHandle,
};

/// A listener that is only asked for its factory.
struct Door;

impl Listener for Door {
    fn address(&self) -> Address {
        client("192.0.2.1:80")
    }
    fn stop_listening(&mut self) {}
    fn pause_accepting(&mut self) {}
    fn resume_accepting(&mut self) {}
    fn hold_accepting(&mut self) {}
    fn assume_sole_holder(&mut self) {}
    fn serve_queue_at_stop(&mut self) {}
    fn release_accepting(&mut self) {}
    fn stop_listening_when_drained(&mut self) {}
    fn is_listening(&self) -> bool {
        true
    }
    fn socket_file(&self) -> Option<SocketFile> {
        None
    }
    fn disown_socket_file(&mut self) {}
    fn own_socket_file(&mut self, _: SocketFile) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }
    fn duplicate(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NotConnected.into())
    }
    fn handle(&self) -> ListenerHandle {
        unreachable!("no test asks for its name")
    }
}

fn client(address: &str) -> Address {
    Address::Inet(address.parse().expect("an address"))
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Has the factory build for a connection with `peer`.
fn build<F: Factory>(pump: &mut Pump, factory: &mut F, peer: &Address) -> Option<F::Protocol> {
    let mut door = Door;
    let mut cx = BuildContext {
        origin: Origin::Listener(&mut door),
        reactor: pump.reactor(),
    };
    factory.build_protocol(&mut cx, peer)
}

fn name(pump: &mut Pump, transport: MemoryHandle) -> TransportHandle {
    pump.get(transport).expect("it is open").handle()
}

fn timers(pump: &mut Pump) -> usize {
    pump.reactor().delayed_calls().count()
}
