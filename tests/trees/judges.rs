//! Who else unpacks images: umoci, and containerd with the overlayfs snapshotter.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::images::{Packed, tar_of};
use super::tree::{self, Tree};

/// A containerd of the test's own, and umoci.
pub struct Judges {
    dir: PathBuf,
    containerd: Child,
}

/// Runs a tool.
///
/// # Errors
/// What it said when it failed.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Judges {
    /// Starts them with their files in `dir`.
    pub fn start(dir: &Path) -> Self {
        let dir = dir.join("judges");
        std::fs::create_dir(&dir).unwrap();
        let path = |name: &str| dir.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt']\n\
             [grpc]\naddress = '{}'\n[ttrpc]\naddress = '{}'\n",
            path("root"),
            path("state"),
            path("c.sock"),
            path("t.sock")
        );
        std::fs::write(dir.join("config.toml"), config).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let containerd = Command::new("containerd").arg("-c").arg(dir.join("config.toml")).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let judges = Self { dir, containerd };
        let deadline = Instant::now() + Duration::from_secs(60);
        while run(&mut judges.ctr(&["version"])).is_err() {
            assert!(Instant::now() < deadline, "containerd does not answer: {}", std::fs::read_to_string(judges.dir.join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
        judges
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.dir.join("c.sock")).args(words);
        command
    }

    /// What each judge makes of `image`.
    ///
    /// # Errors
    /// Why a judge refuses it.
    pub fn trees(&self, image: &Packed) -> Vec<(&'static str, Result<Tree, String>)> {
        let layout = self.dir.join(&image.name);
        image.layout(&layout);
        let trees = vec![("umoci", self.umoci(&layout)), ("containerd", self.containerd(image, &tar_of(&layout)))];
        std::fs::remove_dir_all(&layout).unwrap();
        std::fs::remove_file(layout.with_extension("tar")).unwrap();
        trees
    }

    fn umoci(&self, layout: &Path) -> Result<Tree, String> {
        let root = self.dir.join("umoci");
        let done = run(Command::new("umoci").args(["raw", "unpack", "--image"]).arg(format!("{}:1", layout.display())).arg(&root));
        let tree = done.map(|()| tree::read(&root));
        if root.exists() {
            std::fs::remove_dir_all(&root).unwrap();
        }
        tree
    }

    fn containerd(&self, image: &Packed, archive: &Path) -> Result<Tree, String> {
        let (name, target) = (image.full_name(), self.dir.join("mnt").display().to_string());
        std::fs::create_dir_all(&target).unwrap();
        let overlay = ["--snapshotter", "overlayfs"];
        run(self.ctr(&["images", "import"]).args(overlay).arg(archive))?;
        run(self.ctr(&["images", "mount"]).args(overlay).args([&name, &target]))?;
        let tree = tree::read(Path::new(&target));
        run(self.ctr(&["images", "unmount", "--rm"]).args(overlay).arg(&target))?;
        run(&mut self.ctr(&["images", "rm", "--sync", &name]))?;
        Ok(tree)
    }
}

impl Drop for Judges {
    fn drop(&mut self) {
        let _ = self.containerd.kill();
        let _ = self.containerd.wait();
        // bolt files and snapshots go with the scratch directory.
    }
}
