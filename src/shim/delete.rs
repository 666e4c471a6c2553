//! The `delete` verb: cleans up after a shim that was killed, from what it recorded in the bundle, and says how the container
//! ended (by our hand: nobody else can know). containerd runs it in the bundle and reads a protobuf message.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::args::Args;
use super::{kill, task};
use crate::disk::bundle::{self, Of};
use crate::model::error::{Act, Error, Kind, Result};
use crate::stdx::clock::now_ns;

/// 128 + SIGKILL.
const KILLED: u32 = 137;

/// Runs the verb.
pub fn delete(args: &Args) -> Result<()> {
    let bundle = args.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let mut response = DeleteResponse::new();
    response.exit_status = KILLED;
    response.exited_at = MessageField::some(task::timestamp(now_ns()));
    for of in [Of::Task, Of::Sandbox] {
        if let Some(made) = bundle::read(&bundle, of)? {
            kill::recorded(&made);
            response.pid = made.process.map_or(response.pid, |process| process.pid);
        }
    }
    remove_socket(&bundle)?;
    let bytes = response.write_to_bytes().map_err(|e| Error::with(Kind::Internal, "encode answer", e))?;
    std::io::stdout().write_all(&bytes).act("write", "answer")
}

/// The socket of the shim that left the bundle, unless somebody serves there: a shim of several containers may live on.
fn remove_socket(dir: &Path) -> Result<()> {
    let Ok(address) = std::fs::read_to_string(dir.join(bundle::ADDRESS)) else { return Ok(()) };
    let Some(socket) = address.trim().strip_prefix("unix://").filter(|socket| UnixStream::connect(socket).is_err()) else { return Ok(()) };
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).act("remove", socket),
        _ => Ok(()),
    }
}
