//! Enforces `deny.toml` (licences, bans, sources) over what `cargo metadata` says would be linked.
//!
//! The file is cargo-deny's; this reads the part of it that needs no network, so that the check costs a second
//! and no installation.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use toml::Table;

use crate::process::capture;
use crate::spdx;

/// Checks the workspace at `root`; an error lists every package that breaks a rule.
pub fn check(root: &Path) -> Result<()> {
    let path = root.join("deny.toml");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rules = Rules::parse(&text).with_context(|| format!("in {}", path.display()))?;
    let metadata = capture(
        Command::new("cargo")
            .args([
                "metadata",
                "--format-version=1",
                "--locked",
                "--filter-platform=x86_64-unknown-linux-gnu",
            ])
            .current_dir(root),
    )?;
    let metadata: Value =
        serde_json::from_str(&metadata).context("cargo metadata printed no valid JSON")?;
    let packages = linked_packages(&metadata)?;
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
#[derive(Debug)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
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
        match package
            .license
            .as_deref()
            .map(|license| (license, spdx::allowed(license, &self.licenses)))
        {
            None => problem("it states no licence".to_owned()),
            Some((license, Ok(false))) => {
                problem(format!("its licence {license:?} is not allowed"))
            }
            Some((_, Err(error))) => problem(error.to_string()),
            Some((_, Ok(true))) => {}
        }
        // Cargo's default registry is the only one a workspace without a [registries] table can name.
        if let Some(source) =
            package.source.as_deref().filter(|source| !source.starts_with("registry+"))
        {
            problem(format!("it comes from {source}, not from the registry"));
        }
        problems
    }
}

/// The packages that the resolved graph holds (`packages` alone would list other platforms' too).
fn linked_packages(metadata: &Value) -> Result<Vec<Package>> {
    let list = |value: &Value, what: &str| -> Result<Vec<Value>> {
        value.as_array().cloned().with_context(|| format!("cargo metadata has no {what}"))
    };
    let linked: Vec<Value> = list(&metadata["resolve"]["nodes"], "resolve nodes")?
        .into_iter()
        .map(|node| node["id"].clone())
        .collect();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let packages: Vec<Package> = list(&metadata["packages"], "packages")?
        .iter()
        .filter(|package| linked.contains(&package["id"]))
        .map(|package| Package {
            name: text(&package["name"]).unwrap_or_default(),
            version: text(&package["version"]).unwrap_or_default(),
            license: text(&package["license"]),
            source: text(&package["source"]),
        })
        .collect();
    if packages.is_empty() {
        bail!("cargo metadata lists no packages");
    }
    Ok(packages)
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

    fn problems(name: &str, license: Option<&str>, source: Option<&str>) -> usize {
        let package = Package {
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            license: license.map(str::to_owned),
            source: source.map(str::to_owned),
        };
        Rules::parse(RULES).unwrap().problems(&package).len()
    }

    #[test]
    fn each_rule_finds_its_breach() {
        assert_eq!(problems("good", Some("MIT"), Some("registry+x")), 0);
        assert_eq!(problems("own", Some("MIT"), None), 0);
        assert_eq!(problems("bad", Some("MIT"), None), 1);
        assert_eq!(problems("good", Some("GPL-3.0-only"), None), 1);
        assert_eq!(problems("good", None, None), 1);
        assert_eq!(problems("good", Some("MIT"), Some("git+https://example.org/x")), 1);
    }

    #[test]
    fn a_rule_that_would_not_be_checked_is_refused() {
        assert!(Rules::parse(&RULES.replacen("\"deny\"", "\"warn\"", 1)).is_err());
        assert!(Rules::parse("[licenses]\nallow = []").is_err());
    }
}
