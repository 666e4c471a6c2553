//! The configured isolators as one: prepares in row order, merges the patches, cleans up in reverse.

use std::sync::Arc;

use super::{Cx, Isolator};
use crate::model::error::Result;
use crate::model::plan::LaunchPlan;
use crate::model::resources::Resources;
use crate::model::stats::CgroupStats;
use crate::model::{ContainerId, PodId, PodSpec};

/// The isolators of this daemon, in row order.
#[derive(Clone)]
pub struct Isolators(Vec<Arc<dyn Isolator>>);

impl Isolators {
    /// Takes isolators that were built already, in prepare order.
    pub fn from_vec(isolators: Vec<Arc<dyn Isolator>>) -> Self {
        Self(isolators)
    }

    /// Names, in prepare order.
    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|i| i.name()).collect()
    }

    /// Prepares the sandbox or container of `cx` and merges what all want. The caller runs [`Isolators::cleanup`] on failure.
    ///
    /// # Errors
    /// The first isolator that fails, by name, or a conflict that names two.
    pub async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPlan> {
        let mut plan = LaunchPlan::for_cx(cx.container.is_some());
        for isolator in &self.0 {
            let patch = isolator.prepare(cx).await.map_err(|e| e.within(format!("isolator {}", isolator.name())))?;
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
            isolator.isolate(cx, pid).await.map_err(|e| e.within(format!("isolator {}", isolator.name())))?;
        }
        Ok(())
    }

    /// Calls `update` of all.
    ///
    /// # Errors
    /// The first failure, by name.
    pub async fn update(&self, cx: &Cx<'_>, merged: &Resources) -> Result<()> {
        for isolator in &self.0 {
            isolator.update(cx, merged).await.map_err(|e| e.within(format!("isolator {}", isolator.name())))?;
        }
        Ok(())
    }

    /// The sample of the isolator that answers.
    pub fn usage(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Option<CgroupStats> {
        self.0.iter().find_map(|i| i.usage(pod_id, pod, container))
    }

    /// Cleans up in reverse order, goes on past failures, returns them all as `isolator: error`.
    pub async fn cleanup(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Vec<String> {
        let mut failures = Vec::new();
        for isolator in self.0.iter().rev() {
            if let Err(e) = isolator.cleanup(pod_id, pod, container).await {
                failures.push(format!("{}: {e}", isolator.name()));
            }
        }
        failures
    }

    /// Calls `recover` of all, goes on past failures, returns them all.
    pub async fn recover(&self, known: &[PodId]) -> Vec<String> {
        let mut failures = Vec::new();
        for isolator in &self.0 {
            if let Err(e) = isolator.recover(known).await {
                failures.push(format!("{}: {e}", isolator.name()));
            }
        }
        failures
    }
}
