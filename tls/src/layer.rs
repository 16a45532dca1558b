//! The TLS layer, between a connection and its socket.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use bowline_protocol::CloseReason;
use bowline_reactor::{Description, Section};
use bowline_transport::{
    DescriptorSocket, FileDescriptor, LayerState, Link, PassDescriptors, ReadBuffers, Received,
    Socket, Stays, close_received,
};
use rustls::crypto::CryptoProvider;
use rustls::crypto::cipher::OutboundChunks;
use rustls::pki_types::CertificateDer;
use rustls::{AlertDescription, CipherSuite, Error, NamedGroup, ProtocolVersion};

use crate::envelope::Envelope;
use crate::error::{StartTlsError, TlsError};
use crate::handshake::{Agreed, Handshake};
use crate::log;
use crate::memory;
use crate::outgoing::{MOST_PIECES, Outgoing};
use crate::record::{self, HEADER, MOST_PLAIN};
use crate::role::TlsRole;
use crate::session::{Failure, Opened, Session};

mod moving;

#[cfg(any(test, fuzzing))]
pub(crate) use self::moving::state_of_bytes;
pub use self::moving::{MoveError, MovedTls};

/// How many records of data are sealed at once: as many as one write buffer of a connection
/// fills. It bounds what the layer holds.
const MOST_RECORDS: usize = 4;

/// How many bytes that were sealed earlier (tickets, new keys) may be sent together with
/// what is sealed next. If there are more, they are sent first. It bounds what the layer
/// holds.
const MOST_BESIDE: usize = 1_024;

/// A TLS layer on top of the socket or layer `B`. [`TlsServer`](crate::TlsServer),
/// [`TlsClient`](crate::TlsClient) and [`StartTls`](crate::StartTls) put it on connections.
///
/// What it holds besides the connection's own buffers is bounded:
///
/// - sealed records that the socket has not taken, with at most 64 KiB of the user's bytes.
///   Those bytes count as sent.
/// - what one read has brought beyond what was to be delivered, at most 64 KiB. All of it
///   is ciphertext, except for the rest of one record.
///
/// An idle connection holds neither.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub struct Tls<B> {
    base: B,
    state: TlsState,
}

/// The state of TLS on a connection; [`TlsTransport::tls`](crate::TlsTransport::tls)
/// returns it.
///
/// Feature `tls`, or `tls-aws-lc-rs`.
pub struct TlsState {
    stage: Stage,
    agreed: Option<Box<Agreed>>,
    /// What is needed to move the connection to another process, if it may move.
    mover: Option<Arc<CryptoProvider>>,
    /// Ciphertext that was read and not opened. It contains whole records only if more was
    /// read than was to be delivered.
    incoming: Vec<u8>,
    outgoing: Outgoing,
    rare: Option<Box<Rare>>,
    /// The time of the handshake has yet to be limited.
    is_time_due: bool,
    /// The peer has sent its `close_notify`.
    has_ended: bool,
    has_told_end: bool,
    /// We have sent ours.
    has_said_close: bool,
    /// A sealed record was lost, so the peer could not open any later one.
    seals_no_more: bool,
}

enum Stage {
    /// Nobody has asked for TLS yet.
    Plain,
    /// Somebody has. First, what was written before has to be sent, up to this position.
    Leaving {
        until: u64,
        role: TlsRole,
    },
    /// The handshake has not begun, since the layer has not been started.
    Waiting {
        role: TlsRole,
    },
    Handshaking {
        handshake: Box<Handshake>,
        role: TlsRole,
    },
    Open(Box<Session>),
    /// The connection was given away. There is no session here that could seal or open. It
    /// comes back only if nobody else has taken it.
    Packed {
        head: [u8; moving::HEADER_BYTES],
        envelope: Envelope,
    },
    /// Nothing more is opened or sealed.
    Over,
}

/// What few connections need.
#[derive(Default)]
struct Rare {
    /// The rest of a record that was opened. `delivered` bytes of it were delivered.
    plain: Vec<u8>,
    delivered: usize,
    /// Descriptors that came with records that wait, in order.
    passed: VecDeque<Passed>,
    /// A record that was to be sent with descriptors and could not be, with the number of
    /// the user's bytes in it. No other is sealed before it is sent.
    held: Option<(Vec<u8>, usize)>,
    /// The error to report once everything that was opened before it has been delivered.
    failure: Option<TlsError>,
}

/// Descriptors that came with a record.
struct Passed {
    /// Where in the incoming bytes the record begins.
    at: usize,
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

impl<B: FileDescriptor> Tls<B> {
    /// Makes a layer that secures the connection from its beginning.
    pub fn new(base: B, role: impl Into<TlsRole>) -> Self {
        Self {
            base,
            state: TlsState::new(Stage::Waiting { role: role.into() }),
        }
    }

    /// Makes a layer that leaves the connection in the clear until
    /// [`start_tls`](crate::TlsTransport::start_tls).
    pub fn plain(base: B) -> Self {
        Self {
            base,
            state: TlsState::new(Stage::Plain),
        }
    }

    /// Returns the state of TLS.
    pub fn state(&self) -> &TlsState {
        &self.state
    }

    /// Sends what is sealed, as far as the socket takes it.
    fn send_out(&mut self, link: &mut Link) -> io::Result<()> {
        let Self { base, state } = self;
        while !state.outgoing.is_empty() {
            state
                .outgoing
                .offer(|pieces| base.write_some_pieces(link, pieces))?;
        }
        Ok(())
    }

    /// Starts the time limit of a handshake that has begun.
    fn limit_time(&mut self, link: &mut Link) {
        if mem::take(&mut self.state.is_time_due)
            && let Stage::Handshaking { role, .. } = &self.state.stage
        {
            link.wake_after::<Self>(role.timeout());
        }
    }

    // Writing.

    /// Sends some of `chunks`, in the clear or sealed.
    fn write(&mut self, link: &mut Link, chunks: &[&[u8]]) -> io::Result<usize> {
        match &self.state.stage {
            Stage::Open(_) => self.write_sealed(link, chunks),
            Stage::Plain => self.base.write_some_data(link, chunks[0]),
            Stage::Leaving { until, .. } => {
                let left = (until - link.position()) as usize;
                let data = &chunks[0][..chunks[0].len().min(left)];
                let count = self.base.write_some_data(link, data)?;
                self.plain_left(link, count);
                Ok(count)
            }
            Stage::Waiting { .. } | Stage::Handshaking { .. } => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            Stage::Packed { .. } | Stage::Over => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Notes that this many bytes were sent in the clear.
    fn plain_left(&mut self, link: &mut Link, count: usize) {
        if let Stage::Leaving { until, role } = &self.state.stage
            && link.position() + count as u64 >= *until
        {
            self.state.stage = Stage::Waiting { role: role.clone() };
            self.state.begin(link);
        }
        self.limit_time(link);
    }

    fn write_sealed(&mut self, link: &mut Link, chunks: &[&[u8]]) -> io::Result<usize> {
        // What was sealed before comes first.
        if self.state.outgoing.len() > MOST_BESIDE {
            self.send_out(link)?;
        }
        if let Some(count) = self.state.give_up_held() {
            link.flush_soon();
            return Ok(count);
        }
        let most = match self.state.outgoing.is_empty() {
            true => MOST_RECORDS,
            // Some of it may be the user's bytes.
            false => MOST_RECORDS - 1,
        };
        let Some(session) = self.state.sealing() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let update = session.before_data(MOST_RECORDS as u64);
        let mut rest = OutboundChunks::new(chunks);
        let mut records: [Vec<u8>; MOST_RECORDS + 1] = Default::default();
        let (mut count, mut taken) = (0, 0);
        if let Some(update) = update.map_err(|error| self.state.keys_failed(link, error))? {
            records[0] = update;
            count = 1;
        }
        let most = most + count;
        while count < most && !rest.is_empty() {
            let (part, behind) = rest.split_at(MOST_PLAIN);
            let Some(session) = self.state.sealing() else {
                break;
            };
            let length = part.len();
            let sealed = session.seal_data(part);
            records[count] = sealed.map_err(|error| self.state.keys_failed(link, error))?;
            taken += length;
            count += 1;
            rest = behind;
        }
        match self.state.outgoing.is_empty() {
            true => self.send_records(link, records, count)?,
            false => self.send_behind(link, records)?,
        }
        Ok(taken)
    }

    /// Sends records that have just been sealed. What the socket does not take is kept and
    /// counts as taken: it is sealed, so it has to be sent next.
    fn send_records(
        &mut self,
        link: &mut Link,
        records: [Vec<u8>; MOST_RECORDS + 1],
        count: usize,
    ) -> io::Result<()> {
        let mut pieces = [IoSlice::new(&[]); MOST_RECORDS + 1];
        for (piece, record) in pieces.iter_mut().zip(&records[..count]) {
            *piece = IoSlice::new(record);
        }
        let sent = match self.base.write_some_pieces(link, &pieces[..count]) {
            Ok(sent) => sent,
            Err(error) if is_for_now(&error) => 0,
            Err(error) => {
                // What has come is opened all the same.
                self.state.seals_no_more = true;
                return Err(error);
            }
        };
        let mut left = sent;
        for record in records.into_iter().take(count) {
            if left >= record.len() {
                left -= record.len();
            } else if self.state.outgoing.is_empty() {
                self.state.outgoing.push_rest(record, left);
                left = 0;
            } else {
                self.state.outgoing.push(record);
            }
        }
        if !self.state.outgoing.is_empty() {
            link.flush_soon();
        }
        Ok(())
    }

    /// Sends records behind what was sealed before and has not been sent.
    fn send_behind(
        &mut self,
        link: &mut Link,
        records: [Vec<u8>; MOST_RECORDS + 1],
    ) -> io::Result<()> {
        for record in records {
            self.state.outgoing.push(record);
        }
        match self.send_out(link) {
            Err(error) if !is_for_now(&error) => {
                self.state.seals_no_more = true;
                return Err(error);
            }
            // What has not left waits for the socket.
            _ if !self.state.outgoing.is_empty() => link.flush_soon(),
            _ => {}
        }
        Ok(())
    }

    // Reading.

    /// Delivers what is there already, or calls `read` for more.
    fn read_by(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
        read: impl FnOnce(&mut B, &mut Link, &mut ReadBuffers, usize) -> io::Result<Received>,
    ) -> io::Result<Received> {
        match self.state.stage {
            Stage::Plain => return read(&mut self.base, link, buffers, limit),
            // Reading goes on when it is done.
            Stage::Leaving { .. } => return Ok(Received::nothing()),
            _ => {}
        }
        self.limit_time(link);
        if let Some(received) = self.state.deliver_rest(buffers, limit)? {
            return Ok(received);
        }
        let held = self.state.incoming.len();
        let mut received = Received::nothing();
        if !record::is_decided(&self.state.incoming) {
            let room = ReadBuffers::CAPACITY - held;
            received = read(&mut self.base, link, buffers, room)?;
            if received.is_end() {
                self.state.stage = Stage::Over;
                return Err(TlsError::CutOff.into());
            }
        }
        let total = held + received.bytes();
        let bytes = buffers.bytes();
        if held > 0 {
            bytes.copy_within(..total - held, held);
            bytes[..held].copy_from_slice(&self.state.incoming);
        }
        if received.had_descriptors() {
            let descriptors = mem::take(buffers.descriptors());
            self.state
                .take_descriptors(&buffers.bytes()[..total], held, descriptors, received)?;
        }
        match &self.state.stage {
            Stage::Open(_) => self.state.open(link, buffers, total, limit, received),
            _ => {
                self.state.shake_hands(link, buffers, total)?;
                if self.state.is_established() {
                    link.wake_no_more::<Self>();
                }
                self.state.deliver_nothing(received)
            }
        }
    }
}

/// Whether sending may work later.
fn is_for_now(error: &io::Error) -> bool {
    // ENOBUFS and ETOOMANYREFS, which Linux has these numbers for.
    const ENOBUFS: i32 = 105;
    const ETOOMANYREFS: i32 = 109;
    error.kind() == io::ErrorKind::WouldBlock
        || matches!(error.raw_os_error(), Some(ENOBUFS | ETOOMANYREFS))
}

impl TlsState {
    fn new(stage: Stage) -> Self {
        Self {
            stage,
            agreed: None,
            mover: None,
            incoming: Vec::new(),
            outgoing: Outgoing::default(),
            rare: None,
            is_time_due: false,
            has_ended: false,
            has_told_end: false,
            has_said_close: false,
            seals_no_more: false,
        }
    }

    /// Says what anybody may know of it: no keys, no certificates, nothing that was sent.
    fn tell_all(&self, section: &mut Section) {
        let alpn = self.alpn_protocol().map(String::from_utf8_lossy);
        section
            .set("established", self.is_established())
            .set("plain", self.is_plain())
            .set_some("version", self.version().map(|it| format!("{it:?}")))
            .set_some("suite", self.cipher_suite().map(|it| format!("{it:?}")))
            .set_some(
                "group",
                self.key_exchange_group().map(|it| format!("{it:?}")),
            )
            .set_some("alpn", alpn.map(|it| it.into_owned()))
            .set_some("server_name", self.server_name().map(str::to_owned))
            .set("resumed", self.is_resumed())
            .set("peer_certificates", self.peer_certificates().len())
            .set("unsent_ciphertext", self.outgoing.len());
    }

    /// Whether the handshake is done. From then on, what is written and delivered is
    /// encrypted.
    pub fn is_established(&self) -> bool {
        self.agreed.is_some()
    }

    /// Whether TLS was not [started](crate::TlsTransport::start_tls) yet, so that
    /// everything is in the clear.
    pub fn is_plain(&self) -> bool {
        matches!(self.stage, Stage::Plain)
    }

    /// Returns the protocol version. Like everything that is negotiated, it is `None`
    /// before the handshake is done.
    pub fn version(&self) -> Option<ProtocolVersion> {
        self.agreed.as_ref().map(|agreed| agreed.version)
    }

    /// Returns the cipher suite.
    pub fn cipher_suite(&self) -> Option<CipherSuite> {
        self.agreed.as_ref().map(|agreed| agreed.suite.suite())
    }

    /// Returns the group of the key exchange; also `None` if there was no key exchange.
    pub fn key_exchange_group(&self) -> Option<NamedGroup> {
        self.agreed.as_ref()?.group
    }

    /// Returns the application protocol (ALPN); also `None` if none was negotiated.
    pub fn alpn_protocol(&self) -> Option<&[u8]> {
        self.agreed.as_ref()?.protocol.as_deref()
    }

    /// Returns the name of the server (SNI): the name that the client has asked for, or, on
    /// a client, the name that it was configured with. Also `None` if the client asks for
    /// no name.
    pub fn server_name(&self) -> Option<&str> {
        match (&self.agreed, &self.stage) {
            (Some(agreed), _) => agreed.server_name.as_deref(),
            (None, Stage::Handshaking { handshake, .. }) => handshake.server_name(),
            _ => None,
        }
    }

    /// Returns the certificates that the peer has presented, its own first. They were
    /// verified as the configuration says. Empty for a client that was not asked for one.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        let agreed = self.agreed.as_ref();
        agreed.map_or(&[], |agreed| &agreed.peer_certificates)
    }

    /// Whether an earlier session was resumed.
    pub fn is_resumed(&self) -> bool {
        self.agreed.as_ref().is_some_and(|agreed| agreed.is_resumed)
    }

    pub(crate) fn start_tls(
        &mut self,
        link: &mut Link,
        role: TlsRole,
        unsent: u64,
        unread: &[u8],
    ) -> Result<(), StartTlsError> {
        if !self.is_plain() {
            return Err(StartTlsError::Begun);
        }
        // What would fail then fails now.
        role.begin().map_err(StartTlsError::Configuration)?;
        self.incoming.extend_from_slice(unread);
        self.incoming.extend(link.take_put_back());
        if unsent == 0 {
            self.stage = Stage::Waiting { role };
            self.begin(link);
        } else {
            let until = link.position() + unsent;
            self.stage = Stage::Leaving { until, role };
        }
        Ok(())
    }

    /// Begins the handshake.
    fn begin(&mut self, link: &mut Link) {
        let Stage::Waiting { role } = &self.stage else {
            return;
        };
        let role = role.clone();
        link.begin_handshake();
        let begun = role.begin().and_then(|mut handshake| {
            handshake.advance(&[], &mut self.outgoing)?;
            Ok(Box::new(handshake))
        });
        match begun {
            Ok(handshake) => self.stage = Stage::Handshaking { handshake, role },
            Err(error) => {
                self.stage = Stage::Over;
                link.end(CloseReason::Lost(TlsError::of_rustls(error).into()));
            }
        }
        self.is_time_due = true;
        if !self.outgoing.is_empty() {
            link.flush_soon();
        }
        // Its time is limited there, and what was read before is looked at.
        link.read_soon();
    }

    fn session(&mut self) -> Option<&mut Session> {
        match &mut self.stage {
            Stage::Open(session) => Some(session),
            _ => None,
        }
    }

    /// Returns the session, if records may still be sealed.
    fn sealing(&mut self) -> Option<&mut Session> {
        match self.seals_no_more {
            true => None,
            false => self.session(),
        }
    }

    fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    // Reading.

    /// Delivers what comes before anything that is opened next: the rest of a record, an
    /// error, the end.
    fn deliver_rest(
        &mut self,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Option<Received>> {
        if let Some(rare) = &mut self.rare
            && rare.delivered < rare.plain.len()
        {
            let rest = &rare.plain[rare.delivered..];
            let count = rest.len().min(limit);
            buffers.bytes()[..count].copy_from_slice(&rest[..count]);
            rare.delivered += count;
            if rare.delivered == rare.plain.len() {
                (rare.plain, rare.delivered) = (Vec::new(), 0);
            }
            let received = Received::delivering(count, Received::nothing());
            return Ok(Some(self.and_more(received)));
        }
        if let Some(error) = self.rare.as_mut().and_then(|rare| rare.failure.take()) {
            return Err(error.into());
        }
        if matches!(self.stage, Stage::Packed { .. } | Stage::Over) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if self.has_ended {
            self.has_told_end = true;
            return Ok(Some(Received::end()));
        }
        Ok(None)
    }

    /// Whether something can be delivered without reading.
    fn has_more(&self) -> bool {
        let rare = self.rare.as_ref();
        rare.is_some_and(|rare| rare.delivered < rare.plain.len() || rare.failure.is_some())
            || self.has_ended && !self.has_told_end
            || record::is_decided(&self.incoming)
    }

    fn and_more(&self, received: Received) -> Received {
        match self.has_more() {
            true => received.and_more(),
            false => received,
        }
    }

    fn deliver_nothing(&self, of: Received) -> io::Result<Received> {
        let nothing = Received::delivering(0, of).without_descriptors();
        Ok(self.and_more(nothing))
    }

    /// Notes which record the descriptors of a read belong to. It is the last record that
    /// begins in what was read, since a read ends with the bytes that brought descriptors.
    fn take_descriptors(
        &mut self,
        bytes: &[u8],
        from: usize,
        descriptors: Vec<OwnedFd>,
        of: Received,
    ) -> io::Result<()> {
        if descriptors.is_empty() && !of.is_truncated() {
            return Ok(());
        }
        let at = record::last_start(bytes).unwrap_or_default();
        let passed = Passed {
            at,
            descriptors,
            of,
        };
        if at < from {
            drop(passed);
            self.stage = Stage::Over;
            return Err(TlsError::MisplacedDescriptors.into());
        }
        self.rare().passed.push_back(passed);
        Ok(())
    }

    /// Whether descriptors came with the record at `at`.
    fn is_passed_at(&self, at: usize) -> bool {
        let rare = self.rare.as_ref();
        let first = rare.and_then(|rare| rare.passed.front());
        first.is_some_and(|passed| passed.at == at)
    }

    /// Keeps what is left of a read.
    fn keep(&mut self, rest: &[u8], gone: usize) {
        if rest.is_empty() {
            if self.incoming.capacity() > 0 {
                memory::give_back(mem::take(&mut self.incoming));
            }
        } else {
            if self.incoming.capacity() == 0 {
                self.incoming = memory::take();
            }
            self.incoming.clear();
            self.incoming.extend_from_slice(rest);
        }
        if let Some(rare) = &mut self.rare {
            for passed in &mut rare.passed {
                passed.at -= gone;
            }
        }
    }

    /// Opens the records at the start of the buffers, as many as are to be delivered, and
    /// moves their contents together.
    fn open(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        total: usize,
        limit: usize,
        of: Received,
    ) -> io::Result<Received> {
        let (mut at, mut plain) = (0, 0);
        let mut beside = None;
        let mut failure = None;
        while plain < limit && !self.has_ended && failure.is_none() {
            if self.is_passed_at(at) && plain > 0 {
                // What came with it is delivered with its own bytes.
                break;
            }
            match self.open_one(&mut buffers.bytes()[at..total]) {
                Ok(None) => break,
                Ok(Some((length, opened))) => {
                    if self.is_passed_at(at) {
                        let passed = self.rare().passed.pop_front();
                        beside = passed.or(beside);
                    }
                    if let Opened::Data(place) = opened {
                        let place = at + place.start..at + place.end;
                        let count = place.len();
                        buffers.bytes().copy_within(place, plain);
                        plain += count;
                    }
                    at += length;
                }
                Err(error) => failure = Some(error),
            }
        }
        let is_over = self.has_ended || failure.is_some();
        let rest = if is_over { total } else { at };
        self.keep(&buffers.bytes()[rest..total], if is_over { 0 } else { at });
        self.answer(link);
        if let Some(failure) = failure {
            self.fail(link, failure.alert);
            if plain == 0 {
                return Err(failure.error.into());
            }
            self.rare().failure = Some(failure.error);
        }
        if plain > limit {
            let overflow = buffers.bytes()[limit..plain].to_vec();
            self.rare().plain = overflow;
        }
        let received = match beside {
            Some(mut passed) => {
                buffers.descriptors().append(&mut passed.descriptors);
                Received::delivering(plain.min(limit), passed.of)
            }
            None => Received::delivering(plain.min(limit), of).without_descriptors(),
        };
        Ok(self.and_more(received))
    }

    /// Opens the record at the start of `bytes`. Returns its length, and where its contents
    /// are. `None` if it has not arrived completely.
    fn open_one(&mut self, bytes: &mut [u8]) -> Result<Option<(usize, Opened)>, Failure> {
        let Some(header) = record::next(bytes).map_err(Failure::of_framing)? else {
            return Ok(None);
        };
        let Some(session) = self.session() else {
            return Ok(None);
        };
        let opened = match session.open(header, &mut bytes[HEADER..header.whole()])? {
            Opened::Data(place) => Opened::Data(HEADER + place.start..HEADER + place.end),
            other => other,
        };
        self.has_ended |= opened == Opened::End;
        Ok(Some((header.whole(), opened)))
    }

    /// Answers requests that came between the data.
    fn answer(&mut self, link: &mut Link) {
        let Some(session) = self.session() else {
            return;
        };
        let is_refused = session.take_refusal_owed();
        if session.is_update_owed() || is_refused {
            link.flush_soon();
        }
        if is_refused {
            self.say(AlertDescription::NoRenegotiation);
        }
    }

    /// Continues the handshake.
    fn shake_hands(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        total: usize,
    ) -> io::Result<()> {
        let bytes = &buffers.bytes()[..total];
        let mut at = 0;
        let mut is_done = false;
        while !is_done && let Stage::Handshaking { handshake, .. } = &mut self.stage {
            let header = match record::next(&bytes[at..]) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(error) => {
                    let failure = Failure::of_framing(error);
                    let error = match handshake.has_begun() {
                        true => failure.error,
                        false => TlsError::NotTls,
                    };
                    return Err(self.handshake_failed(link, error));
                }
            };
            let whole = header.whole();
            let advanced = handshake.advance(&bytes[at..at + whole], &mut self.outgoing);
            if !self.outgoing.is_empty() {
                link.flush_soon();
            }
            match advanced {
                Ok(done) => is_done = done,
                Err(error) => {
                    return Err(self.handshake_failed(link, TlsError::of_rustls(error)));
                }
            }
            if self.is_passed_at(at) {
                // Nobody is there yet who could take them.
                drop(self.rare().passed.pop_front());
            }
            at += whole;
        }
        self.keep(&bytes[at..], at);
        if is_done {
            self.establish(link)?;
        }
        Ok(())
    }

    fn establish(&mut self, link: &mut Link) -> io::Result<()> {
        let Stage::Handshaking { handshake, role } = mem::replace(&mut self.stage, Stage::Over)
        else {
            return Ok(());
        };
        self.mover = role.mover();
        match handshake.finish(self.mover.is_some()) {
            Ok((session, agreed)) => {
                log::debug!(
                    target: log::TLS,
                    "{:?} {:?} for {:?}, resumed: {}",
                    agreed.version,
                    session.suite(),
                    agreed.server_name,
                    agreed.is_resumed,
                );
                self.stage = Stage::Open(Box::new(session));
                self.agreed = Some(Box::new(agreed));
                link.established();
                Ok(())
            }
            Err(error) => Err(self.handshake_failed(link, TlsError::of_rustls(error))),
        }
    }

    fn handshake_failed(&mut self, link: &mut Link, error: TlsError) -> io::Error {
        self.stage = Stage::Over;
        if matches!(error, TlsError::Configuration(_)) {
            log::warn!(target: log::TLS, "{error}");
        } else {
            log::debug!(target: log::TLS, "{error}");
        }
        // What rustls has to say about it leaves before the end.
        if !self.outgoing.is_empty() {
            link.flush_soon();
        }
        error.into()
    }

    // Our own words.

    /// Seals an alert. It comes after everything that was sealed, and after new keys if the
    /// peer waits for some.
    fn say(&mut self, alert: AlertDescription) {
        if self.rare.as_ref().is_some_and(|rare| rare.held.is_some()) {
            // It would overtake what was sealed before, and be none to the peer.
            return;
        }
        if let Some(session) = self.sealing() {
            match session.before_data(0) {
                Ok(update) => self.outgoing.push(update.unwrap_or_default()),
                // A last word needs no new ones.
                Err(TlsError::KeysUsedUp) => {}
                Err(_) => return,
            }
        }
        if let Some(session) = self.sealing()
            && let Ok(record) = session.seal_alert(alert)
        {
            self.outgoing.push(record);
        }
    }

    /// Ends the session, and tells the peer why.
    fn fail(&mut self, link: &mut Link, alert: Option<AlertDescription>) {
        if let Some(alert) = alert.filter(|_| !self.has_said_close) {
            self.say(alert);
            link.flush_soon();
        }
        self.stage = Stage::Over;
    }

    /// Notes that nothing more can be sealed.
    fn keys_failed(&mut self, link: &mut Link, error: TlsError) -> io::Error {
        log::warn!(target: log::TLS, "{error}");
        self.say_close(link);
        error.into()
    }

    fn say_close(&mut self, link: &mut Link) {
        if matches!(self.stage, Stage::Open(_)) && !mem::replace(&mut self.has_said_close, true) {
            self.say(AlertDescription::CloseNotify);
            link.flush_soon();
        }
    }

    /// Sends without its descriptors what was sealed to be sent with them. Returns how many
    /// of the user's bytes are in it.
    fn give_up_held(&mut self) -> Option<usize> {
        let (record, count) = self.rare.as_mut()?.held.take()?;
        self.outgoing.push(record);
        Some(count)
    }

    /// Seals the key update that the peer waits for, once what was sealed before has been
    /// sent. So one is pending at a time, however many the peer has asked for.
    fn update_keys(&mut self) -> Result<(), TlsError> {
        let is_held = self.rare.as_ref().is_some_and(|rare| rare.held.is_some());
        if let Some(session) = self.sealing()
            && session.is_update_owed()
            && !is_held
            && let Some(record) = session.before_data(0)?
        {
            self.outgoing.push(record);
        }
        Ok(())
    }

    /// Takes the state out, for a connection that is put together again elsewhere.
    fn take(&mut self) -> Self {
        mem::replace(self, Self::new(Stage::Over))
    }
}

impl fmt::Debug for TlsState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match &self.stage {
            Stage::Plain => "plain",
            Stage::Leaving { .. } | Stage::Waiting { .. } => "beginning",
            Stage::Handshaking { .. } => "handshaking",
            Stage::Open(_) => "open",
            Stage::Packed { .. } => "packed",
            Stage::Over => "over",
        };
        f.debug_struct("TlsState")
            .field("stage", &stage)
            .field("version", &self.version())
            .field("cipher_suite", &self.cipher_suite())
            .field("incoming", &self.incoming.len())
            .field("outgoing", &self.outgoing.len())
            .finish_non_exhaustive()
    }
}

impl<B: fmt::Debug> fmt::Debug for Tls<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("base", &self.base)
            .field("state", &self.state)
            .finish()
    }
}

impl<B: FileDescriptor> FileDescriptor for Tls<B> {
    fn write_some_data(&mut self, link: &mut Link, data: &[u8]) -> io::Result<usize> {
        self.write(link, &[data])
    }

    fn write_some_pieces(&mut self, link: &mut Link, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut chunks: [&[u8]; MOST_PIECES] = [&[]; MOST_PIECES];
        let count = pieces.len().min(MOST_PIECES);
        for (chunk, piece) in chunks.iter_mut().zip(pieces) {
            *chunk = piece;
        }
        self.write(link, &chunks[..count])
    }

    fn do_read(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        self.read_by(link, buffers, limit, |base, link, buffers, room| {
            base.do_read(link, buffers, room)
        })
    }

    fn describe(&self, _: &Link, description: &mut Description) {
        self.state.tell_all(description.section("Tls"));
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

    fn facet(&self) -> Option<&dyn std::any::Any> {
        Some(&self.state)
    }

    fn facet_mut(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(&mut self.state)
    }

    fn start(&mut self, link: &mut Link) {
        self.base.start(link);
        self.state.begin(link);
        self.state.go_on(link);
        self.limit_time(link);
    }

    fn flush(&mut self, link: &mut Link) -> io::Result<()> {
        self.base.flush(link)?;
        self.limit_time(link);
        self.send_out(link)?;
        let updated = self.state.update_keys();
        updated.map_err(|error| self.state.keys_failed(link, error))?;
        self.send_out(link)
    }

    fn unflushed(&self) -> usize {
        self.state.outgoing.len() + self.base.unflushed()
    }

    fn flushes_by_writing(&self) -> bool {
        matches!(self.state.stage, Stage::Open(_)) && self.base.unflushed() == 0
    }

    fn timer_fired(&mut self, link: &mut Link, _: Instant) {
        if matches!(self.state.stage, Stage::Handshaking { .. }) {
            let error = self
                .state
                .handshake_failed(link, TlsError::HandshakeTimedOut);
            link.end(CloseReason::Lost(error));
        }
    }

    fn closing(&mut self, link: &mut Link) -> bool {
        self.state.say_close(link);
        self.state.outgoing.is_empty() && self.base.closing(link)
    }

    fn half_closing(&mut self, link: &mut Link) -> bool {
        self.state.say_close(link);
        self.state.outgoing.is_empty() && self.base.half_closing(link)
    }

    fn has_own_end(&self) -> bool {
        !self.state.is_plain() || self.base.has_own_end()
    }

    fn take(&mut self) -> Option<Self> {
        Some(Self {
            base: self.base.take()?,
            state: self.state.take(),
        })
    }

    fn travels(&self) -> bool {
        self.state.is_plain() && self.base.travels()
    }

    fn pack(&mut self) -> Result<Vec<LayerState>, Stays> {
        let mut below = self.base.pack()?;
        if self.state.is_plain() {
            return Ok(below);
        }
        match self.state.pack() {
            Ok(own) => {
                below.insert(0, own);
                Ok(below)
            }
            Err(stays) => {
                // Nobody has it.
                let back = self.base.come_back();
                debug_assert!(back.is_ok(), "{back:?}");
                Err(stays)
            }
        }
    }

    fn come_back(&mut self) -> io::Result<()> {
        self.base.come_back()?;
        Ok(self.state.come_back()?)
    }

    fn undelivered(&self) -> usize {
        let rare = self.state.rare.as_ref();
        let plain = rare.map_or(0, |rare| rare.plain.len() - rare.delivered);
        let own = match self.state.has_more() {
            true => plain + self.state.incoming.len().max(1),
            false => 0,
        };
        own + self.base.undelivered()
    }
}

impl<B: PassDescriptors> PassDescriptors for Tls<B> {
    fn send_with_descriptors(
        &mut self,
        link: &mut Link,
        data: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        match &self.state.stage {
            Stage::Plain => return self.base.send_with_descriptors(link, data, descriptors),
            Stage::Leaving { until, .. } => {
                let left = (until - link.position()) as usize;
                let data = &data[..data.len().min(left)];
                let count = self.base.send_with_descriptors(link, data, descriptors)?;
                self.plain_left(link, count);
                return Ok(count);
            }
            _ => {}
        }
        // What was sealed before comes first.
        self.send_out(link)?;
        let held = self.state.rare.as_mut().and_then(|rare| rare.held.take());
        let (record, count) = match held {
            Some(held) => held,
            None => {
                let data = &data[..data.len().min(MOST_PLAIN)];
                let sealed = self.state.seal_one(data);
                let (update, record) =
                    sealed.map_err(|error| self.state.keys_failed(link, error))?;
                if let Some(update) = update {
                    self.state.outgoing.push(update);
                }
                (record, data.len())
            }
        };
        let sent = self
            .send_out(link)
            .and_then(|()| self.base.send_with_descriptors(link, &record, descriptors));
        match sent {
            Ok(sent) => {
                self.state.outgoing.push_rest(record, sent);
                if !self.state.outgoing.is_empty() {
                    link.flush_soon();
                }
                Ok(count)
            }
            Err(error) => {
                // Sealed is sealed: this very record is what the bytes leave as.
                self.state.rare().held = Some((record, count));
                Err(error)
            }
        }
    }

    fn receive(
        &mut self,
        link: &mut Link,
        buffers: &mut ReadBuffers,
        limit: usize,
    ) -> io::Result<Received> {
        self.read_by(link, buffers, limit, |base, link, buffers, room| {
            base.receive(link, buffers, room)
        })
    }

    fn descriptor_socket(&self) -> &dyn DescriptorSocket {
        self.base.descriptor_socket()
    }
}

impl TlsState {
    /// Seals one record of data, preceded by a key update if one is needed.
    fn seal_one(&mut self, data: &[u8]) -> Result<(Option<Vec<u8>>, Vec<u8>), TlsError> {
        let Some(session) = self.sealing() else {
            let error = Error::HandshakeNotComplete;
            return Err(TlsError::of_rustls(error));
        };
        let update = session.before_data(1)?;
        let record = session.seal_data(OutboundChunks::Single(data))?;
        Ok((update, record))
    }
}
