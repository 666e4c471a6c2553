//! Manifests, whole and hostile.

use serde_json::json;

use super::*;

fn platform() -> Platform {
    Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() }
}

fn whole() -> Value {
    json!({
        "acKind": "ImageManifest", "acVersion": "0.8.11+git", "name": "example.com/reduce-worker",
        "labels": [{"name": "version", "value": "1.0.0"}, {"name": "arch", "value": "amd64"}, {"name": "os", "value": "linux"}],
        "app": {
            "exec": ["/usr/bin/reduce-worker", "--quiet"], "user": "100", "group": "300", "supplementaryGIDs": [400, 500],
            "eventHandlers": [{"exec": ["/usr/bin/data-downloader"], "name": "pre-start"}],
            "workingDirectory": "/opt/work",
            "environment": [{"name": "REDUCE_WORKER_DEBUG", "value": "true"}],
            "isolators": [
                {"name": "resource/cpu", "value": {"request": "250m", "limit": "1.5"}},
                {"name": "resource/memory", "value": {"request": "1G", "limit": "2Gi"}},
                {"name": "os/linux/capabilities-retain-set", "value": {"set": ["CAP_NET_BIND_SERVICE"]}},
                {"name": "os/linux/no-new-privileges", "value": true},
                {"name": "example.com/special", "value": 1}
            ],
            "mountPoints": [{"name": "work", "path": "/var/lib/work", "readOnly": false}, {"name": "config", "path": "/etc/work", "readOnly": true}],
            "ports": [{"name": "health", "port": 4000, "protocol": "tcp", "socketActivated": true}]
        },
        "dependencies": [{"imageName": "example.com/base", "imageID": format!("sha512-{}", "a".repeat(128)), "size": 22_017_258,
            "labels": [{"name": "os", "value": "linux"}]}],
        "pathWhitelist": ["/etc/ca/example.com/crt", "//usr/bin//map", "/opt/empty/"],
        "annotations": [{"name": "created", "value": "2014-10-27T19:32:27.67021798Z"}, {"name": "authors", "value": "Carly"}],
        "unknown": {"to": "us"}
    })
}

fn read(manifest: &Value) -> Result<Manifest> {
    parse(manifest.to_string().as_bytes(), &platform())
}

#[test]
fn everything_in_a_manifest_is_understood() {
    let manifest = read(&whole()).unwrap();
    assert_eq!((manifest.name.as_str(), manifest.labels["version"].as_str()), ("example.com/reduce-worker", "1.0.0"));
    let config = &manifest.config;
    assert_eq!((config.entrypoint.as_slice(), config.cmd.as_slice()), (["/usr/bin/reduce-worker".to_owned()].as_slice(), ["--quiet".to_owned()].as_slice()));
    assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("100:300", "/opt/work"));
    assert_eq!((config.env.as_slice(), config.volumes.len()), (["REDUCE_WORKER_DEBUG=true".to_owned()].as_slice(), 2));
    assert_eq!((config.created.as_str(), config.labels["authors"].as_str()), ("2014-10-27T19:32:27.67021798Z", "Carly"));
    let appc = config.appc.as_ref().unwrap();
    assert_eq!((appc.supplementary_gids.as_slice(), appc.read_only.as_slice()), ([400, 500].as_slice(), ["/etc/work".to_owned()].as_slice()));
    assert_eq!((appc.resources.cpu_request, appc.resources.cpu_limit, appc.resources.memory_limit), (Some(250), Some(1500), Some(2 << 30)));
    assert!(appc.app && appc.no_new_privileges && appc.retain_capabilities.as_ref().unwrap() == &["CAP_NET_BIND_SERVICE"]);
    assert_eq!(appc.ignored, ["isolator example.com/special", "event handler pre-start"]);
    let dependency = &manifest.dependencies[0];
    assert_eq!(dependency.name.to_string(), format!("appc://example.com/base?os=linux@sha512-{}", "a".repeat(128)));
    assert_eq!(dependency.size, Some(22_017_258));
    assert_eq!(manifest.whitelist.iter().map(String::as_str).collect::<Vec<_>>(), ["etc/ca/example.com/crt", "opt/empty/", "usr/bin/map"]);
}

#[test]
fn little_is_enough() {
    let manifest = read(&json!({"acKind": "ImageManifest", "acVersion": "0.1.0", "name": "a"})).unwrap();
    assert!(!manifest.config.appc.unwrap().app && manifest.labels.is_empty());
    let manifest = read(&json!({"acKind": "ImageManifest", "acVersion": "0.1.0", "name": "a", "app": {"exec": ["/a"], "environment": null},
        "dependencies": [{"app": "old/style"}]}))
    .unwrap();
    assert_eq!((manifest.config.user.as_str(), manifest.dependencies[0].name.name.as_str()), ("0:0", "old/style"));
}

#[test]
fn what_breaks_the_grammar_is_refused() {
    let changes: Vec<(&str, Value)> = vec![
        ("/acKind", json!("PodManifest")),
        ("/acVersion", json!("1")),
        ("/acVersion", json!("1.x.0")),
        ("/name", json!("../x")),
        ("/name", json!("Upper")),
        ("/name", json!(7)),
        ("/labels/0/name", json!("Name")),
        ("/labels/0/name", json!("arch")),
        ("/labels/0/name", json!("name")),
        ("/labels/0/value", json!("")),
        ("/annotations/0/name", json!("authors")),
        ("/dependencies/0/imageName", json!("a//b")),
        ("/dependencies/0/imageID", json!("sha512-aa")),
        ("/dependencies/0/imageID", json!(format!("sha512-{}/", "a".repeat(127)))),
        ("/dependencies/0/size", json!(-1)),
        ("/pathWhitelist/0", json!("etc/passwd")),
        ("/pathWhitelist/0", json!("/etc/../x")),
        ("/app/workingDirectory", json!("opt")),
        ("/app/workingDirectory", json!("/a/../../b")),
        ("/app/user", json!("0:0")),
        ("/app/user", json!("a\nroot")),
        ("/app/supplementaryGIDs/0", json!(4_294_967_295u64)),
        ("/app/supplementaryGIDs/0", json!(-1)),
        ("/app/environment/0/name", json!("A=B")),
        ("/app/environment/0/value", json!("a\u{0}")),
        ("/app/mountPoints/0/path", json!("/")),
        ("/app/mountPoints/0/path", json!("//")),
        ("/app/mountPoints/0/path", json!("/../etc")),
        ("/app/mountPoints/0/name", json!("Work")),
        ("/app/ports/0/port", json!(0)),
        ("/app/ports/0/port", json!(65_536)),
        ("/app/eventHandlers/0/name", json!("on-fire")),
        ("/app/eventHandlers/0/exec", json!([])),
        ("/app/isolators/0/value/limit", json!("lots")),
        ("/app/isolators/1/name", json!("resource/cpu")),
        ("/app/isolators/2/value/set", json!([])),
        ("/app/isolators/2/value/set", json!(["NET_BIND_SERVICE"])),
        ("/app/isolators/3/value", json!("yes")),
        ("/app/isolators/4", json!({"name": "os/linux/capabilities-revoke-set", "value": {"set": ["CAP_KILL"]}})),
    ];
    for (pointer, value) in changes {
        let mut manifest = whole();
        *manifest.pointer_mut(pointer).unwrap() = value.clone();
        assert_eq!(read(&manifest).unwrap_err().kind, Kind::DataLoss, "{pointer} {value}");
    }
    for bytes in [b"".as_slice(), b"[]", b"{", b"{\"acKind\":\"ImageManifest\"}", &[b'['; 100_000]] {
        assert_eq!(parse(bytes, &platform()).unwrap_err().kind, Kind::DataLoss);
    }
}

#[test]
fn images_for_other_machines_are_none_of_ours() {
    for (label, value) in [(1, "aarch64"), (2, "freebsd")] {
        let mut manifest = whole();
        manifest["labels"][label]["value"] = json!(value);
        assert_eq!(read(&manifest).unwrap_err().kind, Kind::NotFound, "{value}");
    }
    for (architecture, variant, word) in
        [("amd64", "", "amd64"), ("arm64", "v8", "aarch64"), ("arm", "v6", "armv6l"), ("arm", "v7", "armv7l"), ("386", "", "i386"), ("s390x", "", "s390x")]
    {
        let platform = Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() };
        assert_eq!(words(&platform), ("linux", word));
    }
}
