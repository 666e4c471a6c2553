//! Root filesystems that we build equal those that umoci and containerd build from the same image, file by file: kind, mode,
//! owner, times, extended attributes, links, holes' content. Over layers no tool would write, over random ones
//! (`TREE_SEEDS=n..m` for others than the default), and over a Debian made with debootstrap; on every backend, whatever order
//! layers arrive in and however many are unpacked at once. Needs root, umoci and containerd.

#![allow(clippy::unwrap_used, missing_docs)] // a test that cannot set itself up has failed

mod corpus;
mod debian;
mod images;
mod judges;
mod tree;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use corpus::Image;
use images::{Packed, Registry};
use judges::Judges;
use mesocri::disk::Layout;
use mesocri::provisioner::{Config, Images as _, Provisioner, PullRequest};
use nix::mount::MsFlags;
use tokio_util::sync::CancellationToken;
use tree::Tree;

/// What keeps layers, and in which form.
const BACKENDS: [&str; 4] = ["overlay", "copy", "bind", "erofs"];

/// xorshift64*: small, seeded, the same on every machine.
pub struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap() % n
    }
}

/// Runs `work` in a mount namespace of its own.
fn private(work: impl Future<Output = ()>) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
}

/// A store of ours.
struct Store {
    store: Arc<Provisioner>,
    backend: &'static str,
    target: std::path::PathBuf,
}

impl Store {
    async fn open(scratch: &Path, backend: &'static str, layers_at_once: usize) -> Self {
        let layout = Layout::new(scratch.join(format!("{backend}-{layers_at_once}")), scratch.join(format!("{backend}-{layers_at_once}-state")));
        let target = scratch.join(format!("{backend}-{layers_at_once}-mnt"));
        std::fs::create_dir(&target).unwrap();
        let config = Config { backend: backend.to_owned(), max_parallel_layers: layers_at_once, ..Config::default() };
        Self { store: Provisioner::open(config, layout).await.unwrap(), backend, target }
    }

    /// Pulls, builds a root filesystem, reads it and removes everything again.
    async fn tree(&self, registry: &Registry, image: &Packed) -> Tree {
        let request = PullRequest { reference: registry.reference(image), credentials: None, cached: false };
        let id = self.store.pull(request, None, CancellationToken::new()).await.unwrap_or_else(|e| panic!("{} {}: {e}", self.backend, image.name));
        let record = self.store.resolve(id.as_str()).unwrap();
        let rootfs = self.store.provision("c", &record).await.unwrap();
        let tree = tree::of(&rootfs, &self.target);
        self.store.release("c").await.unwrap();
        self.store.remove(id.as_str()).await.unwrap();
        tree
    }
}

/// What need not be equal: exceptions, and directories whose time is open.
type Unsaid<'a> = (corpus::Exceptions, &'a BTreeSet<String>);

/// What differs though it is not excepted, a line each, and the exceptions that are not needed.
fn compared(what: &str, judge: &str, ours: &Tree, theirs: &Tree, (except, implied): Unsaid<'_>) -> Vec<String> {
    let differences = tree::differences(ours, theirs);
    let excepted = |path: &str, field: &str| except.iter().any(|(p, f, j)| *p == path && *f == field && *j == judge);
    let open = |path: &str, field: &str| field == "mtime" && implied.contains(path) || excepted(path, field);
    let unexpected = differences.iter().filter(|(path, field, ..)| !open(path, field));
    let mut lines: Vec<_> = unexpected.map(|(path, field, ours, theirs)| format!("{what}: {path}: {field} is {ours}, of {judge} {theirs}")).collect();
    let needed = |path: &str, field: &str| differences.iter().any(|(p, f, ..)| p == path && *f == field);
    let idle = except.iter().filter(|(path, field, j)| *j == judge && !needed(path, field));
    lines.extend(idle.map(|(path, field, _)| format!("{what}: {path}: {field} no longer differs from {judge}")));
    lines
}

fn none(differences: &[String]) {
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}

async fn compare(scratch: &Path, images: &[Image]) {
    let judges = Judges::start(scratch);
    let packed: Vec<Packed> = images.iter().map(|i| Packed::new(&i.name, &i.layers)).collect();
    let registry = Registry::start(&packed.iter().collect::<Vec<_>>());
    let mut stores = Vec::new();
    for backend in BACKENDS {
        stores.push(Store::open(scratch, backend, 3).await);
    }
    let (mut differences, none_open) = (Vec::new(), BTreeSet::new());
    for (image, packed) in images.iter().zip(&packed) {
        let theirs = judges.trees(packed);
        let first = stores[0].tree(&registry, packed).await;
        let implied = corpus::implied(&image.layers);
        for (judge, theirs) in theirs {
            match theirs {
                Ok(_) if image.refused_by.contains(&judge) => differences.push(format!("{judge} no longer refuses {}", image.name)),
                Ok(theirs) => differences.extend(compared(&image.name, judge, &first, &theirs, (image.except, &implied))),
                Err(_) if image.refused_by.contains(&judge) => {}
                Err(e) => differences.push(format!("{judge} refuses {}: {e}", image.name)),
            }
        }
        for store in &stores[1..] {
            differences.extend(compared(&image.name, store.backend, &first, &store.tree(&registry, packed).await, (&[], &none_open)));
        }
    }
    none(&differences);
}

#[test]
fn nasty_layers() {
    let scratch = tempfile::tempdir().unwrap();
    private(async { compare(scratch.path(), &corpus::corpus(scratch.path())).await });
}

#[test]
fn random_layers() {
    let scratch = tempfile::tempdir().unwrap();
    let seeds = std::env::var("TREE_SEEDS").unwrap_or_else(|_| "0..30".to_owned());
    let (from, to) = seeds.split_once("..").unwrap();
    let images: Vec<Image> = (from.parse().unwrap()..to.parse().unwrap()).map(corpus::random).collect();
    private(async { compare(scratch.path(), &images).await });
}

/// All orders of these.
fn orders(of: &[String]) -> Vec<Vec<String>> {
    if of.len() < 2 {
        return vec![of.to_vec()];
    }
    let with_first = |at: usize| {
        let rest: Vec<String> = of.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, d)| d.clone()).collect();
        orders(&rest).into_iter().map(move |mut order| {
            order.insert(0, of[at].clone());
            order
        })
    };
    (0..of.len()).flat_map(with_first).collect()
}

#[test]
fn whatever_order_layers_arrive_in() {
    let scratch = tempfile::tempdir().unwrap();
    private(async {
        let images = corpus::corpus(scratch.path());
        let image = images.iter().find(|i| i.name == "opaques").unwrap();
        let packed = Packed::new(&image.name, &image.layers);
        let registry = Registry::start(&[&packed]);
        let expected = Store::open(scratch.path(), "overlay", 1).await.tree(&registry, &packed).await;
        for backend in BACKENDS {
            let store = Store::open(scratch.path(), backend, image.layers.len() + 1).await;
            for order in orders(&packed.digests()) {
                registry.send_in_order(order.clone());
                none(&compared(&format!("{order:?}"), backend, &store.tree(&registry, &packed).await, &expected, (&[], &BTreeSet::new())));
            }
        }
    });
}

/// A Debian in three layers, on every backend; layers one after the other and the last first.
#[test]
fn a_debian() {
    let scratch = tempfile::tempdir().unwrap();
    private(async {
        let layers = debian::layers();
        let packed = Packed::new("debian", &layers);
        let registry = Registry::start(&[&packed]);
        let mut backwards = packed.digests();
        backwards.reverse();
        let mut trees = Vec::new();
        for backend in BACKENDS {
            for (layers_at_once, order) in [(1, vec![]), (4, backwards.clone())] {
                registry.send_in_order(order);
                let tree = Store::open(scratch.path(), backend, layers_at_once).await.tree(&registry, &packed).await;
                trees.push((format!("{backend}, {layers_at_once} at once"), tree));
            }
        }
        let files = trees[0].1.len();
        assert!(files > 4000, "{files} files are no Debian");
        for (judge, theirs) in Judges::start(scratch.path()).trees(&packed) {
            none(&compared("debian", judge, &trees[0].1, &theirs.unwrap(), (&[], &corpus::implied(&layers))));
        }
        for (what, tree) in &trees[1..] {
            none(&compared("debian", what, tree, &trees[0].1, (&[], &BTreeSet::new())));
        }
    });
}
