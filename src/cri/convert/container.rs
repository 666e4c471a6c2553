//! Containers as asked for (cri-behaviour §6, §10).

use std::path::{Component, PathBuf};

use crate::containerizer::Pod;
use crate::model::ContainerSpec;
use crate::model::container::{ContainerMetadata, Device, EnvVar};
use crate::model::error::{Error, Result};
use crate::wire::cri as wire;

use super::{choice, filled, mounts, one_line, required, resources, security, signal};

/// Prefix of the annotations by which device plugins ask for CDI devices where they do not use the field.
const CDI_ANNOTATIONS: &str = "cdi.k8s.io/";

/// A container in `pod` from its request. `recursive_read_only` says whether such mounts can be made.
///
/// # Errors
/// `InvalidArgument`; `Unimplemented` or `FailedPrecondition` for what this runtime or node cannot do.
pub fn from_wire(config: wire::ContainerConfig, pod: &Pod, recursive_read_only: bool) -> Result<ContainerSpec> {
    no_cdi(&config)?;
    let metadata = required(config.metadata, "config.metadata")?;
    let image = required(config.image, "config.image")?;
    let linux = config.linux.unwrap_or_default();
    for word in config.command.iter().chain(&config.args).chain([&config.working_dir]) {
        no_nul(word.as_bytes(), "command, args and working_dir")?;
    }
    Ok(ContainerSpec {
        metadata: ContainerMetadata { name: filled(metadata.name, "metadata.name")?, attempt: metadata.attempt },
        image: filled(image.image, "config.image.image")?,
        user_specified_image: image.user_specified_image,
        image_annotations: image.annotations,
        image_runtime_handler: image.runtime_handler,
        command: config.command,
        args: config.args,
        working_dir: Some(config.working_dir).filter(|dir| !dir.is_empty()),
        envs: config.envs.into_iter().map(env).collect::<Result<_>>()?,
        mounts: config.mounts.into_iter().map(|m| mounts::from_wire(m, recursive_read_only)).collect::<Result<_>>()?,
        devices: config.devices.into_iter().map(device).collect::<Result<_>>()?,
        labels: config.labels,
        annotations: config.annotations,
        log_path: log_path(&config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources::for_create(linux.resources)?,
        security: security::of_container(linux.security_context.unwrap_or_default(), pod)?,
        stop_signal: signal::to_number(choice(config.stop_signal, "stop_signal")?),
    })
}

/// Nobody may run without the device they asked for, so a request is refused until CDI is built.
fn no_cdi(config: &wire::ContainerConfig) -> Result<()> {
    let field = config.cdi_devices.first().map(|device| device.name.as_str());
    let annotation = || config.annotations.iter().find(|(key, _)| key.starts_with(CDI_ANNOTATIONS)).map(|(key, _)| key.as_str());
    match field.or_else(annotation) {
        Some(name) => {
            let what = format!("inject CDI device {name}: CDI devices are not supported by this version; name the device nodes in devices instead");
            Err(Error::precondition(what))
        }
        None => Ok(()),
    }
}

fn no_nul(bytes: &[u8], field: &str) -> Result<()> {
    if bytes.contains(&0) { Err(Error::invalid(format!("{field} cannot hold a NUL byte"))) } else { Ok(()) }
}

fn env(wire: wire::KeyValue) -> Result<EnvVar> {
    if wire.key.is_empty() || wire.key.contains('=') {
        return Err(Error::invalid(format!("envs: malformed name {:?}", wire.key)));
    }
    no_nul(wire.key.as_bytes(), "envs: a name")?;
    no_nul(&wire.value, &format!("envs: {}", wire.key))?;
    Ok(EnvVar { name: wire.key, value: wire.value })
}

fn device(wire: wire::Device) -> Result<Device> {
    one_line(&wire.host_path, "devices: host_path")?;
    one_line(&wire.container_path, "devices: container_path")?;
    if wire.permissions.contains(|c| !matches!(c, 'r' | 'w' | 'm')) {
        return Err(Error::invalid(format!("devices: permissions are made of r, w and m: {:?}", wire.permissions)));
    }
    Ok(Device { host_path: filled(wire.host_path, "devices: host_path")?, container_path: wire.container_path, permissions: wire.permissions })
}

/// Kept relative: it is joined to the pod's log directory and must stay below it.
fn log_path(path: &str) -> Result<Option<PathBuf>> {
    one_line(path, "log_path")?;
    let path = PathBuf::from(path.trim_start_matches('/'));
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(Error::invalid(format!("log_path must not contain \"..\": {}", path.display())));
    }
    Ok(Some(path).filter(|p| !p.as_os_str().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::tests::fake;
    use crate::model::Kind;
    use crate::model::pod::NamespaceMode;

    fn config() -> wire::ContainerConfig {
        wire::ContainerConfig {
            metadata: Some(wire::ContainerMetadata { name: "c".into(), attempt: 1 }),
            image: Some(wire::ImageSpec { image: "busybox".into(), user_specified_image: "bb".into(), ..Default::default() }),
            envs: vec![wire::KeyValue { key: "A".into(), value: vec![0xff, b'='] }],
            devices: vec![wire::Device { host_path: "/dev/fuse".into(), container_path: "/dev/fuse".into(), permissions: "rwm".into() }],
            log_path: "c/0.log".into(),
            stop_signal: wire::Signal::Sigrtminplus3.into(),
            linux: Some(wire::LinuxContainerConfig { security_context: Some(context()), resources: None }),
            ..Default::default()
        }
    }

    fn context() -> wire::LinuxContainerSecurityContext {
        wire::LinuxContainerSecurityContext { run_as_user: Some(wire::Int64Value { value: 0 }), ..Default::default() }
    }

    #[test]
    fn takes_everything_over() {
        let pod = fake::pod("p");
        let spec = from_wire(config(), &pod, true).unwrap();
        assert_eq!(spec.envs, [EnvVar { name: "A".into(), value: vec![0xff, b'='] }]);
        assert_eq!((spec.stop_signal, spec.resources.oom_score_adj, spec.security.user.uid), (Some(37), Some(0), Some(0)));
        assert_eq!((spec.log_path, spec.working_dir), (Some(PathBuf::from("c/0.log")), None));
        assert_eq!((spec.image.as_str(), spec.user_specified_image.as_str()), ("busybox", "bb"));
        assert_eq!(spec.security.namespaces.pid, NamespaceMode::Pod, "absent options are all zero");
    }

    #[test]
    fn refuses_what_means_nothing() {
        type Change = fn(&mut wire::ContainerConfig);
        fn context_of(c: &mut wire::ContainerConfig) -> &mut wire::LinuxContainerSecurityContext {
            c.linux.as_mut().unwrap().security_context.as_mut().unwrap()
        }
        let changes: &[(&str, Change)] = &[
            ("no metadata", |c| c.metadata = None),
            ("no name", |c| c.metadata = Some(wire::ContainerMetadata::default())),
            ("no image", |c| c.image = None),
            ("empty image", |c| c.image = Some(wire::ImageSpec::default())),
            ("NUL in a value", |c| c.envs[0].value = b"a\0b".to_vec()),
            ("= in a name", |c| c.envs[0].key = "A=B".into()),
            ("NUL in an argument", |c| c.args = vec!["a\0".into()]),
            ("permissions", |c| c.devices[0].permissions = "rx".into()),
            ("log path", |c| c.log_path = "../x.log".into()),
            ("signal", |c| c.stop_signal = 99),
            ("group without user", |c| {
                let context = context_of(c);
                (context.run_as_user, context.run_as_group) = (None, Some(wire::Int64Value { value: 5 }));
            }),
            ("privileged", |c| context_of(c).privileged = true),
            ("host network", |c| context_of(c).namespace_options = Some(wire::NamespaceOption { network: 2, ..Default::default() })),
            ("target without id", |c| context_of(c).namespace_options = Some(wire::NamespaceOption { pid: 3, ..Default::default() })),
        ];
        let pod = fake::pod("p");
        for (what, change) in changes {
            let mut config = config();
            change(&mut config);
            assert_eq!(from_wire(config, &pod, true).expect_err(what).kind, Kind::InvalidArgument, "{what}");
        }
    }

    #[test]
    fn devices_of_cdi_are_refused_and_not_forgotten() {
        let pod = fake::pod("p");
        let refused = |change: fn(&mut wire::ContainerConfig)| {
            let mut config = config();
            change(&mut config);
            from_wire(config, &pod, true).unwrap_err()
        };
        for error in [
            refused(|c| c.cdi_devices = vec![wire::CdiDevice { name: "vendor.com/gpu=0".into() }]),
            refused(|c| drop(c.annotations.insert("cdi.k8s.io/plugin_gpu".into(), "vendor.com/gpu=0".into()))),
        ] {
            assert_eq!(error.kind, Kind::FailedPrecondition);
            assert!(error.to_string().contains("not supported"), "{error}");
        }
        let mut config = config();
        config.annotations.insert("example.com/cdi.k8s.io/".into(), String::new());
        from_wire(config, &pod, true).unwrap();
    }

    #[test]
    fn the_pod_decides_on_network_and_privilege() {
        let mut pod = fake::pod("p");
        pod.spec.privileged = true;
        pod.spec.namespaces.network = NamespaceMode::Node;
        let mut config = config();
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
        let spec = from_wire(config, &pod, true).unwrap();
        assert!(spec.security.privileged);
        assert_eq!(spec.security.namespaces.network, NamespaceMode::Node);
    }

    #[test]
    fn absolute_log_paths_stay_below_the_directory() {
        assert_eq!(log_path("/x.log").unwrap(), Some(PathBuf::from("x.log")));
        assert_eq!(log_path("").unwrap(), None);
    }
}
