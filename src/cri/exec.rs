//! Commands in containers (cri-behaviour §8).

use std::time::Duration;

use super::{Front, MAX_MESSAGE_BYTES, named};
use crate::launcher::ExecSpec;
use crate::model::error::{Error, Result};
use crate::wire::cri as wire;

/// Bytes of output kept: what fits into one answer. A longer one would not arrive at all.
const MAX_OUTPUT_BYTES: usize = MAX_MESSAGE_BYTES - MESSAGE_OVERHEAD;
/// What the answer needs besides the two streams: tags, lengths, exit code.
const MESSAGE_OVERHEAD: usize = 64;

pub(super) async fn sync(front: &Front, request: wire::ExecSyncRequest) -> Result<wire::ExecSyncResponse> {
    if request.cmd.is_empty() {
        return Err(Error::invalid("cmd is empty"));
    }
    if request.cmd.iter().any(|word| word.contains('\0')) {
        return Err(Error::invalid("cmd cannot hold a NUL byte"));
    }
    let timeout = u64::try_from(request.timeout).map_err(|_| Error::invalid(format!("timeout is negative: {}", request.timeout)))?;
    let exec = ExecSpec { args: request.cmd, terminal: false, timeout: (timeout > 0).then(|| Duration::from_secs(timeout)), output_limit: MAX_OUTPUT_BYTES };
    let output = front.engine.exec_sync(named(&request.container_id)?, exec).await?;
    Ok(wire::ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.code })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn the_longest_answers_fit() {
        for stdout in [0, 1, MAX_OUTPUT_BYTES / 2, MAX_OUTPUT_BYTES] {
            let answer = wire::ExecSyncResponse { stdout: vec![1; stdout], stderr: vec![2; MAX_OUTPUT_BYTES - stdout], exit_code: -1 };
            assert!(answer.encoded_len() <= MAX_MESSAGE_BYTES, "{}", answer.encoded_len());
        }
    }
}
