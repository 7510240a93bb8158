//! Enforces `deny.toml` (licences, bans, sources) over what `cargo tree` says is built.
//!
//! The file is cargo-deny's; this reads the part of it that needs no network, so that the check costs a second
//! and no installation. (`cargo metadata` would not do: it also lists optional crates that no feature turns on.)

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use toml::Table;

use crate::process::capture;
use crate::spdx;

/// Checks the workspace at `root`; an error lists every package that breaks a rule.
pub fn check(root: &Path) -> Result<()> {
    let path = root.join("deny.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rules = Rules::parse(&text).with_context(|| format!("in {}", path.display()))?;
    let tree = capture(
        Command::new("cargo")
            .args(["tree", "--workspace", "--locked", "--target=x86_64-unknown-linux-gnu"])
            .args(["--edges=normal,build,dev", "--prefix=none", "--format={p}|{l}|"])
            .current_dir(root),
    )?;
    // A package that occurs again is listed again, with a mark after the last bar.
    let lines = tree.lines().filter(|line| !line.is_empty());
    let packages: Result<BTreeSet<Package>> = lines.map(Package::parse).collect();
    let packages = packages.context("in cargo tree's list")?;
    if packages.is_empty() {
        bail!("cargo tree lists no packages");
    }
    let problems: Vec<String> =
        packages.iter().flat_map(|package| rules.problems(package)).collect();
    if !problems.is_empty() {
        bail!("deny.toml refuses:\n  {}", problems.join("\n  "));
    }
    println!("deny: {} packages meet deny.toml", packages.len());
    Ok(())
}

/// The rules of `deny.toml` that are checked here.
struct Rules {
    licenses: Vec<String>,
    banned: Vec<String>,
}

/// What the rules judge of a package.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    version: String,
    license: String,
    /// Where it comes from; nothing for the registry, a path that starts with `/` for the workspace's own.
    source: Option<String>,
}

impl Package {
    /// Reads `name v1.0.0 (proc-macro) (source)|licence|`, both parentheses optional.
    fn parse(line: &str) -> Result<Package> {
        let mut fields = line.split('|');
        let (package, license) = (fields.next().unwrap_or_default(), fields.next());
        let mut words = package.splitn(3, ' ');
        let (name, version) = (words.next().unwrap_or_default(), words.next());
        let source = words.next().unwrap_or_default().trim_start_matches("(proc-macro)").trim();
        Ok(Package {
            name: name.to_owned(),
            version: version.with_context(|| format!("no version in {line:?}"))?.to_owned(),
            license: license.with_context(|| format!("no licence field in {line:?}"))?.to_owned(),
            source: (!source.is_empty()).then(|| source.trim_matches(['(', ')']).to_owned()),
        })
    }
}

impl Rules {
    fn parse(text: &str) -> Result<Rules> {
        let table: Table = text.parse()?;
        let list = |section: &str, key: &str| {
            let value = table.get(section).and_then(|section| section.get(key));
            value
                .and_then(toml::Value::as_array)
                .with_context(|| format!("[{section}] has no list {key}"))
        };
        let text = |value: Option<&toml::Value>, what: &str| {
            value
                .and_then(toml::Value::as_str)
                .map(str::to_owned)
                .with_context(|| format!("{what} is no text"))
        };
        let licenses: Result<_> = list("licenses", "allow")?
            .iter()
            .map(|entry| text(Some(entry), "an allowed licence"))
            .collect();
        let banned: Result<_> = list("bans", "deny")?
            .iter()
            .map(|entry| text(entry.get("crate"), "a banned crate"))
            .collect();
        for key in ["unknown-registry", "unknown-git"] {
            let value = table
                .get("sources")
                .and_then(|section| section.get(key))
                .and_then(toml::Value::as_str);
            if value != Some("deny") {
                bail!("[sources] {key} must be \"deny\": nothing else is checked");
            }
        }
        Ok(Rules { licenses: licenses?, banned: banned? })
    }

    fn problems(&self, package: &Package) -> Vec<String> {
        let mut problems = Vec::new();
        let mut problem =
            |what: String| problems.push(format!("{} {}: {what}", package.name, package.version));
        if self.banned.contains(&package.name) {
            problem("the crate is banned".to_owned());
        }
        match spdx::allowed(&package.license, &self.licenses) {
            Ok(true) => {}
            Ok(false) => problem(format!("its licence {:?} is not allowed", package.license)),
            Err(error) => problem(error.to_string()),
        }
        if let Some(source) = package.source.as_deref().filter(|source| !source.starts_with('/')) {
            problem(format!("it comes from {source}, not from the registry"));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::{Package, Rules};

    const RULES: &str = r#"
        [licenses]
        allow = ["MIT"]
        [bans]
        deny = [{ crate = "bad" }]
        [sources]
        unknown-registry = "deny"
        unknown-git = "deny"
    "#;

    fn problems(line: &str) -> usize {
        Rules::parse(RULES).unwrap().problems(&Package::parse(line).unwrap()).len()
    }

    #[test]
    fn each_rule_finds_its_breach() {
        assert_eq!(problems("good v1.0.0|MIT|"), 0);
        assert_eq!(problems("good v1.0.0|MIT| (*)"), 0);
        assert_eq!(problems("derive v1.0.0 (proc-macro)|MIT|"), 0);
        assert_eq!(problems("own v0.1.0 (/tree/own)|MIT|"), 0);
        assert_eq!(problems("bad v1.0.0|MIT|"), 1);
        assert_eq!(problems("good v1.0.0|GPL-3.0-only|"), 1);
        assert_eq!(problems("good v1.0.0||"), 1);
        assert_eq!(problems("good v1.0.0 (proc-macro) (https://example.org/x#1)|MIT|"), 1);
    }

    #[test]
    fn a_rule_that_would_not_be_checked_is_refused() {
        assert!(Rules::parse(&RULES.replacen("\"deny\"", "\"warn\"", 1)).is_err());
        assert!(Rules::parse("[licenses]\nallow = []").is_err());
    }
}
