//! House rules that a machine can check: floors, unsafe placement, file length, module docs, the fixed top level.
//! Each rule collects every offence before it fails, so that one run shows them all.

#![allow(clippy::unwrap_used)] // a test that cannot read the tree has failed

use std::path::{Path, PathBuf};

/// Modules by floor; a module may name only modules of a lower number. The table in `src/lib.rs` explains them.
const FLOORS: &[(&str, u32)] = &[
    ("sys", 0),
    ("stdx", 0),
    ("wire", 0),
    ("model", 10),
    ("disk", 20),
    ("cgroups", 20),
    ("init", 25),
    ("provisioner", 30),
    ("launcher", 30),
    ("network", 30),
    ("shim", 30),
    ("isolators", 40),
    ("containerizer", 50),
    ("stream", 60),
    ("observe", 60),
    ("cri", 70),
    ("operator", 70),
    ("agent", 70),
    ("executor", 70),
    ("daemon", 80),
];
/// Synchronous floors: they run in forked children or are pure data.
const WITHOUT_TOKIO: &[&str] = &["sys", "model", "disk", "cgroups", "init"];
/// The only modules that may speak a wire protocol's generated types.
const MAY_NAME_WIRE: &[&str] = &["cri", "operator", "agent", "executor", "daemon"];
/// Hard limit of lines in a source file; about 400 is the aim.
const MAX_LINES: usize = 600;
/// What may lie at the top of the repository.
const TOP_LEVEL: &[&str] = &[
    ".cargo",
    ".ci",
    ".git",
    ".gitignore",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "build.rs",
    "deploy",
    "hack",
    "protos",
    ".rustfmt.toml",
    "src",
    "target",
    "tests",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(below: &str) -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        let mut entries: Vec<_> = std::fs::read_dir(dir).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(below), &mut found);
    assert!(!found.is_empty(), "no Rust files below {below}");
    found
}

/// The floor module a file below `src/` belongs to; `None` for `lib.rs` and `bin/`.
fn module_of(path: &Path) -> Option<String> {
    let relative = path.strip_prefix(root().join("src")).unwrap();
    let first = relative.components().next()?.as_os_str().to_string_lossy().into_owned();
    let name = first.strip_suffix(".rs").unwrap_or(&first).to_owned();
    (name != "lib" && name != "bin").then_some(name)
}

fn is_test_file(path: &Path) -> bool {
    path.components().any(|c| matches!(c.as_os_str().to_str(), Some("tests" | "tests.rs")))
}

/// Lines of code with comments taken off (strings that contain `//` are rare enough here).
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(n, line)| (n + 1, line.split("//").next().unwrap_or_default()))
}

fn crate_names(line: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + "crate::".len()..];
        // `use crate::{a::b, c::d}`: the first names inside one level of braces.
        if let Some(inside) = rest.strip_prefix('{') {
            names.extend(inside.split('}').next().unwrap_or_default().split(',').map(|part| part.trim().split("::").next().unwrap_or_default().to_owned()));
        } else {
            names.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    names
}

fn report(rule: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

#[test]
fn modules_name_only_lower_floors() {
    let floor = |name: &str| FLOORS.iter().find(|(n, _)| *n == name).map(|(_, f)| *f);
    let mut offences = Vec::new();
    for (path, text) in rust_files("src") {
        let Some(own) = module_of(&path) else { continue };
        let Some(own_floor) = floor(&own) else {
            offences.push(format!("{}: module {own} stands on no floor", path.display()));
            continue;
        };
        if is_test_file(&path) {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for (n, line) in code_lines(code) {
            for named in crate_names(line) {
                if named != own && floor(&named).is_some_and(|f| f >= own_floor) {
                    offences.push(format!("{}:{n}: {own} names {named}", path.display()));
                }
                if named == "wire" && !MAY_NAME_WIRE.contains(&own.as_str()) && own != "wire" {
                    offences.push(format!("{}:{n}: {own} names a wire protocol", path.display()));
                }
            }
            if WITHOUT_TOKIO.contains(&own.as_str()) && line.contains("tokio::") {
                offences.push(format!("{}:{n}: {own} is synchronous and names tokio", path.display()));
            }
        }
    }
    report("a module names only lower floors", &offences);
}

#[test]
fn unsafe_stands_in_sys_alone() {
    let mut offences = Vec::new();
    for (path, text) in rust_files("src") {
        if module_of(&path).as_deref() == Some("sys") {
            continue;
        }
        for (n, line) in code_lines(&text) {
            let word = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
            if word || (line.contains("unsafe_code") && line.contains("allow")) && !path.ends_with("wire/mod.rs") {
                offences.push(format!("{}:{n}: {}", path.display(), line.trim()));
            }
        }
    }
    report("unsafe only in src/sys", &offences);
}

#[test]
fn files_are_short_and_say_what_they_are_for() {
    let mut offences = Vec::new();
    for (path, text) in rust_files("src").into_iter().chain(rust_files("tests")) {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            offences.push(format!("{}: {lines} lines, the limit is {MAX_LINES}", path.display()));
        }
        if !text.trim_start().starts_with("//!") {
            offences.push(format!("{}: does not open with //!", path.display()));
        }
    }
    report("files are short and open with their purpose", &offences);
}

#[test]
fn no_test_is_switched_off_and_nothing_is_a_stub() {
    // Spelled in two halves so that this file does not offend itself.
    let forbidden = [concat!("#[ign", "ore"), concat!("todo", "!("), concat!("unimpl", "emented!("), concat!("assert!(tr", "ue")];
    let mut offences = Vec::new();
    for (path, text) in rust_files("src").into_iter().chain(rust_files("tests")) {
        for (n, line) in text.lines().enumerate() {
            offences.extend(forbidden.iter().filter(|f| line.contains(**f)).map(|f| format!("{}:{}: {f}", path.display(), n + 1)));
        }
    }
    report("no stubs, no switched-off tests", &offences);
}

#[test]
fn top_level_is_fixed() {
    let offences: Vec<_> = std::fs::read_dir(root())
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| !TOP_LEVEL.contains(&name.as_str()))
        .collect();
    report("the top level of the repository is fixed", &offences);
}

#[test]
fn every_dependency_says_what_it_is_for() {
    let text = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let mut in_dependencies = false;
    let mut offences = Vec::new();
    for line in text.lines() {
        if line.starts_with('[') {
            in_dependencies = line.contains("dependencies]");
        } else if in_dependencies && line.contains(" = ") && !line.trim_start().starts_with('#') && !line.contains(" # ") {
            offences.push(line.to_owned());
        }
    }
    report("a dependency line says what it is for", &offences);
}

/// Files that the README's tables name exist, and so do the flags.
#[test]
fn the_readme_names_what_exists() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let flags = std::fs::read_to_string(root().join("src/daemon/flags.rs")).unwrap();
    let mut offences = Vec::new();
    for line in text.lines().filter(|l| l.starts_with('|')) {
        for word in line.split('`').skip(1).step_by(2) {
            let flag = word.strip_prefix("--").map(|f| f.split('=').next().unwrap_or_default());
            let missing = match flag {
                Some(flag) => !flags.contains(&format!("name: \"{flag}\"")),
                None => (word.starts_with("src/") || word.starts_with("tests/")) && !root().join(word).exists(),
            };
            if missing {
                offences.push(word.to_owned());
            }
        }
    }
    report("the README names files and flags that exist", &offences);
}
