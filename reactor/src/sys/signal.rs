//! The numbers of the signals that programs handle, for `Reactor::on_signals`, and that
//! they send. They are those of this machine, so no other crate is needed for them. See
//! signal(7).

macro_rules! numbers {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        $($(#[doc = $doc])+ pub const $name: i32 = libc::$name;)+
    };
}

numbers! {
    /// The terminal is gone. For servers, by custom: restart, or read the
    /// configuration again.
    SIGHUP,
    /// Ctrl-C.
    SIGINT,
    /// Ctrl-\\, which leaves a core dump by default.
    SIGQUIT,
    /// Free for the program to use.
    SIGUSR1,
    /// Free for the program to use.
    SIGUSR2,
    /// A timer of alarm(2).
    SIGALRM,
    /// The end at once. Nobody handles it.
    SIGKILL,
    /// Please end. kill(1) and service managers send it.
    SIGTERM,
    /// A child has ended or stopped.
    SIGCHLD,
    /// Continued after a stop.
    SIGCONT,
    /// A stop until SIGCONT. Nobody handles it.
    SIGSTOP,
    /// Ctrl-Z.
    SIGTSTP,
    /// The size of the terminal has changed.
    SIGWINCH,
}
