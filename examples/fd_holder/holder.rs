//! The holder, and what it is asked.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bowline::Unix;
use bowline::UnixTransport;
use bowline::handoff::channel::{Channel, ChannelReceiver, ChannelSettings, Role};
use bowline::handoff::systemd::{DescriptorStore, Notice, NoticeHandler, NoticeSocket};
use bowline::handoff::wire::{self, Incoming, Message, PayloadReader, PayloadWriter, WireError};
use bowline::policies::LimitConnections;
use bowline::process::effective_user;
use bowline::{Address, Context, Credentials, PassedDescriptor, Reactor, Transports};

use crate::common::{self, Inspect};

/// How many clients at a time; others are turned away.
const CLIENTS: usize = 16;

/// What a client asks.
#[derive(Debug)]
pub(crate) enum Request {
    /// Keep the descriptors of this message.
    Store { name: String },
    /// Give them back: they are not kept any more.
    Retrieve { name: String },
    /// Close them.
    Remove { name: String },
    /// Say what there is.
    List,
}

/// What the holder answers.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Done; with the descriptors, if any were asked for.
    Done,
    Names(Vec<(String, u32)>),
    NotThere,
    /// There is something of that name, or it is kept under another; nothing was kept.
    Taken,
    /// So many it does not keep.
    Full,
    /// A name that is none, or nothing to keep.
    Nonsense,
}

impl Message for Request {
    fn kind(&self) -> u16 {
        match self {
            Self::Store { .. } => 0x0300,
            Self::Retrieve { .. } => 0x0301,
            Self::Remove { .. } => 0x0302,
            Self::List => 0x0303,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        match self {
            Self::Store { name } | Self::Retrieve { name } | Self::Remove { name } => {
                payload.string(name);
            }
            Self::List => {}
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        let mut name = || payload.string();
        Ok(match kind {
            0x0300 => Self::Store { name: name()? },
            0x0301 => Self::Retrieve { name: name()? },
            0x0302 => Self::Remove { name: name()? },
            0x0303 => Self::List,
            kind => return Err(WireError::UnknownKind { kind }),
        })
    }
}

impl Message for Reply {
    fn kind(&self) -> u16 {
        match self {
            Self::Done => 0x0310,
            Self::Names(_) => 0x0311,
            Self::NotThere => 0x0312,
            Self::Taken => 0x0313,
            Self::Full => 0x0314,
            Self::Nonsense => 0x0315,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        if let Self::Names(names) = self {
            payload.u32(names.len() as u32);
            for (name, count) in names {
                payload.string(name);
                payload.u32(*count);
            }
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            0x0310 => Self::Done,
            0x0311 => {
                let mut names = Vec::new();
                for _ in 0..payload.u32()? {
                    names.push((payload.string()?, payload.u32()?));
                }
                Self::Names(names)
            }
            0x0312 => Self::NotThere,
            0x0313 => Self::Taken,
            0x0314 => Self::Full,
            0x0315 => Self::Nonsense,
            kind => return Err(WireError::UnknownKind { kind }),
        })
    }
}

/// What is kept, by whichever way it came.
#[derive(Debug)]
struct Store {
    kept: DescriptorStore,
    limit: usize,
}

impl Store {
    fn answer(
        &mut self,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> (Reply, Vec<PassedDescriptor>) {
        let reply = match request {
            Request::Store { name } => self.store(&name, descriptors),
            Request::Retrieve { name } => {
                let kept = self.kept.take(&name);
                if !kept.is_empty() {
                    let kept = kept.into_iter().map(Into::into).collect();
                    return (Reply::Done, kept);
                }
                Reply::NotThere
            }
            Request::Remove { name } => match self.kept.remove(&name) {
                0 => Reply::NotThere,
                _ => Reply::Done,
            },
            Request::List => {
                let mut names = BTreeMap::<String, u32>::new();
                for name in self.kept.names() {
                    *names.entry(name.to_owned()).or_default() += 1;
                }
                Reply::Names(names.into_iter().collect())
            }
        };
        (reply, Vec::new())
    }

    /// All are kept, or none. Those that are not kept are closed.
    fn store(&mut self, name: &str, descriptors: Vec<OwnedFd>) -> Reply {
        let count = descriptors.len();
        let Ok(notice) = Notice::new().store(name) else {
            return Reply::Nonsense;
        };
        self.kept.remove_hung_up();
        if count == 0 {
            return Reply::Nonsense;
        } else if self.kept.names().any(|kept| kept == name) {
            return Reply::Taken;
        } else if self.kept.len() + count > self.limit {
            return Reply::Full;
        }
        match self.kept.apply(&notice, descriptors).duplicates {
            0 => Reply::Done,
            // It has another name.
            _ => Reply::Taken,
        }
    }
}

/// Hears programs that say what systemd would hear. Whoever is of the same user is heard.
struct Manager {
    store: Rc<RefCell<Store>>,
}

impl NoticeHandler for Manager {
    fn admits(&mut self, sender: &Credentials) -> bool {
        sender.uid == effective_user()
    }

    fn notice_received(
        &mut self,
        _: &mut Reactor,
        sender: &Credentials,
        notice: &Notice,
        descriptors: Vec<OwnedFd>,
    ) {
        let applied = self.store.borrow_mut().kept.apply(notice, descriptors);
        log::info!("{sender:?} says {:?}: {applied:?}", notice.as_str());
    }
}

/// The holder's end of one channel.
struct Keeper {
    store: Rc<RefCell<Store>>,
}

impl<T: UnixTransport> ChannelReceiver<T> for Keeper {
    type Message = Request;

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<Request>) {
        let Incoming {
            message,
            descriptors,
            ..
        } = incoming;
        log::info!("{message:?} with {} descriptors", descriptors.len());
        let (reply, descriptors) = self.store.borrow_mut().answer(message, descriptors);
        if let Err(error) = wire::send(cx.transport, &reply, descriptors) {
            // A shortcut: what was retrieved is closed with the error.
            log::warn!("the client is gone: {error}");
        }
    }
}

/// How often it looks whether what it keeps is of use to anybody.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(crate) fn run(
    path: &Path,
    notices: Option<PathBuf>,
    limit: usize,
    inspect: Option<&Inspect>,
) -> common::Result {
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect, &mut reactor)?;
    let store = Rc::new(RefCell::new(Store {
        kept: DescriptorStore::new(limit),
        limit,
    }));
    if let Some(notices) = notices {
        let here = NoticeSocket::at(notices).mode(0o600);
        let store = Rc::clone(&store);
        reactor.listen(here, Manager { store })?;
    }
    let kept = Rc::clone(&store);
    reactor.call_every(LOOK_EVERY, move |_, _| {
        let closed = kept.borrow_mut().kept.remove_hung_up();
        if closed > 0 {
            log::info!("the other ends of {closed} are gone");
        }
    });
    let channels = move |_: &Address| {
        // By default for the same user alone.
        let settings = ChannelSettings::new(Role::HOLDER, Role::CLIENT);
        let store = Rc::clone(&store);
        Channel::new(settings, Keeper { store })
    };
    let channels = LimitConnections::new(channels).total(Some(CLIENTS));
    let listener = reactor.listen(Unix::at(path).mode(0o600), channels)?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
