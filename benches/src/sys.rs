//! The system calls of the generator and of the hand-written servers, and the
//! allocator that counts. The bench's only `unsafe`.

#![allow(unsafe_code, reason = "the hand-written loop is written on libc")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[path = "sys/batch.rs"]
mod batch;
pub(crate) use batch::{
    Batch, MESSAGES, async_fd, connect_for_packets, listen_for_packets, open_pidfd, packet_pair,
    read, reap, receive_segments, send_many, send_segments, send_to, spawn, write,
};

/// How many descriptors one message can carry.
pub(crate) const MAX_DESCRIPTORS: usize = 253;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn check_size(result: isize) -> io::Result<usize> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as usize)
    }
}

/// Binds the calling process to one CPU.
pub(crate) fn pin(cpu: usize) -> io::Result<()> {
    // SAFETY: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the set is ours; the function checks the index.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is as large as is said; 0 is the caller.
    check(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) })?;
    Ok(())
}

/// Binds a process that is to be started to one CPU.
pub(crate) fn pin_child(command: &mut std::process::Command, cpu: usize) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec only a system call is made.
    unsafe { command.pre_exec(move || pin(cpu)) };
}

/// Raises the limit of open descriptors as far as it goes, and returns it.
pub(crate) fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is ours.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    Ok(limit.rlim_cur)
}

/// The CPU time that a process has used, to the nanosecond.
pub(crate) fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: the variable is ours.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    read_clock(clock)
}

/// The CPU time of the calling process.
pub(crate) fn own_cpu_time() -> Duration {
    read_clock(libc::CLOCK_PROCESS_CPUTIME_ID).expect("every process has this clock")
}

fn read_clock(clock: libc::clockid_t) -> io::Result<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the variable is ours.
    check(unsafe { libc::clock_gettime(clock, &mut time) })?;
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

// Epoll.

pub(crate) const READ: u32 = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
pub(crate) const READ_AND_WRITE: u32 = READ | libc::EPOLLOUT as u32;

/// An epoll instance.
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointer is involved.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the kernel has just given it to us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn add(&self, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, events, data)
    }

    pub(crate) fn modify(&self, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, events, data)
    }

    fn control(&self, operation: i32, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: data };
        // SAFETY: the event is ours; the kernel checks the descriptors.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, fd, &mut event) })?;
        Ok(())
    }

    /// Waits and fills `events` up to its capacity; interrupted is no event.
    #[inline]
    pub(crate) fn wait(&self, events: &mut Vec<libc::epoll_event>, timeout_ms: i32) {
        events.clear();
        // SAFETY: the vector has room for as many events as its capacity.
        let count = unsafe {
            libc::epoll_wait(
                self.0.as_raw_fd(),
                events.as_mut_ptr(),
                events.capacity() as i32,
                timeout_ms,
            )
        };
        // SAFETY: the kernel has written that many.
        unsafe { events.set_len(count.max(0) as usize) };
    }
}

// Sockets.

#[inline]
pub(crate) fn receive(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is ours and as long as is said.
    check_size(unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) })
}

#[inline]
pub(crate) fn send(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the data are as long as is said.
    check_size(unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL) })
}

pub(crate) fn accept(listener: RawFd) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let fd = check(unsafe { libc::accept4(listener, none, none.cast(), flags) })?;
    // SAFETY: the kernel has just given it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A UDP socket that is connected to `port` of 127.0.0.1.
pub(crate) fn connect_udp(port: u16) -> io::Result<OwnedFd> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(("127.0.0.1", port))?;
    Ok(socket.into())
}

/// Connects a TCP socket to `port` of 127.0.0.1 from 127.0.x.y, so that ports
/// that wait for their time never run out.
pub(crate) fn connect_from(source: u16, port: u16) -> io::Result<OwnedFd> {
    // SAFETY: no pointer is involved.
    let fd =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel has just given it to us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    connect(fd, source, port)?;
    Ok(socket)
}

/// Begins to connect a non-blocking TCP socket, likewise.
pub(crate) fn begin_to_connect_from(source: u16, port: u16) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointer is involved.
    let fd = check(unsafe { libc::socket(libc::AF_INET, flags, 0) })?;
    // SAFETY: the kernel has just given it to us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    match connect(fd, source, port) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        other => other.map(|()| socket),
    }
}

fn connect(fd: RawFd, source: u16, port: u16) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    let [high, low] = source.to_be_bytes();
    let from = address([127, 0, high, low.max(1)], 0);
    let to = address([127, 0, 0, 1], port);
    let size = size_of_val(&to) as libc::socklen_t;
    // SAFETY: the address is ours and as large as is said.
    check(unsafe { libc::bind(fd, (&raw const from).cast(), size) })?;
    // SAFETY: as above.
    check(unsafe { libc::connect(fd, (&raw const to).cast(), size) })?;
    Ok(())
}

/// Connects to a UNIX socket, or says at once that too many wait there.
pub(crate) fn connect_unix_at_once(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointer is involved.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, flags, 0) })?;
    // SAFETY: the kernel has just given it to us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let (to, size) = unix_name(path);
    // SAFETY: the address is ours and as large as is said.
    check(unsafe { libc::connect(fd, (&raw const to).cast(), size) })?;
    Ok(socket)
}

fn unix_name(path: &std::path::Path) -> (libc::sockaddr_un, libc::socklen_t) {
    use std::os::unix::ffi::OsStrExt;
    let mut to = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as libc::sa_family_t,
        sun_path: [0; 108],
    };
    let path = path.as_os_str().as_bytes();
    assert!(path.len() < to.sun_path.len(), "path too long");
    for (to, from) in to.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    (to, size_of_val(&to) as libc::socklen_t)
}

fn address(ip: [u8; 4], port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(ip),
        },
        sin_zero: [0; 8],
    }
}

/// Lets this many connections wait to be accepted.
pub(crate) fn set_backlog(listener: RawFd, backlog: i32) -> io::Result<()> {
    // SAFETY: no pointer is involved.
    check(unsafe { libc::listen(listener, backlog) })?;
    Ok(())
}

pub(crate) fn set_no_delay(fd: RawFd) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)
}

fn set_option(fd: RawFd, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the value is ours and as large as is said.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), size) })?;
    Ok(())
}

/// Has the kernel refuse descriptors, where it can (`SO_PASSRIGHTS`, Linux 6.16).
pub(crate) fn refuse_descriptors(fd: RawFd) -> io::Result<()> {
    const SO_PASSRIGHTS: i32 = 83;
    match set_option(fd, libc::SOL_SOCKET, SO_PASSRIGHTS, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
        other => other,
    }
}

pub(crate) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointer is involved.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: no pointer is involved.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

pub(crate) fn shut_down_writing(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointer is involved.
    check(unsafe { libc::shutdown(fd, libc::SHUT_WR) })?;
    Ok(())
}

// Descriptors.

/// Room for the control message of [`MAX_DESCRIPTORS`], aligned as the kernel
/// wants it.
pub(crate) struct Control(Box<[u64; 160]>);

impl Control {
    pub(crate) fn new() -> Self {
        Self(Box::new([0; 160]))
    }

    fn header(&mut self, iov: &mut libc::iovec, length: usize) -> libc::msghdr {
        // SAFETY: all zeroes is a message without anything.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = iov;
        header.msg_iovlen = 1;
        header.msg_control = self.0.as_mut_ptr().cast();
        header.msg_controllen = length;
        header
    }

    /// Receives bytes into `buffer` and descriptors behind those in `received`.
    #[inline]
    pub(crate) fn receive(
        &mut self,
        fd: RawFd,
        buffer: &mut [u8],
        received: &mut Vec<OwnedFd>,
    ) -> io::Result<usize> {
        let mut iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let mut header = self.header(&mut iov, size_of_val(&*self.0));
        // SAFETY: the header points to our buffers and says how large they are.
        let count = check_size(unsafe { libc::recvmsg(fd, &mut header, libc::MSG_CMSG_CLOEXEC) })?;
        if header.msg_controllen > 0 {
            collect(&header, received);
        }
        Ok(count)
    }

    /// Sends `data` with `descriptors`.
    pub(crate) fn send(
        &mut self,
        fd: RawFd,
        data: &[u8],
        descriptors: &[RawFd],
    ) -> io::Result<usize> {
        assert!(descriptors.len() <= MAX_DESCRIPTORS, "more than fit");
        let mut iov = libc::iovec {
            iov_base: data.as_ptr().cast_mut().cast(),
            iov_len: data.len(),
        };
        let payload = size_of_val(descriptors) as u32;
        // SAFETY: arithmetic only.
        let length = unsafe { libc::CMSG_SPACE(payload) } as usize;
        let header = self.header(&mut iov, length);
        // SAFETY: the header is whole.
        let first = unsafe { libc::CMSG_FIRSTHDR(&header) };
        // SAFETY: the control buffer is longer than a header, and aligned.
        let control = unsafe { &mut *first };
        control.cmsg_level = libc::SOL_SOCKET;
        control.cmsg_type = libc::SCM_RIGHTS;
        // SAFETY: arithmetic only.
        control.cmsg_len = unsafe { libc::CMSG_LEN(payload) } as usize;
        // SAFETY: follows the header, within the same buffer.
        let target: *mut RawFd = unsafe { libc::CMSG_DATA(control) }.cast();
        // SAFETY: `length` bytes were made room for, which the assertion holds
        // within the buffer; the two do not overlap.
        unsafe { target.copy_from_nonoverlapping(descriptors.as_ptr(), descriptors.len()) };
        // SAFETY: the header points to our buffers and says how large they are.
        check_size(unsafe { libc::sendmsg(fd, &header, libc::MSG_NOSIGNAL) })
    }
}

fn collect(header: &libc::msghdr, received: &mut Vec<OwnedFd>) {
    assert_eq!(header.msg_flags & libc::MSG_CTRUNC, 0, "descriptors lost");
    // SAFETY: the kernel filled the header in.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: a pointer of CMSG_FIRSTHDR or CMSG_NXTHDR is null or to a whole
    // header.
    while let Some(control) = unsafe { next.as_ref() } {
        if (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: arithmetic only.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (control.cmsg_len - empty) / size_of::<RawFd>();
            // SAFETY: follows the header, within the same buffer.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(control) }.cast();
            received.extend((0..count).map(|index| {
                // SAFETY: there are `count` of them.
                let at = unsafe { data.add(index) };
                // SAFETY: as above.
                let fd = unsafe { at.read_unaligned() };
                // SAFETY: the kernel has just given it to us.
                unsafe { OwnedFd::from_raw_fd(fd) }
            }));
        }
        // SAFETY: both are from the same message.
        next = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
}

/// Lends what a source of calloop holds.
pub(crate) fn lend<T>(file: &mut calloop::generic::NoIoDrop<T>) -> &mut T {
    // SAFETY: the callers, all in this bench, neither drop nor replace it.
    unsafe { file.get_mut() }
}

/// Takes what `sendfd` has received.
pub(crate) fn own(fd: RawFd) -> OwnedFd {
    assert!(fd > 2, "no descriptor of ours");
    // SAFETY: the callers pass what the kernel has just given them.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The listener that the parent left as descriptor 3.
pub(crate) fn inherited_listener() -> OwnedFd {
    // SAFETY: a server is started with a listener there and nobody else takes
    // it; see `leave_as_listener`.
    unsafe { OwnedFd::from_raw_fd(LISTENER) }
}

const LISTENER: RawFd = 3;

/// Starts `command` with `listener` as its descriptor 3, to die with us.
pub(crate) fn spawn_with_listener(
    command: &mut std::process::Command,
    listener: OwnedFd,
) -> io::Result<std::process::Child> {
    use std::os::unix::process::CommandExt;
    let fd = listener.as_raw_fd();
    let prepare = move || {
        // SAFETY: no pointer is involved.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        if fd == LISTENER {
            // SAFETY: no pointer is involved.
            check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
        } else {
            // SAFETY: no pointer is involved. What was there closes with the
            // exec anyway.
            check(unsafe { libc::dup2(fd, LISTENER) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn();
    drop(listener);
    child
}

// A timer that is exact to less than a millisecond.

/// A timerfd.
pub(crate) struct TimerFd(OwnedFd);

impl TimerFd {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: no pointer is involved.
        let fd = check(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        // SAFETY: the kernel has just given it to us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn set(&self, delay: Duration) -> io::Result<()> {
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let setting = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec {
                tv_sec: delay.as_secs() as i64,
                tv_nsec: i64::from(delay.subsec_nanos()).max(1),
            },
        };
        let none = std::ptr::null_mut();
        // SAFETY: the setting is ours; the old one is not asked for.
        check(unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &setting, none) })?;
        Ok(())
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

// Memory.

/// The allocator of every server: the system's, counted.
pub(crate) struct Counting;

static LIVE: AtomicU64 = AtomicU64::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// How often memory was asked for.
pub(crate) fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

fn add(size: usize) {
    ALLOCATIONS.store(ALLOCATIONS.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    // Servers have one thread: an addition in two steps costs them nothing that
    // the limit would not pay too.
    LIVE.store(
        LIVE.load(Ordering::Relaxed) + size as u64,
        Ordering::Relaxed,
    );
}

fn subtract(size: usize) {
    LIVE.store(
        LIVE.load(Ordering::Relaxed).wrapping_sub(size as u64),
        Ordering::Relaxed,
    );
}

// SAFETY: everything is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: what the caller promised.
        unsafe { System.alloc(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        subtract(layout.size());
        // SAFETY: what the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: what the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        subtract(layout.size());
        add(size);
        // SAFETY: what the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Makes SIGUSR1 write how many bytes are allocated to standard output.
pub(crate) fn report_memory_on_signal() -> io::Result<()> {
    extern "C" fn report(_: libc::c_int) {
        let live = LIVE.load(Ordering::Relaxed).to_le_bytes();
        // SAFETY: allowed in a signal handler; the bytes are ours.
        unsafe { libc::write(1, live.as_ptr().cast(), live.len()) };
    }
    // SAFETY: all zeroes is a valid setting.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = report as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler does nothing but one write.
    check(unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) })?;
    Ok(())
}

/// Asks a server for its memory.
pub(crate) fn signal_report(pid: u32) -> io::Result<()> {
    // SAFETY: no pointer is involved; the process is our child, not yet waited
    // for.
    check(unsafe { libc::kill(pid as libc::pid_t, libc::SIGUSR1) })?;
    Ok(())
}

/// Has a process end.
#[allow(dead_code, reason = "the program `tls` does")]
pub(crate) fn terminate(pid: u32) -> io::Result<()> {
    // SAFETY: no pointer is involved; the process is our child, not yet waited
    // for.
    check(unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) })?;
    Ok(())
}

/// Sends a signal to a process, or with a negative number to a group of them.
pub(crate) fn signal(process: i32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointer is involved.
    check(unsafe { libc::kill(process, signal) })?;
    Ok(())
}

pub(crate) const HUP: libc::c_int = libc::SIGHUP;
pub(crate) const USR2: libc::c_int = libc::SIGUSR2;
pub(crate) const TERM: libc::c_int = libc::SIGTERM;
pub(crate) const KILL: libc::c_int = libc::SIGKILL;
pub(crate) const STOP: libc::c_int = libc::SIGSTOP;
pub(crate) const CONTINUE: libc::c_int = libc::SIGCONT;
