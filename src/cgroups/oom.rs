//! A descriptor that becomes readable when a group may have run out of memory. The counter tells whether it did:
//! [`crate::cgroups::Manager::oom_kills`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::fs::{Mode, OFlags};

use super::host::{Controller, Version};
use super::manager::Manager;
use crate::model::error::{Act, Error, Kind, Result};

/// The watch. Poll it for reading; then [`OomWatch::clear`] and look at the counter.
#[derive(Debug)]
pub struct OomWatch(OwnedFd);

impl OomWatch {
    /// Takes pending notices, so that the descriptor is quiet until the next.
    pub fn clear(&self) {
        // Larger than an inotify event without a name; non-blocking, so the loop ends.
        let mut buf = [0u8; 256];
        while rustix::io::read(&self.0, &mut buf).is_ok_and(|n| n > 0) {}
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Manager {
    /// Watches the group. v1: an eventfd on `memory.oom_control` (also fires when the group is removed); v2: inotify on
    /// `memory.events`.
    ///
    /// # Errors
    /// `Unimplemented` without a memory controller, I/O errors with the file.
    pub fn watch_oom(&self) -> Result<OomWatch> {
        let memory = self
            .host
            .locate(Controller::Memory)
            .ok_or_else(|| Error::new(Kind::Unimplemented, format!("watch cgroup {}: this host has no memory controller", self.path)))?;
        let group = self.group(memory);
        match memory.version {
            Version::V1 => {
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).act("create eventfd for", group.dir().display())?;
                let path = group.dir().join("memory.oom_control");
                let control = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).act("open", path.display())?;
                group.write("cgroup.event_control", &format!("{} {}", event.as_raw_fd(), control.as_raw_fd()))?;
                Ok(OomWatch(event.into()))
            }
            Version::V2 => {
                let path = group.dir().join("memory.events");
                let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).act("create inotify for", path.display())?;
                inotify.add_watch(&path, AddWatchFlags::IN_MODIFY).act("watch", path.display())?;
                Ok(OomWatch(inotify.into()))
            }
        }
    }
}
