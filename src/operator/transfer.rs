//! Archives over the wire: images sent to us, images sent out.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Status, Streaming};

use super::status;
use crate::model::ImageId;
use crate::model::error::Error;
use crate::provisioner::Upkeep;
use crate::provisioner::save::Format;
use crate::wire::operator as api;

/// Pieces of an archive between the store and the client.
const PIECES: usize = 4;

/// An archive on its way to the client.
pub(super) type Outgoing = Pin<Box<dyn Stream<Item = Result<api::Piece, Status>> + Send>>;

/// Takes an archive in and imports it. A client that leaves in the middle takes everything with it.
pub(super) async fn import(upkeep: &dyn Upkeep, mut pieces: Streaming<api::Piece>) -> Result<Vec<ImageId>, Status> {
    let mut incoming = upkeep.import().await.map_err(|e| status(&e))?;
    while let Some(piece) = pieces.message().await? {
        incoming.write(piece.bytes.into()).await.map_err(|e| status(&e))?;
    }
    incoming.finish().await.map_err(|e| status(&e))
}

/// Sends images out. A client that leaves closes the channel, which ends the work at its next piece.
pub(super) fn save(upkeep: &Arc<dyn Upkeep>, request: api::SaveRequest) -> Result<Outgoing, Status> {
    let format: Format = if request.format.is_empty() { Format::default() } else { request.format.parse().map_err(|e: Error| status(&e))? };
    let (to, pieces) = mpsc::channel(PIECES);
    let (done, result) = mpsc::channel(1);
    let upkeep = upkeep.clone();
    tokio::spawn(async move {
        if let Err(e) = upkeep.save(request.images, format, to).await {
            // The client may have left; then nobody wants to know.
            let _ = done.send(Err(status(&e))).await;
        }
    });
    let pieces = ReceiverStream::new(pieces).map(|bytes| Ok(api::Piece { bytes: bytes.to_vec() }));
    Ok(Box::pin(pieces.chain(ReceiverStream::new(result))))
}
