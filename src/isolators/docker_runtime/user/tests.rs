//! Tests of the user's resolution, attack cases 16, 17 and 21 among them.

use super::*;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    app:x:1000:2000::/home/app:/bin/sh\n\
    1001:x:0:0:looks like a number:/:/bin/sh\n\
    huge:x:4294967296:0::/:/bin/sh\n\
    minus:x:-1:0::/:/bin/sh\n\
    empty:x::0::/:/bin/sh\n\
    short\n\
    badgid:x:1005:x::/:/bin/sh\n";
const GROUP: &str =
    "root:x:0:\nstaff:x:50:app,other\nwheel:x:10:app\nbad:x:99999999999:app\nneg:x:-1:app\nsub:x:77:application\n1002:x:0:\nlarge:x:2147483648:\n";

fn image() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("etc")).unwrap();
    std::fs::write(dir.path().join("etc/passwd"), PASSWD).unwrap();
    std::fs::write(dir.path().join("etc/group"), GROUP).unwrap();
    let layers = vec![dir.path().to_owned()];
    (dir, layers)
}

fn facts(user: &User) -> (u32, u32, Vec<u32>) {
    (user.uid(), user.gid(), user.additional_gids().clone().unwrap())
}

#[test]
fn the_images_user_in_all_its_forms() {
    let (_dir, layers) = image();
    for (text, wanted) in [
        ("", (0, 0, vec![0])),
        ("app", (1000, 2000, vec![2000, 50, 10])),
        ("1000", (1000, 2000, vec![2000, 50, 10])),
        ("1000:0", (1000, 0, vec![0, 50, 10])),
        ("app:staff", (1000, 50, vec![50, 10])),
        ("app:", (1000, 2000, vec![2000, 50, 10])),
        (":wheel", (0, 10, vec![10])),
        ("4242", (4242, 0, vec![0])),
        ("4242:33", (4242, 33, vec![33])),
        // Digits are a number, whatever the image's files say.
        ("1001", (1001, 0, vec![0])),
        ("5:1002", (5, 1002, vec![1002])),
        ("2147483647:2147483647", (i32::MAX as u32, i32::MAX as u32, vec![i32::MAX as u32])),
    ] {
        let user = resolve(&UserSpec::default(), text, &layers).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert_eq!(facts(&user), wanted, "{text:?}");
    }
}

#[test]
fn numbers_that_do_not_fit_are_never_another_number() {
    let (_dir, layers) = image();
    for bad in [
        "2147483648",
        "4294967295",
        "4294967296",
        "18446744073709551616",
        "-1",
        "+0",
        "-0",
        "0:99999999999",
        "0:-1",
        "1:2:3",
        "a\nb",
        "nobody",
        "app:nogroup",
        "huge",
        "minus",
        "empty",
        "short",
        "badgid",
        "0:large",
        "0:bad",
        "0:neg",
        " 0",
        "0x0",
    ] {
        assert!(resolve(&UserSpec::default(), bad, &layers).is_err(), "{bad:?}");
    }
    for (uid, gid) in [(u32::MAX, None), (1, Some(u32::MAX))] {
        assert!(resolve(&UserSpec { uid: Some(uid), gid, ..UserSpec::default() }, "", &layers).is_err());
    }
    assert!(resolve(&UserSpec { supplemental_groups: vec![u32::MAX], ..UserSpec::default() }, "", &layers).is_err());
}

#[test]
fn the_request_replaces_the_images_user_as_a_whole() {
    let (_dir, layers) = image();
    let ask = |uid, username: Option<&str>, gid| UserSpec { uid, gid, username: username.map(str::to_owned), ..UserSpec::default() };
    let get = |asked: &UserSpec| resolve(asked, "4242:33", &layers).map(|u| (u.uid(), u.gid())).ok();
    assert_eq!(get(&ask(Some(1000), None, None)), Some((1000, 2000)));
    assert_eq!(get(&ask(Some(3), None, None)), Some((3, 0)));
    assert_eq!(get(&ask(Some(3), Some("app"), Some(9))), Some((3, 9)));
    assert_eq!(get(&ask(None, Some("app"), None)), Some((1000, 2000)));
    assert_eq!(get(&ask(None, Some("nobody"), None)), None);
    assert_eq!(get(&ask(None, None, Some(9))), None);
    assert_eq!(get(&ask(None, Some(""), None)), Some((4242, 33)));
}

#[test]
fn merge_takes_the_images_groups_and_strict_does_not() {
    let (_dir, layers) = image();
    let ask = |strict_groups| UserSpec { uid: Some(1000), supplemental_groups: vec![1234, 50, 1234], strict_groups, ..UserSpec::default() };
    assert_eq!(facts(&resolve(&ask(false), "", &layers).unwrap()).2, [2000, 50, 10, 1234]);
    assert_eq!(facts(&resolve(&ask(true), "", &layers).unwrap()).2, [2000, 1234, 50]);
}

#[test]
fn hostile_files_fail_and_absent_ones_name_nobody() {
    let (dir, layers) = image();
    std::fs::write(dir.path().join("etc/passwd"), "x".repeat(MAX_FILE as usize + 1)).unwrap();
    assert_eq!(resolve(&UserSpec::default(), "app", &layers).unwrap_err().kind, crate::model::Kind::ResourceExhausted);
    std::fs::remove_file(dir.path().join("etc/passwd")).unwrap();
    assert_eq!(facts(&resolve(&UserSpec::default(), "1000", &layers).unwrap()), (1000, 0, vec![0]));
    assert!(resolve(&UserSpec::default(), "app", &layers).is_err());
    nix::unistd::mkfifo(&dir.path().join("etc/passwd"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(resolve(&UserSpec::default(), "1000", &layers).is_err());
}
