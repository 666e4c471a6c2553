//! What those who look after a node need of the store: what fills it, what would go, what is damaged. The fronts of operators
//! and of Mesos call this; containers never do.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::engine::{Inner, Provisioner};
use super::gc::{Outcome, Plan, Request, df, why};
use super::pullers::archive::Incoming;
use super::save::{self, Format};
use super::scrub;
use crate::model::error::Result;
use crate::stdx::blocking;

/// Care of the store.
#[async_trait]
pub trait Upkeep: Send + Sync {
    /// What a collection would remove, in order, and who keeps the rest.
    ///
    /// # Errors
    /// `InvalidArgument` for requests that make no sense, I/O failures.
    async fn plan(&self, request: Request) -> Result<Plan>;

    /// Does exactly what the plan says.
    ///
    /// # Errors
    /// `FailedPrecondition`, saying what changed, when the store is not what it was; `InvalidArgument` for a plan of another store.
    async fn apply(&self, plan: Plan) -> Result<Outcome>;

    /// Plans and acts at once, as Mesos's PRUNE_IMAGES does.
    ///
    /// # Errors
    /// As [`Upkeep::plan`].
    async fn collect(&self, request: Request) -> Result<Outcome>;

    /// Names every byte of the store.
    ///
    /// # Errors
    /// I/O failures.
    async fn df(&self) -> Result<df::Report>;

    /// Who holds a path, digest, image or container.
    ///
    /// # Errors
    /// `NotFound`.
    async fn why(&self, key: &str) -> Result<Vec<why::Answer>>;

    /// Takes the digests of all layers again, marks what is damaged, and fetches it anew if asked. Takes as long as reading the store.
    ///
    /// # Errors
    /// I/O failures of the store itself; damaged layers are in the report.
    async fn scrub(&self, request: scrub::Request) -> Result<scrub::Report>;

    /// Begins to take in an archive that somebody sends.
    ///
    /// # Errors
    /// I/O failures.
    async fn import(&self) -> Result<Incoming>;

    /// Sends the images that `keys` name to `to` as one archive; ends early when the other end is dropped.
    ///
    /// # Errors
    /// `NotFound`, `DataLoss` for a layer known to be damaged, I/O failures.
    async fn save(&self, keys: Vec<String>, format: Format, to: mpsc::Sender<Bytes>) -> Result<()>;
}

async fn on<T: Send + 'static>(what: &'static str, inner: &Arc<Inner>, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
    let inner = inner.clone();
    blocking::run(what, move || work(&inner)).await
}

#[async_trait]
impl Upkeep for Provisioner {
    async fn plan(&self, request: Request) -> Result<Plan> {
        let request = request.checked()?;
        on("plan collection", &self.inner, move |inner| inner.plan(request)).await
    }

    async fn apply(&self, plan: Plan) -> Result<Outcome> {
        plan.request.clone().checked()?;
        on("apply plan", &self.inner, move |inner| inner.apply(&plan)).await
    }

    async fn collect(&self, request: Request) -> Result<Outcome> {
        let request = request.checked()?;
        on("collect images", &self.inner, move |inner| inner.run(request)).await
    }

    async fn df(&self) -> Result<df::Report> {
        on("count the store", &self.inner, Inner::df).await
    }

    async fn why(&self, key: &str) -> Result<Vec<why::Answer>> {
        let key = key.to_owned();
        on("explain", &self.inner, move |inner| inner.why(&key)).await
    }

    async fn scrub(&self, request: scrub::Request) -> Result<scrub::Report> {
        scrub::scrub(&self.inner, request).await
    }

    async fn import(&self) -> Result<Incoming> {
        Incoming::begin(&self.inner).await
    }

    async fn save(&self, keys: Vec<String>, format: Format, to: mpsc::Sender<Bytes>) -> Result<()> {
        save::save(&self.inner, keys, format, to).await
    }
}
