//! The messages between dispatcher and worker.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use crate::restart::messages::{Record, read_record, write_record};
use crate::wire::{Message, PayloadReader, PayloadWriter, WireError};

/// A message of the dispatcher.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToWorker {
    /// A connection, with its one descriptor. The worker answers with one
    /// [`FromWorker::Accepted`] or [`FromWorker::Refused`].
    Dispatch(Dispatch),
    /// Several connections, each with its one descriptor, in this order. The worker answers
    /// those that it takes with one [`FromWorker::AcceptedAll`], and each of the others with
    /// a [`FromWorker::Refused`]. (Since version 2.)
    DispatchAll(Vec<Dispatch>),
    /// No more connections come. The worker is to serve those that it has, and to
    /// close the channel then.
    Drain {
        /// When the dispatcher kills the worker, in milliseconds from now.
        within_ms: u32,
    },
    /// A listening socket, with its descriptor: the worker accepts on it by itself, and says
    /// how many it has accepted ([`FromWorker::Accepts`]).
    Listen {
        /// What it is called from now on.
        listener: u32,
        /// The [label](super::PassedConnection::label) of its connections.
        label: u32,
    },
    /// The worker is to accept what waits at a listener, and to close its copy.
    Unlisten {
        /// What it was called.
        listener: u32,
    },
    /// The worker is to say how many connections it has accepted: it is there, or not.
    Ask,
    /// Another process serves now: the worker is to give up the connections that can move,
    /// each with a [`FromWorker::Moving`].
    Move,
    /// A connection has moved.
    HasMoved {
        /// The number that the worker gave it.
        id: u64,
    },
    /// A connection could not be moved. It stays the worker's.
    HasNotMoved {
        /// The number that the worker gave it.
        id: u64,
    },
    /// What the worker has not answered goes to others. From now on the dispatcher takes no
    /// answers, so that none can be given any more.
    Recall,
}

/// The description of a connection that is passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// The number of this delivery. No two have the same: a connection that is given
    /// out again gets a new one.
    pub id: u64,
    /// The [label](super::PassedConnection::label).
    pub label: u32,
    /// The peer, over TCP.
    pub peer: Option<SocketAddr>,
    /// Bytes that were read already. Its protocol sees them first.
    pub read: Vec<u8>,
    /// Bytes that are to be sent first.
    pub unsent: Vec<u8>,
    /// Whether it was [recalled](super::PassedConnection::is_recalled) from another worker.
    pub is_recalled: bool,
    /// What is known of a connection that moves here in the middle of its life. Further
    /// descriptors come with it.
    pub moved: Option<MovedRecord>,
}

/// What is known of a connection that moves, but for its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedRecord(pub(crate) Box<Record>);

/// A message of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FromWorker {
    /// The connection is the worker's now. The dispatcher may forget it.
    Accepted {
        /// The delivery.
        id: u64,
        /// How many connections the worker has, this one among them.
        live: u32,
    },
    /// These connections of one [`ToWorker::DispatchAll`] are the worker's now. (Since
    /// version 2.)
    AcceptedAll {
        /// The deliveries, in order.
        ids: Vec<u64>,
        /// How many connections the worker has, these among them.
        live: u32,
    },
    /// The connection stays the dispatcher's. The worker has closed its copy.
    Refused {
        /// The delivery.
        id: u64,
        /// The reason.
        reason: WorkerRefusal,
        /// How many connections the worker has.
        live: u32,
    },
    /// The number of the worker's connections has changed by itself.
    Load {
        /// How many connections the worker has.
        live: u32,
    },
    /// What a worker says that accepts by itself.
    Accepts {
        /// How many connections it has accepted so far.
        accepted: u64,
        /// How many connections it has.
        live: u32,
        /// Whether it accepts more.
        stage: AcceptStage,
    },
    /// The worker has accepted what waited at a listener, and has closed its copy.
    Unlistened {
        /// What it was called.
        listener: u32,
        /// How many connections the worker has.
        live: u32,
    },
    /// A connection, with its descriptor, that the worker has accepted and does not want.
    /// It is the dispatcher's now.
    Declined {
        /// The connection. Its id means nothing.
        dispatch: Dispatch,
        /// The reason.
        reason: WorkerRefusal,
    },
    /// A connection that is to move, with its descriptors.
    Moving {
        /// A number of the worker's own.
        id: u64,
        /// What is known of it.
        moved: MovedRecord,
    },
}

/// Whether a worker accepts by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcceptStage {
    /// It does.
    Accepting,
    /// It has as many connections as it may.
    Full,
    /// It is about to end.
    Draining,
}

/// Why a worker did not take a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkerRefusal {
    /// The worker has as many connections as it may.
    Overloaded,
    /// The worker is about to end.
    Draining,
    /// The descriptor is no connection.
    WrongKind,
    /// The descriptor was lost on the way, since the worker has no free number.
    DescriptorLost,
    /// The service did not want it.
    Unwanted,
}

impl WorkerRefusal {
    fn number(self) -> u8 {
        match self {
            Self::Overloaded => 1,
            Self::Draining => 2,
            Self::WrongKind => 3,
            Self::DescriptorLost => 4,
            Self::Unwanted => 5,
        }
    }

    fn of_number(number: u8) -> Result<Self, WireError> {
        Ok(match number {
            1 => Self::Overloaded,
            2 => Self::Draining,
            3 => Self::WrongKind,
            4 => Self::DescriptorLost,
            5 => Self::Unwanted,
            _ => return Err(WireError::Malformed { what: "refusal" }),
        })
    }
}

impl fmt::Display for WorkerRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overloaded => "worker is at its limit",
            Self::Draining => "worker is about to end",
            Self::WrongKind => "descriptor is no connection",
            Self::DescriptorLost => "descriptor was lost on the way",
            Self::Unwanted => "service did not want it",
        })
    }
}

/// The versions of these messages that are known here. Since 2 there are
/// [`ToWorker::DispatchAll`], [`FromWorker::AcceptedAll`] and [`FromWorker::Unlistened`].
pub(super) const VERSIONS: RangeInclusive<u16> = 1..=2;

/// The first version in which several connections share a message, and a worker says which
/// listener it has closed.
pub(super) const SHARES_MESSAGES: u16 = 2;

const DISPATCH: u16 = 0x0100;
const DRAIN: u16 = 0x0101;
const RECALL: u16 = 0x0102;
const LISTEN: u16 = 0x0103;
const UNLISTEN: u16 = 0x0104;
const ASK: u16 = 0x0105;
const MOVE: u16 = 0x0106;
const HAS_MOVED: u16 = 0x0107;
const HAS_NOT_MOVED: u16 = 0x0108;
pub(super) const DISPATCH_ALL: u16 = 0x0109;
const ACCEPTED: u16 = 0x0180;
const REFUSED: u16 = 0x0181;
const LOAD: u16 = 0x0182;
const ACCEPTS: u16 = 0x0183;
const DECLINED: u16 = 0x0184;
const MOVING: u16 = 0x0185;
const ACCEPTED_ALL: u16 = 0x0186;
const UNLISTENED: u16 = 0x0187;

impl Message for ToWorker {
    fn kind(&self) -> u16 {
        match self {
            Self::Dispatch(_) => DISPATCH,
            Self::DispatchAll(_) => DISPATCH_ALL,
            Self::Drain { .. } => DRAIN,
            Self::Recall => RECALL,
            Self::Listen { .. } => LISTEN,
            Self::Unlisten { .. } => UNLISTEN,
            Self::Ask => ASK,
            Self::Move => MOVE,
            Self::HasMoved { .. } => HAS_MOVED,
            Self::HasNotMoved { .. } => HAS_NOT_MOVED,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        match self {
            Self::Dispatch(dispatch) => dispatch.encode(payload),
            Self::DispatchAll(all) => encode_all(all.iter(), payload),
            Self::Drain { within_ms } => payload.u32(*within_ms),
            Self::Listen { listener, label } => {
                payload.u32(*listener);
                payload.u32(*label);
            }
            Self::Unlisten { listener } => payload.u32(*listener),
            Self::HasMoved { id } | Self::HasNotMoved { id } => payload.u64(*id),
            Self::Recall | Self::Ask | Self::Move => {}
        }
    }

    fn decode(kind: u16, version: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        match kind {
            DISPATCH => Dispatch::decode(kind, version, payload).map(Self::Dispatch),
            DISPATCH_ALL => {
                let count = payload.u16()?;
                let all = (0..count).map(|_| Dispatch::decode(DISPATCH, version, payload));
                all.collect::<Result<_, _>>().map(Self::DispatchAll)
            }
            DRAIN => Ok(Self::Drain {
                within_ms: payload.u32()?,
            }),
            RECALL => Ok(Self::Recall),
            LISTEN => Ok(Self::Listen {
                listener: payload.u32()?,
                label: payload.u32()?,
            }),
            UNLISTEN => Ok(Self::Unlisten {
                listener: payload.u32()?,
            }),
            ASK => Ok(Self::Ask),
            MOVE => Ok(Self::Move),
            HAS_MOVED => Ok(Self::HasMoved { id: payload.u64()? }),
            HAS_NOT_MOVED => Ok(Self::HasNotMoved { id: payload.u64()? }),
            kind => Err(WireError::UnknownKind { kind }),
        }
    }
}

/// Appends what a [`ToWorker::DispatchAll`] of these has.
pub(super) fn encode_all<'a>(
    all: impl ExactSizeIterator<Item = &'a Dispatch>,
    payload: &mut PayloadWriter<'_>,
) {
    // No frame has more descriptors than this holds.
    payload.u16(u16::try_from(all.len()).unwrap_or(u16::MAX));
    for dispatch in all {
        dispatch.encode(payload);
    }
}

fn read_moved(payload: &mut PayloadReader<'_>) -> Result<MovedRecord, WireError> {
    Ok(MovedRecord(Box::new(read_record(payload)?)))
}

/// By itself too, so that one that is kept can be sent again.
impl Message for Dispatch {
    fn kind(&self) -> u16 {
        DISPATCH
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        payload.u64(self.id);
        payload.u32(self.label);
        payload.socket_address(self.peer);
        payload.bytes(&self.read);
        payload.bytes(&self.unsent);
        payload.u8(self.is_recalled.into());
        payload.u8(self.moved.is_some().into());
        if let Some(MovedRecord(record)) = &self.moved {
            write_record(payload, record);
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        if kind != DISPATCH {
            return Err(WireError::UnknownKind { kind });
        }
        Ok(Self {
            id: payload.u64()?,
            label: payload.u32()?,
            peer: payload.socket_address()?,
            read: payload.bytes()?.to_vec(),
            unsent: payload.bytes()?.to_vec(),
            is_recalled: payload.u8()? != 0,
            moved: match payload.u8()? {
                0 => None,
                _ => Some(read_moved(payload)?),
            },
        })
    }
}

impl Message for FromWorker {
    fn kind(&self) -> u16 {
        match self {
            Self::Accepted { .. } => ACCEPTED,
            Self::AcceptedAll { .. } => ACCEPTED_ALL,
            Self::Refused { .. } => REFUSED,
            Self::Load { .. } => LOAD,
            Self::Accepts { .. } => ACCEPTS,
            Self::Unlistened { .. } => UNLISTENED,
            Self::Declined { .. } => DECLINED,
            Self::Moving { .. } => MOVING,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        match self {
            Self::Accepted { id, live } => {
                payload.u64(*id);
                payload.u32(*live);
            }
            Self::AcceptedAll { ids, live } => {
                payload.u16(u16::try_from(ids.len()).unwrap_or(u16::MAX));
                ids.iter().for_each(|id| payload.u64(*id));
                payload.u32(*live);
            }
            Self::Refused { id, reason, live } => {
                payload.u64(*id);
                payload.u8(reason.number());
                payload.u32(*live);
            }
            Self::Load { live } => payload.u32(*live),
            Self::Accepts {
                accepted,
                live,
                stage,
            } => {
                payload.u64(*accepted);
                payload.u32(*live);
                payload.u8(match stage {
                    AcceptStage::Accepting => 0,
                    AcceptStage::Full => 1,
                    AcceptStage::Draining => 2,
                });
            }
            Self::Unlistened { listener, live } => {
                payload.u32(*listener);
                payload.u32(*live);
            }
            Self::Declined { dispatch, reason } => {
                payload.u8(reason.number());
                dispatch.encode(payload);
            }
            Self::Moving {
                id,
                moved: MovedRecord(record),
            } => {
                payload.u64(*id);
                write_record(payload, record);
            }
        }
    }

    fn decode(kind: u16, version: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        match kind {
            ACCEPTED => Ok(Self::Accepted {
                id: payload.u64()?,
                live: payload.u32()?,
            }),
            ACCEPTED_ALL => {
                let count = payload.u16()?;
                Ok(Self::AcceptedAll {
                    ids: (0..count)
                        .map(|_| payload.u64())
                        .collect::<Result<_, _>>()?,
                    live: payload.u32()?,
                })
            }
            REFUSED => Ok(Self::Refused {
                id: payload.u64()?,
                reason: WorkerRefusal::of_number(payload.u8()?)?,
                live: payload.u32()?,
            }),
            LOAD => Ok(Self::Load {
                live: payload.u32()?,
            }),
            ACCEPTS => Ok(Self::Accepts {
                accepted: payload.u64()?,
                live: payload.u32()?,
                stage: match payload.u8()? {
                    0 => AcceptStage::Accepting,
                    1 => AcceptStage::Full,
                    2 => AcceptStage::Draining,
                    _ => return Err(WireError::Malformed { what: "stage" }),
                },
            }),
            UNLISTENED => Ok(Self::Unlistened {
                listener: payload.u32()?,
                live: payload.u32()?,
            }),
            DECLINED => Ok(Self::Declined {
                reason: WorkerRefusal::of_number(payload.u8()?)?,
                dispatch: Dispatch::decode(DISPATCH, version, payload)?,
            }),
            MOVING => Ok(Self::Moving {
                id: payload.u64()?,
                moved: read_moved(payload)?,
            }),
            kind => Err(WireError::UnknownKind { kind }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{HEADER_BYTES, decode_payload, encode_frame};

    fn there_and_back<M: Message + Clone>(message: &M) -> M {
        let mut frame = Vec::new();
        encode_frame(message, 0, &mut frame).expect("it fits");
        decode_payload(message.kind(), 1, &frame[HEADER_BYTES..]).expect("well formed")
    }

    #[test]
    fn messages_come_back_as_they_were() {
        let dispatch = ToWorker::Dispatch(Dispatch {
            id: u64::MAX,
            label: 7,
            peer: Some("[::1]:80".parse().expect("an address")),
            read: b"GET /".to_vec(),
            unsent: Vec::new(),
            is_recalled: false,
            moved: None,
        });
        assert_eq!(there_and_back(&dispatch), dispatch);
        assert_eq!(there_and_back(&ToWorker::Recall), ToWorker::Recall);
        let drain = ToWorker::Drain { within_ms: 5 };
        assert_eq!(there_and_back(&drain), drain);
        for reason in [
            WorkerRefusal::Overloaded,
            WorkerRefusal::Draining,
            WorkerRefusal::WrongKind,
            WorkerRefusal::DescriptorLost,
            WorkerRefusal::Unwanted,
        ] {
            let (id, live) = (1, 2);
            let refused = FromWorker::Refused { id, reason, live };
            assert_eq!(there_and_back(&refused), refused);
        }
        let (listener, label) = (5, 6);
        for message in [
            ToWorker::Listen { listener, label },
            ToWorker::Unlisten { listener },
            ToWorker::Ask,
            ToWorker::Move,
            ToWorker::HasMoved { id: u64::MAX },
            ToWorker::HasNotMoved { id: 3 },
        ] {
            assert_eq!(there_and_back(&message), message);
        }
        let accepts = |stage| FromWorker::Accepts {
            accepted: u64::MAX,
            live: 2,
            stage,
        };
        let ToWorker::Dispatch(dispatch) = dispatch else {
            unreachable!("it is one");
        };
        let record = Record {
            kind: "kind".into(),
            state: b"state".to_vec(),
            unread: b"unread".to_vec(),
            unsent: b"unsent".to_vec(),
            queued: vec![(Some(1..3), 2), (None, 1)],
            held: 4,
            layers: Vec::new(),
        };
        let moved = MovedRecord(Box::new(record));
        let dispatch = Dispatch {
            moved: Some(moved.clone()),
            ..dispatch
        };
        let all = ToWorker::DispatchAll(vec![dispatch.clone(), dispatch.clone()]);
        assert_eq!(there_and_back(&all), all);
        let (ids, live) = (vec![1, u64::MAX], 2);
        for message in [
            FromWorker::Moving { id: 9, moved },
            FromWorker::AcceptedAll { ids, live },
            FromWorker::Accepted { id: 1, live: 2 },
            FromWorker::Load { live: 3 },
            FromWorker::Unlistened { listener, live: 3 },
            accepts(AcceptStage::Accepting),
            accepts(AcceptStage::Full),
            accepts(AcceptStage::Draining),
            FromWorker::Declined {
                dispatch,
                reason: WorkerRefusal::Unwanted,
            },
        ] {
            assert_eq!(there_and_back(&message), message);
        }
    }

    #[test]
    fn messages_keep_their_numbers_between_versions() {
        let dispatch = Dispatch {
            id: 1,
            label: 2,
            peer: None,
            read: b"r".to_vec(),
            unsent: b"un".to_vec(),
            is_recalled: true,
            moved: None,
        };
        let (id, live, reason) = (1, 2, WorkerRefusal::Unwanted);
        assert_eq!(dispatch.kind(), 0x0100);
        assert_eq!(ToWorker::Dispatch(dispatch.clone()).kind(), 0x0100);
        let all = ToWorker::DispatchAll(vec![dispatch.clone()]);
        assert_eq!(all.kind(), 0x0109);
        let ids = vec![id];
        assert_eq!(FromWorker::AcceptedAll { ids, live }.kind(), 0x0186);
        assert_eq!(ToWorker::Drain { within_ms: 5 }.kind(), 0x0101);
        assert_eq!(ToWorker::Recall.kind(), 0x0102);
        assert_eq!(FromWorker::Accepted { id, live }.kind(), 0x0180);
        assert_eq!(FromWorker::Refused { id, reason, live }.kind(), 0x0181);
        assert_eq!(FromWorker::Load { live }.kind(), 0x0182);
        let (listener, label) = (1, 2);
        assert_eq!(ToWorker::Listen { listener, label }.kind(), 0x0103);
        assert_eq!(ToWorker::Unlisten { listener }.kind(), 0x0104);
        assert_eq!(ToWorker::Ask.kind(), 0x0105);
        let (accepted, stage) = (1, AcceptStage::Full);
        let accepts = FromWorker::Accepts {
            accepted,
            live,
            stage,
        };
        assert_eq!(accepts.kind(), 0x0183);
        assert_eq!(FromWorker::Unlistened { listener, live }.kind(), 0x0187);
        assert_eq!(ToWorker::Move.kind(), 0x0106);
        assert_eq!(ToWorker::HasMoved { id }.kind(), 0x0107);
        assert_eq!(ToWorker::HasNotMoved { id }.kind(), 0x0108);
        let moved = MovedRecord(Box::default());
        assert_eq!(FromWorker::Moving { id, moved }.kind(), 0x0185);
        let dispatched = dispatch.clone();
        let declined = FromWorker::Declined {
            dispatch: dispatched,
            reason,
        };
        assert_eq!(declined.kind(), 0x0184);

        // One that is kept is sent as if it had never been.
        assert_eq!(there_and_back(&dispatch), dispatch);
        let mut frame = Vec::new();
        encode_frame(&dispatch, 1, &mut frame).expect("it fits");
        let mut wrapped = Vec::new();
        encode_frame(&ToWorker::Dispatch(dispatch), 1, &mut wrapped).expect("it fits");
        assert_eq!(frame, wrapped);
        assert_eq!(
            decode_payload::<Dispatch>(0x0101, 1, &frame[HEADER_BYTES..]),
            Err(WireError::UnknownKind { kind: 0x0101 })
        );
    }

    #[test]
    fn refusals_say_why() {
        for (reason, text) in [
            (WorkerRefusal::Overloaded, "worker is at its limit"),
            (WorkerRefusal::Draining, "worker is about to end"),
            (WorkerRefusal::WrongKind, "descriptor is no connection"),
            (
                WorkerRefusal::DescriptorLost,
                "descriptor was lost on the way",
            ),
            (WorkerRefusal::Unwanted, "service did not want it"),
        ] {
            assert_eq!(reason.to_string(), text);
        }
    }

    proptest! {
        /// Any payload of any kind is a message or an error.
        #[test]
        fn any_payload_is_a_message_or_an_error(
            kind in prop_oneof![0x0100..0x010a_u16, 0x0180..0x0188_u16, any::<u16>()],
            payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let _ = decode_payload::<ToWorker>(kind, 1, &payload);
            let _ = decode_payload::<FromWorker>(kind, 1, &payload);
        }
    }
}
