//! A varlink service that opens files for others, below one folder; and a client of it.
//!
//! ```text
//! cargo run --example varlink_files -- --socket /tmp/files --serve /usr/share/doc
//! cargo run --example varlink_files -- --socket /tmp/files --read bash/README
//! ```
//!
//! The service answers `Open` with an open file, so that a client which may not go there
//! itself, in a sandbox for instance, can read it. The kernel keeps a name inside of the
//! folder (openat2(2), `RESOLVE_BENEATH`): `..` and links that lead out are refused. Like
//! any service, it says what it is, so that `varlinkctl introspect` can show it. A varlink
//! socket has no permissions of its own: here it is only for the same user.

#![allow(clippy::print_stdout)]

mod common;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::rc::Rc;

use bowline::{Address, CloseReason, Once, Reactor, Transports, Unix, UnixTransport};
use bowline_peers::varlink::serde_json::{Value, json, value::to_raw_value};
use bowline_peers::varlink::{
    VarlinkAnswer, VarlinkCall, VarlinkContext, VarlinkHandler, VarlinkRole, VarlinkSettings,
    connection,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use common::{Arguments, Inspect};

const HELP: &str = "
Opens files for others, by varlink, and reads what was opened.

Usage: varlink_files --socket PATH --serve FOLDER
       varlink_files --socket PATH --read NAME

  --socket PATH    where the service is
  --serve FOLDER   serve the files below it
  --read NAME      have one opened, and write it to standard output
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this
";

const INTERFACE: &str = "com.example.files";
const DESCRIPTION: &str = "\
# Opens files for others
interface com.example.files

# The file is the descriptor of this index, open for reading
method Open(name: string) -> (fileDescriptor: int)

error NotFound (name: string)
error NotAllowed (name: string)
";

struct Service {
    folder: Rc<OwnedFd>,
}

impl Service {
    /// A regular file below the folder.
    fn open(&self, name: &str) -> Result<File, Errno> {
        // A pipe without a writer would have us wait.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = openat2(&*self.folder, name, flags, Mode::empty(), inside)?;
        let file = File::from(file);
        match file.metadata() {
            Ok(status) if status.is_file() => Ok(file),
            _ => Err(Errno::ACCESS),
        }
    }

    fn answer<T: UnixTransport>(
        &self,
        cx: &mut VarlinkContext<'_, '_, T, Self>,
        call: &VarlinkCall<'_>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let arguments: Value = call.arguments().unwrap_or_default();
        let text = |name: &str| arguments[name].as_str();
        match (call.method, text("name"), text("interface")) {
            ("com.example.files.Open", Some(name), _) => match self.open(name) {
                Ok(file) => cx.reply(&json!({"fileDescriptor": 0}), vec![file.into()])?,
                Err(error) => {
                    let error = match error {
                        Errno::NOENT | Errno::NOTDIR => "com.example.files.NotFound",
                        _ => "com.example.files.NotAllowed",
                    };
                    cx.reply_error(error, &json!({"name": name}))?;
                }
            },
            ("com.example.files.Open", None, _) => {
                let error = "org.varlink.service.InvalidParameter";
                cx.reply_error(error, &json!({"parameter": "name"}))?;
            }
            ("org.varlink.service.GetInfo", ..) => {
                let interfaces = ["org.varlink.service", INTERFACE];
                let info = json!({
                    "vendor": "example.com", "product": "files", "version": "1",
                    "url": "https://example.com", "interfaces": interfaces,
                });
                cx.reply(&info, Vec::new())?;
            }
            ("org.varlink.service.GetInterfaceDescription", _, Some(INTERFACE)) => {
                cx.reply(&json!({"description": DESCRIPTION}), Vec::new())?;
            }
            ("org.varlink.service.GetInterfaceDescription", ..) => {
                let name = text("interface").unwrap_or_default();
                let error = "org.varlink.service.InterfaceNotFound";
                cx.reply_error(error, &json!({"interface": name}))?;
            }
            (method, ..) => {
                let error = "org.varlink.service.MethodNotFound";
                cx.reply_error(error, &json!({"method": method}))?;
            }
        }
        Ok(())
    }
}

impl<T: UnixTransport> VarlinkHandler<T> for Service {
    fn call_received(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>, call: &VarlinkCall<'_>) {
        // A oneway call wants no answer, and nothing here can be had without one.
        if call.oneway {
            return;
        }
        if let Err(error) = self.answer(cx, call) {
            log::warn!("not answered: {error}");
        }
    }
}

/// Has a file opened, and writes it to standard output.
struct Client {
    name: String,
}

impl<T: UnixTransport> VarlinkHandler<T> for Client {
    fn ready(&mut self, cx: &mut VarlinkContext<'_, '_, T, Self>) {
        let name = to_raw_value(&json!({"name": self.name})).expect("it is text");
        let call = VarlinkCall::new("com.example.files.Open").parameters(&name);
        let asked = cx.call(&call, Vec::new(), |_, cx, answer| {
            let shown = match answer {
                VarlinkAnswer::Reply(reply) => match reply.error {
                    None => {
                        let results: Value = reply.results().unwrap_or_default();
                        let index = results["fileDescriptor"].as_u64().unwrap_or(0);
                        show(cx.descriptors().nth(index as usize))
                    }
                    Some(error) => Err(io::Error::other(error.to_owned())),
                },
                other => Err(io::Error::other(format!("{other:?}"))),
            };
            match shown {
                Ok(()) => cx.transport().lose_connection(),
                Err(error) => cx.reactor().fail(error),
            }
        });
        if let Err(error) = asked {
            cx.reactor().fail(io::Error::other(error.to_string()));
        }
    }

    fn connection_lost(&mut self, reactor: &mut Reactor, _: &CloseReason) {
        // It may be stopping already.
        let _ = reactor.stop();
    }
}

fn show(file: Option<OwnedFd>) -> io::Result<()> {
    let file = file.ok_or_else(|| io::Error::other("no file came with the answer"))?;
    let mut out = io::stdout().lock();
    io::copy(&mut File::from(file), &mut out)?;
    out.flush()
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let socket: Option<String> = arguments.option("--socket")?;
    let socket = socket.ok_or("--socket PATH, please; try --help")?;
    let folder: Option<String> = arguments.option("--serve")?;
    let name: Option<String> = arguments.option("--read")?;
    let inspect = Inspect::take(&mut arguments)?;
    arguments.finish()?;

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let settings = || VarlinkSettings::default().max_descriptors(1);
    match (folder, name) {
        (Some(folder), None) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let folder = File::options()
                .read(true)
                .custom_flags(flags.bits().cast_signed())
                .open(folder)?;
            let folder = Rc::new(OwnedFd::from(folder));
            let here = Unix::at(socket.as_str()).mode(0o600);
            reactor.listen(here, move |_: &Address| {
                let folder = Rc::clone(&folder);
                connection(VarlinkRole::Service, settings(), Service { folder })
            })?;
            reactor.stop_on_signals()?;
        }
        (None, Some(name)) => {
            let client = connection(VarlinkRole::Client, settings(), Client { name });
            let once = Once::new(client).on_failure(|cx, _, error| {
                let error = format!("no service: {error}");
                cx.reactor.fail(io::Error::other(error));
            });
            reactor.connect_unix(socket.as_str(), once)?;
        }
        _ => return Err("--serve FOLDER or --read NAME, please; try --help".into()),
    }
    reactor.run()?;
    Ok(())
}
