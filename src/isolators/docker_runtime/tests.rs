//! Tests of `docker/runtime`: words, environment, directory, and reading layers as overlay would show them.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::super::tests::Bench;
use super::*;
use crate::model::Kind;
use crate::model::container::{EnvVar, Mount};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

#[test]
fn argv_is_dockers_table() {
    let image = |e: &[&str], c: &[&str]| ImageConfig { entrypoint: words(e), cmd: words(c), ..ImageConfig::default() };
    let spec = |c: &[&str], a: &[&str]| ContainerSpec { command: words(c), args: words(a), ..ContainerSpec::default() };
    for (spec, image, argv) in [
        (spec(&[], &[]), image(&["e"], &["c"]), Some(vec!["e", "c"])),
        (spec(&[], &["a"]), image(&["e"], &["c"]), Some(vec!["e", "a"])),
        (spec(&["k"], &[]), image(&["e"], &["c"]), Some(vec!["k"])),
        (spec(&["k"], &["a"]), image(&["e"], &["c"]), Some(vec!["k", "a"])),
        (spec(&[], &["a"]), image(&[], &["c"]), Some(vec!["a"])),
        (spec(&[], &[]), image(&[], &["c"]), Some(vec!["c"])),
        (spec(&[], &[]), image(&[], &[]), None),
        (spec(&["a\0"], &[]), image(&[], &[]), None),
    ] {
        assert_eq!(args(&spec, &image).ok(), argv.map(|a| words(&a)));
    }
}

#[test]
fn environment_goes_from_defaults_to_image_to_request() {
    let pod = PodSpec { hostname: "web-0".into(), ..PodSpec::default() };
    let image = ImageConfig { env: words(&["PATH=/opt", "A=1", "NOTHING", "A=2=3"]), ..ImageConfig::default() };
    let envs = vec![EnvVar { name: "RAW".into(), value: vec![0xff] }];
    let spec = ContainerSpec { tty: true, envs, ..ContainerSpec::default() };
    let got = env(&pod, &spec, &image).unwrap();
    let got: Vec<_> = got.iter().map(|(n, v)| format!("{n}={}", String::from_utf8_lossy(v))).collect();
    assert_eq!(got, [&format!("PATH={PATH}"), "TERM=xterm", "HOSTNAME=web-0", "PATH=/opt", "A=1", "A=2=3", "RAW=\u{fffd}"]);
    for (name, value) in [("", "x"), ("A=B", "x"), ("A", "x\0"), ("A\0", "x"), ("HOME", "/\nroot::0:0::/:/bin/sh"), ("HOME", "/\r")] {
        let spec = ContainerSpec { envs: vec![EnvVar { name: name.into(), value: value.into() }], ..ContainerSpec::default() };
        assert_eq!(env(&pod, &spec, &image).unwrap_err().kind, Kind::InvalidArgument, "{name:?}");
    }
}

#[test]
fn the_working_directory_is_absolute() {
    for (asked, image, wanted) in [(None, "", "/"), (None, "/srv", "/srv"), (None, "srv", "/srv"), (Some("/x"), "/srv", "/x"), (Some(""), "/srv", "/srv")] {
        let spec = ContainerSpec { working_dir: asked.map(str::to_owned), ..ContainerSpec::default() };
        assert_eq!(cwd(&spec, &ImageConfig { working_dir: image.into(), ..ImageConfig::default() }).unwrap(), wanted);
    }
    assert!(cwd(&ContainerSpec::default(), &ImageConfig { working_dir: "/a\nb".into(), ..ImageConfig::default() }).is_err());
}

#[tokio::test]
async fn the_stop_signal_is_the_requests_else_the_images_else_term() {
    let mut bench = Bench::new();
    bench.image.config.cmd = words(&["x"]);
    let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    for (asked, image, signal) in [(None, "", 15), (None, "SIGRTMIN+3", 37), (Some(3), "SIGRTMIN+3", 3), (None, "nonsense", 15)] {
        bench.spec.stop_signal = asked;
        bench.image.config.stop_signal = image.into();
        assert_eq!(bench.prepare(&*isolator).await.unwrap().stop_signal, Some(signal));
    }
}

/// Layers in a directory, topmost first, each given as (path, content); a path that ends in `/` is a directory, content
/// `-> x` a link, `whiteout` a whiteout.
fn layers(bench: &Bench, layers: &[&[(&str, &str)]]) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for (n, files) in layers.iter().enumerate() {
        let root = bench.path().join(format!("layer{n}"));
        std::fs::create_dir(&root).unwrap();
        for (path, content) in *files {
            let path_on_host = root.join(path);
            std::fs::create_dir_all(path_on_host.parent().unwrap()).unwrap();
            if path.ends_with('/') {
                std::fs::create_dir_all(&path_on_host).unwrap();
            } else if let Some(target) = content.strip_prefix("-> ") {
                symlink(target, &path_on_host).unwrap();
            } else if *content == "whiteout" {
                let mode = nix::sys::stat::Mode::empty();
                nix::sys::stat::mknod(&path_on_host, nix::sys::stat::SFlag::S_IFCHR, mode, 0).unwrap();
            } else {
                std::fs::write(&path_on_host, content).unwrap();
            }
        }
        dirs.push(root);
    }
    dirs
}

fn read(layers: &[PathBuf], path: &str) -> Result<Option<String>> {
    lookup::read(layers, Path::new(path), 64).map(|b| b.map(|b| String::from_utf8(b).unwrap()))
}

#[test]
fn layers_are_read_as_overlay_shows_them() {
    let bench = Bench::new();
    let dirs = layers(
        &bench,
        &[
            &[("etc/a", "top"), ("gone", "whiteout"), ("etc/b", "whiteout"), ("over", "file over directory"), ("dir/new", "x"), ("link", "-> /etc/a")],
            &[("etc/b", "hidden"), ("etc/c", "middle"), ("over/below", "hidden"), ("dir", "file under directory")],
            &[("etc/a", "bottom"), ("gone/x", "hidden"), ("etc/c", "bottom"), ("opaque/x", "bottom"), ("etc/up", "-> ../../../etc/./a")],
        ],
    );
    std::fs::create_dir(dirs[1].join("opaque")).unwrap();
    rustix::fs::setxattr(dirs[1].join("opaque"), "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty()).unwrap();
    for (path, content) in [
        ("/etc/a", Some("top")),
        ("/etc/b", None),
        ("/etc/c", Some("middle")),
        ("/gone/x", None),
        ("/over/below", None),
        ("/over", Some("file over directory")),
        ("/dir/new", Some("x")),
        ("/opaque/x", None),
        ("/link", Some("top")),
        ("/etc/up", Some("top")),
        ("/../../etc/a", Some("top")),
        ("/nowhere", None),
        ("/etc/a/x", None),
    ] {
        assert_eq!(read(&dirs, path).unwrap().as_deref(), content, "{path}");
    }
}

#[test]
fn nothing_leads_out_of_the_image_or_hangs_or_floods() {
    let bench = Bench::new();
    let secret = bench.path().join("secret");
    std::fs::write(&secret, "host").unwrap();
    let absolute = format!("-> {}", secret.display());
    let up = format!("-> {}{}", "../".repeat(40), secret.display());
    let large = "x".repeat(65);
    let files: &[(&str, &str)] = &[("abs", &absolute), ("etc/up", &up), ("loop", "-> loop"), ("large", &large), ("d/", ""), ("out", "-> ..")];
    let dirs = layers(&bench, &[files]);
    nix::unistd::mkfifo(&dirs[0].join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    nix::sys::stat::mknod(&dirs[0].join("zero"), nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::S_IRUSR, nix::sys::stat::makedev(1, 5)).unwrap();
    let inside = secret.strip_prefix("/").unwrap();
    assert_eq!(read(&dirs, "/abs").unwrap(), None);
    assert_eq!(read(&dirs, "/etc/up").unwrap(), None);
    assert_eq!(read(&dirs, "/out/secret").unwrap(), None);
    for bad in ["/loop", "/fifo", "/zero", "/d"] {
        assert_eq!(read(&dirs, bad).unwrap_err().kind, Kind::InvalidArgument, "{bad}");
    }
    assert_eq!(read(&dirs, "/large").unwrap_err().kind, Kind::ResourceExhausted);
    // The same links do lead somewhere when the image itself has the file: they were followed, inside.
    std::fs::create_dir_all(dirs[0].join(inside).parent().unwrap()).unwrap();
    std::fs::write(dirs[0].join(inside), "image").unwrap();
    assert_eq!(read(&dirs, "/abs").unwrap().as_deref(), Some("image"));
    assert_eq!(read(&dirs, "/etc/up").unwrap().as_deref(), Some("image"));
}

#[tokio::test]
async fn volumes_start_with_what_the_image_has() {
    let mut bench = Bench::new();
    let dirs = layers(&bench, &[&[("data/sub/f", "top"), ("data/gone", "whiteout"), ("data/l", "-> /etc/passwd")], &[("data/gone", "x"), ("data/low", "low")]]);
    std::os::unix::fs::chown(dirs[0].join("data/sub/f"), Some(7), Some(8)).unwrap();
    std::os::unix::fs::chown(dirs[0].join("data"), Some(5), Some(6)).unwrap();
    std::fs::set_permissions(dirs[0].join("data"), std::fs::Permissions::from_mode(0o1771)).unwrap();
    std::fs::set_permissions(dirs[0].join("data/sub/f"), std::fs::Permissions::from_mode(0o4750)).unwrap();
    bench.rootfs.lookup = dirs;
    bench.image.config.cmd = words(&["x"]);
    bench.image.config.volumes = words(&["/data", "/new/empty", "/data/", "/covered"]);
    bench.spec.mounts = vec![Mount { container_path: "/covered/".into(), ..Mount::default() }];
    let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    let patch = bench.prepare(&*isolator).await.unwrap();
    let got: Vec<_> = patch.mounts.iter().map(|m| m.destination().to_str().unwrap()).collect();
    assert_eq!(got, ["/data", "/new/empty"]);
    let volume = patch.mounts[0].source().clone().unwrap();
    let meta = |path: &str| std::fs::symlink_metadata(volume.join(path)).unwrap();
    let facts = |m: &std::fs::Metadata| (m.uid(), m.gid(), m.mode() & 0o7777);
    assert_eq!(facts(&std::fs::metadata(&volume).unwrap()), (5, 6, 0o1771));
    assert_eq!(facts(&meta("sub/f")), (7, 8, 0o4750));
    assert_eq!(std::fs::read_to_string(volume.join("low")).unwrap(), "low");
    assert_eq!(std::fs::read_link(volume.join("l")).unwrap(), Path::new("/etc/passwd"));
    assert!(!volume.join("gone").exists());
    assert_eq!(facts(&std::fs::metadata(patch.mounts[1].source().as_ref().unwrap()).unwrap()), (0, 0, 0o755));
    // Again: what the container wrote stays.
    std::fs::write(volume.join("low"), "changed").unwrap();
    assert_eq!(bench.prepare(&*isolator).await.unwrap(), patch);
    assert_eq!(std::fs::read_to_string(volume.join("low")).unwrap(), "changed");
    isolator.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.unwrap();
    assert!(!volume.exists());
}

#[tokio::test]
async fn volumes_cannot_reach_the_host() {
    let mut bench = Bench::new();
    let secret = bench.path().join("secret");
    std::fs::create_dir(&secret).unwrap();
    std::fs::write(secret.join("key"), "host").unwrap();
    let link = format!("-> {}", secret.display());
    bench.rootfs.lookup = layers(&bench, &[&[("data", &link)]]);
    bench.image.config.cmd = words(&["x"]);
    let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    for bad in ["/../../etc", "/a/../b", "/", ""] {
        bench.image.config.volumes = words(&[bad]);
        assert_eq!(bench.prepare(&*isolator).await.unwrap_err().kind, Kind::InvalidArgument, "{bad:?}");
    }
    bench.image.config.volumes = words(&["/data"]);
    let patch = bench.prepare(&*isolator).await.unwrap();
    assert_eq!(std::fs::read_dir(patch.mounts[0].source().as_ref().unwrap()).unwrap().count(), 0);
}
