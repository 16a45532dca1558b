//! The requests of a front-end.

use std::os::fd::OwnedFd;

/// The numbers of the requests, as in the specification.
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
    pub(crate) const REM_MEM_REG: u32 = 38;

    /// In the payload of kick, call and err: there is no descriptor.
    pub(crate) const NO_DESCRIPTOR: u32 = 1 << 8;

    /// In the address of a ring: writes to its used ring are recorded in the log.
    pub(crate) const LOGGED: u32 = 1;
}

/// Feature bits: of virtio devices, and of this protocol.
pub mod features {
    /// Of a device (`VIRTIO_F_VERSION_1`): it conforms to the virtio standard and is not a
    /// legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// Of a device (`VHOST_USER_F_PROTOCOL_FEATURES`): protocol features can be negotiated.
    /// Rings are then disabled until they are enabled.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Of the protocol: there are several queues, and their number can be requested.
    pub const PROTOCOL_MQ: u64 = 1 << 0;
    /// Of a device (`VHOST_F_LOG_ALL`): its writes to the guest's memory are recorded in
    /// the log.
    pub const LOG_ALL: u64 = 1 << 26;
    /// Of the protocol: the log is passed as a descriptor. A guest can then be migrated.
    pub const PROTOCOL_LOG_SHMFD: u64 = 1 << 1;
    /// Of the protocol: requests can be acknowledged.
    pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
    /// Of the protocol: the back-end may also send requests, on a channel of its own.
    pub const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
    /// Of the protocol: the back-end has the device's configuration.
    pub const PROTOCOL_CONFIG: u64 = 1 << 9;
    /// Of the protocol: a request of a back-end may have descriptors.
    pub const PROTOCOL_BACKEND_SEND_FD: u64 = 1 << 10;
    /// Of the protocol: the back-end can request that memory of the device is mapped into
    /// the guest.
    pub const PROTOCOL_HOST_NOTIFIER: u64 = 1 << 11;
    /// Of the protocol: requests in progress are recorded in memory that outlives the
    /// device.
    pub const PROTOCOL_INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Of the protocol: memory regions are added and removed one by one.
    pub const PROTOCOL_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// A region of the guest's memory.
#[derive(Debug)]
pub struct MemoryRegion {
    /// Its address in the guest.
    pub guest: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its address in the front-end.
    pub user: u64,
    /// Where it begins in the file. A device that maps it maps the file from its beginning,
    /// with a length of `offset + size`.
    pub offset: u64,
    /// The memory, usually a memfd.
    pub fd: OwnedFd,
}

impl MemoryRegion {
    /// Returns where in the file an address of the guest is. `None` if the `length` bytes
    /// from there are not all in this region.
    pub fn at_guest(&self, address: u64, length: u64) -> Option<u64> {
        self.at(self.guest, address, length)
    }

    /// As [`at_guest`](Self::at_guest), for an address of the front-end.
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
    /// The descriptor table.
    pub descriptors: u64,
    /// The used ring, which the device writes.
    pub used: u64,
    /// The available ring, which the driver writes.
    pub available: u64,
    /// The address of the used ring in the guest's memory, for the log. `Some` while a
    /// guest is being migrated: the device has to record what it writes there.
    pub log: Option<u64>,
}

/// Memory in which a device records its requests in progress, so that another device can go
/// on after a crash. The device decides on its layout; see the section "Inflight I/O
/// tracking" of the specification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightRegion {
    /// Its size in bytes.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// For how many rings it is.
    pub queues: u16,
    /// How many entries each ring has.
    pub queue_size: u16,
}

/// A request of a front-end.
#[derive(Debug)]
#[non_exhaustive]
pub enum VhostUserRequest {
    /// Asks for the features that the device offers. Answered with a value.
    GetFeatures,
    /// Says which features of the device are used.
    SetFeatures(u64),
    /// Begins the session.
    SetOwner,
    /// Deprecated; ignore it.
    ResetOwner,
    /// Sets the guest's memory, in place of the previous one.
    SetMemTable(Vec<MemoryRegion>),
    /// Sets how many entries a ring has.
    SetVringNum {
        /// The ring.
        index: u32,
        /// How many; a power of 2.
        number: u32,
    },
    /// Sets where a ring is.
    SetVringAddr {
        /// The ring.
        index: u32,
        /// Its addresses.
        address: VringAddress,
    },
    /// Sets the next entry that the device takes.
    SetVringBase {
        /// The ring.
        index: u32,
        /// The entry.
        number: u32,
    },
    /// Stops a ring. Answered with the next entry that the device would have taken.
    GetVringBase {
        /// The ring.
        index: u32,
    },
    /// Sets the kick eventfd, which says that a ring has new entries, and starts the ring.
    /// Without one, the device has to poll.
    SetVringKick {
        /// The ring.
        index: u32,
        /// The eventfd.
        fd: Option<OwnedFd>,
    },
    /// Sets the call eventfd, with which the device says that it has used entries. The
    /// front-end may replace it while the guest runs.
    SetVringCall {
        /// The ring.
        index: u32,
        /// The eventfd.
        fd: Option<OwnedFd>,
    },
    /// Sets the error eventfd, with which the device says that a ring is broken.
    SetVringErr {
        /// The ring.
        index: u32,
        /// The eventfd.
        fd: Option<OwnedFd>,
    },
    /// Asks for the protocol features that the back-end offers. Answered with a value.
    GetProtocolFeatures,
    /// Says which protocol features are used.
    SetProtocolFeatures(u64),
    /// Asks for the number of rings. Answered with a value.
    GetQueueNum,
    /// Enables or disables a ring.
    SetVringEnable {
        /// The ring.
        index: u32,
        /// Whether it is enabled.
        is_on: bool,
    },
    /// Reads the device's configuration. Answered with all of the requested bytes.
    GetConfig {
        /// The offset of the first byte.
        offset: u32,
        /// How many bytes.
        size: u32,
        /// For migration: 1.
        flags: u32,
    },
    /// Writes the device's configuration.
    SetConfig {
        /// The offset of the first byte.
        offset: u32,
        /// For migration: 1.
        flags: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Asks how many memory regions there may be. Answered with a value.
    GetMaxMemSlots,
    /// Adds a memory region.
    AddMemReg(MemoryRegion),
    /// Removes the memory region with these addresses and this size.
    RemMemReg {
        /// Its address in the guest.
        guest: u64,
        /// Its size in bytes.
        size: u64,
        /// Its address in the front-end.
        user: u64,
    },
    /// Sets the log, in which the device records which pages of the guest it has written:
    /// one bit for each 4,096 bytes. It is always acknowledged, once both sides have
    /// negotiated [`features::PROTOCOL_LOG_SHMFD`]. Without that it arrives as
    /// [`Other`](Self::Other).
    SetLogBase {
        /// Its size in bytes.
        size: u64,
        /// Where it begins in the file.
        offset: u64,
        /// The memory.
        fd: OwnedFd,
    },
    /// Sets the eventfd with which the device says that it has written to the log.
    SetLogFd(OwnedFd),
    /// Gives the back-end a connected socket on which it may send requests. Adopt it with
    /// [`back_end_channel`](super::back_end_channel).
    SetBackendReqFd(OwnedFd),
    /// Asks for memory in which to record requests in progress. Only `queues` and
    /// `queue_size` are set. Answered with
    /// [`VhostUserAnswer::Inflight`](super::VhostUserAnswer::Inflight).
    GetInflightFd(InflightRegion),
    /// Returns that memory to the device, or to the next one.
    SetInflightFd {
        /// Its layout.
        region: InflightRegion,
        /// The memory.
        fd: OwnedFd,
    },
    /// Any other request, unparsed. If it needs an answer of its own, that cannot be given:
    /// do not offer the protocol feature that it belongs to.
    Other {
        /// Its number.
        request: u32,
        /// Its payload.
        payload: Vec<u8>,
        /// Its descriptors.
        descriptors: Vec<OwnedFd>,
    },
}
