//! Encodes and parses requests as bytes and descriptors; pure.

use std::os::fd::OwnedFd;

use bowline::PassedDescriptor;

use super::framing::{LOG, MAX_DESCRIPTORS, word};
use super::messages::{InflightRegion, MemoryRegion, VhostUserRequest, VringAddress, kind};

/// Bytes of the description of a memory region.
const REGION: usize = 32;

impl VhostUserRequest {
    /// Parses a message. Returns `None` if its payload does not fit its request.
    pub(super) fn read(
        request: u32,
        payload: &[u8],
        mut descriptors: impl Iterator<Item = OwnedFd>,
    ) -> Option<Self> {
        match request {
            kind::SET_VRING_NUM..=kind::SET_VRING_ERR | kind::SET_VRING_ENABLE => {
                Self::read_ring(request, payload, descriptors.next())
            }
            _ => Self::read_other(request, payload, descriptors),
        }
    }

    /// Parses a request about a ring.
    fn read_ring(request: u32, payload: &[u8], fd: Option<OwnedFd>) -> Option<Self> {
        let (first, second) = (low(value(payload)?), high(value(payload)?));
        let index = match request {
            kind::SET_VRING_KICK | kind::SET_VRING_CALL | kind::SET_VRING_ERR => first & 0xff,
            _ => first,
        };
        let number = second;
        Some(match request {
            kind::SET_VRING_NUM => Self::SetVringNum { index, number },
            kind::SET_VRING_BASE => Self::SetVringBase { index, number },
            kind::GET_VRING_BASE => Self::GetVringBase { index },
            kind::SET_VRING_KICK => Self::SetVringKick { index, fd },
            kind::SET_VRING_CALL => Self::SetVringCall { index, fd },
            kind::SET_VRING_ERR => Self::SetVringErr { index, fd },
            kind::SET_VRING_ENABLE => {
                let is_on = number != 0;
                Self::SetVringEnable { index, is_on }
            }
            _ => {
                let [_, descriptors, used, available, log] = words(payload)?;
                let log = (second & kind::LOGGED != 0).then_some(log);
                let address = VringAddress {
                    descriptors,
                    used,
                    available,
                    log,
                };
                Self::SetVringAddr { index, address }
            }
        })
    }

    fn read_other(
        request: u32,
        payload: &[u8],
        mut descriptors: impl Iterator<Item = OwnedFd>,
    ) -> Option<Self> {
        Some(match request {
            kind::GET_FEATURES => Self::GetFeatures,
            kind::SET_FEATURES => Self::SetFeatures(value(payload)?),
            kind::SET_OWNER => Self::SetOwner,
            kind::RESET_OWNER => Self::ResetOwner,
            kind::SET_MEM_TABLE => Self::SetMemTable(read_regions(payload, descriptors)?),
            kind::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            kind::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(value(payload)?),
            kind::GET_QUEUE_NUM => Self::GetQueueNum,
            kind::GET_CONFIG | kind::SET_CONFIG => read_config(request, payload)?,
            kind::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            kind::ADD_MEM_REG => {
                let region = payload.get(8..)?;
                Self::AddMemReg(read_region(region, descriptors.next()?)?)
            }
            kind::REM_MEM_REG => {
                let [_, guest, size, user] = words(payload)?;
                Self::RemMemReg { guest, size, user }
            }
            kind::SET_LOG_BASE if payload.len() >= LOG => {
                let [size, offset] = words(payload)?;
                let fd = descriptors.next()?;
                Self::SetLogBase { size, offset, fd }
            }
            kind::SET_LOG_FD => Self::SetLogFd(descriptors.next()?),
            kind::SET_BACKEND_REQ_FD => Self::SetBackendReqFd(descriptors.next()?),
            kind::GET_INFLIGHT_FD => Self::GetInflightFd(read_inflight(payload)?),
            kind::SET_INFLIGHT_FD => {
                let (region, fd) = (read_inflight(payload)?, descriptors.next()?);
                Self::SetInflightFd { region, fd }
            }
            _ => Self::Other {
                request,
                payload: payload.to_vec(),
                descriptors: descriptors.take(MAX_DESCRIPTORS).collect(),
            },
        })
    }

    /// Encodes the request.
    pub(super) fn write(self) -> Written {
        let event = |kind, index: u32, fd: Option<OwnedFd>| {
            let flag = if fd.is_some() { 0 } else { kind::NO_DESCRIPTOR };
            Written::new(kind, pair(index | flag, 0)).with(fd)
        };
        match self {
            Self::SetVringBase { index, number } => {
                Written::new(kind::SET_VRING_BASE, pair(index, number))
            }
            Self::GetVringBase { index } => Written::new(kind::GET_VRING_BASE, pair(index, 0)),
            Self::SetVringKick { index, fd } => event(kind::SET_VRING_KICK, index, fd),
            Self::SetVringCall { index, fd } => event(kind::SET_VRING_CALL, index, fd),
            Self::SetVringErr { index, fd } => event(kind::SET_VRING_ERR, index, fd),
            Self::SetVringEnable { index, is_on } => {
                Written::new(kind::SET_VRING_ENABLE, pair(index, is_on.into()))
            }
            Self::SetVringAddr { index, address } => {
                let flags = if address.log.is_some() {
                    kind::LOGGED
                } else {
                    0
                };
                let words = [
                    address.descriptors,
                    address.used,
                    address.available,
                    address.log.unwrap_or(0),
                ];
                let payload = [pair(index, flags), bytes(&words)].concat();
                Written::new(kind::SET_VRING_ADDR, payload)
            }
            Self::SetVringNum { index, number } => {
                Written::new(kind::SET_VRING_NUM, pair(index, number))
            }
            other => other.write_other(),
        }
    }

    /// Encodes a request that is about no ring.
    fn write_other(self) -> Written {
        let plain = |kind| Written::new(kind, Vec::new());
        match self {
            Self::GetFeatures => plain(kind::GET_FEATURES),
            Self::SetFeatures(value) => Written::new(kind::SET_FEATURES, bytes(&[value])),
            Self::SetOwner => plain(kind::SET_OWNER),
            Self::ResetOwner => plain(kind::RESET_OWNER),
            Self::SetMemTable(regions) => {
                let mut payload = pair(u32::try_from(regions.len()).unwrap_or(u32::MAX), 0);
                regions.iter().for_each(|it| write_region(it, &mut payload));
                let descriptors = regions.into_iter().map(|it| it.fd);
                Written::new(kind::SET_MEM_TABLE, payload).with(descriptors)
            }
            Self::GetProtocolFeatures => plain(kind::GET_PROTOCOL_FEATURES),
            Self::SetProtocolFeatures(value) => {
                Written::new(kind::SET_PROTOCOL_FEATURES, bytes(&[value]))
            }
            Self::GetQueueNum => plain(kind::GET_QUEUE_NUM),
            Self::GetConfig {
                offset,
                size,
                flags,
            } => {
                let room = vec![0; size as usize];
                Written::new(kind::GET_CONFIG, write_config(offset, flags, &room))
            }
            Self::SetConfig {
                offset,
                flags,
                bytes,
            } => Written::new(kind::SET_CONFIG, write_config(offset, flags, &bytes)),
            Self::GetMaxMemSlots => plain(kind::GET_MAX_MEM_SLOTS),
            Self::AddMemReg(region) => {
                let mut payload = vec![0; 8];
                write_region(&region, &mut payload);
                Written::new(kind::ADD_MEM_REG, payload).with([region.fd])
            }
            Self::RemMemReg { guest, size, user } => {
                Written::new(kind::REM_MEM_REG, bytes(&[0, guest, size, user, 0]))
            }
            other => other.write_passing(),
        }
    }

    /// Encodes a request about migration, or about recovery from a crash.
    fn write_passing(self) -> Written {
        match self {
            Self::SetLogBase { size, offset, fd } => {
                Written::new(kind::SET_LOG_BASE, bytes(&[size, offset])).with([fd])
            }
            Self::SetLogFd(fd) => Written::new(kind::SET_LOG_FD, Vec::new()).with([fd]),
            Self::SetBackendReqFd(fd) => {
                Written::new(kind::SET_BACKEND_REQ_FD, Vec::new()).with([fd])
            }
            Self::GetInflightFd(region) => {
                Written::new(kind::GET_INFLIGHT_FD, write_inflight(&region))
            }
            Self::SetInflightFd { region, fd } => {
                Written::new(kind::SET_INFLIGHT_FD, write_inflight(&region)).with([fd])
            }
            Self::Other {
                request,
                payload,
                descriptors,
            } => Written::new(request, payload).with(descriptors),
            other => unreachable!("{other:?} is written above"),
        }
    }

    /// Whether the request has an answer of its own.
    pub(super) fn has_answer(&self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::GetProtocolFeatures
                | Self::GetQueueNum
                | Self::GetVringBase { .. }
                | Self::GetConfig { .. }
                | Self::GetMaxMemSlots
                | Self::SetLogBase { .. }
                | Self::GetInflightFd(_)
        )
    }
}

/// An encoded request.
pub(super) struct Written {
    pub(super) request: u32,
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<PassedDescriptor>,
}

impl Written {
    pub(super) fn new(request: u32, payload: Vec<u8>) -> Self {
        Self {
            request,
            payload,
            descriptors: Vec::new(),
        }
    }

    pub(super) fn with(mut self, descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        let descriptors = descriptors.into_iter().map(PassedDescriptor::from);
        self.descriptors.extend(descriptors);
        self
    }
}

/// Parses a payload that is a number.
pub(super) fn value(payload: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(*payload.first_chunk()?))
}

pub(super) fn pair(first: u32, second: u32) -> Vec<u8> {
    [first.to_ne_bytes(), second.to_ne_bytes()].concat()
}

pub(super) fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|it| it.to_ne_bytes()).collect()
}

pub(super) fn low(value: u64) -> u32 {
    word(&value.to_ne_bytes(), 0)
}

pub(super) fn high(value: u64) -> u32 {
    word(&value.to_ne_bytes(), 4)
}

pub(super) fn words<const N: usize>(payload: &[u8]) -> Option<[u64; N]> {
    let mut words = [0; N];
    let (chunks, _) = payload.get(..8 * N)?.as_chunks::<8>();
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u64::from_ne_bytes(*chunk);
    }
    Some(words)
}

fn read_regions(
    payload: &[u8],
    mut descriptors: impl Iterator<Item = OwnedFd>,
) -> Option<Vec<MemoryRegion>> {
    let (head, regions) = payload.split_first_chunk::<8>()?;
    let count = word(head, 0) as usize;
    if count > MAX_DESCRIPTORS || regions.len() < count * REGION {
        return None;
    }
    let mut read = Vec::with_capacity(count);
    for region in regions.chunks_exact(REGION).take(count) {
        read.push(read_region(region, descriptors.next()?)?);
    }
    descriptors.next().is_none().then_some(read)
}

fn read_region(bytes: &[u8], fd: OwnedFd) -> Option<MemoryRegion> {
    let [guest, size, user, offset] = words::<4>(bytes)?;
    // Who maps it adds these.
    offset.checked_add(size)?;
    Some(MemoryRegion {
        guest,
        size,
        user,
        offset,
        fd,
    })
}

fn write_region(region: &MemoryRegion, out: &mut Vec<u8>) {
    for word in [region.guest, region.size, region.user, region.offset] {
        out.extend(word.to_ne_bytes());
    }
}

fn read_config(request: u32, payload: &[u8]) -> Option<VhostUserRequest> {
    let (head, bytes) = payload.split_first_chunk::<12>()?;
    let (offset, size, flags) = (word(head, 0), word(head, 4), word(head, 8));
    let bytes = bytes.get(..size as usize)?;
    Some(match request {
        kind::GET_CONFIG => VhostUserRequest::GetConfig {
            offset,
            size,
            flags,
        },
        _ => VhostUserRequest::SetConfig {
            offset,
            flags,
            bytes: bytes.to_vec(),
        },
    })
}

pub(super) fn write_config(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut payload: Vec<_> = [offset, size, flags]
        .iter()
        .flat_map(|it| it.to_ne_bytes())
        .collect();
    payload.extend_from_slice(bytes);
    payload
}

pub(super) fn read_inflight(payload: &[u8]) -> Option<InflightRegion> {
    let [size, offset] = words(payload)?;
    let queues = payload.get(16..)?.first_chunk()?;
    let queue_size = payload.get(18..)?.first_chunk()?;
    Some(InflightRegion {
        size,
        offset,
        queues: u16::from_ne_bytes(*queues),
        queue_size: u16::from_ne_bytes(*queue_size),
    })
}

pub(super) fn write_inflight(region: &InflightRegion) -> Vec<u8> {
    let mut payload = bytes(&[region.size, region.offset]);
    payload.extend(region.queues.to_ne_bytes());
    payload.extend(region.queue_size.to_ne_bytes());
    // To whole words, as the structure has it in C.
    payload.resize(24, 0);
    payload
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::vhost_user::features;

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn region(guest: u64) -> MemoryRegion {
        MemoryRegion {
            guest,
            size: 0x1000,
            user: 0x7000_0000 + guest,
            offset: 0x100,
            fd: fd(),
        }
    }

    /// What it says, without the numbers of descriptors.
    fn shown(request: &VhostUserRequest) -> String {
        let text = format!("{request:?}");
        let parts = text
            .split("OwnedFd { fd: ")
            .map(|part| part.trim_start_matches(|letter: char| letter.is_ascii_digit()));
        parts.collect()
    }

    #[test]
    fn what_is_written_is_read() {
        use VhostUserRequest as Request;
        let (index, number) = (3, 256);
        let address = VringAddress {
            descriptors: 1,
            used: 2,
            available: 3,
            log: None,
        };
        let logged = VringAddress {
            log: Some(0),
            ..address
        };
        let inflight = InflightRegion {
            size: 1,
            offset: 2,
            queues: 3,
            queue_size: 4,
        };
        for request in [
            Request::GetFeatures,
            Request::SetFeatures(features::VERSION_1 | 7),
            Request::SetMemTable(vec![region(0), region(0x4000)]),
            Request::SetVringNum { index, number },
            Request::SetVringAddr { index, address },
            Request::GetVringBase { index },
            Request::SetVringKick {
                index,
                fd: Some(fd()),
            },
            Request::SetVringCall { index, fd: None },
            Request::SetVringEnable { index, is_on: true },
            Request::GetConfig {
                offset: 4,
                size: 60,
                flags: 1,
            },
            Request::SetConfig {
                offset: 4,
                flags: 1,
                bytes: vec![1, 2, 3],
            },
            Request::AddMemReg(region(0x4000)),
            Request::RemMemReg {
                guest: 1,
                size: 2,
                user: 3,
            },
            Request::SetVringAddr {
                index,
                address: logged,
            },
            Request::SetLogBase {
                size: 5,
                offset: 6,
                fd: fd(),
            },
            Request::SetLogFd(fd()),
            Request::SetBackendReqFd(fd()),
            Request::GetInflightFd(inflight),
            Request::SetInflightFd {
                region: inflight,
                fd: fd(),
            },
            Request::Other {
                request: 99,
                payload: vec![1],
                descriptors: vec![fd()],
            },
        ] {
            let before = shown(&request);
            let Written {
                request: kind,
                payload,
                descriptors,
            } = request.write();
            let fds = descriptors.into_iter().map(|it| match it {
                PassedDescriptor::Owned(fd) => fd,
                PassedDescriptor::Shared(_) => panic!("nobody shares it"),
            });
            let fds: Vec<_> = fds.collect();
            let count = fds.len();
            let after = Request::read(kind, &payload, fds.into_iter()).expect(&before);
            assert_eq!(shown(&after), before);
            for length in 0..payload.len() {
                let fds: Vec<_> = (0..count).map(|_| fd()).collect();
                let cut = Request::read(kind, &payload[..length], fds.into_iter());
                let may_be_cut = matches!(cut, None | Some(Request::Other { .. }));
                // Nothing is read of what is behind the last word, or half-word.
                let is_padding = match kind {
                    kind::GET_INFLIGHT_FD | kind::SET_INFLIGHT_FD => length >= 20,
                    kind::REM_MEM_REG => length >= 32,
                    _ => false,
                };
                assert!(may_be_cut || is_padding, "{before} {length}");
            }
        }
    }

    #[test]
    fn address_is_found_only_inside_of_its_region() {
        let region = region(0x4000);
        assert_eq!(region.at_guest(0x4000, 0x1000), Some(0x100));
        assert_eq!(region.at_guest(0x4fff, 1), Some(0x10ff));
        assert_eq!(region.at_user(0x7000_4000, 1), Some(0x100));
        for (address, length) in [
            (0x3fff, 1),
            (0x4000, 0x1001),
            (0x5000, 1),
            (0x4001, u64::MAX),
        ] {
            assert_eq!(
                region.at_guest(address, length),
                None,
                "{address:x} {length:x}"
            );
        }
    }
}
