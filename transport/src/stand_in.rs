//! Descriptors that stand for something of a simulated kernel: without the feature
//! `testing` there are none. With it, `testing/stand_in.rs` stands here.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use bowline_reactor::{Interest, Reactor, Token};

/// What a descriptor stands for: nothing does.
#[derive(Debug)]
pub(crate) enum StandIn {}

impl StandIn {
    #[inline(always)]
    pub(crate) fn of_pipe(_: BorrowedFd<'_>) -> Option<Self> {
        None
    }

    #[inline(always)]
    pub(crate) fn of_process(_: BorrowedFd<'_>) -> Option<Self> {
        None
    }

    pub(crate) fn access(&self) -> (bool, bool) {
        match *self {}
    }

    pub(crate) fn path(&self) -> Option<PathBuf> {
        match *self {}
    }

    pub(crate) fn read_at_once(&self, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn write_at_once(&self, _: &[IoSlice<'_>]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn read(&self, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn write(&self, _: &[IoSlice<'_>]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn has_waiting(&self) -> bool {
        match *self {}
    }

    pub(crate) fn has_room(&self) -> bool {
        match *self {}
    }

    pub(crate) fn has_no_reader(&self) -> bool {
        match *self {}
    }

    pub(crate) fn is_hung_up(&self) -> bool {
        match *self {}
    }

    pub(crate) fn unread(&self) -> usize {
        match *self {}
    }

    pub(crate) fn watch(&self, _: &mut Reactor, _: Token, _: Interest) -> io::Result<()> {
        match *self {}
    }

    pub(crate) fn unwatch(&self) {
        match *self {}
    }
}
