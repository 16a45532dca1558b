//! What is spoken once the handshake is done: sealed records, and the messages of the two
//! ends between them. Pure.
//!
//! rustls does the handshake and keeps the secrets; its providers seal and open. This is
//! the rest of the record layer (RFC 8446, 4.6, 5 and 6; RFC 5246, 6 and 7). It opens
//! records in place. The record layer of rustls copies each.

use std::fmt;
use std::ops::Range;

use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, NONCE_LEN,
    OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::{
    AlertDescription, CipherSuite, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets,
    HandshakeType, InvalidMessage, PeerMisbehaved, ProtocolVersion, SupportedCipherSuite,
    Tls13CipherSuite,
};
use zeroize::{Zeroize, Zeroizing};

use crate::error::TlsError;
use crate::record::{Header, MOST_PLAIN};
use crate::secret::{Secret, Secrets, aead_key, of_another_kind};

/// How many KeyUpdates may come without data between them, as in BoringSSL and rustls.
const MOST_KEY_UPDATES: u8 = 32;

/// How many warnings may come in all (`kMaxWarningAlerts` of BoringSSL), and how many
/// requests to renegotiate, which are refused.
const MOST_WARNINGS: u8 = 4;
const MOST_RENEGOTIATIONS: u8 = 1;

/// How many empty records may follow each other, as in rustls.
const MOST_EMPTY: u8 = 32;

/// How long a handshake message may be, as in rustls.
const MOST_HANDSHAKE: usize = 0xffff;

/// The last record numbers are kept for alerts.
const RESERVED_NUMBERS: u64 = 8;

/// No record number comes near to wrapping around, whatever the suite allows.
const LAST_NUMBER: u64 = u64::MAX - 0xffff;

/// How long the payload of a TLS 1.3 record may be (RFC 8446, 5.2).
const MOST_SEALED_13: usize = MOST_PLAIN + 256;

/// The session of one secured connection.
pub(crate) struct Session {
    sealer: Sealer,
    opener: Opener,
    keys: Keys,
    /// Takes the tickets that a server sends. `None` for a connection that has moved:
    /// another process has no use for them.
    tickets: Option<Box<KernelConnection<ClientConnectionData>>>,
    suite: SupportedCipherSuite,
    is_client: bool,
    /// The peer has asked us to change our keys.
    is_update_owed: bool,
    /// Another process has held these keys. They may seal nothing but the KeyUpdate that
    /// replaces them. That is sent with the next data: an idle peer need not be woken, and
    /// it accepts only so many without data between them.
    is_renewal_due: bool,
    /// The peer has asked to renegotiate.
    is_refusal_owed: bool,
    key_updates_left: u8,
    warnings_left: u8,
    renegotiations_left: u8,
    empty_left: u8,
    /// A handshake message of which only a part has arrived.
    partial: Vec<u8>,
}

/// What keys are made of.
pub(crate) enum Keys {
    /// TLS 1.2, whose keys do not change.
    Fixed(Option<Box<FixedKeys>>),
    /// TLS 1.3.
    Updated(Box<Secrets>),
}

/// The keys of a connection that may move.
pub(crate) struct FixedKeys {
    seal: FixedKey,
    open: FixedKey,
    /// How many sealers there were. Where the peer is told record numbers, each has numbers
    /// of its own.
    sealers: u32,
}

struct FixedKey {
    key: Zeroizing<Vec<u8>>,
    iv: [u8; NONCE_LEN],
}

impl FixedKey {
    fn of(secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        let (ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv }) = secrets
        else {
            return Err(of_another_kind());
        };
        Ok(Self {
            key: Zeroizing::new(key.as_ref().to_vec()),
            iv: iv.as_ref().try_into().map_err(|_| of_another_kind())?,
        })
    }

    fn parts(&self) -> Result<(AeadKey, Iv), Error> {
        Ok((aead_key(&self.key)?, Iv::from(self.iv)))
    }
}

struct Sealer {
    by: Box<dyn MessageEncrypter>,
    /// Invariant: no record was sealed under this number or a higher one with these keys.
    next: u64,
    /// Data may be sealed below this number.
    most: u64,
}

struct Opener {
    by: Box<dyn MessageDecrypter>,
    next: u64,
}

/// What a record contained.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Data, at this place of the record's body.
    Data(Range<usize>),
    /// Nothing for the user.
    Nothing,
    /// The end: the peer sends nothing more.
    End,
}

/// What is wrong with what arrived, and what the peer is told of it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: TlsError,
    pub(crate) alert: Option<AlertDescription>,
}

impl Failure {
    fn new(alert: AlertDescription, error: impl Into<Error>) -> Self {
        Self {
            error: TlsError::of_rustls(error.into()),
            alert: Some(alert),
        }
    }

    /// Makes one of the decrypter's error.
    fn of_decrypter(error: Error) -> Self {
        let alert = match &error {
            Error::DecryptError => AlertDescription::BadRecordMac,
            Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
            Error::PeerMisbehaved(_) => AlertDescription::UnexpectedMessage,
            _ => AlertDescription::DecodeError,
        };
        Self::new(alert, error)
    }

    /// Makes one of bytes that are no record.
    pub(crate) fn of_framing(error: InvalidMessage) -> Self {
        let alert = match error {
            InvalidMessage::MessageTooLarge => AlertDescription::RecordOverflow,
            InvalidMessage::UnknownProtocolVersion => AlertDescription::ProtocolVersion,
            _ => AlertDescription::DecodeError,
        };
        Self::new(alert, error)
    }
}

impl Session {
    /// Continues from a handshake. `told` are the secrets of TLS 1.3. `may_move` keeps the
    /// keys that only a move needs.
    ///
    /// # Errors
    ///
    /// The provider knows the suite and does not give out its keys.
    pub(crate) fn new(
        suite: SupportedCipherSuite,
        secrets: ExtractedSecrets,
        told: Option<Secrets>,
        may_move: bool,
    ) -> Result<Self, Error> {
        let (seal_from, seal) = secrets.tx;
        let (open_from, open) = secrets.rx;
        let keys = match suite.tls13() {
            Some(suite) => {
                let told = told.ok_or_else(|| Error::General("no secrets were told".into()))?;
                debug_assert!(is_of(&told.seal, suite, &seal), "other keys than told");
                debug_assert!(is_of(&told.open, suite, &open), "other keys than told");
                Keys::Updated(Box::new(told))
            }
            None if may_move => {
                let (seal, open) = (FixedKey::of(&seal)?, FixedKey::of(&open)?);
                Keys::Fixed(Some(Box::new(FixedKeys {
                    seal,
                    open,
                    sealers: 2,
                })))
            }
            None => Keys::Fixed(None),
        };
        // The numbers that rustls has sealed under are the first sealer's.
        let (key, iv) = parts(seal)?;
        let by = sealer(suite, (key, moving::apart(suite, iv, 1)));
        let sealer = Sealer {
            by: primed(suite, by, seal_from)?,
            next: seal_from,
            most: most_sealed(suite),
        };
        let opener = Opener {
            by: opener(suite, parts(open)?),
            next: open_from,
        };
        Ok(Self::with(suite, sealer, opener, keys))
    }

    fn with(suite: SupportedCipherSuite, sealer: Sealer, opener: Opener, keys: Keys) -> Self {
        Self {
            sealer,
            opener,
            keys,
            tickets: None,
            suite,
            is_client: false,
            is_update_owed: false,
            is_renewal_due: false,
            is_refusal_owed: false,
            key_updates_left: MOST_KEY_UPDATES,
            warnings_left: MOST_WARNINGS,
            renegotiations_left: MOST_RENEGOTIATIONS,
            empty_left: MOST_EMPTY,
            partial: Vec::new(),
        }
    }

    /// Makes it the client's side. `tickets` takes those that the server sends.
    pub(crate) fn of_client(
        mut self,
        tickets: Option<KernelConnection<ClientConnectionData>>,
    ) -> Self {
        self.is_client = true;
        self.tickets = tickets.map(Box::new);
        self
    }

    fn is_13(&self) -> bool {
        self.suite.tls13().is_some()
    }

    pub(crate) fn is_client(&self) -> bool {
        self.is_client
    }

    pub(crate) fn suite(&self) -> SupportedCipherSuite {
        self.suite
    }

    // Sealing.

    /// Returns what has to be sent before the next data: a key update, if the peer wants
    /// one or if these keys have sealed enough. It has to be sent before anything that is
    /// sealed later.
    ///
    /// # Errors
    ///
    /// There are no new keys, and these have sealed enough.
    pub(crate) fn before_data(&mut self, records: u64) -> Result<Option<Vec<u8>>, TlsError> {
        let is_used_up = self.sealer.next.saturating_add(records) >= self.sealer.most;
        if !is_used_up && !self.is_update_owed && !self.is_renewal_due {
            return Ok(None);
        }
        if !self.is_13() {
            return Err(TlsError::KeysUsedUp);
        }
        (self.is_update_owed, self.is_renewal_due) = (false, false);
        // update_not_requested: nobody has to answer.
        let message = [HandshakeType::KeyUpdate.into(), 0, 0, 1, 0];
        let record = self.seal(ContentType::Handshake, OutboundChunks::Single(&message))?;
        let updated = updated(&mut self.keys, self.suite, |secrets| &mut secrets.seal);
        let keys = updated.map_err(TlsError::of_rustls)?;
        (self.sealer.by, self.sealer.next) = (sealer(self.suite, keys), 0);
        Ok(Some(record))
    }

    /// Whether the peer waits for new keys of ours.
    pub(crate) fn is_update_owed(&self) -> bool {
        self.is_update_owed
    }

    /// Seals data of the user, at most [`MOST_PLAIN`] bytes.
    pub(crate) fn seal_data(&mut self, data: OutboundChunks<'_>) -> Result<Vec<u8>, TlsError> {
        debug_assert!(data.len() <= MOST_PLAIN);
        self.seal(ContentType::ApplicationData, data)
    }

    /// Seals an alert.
    pub(crate) fn seal_alert(&mut self, alert: AlertDescription) -> Result<Vec<u8>, TlsError> {
        let is_warning = matches!(
            alert,
            AlertDescription::CloseNotify | AlertDescription::NoRenegotiation
        );
        let level = if is_warning { 1 } else { 2 };
        self.seal(
            ContentType::Alert,
            OutboundChunks::Single(&[level, alert.into()]),
        )
    }

    fn seal(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<Vec<u8>, TlsError> {
        let number = self.sealer.next;
        if number >= LAST_NUMBER {
            return Err(TlsError::KeysUsedUp);
        }
        // Used up whatever becomes of it: no number seals twice.
        self.sealer.next += 1;
        let message = OutboundPlainMessage {
            typ,
            version: ProtocolVersion::TLSv1_2,
            payload,
        };
        let sealed = self.sealer.by.encrypt(message, number);
        Ok(sealed.map_err(TlsError::of_rustls)?.encode())
    }

    // Opening.

    /// Opens the body of a record in place.
    ///
    /// # Errors
    ///
    /// The session is over: nothing more may be opened.
    pub(crate) fn open(&mut self, header: Header, body: &mut [u8]) -> Result<Opened, Failure> {
        if self.is_13() {
            if header.kind != ContentType::ApplicationData {
                return Err(out_of_place(header.kind));
            }
            if header.length > MOST_SEALED_13 {
                let error = Error::PeerSentOversizedRecord;
                return Err(Failure::new(AlertDescription::RecordOverflow, error));
            }
        }
        let number = self.opener.next;
        if number >= LAST_NUMBER {
            return Err(Failure::of_decrypter(Error::DecryptError));
        }
        let start = body.as_ptr().addr();
        let record = InboundOpaqueMessage::new(header.kind, header.version, body);
        let opened = self.opener.by.decrypt(record, number);
        let opened = opened.map_err(Failure::of_decrypter)?;
        self.opener.next += 1;
        if opened.payload.len() > MOST_PLAIN {
            let error = Error::PeerSentOversizedRecord;
            return Err(Failure::new(AlertDescription::RecordOverflow, error));
        }
        if opened.payload.is_empty() {
            self.nothing_came(opened.typ)?;
        } else {
            self.empty_left = MOST_EMPTY;
        }
        if opened.typ != ContentType::Handshake && !self.partial.is_empty() {
            let error = PeerMisbehaved::MessageInterleavedWithHandshakeMessage;
            return Err(Failure::new(AlertDescription::UnexpectedMessage, error));
        }
        match opened.typ {
            ContentType::ApplicationData => {
                self.key_updates_left = MOST_KEY_UPDATES;
                let at = opened.payload.as_ptr().addr() - start;
                Ok(Opened::Data(at..at + opened.payload.len()))
            }
            ContentType::Handshake => {
                self.partial.extend_from_slice(opened.payload);
                self.take_messages()
            }
            ContentType::Alert => match *opened.payload {
                [level, alert] => self.alerted(level, AlertDescription::from(alert)),
                _ => {
                    let error = InvalidMessage::MessageTooShort;
                    Err(Failure::new(AlertDescription::DecodeError, error))
                }
            },
            kind => Err(out_of_place(kind)),
        }
    }

    /// Notes an empty record. Only data may be empty, and only so often in a row.
    fn nothing_came(&mut self, kind: ContentType) -> Result<(), Failure> {
        if kind != ContentType::ApplicationData {
            let error = InvalidMessage::InvalidEmptyPayload;
            return Err(Failure::new(AlertDescription::UnexpectedMessage, error));
        }
        let error = PeerMisbehaved::TooManyEmptyFragments;
        spend(&mut self.empty_left, error)
    }

    fn alerted(&mut self, level: u8, alert: AlertDescription) -> Result<Opened, Failure> {
        if alert == AlertDescription::CloseNotify {
            return Ok(Opened::End);
        }
        let error = TlsError::Refused(alert);
        // TLS 1.3 knows one warning more, by its name and whatever its level.
        let is_warning = match self.is_13() {
            true => alert == AlertDescription::UserCanceled,
            false => level == 1,
        };
        if !is_warning {
            return Err(Failure { error, alert: None });
        }
        let error = PeerMisbehaved::TooManyWarningAlertsReceived;
        spend(&mut self.warnings_left, error)?;
        Ok(Opened::Nothing)
    }

    // What is left of the handshake.

    /// Takes the handshake messages that have arrived completely.
    fn take_messages(&mut self) -> Result<Opened, Failure> {
        loop {
            let Some(&[kind, high, middle, low]) = self.partial.first_chunk() else {
                return Ok(Opened::Nothing);
            };
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            if length > MOST_HANDSHAKE {
                let error = InvalidMessage::HandshakePayloadTooLarge;
                return Err(Failure::new(AlertDescription::DecodeError, error));
            }
            self.check_kind(HandshakeType::from(kind))?;
            if self.partial.len() < 4 + length {
                return Ok(Opened::Nothing);
            }
            let mut message = std::mem::take(&mut self.partial);
            let rest = message.split_off(4 + length);
            self.partial = rest;
            self.take_message(HandshakeType::from(kind), &message[4..])?;
        }
    }

    /// Checks that this message may come now, before all of it has arrived.
    fn check_kind(&self, kind: HandshakeType) -> Result<(), Failure> {
        let is_wanted = match (self.is_13(), self.is_client) {
            (true, true) => [HandshakeType::KeyUpdate, HandshakeType::NewSessionTicket].as_slice(),
            (true, false) => &[HandshakeType::KeyUpdate],
            (false, true) => &[HandshakeType::HelloRequest],
            (false, false) => &[HandshakeType::ClientHello],
        };
        if is_wanted.contains(&kind) {
            return Ok(());
        }
        let error = Error::InappropriateHandshakeMessage {
            expect_types: is_wanted.to_vec(),
            got_type: kind,
        };
        Err(Failure::new(AlertDescription::UnexpectedMessage, error))
    }

    fn take_message(&mut self, kind: HandshakeType, body: &[u8]) -> Result<(), Failure> {
        match kind {
            HandshakeType::KeyUpdate => self.keys_updated(body),
            HandshakeType::NewSessionTicket => match &mut self.tickets {
                Some(tickets) => tickets
                    .handle_new_session_ticket(body)
                    .map_err(|error| Failure::new(AlertDescription::DecodeError, error)),
                None => Ok(()),
            },
            // Renegotiation.
            _ => {
                self.is_refusal_owed = true;
                let error = PeerMisbehaved::TooManyRenegotiationRequests;
                spend(&mut self.renegotiations_left, error)
            }
        }
    }

    /// Returns whether the peer has asked to renegotiate and was not refused yet.
    pub(crate) fn take_refusal_owed(&mut self) -> bool {
        std::mem::take(&mut self.is_refusal_owed)
    }

    fn keys_updated(&mut self, body: &[u8]) -> Result<(), Failure> {
        let is_requested = match body {
            [0] => false,
            [1] => true,
            _ => {
                let error = InvalidMessage::InvalidKeyUpdate;
                return Err(Failure::new(AlertDescription::IllegalParameter, error));
            }
        };
        if !self.partial.is_empty() {
            // What follows is under other keys, so it cannot begin here.
            let error = PeerMisbehaved::KeyEpochWithPendingFragment;
            return Err(Failure::new(AlertDescription::UnexpectedMessage, error));
        }
        let error = PeerMisbehaved::TooManyKeyUpdateRequests;
        spend(&mut self.key_updates_left, error)?;
        let keys = updated(&mut self.keys, self.suite, |secrets| &mut secrets.open);
        let keys = keys.map_err(|error| Failure::new(AlertDescription::InternalError, error))?;
        (self.opener.by, self.opener.next) = (opener(self.suite, keys), 0);
        // However many there were, one answer will do.
        self.is_update_owed |= is_requested;
        Ok(())
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("suite", &self.suite)
            .field("sealed", &self.sealer.next)
            .field("opened", &self.opener.next)
            .finish_non_exhaustive()
    }
}

/// Spends one of those that are left.
fn spend(left: &mut u8, error: PeerMisbehaved) -> Result<(), Failure> {
    match left.checked_sub(1) {
        Some(now) => {
            *left = now;
            Ok(())
        }
        None => Err(Failure::new(AlertDescription::UnexpectedMessage, error)),
    }
}

fn out_of_place(kind: ContentType) -> Failure {
    let error = Error::InappropriateMessage {
        expect_types: vec![ContentType::ApplicationData],
        got_type: kind,
    };
    Failure::new(AlertDescription::UnexpectedMessage, error)
}

/// Returns the record number below which data may be sealed with one key.
fn most_sealed(suite: SupportedCipherSuite) -> u64 {
    let limit = match suite {
        SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
    };
    limit.min(LAST_NUMBER) - RESERVED_NUMBERS
}

fn parts(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(of_another_kind()),
    }
}

/// Whether `keys` are derived from `secret`.
fn is_of(secret: &Secret, suite: &Tls13CipherSuite, keys: &ConnectionTrafficSecrets) -> bool {
    let (Ok((key, iv)), Ok(wanted)) = (secret.keys(suite), FixedKey::of(keys)) else {
        return false;
    };
    key.as_ref() == &wanted.key[..] && iv.as_ref() == wanted.iv
}

/// Derives the next keys of one direction.
fn updated(
    keys: &mut Keys,
    suite: SupportedCipherSuite,
    direction: impl FnOnce(&mut Secrets) -> &mut Secret,
) -> Result<(AeadKey, Iv), Error> {
    let (Keys::Updated(secrets), SupportedCipherSuite::Tls13(suite)) = (&mut *keys, suite) else {
        return Err(of_another_kind());
    };
    let secret = direction(secrets);
    secret.update(suite)?;
    secret.keys(suite)
}

fn sealer(suite: SupportedCipherSuite, (key, iv): (AeadKey, Iv)) -> Box<dyn MessageEncrypter> {
    match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.encrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let (fixed, explicit) = split(&iv, suite.aead_alg.key_block_shape().fixed_iv_len);
            suite.aead_alg.encrypter(key, fixed, explicit)
        }
    }
}

fn opener(suite: SupportedCipherSuite, (key, iv): (AeadKey, Iv)) -> Box<dyn MessageDecrypter> {
    match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.decrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let (fixed, _) = split(&iv, suite.aead_alg.key_block_shape().fixed_iv_len);
            suite.aead_alg.decrypter(key, fixed)
        }
    }
}

fn split(iv: &Iv, fixed: usize) -> (&[u8], &[u8]) {
    iv.as_ref().split_at(fixed.min(iv.as_ref().len()))
}

/// Makes a sealer that continues at the number `next`.
///
/// With AES-GCM, the sealer of aws-lc-rs takes the first number that it seals for 0, and
/// refuses others later on. So it first seals nothing, as number 0; the result is wiped
/// and never sent.
fn primed(
    suite: SupportedCipherSuite,
    mut by: Box<dyn MessageEncrypter>,
    next: u64,
) -> Result<Box<dyn MessageEncrypter>, Error> {
    let counts = match suite {
        SupportedCipherSuite::Tls13(suite) => {
            suite.common.suite != CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        }
        SupportedCipherSuite::Tls12(suite) => moving::tells_numbers(suite),
    };
    if next > 0 && counts {
        let nothing = OutboundPlainMessage {
            typ: ContentType::ApplicationData,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::new_empty(),
        };
        by.encrypt(nothing, 0)?.encode().zeroize();
    }
    Ok(by)
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod moving;

#[cfg(test)]
mod tests;
