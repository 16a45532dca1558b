//! A program on a terminal of its own, for whoever connects to a UNIX socket.
//!
//! ```text
//! cargo run --example shell -- --socket /tmp/shell -- bash -i
//! python3 -c '
//! import socket, sys
//! s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
//! s.connect("/tmp/shell")
//! s.send(b"s 40 120"); s.send(b"dstty size; exit\n")
//! while (packet := s.recv(65536))[:1] == b"d": sys.stdout.write(packet[1:].decode())
//! print(packet.decode())'
//! ```
//!
//! The socket is one of packets, and only for who runs this (mode 0600). A packet says what
//! it is with its first byte: `d` and bytes, from the keyboard or for the screen; `s` and
//! two numbers, the rows and columns of the window; at the end `e` and how it ended. A
//! client that goes hangs up. Neither side is faster than the other reads.

#![allow(clippy::print_stdout)]

mod common;

use bowline::process::{
    ChildCommand, ProcessContext, ProcessHandle, ProcessProtocol, ProcessStatus, TerminalSize,
};
use bowline::{
    Address, CloseReason, Context, Packet, PacketHandle, PacketProtocol, PacketTransport, Producer,
    ProducerKind, ProducerRef, Reactor, Transport, TransportHandle, Transports, UnixSeqpacket,
};

use common::{Arguments, Inspect, STOP_DEADLINE};

const HELP: &str = "
Runs a program on a terminal for each client of a UNIX socket.

Usage: shell --socket PATH [-- PROGRAM [ARGUMENT...]]

  --socket PATH    where clients connect
  --inspect PLACE  show what is inside: on a UNIX socket (a path),
                   or to browsers (an address)
  --help           prints this

The default program is sh.
";

/// The number that standard input has.
const STDIN: u32 = 0;

/// One client, with its program.
struct Session {
    program: Vec<String>,
    process: Option<ProcessHandle>,
}

impl Session {
    fn start(&mut self, reactor: &mut Reactor, client: PacketHandle) -> Result<(), String> {
        let command = ChildCommand::program(&self.program[0]).args(&self.program[1..]);
        let command = command.terminal(TerminalSize::default());
        let started = reactor.spawn_process(command, Screen { client });
        self.process = Some(started.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Our end of the terminal, while it is open.
    fn terminal(&self, reactor: &mut Reactor) -> Option<TransportHandle> {
        reactor.get(self.process?)?.stream(STDIN)
    }
}

impl<T: PacketTransport> PacketProtocol<T> for Session {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let client = cx.transport.handle();
        if let Err(error) = self.start(cx.reactor, client) {
            cx.transport.send(format!("e{error}").as_bytes());
            cx.transport.lose_connection();
        }
    }

    fn packet_received(&mut self, cx: &mut Context<'_, T>, packet: &mut Packet<'_>) {
        let Some((kind, rest)) = packet.data.split_first() else {
            return;
        };
        match kind {
            b'd' => {
                let terminal = self.terminal(cx.reactor);
                if let Some(terminal) = terminal.and_then(|it| cx.reactor.get(it)) {
                    // The client is its producer, and pauses when this is too much.
                    terminal.write(rest);
                }
            }
            b's' => {
                let text = String::from_utf8_lossy(rest);
                let mut numbers = text.split_whitespace().map(str::parse);
                if let (Some(Ok(rows)), Some(Ok(columns))) = (numbers.next(), numbers.next())
                    && let Some(process) = self.process.and_then(|it| cx.reactor.get(it))
                {
                    let size = TerminalSize::default().rows(rows).columns(columns);
                    // It fails where the terminal is closed already, and that is told.
                    let _ = process.set_terminal_size(size);
                }
            }
            _ => cx.transport.abort_connection(),
        }
    }

    fn sending_resumed(&mut self, cx: &mut Context<'_, T>) {
        let terminal = self.terminal(cx.reactor);
        if let Some(terminal) = terminal.and_then(|it| cx.reactor.get(it)) {
            terminal.resume_producing();
        }
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        if let Some(process) = self.process.and_then(|it| cx.reactor.get(it)) {
            // A terminal that is closed hangs up, which few programs outlive.
            process.give_up_streams();
            process.terminate_within(STOP_DEADLINE);
        }
    }
}

/// Sends a client what its program shows.
struct Screen {
    client: PacketHandle,
}

impl ProcessProtocol for Screen {
    fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
        let keyboard = ProducerRef::boxed(Keyboard(self.client));
        if let Some(terminal) = cx.stream(STDIN) {
            let registered = terminal.register_producer(keyboard, ProducerKind::Push);
            registered.expect("it is the first");
        }
    }

    fn child_data_received(&mut self, cx: &mut ProcessContext<'_>, _: u32, data: &[u8]) {
        let Some(client) = cx.reactor.get(self.client) else {
            return;
        };
        client.send_sequence(&[b"d", data]);
        if client.is_send_buffer_full() {
            cx.pause_producing();
        }
    }

    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        if let Some(client) = cx.reactor.get(self.client) {
            client.send(format!("e{status}").as_bytes());
            client.lose_connection_within(STOP_DEADLINE);
        }
    }
}

/// What a client types, for a program that may not read.
struct Keyboard(PacketHandle);

impl Producer for Keyboard {
    fn pause_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        if let Some(client) = cx.reactor.get(self.0) {
            client.pause_producing();
        }
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        if let Some(client) = cx.reactor.get(self.0) {
            client.resume_producing();
        }
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let mut program = arguments.rest();
    let socket = arguments.option::<String>("--socket")?;
    arguments.finish()?;
    let socket = socket.ok_or("--socket PATH, please; try --help")?;
    if program.is_empty() {
        program.push("sh".into());
    }

    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let here = UnixSeqpacket::at(socket.as_str()).mode(0o600);
    let listener = reactor.listen(here, move |_: &Address| Session {
        program: program.clone(),
        process: None,
    })?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
