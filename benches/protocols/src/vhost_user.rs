//! A device that keeps what it is given.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bowline::{Address, CloseReason, Reactor, Transports as _, Unix, UnixTransport};
use bowline_peers::vhost_user::{
    BackEndContext, MemoryRegion, VhostUserAnswer, VhostUserDevice, VhostUserRequest, back_end,
};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};

use crate::generator::{Wire, borrowed, files, word};
use crate::peer::{Peer, Process};
use crate::{Outcome, Session, Work};

pub(crate) const PEERS: &[Peer] = &[Peer::rust("bowline"), Peer::rust("vhost")];

const FEATURES: u64 = 1 << 32 | 1 << 30;
/// REPLY_ACK and CONFIG.
const PROTOCOL_FEATURES: u64 = 1 << 3 | 1 << 9;

const fn work(name: &'static str, which: usize, messages: usize, times: usize) -> Work {
    Work {
        name,
        kind: "vhost-user",
        times,
        messages,
        connect,
        detail: (which, 0),
    }
}

/// Each a sequence of messages.
const START: usize = 0;
const GET_FEATURES: usize = 1;
const SET_VRING_CALL: usize = 2;
const SET_MEM_TABLE: usize = 3;

pub(crate) const WORKS: &[Work] = &[
    work(
        "start of a disk, as QEMU does it: 18 messages, 6 descriptors",
        START,
        18,
        400,
    ),
    work("GET_FEATURES, answered", GET_FEATURES, 1, 5_000),
    work(
        "SET_VRING_CALL, 1 descriptor, acknowledged",
        SET_VRING_CALL,
        1,
        5_000,
    ),
    work(
        "SET_MEM_TABLE, 8 descriptors, acknowledged",
        SET_MEM_TABLE,
        1,
        3_000,
    ),
];

pub(crate) fn serve(peer: &str, socket: &Path) -> Outcome {
    match peer {
        "bowline" => with_bowline(socket),
        _ => with_vhost(socket),
    }
}

#[derive(Default)]
struct Ours {
    memory: Vec<MemoryRegion>,
    call: Option<OwnedFd>,
    kick: Option<OwnedFd>,
    err: Option<OwnedFd>,
    number: u64,
}

impl<T: UnixTransport> VhostUserDevice<T> for Ours {
    fn request_received(
        &mut self,
        _: &mut BackEndContext<'_, T>,
        request: VhostUserRequest,
    ) -> VhostUserAnswer {
        use VhostUserRequest as Request;
        match request {
            Request::GetFeatures => return VhostUserAnswer::Value(FEATURES),
            Request::GetProtocolFeatures => return VhostUserAnswer::Value(PROTOCOL_FEATURES),
            Request::GetConfig { size, .. } => {
                return VhostUserAnswer::Config(vec![0; size as usize]);
            }
            Request::SetMemTable(memory) => self.memory = memory,
            Request::SetVringCall { fd, .. } => self.call = fd,
            Request::SetVringKick { fd, .. } => self.kick = fd,
            Request::SetVringErr { fd, .. } => self.err = fd,
            Request::SetVringNum { number, .. } => self.number = number.into(),
            Request::SetVringAddr { address, .. } => self.number = address.used,
            _ => {}
        }
        VhostUserAnswer::Done
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
        let _ = reactor.stop();
    }
}

fn with_bowline(socket: &Path) -> Outcome {
    let mut reactor = Reactor::new()?;
    reactor.listen(Unix::at(socket), |_: &Address| back_end(Ours::default()))?;
    reactor.run()?;
    Ok(())
}

#[derive(Default)]
struct Theirs {
    memory: Vec<(VhostUserMemoryRegion, File)>,
    call: Option<File>,
    kick: Option<File>,
    err: Option<File>,
    number: u64,
}

/// Nothing of what the generator asks.
fn never<A>() -> Result<A> {
    Err(Error::InvalidOperation("nobody asks for it"))
}

impl VhostUserBackendReqHandlerMut for Theirs {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        never()
    }

    fn reset_device(&mut self) -> Result<()> {
        never()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.memory = regions.iter().copied().zip(files).collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, _: u32, number: u32) -> Result<()> {
        self.number = number.into();
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        _: u32,
        _: VhostUserVringAddrFlags,
        _: u64,
        used: u64,
        _: u64,
        _: u64,
    ) -> Result<()> {
        self.number = used;
        Ok(())
    }

    fn set_vring_base(&mut self, _: u32, _: u32) -> Result<()> {
        Ok(())
    }

    fn get_vring_base(&mut self, _: u32) -> Result<VhostUserVringState> {
        never()
    }

    fn set_vring_kick(&mut self, _: u8, fd: Option<File>) -> Result<()> {
        self.kick = fd;
        Ok(())
    }

    fn set_vring_call(&mut self, _: u8, fd: Option<File>) -> Result<()> {
        self.call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _: u8, fd: Option<File>) -> Result<()> {
        self.err = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(
            PROTOCOL_FEATURES,
        ))
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        never()
    }

    fn set_vring_enable(&mut self, _: u32, _: bool) -> Result<()> {
        Ok(())
    }

    fn get_config(&mut self, _: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(vec![0; size as usize])
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        never()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        never()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        never()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        never()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        never()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        never()
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        never()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        never()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        never()
    }

    fn check_device_state(&mut self) -> Result<()> {
        never()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        never()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        never()
    }
}

fn with_vhost(socket: &Path) -> Outcome {
    let stream = UnixListener::bind(socket)?.accept()?.0;
    let device = Arc::new(Mutex::new(Theirs::default()));
    let mut handler = BackendReqHandler::from_stream(stream, device);
    // Until the front-end has gone.
    while handler.handle_request().is_ok() {}
    Ok(())
}

/// A message, how many descriptors it has, and whether it is answered.
struct Message {
    bytes: Vec<u8>,
    descriptors: usize,
    is_answered: bool,
}

fn message(request: u32, payload: &[u64], descriptors: usize, is_answered: bool) -> Message {
    // What has no answer of its own is to be acknowledged.
    let has_answer = matches!(request, 1 | 15 | 24);
    let flags = if is_answered && !has_answer { 1 | 8 } else { 1 };
    let mut bytes = Vec::new();
    for word in [request, flags, 8 * payload.len() as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload.iter().flat_map(|it| it.to_ne_bytes()));
    Message {
        bytes,
        descriptors,
        is_answered,
    }
}

fn memory(regions: usize) -> Message {
    let mut payload = vec![regions as u64];
    for region in 0..regions as u64 {
        payload.extend([region << 24, 1 << 24, 0x7f00_0000_0000 + (region << 24), 0]);
    }
    message(5, &payload, regions, true)
}

fn get_config() -> Message {
    // Offset, size, flags and so many bytes.
    let mut payload = vec![60 << 32];
    payload.extend([0; 8]);
    let mut message = message(24, &payload, 0, true);
    message.bytes[8..12].copy_from_slice(&72_u32.to_ne_bytes());
    message
}

/// As seen of QEMU 7.2.
fn start() -> Vec<Message> {
    vec![
        message(1, &[], 0, true),
        message(15, &[], 0, true),
        message(16, &[PROTOCOL_FEATURES], 0, false),
        message(3, &[], 0, false),
        message(1, &[], 0, true),
        message(13, &[0], 1, false),
        message(14, &[0], 1, false),
        get_config(),
        message(2, &[FEATURES], 0, false),
        message(13, &[0], 1, false),
        message(2, &[FEATURES], 0, false),
        memory(1),
        message(8, &[256 << 32], 0, false),
        message(10, &[0], 0, false),
        message(9, &[0, 0x1000, 0x2000, 0x3000, 0], 0, false),
        message(12, &[0], 1, false),
        message(13, &[0], 1, false),
        // A ring of no interest; acknowledged, so that the end of it all is seen.
        message(18, &[1 << 32], 0, true),
    ]
}

struct Messages {
    wire: Wire,
    messages: Vec<Message>,
    files: Vec<OwnedFd>,
}

fn connect(process: &Process, work: &Work) -> Outcome<Box<dyn Session>> {
    let mut session = Messages {
        wire: Wire::connect(process)?,
        messages: start(),
        files: files(8)?,
    };
    // Features are chosen.
    session.run(1)?;
    match work.detail.0 {
        GET_FEATURES => session.messages = vec![message(1, &[], 0, true)],
        SET_VRING_CALL => session.messages = vec![message(13, &[0], 1, true)],
        SET_MEM_TABLE => session.messages = vec![memory(8)],
        _ => {}
    }
    Ok(Box::new(session))
}

impl Session for Messages {
    fn run(&mut self, times: usize) -> Outcome {
        let length = |bytes: &[u8]| Some(12 + word(bytes, 8)? as usize);
        for _ in 0..times {
            for message in &self.messages {
                let files = borrowed(&self.files[..message.descriptors]);
                self.wire.send(&message.bytes, &files)?;
                if !message.is_answered {
                    continue;
                }
                let answer = self.wire.next(length)?;
                let is_acknowledgement = message.bytes[4] & 8 != 0;
                if answer[..4] != message.bytes[..4] || is_acknowledgement && answer[12..] != [0; 8]
                {
                    return Err(format!("answered: {}", answer.escape_ascii()).into());
                }
            }
        }
        Ok(())
    }
}
