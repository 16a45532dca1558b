//! Asks the holder one thing.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use bowline::handoff::channel::Peer;
use bowline::handoff::channel::{Channel, ChannelError, ChannelReceiver, ChannelSettings, Role};
use bowline::handoff::wire::{self, Incoming};
use bowline::{Address, BuildContext, CloseReason, ConnectError, Context, Factory, Reactor};
use bowline::{Transports, UnixStream};

use crate::common;
use crate::holder::{Reply, Request};

/// What came of it.
#[derive(Debug)]
pub(crate) enum Answer {
    Done,
    Names(Vec<(String, u32)>),
    Descriptors(Vec<OwnedFd>),
}

type Outcome = Rc<RefCell<Option<common::Result<Answer>>>>;

/// Asks, and waits for the answer: for programs that need it before they begin.
pub(crate) fn ask(
    path: &Path,
    request: Request,
    descriptors: Vec<OwnedFd>,
) -> common::Result<Answer> {
    let mut reactor = Reactor::new()?;
    let outcome = Outcome::default();
    let asking = Asking {
        request: Some((request, descriptors)),
        outcome: Rc::clone(&outcome),
    };
    reactor.connect_unix(path, Once(Some(asking)))?;
    reactor.run()?;
    let outcome = outcome.borrow_mut().take();
    outcome.unwrap_or_else(|| Err("the holder did not answer".into()))
}

struct Once(Option<Asking>);

impl Factory for Once {
    type Protocol = Channel<Asking>;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Self::Protocol> {
        let settings = ChannelSettings::new(Role::CLIENT, Role::HOLDER);
        Some(Channel::new(settings, self.0.take()?))
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        if let Some(asking) = self.0.take() {
            asking.finish(cx.reactor, Err(format!("no holder: {error}").into()));
        }
    }
}

struct Asking {
    request: Option<(Request, Vec<OwnedFd>)>,
    outcome: Outcome,
}

impl Asking {
    fn finish(&self, reactor: &mut Reactor, answer: common::Result<Answer>) {
        self.outcome.borrow_mut().get_or_insert(answer);
        // It stops once.
        let _ = reactor.stop();
    }
}

impl ChannelReceiver<UnixStream> for Asking {
    type Message = Reply;

    fn channel_made(&mut self, cx: &mut Context<'_, UnixStream>, _: &Peer) {
        let Some((request, descriptors)) = self.request.take() else {
            return;
        };
        let descriptors = descriptors.into_iter().map(Into::into).collect();
        if let Err(error) = wire::send(cx.transport, &request, descriptors) {
            self.finish(cx.reactor, Err(error.into()));
        }
    }

    fn message_received(&mut self, cx: &mut Context<'_, UnixStream>, incoming: Incoming<Reply>) {
        let answer = match incoming.message {
            Reply::Done if incoming.descriptors.is_empty() => Ok(Answer::Done),
            Reply::Done => Ok(Answer::Descriptors(incoming.descriptors)),
            Reply::Names(names) => Ok(Answer::Names(names)),
            Reply::NotThere => Err("there is nothing of that name".into()),
            Reply::Taken => Err("there is something of that name".into()),
            Reply::Full => Err("the holder has no room".into()),
            Reply::Nonsense => Err("the holder does not keep that".into()),
        };
        self.finish(cx.reactor, answer);
    }

    fn channel_lost(
        &mut self,
        cx: &mut Context<'_, UnixStream>,
        error: Option<&ChannelError>,
        reason: &CloseReason,
    ) {
        let error = error.map_or_else(|| reason.to_string(), ToString::to_string);
        self.finish(cx.reactor, Err(error.into()));
    }
}
