//! A layer that changes every byte: frames under a keystream, after a handshake.
//!
//! It is no cryptography. It does what a layer of that kind has to do: it holds half a
//! frame, has bytes of its own, is established later than the socket, refuses peers,
//! says its end, and passes descriptors with the frame they belong to.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bowline::CloseReason;
use bowline::endpoint::Side;
use bowline::layers::{
    DescriptorSocket, FileDescriptor, Link, PassDescriptors, ReadBuffers, Received, Socket,
};
use bowline::process::close_received;

/// How many bytes of the user's one frame carries at most, so that what the layer holds
/// is bounded.
const MOST_BYTES: usize = 16_384;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the user's.
    Data,
    /// Says that we are there.
    KeepAlive,
    /// Nothing more comes.
    Close,
    /// The first of each side.
    Hello,
    /// That the secret is known.
    Proof,
    /// It was.
    Accept,
    /// It was not; the reason.
    Refuse,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Data,
        Self::KeepAlive,
        Self::Close,
        Self::Hello,
        Self::Proof,
        Self::Accept,
        Self::Refuse,
    ];
}

/// What is added to a direction of the stream, byte for byte: each place has its own.
#[derive(Clone, Debug)]
struct Keystream(u64);

impl Keystream {
    fn new(key: u64) -> Self {
        Self(mix(key).max(1))
    }

    fn apply(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte ^= (self.0 >> 32) as u8;
        }
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The frames of both directions: a pure value, for the layer and for tests that play its
/// peer.
#[derive(Debug, Default)]
pub struct Codec {
    sealing: Option<Keystream>,
    opening: Option<Keystream>,
    /// Of the frame that is coming.
    header: Vec<u8>,
    body: Vec<u8>,
    /// How many bytes have come.
    position: u64,
    /// Where the frame that is coming began.
    start: u64,
}

/// A frame that has come.
#[derive(Debug)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// What it carries.
    pub body: Vec<u8>,
    /// Where in the stream of the socket it began.
    start: u64,
}

impl Codec {
    /// Has everything scrambled from here on.
    pub fn scramble(&mut self, secret: u64, is_client: bool) {
        let keys = [secret ^ 0x5ca1ab1e, secret ^ 0xdecade];
        let (ours, theirs) = if is_client { (0, 1) } else { (1, 0) };
        self.sealing = Some(Keystream::new(keys[ours]));
        self.opening = Some(Keystream::new(keys[theirs]));
    }

    /// The frame as it is sent.
    pub fn seal(&mut self, kind: Kind, body: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(3 + body.len());
        frame.push(kind as u8);
        frame.extend_from_slice(&(body.len() as u16).to_be_bytes());
        frame.extend_from_slice(body);
        if let Some(keys) = &mut self.sealing {
            keys.apply(&mut frame);
        }
        frame
    }

    /// Takes bytes up to the end of a frame off `bytes`; the frame, if it is whole.
    ///
    /// # Errors
    ///
    /// `InvalidData` for what is no frame.
    pub fn open(&mut self, bytes: &mut &[u8]) -> io::Result<Option<Frame>> {
        if self.header.is_empty() && !bytes.is_empty() {
            self.start = self.position;
        }
        if self.header.len() < 3 {
            let missing = 3 - self.header.len();
            let part = self.take(missing, bytes);
            self.header.extend(part);
            if self.header.len() < 3 {
                return Ok(None);
            }
        }
        let length = usize::from(u16::from_be_bytes([self.header[1], self.header[2]]));
        let kind = Kind::ALL.get(usize::from(self.header[0])).copied();
        let Some(kind) = kind.filter(|_| length <= MOST_BYTES) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no frame"));
        };
        let missing = length - self.body.len();
        let part = self.take(missing, bytes);
        self.body.extend(part);
        if self.body.len() < length {
            return Ok(None);
        }
        self.header.clear();
        Ok(Some(Frame {
            kind,
            body: std::mem::take(&mut self.body),
            start: self.start,
        }))
    }

    fn take(&mut self, most: usize, bytes: &mut &[u8]) -> Vec<u8> {
        let (part, rest) = bytes.split_at(most.min(bytes.len()));
        *bytes = rest;
        self.position += part.len() as u64;
        let mut part = part.to_vec();
        if let Some(keys) = &mut self.opening {
            keys.apply(&mut part);
        }
        part
    }

    /// Where the last frame began of which anything has come, if that is the one that is
    /// still coming.
    fn coming_since(&self) -> Option<u64> {
        (!self.header.is_empty()).then_some(self.start)
    }
}

/// What proves that a side knows the secret.
pub fn proof(secret: u64, hellos: [&[u8]; 2]) -> [u8; 8] {
    let both = hellos.concat();
    let sum = both
        .iter()
        .fold(secret, |sum, byte| mix(sum ^ u64::from(*byte)));
    sum.to_be_bytes()
}

/// What both sides have to know, and how long the layer waits.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Whoever does not know it is refused.
    pub secret: u64,
    /// After how long without anything sent the peer is told that we are there.
    pub idle: Duration,
    /// How long the handshake may take.
    pub handshake: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            secret: 0x00c0_ffee,
            idle: Duration::from_secs(10),
            handshake: Duration::from_secs(20),
        }
    }
}

/// What came beside the bytes of a frame.
#[derive(Debug)]
struct Passed {
    descriptors: Vec<OwnedFd>,
    /// The read that brought them.
    of: Received,
}

impl Drop for Passed {
    fn drop(&mut self) {
        // They may have come from anybody.
        for fd in self.descriptors.drain(..) {
            close_received(fd);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Our hello has left, theirs has not come.
    Greeting,
    /// A client that has proved itself, or a server that waits for the proof.
    Proving,
    Open,
}

/// The layer.
#[derive(Debug)]
pub struct Scramble<B> {
    base: B,
    settings: Settings,
    is_client: bool,
    stage: Stage,
    hello: [u8; 8],
    peers_hello: Vec<u8>,
    codec: Codec,
    /// Sealed, and not taken by what is below: a frame of the user's at the most, and
    /// what we say ourselves.
    out: Vec<u8>,
    /// Opened, and not delivered: what one read brought at the most.
    ready: VecDeque<(Vec<u8>, Option<Passed>)>,
    /// For the frame that is coming.
    coming: Option<Passed>,
    /// The peer has said that nothing more comes.
    has_ended: bool,
    has_told_end: bool,
    has_said_close: bool,
}

impl<B: FileDescriptor> Scramble<B> {
    /// Puts the layer on what is below. Who accepts is the server, and so is who adopts.
    pub fn new(base: B, side: Side, settings: Settings) -> Self {
        // Good enough to tell one connection from another.
        let seed = std::ptr::from_ref(&base) as u64 ^ u64::from(side == Side::Connected);
        Self {
            base,
            settings,
            is_client: side == Side::Connected,
            stage: Stage::Greeting,
            hello: mix(seed).to_be_bytes(),
            peers_hello: Vec::new(),
            codec: Codec::default(),
            out: Vec::new(),
            ready: VecDeque::new(),
            coming: None,
            has_ended: false,
            has_told_end: false,
            has_said_close: false,
        }
    }

    fn say(&mut self, link: &mut Link, kind: Kind, body: &[u8]) {
        let frame = self.codec.seal(kind, body);
        self.out.extend(frame);
        link.flush_soon();
    }

    fn send_out(&mut self, link: &mut Link) -> io::Result<()> {
        while !self.out.is_empty() {
            let count = self.base.write_some_data(link, &self.out)?;
            self.out.drain(..count);
        }
        Ok(())
    }

    /// Seals what fits into a frame, and sends it by `send`. Unless that took something,
    /// nothing has happened.
    fn send_frame(
        &mut self,
        link: &mut Link,
        data: &[u8],
        send: impl FnOnce(&mut B, &mut Link, &[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        // What is left of the frame before comes first.
        self.send_out(link)?;
        let data = &data[..data.len().min(MOST_BYTES)];
        let before = self.codec.sealing.clone();
        let frame = self.codec.seal(Kind::Data, data);
        match send(&mut self.base, link, &frame) {
            Ok(count) => {
                self.out.extend_from_slice(&frame[count..]);
                if !self.out.is_empty() {
                    link.flush_soon();
                }
                link.wake_after::<Self>(self.settings.idle);
                Ok(data.len())
            }
            Err(error) => {
                self.codec.sealing = before;
                Err(error)
            }
        }
    }

    /// Delivers what there is, or reads by `read`.
    fn read_by(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
        read: impl FnOnce(&mut B, &mut Link, &mut ReadBuffers) -> io::Result<Received>,
    ) -> io::Result<Received> {
        let mut received = Received::nothing().and_more();
        if self.ready.is_empty() && !self.has_ended {
            received = read(&mut self.base, link, buffers)?;
            if received.is_end() {
                let text = "the peer's stream was cut off";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            let was_established = link.is_established();
            self.take_in(link, buffers, received)?;
            if !was_established {
                return Ok(self.nothing_yet(received));
            }
        }
        Ok(self.deliver(buffers, limit, received))
    }

    fn nothing_yet(&self, of: Received) -> Received {
        let nothing = Received::delivering(0, of).without_descriptors();
        match self.has_more() {
            true => nothing.and_more(),
            false => nothing,
        }
    }

    fn has_more(&self) -> bool {
        !self.ready.is_empty() || self.has_ended && !self.has_told_end
    }

    /// Opens what a read has brought.
    fn take_in(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        received: Received,
    ) -> io::Result<()> {
        let mut passed = received.had_descriptors().then(|| Passed {
            descriptors: std::mem::take(buffers.descriptors()),
            of: received,
        });
        let began = self.codec.position;
        let bytes = buffers.bytes()[..received.bytes()].to_vec();
        let mut bytes = &bytes[..];
        let mut last = None;
        while !bytes.is_empty() && !self.has_ended {
            let Some(frame) = self.codec.open(&mut bytes)? else {
                break;
            };
            let of_before = self.coming.take();
            match frame.kind {
                Kind::Data if self.stage == Stage::Open => {
                    last = Some((frame.start, self.ready.len()));
                    self.ready.push_back((frame.body, of_before));
                }
                Kind::KeepAlive if self.stage == Stage::Open => {}
                Kind::Close if self.stage == Stage::Open => self.has_ended = true,
                kind => self.shake_hands(link, kind, frame.body)?,
            }
        }
        if passed
            .as_ref()
            .is_some_and(|it| it.descriptors.is_empty() && !it.of.is_truncated())
        {
            passed = None;
        }
        if let Some(passed) = passed {
            // A read ends in what brought descriptors, so they are for the last frame of
            // which it has the first byte.
            match (self.codec.coming_since(), last) {
                (Some(start), _) if start >= began => self.coming = Some(passed),
                (None, Some((start, place))) if start >= began => {
                    self.ready[place].1 = Some(passed);
                }
                _ => {
                    let text = "descriptors in the middle of a frame";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
            }
        }
        Ok(())
    }

    fn shake_hands(&mut self, link: &mut Link, kind: Kind, body: Vec<u8>) -> io::Result<()> {
        let refused = |text: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        match (self.stage, kind, self.is_client) {
            (Stage::Greeting, Kind::Hello, _) => {
                self.peers_hello = body;
                self.stage = Stage::Proving;
                if self.is_client {
                    let proof = proof(self.settings.secret, [&self.hello, &self.peers_hello]);
                    self.say(link, Kind::Proof, &proof);
                } else {
                    let hello = self.hello;
                    self.say(link, Kind::Hello, &hello);
                }
            }
            (Stage::Proving, Kind::Proof, false) => {
                let wanted = proof(self.settings.secret, [&self.peers_hello, &self.hello]);
                if body != wanted {
                    // It leaves before the end.
                    self.say(link, Kind::Refuse, b"wrong secret");
                    return refused("the peer was refused: wrong secret".into());
                }
                self.say(link, Kind::Accept, &[]);
                self.open(link);
            }
            (Stage::Proving, Kind::Accept, true) => self.open(link),
            (Stage::Proving, Kind::Refuse, true) => {
                let why = String::from_utf8_lossy(&body);
                return refused(format!("refused by the peer: {why}"));
            }
            _ => {
                let text = "a frame out of place";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        Ok(())
    }

    fn open(&mut self, link: &mut Link) {
        self.stage = Stage::Open;
        self.codec.scramble(self.settings.secret, self.is_client);
        link.wake_after::<Self>(self.settings.idle);
        link.established();
    }

    fn deliver(&mut self, buffers: &mut ReadBuffers, limit: usize, of: Received) -> Received {
        let mut bytes = 0;
        let mut beside = None;
        while bytes < limit
            && let Some((piece, passed)) = self.ready.front_mut()
        {
            if passed.is_some() && bytes > 0 {
                break;
            }
            if let Some(mut passed) = passed.take() {
                buffers.descriptors().append(&mut passed.descriptors);
                beside = Some(passed.of);
            }
            let count = piece.len().min(limit - bytes);
            buffers.bytes()[bytes..bytes + count].copy_from_slice(&piece[..count]);
            bytes += count;
            match count < piece.len() {
                true => drop(piece.drain(..count)),
                false => drop(self.ready.pop_front()),
            }
        }
        if bytes == 0 && self.ready.is_empty() && self.has_ended {
            self.has_told_end = true;
            return Received::end();
        }
        let received = match beside {
            Some(beside) => Received::delivering(bytes, beside),
            None => Received::delivering(bytes, of).without_descriptors(),
        };
        match self.has_more() || !of.is_drained() {
            true => received.and_more(),
            false => received,
        }
    }
}

impl<B: FileDescriptor> FileDescriptor for Scramble<B> {
    fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.send_frame(link, data, |base, link, frame| {
            base.write_some_data(link, frame)
        })
    }

    fn do_read(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        self.read_by(link, buffers, limit, |base, link, buffers| {
            base.do_read(link, buffers, ReadBuffers::CAPACITY)
        })
    }

    fn below(&self) -> Option<&dyn FileDescriptor> {
        Some(&self.base)
    }

    fn below_mut(&mut self) -> Option<&mut dyn FileDescriptor> {
        Some(&mut self.base)
    }

    fn socket(&self) -> &dyn Socket {
        self.base.socket()
    }

    fn socket_mut(&mut self) -> &mut dyn Socket {
        self.base.socket_mut()
    }

    fn start(&mut self, link: &mut Link) {
        self.base.start(link);
        link.begin_handshake();
        link.wake_after::<Self>(self.settings.handshake);
        if self.is_client {
            let hello = self.hello;
            self.say(link, Kind::Hello, &hello);
        }
    }

    fn flush(&mut self, link: &mut Link) -> io::Result<()> {
        self.base.flush(link)?;
        self.send_out(link)
    }

    fn unflushed(&self) -> usize {
        self.out.len() + self.base.unflushed()
    }

    fn timer_fired(&mut self, link: &mut Link, _: Instant) {
        if self.stage != Stage::Open {
            let text = "the handshake took too long";
            let error = io::Error::new(io::ErrorKind::TimedOut, text);
            link.end(CloseReason::Lost(error));
        } else if !self.has_said_close {
            self.say(link, Kind::KeepAlive, &[]);
            link.wake_after::<Self>(self.settings.idle);
        }
    }

    fn closing(&mut self, link: &mut Link) -> bool {
        if !std::mem::replace(&mut self.has_said_close, true) {
            self.say(link, Kind::Close, &[]);
        }
        self.out.is_empty() && self.base.closing(link)
    }

    fn half_closing(&mut self, link: &mut Link) -> bool {
        if !std::mem::replace(&mut self.has_said_close, true) {
            self.say(link, Kind::Close, &[]);
        }
        self.out.is_empty() && self.base.half_closing(link)
    }

    fn has_own_end(&self) -> bool {
        true
    }

    fn take(&mut self) -> Option<Self> {
        Some(Self {
            base: self.base.take()?,
            settings: self.settings,
            is_client: self.is_client,
            stage: self.stage,
            hello: self.hello,
            peers_hello: std::mem::take(&mut self.peers_hello),
            codec: std::mem::take(&mut self.codec),
            out: std::mem::take(&mut self.out),
            ready: std::mem::take(&mut self.ready),
            coming: self.coming.take(),
            has_ended: self.has_ended,
            has_told_end: self.has_told_end,
            has_said_close: self.has_said_close,
        })
    }

    fn undelivered(&self) -> usize {
        let ready: usize = self.ready.iter().map(|(piece, _)| piece.len()).sum();
        ready + usize::from(self.has_ended && !self.has_told_end) + self.base.undelivered()
    }
}

impl<B: PassDescriptors> PassDescriptors for Scramble<B> {
    fn send_with_descriptors(
        &mut self,
        link: &mut Link,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        self.send_frame(link, data, |base, link, frame| {
            base.send_with_descriptors(link, frame, descriptors)
        })
    }

    fn receive(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        self.read_by(link, buffers, limit, |base, link, buffers| {
            base.receive(link, buffers, ReadBuffers::CAPACITY)
        })
    }

    fn descriptor_socket(&self) -> &dyn DescriptorSocket {
        self.base.descriptor_socket()
    }
}
