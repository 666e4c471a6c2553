//! `linux/apparmor`: the AppArmor profile of a container (cri-behaviour §11). A host without AppArmor cannot confine, so it
//! refuses every wish to.
//!
//! There is no profile of our own yet: unset and `RuntimeDefault` leave a container unconfined on a host with AppArmor unless
//! `runtime_default` names a loaded profile.

use std::path::Path;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::parts::{config, options};
use super::{Cx, Entry, Isolator};
use crate::model::container::SecurityProfile;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::plan::LaunchPatch;

const NAME: &str = "linux/apparmor";
/// The kernel's list of loaded profiles: `name (mode)` per line.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<Config>(NAME, table),
    create: |_, table| {
        Ok(Box::new(AppArmor {
            config: config(NAME, table)?,
            enabled: Path::new("/sys/module/apparmor/parameters/enabled").exists() && Path::new(PROFILES).exists(),
        }))
    },
};

/// Options of `linux/apparmor`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Loaded profile that containers get which ask for the runtime's default or for nothing; empty: `unconfined`.
    pub runtime_default: String,
}

struct AppArmor {
    config: Config,
    enabled: bool,
}

#[async_trait]
impl Isolator for AppArmor {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = cx.container else { return Ok(LaunchPatch::default()) };
        let security = &container.spec.security;
        let loaded = || std::fs::read_to_string(PROFILES).act("read", PROFILES);
        let apparmor_profile = self.profile(security.apparmor.as_ref(), security.privileged, loaded)?;
        Ok(LaunchPatch { apparmor_profile, ..LaunchPatch::default() })
    }
}

impl AppArmor {
    /// The profile for `wish`; `loaded` gives the kernel's list, and is asked only when a name must be looked up.
    fn profile(&self, wish: Option<&SecurityProfile>, privileged: bool, loaded: impl FnOnce() -> Result<String>) -> Result<Option<String>> {
        let name = match wish {
            None | Some(SecurityProfile::Unconfined) if !self.enabled => return Ok(None),
            Some(SecurityProfile::Unconfined) => return Ok(Some("unconfined".to_owned())),
            Some(_) if !self.enabled => return Err(Error::precondition("AppArmor profile asked for, but this host has no AppArmor")),
            // Privileged: only what is asked for by name.
            None | Some(SecurityProfile::RuntimeDefault) if privileged => return Ok(None),
            None | Some(SecurityProfile::RuntimeDefault) if self.config.runtime_default.is_empty() => return Ok(None),
            None | Some(SecurityProfile::RuntimeDefault) => &self.config.runtime_default,
            Some(SecurityProfile::Localhost(name)) => name,
        };
        let name = name.strip_prefix("localhost/").unwrap_or(name);
        if name.is_empty() || !is_loaded(name, &loaded()?) {
            return Err(Error::new(Kind::InvalidArgument, format!("AppArmor profile {name:?} is not loaded")));
        }
        Ok(Some(name.to_owned()))
    }
}

fn is_loaded(name: &str, profiles: &str) -> bool {
    profiles.lines().any(|line| line.rsplit_once(" (").is_some_and(|(loaded, _)| loaded == name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use SecurityProfile::{Localhost, RuntimeDefault, Unconfined};

    fn profile(enabled: bool, default: &str, wish: Option<SecurityProfile>, privileged: bool) -> Result<Option<String>> {
        let isolator = AppArmor { config: Config { runtime_default: default.into() }, enabled };
        isolator.profile(wish.as_ref(), privileged, || Ok("my profile (enforce)\nother (complain)\n".into()))
    }

    #[test]
    fn a_host_without_apparmor_refuses_to_confine() {
        for wish in [None, Some(Unconfined)] {
            assert_eq!(profile(false, "other", wish, false).unwrap(), None);
        }
        for wish in [RuntimeDefault, Localhost("other".into())] {
            assert_eq!(profile(false, "other", Some(wish), false).unwrap_err().kind, Kind::FailedPrecondition);
        }
    }

    #[test]
    fn profiles_must_be_loaded_under_their_whole_name() {
        assert_eq!(profile(true, "", Some(Localhost("my profile".into())), true).unwrap().as_deref(), Some("my profile"));
        assert_eq!(profile(true, "", Some(Localhost("localhost/other".into())), false).unwrap().as_deref(), Some("other"));
        for bad in ["", "my", "other (complain)", "othe"] {
            assert!(profile(true, "", Some(Localhost(bad.into())), false).is_err(), "{bad:?}");
        }
        assert!(profile(true, "typo", None, false).is_err());
    }

    #[test]
    fn defaults_and_privilege() {
        assert_eq!(profile(true, "other", None, false).unwrap().as_deref(), Some("other"));
        assert_eq!(profile(true, "other", None, true).unwrap(), None);
        assert_eq!(profile(true, "", Some(RuntimeDefault), false).unwrap(), None);
        assert_eq!(profile(true, "other", Some(Unconfined), false).unwrap().as_deref(), Some("unconfined"));
    }
}
