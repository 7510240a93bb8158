//! The table of section 17 of `docs/design.md`, held against the tree: each row names tests, and each
//! test that it names exists.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The words that say which crate a name is of, and where that is; without one it is `tests/tests`.
const CRATES: [(&str, &str); 6] = [
    ("agent", "agent"),
    ("target", "nbd-target"),
    ("link", "lib/link"),
    ("nbd", "lib/nbd"),
    ("simulator", "tests/simulate"),
    ("xtask", "tools/xtask"),
];
const HOST_TESTS: &str = "tests/tests";

/// A test: the parts of its file's path, without `.rs`, and its name.
type Test = Vec<String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All tests below a directory of the tree.
fn tests_below(dir: &str) -> Vec<Test> {
    let mut tests = Vec::new();
    let mut dirs = vec![root().join(dir)];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(&at).expect("a directory of the tree") {
            let path = entry.expect("listed").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).expect("text");
                let below = path.strip_prefix(root().join(dir)).expect("below it");
                let parts = below.with_extension("");
                let parts = parts.iter().map(|part| part.to_string_lossy().into_owned());
                let module: Vec<String> = parts.collect();
                let named = |name: String| [module.clone(), vec![name]].concat();
                tests.extend(names(&text).into_iter().map(named));
            }
        }
    }
    tests
}

/// The names of the functions of a file that are tests.
fn names(text: &str) -> Vec<String> {
    let mut is_test = false;
    let mut names = Vec::new();
    for line in text.lines().map(str::trim) {
        let name = line.trim_start_matches("async ").strip_prefix("fn ");
        match name.and_then(|name| name.split_once('(')) {
            Some((name, _)) if std::mem::take(&mut is_test) => names.push(name.to_owned()),
            Some(_) => {}
            None => is_test |= line == "#[test]" || line.starts_with("#[tokio::test"),
        }
    }
    names
}

/// Whether a name of the table is a test, a module with tests, or, with `*` at its end, how a test's
/// name begins.
fn is_named(name: &str, test: &Test) -> bool {
    let parts: Vec<&str> = name.split("::").collect();
    test.windows(parts.len()).any(|window| {
        window.iter().zip(&parts).all(|(have, want)| match want.strip_suffix('*') {
            Some(beginning) => have.starts_with(beginning),
            None => have == want,
        })
    })
}

/// The names in a cell, each with the directory of the crate that the word before it, or before one of
/// the names before it, says.
fn named_in(cell: &str) -> Vec<(Option<&'static str>, String)> {
    let mut place = None;
    let mut names = Vec::new();
    for (number, part) in cell.split('`').enumerate() {
        if number % 2 == 1 {
            names.push((place, part.to_owned()));
            continue;
        }
        for word in part.split(|letter: char| !letter.is_alphanumeric()) {
            let of = CRATES.iter().find(|(name, _)| *name == word);
            place = of.map(|(_, dir)| *dir).or(place);
        }
    }
    names
}

#[test]
fn every_row_names_tests_that_exist() {
    let design = fs::read_to_string(root().join("docs/design.md")).expect("the document");
    let section = design.split("\n## ").find(|section| section.starts_with("17. "));
    let table = section.expect("section 17").lines().filter(|line| line.starts_with('|'));
    let rows: Vec<&str> = table.skip(2).collect();
    assert!(rows.len() > 20, "{} rows", rows.len());
    let host = tests_below(HOST_TESTS);
    let crates = CRATES.map(|(_, dir)| (dir, tests_below(dir)));
    let mut missing = Vec::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [what, _, _, tests] = cells[..] else { panic!("not four cells: {row}") };
        let named = named_in(tests);
        if named.is_empty() {
            missing.push(format!("'{what}' names no test"));
        }
        for (place, name) in named {
            let of = crates.iter().filter(|(dir, _)| Some(*dir) == place);
            let mut all = of.flat_map(|(_, tests)| tests).chain(&host);
            if !all.any(|test| is_named(&name, test)) {
                missing.push(format!("'{what}' names {name}, which is no test"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn names_are_found_and_others_are_not() {
    let text =
        "#[test]\nfn one() {}\nfn two() {}\n#[tokio::test]\n#[ignore]\nasync fn three() {}\n";
    assert_eq!(names(text), ["one", "three"]);
    let test: Test = ["src", "conn", "tests", "a_peer_that_stops"].map(str::to_owned).to_vec();
    for name in ["a_peer_that_stops", "conn::tests", "tests::a_peer_*", "conn"] {
        assert!(is_named(name, &test), "{name}");
    }
    for name in ["a_peer", "conn::a_peer_that_stops", "tests::conn", "b*"] {
        assert!(!is_named(name, &test), "{name}");
    }
    let cell = "`a`, link `b`, `c` (simulation), target `d`";
    let found = named_in(cell);
    let places: Vec<_> = found.iter().map(|(place, name)| (*place, name.as_str())).collect();
    let (link, target) = (Some("lib/link"), Some("nbd-target"));
    assert_eq!(places, [(None, "a"), (link, "b"), (link, "c"), (target, "d")]);
}
