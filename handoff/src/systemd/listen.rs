//! `LISTEN_FDS` and its companions: sd_listen_fds_with_names(3).

use std::error::Error;
use std::fmt;
use std::io;

use std::sync::atomic::{AtomicBool, Ordering};

use bowline_transport::{own_pidfd_inode, remove_environment, take_granted};

use crate::inherited::Inherited;
use crate::log;

/// The number of the first descriptor (`SD_LISTEN_FDS_START`).
const FIRST: u32 = 3;

/// More than systemd's own limit on descriptors of one service (`LimitNOFILE`
/// is at most 2^30 there); what matters is that a nonsensical count does not
/// become a list of that length.
const MOST: u32 = 1 << 16;

/// What is removed from the environment when the descriptors are taken.
pub(super) const VARIABLES: [&str; 4] = [
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
];

/// The name of descriptors that were given without (systemd's own word).
const UNNAMED: &str = "unknown";

/// A descriptor that the environment announces.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Announced {
    /// Its number.
    pub number: u32,
    /// Its name, which is `FileDescriptorName=` of the socket unit. By default that is
    /// the name of the unit. Without any names it is `unknown`.
    pub name: String,
}

/// Why inherited descriptors were not taken.
#[derive(Debug)]
#[non_exhaustive]
pub enum ActivationError {
    /// The variable of this name is meant for us and makes no sense.
    Malformed(&'static str),
    /// There are more or fewer names than descriptors.
    NamesDoNotMatch {
        /// How many descriptors were announced.
        descriptors: usize,
        /// How many names there are.
        names: usize,
    },
    /// A descriptor could not be taken. Nothing is open under its number, or it was
    /// taken before.
    Descriptor {
        /// Its number.
        number: u32,
        /// The system's answer.
        error: io::Error,
    },
}

/// Reads the announcement in an environment. `variable` looks up a variable, so that
/// nothing depends on the environment of this process.
///
/// Nothing is announced if `LISTEN_PID` or `LISTEN_FDS` is missing or is no number.
/// Nothing is either if `LISTEN_PID` is not `pid`: the variables are another process's,
/// and we have inherited them by mistake. The same holds if there is a `LISTEN_PIDFDID`
/// that is not `pidfd_inode`, if that is known ([`own_pidfd_inode`]): the system uses
/// process numbers again.
///
/// # Errors
///
/// [`ActivationError::Malformed`] and [`ActivationError::NamesDoNotMatch`].
///
/// # Examples
///
/// ```
/// use bowline::handoff::systemd::announced;
///
/// let environment = |name: &str| match name {
///     "LISTEN_PID" => Some("42".to_owned()),
///     "LISTEN_FDS" => Some("2".to_owned()),
///     "LISTEN_FDNAMES" => Some("web:admin".to_owned()),
///     _ => None,
/// };
/// let found = announced(environment, 42, None)?;
/// assert_eq!((found[1].number, found[1].name.as_str()), (4, "admin"));
/// assert!(announced(environment, 43, None)?.is_empty());
/// # Ok::<(), bowline::handoff::systemd::ActivationError>(())
/// ```
pub fn announced(
    variable: impl Fn(&str) -> Option<String>,
    pid: u32,
    pidfd_inode: Option<u64>,
) -> Result<Vec<Announced>, ActivationError> {
    let number = |name| variable(name).and_then(|value| value.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(pid) || !is_for(&variable, pidfd_inode)? {
        return Ok(Vec::new());
    }
    let Some(count) = number("LISTEN_FDS") else {
        return Ok(Vec::new());
    };
    if count > MOST {
        return Err(ActivationError::Malformed("LISTEN_FDS"));
    }
    let names: Vec<String> = match variable("LISTEN_FDNAMES") {
        Some(names) => names.split(':').map(str::to_owned).collect(),
        None => vec![UNNAMED.to_owned(); count as usize],
    };
    if names.len() != count as usize && !(count == 0 && names == [""]) {
        return Err(ActivationError::NamesDoNotMatch {
            descriptors: count as usize,
            names: names.len(),
        });
    }
    let numbers = FIRST..FIRST + count;
    Ok(numbers
        .zip(names)
        .map(|(number, name)| Announced { number, name })
        .collect())
}

/// What is announced to this process, taken or not.
pub(crate) fn announced_here() -> Result<Vec<Announced>, ActivationError> {
    let variable = |name: &str| std::env::var(name).ok();
    announced(variable, std::process::id(), own_pidfd_inode())
}

/// Whether `LISTEN_PIDFDID` does not contradict.
fn is_for(
    variable: impl Fn(&str) -> Option<String>,
    pidfd_inode: Option<u64>,
) -> Result<bool, ActivationError> {
    let Some(named) = variable("LISTEN_PIDFDID") else {
        return Ok(true);
    };
    let named: u64 = named
        .parse()
        .map_err(|_| ActivationError::Malformed("LISTEN_PIDFDID"))?;
    Ok(pidfd_inode.is_none_or(|own| own == named))
}

/// Says, once, that there are variables and that they are another process's: the wrapper's
/// around this program, as a rule, which should have replaced itself by it.
fn log_variables_of_another() {
    static IS_LOGGED: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).ok();
    if let (Some(count), Some(pid)) = (variable("LISTEN_FDS"), variable("LISTEN_PID"))
        && !IS_LOGGED.swap(true, Ordering::Relaxed)
    {
        log::warn!(
            target: log::HANDOFF,
            "LISTEN_FDS={count} is for process {pid}, and not for this one: not taken"
        );
    }
}

/// Takes the descriptors that this process was started with, each with its name. They
/// are close-on-exec from now on. Call this first in `main`.
///
/// The variables are removed from the environment, so that no child takes them for its
/// own. If other threads run already, that is not possible and they stay. They name
/// this process, so children that check see that they are not meant. A second call
/// finds nothing. Variables for another process are left alone, which is logged once.
///
/// # Errors
///
/// [`ActivationError`]. Descriptors that were taken by then are closed, and the
/// variables stay.
pub fn inherited() -> Result<Inherited, ActivationError> {
    let mut all = Inherited::new();
    let own = std::process::id();
    let variable = |name: &str| std::env::var(name).ok();
    let announced = announced(variable, own, own_pidfd_inode())?;
    if announced.is_empty() {
        let is_ours = variable("LISTEN_PID").is_some_and(|pid| pid.parse() == Ok(own));
        if !is_ours || !is_for(variable, own_pidfd_inode())? {
            log_variables_of_another();
        }
    }
    for Announced { number, name } in announced {
        match take_granted(number) {
            Ok(fd) => all.add(name, fd),
            // Of an earlier call, where the variables had to stay.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && all.is_empty() => {
                return Ok(all);
            }
            Err(error) => return Err(ActivationError::Descriptor { number, error }),
        }
    }
    if let Err(error) = remove_environment(&VARIABLES) {
        log::debug!(target: log::HANDOFF, "LISTEN_FDS stays in the environment: {error}");
    }
    Ok(all)
}

impl fmt::Display for ActivationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(variable) => write!(f, "{variable} makes no sense"),
            Self::NamesDoNotMatch { descriptors, names } => {
                write!(f, "{names} names for {descriptors} descriptors")
            }
            Self::Descriptor { number, error } => {
                write!(f, "cannot take inherited descriptor {number}: {error}")
            }
        }
    }
}

impl Error for ActivationError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Descriptor { error, .. } => Some(error),
            _ => None,
        }
    }
}

impl From<ActivationError> for io::Error {
    fn from(error: ActivationError) -> Self {
        match error {
            ActivationError::Descriptor { error, .. } => error,
            _ => Self::new(io::ErrorKind::InvalidInput, error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Vec<(u32, String)>, ActivationError> {
        let lookup = |wanted: &str| {
            let found = variables.iter().find(|(name, _)| *name == wanted);
            found.map(|(_, value)| (*value).to_owned())
        };
        let all = announced(lookup, 42, Some(7))?;
        Ok(all
            .into_iter()
            .map(|each| (each.number, each.name))
            .collect())
    }

    /// E-13, E-14.
    #[test]
    fn numbering_starts_at_three_and_names_are_split_at_colons() {
        let found = parse(&[
            ("LISTEN_PID", "42"),
            ("LISTEN_FDS", "3"),
            ("LISTEN_FDNAMES", "web::admin"),
        ]);
        let expected = [(3, "web"), (4, ""), (5, "admin")];
        assert_eq!(
            found.unwrap(),
            expected.map(|(number, name)| (number, name.to_owned()))
        );
    }

    /// E-14.
    #[test]
    fn missing_names_are_unknown_rather_than_no_descriptors() {
        let found = parse(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "2")]).unwrap();
        assert_eq!(found, [(3, "unknown".into()), (4, "unknown".into())]);
        let found = parse(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "1")]).unwrap();
        assert_eq!(found, [(3, "unknown".into())]);
    }

    /// E-13.
    #[test]
    fn variables_of_another_process_and_nonsense_announce_nothing() {
        for variables in [
            &[][..],
            &[("LISTEN_FDS", "1")],
            &[("LISTEN_PID", "42")],
            &[("LISTEN_PID", "41"), ("LISTEN_FDS", "1")],
            &[("LISTEN_PID", "us"), ("LISTEN_FDS", "1")],
            &[("LISTEN_PID", "42"), ("LISTEN_FDS", "one")],
            &[("LISTEN_PID", "42"), ("LISTEN_FDS", "-1")],
            &[("LISTEN_PID", "42"), ("LISTEN_FDS", "0")],
            &[
                ("LISTEN_PID", "42"),
                ("LISTEN_FDS", "0"),
                ("LISTEN_FDNAMES", ""),
            ],
        ] {
            assert_eq!(parse(variables).unwrap(), [], "{variables:?}");
        }
    }

    /// E-14.
    #[test]
    fn number_that_was_given_out_again_is_told_by_the_pidfd() {
        let with = |inode: &str| {
            parse(&[
                ("LISTEN_PID", "42"),
                ("LISTEN_FDS", "1"),
                ("LISTEN_PIDFDID", inode),
            ])
        };
        assert_eq!(with("7").unwrap().len(), 1);
        assert_eq!(with("8").unwrap(), []);
        assert!(matches!(
            with("seven").unwrap_err(),
            ActivationError::Malformed("LISTEN_PIDFDID")
        ));
        // A kernel that does not know cannot contradict.
        let variable = |name: &str| match name {
            "LISTEN_PID" => Some("42".to_owned()),
            "LISTEN_FDS" | "LISTEN_PIDFDID" => Some("1".to_owned()),
            _ => None,
        };
        assert_eq!(announced(variable, 42, None).unwrap().len(), 1);
    }

    /// E-14.
    #[test]
    fn names_that_do_not_match_and_absurd_counts_are_refused() {
        for names in ["web", "web:admin:more"] {
            let found = parse(&[
                ("LISTEN_PID", "42"),
                ("LISTEN_FDS", "2"),
                ("LISTEN_FDNAMES", names),
            ]);
            let error = found.unwrap_err();
            assert!(
                matches!(
                    error,
                    ActivationError::NamesDoNotMatch { descriptors: 2, .. }
                ),
                "{error}"
            );
        }
        for (count, names, announced) in [("0", "web", 1), ("2", "", 1), ("1", "a:b", 2)] {
            let found = parse(&[
                ("LISTEN_PID", "42"),
                ("LISTEN_FDS", count),
                ("LISTEN_FDNAMES", names),
            ]);
            let error = found.unwrap_err().to_string();
            assert_eq!(error, format!("{announced} names for {count} descriptors"));
        }
        let count = |count: &str| parse(&[("LISTEN_PID", "42"), ("LISTEN_FDS", count)]);
        assert_eq!(count("65536").unwrap().len(), 65_536);
        for absurd in ["65537", "4000000000"] {
            assert!(matches!(
                count(absurd).unwrap_err(),
                ActivationError::Malformed("LISTEN_FDS")
            ));
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_reason() {
        let closed = || io::Error::from(io::ErrorKind::NotFound);
        let reason = closed().to_string();
        for (error, text, source, kind) in [
            (
                ActivationError::Malformed("LISTEN_FDS"),
                "LISTEN_FDS makes no sense",
                None,
                io::ErrorKind::InvalidInput,
            ),
            (
                ActivationError::NamesDoNotMatch {
                    descriptors: 2,
                    names: 3,
                },
                "3 names for 2 descriptors",
                None,
                io::ErrorKind::InvalidInput,
            ),
            (
                ActivationError::Descriptor {
                    number: 7,
                    error: closed(),
                },
                "cannot take inherited descriptor 7: entity not found",
                Some(reason),
                io::ErrorKind::NotFound,
            ),
        ] {
            assert_eq!(error.to_string(), text);
            assert_eq!(error.source().map(ToString::to_string), source);
            assert_eq!(io::Error::from(error).kind(), kind, "{text}");
        }
    }
}
