//! Files from this machine, from a name node and a data node in this process, and by a stand-in for the `hadoop` command that ends
//! and speaks as the real one does.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::provisioner::pullers::registry::tests::stub::{Answer, Request, Stub, noise};

/// A cluster of one data node and as many name nodes as wanted.
struct Cluster {
    data: Stub,
    name: Stub,
    standby: Stub,
}

const STANDBY: &str = r#"{"RemoteException":{"exception":"StandbyException","javaClassName":"org.apache.hadoop.ipc.StandbyException","message":"Operation category READ is not supported in state standby"}}"#;

fn query(request: &Request) -> HashMap<String, String> {
    let (_, query) = request.path.split_once('?').unwrap_or_default();
    query.split('&').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn exception(status: u16, class: &str, message: &str) -> Answer {
    let body = serde_json::json!({"RemoteException": {"exception": class, "javaClassName": format!("x.{class}"), "message": message}});
    Answer { status, ..Answer::ok(body.to_string()) }.header("Content-Type", "application/json")
}

impl Cluster {
    /// With `files` by path; `cut`: how much of the n-th answer of the data node arrives.
    fn new(files: &[(&str, Vec<u8>)], cut: impl Fn(usize) -> usize + Send + Sync + 'static) -> Self {
        let files: HashMap<String, Vec<u8>> = files.iter().map(|(p, b)| ((*p).to_owned(), b.clone())).collect();
        let known = files.clone();
        let data = Stub::new(move |r| {
            let path = r.path.split('?').next().unwrap_or_default();
            let from = query(r).get("offset").map_or(0, |o| o.parse().unwrap());
            Some(Answer::ok(&files[path][from..]).cut(cut(r.n)))
        });
        let host = data.host.clone();
        let name = Stub::new(move |r| {
            let path = r.path.split('?').next().unwrap_or_default().strip_prefix("/webhdfs/v1").unwrap_or_default();
            let Some(bytes) = known.get(path) else {
                return Some(match path {
                    "/dir" => Answer::ok(r#"{"FileStatus":{"length":0,"type":"DIRECTORY","modificationTime":1}}"#),
                    "/private" => exception(403, "AccessControlException", "Permission denied: user=dr.who"),
                    "/kerberos" => Answer::status(401),
                    "/html" => Answer::ok("<html>"),
                    _ => exception(404, "FileNotFoundException", &format!("File does not exist: {path}")),
                });
            };
            Some(match query(r).get("op").map(String::as_str) {
                Some("GETFILESTATUS") => Answer::ok(format!(r#"{{"FileStatus":{{"length":{},"type":"FILE","modificationTime":1}}}}"#, bytes.len())),
                Some("OPEN") => {
                    let rest = r.path.split_once('?').map_or("", |(_, q)| q);
                    Answer::status(307).header("Location", format!("http://{host}{path}?{rest}"))
                }
                _ => Answer::status(400),
            })
        });
        Self { data, name, standby: Stub::new(|_| Some(Answer { status: 403, ..Answer::ok(STANDBY) })) }
    }

    fn config(&self) -> Config {
        let mut config = Config { pull_retries: 1, ..Config::default() };
        config.hdfs.webhdfs.insert("cluster".to_owned(), vec![self.standby.url(), self.name.url()]);
        config
    }
}

fn fetcher(config: &Config) -> Fetcher {
    Fetcher::new(config, &Registries::new(config))
}

/// What fetching `uri` gives: the bytes at the target, or the error; and that nothing else is left.
async fn fetch(config: &Config, uri: &str) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let fetched = fetcher(config).fetch(uri, &to, &CancellationToken::new()).await;
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    match fetched {
        Ok(bytes) => {
            let read = std::fs::read(&to).unwrap();
            assert_eq!((left.len(), bytes), (1, read.len() as u64), "{left:?}");
            Ok(read)
        }
        Err(e) => {
            assert!(left.is_empty(), "{left:?}");
            Err(e)
        }
    }
}

async fn kind(config: &Config, uri: &str) -> (Kind, String) {
    let e = fetch(config, uri).await.unwrap_err();
    (e.kind, e.to_string())
}

#[tokio::test]
async fn files_of_this_machine_in_every_spelling() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a file%20");
    let bytes = noise(100_000);
    std::fs::write(&path, &bytes).unwrap();
    let config = Config::default();
    let path = path.display();
    for uri in [format!("{path}"), format!("file:{path}"), format!("file://{path}"), format!("file://localhost{path}")] {
        assert_eq!(fetch(&config, &uri).await.unwrap(), bytes, "{uri}");
    }
    let mut small = config.clone();
    small.limits.layer_bytes = 99_999;
    assert_eq!(kind(&small, &path.to_string()).await.0, Kind::ResourceExhausted);
    for (uri, expected) in [
        (format!("{path}.not"), Kind::NotFound),
        (format!("{path}/below"), Kind::NotFound),
        (dir.path().display().to_string(), Kind::InvalidArgument),
        ("/dev/zero".to_owned(), Kind::InvalidArgument),
        ("file://host/x".to_owned(), Kind::InvalidArgument),
        ("relative".to_owned(), Kind::InvalidArgument),
        ("ftp://a/b".to_owned(), Kind::InvalidArgument),
        ("hdfs://a".to_owned(), Kind::InvalidArgument),
    ] {
        assert_eq!(kind(&config, &uri).await.0, expected, "{uri}");
    }
    assert!(kind(&config, "hdfs://user:hunter2@nn").await.1.contains("fetch hdfs://nn"));
}

#[tokio::test]
async fn webhdfs_by_the_active_name_node_and_its_data_node() {
    let bytes = noise(3 << 20);
    let cluster = Cluster::new(&[("/a/b%2520:c.tar", bytes.clone()), ("/empty", Vec::new())], |_| usize::MAX);
    let mut config = cluster.config();
    config.hdfs.user = "alice".to_owned();
    assert_eq!(fetch(&config, "hdfs://cluster/a/b%20:c.tar").await.unwrap(), bytes);
    assert_eq!(fetch(&config, "hdfs://cluster/empty").await.unwrap(), b"");
    assert!(cluster.name.seen("").iter().all(|r| query(r)["user.name"] == "alice"));
    assert!(!cluster.standby.seen("").is_empty());
    // The same by its own scheme, and by an entry for every cluster.
    assert_eq!(fetch(&config, &format!("webhdfs://{}/a/b%20:c.tar", cluster.name.host)).await.unwrap(), bytes);
    for (uri, expected, word) in [
        ("hdfs://cluster/missing", Kind::NotFound, "File does not exist: /missing"),
        ("hdfs://cluster/dir", Kind::InvalidArgument, "directory"),
        ("hdfs://cluster/private", Kind::PermissionDenied, "user=dr.who"),
        ("hdfs://cluster/kerberos", Kind::Unauthenticated, "hadoop_home"),
        ("hdfs://cluster/html", Kind::DataLoss, "no answer of WebHDFS"),
    ] {
        let (kind, text) = kind(&config, uri).await;
        assert!(kind == expected && text.contains(word), "{uri}: {kind:?} {text}");
    }
    config.limits.layer_bytes = 1000;
    assert_eq!(kind(&config, "hdfs://cluster/a/b%20:c.tar").await.0, Kind::ResourceExhausted);
    // All on standby: both are named.
    config.hdfs.webhdfs.insert("cluster".to_owned(), vec![cluster.standby.url(), Stub::honest().url()]);
    config.pull_retries = 0;
    let (kind, text) = kind(&config, "hdfs://cluster/x").await;
    assert!(kind == Kind::Unavailable && text.contains("StandbyException"), "{text}");
}

#[tokio::test]
async fn a_broken_transfer_goes_on_where_it_stopped() {
    let bytes = noise(4 << 20);
    // Each answer breaks off after a mebibyte and a bit.
    let cluster = Cluster::new(&[("/x", bytes.clone())], |_| (1 << 20) + 1000);
    assert_eq!(fetch(&cluster.config(), "hdfs://cluster/x").await.unwrap(), bytes);
    let offsets: Vec<u64> = cluster.data.seen("").iter().map(|r| query(r).get("offset").map_or(0, |o| o.parse().unwrap())).collect();
    assert!(offsets.len() >= 4 && offsets.is_sorted_by(|a, b| a < b), "{offsets:?}");
    // One that gives nothing is given up.
    let cluster = Cluster::new(&[("/x", bytes)], |_| 10);
    let (kind, text) = kind(&cluster.config(), "hdfs://cluster/x").await;
    assert!(kind == Kind::Unavailable && cluster.data.seen("").len() == 2, "{text}");
}

#[tokio::test]
async fn who_leaves_leaves_nothing() {
    let silent = Stub::new(|r| {
        Some(if r.path.contains("OPEN") {
            Answer { hang: true, ..Answer::ok(noise(1000)).cut(10) }
        } else {
            Answer::ok(r#"{"FileStatus":{"length":1000,"type":"FILE","modificationTime":1}}"#)
        })
    });
    let config = Config::default();
    let dir = tempfile::tempdir().unwrap();
    let (cancel, to) = (CancellationToken::new(), dir.path().join("to"));
    let fetcher = fetcher(&config);
    let uri = format!("webhdfs://{}/x", silent.host);
    let running = fetcher.fetch(&uri, &to, &cancel);
    let leave = async {
        while silent.seen("OPEN").is_empty() {
            tokio::task::yield_now().await;
        }
        cancel.cancel();
    };
    let (fetched, ()) = tokio::join!(running, leave);
    assert_eq!(fetched.unwrap_err().kind, Kind::Cancelled);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A `hadoop` whose cluster `hdfs://nn/` is the directory `files` beside it.
fn hadoop_home() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"#!/bin/sh
root=$(dirname "$0")/../files
echo "$@" >> "$root/../asked"
echo '26/01/01 00:00:00 WARN util.NativeCodeLoader: Unable to load native-hadoop library for your platform... using builtin-java classes where applicable' >&2
[ "$1" = version ] && { echo 'Hadoop 3.3.6'; exit 0; }
[ "$1" = fs ] || { echo "ERROR: $1 is not COMMAND nor fully qualified CLASSNAME." >&2; exit 1; }
case $2 in -test) uri=$4;; *) uri=$3;; esac
case $uri in
hdfs://nn/*) path=$root/${uri#hdfs://nn/};;
*) echo "${2#-}: Call From here/127.0.0.1 to other:8020 failed on connection exception: java.net.ConnectException: Connection refused" >&2; exit 1;;
esac
case $2 in
-test) case $3 in -e) [ -e "$path" ];; -d) [ -d "$path" ];; esac; exit $?;;
-copyToLocal)
  [ -e "$path" ] || { echo "copyToLocal: \`$uri': No such file or directory" >&2; exit 1; }
  [ -e "$4" ] && { echo "copyToLocal: \`$4': File exists" >&2; exit 1; }
  [ "${uri%/hang}" = "$uri" ] || { echo part > "$4._COPYING_"; echo $$ > "$root/../pid"; sleep 1000; }
  cp -r "$path" "$4._COPYING_" && mv "$4._COPYING_" "$4";;
*) echo "${2#-}: Unknown command" >&2; exit 255;;
esac
"#;
    for name in ["bin", "files/a"] {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
    }
    // Copied from another file: a concurrent fork may hold the descriptor it was written by, and then execve says "text file busy".
    std::fs::write(dir.path().join("script"), script).unwrap();
    std::fs::copy(dir.path().join("script"), dir.path().join("bin/hadoop")).unwrap();
    std::fs::set_permissions(dir.path().join("bin/hadoop"), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

#[tokio::test]
async fn the_hadoop_command_fetches_and_says_why_not() {
    let home = hadoop_home();
    let mut config = Config::default();
    config.hdfs.hadoop_home = home.path().to_owned();
    let bytes = noise(100_000);
    std::fs::write(home.path().join("files/a/b:c.tar"), &bytes).unwrap();
    std::fs::write(home.path().join("files/hang"), "").unwrap();
    let fetcher = fetcher(&config);
    let dir = tempfile::tempdir().unwrap();
    let cancel = CancellationToken::new();
    let to = dir.path().join("to");
    for _ in 0..2 {
        assert_eq!(fetcher.fetch("hdfs://nn/a/b:c.tar", &to, &cancel).await.unwrap(), bytes.len() as u64);
        assert_eq!(std::fs::read(&to).unwrap(), bytes);
    }
    let asked = std::fs::read_to_string(home.path().join("asked")).unwrap();
    assert_eq!((asked.matches("version").count(), asked.lines().count()), (1, 3), "{asked}");
    for (uri, expected, word) in [
        ("hdfs://nn/missing", Kind::NotFound, "No such file or directory (exit status: 1)"),
        ("hdfs://other/x", Kind::Unavailable, "Connection refused"),
        ("hdfs://nn/a", Kind::InvalidArgument, "directory"),
        ("s3a://bucket/x", Kind::Unavailable, "Connection refused"),
    ] {
        let e = fetch(&config, uri).await.unwrap_err();
        assert!(e.kind == expected && e.to_string().contains(word), "{uri}: {:?} {e}", e.kind);
    }
    let mut small = config.clone();
    small.limits.layer_bytes = 1000;
    assert_eq!(fetch(&small, "hdfs://nn/a/b:c.tar").await.unwrap_err().kind, Kind::ResourceExhausted);
    // A cluster with a WebHDFS address of its own is not asked by the command.
    let cluster = Cluster::new(&[("/x", b"by http".to_vec())], |_| usize::MAX);
    small.hdfs.webhdfs = cluster.config().hdfs.webhdfs;
    assert_eq!(fetch(&small, "hdfs://cluster/x").await.unwrap(), b"by http");
    // Cancelled: dead with what it started, nothing left.
    let fetched = {
        let running = fetcher.fetch("hdfs://nn/hang", &to, &cancel);
        let leave = async {
            while !home.path().join("pid").exists() {
                tokio::task::yield_now().await;
            }
            cancel.cancel();
        };
        tokio::join!(running, leave).0
    };
    assert_eq!(fetched.unwrap_err().kind, Kind::Cancelled);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_hadoop_home_without_a_command_is_an_error_and_none_at_all_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.hdfs.hadoop_home = dir.path().to_owned();
    let (kind, text) = kind(&config, "hdfs://nn/x").await;
    assert!(kind == Kind::FailedPrecondition && text.contains("hadoop_home"), "{text}");
    // Without the setting: WebHDFS at the address that the entry for all others gives.
    let cluster = Cluster::new(&[("/x", b"x".to_vec())], |_| usize::MAX);
    let config = Config { hdfs: Hdfs { webhdfs: [("*".to_owned(), vec![cluster.name.url()])].into(), ..Hdfs::default() }, ..Config::default() };
    assert_eq!(fetch(&config, "hdfs://nn:8020/x").await.unwrap(), b"x");
    assert_eq!(fetch(&config, "hdfs:///x").await.unwrap(), b"x");
}

#[test]
fn addresses_of_name_nodes() {
    let fetcher = fetcher(&Config::default());
    for (authority, base) in [("nn", "http://nn:9870"), ("nn:8020", "http://nn:9870"), ("[::1]:8020", "http://[::1]:9870")] {
        assert_eq!(fetcher.name_nodes(authority), (vec![base.to_owned()], false), "{authority}");
    }
    assert_eq!(fetcher.name_nodes(""), (vec![], false));
    assert_eq!(with_port("https", "a", 9871), "https://a:9871");
    assert_eq!(with_port("https", "a:1", 9871), "https://a:1");
}
