//! A small mail server that takes no mail, and its client: they agree in the clear
//! that they go on in private.
//!
//! ```text
//! cargo run --example starttls --features tls -- --listen 127.0.0.1:2525 --certificate CERT --key KEY
//! cargo run --example starttls --features tls -- --connect 127.0.0.1:2525 --name localhost --roots CERT
//! ```
//!
//! `CERT` and `KEY` are PEM files. Other clients do as well:
//!
//! ```text
//! openssl s_client -connect 127.0.0.1:2525 -starttls smtp -CAfile CERT
//! ```
//!
//! Commands that come behind `STARTTLS` in the clear are no commands: they break the
//! handshake, whoever has put them there.

#![allow(clippy::print_stdout)]

mod common;

use std::net::SocketAddr;
use std::path::PathBuf;

use bowline::endpoint::{Connect as _, Listen as _};
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::tls::rustls::RootCertStore;
use bowline::tls::rustls::pki_types::CertificateDer;
use bowline::tls::rustls::pki_types::pem::PemObject as _;
use bowline::tls::{StartTls, TlsClient, TlsServer, TlsTransport, client_config};
use bowline::{Address, CloseReason, Reactor, Tcp, Transports};

use crate::common::{Arguments, Inspect};

const HELP: &str = "
Greets mail clients, in private if they want to; or is such a client.

Usage: starttls --listen ADDRESS --certificate FILE --key FILE
       starttls --connect ADDRESS --name NAME --roots FILE

  --listen ADDRESS     where to serve, such as 127.0.0.1:2525
  --certificate FILE   the chain of certificates to show, PEM
  --key FILE           the key of the first of them, PEM
  --connect ADDRESS    which server to greet
  --name NAME          whose certificate it has to show
  --roots FILE         who has to have certified it, PEM
  --inspect PLACE      show what is inside: on a UNIX socket (a path),
                       or to browsers (an address)
";

/// The server's end of one connection.
struct Server {
    tls: TlsServer,
    is_secured: bool,
}

impl<T: TlsTransport> FrameReceiver<T, LineFramer> for Server {
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, LineFramer>) {
        cx.transport.write(b"220 bowline ready\r\n");
    }

    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        let command = line.to_ascii_uppercase();
        match command.split(|byte| *byte == b' ').next() {
            Some(b"EHLO") if self.is_secured => {
                cx.transport.write(b"250 bowline, in private\r\n");
            }
            Some(b"EHLO") => {
                cx.transport.write(b"250-bowline\r\n250 STARTTLS\r\n");
            }
            Some(b"STARTTLS") if !self.is_secured => {
                cx.transport.write(b"220 go on\r\n");
                let rest = cx.framing.take_rest();
                if let Err(error) = cx.transport.start_tls(&self.tls, &rest) {
                    println!("{error}");
                    cx.transport.abort_connection();
                }
            }
            Some(b"QUIT") => {
                cx.transport.write(b"221 bye\r\n");
                cx.transport.lose_connection();
            }
            _ => {
                cx.transport.write(b"502 no such thing here\r\n");
            }
        }
    }

    fn connection_secured(&mut self, _: &mut FrameContext<'_, T, LineFramer>) {
        self.is_secured = true;
    }
}

/// The client's end: what it says next, with each answer.
struct Client {
    tls: TlsClient,
    is_secured: bool,
    has_asked: bool,
}

impl<T: TlsTransport> FrameReceiver<T, LineFramer> for Client {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, line: &[u8]) {
        println!("{}", String::from_utf8_lossy(line));
        match line {
            // There is more of this answer.
            [_, _, _, b'-', ..] => {}
            [b'2', b'2', b'1', ..] => cx.transport.lose_connection(),
            [b'2', ..] if self.is_secured => {
                cx.transport.write(b"QUIT\r\n");
            }
            [b'2', b'2', b'0', ..] if self.has_asked => {
                let rest = cx.framing.take_rest();
                if let Err(error) = cx.transport.start_tls(&self.tls, &rest) {
                    println!("{error}");
                    cx.transport.abort_connection();
                }
            }
            [b'2', b'5', b'0', ..] => {
                self.has_asked = true;
                cx.transport.write(b"STARTTLS\r\n");
            }
            [b'2', ..] => {
                cx.transport.write(b"EHLO client\r\n");
            }
            _ => cx.transport.lose_connection(),
        }
    }

    fn connection_secured(&mut self, cx: &mut FrameContext<'_, T, LineFramer>) {
        self.is_secured = true;
        if let Some(version) = cx.transport.tls().and_then(|tls| tls.version()) {
            println!("in private, by {version:?}");
        }
        cx.transport.write(b"EHLO client\r\n");
    }

    fn connection_lost(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, reason: &CloseReason) {
        println!("{reason}");
        if let Err(error) = cx.reactor.stop() {
            println!("{error}");
        }
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let listen = arguments.option::<SocketAddr>("--listen")?;
    let connect = arguments.option::<SocketAddr>("--connect")?;
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    reactor.stop_on_signals()?;
    if let Some(address) = listen {
        let certificate: Option<PathBuf> = arguments.option("--certificate")?;
        let key: Option<PathBuf> = arguments.option("--key")?;
        arguments.finish()?;
        let files = certificate.zip(key);
        let (certificate, key) = files.ok_or("--certificate FILE and --key FILE, please")?;
        let tls = TlsServer::from_pem_files(certificate, key)?;
        let here = Tcp::at(address).layer(StartTls);
        let listener = reactor.listen(here, move |_: &Address| {
            let tls = tls.clone();
            let is_secured = false;
            Framed::new(LineFramer::new(), Server { tls, is_secured })
        })?;
        common::print_address(&mut reactor, listener);
    } else {
        let address = connect.ok_or("--listen or --connect ADDRESS, please; try --help")?;
        let name: Option<String> = arguments.option("--name")?;
        let roots: Option<PathBuf> = arguments.option("--roots")?;
        arguments.finish()?;
        let named = name.zip(roots);
        let (name, file) = named.ok_or("--name NAME and --roots FILE, please")?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(file)? {
            roots.add(certificate?)?;
        }
        let tls = TlsClient::new(client_config(roots), &name)?;
        reactor.connect(Tcp::to(address).layer(StartTls), move |_: &Address| {
            let client = Client {
                tls: tls.clone(),
                is_secured: false,
                has_asked: false,
            };
            Framed::new(LineFramer::new(), client)
        })?;
    }
    reactor.run()?;
    Ok(())
}
