//! What the generators of all protocols do: send with descriptors, and read whole messages.

use std::fs::File;
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::Outcome;
use crate::peer::{Process, wait_for};

/// A connection to a peer.
pub(crate) struct Wire {
    pub(crate) stream: UnixStream,
    buffer: Vec<u8>,
    begin: usize,
}

impl Wire {
    pub(crate) fn connect(process: &Process) -> Outcome<Self> {
        let stream = wait_for(|| UnixStream::connect(&process.socket).ok())?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
            begin: 0,
        })
    }

    /// Sends once, all of it.
    pub(crate) fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Outcome {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        match sent == bytes.len() {
            true => Ok(()),
            false => Err("a part was sent".into()),
        }
    }

    /// The next message, whose length is told by its beginning.
    pub(crate) fn next(&mut self, length: impl Fn(&[u8]) -> Option<usize>) -> Outcome<&[u8]> {
        loop {
            let rest = &self.buffer[self.begin..];
            if let Some(length) = length(rest).filter(|length| *length <= rest.len()) {
                let begin = self.begin;
                self.begin += length;
                return Ok(&self.buffer[begin..begin + length]);
            }
            self.buffer.drain(..self.begin);
            self.begin = 0;
            let mut more = [0; 65_536];
            let count = (&self.stream).read(&mut more)?;
            if count == 0 {
                return Err("the peer has ended".into());
            }
            self.buffer.extend_from_slice(&more[..count]);
        }
    }
}

/// The same file so often.
pub(crate) fn files(count: usize) -> Outcome<Vec<OwnedFd>> {
    let file = File::open("/dev/null")?;
    let copies = (0..count).map(|_| file.try_clone().map(OwnedFd::from));
    Ok(copies.collect::<Result<_, _>>()?)
}

pub(crate) fn borrowed(files: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(|file| file.as_fd()).collect()
}

pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}
