//! Which variables of the environment are meant for a child.

use std::process::Command;

use super::listen;

/// Removes from a successor's environment what is not meant for it.
///
/// `LISTEN_FDS` and its companions say which descriptors *this* process was given.
/// `WATCHDOG_PID` is removed if it names this process, or `watched`, in whose place this
/// process is watched. Without it, `WATCHDOG_USEC` is meant for whoever reads it, the
/// successor. What `command` sets itself stays.
pub(crate) fn prepare_successor(command: &mut Command, watched: Option<u32>) {
    let named = std::env::var("WATCHDOG_PID").ok();
    let named = named.and_then(|pid| pid.parse().ok());
    let is_ours = |pid| pid == std::process::id() || Some(pid) == watched;
    let watchdog = named.is_some_and(is_ours).then_some("WATCHDOG_PID");
    for name in listen::VARIABLES.into_iter().chain(watchdog) {
        let is_set = command
            .get_envs()
            .any(|(found, value)| found == name && value.is_some());
        if !is_set {
            command.env_remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_this_process_are_not_the_successors() {
        let mut command = Command::new("true");
        command.env("LISTEN_PID", "17").env("OTHER", "1");
        prepare_successor(&mut command, None);
        let mut envs: Vec<_> = command.get_envs().collect();
        envs.sort();
        let text = |name: &'static str| std::ffi::OsStr::new(name);
        assert_eq!(
            envs,
            [
                (text("LISTEN_FDNAMES"), None),
                (text("LISTEN_FDS"), None),
                (text("LISTEN_PID"), Some(text("17"))),
                (text("LISTEN_PIDFDID"), None),
                (text("OTHER"), Some(text("1"))),
            ]
        );
    }
}
