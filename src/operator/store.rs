//! Care of the image store: documents in, documents out.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::error::{Act as _, Error, Kind, Result};
use crate::provisioner::Upkeep;
use crate::wire::operator::Document;

pub(super) async fn plan(upkeep: &dyn Upkeep, request: Document) -> Result<Document> {
    write(&upkeep.plan(read("collection request", &request)?).await?)
}

pub(super) async fn apply(upkeep: &dyn Upkeep, plan: Document) -> Result<Document> {
    write(&upkeep.apply(read("collection plan", &plan)?).await?)
}

pub(super) async fn collect(upkeep: &dyn Upkeep, request: Document) -> Result<Document> {
    write(&upkeep.collect(read("collection request", &request)?).await?)
}

pub(super) async fn disk_usage(upkeep: &dyn Upkeep) -> Result<Document> {
    write(&upkeep.df().await?)
}

pub(super) async fn explain(upkeep: &dyn Upkeep, key: &str) -> Result<Document> {
    write(&upkeep.why(key).await?)
}

pub(super) async fn scrub(upkeep: &dyn Upkeep, request: Document) -> Result<Document> {
    write(&upkeep.scrub(read("scrub request", &request)?).await?)
}

fn read<T: DeserializeOwned>(what: &str, document: &Document) -> Result<T> {
    serde_json::from_str(&document.json).map_err(|e| Error::with(Kind::InvalidArgument, format!("read {what}"), e))
}

fn write<T: Serialize>(value: &T) -> Result<Document> {
    Ok(Document { json: serde_json::to_string(value).act("encode", "answer")? })
}
