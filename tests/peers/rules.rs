//! The suite over the rules themselves: a framing of no protocol, that pairs by each, and
//! begins with lines.

use std::os::fd::AsFd as _;

use bowline::framing::{
    Decoded, FrameContext, FrameReceiver, Framed, Framer, FramingError, LineFramer, Pairing,
    Unclaimed,
};
use bowline::{AnyConnection as _, Reactor, Transports, UnixStream};

use crate::suite::{Heard, Limit, Message, Outcome, Question, Rule, Sample, Served, Trial, send};
use crate::support::{DescriptorLedger, settle, socketpair};

/// Frames of two bytes and a payload: how many descriptors, and how long. Behind lines.
enum Frames {
    Lines(LineFramer),
    Counted,
}

impl Framer for Frames {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FramingError> {
        let length = match (self, input) {
            (Self::Lines(framer), _) => return framer.decode(input),
            (Self::Counted, [_, length, ..]) => 2 + usize::from(*length),
            _ => 2,
        };
        let limit = 2 + LONGEST;
        if length > limit {
            let length = Some(length as u64);
            return Err(FramingError::TooLong { length, limit });
        }
        Ok(match length.checked_sub(input.len()) {
            Some(at_least @ 1..) => Decoded::NeedMore { at_least },
            _ => Decoded::Frame {
                payload: 2..length,
                consumed: length,
            },
        })
    }

    fn claims(&self, frame: &[u8]) -> Option<usize> {
        Some(match self {
            Self::Lines(_) => 0,
            Self::Counted => frame[0].into(),
        })
    }
}

const LONGEST: usize = 200;
const MOST: usize = 16;

struct Teller(Heard, Pairing);

impl FrameReceiver<UnixStream, Frames> for Teller {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, UnixStream, Frames>, frame: &[u8]) {
        if let Frames::Lines(_) = cx.framing.framer() {
            if frame == b"BEGIN" {
                *cx.framing.framer_mut() = Frames::Counted;
                cx.framing.set_pairing(self.1);
            }
            return;
        }
        let text = String::from_utf8_lossy(frame);
        self.0.message(text, cx.framing.descriptors());
    }
}

struct Of(Rule);

impl Of {
    fn pairing(&self) -> Pairing {
        match self.0 {
            Rule::Claimed => Pairing::Claimed(Unclaimed::Fail),
            Rule::ClaimedOrWaits => Pairing::Claimed(Unclaimed::Wait),
            Rule::Exact => Pairing::Exact,
            Rule::ByLastByte => Pairing::ByLastByte,
            Rule::Datagram | Rule::FirstRead => panic!("it is not of streams that go on"),
        }
    }
}

impl Sample for Of {
    fn rule(&self) -> Rule {
        self.0
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let teller = Teller(heard.clone(), self.pairing());
        let framed = Framed::new(Frames::Lines(LineFramer::new()), teller)
            .pairing(Pairing::Claimed(Unclaimed::Fail));
        Served::by(|socket| reactor.adopt_unix_stream(socket, framed).unwrap())
    }

    fn prelude(&self) -> Vec<Vec<u8>> {
        ["HELLO\r\n", "BEGIN\r\n"].map(Into::into).into()
    }

    fn messages(&self) -> Vec<Message> {
        [
            (0, "plain"),
            (1, "one"),
            (3, "three"),
            (0, "none"),
            (1, "last"),
        ]
        .map(|(count, text)| message(count, text))
        .into()
    }

    fn outcome(&self, trial: Trial) -> Outcome {
        match (self.0, trial) {
            (Rule::ByLastByte, Trial::Lumped) => Outcome::Dealt(vec![0, 0, 0, 0, 5]),
            (Rule::Exact, Trial::Lumped) => Outcome::Dealt(vec![5, 0, 0, 0, 0]),
            _ => self.0.outcome(trial),
        }
    }

    fn limits(&self) -> Vec<Limit> {
        vec![
            Limit {
                of: "descriptors",
                within: message(MOST, "many"),
                beyond: message(MOST + 1, "too many"),
            },
            Limit {
                of: "bytes",
                within: message(1, &"x".repeat(LONGEST)),
                beyond: message(1, &"x".repeat(LONGEST + 1)),
            },
        ]
    }

    fn unasked(&self) -> Vec<(Question, &'static str)> {
        match self.0 {
            Rule::Claimed => Vec::new(),
            // What comes with the last line is paired by what follows.
            _ => vec![(Question::Lines, "the lines are claimed")],
        }
    }
}

fn message(count: usize, text: &str) -> Message {
    let head = [count as u8, text.len() as u8];
    Message::new([&head, text.as_bytes()].concat(), count, text)
}

/// Raw bytes of a known number have claimed descriptors wait for the frame behind them.
#[test]
fn no_more_wait_behind_raw_bytes_than_behind_frames() {
    struct Raw(Heard);
    impl FrameReceiver<UnixStream, LineFramer> for Raw {
        fn connection_made(&mut self, cx: &mut FrameContext<'_, UnixStream, LineFramer>) {
            cx.framing.set_raw_mode_for(1_000);
        }

        fn frame_received(&mut self, _: &mut FrameContext<'_, UnixStream, LineFramer>, _: &[u8]) {
            panic!("it is raw");
        }

        fn framing_failed(
            &mut self,
            cx: &mut FrameContext<'_, UnixStream, LineFramer>,
            error: FramingError,
            _: &[u8],
        ) {
            self.0.message(error.to_string(), []);
            cx.transport.abort_connection();
        }
    }
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = socketpair();
        let heard = Heard::default();
        let framed = Framed::new(LineFramer::new(), Raw(heard.clone()))
            .pairing(Pairing::Claimed(Unclaimed::Wait))
            .max_waiting(3);
        let handle = reactor.adopt_unix_stream(ours.into(), framed).unwrap();
        for number in 1..=4 {
            assert!(reactor.get(handle).is_some(), "refused before {number}");
            send(&theirs, b"x", &[theirs.as_fd()]);
            settle(&mut reactor);
        }
        assert!(reactor.get(handle).is_none(), "4 wait, and 3 may");
        let said = heard.texts();
        assert_eq!(said, ["peer sent 4 descriptors that no frame claims"]);
    }
    ledger.assert_balanced();
}

suite!(claimed, Of(Rule::Claimed), lines);
suite!(claimed_or_waiting, Of(Rule::ClaimedOrWaits));
suite!(exact, Of(Rule::Exact));
suite!(by_last_byte, Of(Rule::ByLastByte));
