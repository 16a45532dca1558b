//! The UNIX socket: a request is a line of JSON, and so is each line of an answer.

use std::time::Duration;

use bowline_protocol::framing::{FrameContext, FrameReceiver, Framed, FramingError, LineFramer};
use bowline_protocol::{
    Address, AtDrain, BuildContext, Context, Factory, Origin, Producer, ProducerKind, ProducerRef,
    Transport, TransportHandle,
};
use bowline_reactor::{Reactor, Token};
use bowline_transport::{Operation, Transports, effective_user};
use serde_json::{Value, json};

use crate::json;
use crate::log;
use crate::survey::Survey;
use crate::totals::Totals;

/// How many bytes a request may have.
const LONGEST: usize = 1_024;

/// How many unread bytes of answers make the next requests of a client wait.
const MOST_UNREAD: usize = 64 * 1_024;

/// How long the traffic of a connection is logged.
const LOGGED_FOR: Duration = Duration::from_secs(60);

type Cx<'a, T> = FrameContext<'a, T, LineFramer>;

/// The factory for the clients of the UNIX socket. See
/// [`Inspector::operators`](crate::Inspector::operators).
#[derive(Debug)]
pub struct Operators {
    user: u32,
}

impl Operators {
    pub(crate) fn new() -> Self {
        Self {
            user: effective_user(),
        }
    }
}

impl Factory for Operators {
    type Protocol = Framed<LineFramer, Operator>;

    fn build_protocol(&mut self, cx: &mut BuildContext<'_>, _: &Address) -> Option<Self::Protocol> {
        let Origin::Listener(listener) = &cx.origin else {
            return None;
        };
        match listener.peer_credentials() {
            Ok(peer) if peer.uid == self.user || peer.uid == 0 => {
                let lines = LineFramer::with_delimiter(b"\n").with_max_length(LONGEST);
                Some(Framed::new(lines, Operator))
            }
            Ok(peer) => {
                log::warn!(target: log::INSPECT, "user {} may not look inside: refused", peer.uid);
                None
            }
            Err(error) => {
                log::warn!(target: log::INSPECT, "who wants to look inside is not known: {error}");
                None
            }
        }
    }
}

/// The receiver of requests from one client of the UNIX socket.
#[derive(Debug)]
#[non_exhaustive]
pub struct Operator;

impl<T: Transport> FrameReceiver<T, LineFramer> for Operator {
    fn frame_received(&mut self, cx: &mut Cx<'_, T>, line: &[u8]) {
        let answer = match Request::parse(line) {
            Ok(Request::Summary) => Some(json::summary(cx.reactor)),
            Ok(Request::Turns) => Some(json::turns(cx.reactor)),
            Ok(Request::Descriptors) => return list(cx),
            Ok(Request::Operate(operation, token)) => {
                operate(cx.reactor, cx.transport.handle(), operation, token);
                None
            }
            Err(error) => Some(json!({"error": error})),
        };
        if let Some(answer) = answer {
            say(cx.transport.as_dyn(), &answer);
        }
        if cx.transport.unsent_bytes() > MOST_UNREAD {
            wait_for(cx, Rest);
        }
    }

    fn framing_failed(&mut self, cx: &mut Cx<'_, T>, error: FramingError, _: &[u8]) {
        say(cx.transport.as_dyn(), &json!({"error": error.to_string()}));
        cx.transport.lose_connection();
    }

    /// Being looked at does not delay the stop of the program.
    fn draining(&mut self, _: &mut Cx<'_, T>) -> AtDrain {
        AtDrain::DoNotWait
    }
}

fn say(transport: &mut dyn Transport, answer: &Value) {
    let mut line = answer.to_string();
    line.push('\n');
    transport.write(line.as_bytes());
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Request {
    Summary,
    Descriptors,
    Turns,
    Operate(Operation, Token),
}

impl Request {
    fn parse(line: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        let object = value.as_object().filter(|object| object.len() == 1);
        let Some((name, value)) = object.and_then(|object| object.iter().next()) else {
            return Err("a request is an object with one member".into());
        };
        let operation = match name.as_str() {
            "get" => {
                return match value.as_str() {
                    Some("summary") => Ok(Self::Summary),
                    Some("descriptors") => Ok(Self::Descriptors),
                    Some("turns") => Ok(Self::Turns),
                    _ => Err("get is summary, descriptors or turns".into()),
                };
            }
            "close" => Operation::Close,
            "abort" => Operation::Abort,
            "pause" => Operation::Pause,
            "resume" => Operation::Resume,
            "log" => Operation::LogTraffic,
            _ => return Err(format!("{name:?} is no request")),
        };
        let token = value.as_u64().ok_or("a token is a number")?;
        Ok(Self::Operate(operation, Token::from_bits(token)))
    }
}

fn operate(reactor: &mut Reactor, client: TransportHandle, operation: Operation, token: Token) {
    log::warn!(target: log::INSPECT, "an operator asks of {token}: {operation:?}");
    reactor.operate(token, operation, move |reactor, result| {
        let answer = match &result {
            Ok(()) => json!({"done": true}),
            Err(error) => json!({"error": error.to_string()}),
        };
        if result.is_ok() && operation == Operation::LogTraffic {
            reactor.call_later(LOGGED_FOR, move |reactor| {
                // It may be gone by then.
                reactor.operate(token, Operation::StopLogging, |_, _| {});
            });
        }
        if let Some(client) = reactor.get(client) {
            say(client, &answer);
        }
    });
}

/// Sends the list as fast as the client reads it, one portion in each turn. Requests that
/// arrive meanwhile wait.
fn list<T: Transport>(cx: &mut Cx<'_, T>) {
    let list = List {
        turn: None,
        totals: Totals::default(),
        survey: Survey::begin(cx.reactor),
        own: cx.transport.handle().token(),
    };
    wait_for(cx, list);
}

/// Makes requests wait until `producer` has finished. It is asked for more whenever the
/// client has read everything.
fn wait_for<T: Transport>(cx: &mut Cx<'_, T>, producer: impl Producer) {
    let registered = cx
        .transport
        .register_producer(ProducerRef::boxed(producer), ProducerKind::Pull);
    match registered {
        Ok(()) => cx.transport.pause_producing(),
        Err(error) => say(cx.transport.as_dyn(), &json!({"error": error.to_string()})),
    }
}

/// The answers that a client has not read yet.
struct Rest;

impl Producer for Rest {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        // A new producer is asked at once, whether all was sent or not.
        if cx.transport.unsent_bytes() == 0 {
            cx.transport.unregister_producer();
            cx.transport.resume_producing();
        }
    }
}

struct List {
    /// The turn of the last portion.
    turn: Option<u64>,
    survey: Survey,
    totals: Totals,
    own: Token,
}

impl Producer for List {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        // A producer that writes fast is asked several times a turn. Without an answer it
        // is asked again some milliseconds later.
        let turn = Some(cx.reactor.statistics().turns);
        if self.turn == turn {
            return;
        }
        self.turn = turn;
        let own = self.own.to_bits();
        let mut lines = String::new();
        let totals = &mut self.totals;
        let is_more = self.survey.take(cx.reactor, |description, descriptor| {
            if let Some(description) = description {
                totals.add(description);
            }
            let descriptor = descriptor();
            // The one that asks is out of its slot now, and of no interest.
            if descriptor["token"] != own {
                lines.push_str(&descriptor.to_string());
                lines.push('\n');
            }
        });
        if !is_more {
            totals.finish(&cx.reactor.parts());
            let end = json!({"end": {
                "descriptors": self.survey.told,
                "first_turn": self.survey.began,
                "last_turn": cx.reactor.statistics().turns,
                "listeners": totals.listeners(),
                "pools": totals.pools(),
            }});
            lines.push_str(&end.to_string());
            lines.push('\n');
        }
        cx.transport.write(lines.as_bytes());
        if !is_more {
            cx.transport.unregister_producer();
            cx.transport.resume_producing();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_request_is_answered_and_what_is_one_understood() {
        let parse = |line: &str| Request::parse(line.as_bytes());
        assert_eq!(parse(r#"{"get":"summary"}"#), Ok(Request::Summary));
        assert_eq!(
            parse(r#"{"close":18446744073709551615}"#),
            Ok(Request::Operate(
                Operation::Close,
                Token::from_bits(u64::MAX)
            ))
        );
        for line in [
            "",
            "[]",
            "{}",
            "7",
            r#"{"get":"all"}"#,
            r#"{"get":"summary","close":1}"#,
            r#"{"close":-1}"#,
            r#"{"close":"1"}"#,
            r#"{"exec":"sh"}"#,
            "{\"get\":\"summary\"",
            "\u{0}",
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }
}
