//! The files of UNIX sockets.

#![forbid(unsafe_code)]

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use super::socket::set_mode_of_held;

/// The identity of the file at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl FileIdentity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Returns the identity of the socket file at `path`, if it is one. Links are not followed.
pub(crate) fn socket_file(path: &Path) -> io::Result<FileIdentity> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.file_type().is_socket() {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists));
    }
    Ok(FileIdentity::of(&metadata))
}

/// A socket file that is held open. No other file gets its inode number meanwhile, even if
/// it is removed.
#[derive(Debug)]
pub(crate) struct HeldFile {
    fd: File,
    metadata: Metadata,
}

impl HeldFile {
    pub(crate) fn identity(&self) -> FileIdentity {
        FileIdentity::of(&self.metadata)
    }
}

/// Opens the socket file at `path` to hold it, as [`socket_file`] finds it.
pub(crate) fn hold_socket_file(path: &Path) -> io::Result<HeldFile> {
    let fd = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)?;
    let metadata = fd.metadata()?;
    if !metadata.file_type().is_socket() {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists));
    }
    Ok(HeldFile { fd, metadata })
}

/// Sets the mode of the socket file at `path` to exactly `mode`, if it is `file`. The file
/// is held open meanwhile, so that it cannot be exchanged for another.
///
/// # Errors
/// `Unsupported` if there is neither fchmodat2(2) (Linux 6.6) nor /proc.
pub(crate) fn set_file_mode(path: &Path, file: FileIdentity, mode: u32) -> io::Result<()> {
    let held = hold_socket_file(path)?;
    if held.identity() != file {
        return Err(io::Error::other("the socket file was exchanged"));
    }
    if held.metadata.permissions().mode() & 0o7777 == mode {
        return Ok(());
    }
    if set_mode_of_held(held.fd.as_fd(), mode).is_ok() {
        return Ok(());
    }
    // chmod(2) works through this link; fchmod(2) refuses O_PATH descriptors.
    let link = format!("/proc/thread-self/fd/{}", held.fd.as_raw_fd());
    match fs::set_permissions(link, Permissions::from_mode(mode)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = "to undo the umask takes fchmodat2 (Linux 6.6) or /proc";
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
        result => result,
    }
}
