//! Scratch.
use bowline::*;
use std::cell::RefCell;
use std::rc::Rc;
struct Echo;
impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}
struct Client(Rc<RefCell<Vec<u8>>>);
impl<T: Transport> Protocol<T> for Client {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(&[7; 300_000]);
    }
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.0.borrow_mut().extend_from_slice(data);
        if self.0.borrow().len() == 300_000 {
            cx.transport.lose_connection();
        }
    }
    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        println!(
            "lost {reason} {} {}",
            cx.transport.host(),
            cx.transport.peer()
        );
        let _ = cx.reactor.stop();
    }
}
#[test]
fn echo() {
    let got = Rc::new(RefCell::new(Vec::new()));
    let mut reactor = Reactor::new().unwrap();
    let l = reactor
        .listen_tcp(([127, 0, 0, 1], 0).into(), |_: &Address| Echo)
        .unwrap();
    let a = reactor.get(l).unwrap().address().as_inet().unwrap();
    let g = got.clone();
    reactor
        .connect_tcp(a, move |_: &Address| Client(g.clone()))
        .unwrap();
    reactor.call_later(std::time::Duration::from_secs(5), |r| {
        let _ = r.stop();
    });
    reactor.run().unwrap();
    assert_eq!(got.borrow().len(), 300_000);
    let (x, y) = std::os::unix::net::UnixStream::pair().unwrap();
    got.borrow_mut().clear();
    reactor.adopt_unix_stream(x.into(), Echo).unwrap();
    reactor
        .adopt_unix_stream(y.into(), Client(got.clone()))
        .unwrap();
    reactor.call_later(std::time::Duration::from_secs(5), |r| {
        let _ = r.stop();
    });
    reactor.run().unwrap();
    assert_eq!(got.borrow().len(), 300_000);
    let c = reactor.descriptor_counts();
    println!("{:?} {:?}", reactor, c);
}
