//! What is asked.

use std::os::fd::OwnedFd;

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
    pub(crate) const REM_MEM_REG: u32 = 38;

    /// In the payload of kick, call and err: there is no descriptor.
    pub(crate) const NO_DESCRIPTOR: u32 = 1 << 8;

    /// In the address of a ring: what is used of it is written to the log.
    pub(crate) const LOGGED: u32 = 1;
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
    /// Of a device (`VHOST_F_LOG_ALL`): what it writes of the guest's memory is noted in the
    /// log.
    pub const LOG_ALL: u64 = 1 << 26;
    /// Of the protocol: the log is passed as a descriptor. A guest can be moved then.
    pub const PROTOCOL_LOG_SHMFD: u64 = 1 << 1;
    /// Of the protocol: requests can be acknowledged.
    pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
    /// Of the protocol: the back-end may ask, too, on a channel of its own.
    pub const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
    /// Of the protocol: the device's configuration is the back-end's.
    pub const PROTOCOL_CONFIG: u64 = 1 << 9;
    /// Of the protocol: a request of a back-end may have descriptors.
    pub const PROTOCOL_BACKEND_SEND_FD: u64 = 1 << 10;
    /// Of the protocol: memory of the device is mapped into the guest by a request of the
    /// back-end's.
    pub const PROTOCOL_HOST_NOTIFIER: u64 = 1 << 11;
    /// Of the protocol: what a device is about is kept in memory that outlives it.
    pub const PROTOCOL_INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Of the protocol: regions of memory come and go one by one.
    pub const PROTOCOL_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
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
    /// Where in the guest's memory the part that is used is, as the log has it. `Some` while
    /// a guest is being moved: what the device writes there has to be noted.
    pub log: Option<u64>,
}

/// Memory in which a device notes what it is about, so that another can go on after a crash.
/// How it is divided is the device's, by the section "Inflight I/O tracking" of the
/// specification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightRegion {
    /// How many bytes.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// For how many rings it is.
    pub queues: u16,
    /// How many entries each has.
    pub queue_size: u16,
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
    /// One less: that of these addresses and of this size.
    RemMemReg {
        /// Where it is for the guest.
        guest: u64,
        /// How many bytes.
        size: u64,
        /// Where it is for the front-end.
        user: u64,
    },
    /// Where the device notes which pages of the guest it has written: a bit for each of
    /// 4,096 bytes. Acknowledged always, once both sides have chosen
    /// [`features::PROTOCOL_LOG_SHMFD`]. Without that it comes as [`Other`](Self::Other).
    SetLogBase {
        /// How many bytes.
        size: u64,
        /// Where it begins in the file.
        offset: u64,
        /// The memory.
        fd: OwnedFd,
    },
    /// An eventfd by which the device says that it has written to the log.
    SetLogFd(OwnedFd),
    /// A connected socket on which the back-end may ask: adopt it with
    /// [`back_end_channel`](super::back_end_channel).
    SetBackendReqFd(OwnedFd),
    /// Memory for what the device is about; of the answer only `queues` and `queue_size`
    /// are given. Answered by [`VhostUserAnswer::Inflight`](super::VhostUserAnswer::Inflight).
    GetInflightFd(InflightRegion),
    /// That memory again, of this device or of the one before it.
    SetInflightFd {
        /// What it is.
        region: InflightRegion,
        /// The memory.
        fd: OwnedFd,
    },
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
