//! F2: the on-disk tree, drawn once, and the records in it. No other module joins path strings.
//!
//! ```text
//! root (persistent, 0700, default /var/lib/mesocri)
//! ├── version                        format number of everything below
//! ├── lock                           one daemon per root
//! ├── store/
//! │   ├── layers/<short>/            one layer: fs/ (its files) or fs.erofs (an image of them), and layer.json (diff id, form,
//! │   │                              bytes, inodes); damaged.json once a scrub has found it rotten; <short> is the first 32 hex
//! │   │                              digits of the diff id, so that lowerdir options stay short
//! │   ├── images/<hex>.json          one image record; writing it is the commit point of a pull
//! │   ├── staging/<random>/          layers being unpacked; swept at start
//! │   ├── damaged/<layer>-<time>/    damaged layers that were replaced, for containers that still use them
//! │   ├── leases/<id>.json           what holds layers that no image record holds
//! │   └── rootfs/<container>/        per container: upper/, work/ (overlay, aufs) or fs/ (copy)
//! ├── pods/<pod>/pod.json            the pod's record
//! │   └── containers/<id>/           container.json (its record), volumes/<n>/ (volumes that the image asks for)
//! ├── networks/
//! │   ├── pods/<pod>.json            which network attached a pod: its addresses and ports, or its CNI configuration and result
//! │   └── pod-cidr.json              the pod range that the front gave last
//! └── quarantine/<time>-<name>       records and layers that could not be read; <time>-<name>.reason, in place of its extension, says why
//!
//! state (gone after a reboot, 0700, default /run/mesocri)
//! ├── mesocri.sock                   CRI, and the operator's commands
//! ├── lock                           one daemon per state directory
//! ├── shims/<pod, 20 hex>.sock       the pod's shim
//! ├── pods/<pod>/                    hostname, hosts, resolv.conf, shm/ (mounted)
//! │   ├── sandbox/                   bundle of the pod: config.json, mesocri.json, rootfs/; of our shim shim.json and sandbox.json
//! │   │                              (its processes), of all shims address
//! │   └── containers/<id>/           bundle: config.json, mesocri.json, rootfs/; of our shim task.json, of others io.json, stdout, stderr
//! ├── volumes/<container>.volume-<n>/ image volumes, mounted while their container is being made
//! ├── cgroup-parent                  the parent cgroup this daemon makes itself, written before it does
//! └── seccomp/<digest>.bpf           compiled filters, one per profile
//!
//! /run/netns/mesocri-<pod, 20 hex>   pinned network namespaces (where `ip netns` finds them)
//! ```

pub mod bundle;
pub mod layer;
pub mod layout;
pub mod pods;
pub mod record;
pub mod tree;
pub mod version;

pub use layout::Layout;
