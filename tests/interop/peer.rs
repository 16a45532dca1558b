//! The peers: where they are, and one of them as a child process.

use std::cell::RefCell;
use std::env;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::rc::Rc;

use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::{CloseReason, Reactor, Transport, Transports, UnixTransportHandle};

/// What a scenario needs installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    Python,
    Twisted,
    Nothing,
}

/// The peers of this machine.
pub(crate) struct Peers {
    /// The interpreter that has Twisted.
    twisted: Option<Interpreter>,
    /// Any interpreter.
    python: Option<Interpreter>,
}

#[derive(Clone)]
struct Interpreter {
    path: PathBuf,
    /// As it says itself.
    versions: String,
}

/// Names the variable with an interpreter to use in place of the one that
/// `tests/interop/setup` installs.
const INTERPRETER: &str = "BOWLINE_INTEROP_PYTHON";

impl Peers {
    pub(crate) fn find() -> Self {
        let installed = env::var_os(INTERPRETER).map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/interop-venv/bin/python"),
            PathBuf::from,
        );
        let twisted = Interpreter::find(
            installed,
            "import platform, twisted\n\
             print('Python', platform.python_version(), 'with Twisted', twisted.__version__)",
        );
        let python = twisted.clone().or_else(|| {
            Interpreter::find(
                "python3".into(),
                "import platform, socket; socket.send_fds\n\
                 print('Python', platform.python_version(), 'without Twisted')",
            )
        });
        Self { twisted, python }
    }

    /// The interpreter for a scenario with these needs.
    fn interpreter(&self, needs: Needs) -> Option<&Path> {
        match needs {
            Needs::Python => self.python.as_ref(),
            Needs::Twisted => self.twisted.as_ref(),
            Needs::Nothing => None,
        }
        .map(|interpreter| interpreter.path.as_path())
    }

    pub(crate) fn have(&self, needs: Needs) -> bool {
        needs == Needs::Nothing || self.interpreter(needs).is_some()
    }

    /// Whether a missing peer is a failure.
    pub(crate) fn are_required(&self) -> bool {
        let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
        is("CI", "true") || is("BOWLINE_INTEROP", "require")
    }

    pub(crate) fn how_to_install(&self) -> String {
        "its peer is missing; tests/interop/setup installs it".into()
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            self.python
                .as_ref()
                .map_or("none", |python| &python.versions),
        )
    }
}

impl Interpreter {
    /// An interpreter that can run this code, which prints versions.
    fn find(path: PathBuf, code: &str) -> Option<Self> {
        let mut command = Command::new(&path);
        let output = command.args(["-c", code]).output().ok()?;
        output.status.success().then(|| Self {
            path,
            versions: String::from_utf8_lossy(&output.stdout).trim().into(),
        })
    }
}

/// A peer that runs. Dropping it kills it.
pub(crate) struct Peer {
    child: Child,
    control: UnixTransportHandle,
    events: Rc<RefCell<Vec<String>>>,
}

/// The event that we add when the peer's control socket has closed.
pub(crate) const GONE: &str = "gone";

impl Peer {
    /// Starts one of the scripts in `peers/`. Its descriptor 0 is a socket on
    /// which it takes commands and tells events, a line each.
    pub(crate) fn start(
        reactor: &mut Reactor,
        peers: &Peers,
        needs: Needs,
        script: &str,
        arguments: &[&str],
    ) -> Self {
        let (ours, theirs) = StdUnixStream::pair().expect("socketpair");
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/peers");
        let child = Command::new(peers.interpreter(needs).expect("looked for before"))
            // No byte code next to the scripts.
            .arg("-B")
            .arg(scripts.join(script))
            .args(arguments)
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .expect("the interpreter has run before");
        let events = Rc::new(RefCell::new(Vec::new()));
        let console = Console {
            events: Rc::clone(&events),
        };
        let framer = LineFramer::with_delimiter(b"\n".as_slice()).with_max_length(65_536);
        let control = reactor
            .adopt_unix_stream(ours.into(), Framed::new(framer, console))
            .expect("a connected socket");
        Self {
            child,
            control,
            events,
        }
    }

    /// Gives commands: they are carried out in one turn of the peer's loop.
    pub(crate) fn tell(&self, reactor: &mut Reactor, commands: &str) {
        let control = reactor.get(self.control).expect("the peer runs");
        control.write(commands.as_bytes());
        control.write(b"\n");
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }

    /// What it told so far.
    pub(crate) fn events(&self) -> Vec<String> {
        self.events.borrow().clone()
    }

    /// How often it told this.
    pub(crate) fn count(&self, event: &str) -> usize {
        let events = self.events.borrow();
        events.iter().filter(|told| *told == event).count()
    }

    /// What follows `word` in the events that begin with it, in order.
    pub(crate) fn told(&self, word: &str) -> Vec<String> {
        let events = self.events.borrow();
        let told = events.iter().filter_map(|event| {
            let (first, rest) = event.split_once(' ').unwrap_or((event, ""));
            (first == word).then(|| rest.to_owned())
        });
        told.collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Console {
    events: Rc<RefCell<Vec<String>>>,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Console {
    fn frame_received(&mut self, _: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let line = String::from_utf8_lossy(line).into_owned();
        self.events.borrow_mut().push(line);
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, LineFramer>, _: &CloseReason) {
        self.events.borrow_mut().push(GONE.into());
    }
}
