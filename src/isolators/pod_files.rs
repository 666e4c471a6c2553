//! `pod/files`: the pod's `hosts`, `hostname` and `resolv.conf`, bound into each of its containers (cri-behaviour §5).
//!
//! A volume at one of these destinations replaces the file, as any volume replaces a default mount.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use async_trait::async_trait;

use super::parts::{NoConfig, config, host_name, mount, options};
use super::{Cx, Entry, Isolator};
use crate::disk::Layout;
use crate::model::error::{Act, Error, Result};
use crate::model::plan::LaunchPatch;
use crate::model::pod::Dns;
use crate::model::{ContainerId, PodId, PodSpec};

const NAME: &str = "pod/files";
/// Names below the pod's run directory, and where they belong in a container.
const FILES: [(&str, &str); 3] = [("hosts", "/etc/hosts"), ("hostname", "/etc/hostname"), ("resolv.conf", "/etc/resolv.conf")];
/// Bytes of a file that is copied from the host; far above any real one.
const MAX_COPY: u64 = 1 << 20;

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |deps, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(PodFiles { layout: deps.layout.clone() }))
    },
};

struct PodFiles {
    layout: Layout,
}

#[async_trait]
impl Isolator for PodFiles {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let mut patch = LaunchPatch::default();
        match &cx.container {
            None => {
                std::fs::create_dir_all(self.layout.run_pod(cx.pod_id)).act("create", self.layout.run_pod(cx.pod_id).display())?;
                for (name, _) in FILES {
                    write(&self.layout.pod_file(cx.pod_id, name), &content(name, cx.pod)?)?;
                }
            }
            Some(container) => {
                let access = if container.spec.security.readonly_rootfs { "ro" } else { "rw" };
                for (name, destination) in FILES {
                    patch.mounts.push(mount(destination, "bind", self.layout.pod_file(cx.pod_id, name), &["rbind", "rprivate", access]));
                }
            }
        }
        Ok(patch)
    }

    async fn cleanup(&self, pod_id: &PodId, _: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        if container.is_some() {
            return Ok(());
        }
        for (name, _) in FILES {
            let path = self.layout.pod_file(pod_id, name);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove {}", path.display()), e)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn content(name: &str, pod: &PodSpec) -> Result<Vec<u8>> {
    match (name, &pod.dns) {
        ("hostname", _) => Ok(format!("{}\n", if pod.hostname.is_empty() { host_name() } else { pod.hostname.clone() }).into_bytes()),
        ("resolv.conf", Some(dns)) if *dns != Dns::default() => resolv_conf(dns),
        _ => copy_of(&Path::new("/etc").join(name)),
    }
}

fn resolv_conf(dns: &Dns) -> Result<Vec<u8>> {
    for word in dns.servers.iter().chain(&dns.searches).chain(&dns.options) {
        // A line break would start a line of the caller's own making.
        if word.is_empty() || word.bytes().any(|b| b.is_ascii_control() || b == b' ') {
            return Err(Error::invalid(format!("dns configuration: {word:?} is not one word")));
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    Ok(text.into_bytes())
}

/// The host's file, empty when the host has none.
fn copy_of(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match std::fs::File::open(path) {
        Ok(file) => file.take(MAX_COPY).read_to_end(&mut bytes).act("read", path.display())?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => 0,
        Err(e) => return Err(Error::io(format!("read {}", path.display()), e)),
    };
    Ok(bytes)
}

/// Readable for everybody: a container's user need not be root. The directory above is not. Rewritten in place, because
/// running containers hold the inode.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o644).open(path).act("create", path.display())?;
    file.write_all(bytes).act("write", path.display())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, options};
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[tokio::test]
    async fn files_are_written_for_the_pod_and_bound_into_containers() {
        let mut bench = Bench::new();
        let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
        bench.pod.hostname = "web-0".into();
        bench.pod.dns = Some(Dns { servers: words(&["10.0.0.1", "10.0.0.2"]), searches: words(&["a.b", "c"]), options: words(&["ndots:5", "rotate"]) });
        bench.prepare_sandbox(&*isolator).await.unwrap();
        let read = |name: &str| std::fs::read_to_string(bench.deps.layout.pod_file(&bench.pod_id, name)).unwrap();
        assert_eq!(read("hostname"), "web-0\n");
        assert_eq!(read("hosts"), std::fs::read_to_string("/etc/hosts").unwrap_or_default());
        assert_eq!(read("resolv.conf"), "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5 rotate\n");

        bench.spec.security.readonly_rootfs = true;
        let patch = bench.prepare(&*isolator).await.unwrap();
        for (_, destination) in FILES {
            assert!(options(&patch, destination).contains(&"ro".to_owned()));
        }
        isolator.cleanup(&bench.pod_id, &bench.pod, None).await.unwrap();
        assert!(FILES.iter().all(|(name, _)| !bench.deps.layout.pod_file(&bench.pod_id, name).exists()));
    }

    #[test]
    fn without_dns_configuration_the_hosts_file_is_copied() {
        let host = std::fs::read("/etc/resolv.conf").unwrap_or_default();
        for dns in [None, Some(Dns::default())] {
            assert_eq!(content("resolv.conf", &PodSpec { dns, ..PodSpec::default() }).unwrap(), host);
        }
    }

    #[test]
    fn no_word_can_start_a_line_of_its_own() {
        for bad in ["1.1.1.1\nnameserver 6.6.6.6", "a b", "", "a\0"] {
            assert!(resolv_conf(&Dns { searches: words(&[bad]), ..Dns::default() }).is_err(), "{bad:?}");
        }
    }
}
