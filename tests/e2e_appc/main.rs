//! Appc images end to end: archives made here, served by Debian's nginx, signed by GnuPG; pulled into a store of ours, and run in a pod
//! by the real daemon.
#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod images;
mod pod;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use mesocri::model::Kind;
use mesocri::provisioner::config::{Config, Registry};
use mesocri::provisioner::{Images as _, PullRequest};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use images::{Key, Store, Web, aci, aci_of, gzip, id, manifest, put, run};

/// Files of a provisioned root filesystem of the backend `copy`, relative.
async fn files(store: &Store, container: &str, image: &mesocri::model::image::Image) -> BTreeSet<String> {
    let rootfs = store.provisioner.provision(container, image).await.unwrap();
    let root = rootfs.writable.unwrap();
    let listed = run(Command::new("find").arg(&root).args(["-mindepth", "1", "-printf", "%P\n"]));
    store.provisioner.release(container).await.unwrap();
    String::from_utf8(listed).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_discovered_with_all_that_lies_below_them() {
    let web = Web::start();
    let base = aci_of(&manifest("example.com/base", "1.0", json!({})), &["etc/base", "etc/both"]);
    let tools = aci_of(
        &manifest("example.com/tools", "latest", json!({"dependencies": [{"imageName": "example.com/base", "labels": [{"name": "version", "value": "1.0"}]}]})),
        &["bin/tool"],
    );
    let more = json!({"app": {"exec": ["/bin/tool"], "user": "0", "group": "0"}, "annotations": [{"name": "created", "value": "2024-01-01T00:00:00Z"}],
        "dependencies": [{"imageName": "example.com/tools"}, {"imageName": "example.com/base", "imageID": id(&base), "size": base.len(),
            "labels": [{"name": "version", "value": "1.0"}]}]});
    let top = aci(&manifest("example.com/app", "2.0", more), |root| {
        put(root, "app/file", "top");
        put(root, "etc/both", "top");
    });
    web.serve("example.com/base", "1.0", &gzip(&base));
    web.serve("example.com/tools", "latest", &tools);
    web.serve("example.com/app", "2.0", &gzip(&top));
    web.serve("example.com/app", "latest", &gzip(&top));
    let mut store = Store::new(Config { appc_simple_discovery_uri_prefix: web.prefix(), pull_retries: 0, backend: "copy".into(), ..Config::default() }).await;

    let image = store.image("appc://example.com/app:2.0").await;
    let path = |name: &str, version: &str, status: u16| format!("/images/example.com/{name}-{version}-linux-amd64.aci {status}");
    assert_eq!(web.asked(3), [path("app", "2.0", 200), path("tools", "latest", 200), path("base", "1.0", 200)]);
    assert_eq!(image.id.as_str().replace(':', "-"), id(&top));
    // The base comes twice and counts where it comes last, below the image itself.
    assert_eq!((image.layers.len(), store.layers()), (4, 3));
    assert_eq!((image.config.entrypoint.join(" "), image.config.created.as_str()), ("/bin/tool".to_owned(), "2024-01-01T00:00:00Z"));
    let expected = ["app", "app/file", "bin", "bin/tool", "etc", "etc/base", "etc/both"].map(str::to_owned).into();
    assert_eq!(files(&store, "c1", &image).await, expected);

    // By every name, before and after a restart.
    for _ in 0..2 {
        let full = id(&top);
        let keys = [
            "appc://example.com/app:2.0",
            "appc://example.com/app:2.0?os=linux&arch=amd64",
            "appc.invalid/example.com/app:2.0",
            &full,
            &full[..20],
            &full[7..30],
            image.id.as_str(),
        ];
        for key in keys {
            assert_eq!(store.provisioner.resolve(key).map(|i| i.id.clone()), Some(image.id.clone()), "{key}");
        }
        let wrong = full.replace("sha512", "sha256");
        for key in ["appc://example.com/app", "appc://example.com/app:2.0?arch=aarch64", "example.com/app:2.0", &wrong[..20], "appc://example.com/ap:2.0"] {
            assert!(store.provisioner.resolve(key).is_none(), "{key}");
        }
        assert_eq!(store.provisioner.list().len(), 3);
        store.reopen(|_| ()).await;
        assert_eq!(web.asked(0), [] as [String; 0]);
    }

    // Another name of the same image; what lies below is there already.
    assert_eq!(store.pull("appc://example.com/app").await.unwrap(), image.id);
    assert_eq!(web.asked(1), [path("app", "latest", 200)]);
    assert!(store.provisioner.resolve("appc.invalid/example.com/app:latest").is_some() && store.layers() == 3);
    store.assert_clean();
    // Mesos's `cached`: what is there under this name is enough.
    for name in ["appc://example.com/app:2.0", "appc://example.com/app"] {
        let request = PullRequest { cached: true, ..images::request(name) };
        assert_eq!(store.provisioner.pull(request, None, CancellationToken::new()).await.unwrap(), image.id);
    }
    assert_eq!(web.asked(0), [] as [String; 0]);

    for (name, kind) in
        [("appc://example.com/none", Kind::NotFound), ("appc://example.com/app:3.0", Kind::NotFound), ("appc://example.com/app:2.0?os=plan9", Kind::NotFound)]
    {
        assert_eq!(store.pull(name).await.unwrap_err().kind, kind, "{name}");
    }
    store.provisioner.remove("appc://example.com/app:2.0").await.unwrap();
    assert_eq!((store.provisioner.list().len(), store.layers()), (2, 2));
    for name in ["appc://example.com/tools", "appc://example.com/base:1.0"] {
        store.provisioner.remove(name).await.unwrap();
    }
    assert_eq!((store.provisioner.list().len(), store.layers()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_was_asked_for_is_refused() {
    let web = Web::start();
    let store = Store::at(&web.prefix()).await;
    let good = aci_of(&manifest("good", "latest", json!({})), &["a"]);
    let zeros = format!("sha512-{}", "0".repeat(128));
    let depends = |name: &str, on: serde_json::Value| aci_of(&manifest(name, "latest", json!({"dependencies": [on]})), &["b"]);
    web.serve("good", "latest", &good);
    web.serve("other-name", "latest", &good);
    web.serve("good", "9", &good);
    web.serve("depends-wrongly", "latest", &depends("depends-wrongly", json!({"imageName": "good", "imageID": zeros})));
    web.serve("wrong-size", "latest", &depends("wrong-size", json!({"imageName": "good", "size": 7})));
    web.serve("depends-on-nothing", "latest", &depends("depends-on-nothing", json!({"imageName": "nothing"})));
    web.serve("chicken", "latest", &depends("chicken", json!({"imageName": "egg"})));
    web.serve("egg", "latest", &depends("egg", json!({"imageName": "chicken"})));
    web.serve("no-image", "latest", b"<html>");
    web.serve("whiteout", "latest", &aci_of(&manifest("whiteout", "latest", json!({})), &["etc/.wh.passwd"]));
    for n in 0..20 {
        web.serve(&format!("deep{n}"), "latest", &depends(&format!("deep{n}"), json!({"imageName": format!("deep{}", n + 1)})));
    }
    for (name, kind, words) in [
        (format!("appc://good@{zeros}"), Kind::DataLoss, "its id is"),
        ("appc://other-name".into(), Kind::DataLoss, "it is that of good"),
        ("appc://good:9".into(), Kind::DataLoss, "label version"),
        ("appc://good?channel=stable".into(), Kind::DataLoss, "label channel"),
        ("appc://depends-wrongly".into(), Kind::DataLoss, "its id is"),
        ("appc://wrong-size".into(), Kind::DataLoss, "7 are promised"),
        ("appc://depends-on-nothing".into(), Kind::NotFound, "dependency appc://nothing"),
        ("appc://chicken".into(), Kind::DataLoss, "depends on itself"),
        ("appc://deep0".into(), Kind::ResourceExhausted, "deeper than 16"),
        ("appc://no-image".into(), Kind::DataLoss, "read image archive"),
        ("appc://whiteout".into(), Kind::DataLoss, ".wh."),
        ("appc://good:..%2fx".into(), Kind::InvalidArgument, "label version"),
    ] {
        let error = store.pull(&name).await.unwrap_err();
        assert!(error.kind == kind && error.to_string().contains(words), "{name}: {error}");
    }
    assert_eq!((store.provisioner.list().len(), store.layers()), (0, 0));
    store.assert_clean();
    store.pull(&format!("appc://good@{}", id(&good))).await.unwrap();

    let closed = Store::new(Config { formats: mesocri::provisioner::config::Formats { docker: true, appc: false }, ..Config::default() }).await;
    assert!(closed.pull("appc://good").await.unwrap_err().to_string().contains("image_providers"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whitelist_leaves_nothing_else() {
    let web = Web::start();
    let config = Config { appc_simple_discovery_uri_prefix: web.prefix(), backend: "copy".into(), pull_retries: 0, ..Config::default() };
    let store = Store::new(config).await;
    web.serve("base", "latest", &aci_of(&manifest("base", "latest", json!({})), &["etc/keep", "etc/drop", "opt/a/b/c", "usr/bin/x"]));
    let more = json!({"dependencies": [{"imageName": "base"}], "pathWhitelist": ["/etc/keep", "/opt/", "/srv/new/", "/bin/own"]});
    web.serve("app", "latest", &aci_of(&manifest("app", "latest", more), &["bin/own", "bin/other"]));
    let image = store.image("appc://app").await;
    let kept: BTreeSet<String> = ["bin", "bin/own", "etc", "etc/keep", "opt", "srv", "srv/new"].map(str::to_owned).into();
    assert_eq!(files(&store, "c", &image).await, kept);
    // The control: the image below is whole.
    let base = store.provisioner.resolve("appc://base").unwrap();
    assert!(files(&store, "d", &base).await.contains("usr/bin/x"));
    store.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_place() {
    let web = Web::start();
    let plain = aci_of(&manifest("example.com/app", "latest", json!({})), &["a"]);
    web.serve("example.com/app", "latest", &gzip(&plain));
    let www = web.www().display().to_string();
    for prefix in [format!("{www}/images/"), format!("file://{www}/images/")] {
        let store = Store::at(&prefix).await;
        assert_eq!(store.image("appc://example.com/app").await.id.as_str().replace(':', "-"), id(&plain), "{prefix}");
        assert_eq!(store.pull("appc://example.com/none").await.unwrap_err().kind, Kind::NotFound, "{prefix}");
    }

    let file = "images/example.com/app-latest-linux-amd64.aci";
    let length = std::fs::metadata(web.www().join(file)).unwrap().len();
    web.put(&format!("status/{file}"), json!({"FileStatus": {"length": length, "type": "FILE", "modificationTime": 1}}).to_string().as_bytes());
    let mut store = Store::at("hdfs://namenode:9000/images/").await;
    let node = format!("http://{}", web.host);
    store.reopen(|config| drop(config.hdfs.webhdfs.insert("namenode:9000".into(), vec![node]))).await;
    store.pull("appc://example.com/app").await.unwrap();
    assert_eq!(store.pull("appc://example.com/none").await.unwrap_err().kind, Kind::NotFound);
    store.assert_clean();

    // By TLS, with an authority that the settings name for this host.
    let mut store = Store::at(&format!("https://{}/images/", web.secure)).await;
    assert_eq!(store.pull("appc://example.com/app").await.unwrap_err().kind, Kind::Unavailable);
    let trusted = Registry { ca_files: vec![web.dir.path().join("cert.pem")], ..Registry::default() };
    store.reopen(|config| drop(config.registries.insert(web.secure.clone(), trusted))).await;
    store.pull("appc://example.com/app").await.unwrap();

    let nowhere = Store::at("http://127.0.0.1:1/").await;
    let error = nowhere.pull("appc://a").await.unwrap_err();
    assert!(error.kind == Kind::Unavailable && error.to_string().starts_with("RegistryUnavailable: "), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_are_asked_for_once_there_is_a_keyring() {
    let web = Web::start();
    let (ours, theirs) = (Key::new("ours@example.com"), Key::new("theirs@example.com"));
    let keyring = web.dir.path().join("keyring.gpg");
    ours.export(&keyring);
    let base = aci_of(&manifest("base", "latest", json!({})), &["a"]);
    let app = aci_of(&manifest("app", "latest", json!({"dependencies": [{"imageName": "base"}]})), &["b"]);
    let (base, app) = (gzip(&base), gzip(&app));
    web.serve("base", "latest", &base);
    web.serve("app", "latest", &app);
    let sign = |name: &str, signature: &[u8]| web.put(&format!("images/{name}-latest-linux-amd64.aci.asc"), signature);

    // Without a keyring nobody asks.
    let mut store = Store::at(&web.prefix()).await;
    store.pull("appc://base").await.unwrap();
    assert!(web.asked(1).iter().all(|asked| !asked.contains(".asc")));

    store.reopen(|config| config.appc_keyring.clone_from(&keyring)).await;
    let refused = async |words: &str| {
        let error = store.pull("appc://app").await.unwrap_err();
        assert!(error.kind == Kind::PermissionDenied && error.to_string().contains(words), "{words}: {error}");
        store.assert_clean();
    };
    refused("there is none at").await;
    sign("app", &theirs.sign(&app));
    refused("is not in appc_keyring").await;
    sign("app", &ours.sign(b"something else"));
    refused("not that of this archive").await;
    sign("app", b"no signature");
    refused("it is none").await;
    sign("app", &ours.sign(&app));
    // What is below was pulled when nobody asked for signatures: it counts for nothing now.
    refused("dependency appc://base").await;
    sign("base", &ours.sign(&base));
    let image = store.image("appc://app").await;
    assert_eq!(image.config.appc.as_ref().unwrap().signer.as_ref().map(String::len), Some(40));
    // From a file, whose signature lies beside it.
    let prefix = format!("{}/images/", web.www().display());
    store.reopen(|config| config.appc_simple_discovery_uri_prefix = prefix).await;
    store.pull("appc://app").await.unwrap();

    store.reopen(|config| config.appc_keyring = "/nonexistent/keyring".into()).await;
    let error = store.pull("appc://app").await.unwrap_err();
    assert!(error.kind == Kind::FailedPrecondition && error.to_string().contains("/nonexistent/keyring"), "{error}");
}

/// Puts `rootfs/` in front of every name of a layer, as one does who makes an ACI of it: no other byte changes but checksums.
fn prefixed(layer: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(block) = layer.get(at..at + 512).filter(|b| b.iter().any(|b| *b != 0)) {
        let mut header: [u8; 512] = block.try_into().unwrap();
        let size = u64::from_str_radix(std::str::from_utf8(&header[124..135]).unwrap().trim_matches(['\0', ' ']), 8).unwrap() as usize;
        for field in [0, 157] {
            // Names, and targets of hard links.
            if field == 0 || header[156] == b'1' {
                assert_eq!(header[field + 93], 0, "this layer has short names only");
                header.copy_within(field..field + 93, field + 7);
                header[field..field + 7].copy_from_slice(b"rootfs/");
            }
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        let data = size.next_multiple_of(512);
        out.extend_from_slice(&layer[at + 512..at + 512 + data]);
        at += 512 + data;
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_layer_of_oci_and_appc_is_kept_once() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("oci").display().to_string();
    let image = format!("{layout}:tag");
    let umoci = |args: &[&str]| run(Command::new("umoci").args(args));
    let bundle = dir.path().join("bundle");
    umoci(&["init", "--layout", &layout]);
    umoci(&["new", "--image", &image]);
    umoci(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
    put(&bundle.join("rootfs"), "usr/share/doc", "text");
    std::fs::hard_link(bundle.join("rootfs/usr/share/doc"), bundle.join("rootfs/usr/share/same")).unwrap();
    std::os::unix::fs::symlink("usr/share", bundle.join("rootfs/share")).unwrap();
    umoci(&["repack", "--image", &image, bundle.to_str().unwrap()]);

    let prefix = format!("{}/images/", dir.path().display());
    let store = Store::at(&prefix).await;
    let ids = store.provisioner.load(Path::new(&layout)).await.unwrap();
    let oci = store.provisioner.resolve(ids[0].as_str()).unwrap();
    let blob = dir.path().join("oci/blobs").join(oci.layers[0].blob.as_ref().unwrap().as_str().replace(':', "/"));
    let layer = run(Command::new("gzip").arg("-dc").arg(&blob));

    let document = manifest("from/oci", "latest", json!({})).to_string();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(document.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "manifest", document.as_bytes()).unwrap();
    let mut archive = builder.into_inner().unwrap();
    archive.truncate(archive.len() - 1024);
    archive.extend(prefixed(&layer));
    archive.extend([0; 1024]);
    put(dir.path(), "images/from/oci-latest-linux-amd64.aci", "");
    std::fs::write(dir.path().join("images/from/oci-latest-linux-amd64.aci"), gzip(&archive)).unwrap();
    let appc = store.image("appc://from/oci").await;
    assert_eq!(appc.layers[0].diff_id, oci.layers[0].diff_id);
    assert_eq!((store.layers(), store.provisioner.list().len()), (1, 2));
    // Whoever goes first, the other one keeps the layer.
    store.provisioner.remove(oci.id.as_str()).await.unwrap();
    assert_eq!(store.layers(), 1);
    store.provisioner.remove(appc.id.as_str()).await.unwrap();
    assert_eq!(store.layers(), 0);
}
