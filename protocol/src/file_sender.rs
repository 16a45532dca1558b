//! Sending a file.

use std::error::Error;
use std::fmt;
use std::io::{self, Read};

use crate::context::Context;
use crate::error::RegisterProducerError;
use crate::producer::{Producer, ProducerKind, ProducerRef};
use crate::transport::{Transport, TransportState};

/// What one turn reads and sends at the most, in bytes; Twisted's. Enough for a
/// write that goes to the kernel without being copied into our buffer.
const CHUNK_SIZE: usize = 16_384;

/// More than this is asked for to have no limit, and is not made room for: no
/// read or write of more is any faster.
const LARGEST_CHUNK: usize = 16 << 20;

/// Sends a file, or anything else that is [`Read`], to its end. (Twisted:
/// `basic.FileSender`.)
///
/// It is a pull producer: a portion is read when everything before it has left. So a
/// slow peer costs one portion of memory, however long the file is. The rest of the
/// loop has its turn between two portions.
///
/// Reading happens in the reactor's thread. For regular files that is right, since the
/// system reads ahead. If the disk is slow to answer, the loop waits for as long as one
/// portion takes. A pipe or socket that answers `WouldBlock` is asked again after some
/// milliseconds.
///
/// # Examples
///
/// Answers with a file, and closes:
///
/// ```
/// use std::fs::File;
/// use bowline::{Context, FileSender, Protocol, Transport};
///
/// struct Server;
///
/// impl<T: Transport> Protocol<T> for Server {
///     fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
///         let Ok(file) = File::open("/etc/hostname") else {
///             cx.transport.lose_connection();
///             return;
///         };
///         let sending = FileSender::new(file).send(cx.transport, |cx, result| {
///             if let Err(error) = result {
///                 eprintln!("{error} after {} bytes", error.sent.bytes);
///             }
///             cx.transport.lose_connection();
///         });
///         if sending.is_err() {
///             // The last one is under way.
///             cx.transport.lose_connection();
///         }
///     }
/// }
/// ```
pub struct FileSender<R> {
    source: R,
    chunk_size: usize,
    transform: Option<Transform>,
}

type Transform = Box<dyn FnMut(&mut Vec<u8>)>;
type FileDone = Box<dyn FnOnce(&mut Context<'_, dyn Transport>, Result<FileSent, FileSendError>)>;

/// How much a [`FileSender`] has sent, counted after the transformation if there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileSent {
    /// How many bytes.
    pub bytes: u64,
    /// The last byte; `None` if nothing was sent. Some protocols need it to know what to
    /// send next, such as SMTP for a body that does not end in a newline. Twisted has it
    /// too.
    pub last_byte: Option<u8>,
}

/// Why a file was not sent to its end.
#[derive(Debug)]
#[non_exhaustive]
pub struct FileSendError {
    /// Why.
    pub kind: FileSendErrorKind,
    /// How much had been given to the transport. Some of it may never have left.
    pub sent: FileSent,
}

/// Why a file was not sent to its end.
#[derive(Debug)]
#[non_exhaustive]
pub enum FileSendErrorKind {
    /// It could not be read. The connection is as it was.
    Read(io::Error),
    /// The connection ended, or nothing more can be sent over it.
    ConnectionLost,
    /// A portion was more than the transport's
    /// [limit](crate::Watermarks::limit) of unsent bytes.
    Refused,
}

impl<R: Read + 'static> FileSender<R> {
    /// Sends `source` from its present position. To send a part of it, see
    /// [`Read::take`].
    pub fn new(source: R) -> Self {
        Self {
            source,
            chunk_size: CHUNK_SIZE,
            transform: None,
        }
    }

    /// Sets how many bytes are read at once at the most; default 16,384. The buffer is
    /// that large. Zero counts as one, and more than 16 MiB counts as 16 MiB.
    #[must_use]
    pub fn chunk_size(mut self, bytes: usize) -> Self {
        self.chunk_size = bytes;
        self
    }

    /// Transforms every portion, in place, before it is sent.
    #[must_use]
    pub fn transform(mut self, transform: impl FnMut(&mut Vec<u8>) + 'static) -> Self {
        self.transform = Some(Box::new(transform));
        self
    }

    /// Begins. It is registered as the transport's producer until the end.
    ///
    /// `done` is called when the last byte was handed to the kernel, or when something
    /// failed. It may register the next producer. It is called exactly once, unless
    /// somebody [unregisters](Transport::unregister_producer) the producer or
    /// `transform` panics.
    ///
    /// # Errors
    ///
    /// [`AlreadyRegistered`](RegisterProducerError::AlreadyRegistered): nothing
    /// is sent, and `done` is dropped.
    /// [`NotConnected`](RegisterProducerError::NotConnected): `done` is called too, and
    /// told so.
    pub fn send<T: Transport + ?Sized>(
        self,
        transport: &mut T,
        done: impl FnOnce(&mut Context<'_, dyn Transport>, Result<FileSent, FileSendError>) + 'static,
    ) -> Result<(), RegisterProducerError> {
        let sending = FileProducer {
            source: self.source,
            chunk: Vec::new(),
            chunk_size: self.chunk_size.clamp(1, LARGEST_CHUNK),
            transform: self.transform,
            sent: FileSent::default(),
            done: Some(Box::new(done)),
        };
        transport.register_producer(ProducerRef::boxed(sending), ProducerKind::Pull)
    }
}

/// A file on its way.
struct FileProducer<R> {
    source: R,
    /// What is read and sent at once; kept, so that it is allocated once.
    chunk: Vec<u8>,
    chunk_size: usize,
    transform: Option<Transform>,
    sent: FileSent,
    done: Option<FileDone>,
}

impl<R: Read> FileProducer<R> {
    /// Reads the next portion; whether there was one.
    fn read(&mut self) -> io::Result<bool> {
        self.chunk.resize(self.chunk_size, 0);
        loop {
            match self.source.read(&mut self.chunk) {
                Ok(length) => {
                    self.chunk.truncate(length);
                    return Ok(length > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn finish(
        &mut self,
        cx: &mut Context<'_, dyn Transport>,
        result: Result<(), FileSendErrorKind>,
    ) {
        let sent = self.sent;
        if let Some(done) = self.done.take() {
            let result = result.map(|()| sent);
            done(cx, result.map_err(|kind| FileSendError { kind, sent }));
        }
    }
}

impl<R: Read + 'static> Producer for FileProducer<R> {
    fn resume_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        match self.read() {
            Ok(true) => {}
            Ok(false) => {
                cx.transport.unregister_producer();
                return self.finish(cx, Ok(()));
            }
            // Nothing is written, so we are asked again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                cx.transport.unregister_producer();
                return self.finish(cx, Err(FileSendErrorKind::Read(error)));
            }
        }
        if let Some(transform) = &mut self.transform {
            transform(&mut self.chunk);
        }
        let status = cx.transport.write(&self.chunk);
        if status != crate::WriteStatus::Refused {
            self.sent.bytes += self.chunk.len() as u64;
            self.sent.last_byte = self.chunk.last().copied().or(self.sent.last_byte);
        } else if cx.transport.state() != TransportState::Lost {
            let limit = cx.transport.watermarks().limit;
            cx.transport.unregister_producer();
            self.finish(
                cx,
                Err(if self.chunk.len() > limit {
                    FileSendErrorKind::Refused
                } else {
                    // A write has failed, and what the peer sent is still being read.
                    FileSendErrorKind::ConnectionLost
                }),
            );
        }
        // Otherwise the connection has just turned out to be broken, and we are
        // told to stop.
    }

    fn stop_producing(&mut self, cx: &mut Context<'_, dyn Transport>) {
        self.finish(cx, Err(FileSendErrorKind::ConnectionLost));
    }
}

impl fmt::Display for FileSendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.kind {
            FileSendErrorKind::Read(error) => {
                return write!(f, "cannot read the file to be sent: {error}");
            }
            FileSendErrorKind::ConnectionLost => "connection ended before the file was sent",
            FileSendErrorKind::Refused => "portion of the file exceeds the limit of unsent bytes",
        })
    }
}

impl Error for FileSendError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.kind {
            FileSendErrorKind::Read(error) => Some(error),
            FileSendErrorKind::ConnectionLost | FileSendErrorKind::Refused => None,
        }
    }
}

impl<R> fmt::Debug for FileSender<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSender")
            .field("chunk_size", &self.chunk_size)
            .finish_non_exhaustive()
    }
}
