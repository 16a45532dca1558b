//! Calls of libc that fail when a test says so: mio's, std's and ours alike.
//!
//! A small library (`faults.c`, built by the system's C compiler, which Rust
//! needs as its linker anyway) is preloaded into a process and told what to do
//! through a file that both map. That process can be one of the tests' own:
//!
//! ```text
//! #[test]
//! fn listener_goes_on_after_a_refused_connection() {
//!     with_faults(module_path!(), "listener_goes_on_after_a_refused_connection", |faults| {
//!         faults.fail(Call::Accept, 0, 1, Errno::PERM);
//!         faults.during(|| reactor.turn(None));
//!         assert_eq!(faults.fired(), 1);
//!     });
//! }
//! ```
//!
//! or any program: [`Faults::preload_into`].

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::io::Errno;
use tempfile::NamedTempFile;

use super::own_process::in_own_process_with;

/// Tells the library where its file is.
const CONTROL: &str = "BOWLINE_FAULTS";

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Call {
    Accept,
    Bind,
    Close,
    Connect,
    Dup2,
    EpollCreate,
    EpollCtl,
    EpollWait,
    EventFd,
    Exec,
    Fchmod,
    Fcntl,
    Fork,
    GetPeerName,
    GetSockName,
    GetSockOpt,
    Ioctl,
    Listen,
    Open,
    Pipe,
    /// Of the loop's own counters, as `Write`.
    Read,
    Recv,
    RecvMmsg,
    RecvMsg,
    Send,
    /// Of several messages or of one, which is sendto(2).
    SendMmsg,
    SendMsg,
    SetSockOpt,
    Shutdown,
    Socket,
    TimerFdCreate,
    TimerFdSetTime,
    Unlink,
    /// For a child, as waitpid(2).
    Wait,
    Write,
}

impl Call {
    /// In the order of `enum call` of faults.c.
    pub(crate) const ALL: [Self; 35] = [
        Self::Accept,
        Self::Bind,
        Self::Close,
        Self::Connect,
        Self::Dup2,
        Self::EpollCreate,
        Self::EpollCtl,
        Self::EpollWait,
        Self::EventFd,
        Self::Exec,
        Self::Fchmod,
        Self::Fcntl,
        Self::Fork,
        Self::GetPeerName,
        Self::GetSockName,
        Self::GetSockOpt,
        Self::Ioctl,
        Self::Listen,
        Self::Open,
        Self::Pipe,
        Self::Read,
        Self::Recv,
        Self::RecvMmsg,
        Self::RecvMsg,
        Self::Send,
        Self::SendMmsg,
        Self::SendMsg,
        Self::SetSockOpt,
        Self::Shutdown,
        Self::Socket,
        Self::TimerFdCreate,
        Self::TimerFdSetTime,
        Self::Unlink,
        Self::Wait,
        Self::Write,
    ];

    /// The errors that a kernel may answer to it.
    pub(crate) fn errors(self) -> &'static [Errno] {
        match self {
            Self::Accept => &[
                Errno::INTR,
                Errno::AGAIN,
                Errno::CONNABORTED,
                Errno::MFILE,
                Errno::NFILE,
                Errno::NOBUFS,
                Errno::NOMEM,
                Errno::PERM,
                Errno::PROTO,
                Errno::INVAL,
                Errno::BADF,
                Errno::NETDOWN,
            ],
            Self::Bind => &[
                Errno::ADDRINUSE,
                Errno::ACCESS,
                Errno::ADDRNOTAVAIL,
                Errno::NOMEM,
                Errno::ROFS,
                Errno::LOOP,
            ],
            Self::Close => &[Errno::INTR, Errno::IO, Errno::NOSPC],
            Self::Connect => &[
                Errno::INTR,
                Errno::AGAIN,
                Errno::CONNREFUSED,
                Errno::TIMEDOUT,
                Errno::NETUNREACH,
                Errno::ACCESS,
                Errno::PERM,
                Errno::ADDRNOTAVAIL,
                Errno::NOENT,
                Errno::NOMEM,
            ],
            Self::Dup2 => &[Errno::INTR, Errno::BUSY, Errno::MFILE, Errno::BADF],
            Self::EpollCreate | Self::EventFd | Self::TimerFdCreate | Self::Pipe => {
                &[Errno::MFILE, Errno::NFILE, Errno::NOMEM]
            }
            Self::EpollCtl => &[
                Errno::NOMEM,
                Errno::NOSPC,
                Errno::PERM,
                Errno::BADF,
                Errno::INVAL,
                Errno::NOENT,
                Errno::EXIST,
            ],
            Self::EpollWait => &[Errno::INTR, Errno::INVAL, Errno::BADF, Errno::NOMEM],
            Self::Exec => &[Errno::NOENT, Errno::ACCESS, Errno::NOMEM],
            Self::Fchmod => &[Errno::PERM, Errno::IO, Errno::ROFS],
            Self::Fcntl => &[
                Errno::INTR,
                Errno::MFILE,
                Errno::BADF,
                Errno::INVAL,
                Errno::PERM,
            ],
            Self::Fork => &[Errno::AGAIN, Errno::NOMEM],
            Self::GetPeerName | Self::GetSockName => {
                &[Errno::NOTCONN, Errno::NOBUFS, Errno::BADF, Errno::INVAL]
            }
            Self::GetSockOpt | Self::SetSockOpt => &[
                Errno::NOPROTOOPT,
                Errno::INVAL,
                Errno::NOMEM,
                Errno::NOBUFS,
                Errno::BADF,
                Errno::PERM,
            ],
            Self::Ioctl => &[Errno::BADF, Errno::INVAL, Errno::NOTTY],
            Self::Listen => &[Errno::ADDRINUSE, Errno::OPNOTSUPP, Errno::INVAL],
            Self::Open => &[Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS],
            Self::Read | Self::Write => &[Errno::INTR, Errno::AGAIN, Errno::BADF, Errno::INVAL],
            Self::Recv | Self::RecvMmsg | Self::RecvMsg => &[
                Errno::INTR,
                Errno::AGAIN,
                Errno::CONNRESET,
                Errno::TIMEDOUT,
                Errno::HOSTUNREACH,
                Errno::NOBUFS,
                Errno::NOMEM,
                Errno::PERM,
                Errno::BADF,
                Errno::INVAL,
            ],
            Self::Send | Self::SendMmsg | Self::SendMsg => &[
                Errno::INTR,
                Errno::AGAIN,
                Errno::PIPE,
                Errno::CONNRESET,
                Errno::NOBUFS,
                Errno::NOMEM,
                Errno::TOOMANYREFS,
                Errno::TIMEDOUT,
                Errno::PERM,
                Errno::BADF,
                Errno::INVAL,
            ],
            Self::Shutdown => &[Errno::NOTCONN, Errno::NOBUFS, Errno::BADF],
            Self::Socket => &[
                Errno::MFILE,
                Errno::NFILE,
                Errno::NOBUFS,
                Errno::NOMEM,
                Errno::ACCESS,
                Errno::AFNOSUPPORT,
            ],
            Self::TimerFdSetTime => &[Errno::INVAL, Errno::BADF],
            Self::Unlink => &[Errno::ACCESS, Errno::NOENT, Errno::ROFS, Errno::IO],
            Self::Wait => &[Errno::INTR, Errno::CHILD, Errno::INVAL],
        }
    }
}

/// The words of `struct control` of faults.c, before its counts.
#[derive(Clone, Copy)]
enum Word {
    IsArmed,
    Call,
    Nth,
    Times,
    Error,
    StormPercent,
    Seed,
    Fired,
}

const WORDS: usize = Word::Fired as usize + 1;

/// What the preloaded library of a process is told.
///
/// Its words are written and read as a file, so nothing here is unsafe; that
/// takes a microsecond, and no call that is counted.
#[derive(Debug)]
pub(crate) struct Faults {
    control: File,
    /// Kept until the last user is gone.
    file: Option<NamedTempFile>,
}

impl Faults {
    /// For a process that is to be started.
    pub(crate) fn new() -> Self {
        let file = NamedTempFile::new().expect("a temporary file");
        let length = 4 * (WORDS + Call::ALL.len()) as u64;
        file.as_file().set_len(length).expect("room");
        Self {
            control: file.reopen().expect("it is there"),
            file: Some(file),
        }
    }

    /// Those that this process was started with.
    fn of_this_process() -> Self {
        let path = std::env::var_os(CONTROL).expect("started with faults");
        let control = File::options().read(true).write(true).open(path);
        Self {
            control: control.expect("it is there"),
            file: None,
        }
    }

    /// Has a command start its process, and all that it starts, with the
    /// library.
    pub(crate) fn preload_into(&self, command: &mut Command) {
        let file = self.file.as_ref().expect("made by `new`");
        command
            .env("LD_PRELOAD", library())
            .env(CONTROL, file.path());
    }

    /// Begins to count calls and to have them fail, in all threads.
    pub(crate) fn arm(&self) {
        self.write(Word::IsArmed, 1);
    }

    pub(crate) fn disarm(&self) {
        self.write(Word::IsArmed, 0);
    }

    /// Counts, and has fail, what is called meanwhile.
    pub(crate) fn during<R>(&self, call: impl FnOnce() -> R) -> R {
        self.arm();
        let result = call();
        self.disarm();
        result
    }

    /// Forgets counts and faults.
    pub(crate) fn reset(&self) {
        let nothing = vec![0; 4 * (WORDS + Call::ALL.len())];
        self.control.write_all_at(&nothing, 0).expect("written");
    }

    /// Has the calls number `nth` (counted from 0 since the
    /// [reset](Self::reset)) and following fail, `times` of them.
    pub(crate) fn fail(&self, call: Call, nth: u32, times: u32, error: Errno) {
        // Nothing fires while it is half written.
        self.write(Word::Call, 0);
        self.write(Word::Nth, nth);
        self.write(Word::Times, times);
        self.write(Word::Error, error.raw_os_error().cast_unsigned());
        self.write(Word::Call, call as u32 + 1);
    }

    /// Has so many of a hundred calls that accept, move bytes or wait be
    /// interrupted, put off or cut short.
    pub(crate) fn storm(&self, percent: u32, seed: u32) {
        self.write(Word::Seed, seed);
        self.write(Word::StormPercent, percent);
    }

    /// How many calls were made to fail since the [reset](Self::reset), or cut.
    pub(crate) fn fired(&self) -> u32 {
        self.read(Word::Fired as usize)
    }

    /// How often a call was made while armed.
    pub(crate) fn count(&self, call: Call) -> u32 {
        self.read(WORDS + call as usize)
    }

    fn read(&self, word: usize) -> u32 {
        let mut bytes = [0; 4];
        let position = 4 * word as u64;
        self.control
            .read_exact_at(&mut bytes, position)
            .expect("read");
        u32::from_ne_bytes(bytes)
    }

    fn write(&self, word: Word, value: u32) {
        let position = 4 * word as u64;
        self.control
            .write_all_at(&value.to_ne_bytes(), position)
            .expect("written");
    }
}

/// Runs `test` in a process of its own with the library preloaded; otherwise as
/// [`in_own_process`](super::own_process::in_own_process).
#[track_caller]
pub(crate) fn with_faults(module: &str, name: &str, test: impl FnOnce(&Faults)) {
    in_own_process_with(
        module,
        name,
        |command| {
            let faults = Faults::new();
            faults.preload_into(command);
            faults
        },
        || {
            let faults = Faults::of_this_process();
            // Processes that it starts are not to be disturbed by it.
            test(&faults);
            faults.disarm();
        },
    );
}

/// The library, built when it is first asked for.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/faults.c");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = folder.join("libfaults.so");
        let changed = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
        let is_fresh =
            changed(&path).is_ok_and(|built| changed(&source).is_ok_and(|written| built > written));
        if !is_fresh {
            // Under a name of its own: another process may be at it too.
            let mine = folder.join(format!("libfaults.{}", std::process::id()));
            let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
            let status = Command::new(compiler)
                .args([
                    "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o",
                ])
                .args([&mine, &source])
                .arg("-ldl")
                .status();
            assert!(
                status.as_ref().is_ok_and(|status| status.success()),
                "a C compiler builds {}: {status:?}",
                source.display()
            );
            fs::rename(&mine, &path).expect("in the same folder");
        }
        path
    })
}
