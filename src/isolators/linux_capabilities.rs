//! `linux/capabilities`: the default set and what a container adds and drops (cri-behaviour §11).
//!
//! Nobody can give what it does not have: the result is cut down to this process's own sets.

use std::collections::HashSet;

use async_trait::async_trait;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use super::parts::{NoConfig, config, options};
use super::{Cx, Entry, Isolator};
use crate::model::container::Security;
use crate::model::error::{Error, Kind, Result};
use crate::model::plan::LaunchPatch;

const NAME: &str = "linux/capabilities";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        let own = own()?;
        let missing: Vec<_> = DEFAULT.iter().filter(|c| !own.contains(c)).map(ToString::to_string).collect();
        if !missing.is_empty() {
            tracing::warn!(missing = missing.join(" "), "containers do not get capabilities that this process lacks");
        }
        Ok(Box::new(LinuxCapabilitiesIsolator { own }))
    },
};

/// What a container gets that asks for nothing (cri-behaviour §11, the larger of the two common sets).
pub(super) const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

struct LinuxCapabilitiesIsolator {
    /// What this process could give at all.
    own: Capabilities,
}

#[async_trait]
impl Isolator for LinuxCapabilitiesIsolator {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = cx.container else { return Ok(LaunchPatch::default()) };
        let security = &container.spec.security;
        let granted = granted(security, &self.own)?;
        let ambient: Capabilities =
            if security.privileged { HashSet::new() } else { parse_all(&security.capabilities.add_ambient)?.all.intersection(&granted).copied().collect() };
        let mut sets = LinuxCapabilities::default();
        sets.set_bounding(Some(granted.clone()))
            .set_effective(Some(granted.clone()))
            .set_permitted(Some(granted))
            .set_inheritable(Some(ambient.clone()))
            .set_ambient(Some(ambient));
        Ok(LaunchPatch { capabilities: Some(sets), ..LaunchPatch::default() })
    }
}

/// What `security` grants out of `own`. `ALL` counts before single names, and adding before dropping.
///
/// # Errors
/// `InvalidArgument` for unknown names.
pub fn granted(security: &Security, own: &Capabilities) -> Result<Capabilities> {
    if security.privileged {
        return Ok(own.clone());
    }
    let change = &security.capabilities;
    let (add, ambient, drop) = (parse_all(&change.add)?, parse_all(&change.add_ambient)?, parse_all(&change.drop)?);
    let mut set: Capabilities = DEFAULT.into();
    if add.everything {
        set.clone_from(own);
    }
    if drop.everything {
        set.clear();
    }
    set.extend(add.single);
    set.extend(ambient.single);
    set.retain(|c| own.contains(c) && !drop.single.contains(c));
    Ok(set)
}

/// Sets of this process: bounding and permitted together are what a child can be given.
///
/// # Errors
/// When the kernel does not tell.
pub fn own() -> Result<Capabilities> {
    let read = |set| caps::read(None, set).map_err(|e| Error::with(Kind::Internal, "read own capabilities", e));
    let (bounding, permitted) = (read(caps::CapSet::Bounding)?, read(caps::CapSet::Permitted)?);
    // A capability that is newer than the OCI library cannot be named in a spec.
    Ok(bounding.intersection(&permitted).filter_map(|c| one(&c.to_string())).collect())
}

struct Names {
    everything: bool,
    single: Capabilities,
    all: Capabilities,
}

fn parse_all(names: &[String]) -> Result<Names> {
    let mut parsed = Names { everything: false, single: HashSet::new(), all: HashSet::new() };
    for name in names {
        if name.eq_ignore_ascii_case("ALL") {
            parsed.everything = true;
            continue;
        }
        let capability = one(name).ok_or_else(|| Error::invalid(format!("unknown capability {name:?}")))?;
        parsed.single.insert(capability);
    }
    parsed.all = if parsed.everything { own()? } else { parsed.single.clone() };
    Ok(parsed)
}

/// With or without `CAP_`, any case.
fn one(name: &str) -> Option<Capability> {
    let upper = name.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;
    use crate::model::container::CapabilityChange;
    use Capability::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn grant(add: &[&str], drop: &[&str], privileged: bool) -> Capabilities {
        let own: Capabilities = DEFAULT.into_iter().chain([SysAdmin, NetAdmin, SysTime]).collect();
        let capabilities = CapabilityChange { add: names(add), drop: names(drop), add_ambient: Vec::new() };
        granted(&Security { capabilities, privileged, ..Security::default() }, &own).unwrap()
    }

    #[test]
    fn all_counts_before_single_names_and_adding_before_dropping() {
        let default: Capabilities = DEFAULT.into();
        assert_eq!(grant(&[], &[], false), default);
        assert_eq!(
            grant(&["cap_sys_admin"], &["Mknod", "KILL"], false),
            default.iter().copied().chain([SysAdmin]).filter(|c| ![Mknod, Kill].contains(c)).collect()
        );
        assert_eq!(grant(&["NET_ADMIN"], &["ALL"], false), [NetAdmin].into());
        assert_eq!(grant(&["all"], &["NET_ADMIN"], false), default.iter().copied().chain([SysAdmin, SysTime]).collect());
        assert_eq!(grant(&["ALL", "CHOWN"], &["ALL"], false), [Chown].into());
        assert_eq!(grant(&["CHOWN"], &["CHOWN"], false).len(), DEFAULT.len() - 1);
    }

    #[test]
    fn nobody_gives_what_it_lacks() {
        assert!(!grant(&["SYS_RESOURCE"], &[], false).contains(&SysResource));
        assert_eq!(grant(&[], &["ALL"], true).len(), DEFAULT.len() + 3);
        assert!(granted(&Security::default(), &[Chown].into()).unwrap() == [Chown].into());
    }

    #[tokio::test]
    async fn ambient_goes_into_all_five_sets_and_nothing_else_is_inheritable() {
        let mut bench = Bench::new();
        let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
        let sets = bench.prepare(&*isolator).await.unwrap().capabilities.unwrap();
        assert_eq!((sets.ambient().as_ref(), sets.inheritable().as_ref()), (Some(&HashSet::new()), Some(&HashSet::new())));

        bench.spec.security.capabilities = CapabilityChange { add: vec![], drop: names(&["ALL"]), add_ambient: names(&["net_bind_service"]) };
        let sets = bench.prepare(&*isolator).await.unwrap().capabilities.unwrap();
        for set in [sets.bounding(), sets.effective(), sets.permitted(), sets.inheritable(), sets.ambient()] {
            assert_eq!(set, &Some([NetBindService].into()));
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        for bad in ["", "CAP_", "NET", "CAP_CAP_KILL", "KILL "] {
            let capabilities = CapabilityChange { drop: names(&[bad]), ..CapabilityChange::default() };
            assert!(granted(&Security { capabilities, ..Security::default() }, &HashSet::new()).is_err(), "{bad:?}");
        }
    }
}
