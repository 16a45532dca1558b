//! The messages between a successor and its predecessor.

use std::ops::Range;

use bowline_protocol::SocketFile;

use crate::wire::{Message, PayloadReader, PayloadWriter, WireError};

/// A message of the successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FromSuccessor {
    /// It asks for everything. Both have to be of the same `format`.
    Take { format: u32 },
    /// A batch of listeners has arrived.
    Taken { batch: u32 },
    /// Everything is adopted or bound, and the loop has made a turn.
    Ready,
    /// It serves now.
    Serving,
    /// A batch of connections has arrived, except those in `refused`.
    Prepared { batch: u32, refused: Vec<u32> },
    /// The connections of a batch are the successor's from now on.
    Live { batch: u32 },
    /// It gives up.
    Abort,
    /// The service manager knows the successor, as far as possible. The predecessor may
    /// end.
    Parted,
}

/// A message of the predecessor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FromPredecessor {
    /// Not now, or not with this one.
    Refused { refusal: Refusal },
    /// This many batches of listeners follow. `watched` is the number of the process that
    /// the service manager was originally to watch, or 0.
    Offer { batches: u32, watched: u32 },
    /// A batch of listeners, each with one descriptor.
    Listeners { batch: u32, listeners: Vec<Offered> },
    /// The listeners are the successor's from now on.
    Commit,
    /// A batch of connections.
    Connections {
        batch: u32,
        connections: Vec<Record>,
    },
    /// The connections of a batch, except those refused, are the successor's.
    Go { batch: u32 },
    /// Nothing more follows.
    Done,
    /// It takes everything back.
    Abort,
}

/// Why a predecessor refuses a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Another successor is being served.
    Busy,
    /// The successor has another [format](super::RestartSettings::format).
    Format,
    /// The process does not serve: it is starting, or has handed over already.
    NotServing,
}

/// A listener that is passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    pub(crate) name: String,
    pub(crate) file: Option<SocketFile>,
}

/// A connection that is passed on, without its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) kind: String,
    pub(crate) state: Vec<u8>,
    pub(crate) unread: Vec<u8>,
    pub(crate) unsent: Vec<u8>,
    /// The groups of queued descriptors: the bytes they belong to, and how many
    /// they are.
    pub(crate) queued: Vec<(Option<Range<u32>>, u32)>,
    /// How many descriptors the protocol itself holds.
    pub(crate) held: u32,
    /// What its layers say.
    pub(crate) layers: Vec<LayerRecord>,
}

/// What a layer says, but for its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LayerRecord {
    pub(crate) name: String,
    pub(crate) state: Vec<u8>,
    /// How many descriptors it has.
    pub(crate) descriptors: u32,
}

impl Record {
    /// How many descriptors travel with it: the socket, those queued, those
    /// held, those of layers.
    pub(crate) fn descriptors(&self) -> usize {
        let queued: u32 = self.queued.iter().map(|(_, count)| count).sum();
        let layers: u32 = self.layers.iter().map(|layer| layer.descriptors).sum();
        1 + queued as usize + self.held as usize + layers as usize
    }

    /// About how many bytes it takes.
    pub(crate) fn size(&self) -> usize {
        64 + self.kind.len()
            + self.state.len()
            + self.unread.len()
            + self.unsent.len()
            + 16 * self.queued.len()
            + self.layers.iter().map(LayerRecord::size).sum::<usize>()
    }
}

impl LayerRecord {
    fn size(&self) -> usize {
        16 + self.name.len() + self.state.len()
    }
}

impl Message for FromSuccessor {
    fn kind(&self) -> u16 {
        match self {
            Self::Take { .. } => 0x0200,
            Self::Taken { .. } => 0x0201,
            Self::Ready => 0x0202,
            Self::Serving => 0x0203,
            Self::Prepared { .. } => 0x0204,
            Self::Live { .. } => 0x0205,
            Self::Abort => 0x0206,
            Self::Parted => 0x0207,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        match self {
            Self::Take { format } => payload.u32(*format),
            Self::Taken { batch } | Self::Live { batch } => payload.u32(*batch),
            Self::Prepared { batch, refused } => {
                payload.u32(*batch);
                list(payload, refused, |payload, index| payload.u32(*index));
            }
            Self::Ready | Self::Serving | Self::Abort | Self::Parted => {}
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            0x0200 => Self::Take {
                format: payload.u32()?,
            },
            0x0201 => Self::Taken {
                batch: payload.u32()?,
            },
            0x0202 => Self::Ready,
            0x0203 => Self::Serving,
            0x0204 => Self::Prepared {
                batch: payload.u32()?,
                refused: read_list(payload, PayloadReader::u32)?,
            },
            0x0205 => Self::Live {
                batch: payload.u32()?,
            },
            0x0206 => Self::Abort,
            0x0207 => Self::Parted,
            kind => return Err(WireError::UnknownKind { kind }),
        })
    }
}

impl Message for FromPredecessor {
    fn kind(&self) -> u16 {
        match self {
            Self::Refused { .. } => 0x0210,
            Self::Offer { .. } => 0x0211,
            Self::Listeners { .. } => 0x0212,
            Self::Commit => 0x0213,
            Self::Connections { .. } => 0x0214,
            Self::Go { .. } => 0x0215,
            Self::Done => 0x0216,
            Self::Abort => 0x0217,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        match self {
            Self::Refused { refusal } => payload.u8(match refusal {
                Refusal::Busy => 1,
                Refusal::Format => 2,
                Refusal::NotServing => 3,
            }),
            Self::Offer { batches, watched } => {
                payload.u32(*batches);
                payload.u32(*watched);
            }
            Self::Listeners { batch, listeners } => {
                payload.u32(*batch);
                list(payload, listeners, |payload, offered| {
                    payload.string(&offered.name);
                    match offered.file {
                        None => payload.u8(0),
                        Some(file) => {
                            payload.u8(1);
                            payload.u64(file.device);
                            payload.u64(file.inode);
                        }
                    }
                });
            }
            Self::Connections { batch, connections } => {
                payload.u32(*batch);
                list(payload, connections, write_record);
            }
            Self::Go { batch } => payload.u32(*batch),
            Self::Commit | Self::Done | Self::Abort => {}
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            0x0210 => Self::Refused {
                refusal: match payload.u8()? {
                    1 => Refusal::Busy,
                    2 => Refusal::Format,
                    3 => Refusal::NotServing,
                    _ => return Err(WireError::Malformed { what: "refusal" }),
                },
            },
            0x0211 => Self::Offer {
                batches: payload.u32()?,
                watched: payload.u32()?,
            },
            0x0212 => Self::Listeners {
                batch: payload.u32()?,
                listeners: read_list(payload, |payload| {
                    Ok(Offered {
                        name: payload.string()?,
                        file: match payload.u8()? {
                            0 => None,
                            _ => Some(SocketFile {
                                device: payload.u64()?,
                                inode: payload.u64()?,
                            }),
                        },
                    })
                })?,
            },
            0x0213 => Self::Commit,
            0x0214 => Self::Connections {
                batch: payload.u32()?,
                connections: read_list(payload, read_record)?,
            },
            0x0215 => Self::Go {
                batch: payload.u32()?,
            },
            0x0216 => Self::Done,
            0x0217 => Self::Abort,
            kind => return Err(WireError::UnknownKind { kind }),
        })
    }
}

/// Appends what [`read_record`] reads.
pub(crate) fn write_record(payload: &mut PayloadWriter<'_>, record: &Record) {
    payload.string(&record.kind);
    payload.bytes(&record.state);
    payload.bytes(&record.unread);
    payload.bytes(&record.unsent);
    list(payload, &record.queued, |payload, (range, count)| {
        // A range that is none ends before it begins.
        let (start, end) = match range {
            Some(range) => (range.start, range.end),
            None => (1, 0),
        };
        payload.u32(start);
        payload.u32(end);
        payload.u32(*count);
    });
    payload.u32(record.held);
    list(payload, &record.layers, |payload, layer| {
        payload.string(&layer.name);
        payload.bytes(&layer.state);
        payload.u32(layer.descriptors);
    });
}

pub(crate) fn read_record(payload: &mut PayloadReader<'_>) -> Result<Record, WireError> {
    let kind = payload.string()?;
    let state = payload.bytes()?.to_vec();
    let unread = payload.bytes()?.to_vec();
    let unsent = payload.bytes()?.to_vec();
    let queued = read_list(payload, |payload| {
        let (start, end, count) = (payload.u32()?, payload.u32()?, payload.u32()?);
        let range = (start <= end).then_some(start..end);
        let is_whole = range
            .as_ref()
            .is_none_or(|range| range.end as usize <= unsent.len() && !range.is_empty());
        // No descriptors at all only behind a message that has left in part.
        if !is_whole || (count == 0 && range.as_ref().is_none_or(|range| range.start != 0)) {
            return Err(WireError::Malformed {
                what: "queued descriptors",
            });
        }
        Ok((range, count))
    })?;
    // In order, and none within another.
    let ranges = queued.iter().filter_map(|(range, _)| range.as_ref());
    if !ranges
        .clone()
        .zip(ranges.skip(1))
        .all(|(one, next)| one.end <= next.start)
    {
        return Err(WireError::Malformed {
            what: "queued descriptors",
        });
    }
    let held = payload.u32()?;
    let layers = read_list(payload, |payload| {
        Ok(LayerRecord {
            name: payload.string()?,
            state: payload.bytes()?.to_vec(),
            descriptors: payload.u32()?,
        })
    })?;
    Ok(Record {
        kind,
        state,
        unread,
        unsent,
        queued,
        held,
        layers,
    })
}

fn list<T>(payload: &mut PayloadWriter<'_>, all: &[T], each: impl Fn(&mut PayloadWriter<'_>, &T)) {
    payload.u32(u32::try_from(all.len()).unwrap_or(u32::MAX));
    for one in all {
        each(payload, one);
    }
}

/// Grows with what is there, not with what is announced.
fn read_list<'a, T>(
    payload: &mut PayloadReader<'a>,
    each: impl Fn(&mut PayloadReader<'a>) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let count = payload.u32()?;
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(each(payload)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{HEADER_BYTES, decode_payload, encode_frame};

    fn there_and_back<M: Message + std::fmt::Debug + PartialEq>(message: M) {
        let mut frame = Vec::new();
        encode_frame(&message, 0, &mut frame).unwrap();
        let back: M = decode_payload(message.kind(), 1, &frame[HEADER_BYTES..]).unwrap();
        assert_eq!(back, message);
    }

    #[test]
    fn messages_come_back_as_they_were() {
        for message in [
            FromSuccessor::Take { format: 7 },
            FromSuccessor::Taken { batch: 1 },
            FromSuccessor::Ready,
            FromSuccessor::Serving,
            FromSuccessor::Prepared {
                batch: 3,
                refused: vec![0, 5],
            },
            FromSuccessor::Live { batch: 3 },
            FromSuccessor::Abort,
            FromSuccessor::Parted,
        ] {
            there_and_back(message);
        }
        let file = SocketFile {
            device: 1,
            inode: u64::MAX,
        };
        let listeners = [None, Some(file)].map(|file| Offered {
            name: "web".into(),
            file,
        });
        let record = Record {
            kind: "chat".into(),
            state: vec![1, 2],
            unread: vec![3],
            unsent: vec![0; 100],
            queued: vec![(Some(0..10), 0), (None, 2), (Some(20..21), 1)],
            held: 4,
            layers: vec![LayerRecord {
                name: "cipher".into(),
                state: vec![5; 50],
                descriptors: 2,
            }],
        };
        assert_eq!(record.descriptors(), 10);
        assert_eq!(record.size(), 64 + 4 + 2 + 1 + 100 + 16 * 3 + (16 + 6 + 50));
        assert_eq!(Record::default().descriptors(), 1, "the socket");
        assert_eq!(Record::default().size(), 64);
        for refusal in [Refusal::Busy, Refusal::Format, Refusal::NotServing] {
            there_and_back(FromPredecessor::Refused { refusal });
        }
        for message in [
            FromPredecessor::Offer {
                batches: 2,
                watched: 7,
            },
            FromPredecessor::Listeners {
                batch: 0,
                listeners: listeners.into(),
            },
            FromPredecessor::Commit,
            FromPredecessor::Connections {
                batch: 9,
                connections: vec![record, Record::default()],
            },
            FromPredecessor::Go { batch: 9 },
            FromPredecessor::Done,
            FromPredecessor::Abort,
        ] {
            there_and_back(message);
        }
    }

    /// What the sizes of messages are reckoned with is never too little.
    #[test]
    fn record_takes_no_more_room_than_its_size() {
        let record = Record {
            kind: "chat".into(),
            state: vec![1; 10],
            unread: vec![2; 20],
            unsent: vec![3; 30],
            queued: vec![(None, 1); 40],
            held: 50,
            layers: vec![LayerRecord::default(); 3],
        };
        let size = record.size();
        let message = FromPredecessor::Connections {
            batch: 0,
            connections: vec![record.clone(), record],
        };
        let mut frame = Vec::new();
        encode_frame(&message, 0, &mut frame).unwrap();
        assert!(frame.len() <= HEADER_BYTES + 8 + 2 * size);
    }

    #[test]
    fn what_is_no_message_is_refused_with_its_reason() {
        let unknown = |kind| WireError::UnknownKind { kind };
        for kind in [0x01ff, 0x0208, 0x0210] {
            let back = decode_payload::<FromSuccessor>(kind, 1, &[]);
            assert_eq!(back, Err(unknown(kind)));
        }
        for kind in [0x0200, 0x020f, 0x0218] {
            let back = decode_payload::<FromPredecessor>(kind, 1, &[]);
            assert_eq!(back, Err(unknown(kind)));
        }
        for byte in [0, 4, 255] {
            let back = decode_payload::<FromPredecessor>(0x0210, 1, &[byte]);
            assert_eq!(back, Err(WireError::Malformed { what: "refusal" }));
        }
        // A list that says that it is longer than it is.
        let announced = [0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff];
        for kind in [0x0212, 0x0214] {
            let back = decode_payload::<FromPredecessor>(kind, 1, &announced);
            assert_eq!(back, Err(WireError::Truncated));
        }
        let back = decode_payload::<FromSuccessor>(0x0204, 1, &announced);
        assert_eq!(back, Err(WireError::Truncated));
        // More than the message.
        for kind in [0x0202, 0x0203, 0x0206, 0x0207] {
            let back = decode_payload::<FromSuccessor>(kind, 1, b"!");
            assert_eq!(back, Err(WireError::Surplus { bytes: 1 }));
        }
        for kind in [0x0213, 0x0216, 0x0217] {
            let back = decode_payload::<FromPredecessor>(kind, 1, b"!");
            assert_eq!(back, Err(WireError::Surplus { bytes: 1 }));
        }
    }

    #[test]
    fn groups_at_the_edges_of_the_unsent_bytes_are_taken() {
        for queued in [
            vec![(Some(0..10), 1)],
            vec![(Some(0..10), 0)],
            vec![(Some(0..1), 0), (Some(1..10), 1)],
            vec![(Some(9..10), 253)],
        ] {
            there_and_back(FromPredecessor::Connections {
                batch: 0,
                connections: vec![Record {
                    unsent: vec![0; 10],
                    queued,
                    ..Record::default()
                }],
            });
        }
    }

    #[test]
    fn groups_outside_of_the_unsent_bytes_are_refused() {
        for queued in [
            vec![(Some(0..11), 1)],
            vec![(Some(5..5), 1)],
            vec![(Some(5..6), 0)],
            vec![(None, 0)],
            vec![(Some(4..8), 1), (Some(7..9), 1)],
        ] {
            let record = Record {
                unsent: vec![0; 10],
                queued,
                ..Record::default()
            };
            let message = FromPredecessor::Connections {
                batch: 0,
                connections: vec![record],
            };
            let mut frame = Vec::new();
            encode_frame(&message, 0, &mut frame).unwrap();
            let back = decode_payload::<FromPredecessor>(0x0214, 1, &frame[HEADER_BYTES..]);
            assert!(matches!(back, Err(WireError::Malformed { .. })), "{back:?}");
        }
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(
            kind in 0x0200..0x0218_u16,
            payload in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = decode_payload::<FromSuccessor>(kind, 1, &payload);
            let _ = decode_payload::<FromPredecessor>(kind, 1, &payload);
        }
    }
}
