//! What is asked.

use std::os::fd::OwnedFd;

use bowline::PassedDescriptor;

use super::framing::{MAX_DESCRIPTORS, word};

/// Numbers of requests, as the specification has them.
pub(super) mod kind {
    pub(crate) const FIRST: u32 = 1;
    pub(crate) const LAST: u32 = 38;
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_LOG_FD: u32 = 7;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const POSTCOPY_ADVISE: u32 = 28;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;

    /// In the payload of kick, call and err: there is no descriptor.
    pub(crate) const NO_DESCRIPTOR: u32 = 1 << 8;
}

/// Bits of features: of virtio devices, and of this protocol.
pub mod features {
    /// Of a device (`VIRTIO_F_VERSION_1`): it is not of the time before the standard.
    pub const VERSION_1: u64 = 1 << 32;
    /// Of a device (`VHOST_USER_F_PROTOCOL_FEATURES`): the protocol has features, too. Rings
    /// are then off until they are enabled.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Of the protocol: several queues, and their number can be asked.
    pub const PROTOCOL_MQ: u64 = 1 << 0;
    /// Of the protocol: requests can be acknowledged.
    pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
    /// Of the protocol: the device's configuration is the back-end's.
    pub const PROTOCOL_CONFIG: u64 = 1 << 9;
}

/// A piece of the guest's memory.
#[derive(Debug)]
pub struct MemoryRegion {
    /// Where it is for the guest.
    pub guest: u64,
    /// How many bytes.
    pub size: u64,
    /// Where it is for the front-end.
    pub user: u64,
    /// Where it begins in the file. Who maps it maps from the beginning, `offset + size`.
    pub offset: u64,
    /// The memory: a memfd, as a rule.
    pub fd: OwnedFd,
}

impl MemoryRegion {
    /// Where in the file an address of the guest is, with `length` bytes that are there.
    pub fn at_guest(&self, address: u64, length: u64) -> Option<u64> {
        self.at(self.guest, address, length)
    }

    /// As [`at_guest`](Self::at_guest), of an address of the front-end.
    pub fn at_user(&self, address: u64, length: u64) -> Option<u64> {
        self.at(self.user, address, length)
    }

    fn at(&self, begin: u64, address: u64, length: u64) -> Option<u64> {
        let inside = address.checked_sub(begin)?;
        let end = inside.checked_add(length)?;
        (end <= self.size).then(|| self.offset.checked_add(inside))?
    }
}

/// Where the parts of a ring are: addresses of the front-end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringAddress {
    /// The table of descriptors.
    pub descriptors: u64,
    /// What the device has used.
    pub used: u64,
    /// What the driver has made available.
    pub available: u64,
}

/// A request of a front-end.
#[derive(Debug)]
#[non_exhaustive]
pub enum VhostUserRequest {
    /// Which features of the device there are. Answered by a value.
    GetFeatures,
    /// Which of them are used.
    SetFeatures(u64),
    /// The session begins.
    SetOwner,
    /// Deprecated; to be ignored.
    ResetOwner,
    /// The guest's memory, in place of what was said before.
    SetMemTable(Vec<MemoryRegion>),
    /// How many entries a ring has.
    SetVringNum {
        /// The ring.
        index: u32,
        /// How many; a power of 2.
        number: u32,
    },
    /// Where a ring is.
    SetVringAddr {
        /// The ring.
        index: u32,
        /// Where.
        address: VringAddress,
    },
    /// The next entry that the device takes.
    SetVringBase {
        /// The ring.
        index: u32,
        /// The entry.
        number: u32,
    },
    /// Stops a ring. Answered by the next entry that the device would have taken.
    GetVringBase {
        /// The ring.
        index: u32,
    },
    /// An eventfd that says that there is something in a ring, which starts it. Without one,
    /// the device has to look by itself.
    SetVringKick {
        /// The ring.
        index: u32,
        /// The eventfd.
        fd: Option<OwnedFd>,
    },
    /// An eventfd by which the device says that it has used entries. It comes again while
    /// the guest runs, in place of the one before.
    SetVringCall {
        /// The ring.
        index: u32,
        /// The eventfd.
        fd: Option<OwnedFd>,
    },
    /// An eventfd by which the device says that a ring is broken.
    SetVringErr {
        /// The ring.
        index: u32,
        /// The eventfd.
        fd: Option<OwnedFd>,
    },
    /// Which features of the protocol there are. Answered by a value.
    GetProtocolFeatures,
    /// Which of them are used.
    SetProtocolFeatures(u64),
    /// How many rings there are. Answered by a value.
    GetQueueNum,
    /// Turns a ring on or off.
    SetVringEnable {
        /// The ring.
        index: u32,
        /// Whether it is on.
        is_on: bool,
    },
    /// Reads the configuration of the device. Answered by its bytes, all of them.
    GetConfig {
        /// From where on.
        offset: u32,
        /// How many bytes.
        size: u32,
        /// For migration: 1.
        flags: u32,
    },
    /// Writes the configuration of the device.
    SetConfig {
        /// From where on.
        offset: u32,
        /// For migration: 1.
        flags: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// How many regions of memory there may be. Answered by a value.
    GetMaxMemSlots,
    /// One more region of memory.
    AddMemReg(MemoryRegion),
    /// Anything else, as it came. If it has an answer of its own, that cannot be given:
    /// do not offer the feature of the protocol that it belongs to.
    Other {
        /// Its number.
        request: u32,
        /// Its payload.
        payload: Vec<u8>,
        /// Its descriptors.
        descriptors: Vec<OwnedFd>,
    },
}

/// Bytes of the description of a region.
const REGION: usize = 32;

impl VhostUserRequest {
    /// What a message asks. `None` if its payload is not what its kind has.
    pub(super) fn read(
        request: u32,
        payload: &[u8],
        mut descriptors: impl Iterator<Item = OwnedFd>,
    ) -> Option<Self> {
        let value = || Some(u64::from_ne_bytes(*payload.first_chunk()?));
        let state = || Some((low(value()?), high(value()?)));
        let index = || Some(low(value()?) & 0xff);
        Some(match request {
            kind::GET_FEATURES => Self::GetFeatures,
            kind::SET_FEATURES => Self::SetFeatures(value()?),
            kind::SET_OWNER => Self::SetOwner,
            kind::RESET_OWNER => Self::ResetOwner,
            kind::SET_MEM_TABLE => Self::SetMemTable(read_regions(payload, descriptors)?),
            kind::SET_VRING_NUM => {
                let (index, number) = state()?;
                Self::SetVringNum { index, number }
            }
            kind::SET_VRING_BASE => {
                let (index, number) = state()?;
                Self::SetVringBase { index, number }
            }
            kind::GET_VRING_BASE => Self::GetVringBase { index: state()?.0 },
            kind::SET_VRING_ADDR => {
                let words = words::<5>(payload)?;
                let address = VringAddress {
                    descriptors: words[1],
                    used: words[2],
                    available: words[3],
                };
                let index = low(words[0]);
                Self::SetVringAddr { index, address }
            }
            kind::SET_VRING_KICK => {
                let (index, fd) = (index()?, descriptors.next());
                Self::SetVringKick { index, fd }
            }
            kind::SET_VRING_CALL => {
                let (index, fd) = (index()?, descriptors.next());
                Self::SetVringCall { index, fd }
            }
            kind::SET_VRING_ERR => {
                let (index, fd) = (index()?, descriptors.next());
                Self::SetVringErr { index, fd }
            }
            kind::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            kind::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(value()?),
            kind::GET_QUEUE_NUM => Self::GetQueueNum,
            kind::SET_VRING_ENABLE => {
                let (index, number) = state()?;
                let is_on = number != 0;
                Self::SetVringEnable { index, is_on }
            }
            kind::GET_CONFIG | kind::SET_CONFIG => read_config(request, payload)?,
            kind::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            kind::ADD_MEM_REG => {
                let region = payload.get(8..)?;
                Self::AddMemReg(read_region(region, descriptors.next()?)?)
            }
            _ => Self::Other {
                request,
                payload: payload.to_vec(),
                descriptors: descriptors.collect(),
            },
        })
    }

    /// Its number, its payload and its descriptors.
    pub(super) fn write(self) -> (u32, Vec<u8>, Vec<PassedDescriptor>) {
        let none = Vec::new;
        let pair = |first: u32, second: u32| [first.to_ne_bytes(), second.to_ne_bytes()].concat();
        let event = |index: u32, fd: Option<OwnedFd>| {
            let flag = if fd.is_some() { 0 } else { kind::NO_DESCRIPTOR };
            let fd: Vec<PassedDescriptor> = fd.into_iter().map(Into::into).collect();
            (pair(index | flag, 0), fd)
        };
        match self {
            Self::GetFeatures => (kind::GET_FEATURES, none(), Vec::new()),
            Self::SetFeatures(value) => {
                (kind::SET_FEATURES, value.to_ne_bytes().into(), Vec::new())
            }
            Self::SetOwner => (kind::SET_OWNER, none(), Vec::new()),
            Self::ResetOwner => (kind::RESET_OWNER, none(), Vec::new()),
            Self::SetMemTable(regions) => {
                let mut payload = pair(u32::try_from(regions.len()).unwrap_or(u32::MAX), 0);
                regions.iter().for_each(|it| write_region(it, &mut payload));
                let fds = regions.into_iter().map(|it| it.fd.into()).collect();
                (kind::SET_MEM_TABLE, payload, fds)
            }
            Self::SetVringNum { index, number } => {
                (kind::SET_VRING_NUM, pair(index, number), Vec::new())
            }
            Self::SetVringAddr { index, address } => {
                let VringAddress {
                    descriptors,
                    used,
                    available,
                } = address;
                let words = [u64::from(index), descriptors, used, available, 0];
                let payload = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
                (kind::SET_VRING_ADDR, payload, Vec::new())
            }
            Self::SetVringBase { index, number } => {
                (kind::SET_VRING_BASE, pair(index, number), Vec::new())
            }
            Self::GetVringBase { index } => (kind::GET_VRING_BASE, pair(index, 0), Vec::new()),
            Self::SetVringKick { index, fd } => {
                let (payload, fd) = event(index, fd);
                (kind::SET_VRING_KICK, payload, fd)
            }
            Self::SetVringCall { index, fd } => {
                let (payload, fd) = event(index, fd);
                (kind::SET_VRING_CALL, payload, fd)
            }
            Self::SetVringErr { index, fd } => {
                let (payload, fd) = event(index, fd);
                (kind::SET_VRING_ERR, payload, fd)
            }
            Self::GetProtocolFeatures => (kind::GET_PROTOCOL_FEATURES, none(), Vec::new()),
            Self::SetProtocolFeatures(value) => {
                let payload = value.to_ne_bytes().into();
                (kind::SET_PROTOCOL_FEATURES, payload, Vec::new())
            }
            Self::GetQueueNum => (kind::GET_QUEUE_NUM, none(), Vec::new()),
            Self::SetVringEnable { index, is_on } => (
                kind::SET_VRING_ENABLE,
                pair(index, is_on.into()),
                Vec::new(),
            ),
            Self::GetConfig {
                offset,
                size,
                flags,
            } => {
                let room = vec![0; size as usize];
                (
                    kind::GET_CONFIG,
                    write_config(offset, flags, &room),
                    Vec::new(),
                )
            }
            Self::SetConfig {
                offset,
                flags,
                bytes,
            } => (
                kind::SET_CONFIG,
                write_config(offset, flags, &bytes),
                Vec::new(),
            ),
            Self::GetMaxMemSlots => (kind::GET_MAX_MEM_SLOTS, none(), Vec::new()),
            Self::AddMemReg(region) => {
                let mut payload = vec![0; 8];
                write_region(&region, &mut payload);
                (kind::ADD_MEM_REG, payload, vec![region.fd.into()])
            }
            Self::Other {
                request,
                payload,
                descriptors,
            } => {
                let descriptors = descriptors.into_iter().map(Into::into).collect();
                (request, payload, descriptors)
            }
        }
    }

    /// Whether it has an answer of its own.
    pub(super) fn has_answer(&self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::GetProtocolFeatures
                | Self::GetQueueNum
                | Self::GetVringBase { .. }
                | Self::GetConfig { .. }
                | Self::GetMaxMemSlots
        )
    }
}

pub(super) fn low(value: u64) -> u32 {
    word(&value.to_ne_bytes(), 0)
}

pub(super) fn high(value: u64) -> u32 {
    word(&value.to_ne_bytes(), 4)
}

fn words<const N: usize>(payload: &[u8]) -> Option<[u64; N]> {
    let mut words = [0; N];
    let (chunks, _) = payload.get(..8 * N)?.as_chunks::<8>();
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u64::from_ne_bytes(*chunk);
    }
    Some(words)
}

fn read_regions(
    payload: &[u8],
    descriptors: impl Iterator<Item = OwnedFd>,
) -> Option<Vec<MemoryRegion>> {
    let (head, regions) = payload.split_first_chunk::<8>()?;
    let count = word(head, 0) as usize;
    let descriptors: Vec<_> = descriptors.collect();
    if count > MAX_DESCRIPTORS || descriptors.len() != count || regions.len() < count * REGION {
        return None;
    }
    let regions = regions.chunks_exact(REGION).zip(descriptors);
    regions
        .map(|(region, fd)| read_region(region, fd))
        .collect()
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

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
            Request::Other {
                request: 99,
                payload: vec![1],
                descriptors: vec![fd()],
            },
        ] {
            let before = shown(&request);
            let (kind, payload, fds) = request.write();
            let fds = fds.into_iter().map(|it| match it {
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
                // What follows an address is for migration.
                assert!(
                    may_be_cut || kind == kind::SET_VRING_ADDR,
                    "{before} {length}"
                );
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
