//! The handshake, done by rustls, up to the keys of a [`Session`].

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert, UnbufferedServerConnection};
use rustls::sign::CertifiedKey;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{
    CommonState, Error, HandshakeKind, NamedGroup, PeerMisbehaved, ProtocolVersion,
    SupportedCipherSuite,
};

use crate::outgoing::Outgoing;
use crate::secret::{Secret, Secrets, take_told};
use crate::session::Session;

/// A handshake in progress.
pub(crate) struct Handshake {
    by: By,
    /// Records that rustls has not finished with: parts of a message, at most 64 KiB.
    input: Vec<u8>,
    /// The server's name, as the client gave it.
    server_name: Option<Box<str>>,
    /// Whether a record has arrived.
    has_begun: bool,
    /// The traffic secrets of TLS 1.3, once they are known: the client's and the server's.
    told: Option<[Secret; 2]>,
}

enum By {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// What was negotiated.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) version: ProtocolVersion,
    pub(crate) suite: SupportedCipherSuite,
    pub(crate) group: Option<NamedGroup>,
    pub(crate) protocol: Option<Box<[u8]>>,
    pub(crate) server_name: Option<Box<str>>,
    pub(crate) peer_certificates: Box<[CertificateDer<'static>]>,
    pub(crate) is_resumed: bool,
}

impl Handshake {
    pub(crate) fn server(connection: UnbufferedServerConnection) -> Self {
        Self::new(By::Server(connection), None)
    }

    pub(crate) fn client(connection: UnbufferedClientConnection, name: Box<str>) -> Self {
        Self::new(By::Client(connection), Some(name))
    }

    fn new(by: By, server_name: Option<Box<str>>) -> Self {
        Self {
            by,
            input: Vec::new(),
            server_name,
            has_begun: false,
            told: None,
        }
    }

    /// Whether anything that the peer sent has made sense so far.
    pub(crate) fn has_begun(&self) -> bool {
        self.has_begun
    }

    pub(crate) fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// Takes a whole record, or an empty one to begin with, and puts the answer into `out`.
    /// Returns whether the handshake is done.
    ///
    /// # Errors
    ///
    /// The handshake has failed. `out` has what the peer is told of that.
    pub(crate) fn advance(&mut self, record: &[u8], out: &mut Outgoing) -> Result<bool, Error> {
        self.input.extend_from_slice(record);
        self.has_begun |= !record.is_empty();
        let result = self.run(out);
        self.told = take_told().or_else(|| self.told.take());
        if let By::Server(_) = self.by
            && let Some(name) = NAMED.take()
        {
            self.server_name = Some(name);
        }
        result?;
        let is_done = !self.common().is_handshaking();
        if is_done && !self.input.is_empty() {
            // A message that begins under the keys of the handshake.
            return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
        }
        Ok(is_done)
    }

    /// Lets rustls continue until it needs to hear from the peer.
    fn run(&mut self, out: &mut Outgoing) -> Result<(), Error> {
        loop {
            match self.step() {
                Ok(Wants::Sent(bytes)) => out.push(bytes),
                Ok(Wants::Again) => {}
                Ok(Wants::Peer) => return Ok(()),
                Err(error) => {
                    // What it says to the peer about that, and no step more: it would
                    // look at the same input again.
                    while self.common().wants_write()
                        && let Ok(Wants::Sent(bytes)) = self.step()
                    {
                        out.push(bytes);
                    }
                    return Err(error);
                }
            }
        }
    }

    fn step(&mut self) -> Result<Wants, Error> {
        let input = &mut self.input;
        let (done_with, wants) = match &mut self.by {
            By::Server(connection) => wants_of(connection.process_tls_records(input)),
            By::Client(connection) => wants_of(connection.process_tls_records(input)),
        };
        self.input.drain(..done_with.min(self.input.len()));
        wants
    }

    fn common(&self) -> &CommonState {
        match &self.by {
            By::Server(connection) => connection,
            By::Client(connection) => connection,
        }
    }

    /// Makes a session of a handshake that is done. `may_move` says whether the session may
    /// move to another process.
    ///
    /// # Errors
    ///
    /// The provider does not give out its keys.
    pub(crate) fn finish(self, may_move: bool) -> Result<(Session, Agreed), Error> {
        let Some((version, suite)) = self
            .common()
            .protocol_version()
            .zip(self.common().negotiated_cipher_suite())
        else {
            return Err(Error::HandshakeNotComplete);
        };
        let common = self.common();
        let certificates = common.peer_certificates().unwrap_or_default();
        let agreed = Agreed {
            version,
            suite,
            group: common
                .negotiated_key_exchange_group()
                .map(|group| group.name()),
            protocol: common.alpn_protocol().map(Into::into),
            peer_certificates: certificates.to_vec().into_boxed_slice(),
            is_resumed: common.handshake_kind() == Some(HandshakeKind::Resumed),
            server_name: self.server_name,
        };
        let session = match self.by {
            By::Server(connection) => {
                let told = self.told.map(|[open, seal]| Secrets { seal, open });
                let (secrets, _) = connection.dangerous_into_kernel_connection()?;
                Session::new(suite, secrets, told, may_move)?
            }
            By::Client(connection) => {
                let told = self.told.map(|[seal, open]| Secrets { seal, open });
                let (secrets, tickets) = connection.dangerous_into_kernel_connection()?;
                // TLS 1.2 has no tickets after the handshake.
                let is_13 = version == ProtocolVersion::TLSv1_3;
                let session = Session::new(suite, secrets, told, may_move)?;
                session.of_client(is_13.then_some(tickets))
            }
        };
        Ok((session, agreed))
    }
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshake")
            .field("is_client", &matches!(self.by, By::Client(_)))
            .field("input", &self.input.len())
            .finish_non_exhaustive()
    }
}

/// What rustls wants next, on either side.
enum Wants {
    /// To have this sent.
    Sent(Vec<u8>),
    /// To be called again.
    Again,
    /// To hear from the peer.
    Peer,
}

/// Returns what rustls wants after a step, and how much of the input it has finished with.
fn wants_of<D>(status: UnbufferedStatus<'_, '_, D>) -> (usize, Result<Wants, Error>) {
    let wants = status.state.and_then(|state| match state {
        ConnectionState::EncodeTlsData(mut flight) => FLIGHT.with_borrow_mut(|scratch| {
            loop {
                match flight.encode(scratch) {
                    Ok(count) => return Ok(Wants::Sent(scratch[..count].to_vec())),
                    Err(EncodeError::InsufficientSize(short)) => {
                        scratch.resize(short.required_size, 0);
                    }
                    Err(error) => return Err(Error::General(error.to_string())),
                }
            }
        }),
        ConnectionState::TransmitTlsData(sent) => {
            sent.done();
            Ok(Wants::Again)
        }
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Ok(Wants::Peer),
        // Its configuration allows no early data, and no record follows the last of the
        // handshake: what is left is a peer that has closed.
        _ => Err(PeerMisbehaved::IllegalTlsInnerPlaintext.into()),
    });
    (status.discard, wants)
}

thread_local! {
    /// Where a flight is put together; it is copied once its length is known. It is as long
    /// as the longest flight so far, which depends on our own certificates.
    static FLIGHT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };

    /// The name in the ClientHello that rustls last looked at in this thread. It tells only
    /// the resolver. Nobody else can learn it for such a connection.
    static NAMED: RefCell<Option<Box<str>>> = const { RefCell::new(None) };
}

/// Notes the name that a client asks for.
#[derive(Debug)]
pub(crate) struct NotesName(pub(crate) Arc<dyn ResolvesServerCert>);

impl ResolvesServerCert for NotesName {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        NAMED.set(client_hello.server_name().map(Into::into));
        self.0.resolve(client_hello)
    }

    fn only_raw_public_keys(&self) -> bool {
        self.0.only_raw_public_keys()
    }
}
