//! A machine of QEMU that keeps a device of ours across its crashes, and is moved.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::rc::Rc;

use bowline::{Address, Reactor, Transports, Unix, UnixStream, UnixTransport, UnixTransportHandle};
use bowline_peers::vhost_user::{
    Acknowledged, BackEndChannel, BackEndContext, BackEndRequest, FrontEndReply, InflightRegion,
    VhostUserAnswer, VhostUserDevice, VhostUserRequest, back_end, back_end_channel, features,
};
use rustix::fs::MemfdFlags;

use super::Answer;
use crate::programs::{Program, has};
use crate::suite::{Identity, identity};
use crate::support::{DescriptorLedger, run_until};

/// A disk that answers no request of its guest, and notes what the monitor asks.
#[derive(Clone, Default)]
struct Noting {
    asked: Rc<RefCell<Vec<String>>>,
    channel: Rc<RefCell<Option<UnixTransportHandle>>>,
    /// The memory that it has given.
    inflight: Rc<RefCell<Option<Identity>>>,
}

impl Noting {
    fn note(&self, what: impl Into<String>) {
        self.asked.borrow_mut().push(what.into());
    }

    fn has(&self, what: &str) -> bool {
        self.asked.borrow().iter().any(|it| it == what)
    }

    fn count(&self, what: &str) -> usize {
        self.asked.borrow().iter().filter(|it| *it == what).count()
    }

    fn give_memory(&self, region: InflightRegion) -> VhostUserAnswer {
        let size = 4_096;
        let memory = rustix::fs::memfd_create("inflight", MemfdFlags::CLOEXEC).expect("made");
        rustix::fs::ftruncate(&memory, size).expect("room");
        *self.inflight.borrow_mut() = Some(identity(&memory));
        VhostUserAnswer::Inflight {
            region: InflightRegion { size, ..region },
            fd: memory.into(),
        }
    }

    fn open_channel(&self, reactor: &mut Reactor, fd: OwnedFd) {
        let handle = Rc::clone(&self.channel);
        let channel = back_end_channel(move |_, made| *handle.borrow_mut() = Some(made));
        reactor.adopt(Unix, fd, channel).expect("a stream");
    }
}

impl<T: UnixTransport> VhostUserDevice<T> for Noting {
    fn request_received(
        &mut self,
        cx: &mut BackEndContext<'_, T>,
        request: VhostUserRequest,
    ) -> VhostUserAnswer {
        use VhostUserRequest as Request;
        match request {
            Request::GetFeatures => {
                let logged = features::LOG_ALL | features::VERSION_1;
                return VhostUserAnswer::Value(logged | features::PROTOCOL_FEATURES);
            }
            Request::GetProtocolFeatures => {
                return VhostUserAnswer::Value(
                    features::PROTOCOL_CONFIG
                        | features::PROTOCOL_REPLY_ACK
                        | features::PROTOCOL_LOG_SHMFD
                        | features::PROTOCOL_BACKEND_REQ
                        | features::PROTOCOL_INFLIGHT_SHMFD,
                );
            }
            Request::GetConfig { offset, size, .. } => {
                self.note("config");
                let config = 2_048_u64.to_le_bytes().into_iter().chain([0; 248]);
                let part = config.skip(offset as usize).take(size as usize);
                return VhostUserAnswer::Config(part.collect());
            }
            Request::GetVringBase { index } => {
                self.note("stopped");
                return VhostUserAnswer::Vring { index, number: 0 };
            }
            Request::SetBackendReqFd(fd) => self.open_channel(cx.reactor, fd),
            Request::GetInflightFd(region) => return self.give_memory(region),
            Request::SetInflightFd { region, fd } => {
                assert_eq!(Some(identity(fd)), *self.inflight.borrow());
                self.note(format!("inflight of {} bytes", region.size));
            }
            Request::SetLogBase { size, fd, .. } => {
                let has = rustix::fs::fstat(fd).expect("a file").st_size;
                assert!(u64::try_from(has).is_ok_and(|has| has >= size), "{size}");
                self.note("log");
            }
            Request::SetFeatures(chosen) if chosen & features::LOG_ALL != 0 => {
                self.note("all is logged");
            }
            Request::SetVringAddr { address, .. } if address.log.is_some() => {
                self.note("the ring is logged");
            }
            _ => {}
        }
        VhostUserAnswer::Done
    }
}

#[test]
fn machine_of_qemu_keeps_memory_for_its_device_hears_it_and_is_moved() {
    let _ledger = DescriptorLedger::open();
    if !has("qemu-system-x86_64", "qemu-system-x86") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let socket = directory.path().join("socket");
    let noting = Noting::default();
    let device = noting.clone();
    let mut reactor = Reactor::new().expect("a reactor");
    reactor
        .listen(Unix::at(socket.as_path()), move |_: &Address| {
            back_end(device.clone())
        })
        .expect("a free name");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "pc,accel=tcg,memory-backend=mem", "-m", "64"])
        .args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"])
        .arg("-chardev")
        .arg(format!("socket,id=disk,path={}", socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=1"])
        .args(["-nodefaults", "-display", "none", "-monitor", "stdio"]);
    let mut machine = Program::start(&mut command);
    // Its firmware looks for something to boot from.
    let started = "inflight of 4096 bytes";
    machine.wait(&mut reactor, started, |_| noting.has(started));
    let before = machine.open_descriptors();

    let channel = noting.channel.borrow().expect("it was given");
    let told: Rc<RefCell<Option<Answer>>> = Rc::default();
    let answer = Rc::clone(&told);
    let reads = noting.count("config");
    reactor.call_protocol::<UnixStream, BackEndChannel>(channel, move |channel, cx| {
        let changed = BackEndRequest::ConfigChanged;
        channel.ask(cx, changed, Acknowledged::Yes, move |_, it| {
            *answer.borrow_mut() = Some(it);
        });
    });
    run_until(&mut reactor, |_| told.borrow().is_some());
    let told = told.borrow_mut().take();
    assert!(matches!(told, Some(Ok(FrontEndReply::Done))), "{told:?}");
    assert!(noting.count("config") > reads, "it was to be read again");

    machine.tell("migrate \"exec:cat >/dev/null\"\n");
    machine.wait(&mut reactor, "an end", |_| noting.has("stopped"));
    for what in ["log", "all is logged", "the ring is logged"] {
        assert!(noting.has(what), "{what}: {:?}", noting.asked.borrow());
    }
    machine.tell("info migrate\n");
    machine.wait_for(&mut reactor, "Migration status: completed");
    // What it has passed, and what was made for the move, it has not kept.
    machine.wait_for_descriptors_at_most(&mut reactor, before);
    machine.tell("quit\n");
    let (is_well, said) = machine.end(&mut reactor);
    assert!(is_well, "{said}");
    run_until(&mut reactor, |reactor| reactor.get(channel).is_none());
}
