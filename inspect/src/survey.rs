//! A list of what is registered, taken in portions.

use std::time::{Duration, Instant};

use bowline_reactor::{Description, Reactor, Token};
use serde_json::Value;

use crate::json;

/// How many descriptors one turn describes at the most. Each takes some microseconds,
/// unless user code takes longer.
pub(crate) const PORTION: usize = 256;
/// How long one turn does so at the most, if that is not the first of them alone.
const PORTION_TIME: Duration = Duration::from_millis(1);

/// A list that is being taken. What was registered when it began belongs to it, and
/// nothing else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Survey {
    /// The newest that belongs to it.
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

    /// Tells the next portion. False once there is none.
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
