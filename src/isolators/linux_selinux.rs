//! `linux/selinux`: the SELinux label of a container (cri-behaviour §11).
//!
//! Labels are checked on every host. A host without SELinux has nothing to label; on one with SELinux, labels asked for in full are
//! applied, and the allocation of level pairs for those that are not is not built, so nothing is labelled then.

use std::path::Path;

use async_trait::async_trait;

use super::parts::{NoConfig, config, options};
use super::{Cx, Entry, Isolator};
use crate::model::container::SelinuxOptions;
use crate::model::error::{Error, Result};
use crate::model::plan::LaunchPatch;

const NAME: &str = "linux/selinux";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(Selinux { enabled: Path::new("/sys/fs/selinux/enforce").exists() }))
    },
};

struct Selinux {
    enabled: bool,
}

#[async_trait]
impl Isolator for Selinux {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = cx.container else { return Ok(LaunchPatch::default()) };
        let Some(options) = &container.spec.security.selinux else { return Ok(LaunchPatch::default()) };
        check(options)?;
        let label = self.enabled && !container.spec.security.privileged && !options.level.is_empty();
        Ok(LaunchPatch {
            selinux_label: label.then(|| process_label(options)),
            mount_label: label.then(|| format!("system_u:object_r:container_file_t:{}", options.level)),
            ..LaunchPatch::default()
        })
    }
}

fn check(options: &SelinuxOptions) -> Result<()> {
    for part in [&options.user, &options.role, &options.r#type] {
        if !part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.')) {
            return Err(Error::invalid(format!("SELinux label part {part:?} is no word")));
        }
    }
    if !options.level.is_empty() && !valid_level(&options.level) {
        return Err(Error::invalid(format!("SELinux level {:?} is not of the form s0[-s0][:c1[.c2][,c3]...]", options.level)));
    }
    Ok(())
}

/// Parts that are not given are the usual container label's.
fn process_label(options: &SelinuxOptions) -> String {
    let or = |part: &str, default: &'static str| if part.is_empty() { default.to_owned() } else { part.to_owned() };
    format!("{}:{}:{}:{}", or(&options.user, "system_u"), or(&options.role, "system_r"), or(&options.r#type, "container_t"), options.level)
}

/// `s0`, `s0-s0`, each maybe with `:c0.c1023` or `:c1,c2`.
fn valid_level(level: &str) -> bool {
    let numbered = |text: &str, letter: char| text.strip_prefix(letter).is_some_and(|n| !n.is_empty() && n.len() <= 4 && n.bytes().all(|b| b.is_ascii_digit()));
    let sensitivity = |range: &str| range.split_once('-').map_or_else(|| numbered(range, 's'), |(low, high)| numbered(low, 's') && numbered(high, 's'));
    let category = |c: &str| c.split_once('.').map_or_else(|| numbered(c, 'c'), |(low, high)| numbered(low, 'c') && numbered(high, 'c'));
    match level.split_once(':') {
        Some((range, categories)) => sensitivity(range) && categories.split(',').all(category),
        None => sensitivity(level),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    #[test]
    fn levels() {
        for good in ["s0", "s0-s0", "s0:c1", "s0:c1,c2", "s0-s0:c0.c1023", "s0:c1,c2.c4,c1023"] {
            assert!(valid_level(good), "{good}");
        }
        for bad in ["", "s", "s0:", "c1", "s0:c", "s0:c1,", "s0:c1:c2", "s0-", "s0 ", "wrong", "s0:c1.c2.c3", "s0,c1", "s0:c12345"] {
            assert!(!valid_level(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_bad_level_is_refused_even_where_nothing_is_labelled() {
        let mut bench = Bench::new();
        for enabled in [false, true] {
            let isolator = Selinux { enabled };
            bench.spec.security.selinux = Some(SelinuxOptions { level: "bad".into(), ..SelinuxOptions::default() });
            assert!(bench.prepare(&isolator).await.is_err());
            bench.spec.security.selinux = Some(SelinuxOptions { user: "a:b".into(), ..SelinuxOptions::default() });
            assert!(bench.prepare(&isolator).await.is_err());
            bench.spec.security.selinux = Some(SelinuxOptions { level: "s0:c1,c2".into(), r#type: "spc_t".into(), ..SelinuxOptions::default() });
            let label = bench.prepare(&isolator).await.unwrap().selinux_label;
            assert_eq!(label.as_deref(), enabled.then_some("system_u:system_r:spc_t:s0:c1,c2"));
        }
    }
}
