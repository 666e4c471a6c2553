//! Volumes (cri-behaviour §10, mounts).

use std::collections::BTreeMap;

use crate::model::container::{ImageVolume, Mount, Propagation};
use crate::model::error::{Error, Kind, Result};
use crate::wire::cri as wire;

use super::choice;

/// A volume as asked for. `recursive_read_only` says whether this runtime can do that.
///
/// # Errors
/// `InvalidArgument` for combinations that mean nothing; `RROUnsupported` and `ImageVolumeMountFailed` at the start of the message
/// where the kubelet looks for them.
pub fn from_wire(wire: wire::Mount, recursive_read_only: bool) -> Result<Mount> {
    let at = wire.container_path.clone();
    let bad = |why: &str| Error::invalid(format!("mount {at:?}: {why}"));
    super::one_line(&wire.container_path, "mount: container_path")?;
    super::one_line(&wire.host_path, "mount: host_path")?;
    if !wire.container_path.starts_with('/') {
        return Err(bad("container_path is not absolute"));
    }
    if !wire.uid_mappings.is_empty() || !wire.gid_mappings.is_empty() {
        return Err(Error::new(Kind::Unimplemented, format!("mount {at:?}: id-mapped mounts are not supported by this runtime")));
    }
    let propagation = match choice(wire.propagation, "mount: propagation")? {
        wire::MountPropagation::PropagationPrivate => Propagation::Private,
        wire::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
        wire::MountPropagation::PropagationBidirectional => Propagation::Bidirectional,
    };
    if wire.recursive_read_only {
        if !wire.readonly || propagation != Propagation::Private {
            return Err(bad("recursive_read_only needs readonly and private propagation"));
        }
        if !recursive_read_only {
            return Err(Error::new(Kind::Unimplemented, format!("RROUnsupported: mount {at:?}: this node cannot make mounts read-only recursively")));
        }
    }
    let image = image_volume(wire.image, wire.image_sub_path, &bad)?;
    if image.is_some() {
        if !wire.host_path.is_empty() || !wire.readonly || propagation != Propagation::Private {
            return Err(bad("an image volume has no host_path, is readonly and has private propagation"));
        }
    } else if !wire.host_path.starts_with('/') {
        return Err(bad("host_path is not absolute"));
    }
    Ok(Mount {
        container_path: wire.container_path,
        host_path: wire.host_path,
        readonly: wire.readonly,
        recursive_read_only: wire.recursive_read_only,
        selinux_relabel: wire.selinux_relabel,
        propagation,
        image,
    })
}

fn image_volume(image: Option<wire::ImageSpec>, sub_path: String, bad: &impl Fn(&str) -> Error) -> Result<Option<ImageVolume>> {
    // An empty ImageSpec is how protojson clients write "no image".
    let Some(image) = image.filter(|image| !image.image.is_empty()) else {
        return if sub_path.is_empty() { Ok(None) } else { Err(bad("image_sub_path without an image")) };
    };
    if sub_path.starts_with('/') || sub_path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("ImageVolumeMountFailed: image_sub_path {sub_path:?} is not a path below the image's root")));
    }
    super::one_line(&sub_path, "mount: image_sub_path")?;
    Ok(Some(ImageVolume { image: image.image, sub_path }))
}

/// The same volume in status, with the digest or id of an image volume.
pub fn to_wire(mount: &Mount, image_refs: &BTreeMap<String, String>) -> wire::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => wire::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => wire::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => wire::MountPropagation::PropagationBidirectional,
    };
    wire::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation.into(),
        uid_mappings: Vec::new(),
        gid_mappings: Vec::new(),
        recursive_read_only: mount.recursive_read_only,
        image: mount.image.as_ref().map(|image| wire::ImageSpec {
            image: image.image.clone(),
            image_ref: image_refs.get(&mount.container_path).cloned().unwrap_or_default(),
            ..Default::default()
        }),
        image_sub_path: mount.image.as_ref().map(|image| image.sub_path.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount() -> wire::Mount {
        wire::Mount { container_path: "/a".into(), host_path: "/b".into(), ..Default::default() }
    }

    fn image() -> wire::Mount {
        let image = wire::ImageSpec { image: "busybox".into(), ..Default::default() };
        wire::Mount { container_path: "/a".into(), readonly: true, image: Some(image), image_sub_path: "bin".into(), ..Default::default() }
    }

    #[test]
    fn echoes_verbatim() {
        let wire = wire::Mount { readonly: true, selinux_relabel: true, recursive_read_only: true, container_path: "/a//../b/".into(), ..mount() };
        assert_eq!(to_wire(&from_wire(wire.clone(), true).unwrap(), &BTreeMap::new()), wire);
        let mut expected = image();
        if let Some(spec) = &mut expected.image {
            spec.image_ref = "sha256:1".into();
        }
        assert_eq!(to_wire(&from_wire(image(), true).unwrap(), &[("/a".to_owned(), "sha256:1".to_owned())].into()), expected);
    }

    #[test]
    fn misuse_is_refused() {
        let bidirectional = wire::MountPropagation::PropagationBidirectional.into();
        for (bad, kind, start) in [
            (wire::Mount { container_path: "a".into(), ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { host_path: String::new(), ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { host_path: "/x\0".into(), ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { propagation: 9, ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { recursive_read_only: true, ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { recursive_read_only: true, readonly: true, propagation: bidirectional, ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { recursive_read_only: true, readonly: true, ..mount() }, Kind::Unimplemented, "RROUnsupported: "),
            (wire::Mount { uid_mappings: vec![wire::IdMapping::default()], ..mount() }, Kind::Unimplemented, "mount"),
            (wire::Mount { image_sub_path: "x".into(), ..mount() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { readonly: false, ..image() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { host_path: "/b".into(), ..image() }, Kind::InvalidArgument, "mount"),
            (wire::Mount { image_sub_path: "/bin".into(), ..image() }, Kind::InvalidArgument, "ImageVolumeMountFailed: "),
            (wire::Mount { image_sub_path: "a/../../b".into(), ..image() }, Kind::InvalidArgument, "ImageVolumeMountFailed: "),
        ] {
            let e = from_wire(bad.clone(), false).expect_err(&format!("{bad:?}"));
            assert!(e.kind == kind && e.what.starts_with(start), "{bad:?}: {e}");
        }
    }
}
