//! The manager's side of sd_notify(3): receives notices from processes that are admitted.

use std::os::fd::OwnedFd;

use bowline_protocol::{
    Context, Credentials, Datagram, DatagramProtocol, UnixAddress, UnixDatagramHandle,
    UnixDatagramTransport,
};
use bowline_reactor::Reactor;
use bowline_transport::endpoint::ListenWith;
use bowline_transport::{
    ListenError, UnixDatagram, UnixDatagramListen, UnixDatagramPort, close_received,
};

use super::notice::{LONGEST, Notice};
use crate::log;

/// The socket on which a service manager receives notices. Give it to
/// [`listen`](bowline_transport::Transports::listen), together with a [`NoticeHandler`].
///
/// It is a datagram socket. Each message has the credentials of its sender, which the
/// kernel vouches for. Services find the socket by [`environment`](Self::environment).
///
/// # Examples
///
/// A service says that it is ready, and gives a descriptor to keep:
///
/// ```
/// use std::os::fd::OwnedFd;
/// use bowline::handoff::systemd::{
///     DescriptorStore, Notice, NoticeHandler, NoticeSocket, Notifier, Said,
/// };
/// use bowline::{Credentials, Reactor, Transports};
///
/// struct Manager(DescriptorStore);
///
/// impl NoticeHandler for Manager {
///     fn admits(&mut self, sender: &Credentials) -> bool {
///         sender.pid == Some(std::process::id())
///     }
///
///     fn notice_received(
///         &mut self,
///         reactor: &mut Reactor,
///         _: &Credentials,
///         notice: &Notice,
///         descriptors: Vec<OwnedFd>,
///     ) {
///         self.0.apply(notice, descriptors);
///         if notice.said().any(|said| said == Said::Ready) {
///             assert_eq!(self.0.names().collect::<Vec<_>>(), ["log"]);
///             reactor.stop().expect("it runs");
///         }
///     }
/// }
///
/// let name = format!("@notices of {}", std::process::id());
/// let mut reactor = Reactor::new()?;
/// let here = NoticeSocket::at(name.as_str());
/// let variable = here.environment();
/// reactor.listen(here, Manager(DescriptorStore::new(16)))?;
///
/// // In the service, which has it as NOTIFY_SOCKET.
/// let notifier = Notifier::connect(variable.to_str().expect("a name"))?;
/// let log = std::fs::File::open("/dev/null")?;
/// let stored = Notice::new().store("log")?;
/// notifier.send_with(&stored, &[std::os::fd::AsFd::as_fd(&log)])?;
/// notifier.send(&Notice::new().ready())?;
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is received before it is given to `listen`"]
pub struct NoticeSocket {
    address: UnixAddress,
    endpoint: UnixDatagramListen,
}

/// What a manager does with notices.
pub trait NoticeHandler: 'static {
    /// Whether to accept notices from this process. Called for each message. What others
    /// send is dropped, with its descriptors.
    ///
    /// A process ID can be given to another process when this one has ended. So if you
    /// remember process IDs, they should be those of processes that nobody has waited for.
    /// A process outside of our PID namespace has no number.
    fn admits(&mut self, sender: &Credentials) -> bool;

    /// A notice has arrived from a process that is admitted. [`Notice::said`] parses it.
    ///
    /// `descriptors` arrived with it, in order. A
    /// [`DescriptorStore`](super::DescriptorStore) takes those that are to be kept. The
    /// callee owns them. To close one that is not trusted, give it to [`close_received`].
    ///
    /// Not called for a barrier. That is answered once this has returned for everything
    /// that was sent before it.
    fn notice_received(
        &mut self,
        reactor: &mut Reactor,
        sender: &Credentials,
        notice: &Notice,
        descriptors: Vec<OwnedFd>,
    );

    /// A message was dropped. It is also logged, once for each reason.
    fn notice_dropped(
        &mut self,
        reactor: &mut Reactor,
        sender: Option<&Credentials>,
        why: Dropped,
    ) {
        let _ = (reactor, sender, why);
    }
}

/// Why a message was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dropped {
    /// The sender is not admitted, or the kernel does not say who it is.
    NotAdmitted,
    /// The message is longer than 4,096 bytes, the limit of systemd.
    TooLong,
    /// The message is not text, or contains no field.
    Malformed,
    /// A barrier with more or less than one descriptor, or with anything else.
    Barrier,
    /// Descriptors that came with it were lost, since no descriptor number was free here.
    DescriptorsLost,
}

impl NoticeSocket {
    /// Makes a socket at a path, or at a name in the abstract namespace. The
    /// [mode](Self::mode) of a path says which processes may send to it. All processes may
    /// send to a name.
    pub fn at(address: impl Into<UnixAddress>) -> Self {
        let address = address.into();
        let endpoint = UnixDatagram::at(address.clone())
            .credentials(true)
            .max_datagram(LONGEST);
        Self { address, endpoint }
    }

    /// Sets the permissions of the socket file; default `0o666`.
    /// [`admits`](NoticeHandler::admits) is asked about everybody who may write to it.
    pub fn mode(mut self, mode: u32) -> Self {
        self.endpoint = self.endpoint.mode(mode);
        self
    }

    /// Returns the value of `NOTIFY_SOCKET` for services. A path has to be absolute.
    pub fn environment(&self) -> std::ffi::OsString {
        use std::os::unix::ffi::OsStringExt as _;
        match &self.address {
            UnixAddress::Path(path) => path.clone().into_os_string(),
            UnixAddress::Abstract(name) => {
                std::ffi::OsString::from_vec([b"@", name.as_slice()].concat())
            }
            UnixAddress::Unnamed => std::ffi::OsString::new(),
        }
    }
}

impl<H: NoticeHandler> ListenWith<H> for NoticeSocket {
    type Handle = UnixDatagramHandle;
    type Error = ListenError;

    fn listen_with(self, reactor: &mut Reactor, handler: H) -> Result<Self::Handle, ListenError> {
        let receiver = Receiver {
            handler,
            warned: Vec::new(),
        };
        ListenWith::<Receiver<H>>::listen_with(self.endpoint, reactor, receiver)
    }
}

/// The protocol of the socket.
struct Receiver<H> {
    handler: H,
    /// The reasons that were logged already. A service could fill the disk otherwise.
    warned: Vec<Dropped>,
}

impl<H: NoticeHandler> Receiver<H> {
    fn judge(&mut self, datagram: &Datagram<'_>) -> Result<(Credentials, Notice), Dropped> {
        let sender = datagram.credentials.ok_or(Dropped::NotAdmitted)?;
        if !self.handler.admits(&sender) {
            return Err(Dropped::NotAdmitted);
        }
        if datagram.lost_descriptors {
            return Err(Dropped::DescriptorsLost);
        }
        if datagram.is_truncated() {
            return Err(Dropped::TooLong);
        }
        let notice = Notice::parse(datagram.data).map_err(|_| Dropped::Malformed)?;
        if notice.as_str().is_empty() {
            return Err(Dropped::Malformed);
        }
        if notice.get("BARRIER").is_some() {
            let is_alone = notice.fields().count() == 1 && datagram.descriptors.len() == 1;
            if !is_alone || !notice.says_yes("BARRIER") {
                return Err(Dropped::Barrier);
            }
        }
        Ok((sender, notice))
    }

    #[cold]
    fn drop_notice(&mut self, reactor: &mut Reactor, datagram: &mut Datagram<'_>, why: Dropped) {
        // Counted by nobody, since they were not for us to be taken.
        datagram.descriptors.by_ref().for_each(close_received);
        let sender = datagram.credentials;
        if !self.warned.contains(&why) {
            self.warned.push(why);
            let process = sender.and_then(|sender| sender.pid).unwrap_or(0);
            log::warn!(
                target: log::HANDOFF,
                "a notice of process {process} was dropped: {why:?}; others are dropped without a word",
            );
        }
        self.handler.notice_dropped(reactor, sender.as_ref(), why);
    }
}

impl<H: NoticeHandler> DatagramProtocol<UnixDatagramPort> for Receiver<H>
where
    UnixDatagramPort: UnixDatagramTransport,
{
    fn datagram_received(
        &mut self,
        cx: &mut Context<'_, UnixDatagramPort>,
        datagram: &mut Datagram<'_>,
    ) {
        let (sender, notice) = match self.judge(datagram) {
            Ok(judged) => judged,
            Err(why) => return self.drop_notice(cx.reactor, datagram, why),
        };
        let descriptors: Vec<_> = datagram.descriptors.by_ref().collect();
        if notice.says_yes("BARRIER") {
            // All that was sent before has been dealt with: this is the answer.
            descriptors.into_iter().for_each(close_received);
            return;
        }
        let handler = &mut self.handler;
        handler.notice_received(cx.reactor, &sender, &notice, descriptors);
    }
}
