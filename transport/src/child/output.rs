//! A child whose output is collected.

use std::fmt;

use bowline_protocol::{CloseReason, ProcessContext, ProcessProtocol, ProcessStatus};
use bowline_reactor::Reactor;

/// How much output is collected by default, of both streams together.
const LIMIT: usize = 16 << 20;

/// The output of a child that was run with [`CollectOutput`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessOutput {
    /// How the child ended.
    pub status: ProcessStatus,
    /// Everything that the child wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything that the child wrote to standard error.
    pub stderr: Vec<u8>,
    /// Whether the child wrote more than the [limit](CollectOutput::limit), and was
    /// killed for that.
    pub is_cut: bool,
}

/// A process protocol that collects the output of a child, and calls back with all of it
/// at the end. (Twisted: `getProcessOutput`, `getProcessValue`,
/// `getProcessOutputAndValue`.)
///
/// ```
/// use bowline::process::{ChildCommand, CollectOutput};
/// use bowline::{Reactor, Transports};
///
/// let mut reactor = Reactor::new()?;
/// let collect = CollectOutput::new(|reactor, output| {
///     assert!(output.status.is_success() && output.stderr.is_empty());
///     assert_eq!(output.stdout, b"3\n");
///     let _ = reactor.stop();
/// });
/// reactor.spawn_process(ChildCommand::program("wc").arg("-c"), collect.input("abc"))?;
/// reactor.run()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CollectOutput {
    input: Vec<u8>,
    limit: usize,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    is_cut: bool,
    then: Option<Then>,
}

type Then = Box<dyn FnOnce(&mut Reactor, ProcessOutput)>;

impl CollectOutput {
    /// Calls `then` once, after the child has exited and its output has ended.
    pub fn new(then: impl FnOnce(&mut Reactor, ProcessOutput) + 'static) -> Self {
        Self {
            input: Vec::new(),
            limit: LIMIT,
            stdout: Vec::new(),
            stderr: Vec::new(),
            is_cut: false,
            then: Some(Box::new(then)),
        }
    }

    /// Sets the whole standard input of the child. By default it is empty.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Sets how many bytes of output are collected at most, of both streams together.
    /// The default is 16 MiB. A child that writes more is killed.
    #[must_use]
    pub fn limit(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self
    }
}

impl ProcessProtocol for CollectOutput {
    fn connection_made(&mut self, cx: &mut ProcessContext<'_>) {
        if let Some(stdin) = cx.stream(0) {
            stdin.write_owned(std::mem::take(&mut self.input));
        }
        cx.close_stdin();
    }

    fn child_data_received(&mut self, cx: &mut ProcessContext<'_>, number: u32, data: &[u8]) {
        let left = self.limit - self.stdout.len() - self.stderr.len();
        let output = match number {
            1 => &mut self.stdout,
            2 => &mut self.stderr,
            _ => return,
        };
        output.extend_from_slice(&data[..data.len().min(left)]);
        if data.len() > left {
            self.is_cut = true;
            // It may have exited by now.
            let _ = cx.process.kill();
            cx.process.give_up_streams();
        }
    }

    fn child_connection_lost(&mut self, _: &mut ProcessContext<'_>, _: u32, _: &CloseReason) {}

    fn process_ended(&mut self, cx: &mut ProcessContext<'_>, status: ProcessStatus) {
        if let Some(then) = self.then.take() {
            let output = ProcessOutput {
                status,
                stdout: std::mem::take(&mut self.stdout),
                stderr: std::mem::take(&mut self.stderr),
                is_cut: self.is_cut,
            };
            then(cx.reactor, output);
        }
    }
}

impl fmt::Debug for CollectOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CollectOutput")
            .field("stdout", &self.stdout.len())
            .field("stderr", &self.stderr.len())
            .finish_non_exhaustive()
    }
}
