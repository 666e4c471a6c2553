//! Commands in containers (cri-behaviour §8).

use std::time::Duration;

use super::{Front, MAX_MESSAGE_BYTES, named};
use crate::launcher::ExecSpec;
use crate::model::error::{Error, Result};
use crate::wire::cri as wire;

/// Bytes kept of each stream.
const MAX_STREAM_BYTES: usize = 16 << 20;
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
    let exec = ExecSpec { args: request.cmd, terminal: false, timeout: (timeout > 0).then(|| Duration::from_secs(timeout)), output_limit: MAX_STREAM_BYTES };
    let output = front.engine.exec_sync(named(&request.container_id)?, exec).await?;
    let mut answer = wire::ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.code };
    fit(&mut answer);
    Ok(answer)
}

/// Cuts the longer stream until the answer fits into one message: a full stream alone would exceed it, and then nothing at all
/// would arrive.
fn fit(answer: &mut wire::ExecSyncResponse) {
    let room = MAX_MESSAGE_BYTES - MESSAGE_OVERHEAD;
    let (shorter, longer) =
        if answer.stdout.len() < answer.stderr.len() { (&mut answer.stdout, &mut answer.stderr) } else { (&mut answer.stderr, &mut answer.stdout) };
    shorter.truncate(room / 2);
    longer.truncate(room - shorter.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn answers_always_fit() {
        let full = vec![b'x'; MAX_STREAM_BYTES];
        for (stdout, stderr) in [(full.clone(), full.clone()), (full.clone(), Vec::new()), (vec![1; 5], full.clone())] {
            let mut answer = wire::ExecSyncResponse { stdout, stderr, exit_code: -1 };
            let short = answer.stdout.len().min(answer.stderr.len());
            fit(&mut answer);
            assert!(answer.encoded_len() <= MAX_MESSAGE_BYTES, "{}", answer.encoded_len());
            assert!(answer.encoded_len() >= MAX_MESSAGE_BYTES - 2 * MESSAGE_OVERHEAD, "{}", answer.encoded_len());
            assert_eq!(answer.stdout.len().min(answer.stderr.len()), short.min(MAX_MESSAGE_BYTES / 2 - MESSAGE_OVERHEAD / 2));
        }
        let mut small = wire::ExecSyncResponse { stdout: vec![1], stderr: vec![2], exit_code: 3 };
        fit(&mut small);
        assert_eq!((small.stdout.len(), small.stderr.len()), (1, 1));
    }
}
