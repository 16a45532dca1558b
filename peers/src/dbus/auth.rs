//! The lines before the messages, on both sides; pure.
//!
//! The mechanism is EXTERNAL: the kernel says who the other side is, and the line only says
//! who it wants to be. This follows the section "Authentication Protocol" of the
//! specification, and libdbus.

/// A client is disconnected after this many refusals, as in libdbus.
const MOST_REFUSALS: u8 = 6;

/// What to do after a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Send these lines.
    Say(String),
    /// Send these lines. Then messages follow, with descriptors or without.
    Begin { say: String, descriptors: bool },
    /// Fail: the connection cannot go on.
    Fail(&'static str),
}

impl Step {
    fn say(line: &str) -> Self {
        Self::Say(format!("{line}\r\n"))
    }
}

/// The authentication of the side that was connected to.
#[derive(Debug)]
pub(super) struct ServiceAuth {
    state: WaitsFor,
    guid: String,
    takes_descriptors: bool,
    agreed: bool,
    refusals: u8,
    /// The zero byte before the first line has arrived.
    has_begun: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitsFor {
    Auth,
    Data,
    Begin,
}

impl ServiceAuth {
    pub(super) fn new(guid: String, takes_descriptors: bool) -> Self {
        Self {
            state: WaitsFor::Auth,
            guid,
            takes_descriptors,
            agreed: false,
            refusals: 0,
            has_begun: false,
        }
    }

    /// Handles a line. `admits` says whether the peer may be this user; `None` is the user
    /// that it is.
    pub(super) fn line(&mut self, line: &[u8], admits: impl FnOnce(Option<u32>) -> bool) -> Step {
        let Ok(mut line) = str::from_utf8(line) else {
            return Step::Fail("a line that is no text");
        };
        if !std::mem::replace(&mut self.has_begun, true) {
            match line.strip_prefix('\0') {
                Some(first) => line = first,
                None => return Step::Fail("no zero before the first line"),
            }
        }
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (self.state, command, rest) {
            (WaitsFor::Auth, "AUTH", "EXTERNAL") => {
                self.state = WaitsFor::Data;
                Step::say("DATA")
            }
            (WaitsFor::Auth, "AUTH", _) => match rest.strip_prefix("EXTERNAL ") {
                Some(response) => self.judge(response, admits),
                None => self.refuse(),
            },
            (WaitsFor::Data, "DATA", response) => self.judge(response, admits),
            (WaitsFor::Begin, "NEGOTIATE_UNIX_FD", _) if self.takes_descriptors => {
                self.agreed = true;
                Step::say("AGREE_UNIX_FD")
            }
            (WaitsFor::Begin, "NEGOTIATE_UNIX_FD", _) => {
                Step::say("ERROR \"Descriptors are not taken here\"")
            }
            (WaitsFor::Begin, "BEGIN", _) => Step::Begin {
                say: String::new(),
                descriptors: self.agreed,
            },
            (_, "BEGIN", _) => Step::Fail("a beginning without authentication"),
            (WaitsFor::Data | WaitsFor::Begin, "CANCEL", _) | (_, "ERROR", _) => self.refuse(),
            _ => Step::say("ERROR \"Unknown command\""),
        }
    }

    fn judge(&mut self, response: &str, admits: impl FnOnce(Option<u32>) -> bool) -> Step {
        let user = match response {
            "" => Some(None),
            hex => user_of(hex).map(Some),
        };
        if !user.is_some_and(admits) {
            return self.refuse();
        }
        self.state = WaitsFor::Begin;
        Step::Say(format!("OK {}\r\n", self.guid))
    }

    fn refuse(&mut self) -> Step {
        (self.state, self.agreed) = (WaitsFor::Auth, false);
        self.refusals += 1;
        match self.refusals {
            MOST_REFUSALS.. => Step::Fail("too many authentications that failed"),
            _ => Step::say("REJECTED EXTERNAL"),
        }
    }
}

/// Parses the decimal number of which `hex` is the hexadecimal text.
fn user_of(hex: &str) -> Option<u32> {
    if !hex.len().is_multiple_of(2) || hex.len() > 20 {
        return None;
    }
    let digits: Option<String> = hex
        .as_bytes()
        .chunks(2)
        .map(|pair| {
            let pair = str::from_utf8(pair).ok()?;
            let code = u8::from_str_radix(pair, 16).ok()?;
            code.is_ascii_digit().then_some(char::from(code))
        })
        .collect();
    digits?.parse().ok()
}

/// The authentication of the side that connects.
#[derive(Debug)]
pub(super) struct ClientAuth {
    wants_descriptors: bool,
    has_asked: bool,
    /// The GUID of the service, once it has said it.
    pub(super) guid: String,
}

impl ClientAuth {
    pub(super) fn new(wants_descriptors: bool) -> Self {
        Self {
            wants_descriptors,
            has_asked: false,
            guid: String::new(),
        }
    }

    /// Returns what is sent first: the zero byte with which credentials are sent on other
    /// systems, and who we are.
    ///
    /// Lines are sent one at a time: proxies such as xdg-dbus-proxy do not accept more.
    pub(super) fn first(user: u32) -> String {
        use std::fmt::Write as _;
        let mut line = String::from("\0AUTH EXTERNAL ");
        for digit in user.to_string().bytes() {
            // Writing to a string does not fail.
            let _ = write!(line, "{digit:02x}");
        }
        line + "\r\n"
    }

    pub(super) fn line(&mut self, line: &[u8]) -> Step {
        let Ok(line) = str::from_utf8(line) else {
            return Step::Fail("a line that is no text");
        };
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "OK" if !self.has_asked && self.guid.is_empty() => {
                rest.clone_into(&mut self.guid);
                if !self.wants_descriptors {
                    return begin(false);
                }
                self.has_asked = true;
                Step::say("NEGOTIATE_UNIX_FD")
            }
            "AGREE_UNIX_FD" if self.has_asked => begin(true),
            "ERROR" if self.has_asked => begin(false),
            "REJECTED" => Step::Fail("the service refuses the user of this process"),
            _ => Step::Fail("a line that is no answer"),
        }
    }
}

fn begin(descriptors: bool) -> Step {
    let say = "BEGIN\r\n".into();
    Step::Begin { say, descriptors }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(lines: &[&str], takes_descriptors: bool) -> Vec<Step> {
        let mut auth = ServiceAuth::new("abc".into(), takes_descriptors);
        let admits = |user| matches!(user, None | Some(17));
        let lines = lines.iter().enumerate().map(|(number, line)| {
            let zero = if number == 0 { "\0" } else { "" };
            auth.line(format!("{zero}{line}").as_bytes(), admits)
        });
        lines.collect()
    }

    fn admits_all(_: Option<u32>) -> bool {
        true
    }

    fn say(line: &str) -> Step {
        Step::Say(format!("{line}\r\n"))
    }

    #[test]
    fn service_says_what_the_reference_says() {
        let begun = |descriptors| Step::Begin {
            say: String::new(),
            descriptors,
        };
        let lines = ["AUTH EXTERNAL 3137", "NEGOTIATE_UNIX_FD", "BEGIN"];
        let said = service(&lines, true);
        assert_eq!(said, [say("OK abc"), say("AGREE_UNIX_FD"), begun(true)]);
        let said = service(&lines, false);
        let no = say("ERROR \"Descriptors are not taken here\"");
        assert_eq!(said, [say("OK abc"), no, begun(false)]);
        let said = service(&["AUTH", "AUTH EXTERNAL", "DATA", "BEGIN"], true);
        let rejected = say("REJECTED EXTERNAL");
        assert_eq!(
            said,
            [rejected.clone(), say("DATA"), say("OK abc"), begun(false)]
        );
        let said = service(&["AUTH ANONYMOUS", "NONSENSE", "BEGIN"], true);
        let unknown = say("ERROR \"Unknown command\"");
        let early = Step::Fail("a beginning without authentication");
        assert_eq!(said, [rejected.clone(), unknown, early.clone()]);
        // Another user than the kernel says, and what is none.
        for user in ["3138", "31", "313", "3g", "2d31", "39393939393939393939"] {
            let said = service(&[&format!("AUTH EXTERNAL {user}"), "BEGIN"], true);
            assert_eq!(said, [rejected.clone(), early.clone()], "{user}");
        }
        let said = service(&["AUTH EXTERNAL 3137", "CANCEL", "NEGOTIATE_UNIX_FD"], true);
        assert_eq!(said[1], rejected);
        assert_eq!(said[2], say("ERROR \"Unknown command\""));
        let said = service(&["AUTH"; 6], true);
        assert_eq!(said[5], Step::Fail("too many authentications that failed"));
        assert_eq!(said[4], rejected);
        let mut auth = ServiceAuth::new("abc".into(), true);
        let without_zero = auth.line(b"AUTH EXTERNAL 3137", admits_all);
        assert_eq!(without_zero, Step::Fail("no zero before the first line"));
    }

    #[test]
    fn client_begins_with_what_was_agreed_on() {
        assert_eq!(ClientAuth::first(1000), "\0AUTH EXTERNAL 31303030\r\n");
        let run = |wants, lines: &[&str]| {
            let mut auth = ClientAuth::new(wants);
            let steps = lines.iter().map(|line| auth.line(line.as_bytes()));
            steps.collect::<Vec<_>>()
        };
        let ask = say("NEGOTIATE_UNIX_FD");
        assert_eq!(
            run(true, &["OK 1", "AGREE_UNIX_FD"]),
            [ask.clone(), begin(true)]
        );
        assert_eq!(run(true, &["OK 1", "ERROR no"]), [ask, begin(false)]);
        assert_eq!(run(false, &["OK 1"]), [begin(false)]);
        for lines in [
            &["REJECTED EXTERNAL"][..],
            &["AGREE_UNIX_FD"],
            &["OK 1", "OK 1"],
        ] {
            assert!(
                matches!(run(true, lines).last(), Some(Step::Fail(_))),
                "{lines:?}"
            );
        }
    }
}
