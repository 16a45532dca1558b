//! A disk for a virtual machine: the back-end of a vhost-user-blk device, whose sectors are
//! those of a file.
//!
//! ```text
//! cargo run --example vhost_user_blk -- --socket /tmp/disk.sock --image disk.img
//! qemu-system-x86_64 -machine pc,accel=tcg,memory-backend=mem -m 64 \
//!     -object memory-backend-memfd,id=mem,size=64M,share=on \
//!     -chardev socket,id=disk,path=/tmp/disk.sock \
//!     -device vhost-user-blk-pci,chardev=disk,num-queues=1
//! ```
//!
//! QEMU passes the memory of the guest as a descriptor, and two counters: one that is
//! readable when the guest has put something into the ring (kick), and one that we add to
//! when it was done (call). The guest's memory is read and written as a file here, which
//! needs no `unsafe` and costs system calls; a device for daily use would map it.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod common;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::rc::Rc;

use bowline::descriptor::{EventCounter, Next, ReadableCall};
use bowline::{Address, CloseReason, Reactor, Transports, Unix, UnixTransport};
use bowline_peers::vhost_user::{
    BackEndContext, MemoryRegion, VhostUserAnswer, VhostUserDevice, VhostUserRequest, VringAddress,
    back_end, features,
};
use rustix::io::{pread, pwrite};

use common::{Arguments, Inspect};

const HELP: &str = "
A disk for a virtual machine, by vhost-user.

Usage: vhost_user_blk --socket PATH --image FILE

  --socket PATH    where the monitor connects
  --image FILE     the sectors of the disk, of 512 bytes
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this
";

/// What the device and the protocol are able to.
const DEVICE_FEATURES: u64 = features::VERSION_1 | features::PROTOCOL_FEATURES;
const PROTOCOL_FEATURES: u64 = features::PROTOCOL_CONFIG | features::PROTOCOL_REPLY_ACK;

const SECTOR: u64 = 512;

/// What a guest asks, in the first word of a request.
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

/// Flags of a descriptor of a ring.
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;

/// What the guest and we have in common.
struct Disk {
    image: File,
    memory: Vec<MemoryRegion>,
    size: u16,
    address: VringAddress,
    /// The next entry that we take.
    next: u16,
    call: Option<EventCounter>,
}

/// A piece of the guest's memory: where, how long, and whether it is ours to write.
type Piece = (u64, u32, bool);

/// Whose addresses are meant: data has the guest's, the ring the monitor's.
type Place = fn(&MemoryRegion, u64, u64) -> Option<u64>;
const DATA: Place = MemoryRegion::at_guest;
const RING: Place = MemoryRegion::at_user;

impl Disk {
    /// The memory behind an address, and where in its file that is.
    fn find(&self, place: Place, address: u64, length: usize) -> io::Result<(&OwnedFd, u64)> {
        let mut regions = self.memory.iter();
        let found = regions.find_map(|it| Some((&it.fd, place(it, address, length as u64)?)));
        found.ok_or_else(|| io::Error::other("an address outside of the guest's memory"))
    }

    fn read(&self, place: Place, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (fd, at) = self.find(place, address, bytes.len())?;
        pread(fd, bytes, at)?;
        Ok(())
    }

    fn get<const N: usize>(&self, place: Place, address: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(place, address, &mut bytes)?;
        Ok(bytes)
    }

    fn put(&self, place: Place, address: u64, bytes: &[u8]) -> io::Result<()> {
        let (fd, at) = self.find(place, address, bytes.len())?;
        pwrite(fd, bytes, at)?;
        Ok(())
    }

    /// Does what is in the ring, and says so.
    fn work(&mut self) -> io::Result<()> {
        let (used, available) = (self.address.used, self.address.available);
        let end = u16::from_le_bytes(self.get(RING, available + 2)?);
        while self.size > 0 && self.next != end {
            let place = u64::from(self.next % self.size);
            let head = u16::from_le_bytes(self.get(RING, available + 4 + 2 * place)?);
            let written = self.serve(&self.chain(head)?)?;
            let entry = [u32::from(head).to_le_bytes(), written.to_le_bytes()].concat();
            self.put(RING, used + 4 + 8 * place, &entry)?;
            self.next = self.next.wrapping_add(1);
            self.put(RING, used + 2, &self.next.to_le_bytes())?;
        }
        // The guest may not want to be told each time, and survives it.
        self.call.as_ref().map_or(Ok(()), |call| call.add(1))
    }

    /// The pieces of a request.
    fn chain(&self, mut index: u16) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        // A guest could make a circle of it.
        while pieces.len() < usize::from(self.size) {
            let entry = self.address.descriptors + 16 * u64::from(index % self.size);
            let flags = u16::from_le_bytes(self.get(RING, entry + 12)?);
            let address = u64::from_le_bytes(self.get(RING, entry)?);
            let length = u32::from_le_bytes(self.get(RING, entry + 8)?);
            pieces.push((address, length, flags & DEVICE_WRITES != 0));
            if flags & NEXT == 0 {
                return Ok(pieces);
            }
            index = u16::from_le_bytes(self.get(RING, entry + 14)?);
        }
        Err(io::Error::other("a request without an end"))
    }

    /// Does one request: a head, data, and a byte for how it went. How many bytes were
    /// written to the guest.
    fn serve(&self, pieces: &[Piece]) -> io::Result<u32> {
        let [(head, ..), data @ .., (status, ..)] = pieces else {
            return Err(io::Error::other("a request of one piece"));
        };
        let kind = u32::from_le_bytes(self.get(DATA, *head)?);
        let sector = u64::from_le_bytes(self.get(DATA, head + 8)?);
        let transferred = self.transfer(kind, sector.saturating_mul(SECTOR), data);
        if let Err(error) = &transferred {
            eprintln!("request {kind} at sector {sector}: {error}");
        }
        self.put(DATA, *status, &[transferred.is_err().into()])?;
        Ok(transferred.unwrap_or(0) + 1)
    }

    fn transfer(&self, kind: u32, mut at: u64, data: &[Piece]) -> io::Result<u32> {
        let mut written = 0;
        for &(address, length, is_ours_to_write) in data {
            if length > 1 << 24 || is_ours_to_write == (kind == WRITE) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let mut bytes = vec![0; length as usize];
            match kind {
                READ => self.image.read_exact_at(&mut bytes, at)?,
                WRITE => {
                    self.read(DATA, address, &mut bytes)?;
                    self.image.write_all_at(&bytes, at)?;
                }
                _ => return Err(io::ErrorKind::Unsupported.into()),
            }
            if is_ours_to_write {
                self.put(DATA, address, &bytes)?;
                written += length;
            }
            at += u64::from(length);
        }
        if kind == FLUSH {
            self.image.sync_data()?;
        }
        Ok(written)
    }

    /// `struct virtio_blk_config`: the number of sectors, and zeros.
    fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let sectors = self.image.metadata().map_or(0, |it| it.len() / SECTOR);
        let mut config = sectors.to_le_bytes().to_vec();
        config.resize(256, 0);
        let part = config.into_iter().skip(offset as usize);
        part.take(size as usize).collect()
    }
}

/// The device as a monitor sees it.
struct Device {
    disk: Rc<RefCell<Disk>>,
    kick: Option<ReadableCall<EventCounter>>,
}

impl Device {
    /// Looks at the ring whenever the guest has put something into it.
    fn watch(&mut self, reactor: &mut Reactor, kick: EventCounter) {
        self.stop(reactor);
        let disk = Rc::clone(&self.disk);
        let watched = reactor.call_each_time_readable(kick, move |_, kick| {
            if let Err(error) = kick.take().and_then(|_| disk.borrow_mut().work()) {
                eprintln!("the ring is broken: {error}");
                return Next::Remove;
            }
            Next::Keep
        });
        self.kick = watched.ok();
    }

    fn stop(&mut self, reactor: &mut Reactor) {
        if let Some(kick) = self.kick.take() {
            kick.cancel(reactor);
        }
    }
}

impl<T: UnixTransport> VhostUserDevice<T> for Device {
    fn request_received(
        &mut self,
        cx: &mut BackEndContext<'_, T>,
        request: VhostUserRequest,
    ) -> VhostUserAnswer {
        use VhostUserRequest as Request;
        let mut disk = self.disk.borrow_mut();
        match request {
            Request::GetFeatures => return VhostUserAnswer::Value(DEVICE_FEATURES),
            Request::GetProtocolFeatures => return VhostUserAnswer::Value(PROTOCOL_FEATURES),
            Request::GetConfig { offset, size, .. } => {
                return VhostUserAnswer::Config(disk.config(offset, size));
            }
            Request::SetMemTable(memory) => disk.memory = memory,
            Request::SetVringNum { number, .. } => {
                disk.size = u16::try_from(number).unwrap_or_default();
            }
            Request::SetVringAddr { address, .. } => disk.address = address,
            Request::SetVringBase { number, .. } => disk.next = number as u16,
            Request::SetVringCall { fd, .. } => {
                disk.call = fd.and_then(|fd| EventCounter::from_descriptor(fd).ok());
            }
            Request::SetVringKick { fd: Some(fd), .. } => {
                drop(disk);
                match EventCounter::from_descriptor(fd) {
                    Ok(kick) => self.watch(cx.reactor, kick),
                    Err(_) => return VhostUserAnswer::Failed(1),
                }
            }
            Request::GetVringBase { index } => {
                let number = disk.next.into();
                drop(disk);
                self.stop(cx.reactor);
                return VhostUserAnswer::Vring { index, number };
            }
            _ => {}
        }
        VhostUserAnswer::Done
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, reason: &CloseReason) {
        println!("the monitor has left: {reason}");
        self.stop(reactor);
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let socket: Option<String> = arguments.option("--socket")?;
    let socket = socket.ok_or("--socket PATH, please; try --help")?;
    let image: Option<String> = arguments.option("--image")?;
    let image = image.ok_or("--image FILE, please; try --help")?;
    arguments.finish()?;

    let image = File::options().read(true).write(true).open(image)?;
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let here = Unix::at(socket.as_str()).mode(0o600);
    reactor.listen(here, move |_: &Address| {
        let disk = Disk {
            image: image.try_clone().expect("a descriptor is free"),
            memory: Vec::new(),
            size: 0,
            address: VringAddress::default(),
            next: 0,
            call: None,
        };
        back_end(Device {
            disk: Rc::new(RefCell::new(disk)),
            kick: None,
        })
    })?;
    reactor.run()?;
    Ok(())
}
