//! A list of what is registered, made in portions.

use std::time::{Duration, Instant};

use bowline_reactor::{Description, Reactor, Token};
use serde_json::Value;

use crate::json;

/// How many descriptors are described in one turn at the most. Each takes some
/// microseconds, unless user code takes longer.
pub(crate) const PORTION: usize = 256;
/// How long describing may take in one turn, unless a single descriptor takes longer.
const PORTION_TIME: Duration = Duration::from_millis(1);

/// A list that is being made. It has only descriptors that were registered when it began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Survey {
    /// The newest descriptor in the list.
    newest: u64,
    last: Option<Token>,
    pub(crate) told: u64,
    pub(crate) began: u64,
}

impl Survey {
    pub(crate) fn begin(reactor: &Reactor) -> Self {
        let newest = reactor.descriptors().map(|it| it.token().registration());
        Self {
            newest: newest.max().unwrap_or(0),
            last: None,
            told: 0,
            began: reactor.statistics().turns,
        }
    }

    /// Describes the next portion. Returns false when there is no more.
    pub(crate) fn take(
        &mut self,
        reactor: &Reactor,
        mut tell: impl FnMut(Option<&Description>, &dyn Fn() -> Value),
    ) -> bool {
        let turn = reactor.statistics().turns;
        let mut rest = match self.last {
            Some(last) => reactor.descriptors_after(last),
            None => reactor.descriptors(),
        };
        let began = Instant::now();
        for registered in rest.by_ref().take(PORTION) {
            let token = registered.token();
            self.last = Some(token);
            if token.registration() > self.newest {
                continue;
            }
            self.told += 1;
            let description = registered.describe();
            let description = description.as_ref();
            tell(description, &|| {
                json::descriptor(reactor, token, description, turn)
            });
            if began.elapsed() >= PORTION_TIME {
                break;
            }
        }
        rest.next().is_some()
    }
}
