//! The `delete` verb: cleans up after a shim that was killed, from what it recorded in the bundle, and says how the container
//! ended (by our hand: nobody else can know). containerd runs it in the bundle and reads a protobuf message.

use std::io::Write;
use std::path::PathBuf;

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
    let bytes = response.write_to_bytes().map_err(|e| Error::with(Kind::Internal, "encode answer", e))?;
    std::io::stdout().write_all(&bytes).act("write", "answer")
}
