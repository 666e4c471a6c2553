//! Cold pulls of generated images from the bench's registry: time, bytes that reach the disk, memory, disk used afterwards; and many
//! callers that want the same image.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Instant;

use mesocri::wire::cri as api;

use crate::Samples;
use crate::engines::{Bench, Engine};
use crate::images::Shape;
use crate::rows::put;

/// Callers that want the same image at once.
const CALLERS: usize = 20;

/// Names of the rows of one image.
pub struct Names {
    /// How long the call takes.
    pub time: &'static str,
    /// What reaches the block device until all is on disk; containerd returns before it is, so that its time is without this.
    pub written: &'static str,
    /// The daemon's peak.
    pub memory: &'static str,
    /// What the store's file system has less of afterwards.
    pub disk: &'static str,
    /// The time when many want it at once.
    pub together: Option<&'static str>,
}

/// Pulls the image of `shape`, which is not there, then removes it.
pub async fn cold(bench: &Bench, engine: &Engine, shape: &Shape, samples: &mut Samples) {
    sync(&bench.store);
    let (written, free) = (sectors(&bench.store), free(&bench.store));
    // From now on the peak is that of this pull.
    std::fs::write(format!("/proc/{}/clear_refs", engine.pid()), "5").unwrap();
    let start = Instant::now();
    let id = pull(engine, shape).await;
    put(samples, shape.rows.time, engine, start.elapsed().as_secs_f64() * 1e3);
    put(samples, shape.rows.memory, engine, peak(engine.pid()));
    sync(&bench.store);
    put(samples, shape.rows.written, engine, mib(512 * (sectors(&bench.store) - written)));
    put(samples, shape.rows.disk, engine, mib(free - self::free(&bench.store)));
    remove(engine, id).await;
}

/// The same by many callers at once.
pub async fn together(bench: &Bench, engine: &Engine, shape: &Shape, samples: &mut Samples) {
    let Some(row) = shape.rows.together else { return };
    sync(&bench.store);
    let start = Instant::now();
    let ids = futures_util::future::join_all((0..CALLERS).map(|_| pull(engine, shape))).await;
    put(samples, row, engine, start.elapsed().as_secs_f64() * 1e3);
    remove(engine, ids[0].clone()).await;
}

async fn pull(engine: &Engine, shape: &Shape) -> String {
    let image = api::ImageSpec { image: crate::images::reference(shape), ..Default::default() };
    let answer = engine.images().pull_image(api::PullImageRequest { image: Some(image), ..Default::default() }).await;
    answer.unwrap_or_else(|e| panic!("{}: {e}", engine.name)).into_inner().image_ref
}

async fn remove(engine: &Engine, image: String) {
    engine.images().remove_image(api::RemoveImageRequest { image: Some(api::ImageSpec { image, ..Default::default() }) }).await.unwrap();
}

fn sync(store: &Path) {
    rustix::fs::syncfs(std::fs::File::open(store).unwrap()).unwrap();
}

/// Sectors of 512 bytes written to the device below `store` so far (kernel: Documentation/block/stat.rst).
fn sectors(store: &Path) -> u64 {
    let device = std::fs::metadata(store).unwrap().dev();
    let path = format!("/sys/dev/block/{}:{}/stat", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    std::fs::read_to_string(path).unwrap().split_whitespace().nth(6).unwrap().parse().unwrap()
}

/// Free bytes of the file system.
fn free(store: &Path) -> u64 {
    let stat = rustix::fs::statvfs(store).unwrap();
    stat.f_bfree * stat.f_frsize
}

/// Peak of the resident set of a process, MiB.
fn peak(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap() / 1024.0
}

#[allow(clippy::cast_precision_loss)] // a table of MiB
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
