//! The other side of a control connection by hand, and what the two say to each
//! other: written down once more, so that a change of either is seen.

use std::cell::RefCell;
use std::io::{ErrorKind, IoSlice, IoSliceMut, PipeReader, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bowline::handoff::channel::{Hello, Role};
use bowline::handoff::wire::{Message, PayloadReader, PayloadWriter, WireError, encode_frame};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::frames::Frames;

/// A message of any kind.
pub(super) struct Said {
    kind: u16,
    payload: Vec<u8>,
}

impl Message for Said {
    fn kind(&self) -> u16 {
        self.kind
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        for byte in &self.payload {
            payload.u8(*byte);
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        let payload = payload.rest().to_vec();
        Ok(Self { kind, payload })
    }
}

fn said(kind: u16, write: impl FnOnce(&mut PayloadWriter<'_>)) -> Said {
    let mut payload = Vec::new();
    write(&mut PayloadWriter::new(&mut payload));
    Said { kind, payload }
}

pub(super) fn nothing(kind: u16) -> Said {
    said(kind, |_| {})
}

/// The kind of no message.
pub(super) const NONSENSE: u16 = 0x02ff;

pub(super) fn number(kind: u16, number: u32) -> Said {
    said(kind, |payload| payload.u32(number))
}

// What a successor says.

pub(super) fn take(format: u32) -> Said {
    number(0x0200, format)
}

pub(super) fn taken(batch: u32) -> Said {
    number(0x0201, batch)
}

pub(super) fn ready() -> Said {
    nothing(0x0202)
}

pub(super) fn serving() -> Said {
    nothing(0x0203)
}

pub(super) fn prepared(batch: u32, refused: &[u32]) -> Said {
    said(0x0204, |payload| {
        payload.u32(batch);
        payload.u32(refused.len() as u32);
        refused.iter().for_each(|index| payload.u32(*index));
    })
}

pub(super) fn live(batch: u32) -> Said {
    number(0x0205, batch)
}

pub(super) fn gives_up() -> Said {
    nothing(0x0206)
}

pub(super) fn parted() -> Said {
    nothing(0x0207)
}

// What a predecessor says.

pub(super) fn refused(why: u8) -> Said {
    said(0x0210, |payload| payload.u8(why))
}

/// Without the descriptor that it owns.
pub(super) fn offer(batches: u32) -> Said {
    offer_of(batches, 0)
}

/// With the process that was to be watched.
pub(super) fn offer_of(batches: u32, watched: u32) -> Said {
    said(0x0211, |payload| {
        payload.u32(batches);
        payload.u32(watched);
    })
}

/// Each with the file it owns, by device and inode.
pub(super) fn listeners(batch: u32, all: &[(&str, Option<(u64, u64)>)]) -> Said {
    said(0x0212, |payload| {
        payload.u32(batch);
        payload.u32(all.len() as u32);
        for (name, file) in all {
            payload.string(name);
            payload.u8(file.is_some().into());
            if let Some((device, inode)) = file {
                payload.u64(*device);
                payload.u64(*inode);
            }
        }
    })
}

pub(super) fn commit() -> Said {
    nothing(0x0213)
}

/// Connections of these kinds, without anything unsent, that hold so many
/// descriptors.
pub(super) fn connections(batch: u32, all: &[(&str, u32)]) -> Said {
    said(0x0214, |payload| {
        payload.u32(batch);
        payload.u32(all.len() as u32);
        for (kind, held) in all {
            payload.string(kind);
            payload.bytes(b"state");
            payload.bytes(b"");
            payload.bytes(b"");
            payload.u32(0);
            payload.u32(*held);
            // No layers.
            payload.u32(0);
        }
    })
}

pub(super) fn go(batch: u32) -> Said {
    number(0x0215, batch)
}

pub(super) fn done() -> Said {
    nothing(0x0216)
}

pub(super) fn takes_back() -> Said {
    nothing(0x0217)
}

/// Takes the byte that says who serves; false if the other side has.
pub(super) fn takes(mut baton: PipeReader) -> bool {
    baton.read(&mut [0]).expect("a pipe") == 1
}

/// One end of a channel.
pub(super) struct Hand {
    pub(super) socket: StdUnixStream,
    frames: RefCell<Frames>,
    pub(super) descriptors: RefCell<Vec<OwnedFd>>,
}

impl Hand {
    pub(super) fn new(socket: StdUnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self {
            socket,
            frames: RefCell::default(),
            descriptors: RefCell::default(),
        }
    }

    pub(super) fn greet(&self, role: Role, pid: u32, max_payload: u32) {
        let hello = Hello {
            versions: 1..=1,
            role,
            pid,
            max_payload,
        };
        self.send(&hello, &[]);
    }

    pub(super) fn send(&self, message: &impl Message, fds: &[BorrowedFd<'_>]) {
        let mut frame = Vec::new();
        encode_frame(message, fds.len(), &mut frame).expect("it fits");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(&frame)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(frame.len()), "there is room");
    }

    /// Sends an offer with its descriptor: a pipe with one byte in it, which says who
    /// serves. Answers our own hold on that.
    pub(super) fn offer(&self, batches: u32) -> PipeReader {
        self.offer_of(batches, 0)
    }

    /// With the process that was to be watched.
    pub(super) fn offer_of(&self, batches: u32, watched: u32) -> PipeReader {
        let (baton, mut writer) = std::io::pipe().expect("a pipe");
        writer.write_all(b"!").expect("room");
        self.send(&offer_of(batches, watched), &[baton.as_fd()]);
        baton
    }

    /// What came with an offer, the last that has come.
    pub(super) fn baton(&self) -> PipeReader {
        self.hears();
        let first = self.descriptors.borrow_mut().remove(0);
        first.into()
    }

    /// Sends a message that takes several reads there; `turn` lets them happen.
    pub(super) fn send_long(&self, message: &impl Message, mut turn: impl FnMut()) {
        let mut frame = Vec::new();
        encode_frame(message, 0, &mut frame).expect("it fits");
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            match (&self.socket).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            turn();
        }
    }

    /// What the other side has said since it was asked last, its hello left out;
    /// the descriptors are kept.
    pub(super) fn hears(&self) -> Vec<String> {
        let mut frames = self.frames.borrow_mut();
        let mut bytes = vec![0; 1 << 16];
        let mut end = None;
        while end.is_none() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
            );
            match received {
                Ok(received) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = message {
                            frames.descriptors(fds);
                        }
                    }
                    frames.feed(&bytes[..received.bytes]);
                    if received.bytes == 0 {
                        end = Some("lost");
                    }
                }
                Err(Errno::CONNRESET) => end = Some("lost"),
                Err(error) => {
                    assert_eq!(error, Errno::AGAIN);
                    end = Some("");
                }
            }
        }
        let mut all = Vec::new();
        while let Some(frame) = frames.next() {
            if frame.kind >= 0x0200 {
                let text = in_short(frame.kind, &frame.payload, frame.descriptors.len());
                all.push(text.expect("well formed"));
            }
            self.descriptors.borrow_mut().extend(frame.descriptors);
        }
        all.extend(end.filter(|end| !end.is_empty()).map(str::to_owned));
        all
    }
}

fn in_short(kind: u16, payload: &[u8], descriptors: usize) -> Result<String, WireError> {
    let mut payload = PayloadReader::new(payload);
    let mut text = match kind {
        0x0200 => format!("take {}", payload.u32()?),
        0x0201 => format!("taken {}", payload.u32()?),
        0x0202 => "ready".into(),
        0x0203 => "serving".into(),
        0x0204 => {
            let mut text = format!("prepared {} but", payload.u32()?);
            for _ in 0..payload.u32()? {
                text.push_str(&format!(" {}", payload.u32()?));
            }
            text
        }
        0x0205 => format!("live {}", payload.u32()?),
        0x0206 => "gives up".into(),
        0x0207 => "parted".into(),
        0x0210 => format!("refused {}", payload.u8()?),
        0x0211 => {
            let batches = payload.u32()?;
            match payload.u32()? {
                0 => format!("offer {batches}"),
                watched => format!("offer {batches} watched {watched}"),
            }
        }
        0x0212 => {
            let mut text = format!("listeners {}:", payload.u32()?);
            for _ in 0..payload.u32()? {
                text.push_str(&format!(" {}", payload.string()?));
                if payload.u8()? != 0 {
                    text.push('+');
                    payload.u64()?;
                    payload.u64()?;
                }
            }
            text
        }
        0x0213 => "commit".into(),
        0x0214 => {
            let mut text = format!("connections {}:", payload.u32()?);
            for _ in 0..payload.u32()? {
                let kind = payload.string()?;
                let state = payload.bytes()?.len();
                let unread = payload.bytes()?.len();
                let unsent = payload.bytes()?.len();
                let mut queued = Vec::new();
                for _ in 0..payload.u32()? {
                    queued.push((payload.u32()?, payload.u32()?, payload.u32()?));
                }
                let held = payload.u32()?;
                text.push_str(&format!(
                    " {kind}/{state}/{unread}/{unsent}/{queued:?}/{held}"
                ));
                for _ in 0..payload.u32()? {
                    let name = payload.string()?;
                    let length = payload.bytes()?.len();
                    let descriptors = payload.u32()?;
                    text.push_str(&format!("/{name}:{length}:{descriptors}"));
                }
            }
            text
        }
        0x0215 => format!("go {}", payload.u32()?),
        0x0216 => "done".into(),
        0x0217 => "takes back".into(),
        kind => return Err(WireError::UnknownKind { kind }),
    };
    payload.finish()?;
    if descriptors > 0 {
        text.push_str(&format!(" [{descriptors}]"));
    }
    Ok(text)
}
