//! What parent and children tell each other: one message type over one `SOCK_SEQPACKET` pair. Its end is a message too: the
//! children's side closes at a successful execve.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

use super::StepError;

/// Larger than any message: a [`StepError`]'s texts are limited, escapes double them at most sixfold.
const MESSAGE_MAX: usize = 32 << 10;

/// From a child to the parent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// Stage 1 has cloned the process; its cgroup will be at this path.
    Spawned { pid: u32, cgroup: Option<String> },
    /// Stage 2 is set up; a terminal's master comes along.
    Ready,
    /// A step failed; the sender ends.
    Failed(StepError),
}

/// The parent's end and the children's end.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

pub(super) fn send(to: BorrowedFd<'_>, message: &Message, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: &[BorrowedFd<'_>] = fd.as_slice();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    rustix::io::retry_on_intr(|| rustix::net::sendmsg(to, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// What the parent hears.
#[derive(Debug)]
pub(super) enum Heard {
    /// A message, and the descriptor that came along.
    Message(Message, Option<OwnedFd>),
    /// All children's ends are closed.
    End,
    /// There is nothing to hear yet.
    Nothing,
}

/// The next message, without waiting for it.
pub(super) fn receive(from: BorrowedFd<'_>) -> io::Result<Heard> {
    // A buffer for the longest message would stay in memory with every shim; most are short.
    let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
    let length = match rustix::io::retry_on_intr(|| rustix::net::recv(from, &mut [0; 1], peek)) {
        Err(rustix::io::Errno::AGAIN) => return Ok(Heard::Nothing),
        Ok((_, 0)) => return Ok(Heard::End),
        length => length?.1.min(MESSAGE_MAX),
    };
    let mut bytes = vec![0; length];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::io::retry_on_intr(|| rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags))?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fd.or(fds.last());
        }
    }
    Ok(Heard::Message(serde_json::from_slice(bytes.get(..got.bytes).unwrap_or_default())?, fd))
}

/// Parent's permission to go on, or between the stages: one byte.
pub(super) fn signal(to: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::io::write(to, &[1]))?;
    Ok(())
}

/// Waits for [`signal`].
///
/// # Errors
/// `EPIPE` when the other side is gone.
pub(super) fn wait(from: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(from.as_fd(), &mut byte))? {
        0 => Err(io::Error::from_raw_os_error(libc::EPIPE)),
        _ => Ok(()),
    }
}
