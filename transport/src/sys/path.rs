//! The files of UNIX sockets.

#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Which file stands at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// The socket file at `path`, if it is one; links are not followed.
pub(crate) fn socket_file(path: &Path) -> io::Result<FileIdentity> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.file_type().is_socket() {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists));
    }
    Ok(FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
    })
}

/// Gives the socket file at `path` exactly `mode`, if it is `file`: the file is
/// held by a descriptor meanwhile, so that it cannot be exchanged for another.
pub(crate) fn set_file_mode(path: &Path, file: FileIdentity, mode: u32) -> io::Result<()> {
    let held: OwnedFd = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)?
        .into();
    // chmod(2) works through this link, fchmod(2) refuses O_PATH descriptors.
    let held_path = format!("/proc/self/fd/{}", held.as_raw_fd());
    let metadata = fs::metadata(&held_path)?;
    if (metadata.dev(), metadata.ino()) != (file.device, file.inode) {
        return Err(io::Error::other("the socket file was exchanged"));
    }
    if metadata.permissions().mode() & 0o7777 == mode {
        return Ok(());
    }
    fs::set_permissions(&held_path, Permissions::from_mode(mode))
}
