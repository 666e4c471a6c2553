//! `linux/nnp`: `PR_SET_NO_NEW_PRIVS` for containers that ask for it. The smallest isolator; read it first.

use async_trait::async_trait;

use super::parts::{NoConfig, config, options};
use super::{Cx, Entry, Isolator};
use crate::model::error::Result;
use crate::model::plan::LaunchPatch;

const NAME: &str = "linux/nnp";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(Nnp))
    },
};

struct Nnp;

#[async_trait]
impl Isolator for Nnp {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let no_new_privileges = cx.container.map(|c| c.spec.security.no_new_privs);
        Ok(LaunchPatch { no_new_privileges, ..LaunchPatch::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    #[tokio::test]
    async fn only_when_asked_for() {
        let mut bench = Bench::new();
        assert_eq!(bench.prepare_sandbox(&Nnp).await.unwrap(), LaunchPatch::default());
        for asked in [false, true] {
            bench.spec.security.no_new_privs = asked;
            assert_eq!(bench.prepare(&Nnp).await.unwrap().no_new_privileges, Some(asked));
        }
    }
}
