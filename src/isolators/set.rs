//! The configured isolators as one: prepares in row order, merges the patches, cleans up in reverse.

use std::sync::Arc;

use tracing::{Instrument, Span};

use super::{Cx, Deps, ENTRIES, Isolator};
use crate::model::error::{Error, Result};
use crate::model::image::Image;
use crate::model::plan::LaunchPlan;
use crate::model::resources::Resources;
use crate::model::stats::CgroupStats;
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};

/// The isolators of this daemon, in row order.
#[derive(Clone)]
pub struct Isolators(Vec<Arc<dyn Isolator>>);

impl Isolators {
    /// Makes the isolators named in `isolation`, in row order. `config` holds one table per isolator name.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is not in the registry (names match as a whole), one that is listed twice, a missing
    /// requirement and unknown keys; and what the isolator itself refuses.
    pub fn build(isolation: &[String], config: &toml::Table, deps: &Deps) -> Result<Self> {
        Self::check(isolation, config)?;
        let mut built: Vec<Arc<dyn Isolator>> = Vec::with_capacity(isolation.len());
        for entry in ENTRIES.iter().filter(|entry| isolation.iter().any(|name| name == entry.name)) {
            built.push(Arc::from((entry.create)(deps, table(entry.name, config)?)?));
        }
        Ok(Self(built))
    }

    /// Whether `isolation` can be built, as far as names and options tell. Touches nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is unknown or listed twice, or whose requirement is not listed, and for options that are
    /// unknown or of the wrong form, also of isolators that are not listed.
    pub fn check(isolation: &[String], config: &toml::Table) -> Result<()> {
        Self::options(isolation, config)?;
        let listed = |name: &str| isolation.iter().filter(|n| *n == name).count();
        for entry in ENTRIES.iter().filter(|entry| listed(entry.name) > 0) {
            if listed(entry.name) > 1 {
                return Err(Error::invalid(format!("isolator {} is listed twice", entry.name)));
            }
            if let Some(missing) = entry.requires.iter().find(|name| listed(name) == 0) {
                return Err(Error::invalid(format!("isolator {} requires {missing}, which is not listed", entry.name)));
            }
        }
        Ok(())
    }

    /// The options of every isolator that is listed or configured, defaults included, by its name; those without any are left out.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown isolator, an unknown option or a value of the wrong form.
    pub fn options(isolation: &[String], config: &toml::Table) -> Result<toml::Table> {
        for name in isolation.iter().chain(config.keys()) {
            if !ENTRIES.iter().any(|entry| entry.name == name) {
                let known: Vec<_> = ENTRIES.iter().map(|entry| entry.name).collect();
                return Err(Error::invalid(format!("unknown isolator {name:?}; there are {}", known.join(", "))));
            }
        }
        let mut all = toml::Table::new();
        for entry in ENTRIES.iter().filter(|entry| config.contains_key(entry.name) || isolation.iter().any(|name| name == entry.name)) {
            let options = (entry.options)(table(entry.name, config)?)?;
            if !options.is_empty() {
                all.insert(entry.name.to_owned(), toml::Value::Table(options));
            }
        }
        Ok(all)
    }

    /// Takes isolators that were built already, in prepare order.
    pub fn from_vec(isolators: Vec<Arc<dyn Isolator>>) -> Self {
        Self(isolators)
    }

    /// Names, in prepare order.
    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|i| i.name()).collect()
    }

    /// Has all fill in what the image says and the caller does not.
    ///
    /// # Errors
    /// The first failure, by name.
    pub fn complete(&self, spec: &mut ContainerSpec, image: &Image) -> Result<()> {
        self.0.iter().try_for_each(|i| i.complete(spec, image).map_err(|e| e.within(format!("isolator {}", i.name()))))
    }

    /// Prepares the sandbox or container of `cx` and merges what all want. The caller runs [`Isolators::cleanup`] on failure.
    ///
    /// # Errors
    /// The first isolator that fails, by name, or a conflict that names two.
    pub async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPlan> {
        let mut plan = LaunchPlan::for_cx(cx.container.is_some());
        for isolator in &self.0 {
            let patch = isolator.prepare(cx).instrument(span_in(isolator.name(), cx)).await.map_err(|e| e.within(format!("isolator {}", isolator.name())))?;
            plan.apply(isolator.name(), patch)?;
        }
        plan.finish();
        Ok(plan)
    }

    /// Calls `isolate` of all.
    ///
    /// # Errors
    /// The first failure, by name.
    pub async fn isolate(&self, cx: &Cx<'_>, pid: u32) -> Result<()> {
        for isolator in &self.0 {
            isolator.isolate(cx, pid).instrument(span_in(isolator.name(), cx)).await.map_err(|e| e.within(format!("isolator {}", isolator.name())))?;
        }
        Ok(())
    }

    /// Calls `update` of all. Whether one of them has written the limits.
    ///
    /// # Errors
    /// The first failure, by name.
    pub async fn update(&self, cx: &Cx<'_>, merged: &Resources) -> Result<bool> {
        let mut written = false;
        for isolator in &self.0 {
            let updated = isolator.update(cx, merged).instrument(span_in(isolator.name(), cx)).await;
            written |= updated.map_err(|e| e.within(format!("isolator {}", isolator.name())))?;
        }
        Ok(written)
    }

    /// The sample of the isolator that answers.
    pub fn usage(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Option<CgroupStats> {
        self.0.iter().find_map(|i| i.usage(pod_id, pod, container))
    }

    /// The first answer to [`super::Isolator::oom_kills`].
    pub fn oom_kills(&self, pod_id: &PodId, pod: &PodSpec, container: &ContainerId) -> Option<u64> {
        self.0.iter().find_map(|i| i.oom_kills(pod_id, pod, container))
    }

    /// Cleans up in reverse order, goes on past failures, returns them all as `isolator: error`.
    pub async fn cleanup(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Vec<String> {
        let mut failures = Vec::new();
        for isolator in self.0.iter().rev() {
            if let Err(e) = isolator.cleanup(pod_id, pod, container).instrument(span(isolator.name(), pod_id, container)).await {
                failures.push(format!("{}: {e}", isolator.name()));
            }
        }
        failures
    }

    /// Calls `recover` of all, goes on past failures, returns them all.
    pub async fn recover(&self, known: &[PodId]) -> Vec<String> {
        let mut failures = Vec::new();
        for isolator in &self.0 {
            let span = tracing::debug_span!("isolator", isolator = isolator.name());
            if let Err(e) = isolator.recover(known).instrument(span).await {
                failures.push(format!("{}: {e}", isolator.name()));
            }
        }
        failures
    }
}

/// The configuration table of one isolator.
fn table(name: &str, config: &toml::Table) -> Result<toml::Table> {
    match config.get(name) {
        None => Ok(toml::Table::new()),
        Some(toml::Value::Table(table)) => Ok(table.clone()),
        Some(_) => Err(Error::invalid(format!("configuration of isolator {name} is not a table"))),
    }
}

/// The span of one isolator's part in a step on a pod or container.
fn span(isolator: &'static str, pod: &PodId, container: Option<&ContainerId>) -> Span {
    tracing::debug_span!("isolator", isolator, %pod, container = container.map(tracing::field::display))
}

fn span_in(isolator: &'static str, cx: &Cx<'_>) -> Span {
    span(isolator, cx.pod_id, cx.container.map(|c| c.id))
}
