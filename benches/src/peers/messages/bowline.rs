//! bowline, as its guide says.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use ::bowline::process::{ChildCommand, ProcessContext, ProcessProtocol, ProcessStatus};
use ::bowline::{
    Address, AddressRef, CloseReason, Context, Datagram, DatagramProtocol, DatagramTransport,
    Packet, PacketProtocol, PacketTransport, Pipe, ProducerKind, ProducerRef, Protocol, Reactor,
    Transport, Transports, Udp, UnixSeqpacket,
};

use super::{BURST, CHILDREN, DATAGRAM, PROGRAM, asked, report};
use crate::peers::{Family, Job, Server, Task, Wait};
use crate::sys;

const CHUNK_BYTES: usize = 65_536;

pub(super) fn build(job: Job, fd: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let mut reactor = Reactor::new()?;
    if let Some(fd) = fd {
        start(&mut reactor, job, fd).map_err(io::Error::other)?;
    }
    reactor.start().map_err(io::Error::other)?;
    Ok(Box::new(Bowline { reactor }))
}

fn start(
    reactor: &mut Reactor,
    job: Job,
    fd: OwnedFd,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let bytes = vec![7; CHUNK_BYTES].into_boxed_slice();
    match (job.family, job.task) {
        (Family::Packets, _) => {
            reactor.listen(UnixSeqpacket::listening(fd), |_: &Address| Echo)?;
        }
        (Family::Pipe, Task::Source) => {
            reactor.adopt(Pipe::writing(), fd, PipeSource { bytes })?;
        }
        (Family::Pipe, _) => {
            reactor.adopt(Pipe::reading(), fd, PipeSink { count: 0 })?;
        }
        (_, task) => {
            // What an endpoint of its own does; who gives a socket away may not want it.
            sys::receive_segments(fd.as_raw_fd())?;
            match task {
                Task::Sink | Task::SinkMerged => reactor.adopt(Udp, fd, Sink { count: 0 })?,
                Task::Source => reactor.adopt(Udp, fd, Source { bytes })?,
                _ => reactor.adopt(Udp, fd, Echo)?,
            };
        }
    }
    Ok(())
}

struct Bowline {
    reactor: Reactor,
}

impl Server for Bowline {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        let adopted = self.reactor.adopt(UnixSeqpacket, socket, Echo);
        adopted.map(drop).map_err(io::Error::other)
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => Some(Duration::ZERO),
            Wait::Forever => None,
        };
        self.reactor.turn(timeout);
        Ok(())
    }
}

struct Echo;

impl<T: DatagramTransport> DatagramProtocol<T> for Echo {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        cx.transport.send_to(datagram.data, datagram.from);
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Echo {
    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        cx.transport.send(packet.data);
    }
}

struct Sink {
    count: usize,
}

impl<T: DatagramTransport> DatagramProtocol<T> for Sink {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        self.count += 1;
        if self.count.is_multiple_of(BURST) {
            cx.transport
                .send_to(&self.count.to_le_bytes(), datagram.from);
        }
    }
}

struct Source {
    bytes: Box<[u8]>,
}

impl<T: DatagramTransport> DatagramProtocol<T> for Source {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        let to: AddressRef<'_> = datagram.from;
        for _ in 0..asked(datagram.data) {
            cx.transport.send_to(&self.bytes[..DATAGRAM], to);
        }
    }
}

struct PipeSink {
    count: usize,
}

impl<T: Transport> Protocol<T> for PipeSink {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.count += data.len();
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
        report(self.count);
    }
}

struct PipeSource {
    bytes: Box<[u8]>,
}

impl<T: Transport> Protocol<T> for PipeSource {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .expect("the first producer");
        <Self as Protocol<T>>::resume_producing(self, cx);
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        while cx.transport.write(&self.bytes).is_ready() {}
    }
}

/// Starts another when its child has ended.
struct Parent {
    left: Rc<Cell<usize>>,
    running: Rc<Cell<usize>>,
}

pub(super) fn spawn(count: usize) -> io::Result<()> {
    let mut reactor = Reactor::new()?;
    let left = Rc::new(Cell::new(count));
    let running = Rc::new(Cell::new(0));
    for _ in 0..CHILDREN.min(count) {
        start_child(&mut reactor, &left, &running);
    }
    reactor.run().map_err(io::Error::other)
}

fn start_child(reactor: &mut Reactor, left: &Rc<Cell<usize>>, running: &Rc<Cell<usize>>) {
    left.set(left.get() - 1);
    running.set(running.get() + 1);
    let program = PROGRAM.to_str().expect("a name");
    let command = ChildCommand::program(program).env_clear();
    let command = command.inherit(0).inherit(1).inherit(2);
    let parent = Parent {
        left: Rc::clone(left),
        running: Rc::clone(running),
    };
    reactor
        .spawn_process(command, parent)
        .expect("a child can be started");
}

impl ProcessProtocol for Parent {
    fn child_data_received(&mut self, _: &mut ProcessContext<'_>, _: u32, _: &[u8]) {}

    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        assert_eq!(status.code(), Some(0), "the status of a child");
        self.running.set(self.running.get() - 1);
        if self.left.get() > 0 {
            start_child(cx.reactor, &self.left, &self.running);
        } else if self.running.get() == 0 {
            cx.reactor.stop().expect("it runs");
        }
    }
}
