//! Listening sockets that share one address.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use crate::sys::{self, Family, SocketName};

/// Listening TCP sockets at one address (`SO_REUSEPORT`). The kernel gives each new
/// connection to one of them, where it waits in a queue of its own.
///
/// A group is made of one socket that listens already, whoever has bound it, and grows
/// from there. Its sockets are duplicates of descriptors that other processes may have
/// too: a process that accepts has a copy of one, and this value has a copy of each. So a
/// queue outlives the process that was to serve it, and whoever takes its place serves
/// it. Unless you [shut one down](Self::shut_down), nothing in a group is closed before the
/// group is dropped: closing a socket for good resets the connections in its queue, and
/// those whose handshake has begun (`net.ipv4.tcp_migrate_req` can change that, for all of
/// the machine).
///
/// # Examples
///
/// ```
/// use std::net::{TcpListener, TcpStream};
/// use bowline::endpoint::ListenerGroup;
///
/// let first = TcpListener::bind("127.0.0.1:0")?;
/// let address = first.local_addr()?;
/// let mut group = ListenerGroup::around(first.into())?;
/// group.grow()?;
/// // The first gets nothing from now on.
/// group.steer(1..2)?;
/// let _client = TcpStream::connect(address)?;
/// assert_eq!((group.waiting(0)?, group.waiting(1)?), (0, 1));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct ListenerGroup {
    /// In the order in which the kernel counts them.
    ///
    /// Invariant: at least one.
    members: Vec<Rc<OwnedFd>>,
}

impl ListenerGroup {
    /// Makes a group of one socket, which listens over TCP. Sets `SO_REUSEPORT` on it.
    ///
    /// # Errors
    ///
    /// `Unsupported` for a listener that is not of TCP: those have no groups.
    /// `InvalidInput` for what does not listen, and the kernel's.
    pub fn around(first: OwnedFd) -> io::Result<Self> {
        let kind = sys::socket_kind(first.as_fd())?;
        if !matches!(kind.domain, Some(Family::Inet4 | Family::Inet6)) || !kind.stream {
            let text = "only listeners of TCP can share an address";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        if !kind.listening {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sys::set_reuse_port(first.as_fd(), true)?;
        Ok(Self {
            members: vec![Rc::new(first)],
        })
    }

    /// Goes on with a group that another process has made. `members` are all of its
    /// sockets, in their order.
    ///
    /// # Errors
    ///
    /// As [`around`](Self::around), for each.
    pub fn resume(members: Vec<OwnedFd>) -> io::Result<Self> {
        let mut all = Self {
            members: Vec::with_capacity(members.len()),
        };
        for member in members {
            all.members.append(&mut Self::around(member)?.members);
        }
        match all.members.is_empty() {
            true => Err(io::ErrorKind::InvalidInput.into()),
            false => Ok(all),
        }
    }

    /// Adds a socket. It has the address, the backlog, `TCP_NODELAY`, `SO_KEEPALIVE` and
    /// `IPV6_V6ONLY` of the first, and listens at once: without [`steer`](Self::steer) it
    /// gets its share from now on. No connection of the others is disturbed.
    ///
    /// # Errors
    ///
    /// The kernel's: `EADDRINUSE` if the first was bound by another user.
    pub fn grow(&mut self) -> io::Result<()> {
        let first = self.members[0].as_fd();
        let name = sys::local_name(first)?;
        let family = match &name {
            SocketName::Inet(SocketAddr::V6(_)) => Family::Inet6,
            _ => Family::Inet4,
        };
        let socket = sys::stream_socket(family)?;
        sys::set_reuse_address(socket.as_fd(), true)?;
        sys::set_reuse_port(socket.as_fd(), true)?;
        sys::copy_listener_options(first, socket.as_fd())?;
        sys::bind(socket.as_fd(), &name)?;
        let backlog = sys::accept_queue(first)?.limit;
        sys::listen(socket.as_fd(), backlog.cast_signed())?;
        self.members.push(Rc::new(socket));
        Ok(())
    }

    /// Has only these sockets, by their numbers, get new connections, each as many as the
    /// others. The rest keep what is in their queues, and what was on its way to them.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for no socket, or for one that is not there. The kernel's
    /// (`SO_ATTACH_REUSEPORT_CBPF`, since Linux 4.5).
    pub fn steer(&self, members: Range<usize>) -> io::Result<()> {
        if members.is_empty() || members.end > self.members.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (base, count) = (members.start as u32, members.len() as u32);
        sys::steer_group(self.members[0].as_fd(), base, count)
    }

    /// Takes the sockets from this number on out of this value, as `Vec::split_off` does. To
    /// the kernel they are one group as before, as long as all are open: whoever drops one of
    /// the two values closes its copies of what is in it. `None` if nothing is left for one
    /// of the two.
    pub fn split_off(&mut self, at: usize) -> Option<Self> {
        if at == 0 || at >= self.members.len() {
            return None;
        }
        let members = self.members.split_off(at);
        Some(Self { members })
    }

    /// The sockets, in their order.
    pub fn members(&self) -> &[Rc<OwnedFd>] {
        &self.members
    }

    /// How many connections wait in the queue of a socket. One system call.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a socket that is not there, and the kernel's.
    pub fn waiting(&self, member: usize) -> io::Result<u32> {
        let member = self
            .members
            .get(member)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(sys::accept_queue(member.as_fd())?.waiting)
    }

    /// Accepts a connection from the queue of a socket. It is non-blocking and
    /// close-on-exec.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nobody waits, `InvalidInput` for a socket that is not there, and
    /// the kernel's.
    pub fn accept(&self, member: usize) -> io::Result<(OwnedFd, SocketAddr)> {
        let member = self
            .members
            .get(member)
            .ok_or(io::ErrorKind::InvalidInput)?;
        match sys::accept_from(member.as_fd(), true)? {
            (fd, SocketName::Inet(peer)) => Ok((fd, peer)),
            (fd, _) => Ok((fd, SocketAddr::from(([0; 4], 0)))),
        }
    }

    /// Has a socket listen no more, whoever has a copy of it (shutdown(2)). Connections that
    /// wait in its queue are reset: [accept](Self::accept) them first. A listener that
    /// accepts on a copy closes.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a socket that is not there, and the kernel's.
    pub fn shut_down(&self, member: usize) -> io::Result<()> {
        let member = self
            .members
            .get(member)
            .ok_or(io::ErrorKind::InvalidInput)?;
        sys::shutdown(member.as_fd(), Shutdown::Both)
    }
}
