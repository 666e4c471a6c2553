//! Security contexts (cri-behaviour §11): who a process is, what it may do, whose namespaces it uses.

use crate::containerizer::Pod;
use crate::model::container::{CapabilityChange, Security, SecurityProfile, SelinuxOptions, UserSpec};
use crate::model::error::{Error, Kind, Result};
use crate::model::pod::{NamespaceMode, Namespaces};
use crate::wire::cri as wire;
use crate::wire::cri::security_profile::ProfileType;

use super::choice;

/// Highest user or group number taken. Larger ones wrap to other users in programs that keep them in 32 bits with a sign.
const MAX_ID: i64 = i32::MAX as i64;

/// Security context of a container in `pod`.
///
/// # Errors
/// `InvalidArgument` for combinations that mean nothing or that the pod does not allow.
#[allow(deprecated)] // old clients still send the two strings
pub fn of_container(wire: wire::LinuxContainerSecurityContext, pod: &Pod) -> Result<Security> {
    if wire.privileged && !pod.spec.privileged {
        return Err(Error::invalid("no privileged container allowed in this pod"));
    }
    let user = UserSpec {
        uid: wire.run_as_user.map(|v| id(v.value, "run_as_user")).transpose()?,
        gid: wire.run_as_group.map(|v| id(v.value, "run_as_group")).transpose()?,
        username: Some(wire.run_as_username).filter(|name| !name.is_empty()),
        supplemental_groups: groups(&wire.supplemental_groups)?,
        strict_groups: strict(wire.supplemental_groups_policy)?,
    };
    if user.gid.is_some() && user.uid.is_none() && user.username.is_none() {
        return Err(Error::invalid("run_as_group needs run_as_user or run_as_username"));
    }
    let capabilities = wire.capabilities.unwrap_or_default();
    Ok(Security {
        privileged: wire.privileged,
        capabilities: CapabilityChange {
            add: capabilities.add_capabilities,
            drop: capabilities.drop_capabilities,
            add_ambient: capabilities.add_ambient_capabilities,
        },
        seccomp: seccomp(wire.seccomp, &wire.seccomp_profile_path)?,
        apparmor: apparmor(wire.apparmor, &wire.apparmor_profile)?,
        selinux: wire.selinux_options.map(selinux).transpose()?,
        user,
        readonly_rootfs: wire.readonly_rootfs,
        no_new_privs: wire.no_new_privs,
        namespaces: container_namespaces(wire.namespace_options.unwrap_or_default(), pod)?,
        masked_paths: wire.masked_paths,
        readonly_paths: wire.readonly_paths,
    })
}

/// Checks the parts of a pod's security context that only its containers will use, and gives its namespaces.
///
/// # Errors
/// As [`of_container`].
#[allow(deprecated)]
pub fn of_pod(wire: wire::LinuxSandboxSecurityContext) -> Result<Namespaces> {
    if wire.run_as_group.is_some() && wire.run_as_user.is_none() {
        return Err(Error::invalid("run_as_group needs run_as_user"));
    }
    wire.run_as_user.map(|v| id(v.value, "run_as_user")).transpose()?;
    wire.run_as_group.map(|v| id(v.value, "run_as_group")).transpose()?;
    groups(&wire.supplemental_groups)?;
    strict(wire.supplemental_groups_policy)?;
    seccomp(wire.seccomp, &wire.seccomp_profile_path)?;
    apparmor(wire.apparmor, "")?;
    wire.selinux_options.map(selinux).transpose()?;
    let namespaces = namespaces(wire.namespace_options.unwrap_or_default())?;
    if matches!(namespaces.pid, NamespaceMode::Target(_)) {
        return Err(Error::invalid("process namespace mode TARGET is for containers"));
    }
    Ok(namespaces)
}

/// Namespace choices as the wire says them, for status.
pub fn namespaces_to_wire(namespaces: &Namespaces) -> wire::NamespaceOption {
    let mode = |mode: &NamespaceMode| match mode {
        NamespaceMode::Pod => wire::NamespaceMode::Pod.into(),
        NamespaceMode::Container => wire::NamespaceMode::Container.into(),
        NamespaceMode::Node => wire::NamespaceMode::Node.into(),
        NamespaceMode::Target(_) => wire::NamespaceMode::Target.into(),
    };
    let target_id = if let NamespaceMode::Target(id) = &namespaces.pid { id.clone() } else { String::new() };
    wire::NamespaceOption { network: mode(&namespaces.network), pid: mode(&namespaces.pid), ipc: mode(&namespaces.ipc), target_id, userns_options: None }
}

/// Network and IPC are the pod's whatever the container says; asking for the host's in a pod that has its own is refused.
fn container_namespaces(wire: wire::NamespaceOption, pod: &Pod) -> Result<Namespaces> {
    let asked = namespaces(wire)?;
    for (name, asked, pods) in [("network", &asked.network, &pod.spec.namespaces.network), ("IPC", &asked.ipc, &pod.spec.namespaces.ipc)] {
        if *asked == NamespaceMode::Node && *pods != NamespaceMode::Node {
            return Err(Error::invalid(format!("the container asks for the host's {name} namespace and its pod has its own")));
        }
    }
    Ok(Namespaces { network: pod.spec.namespaces.network.clone(), ipc: pod.spec.namespaces.ipc.clone(), pid: asked.pid })
}

fn namespaces(wire: wire::NamespaceOption) -> Result<Namespaces> {
    user_namespace(wire.userns_options)?;
    let of_pod = |value: i32, field: &str| match choice(value, field)? {
        wire::NamespaceMode::Pod => Ok(NamespaceMode::Pod),
        wire::NamespaceMode::Node => Ok(NamespaceMode::Node),
        other => Err(Error::invalid(format!("{field} is POD or NODE, not {}", other.as_str_name()))),
    };
    let pid = match choice(wire.pid, "namespace_options.pid")? {
        wire::NamespaceMode::Pod => NamespaceMode::Pod,
        wire::NamespaceMode::Container => NamespaceMode::Container,
        wire::NamespaceMode::Node => NamespaceMode::Node,
        wire::NamespaceMode::Target => NamespaceMode::Target(super::filled(wire.target_id, "namespace_options.target_id")?),
    };
    Ok(Namespaces { network: of_pod(wire.network, "namespace_options.network")?, pid, ipc: of_pod(wire.ipc, "namespace_options.ipc")? })
}

fn user_namespace(wire: Option<wire::UserNamespace>) -> Result<()> {
    let Some(wire) = wire else { return Ok(()) };
    match choice(wire.mode, "userns_options.mode")? {
        wire::NamespaceMode::Node if wire.uids.is_empty() && wire.gids.is_empty() => Ok(()),
        wire::NamespaceMode::Node => Err(Error::invalid("user namespace mode NODE takes no mappings")),
        wire::NamespaceMode::Pod => {
            for (field, ranges) in [("uids", &wire.uids), ("gids", &wire.gids)] {
                match ranges.as_slice() {
                    [range] if range.length > 0 && range.container_id == 0 => {}
                    _ => return Err(Error::invalid(format!("user namespace mode POD takes exactly one range of {field}, from 0 on and not empty"))),
                }
            }
            Err(Error::new(Kind::Unimplemented, "user namespaces for pods are not supported by this runtime"))
        }
        other => Err(Error::invalid(format!("there is no user namespace mode {}", other.as_str_name()))),
    }
}

fn id(value: i64, field: &str) -> Result<u32> {
    if (0..=MAX_ID).contains(&value) {
        u32::try_from(value).map_err(|e| Error::with(Kind::InvalidArgument, field, e))
    } else {
        Err(Error::invalid(format!("{field} is not within 0 and {MAX_ID}: {value}")))
    }
}

fn groups(values: &[i64]) -> Result<Vec<u32>> {
    values.iter().map(|v| id(*v, "supplemental_groups")).collect()
}

fn strict(policy: i32) -> Result<bool> {
    Ok(choice::<wire::SupplementalGroupsPolicy>(policy, "supplemental_groups_policy")? == wire::SupplementalGroupsPolicy::Strict)
}

/// Unset is unconfined; an empty message is the runtime's default (cri-behaviour §24.8). The old string counts when the message is unset.
fn seccomp(profile: Option<wire::SecurityProfile>, old: &str) -> Result<SecurityProfile> {
    let profile = match profile {
        Some(profile) => security_profile(profile, "seccomp")?,
        None => old_profile(old, "seccomp_profile_path")?.unwrap_or_default(),
    };
    match &profile {
        SecurityProfile::Localhost(path) if !path.starts_with('/') => Err(Error::invalid(format!("seccomp profile path is not absolute: {path}"))),
        _ => Ok(profile),
    }
}

fn apparmor(profile: Option<wire::SecurityProfile>, old: &str) -> Result<Option<SecurityProfile>> {
    match profile {
        Some(profile) => security_profile(profile, "apparmor").map(Some),
        None => old_profile(old, "apparmor_profile"),
    }
}

fn security_profile(wire: wire::SecurityProfile, field: &str) -> Result<SecurityProfile> {
    let kind: ProfileType = choice(wire.profile_type, field)?;
    if kind != ProfileType::Localhost && !wire.localhost_ref.is_empty() {
        return Err(Error::invalid(format!("{field}: localhost_ref is for profiles of type Localhost")));
    }
    match kind {
        ProfileType::RuntimeDefault => Ok(SecurityProfile::RuntimeDefault),
        ProfileType::Unconfined => Ok(SecurityProfile::Unconfined),
        ProfileType::Localhost => localhost(&wire.localhost_ref, field),
    }
}

fn old_profile(text: &str, field: &str) -> Result<Option<SecurityProfile>> {
    match text {
        "" => Ok(None),
        "unconfined" => Ok(Some(SecurityProfile::Unconfined)),
        "runtime/default" | "docker/default" => Ok(Some(SecurityProfile::RuntimeDefault)),
        _ if text.starts_with("localhost/") => localhost(text, field).map(Some),
        _ => Err(Error::invalid(format!("{field} is none of unconfined, runtime/default, localhost/<profile>: {text:?}"))),
    }
}

fn localhost(reference: &str, field: &str) -> Result<SecurityProfile> {
    let reference = reference.strip_prefix("localhost/").unwrap_or(reference);
    super::one_line(reference, field)?;
    super::filled(reference.to_owned(), &format!("{field}: localhost_ref")).map(SecurityProfile::Localhost)
}

fn selinux(wire: wire::SeLinuxOption) -> Result<SelinuxOptions> {
    if !wire.level.is_empty() && !valid_level(&wire.level) {
        return Err(Error::invalid(format!("malformed SELinux level {:?}", wire.level)));
    }
    Ok(SelinuxOptions { user: wire.user, role: wire.role, r#type: wire.r#type, level: wire.level })
}

/// `s<n>[:categories]`, alone or as a range with `-`; categories are `c<n>` or `c<n>.c<m>`, separated by commas.
fn valid_level(level: &str) -> bool {
    fn number(text: &str, letter: char) -> bool {
        text.strip_prefix(letter).is_some_and(|n| !n.is_empty() && n.len() <= 4 && n.bytes().all(|b| b.is_ascii_digit()))
    }
    fn category(text: &str) -> bool {
        match text.split_once('.') {
            Some((from, to)) => number(from, 'c') && number(to, 'c'),
            None => number(text, 'c'),
        }
    }
    fn one(level: &str) -> bool {
        match level.split_once(':') {
            Some((sensitivity, categories)) => number(sensitivity, 's') && categories.split(',').all(category),
            None => number(level, 's'),
        }
    }
    match level.split_once('-') {
        Some((low, high)) => one(low) && one(high),
        None => one(level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(kind: ProfileType, reference: &str) -> Option<wire::SecurityProfile> {
        Some(wire::SecurityProfile { profile_type: kind.into(), localhost_ref: reference.into() })
    }

    #[test]
    fn seccomp_spellings() {
        assert_eq!(seccomp(None, "").unwrap(), SecurityProfile::Unconfined);
        assert_eq!(seccomp(Some(wire::SecurityProfile::default()), "unconfined").unwrap(), SecurityProfile::RuntimeDefault);
        assert_eq!(seccomp(None, "docker/default").unwrap(), SecurityProfile::RuntimeDefault);
        assert_eq!(seccomp(None, "localhost//p.json").unwrap(), SecurityProfile::Localhost("/p.json".into()));
        assert_eq!(seccomp(profile(ProfileType::Localhost, "localhost//p"), "").unwrap(), SecurityProfile::Localhost("/p".into()));
        for bad in [profile(ProfileType::Localhost, "p"), profile(ProfileType::Localhost, ""), profile(ProfileType::Unconfined, "/p")] {
            assert!(seccomp(bad.clone(), "").is_err(), "{bad:?}");
        }
        assert!(seccomp(None, "whatever").is_err());
    }

    #[test]
    fn apparmor_spellings() {
        assert_eq!(apparmor(None, "").unwrap(), None);
        assert_eq!(apparmor(None, "localhost/web").unwrap(), Some(SecurityProfile::Localhost("web".into())));
        assert_eq!(apparmor(profile(ProfileType::Unconfined, ""), "runtime/default").unwrap(), Some(SecurityProfile::Unconfined));
    }

    #[test]
    fn levels() {
        for good in ["s0", "s0-s0", "s0:c1,c2", "s0-s0:c0.c1023", "s0:c1-s15:c1.c5,c9"] {
            assert!(valid_level(good), "{good}");
        }
        for bad in ["s0,c200,c100", "s0:", "c1", "s0:c1,", "s0:c1.", "s", "s0-", "s0:c99999", "s0:c1\n"] {
            assert!(!valid_level(bad), "{bad}");
        }
    }

    #[test]
    fn user_numbers_do_not_wrap() {
        for bad in [-1, 1 << 31, 1 << 32, i64::MAX, i64::MIN] {
            assert!(id(bad, "x").is_err(), "{bad}");
        }
        assert_eq!(id(i64::from(i32::MAX), "x").unwrap(), 2_147_483_647);
    }

    #[test]
    fn user_namespaces_are_refused_for_the_right_reason() {
        let range = |container_id, length| wire::IdMapping { host_id: 65536, container_id, length };
        let kind = |mode: wire::NamespaceMode, uids: Vec<wire::IdMapping>, gids: Vec<wire::IdMapping>| {
            user_namespace(Some(wire::UserNamespace { mode: mode.into(), uids, gids })).map_err(|e| e.kind)
        };
        use wire::NamespaceMode::{Container, Node, Pod, Target};
        assert_eq!(kind(Node, vec![], vec![]), Ok(()));
        assert_eq!(kind(Pod, vec![range(0, 65536)], vec![range(0, 65536)]), Err(Kind::Unimplemented));
        for bad in [
            kind(Node, vec![range(0, 1)], vec![]),
            kind(Pod, vec![], vec![]),
            kind(Pod, vec![range(0, 1), range(0, 1)], vec![range(0, 1)]),
            kind(Pod, vec![range(0, 0)], vec![range(0, 1)]),
            kind(Pod, vec![range(0, 1)], vec![range(1, 1)]),
            kind(Container, vec![], vec![]),
            kind(Target, vec![], vec![]),
        ] {
            assert_eq!(bad, Err(Kind::InvalidArgument));
        }
    }
}
