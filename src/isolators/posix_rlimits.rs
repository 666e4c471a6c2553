//! `posix/rlimits`: resource limits that every container gets. CRI has none per container, so they come from the
//! configuration; without any, a container inherits the shim's.

use std::collections::BTreeMap;

use async_trait::async_trait;
use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType};
use serde::{Deserialize, Serialize};

use super::parts::{config, options};
use super::{Cx, Entry, Isolator};
use crate::model::error::{Error, Kind, Result};
use crate::model::plan::LaunchPatch;

const NAME: &str = "posix/rlimits";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| {
        rlimits(&config(NAME, table.clone())?)?;
        options::<Config>(NAME, table)
    },
    create: |_, table| Ok(Box::new(Rlimits { rlimits: rlimits(&config(NAME, table)?)? })),
};

/// Options of `posix/rlimits`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name as in getrlimit(2) without `RLIMIT_`, any case, to its values: `limits.nofile = { soft = 1024, hard = 4096 }`.
    pub limits: BTreeMap<String, Limit>,
}

/// One limit, in the unit of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// What holds.
    pub soft: u64,
    /// Up to where a process may raise it.
    pub hard: u64,
}

fn rlimits(config: &Config) -> Result<Vec<PosixRlimit>> {
    config.limits.iter().map(|(name, limit)| rlimit(name, *limit)).collect()
}

struct Rlimits {
    rlimits: Vec<PosixRlimit>,
}

#[async_trait]
impl Isolator for Rlimits {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let rlimits = if cx.container.is_some() { self.rlimits.clone() } else { Vec::new() };
        Ok(LaunchPatch { rlimits, ..LaunchPatch::default() })
    }
}

fn rlimit(name: &str, limit: Limit) -> Result<PosixRlimit> {
    let typ: PosixRlimitType = format!("RLIMIT_{}", name.to_ascii_uppercase())
        .parse()
        .map_err(|_| Error::invalid(format!("configuration of isolator {NAME}: no limit is called {name:?}")))?;
    if limit.soft > limit.hard {
        return Err(Error::invalid(format!("configuration of isolator {NAME}: {name}: the soft limit is above the hard one")));
    }
    let built = PosixRlimitBuilder::default().typ(typ).soft(limit.soft).hard(limit.hard).build();
    built.map_err(|e| Error::with(Kind::Internal, "build resource limit", e))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    #[tokio::test]
    async fn containers_get_the_configured_limits_and_nonsense_is_refused() {
        let bench = Bench::new();
        let make = |text: &str| (ENTRY.create)(&bench.deps, text.parse().unwrap());
        let isolator = make("limits.nofile = { soft = 1, hard = 2 }").unwrap();
        let patch = bench.prepare(&*isolator).await.unwrap();
        assert_eq!(patch.rlimits.len(), 1);
        assert_eq!((patch.rlimits[0].typ(), patch.rlimits[0].soft(), patch.rlimits[0].hard()), (PosixRlimitType::RlimitNofile, 1, 2));
        assert!(bench.prepare_sandbox(&*isolator).await.unwrap().rlimits.is_empty());
        for bad in ["limits.files = { soft = 1, hard = 2 }", "limits.nofile = { soft = 2, hard = 1 }", "limits.nofile = { soft = 2 }", "limits.nofile = 1"] {
            assert!(make(bad).is_err(), "{bad}");
        }
    }
}
