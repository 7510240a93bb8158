//! `cargo xtask simulate`: the joint simulator, and bugs planted to see that it finds them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{process, test::target_directory};

/// The most seeds that a planted bug may take to be found.
const SEEDS_FOR_A_MUTANT: u64 = 999;
/// How the simulator ends without a violation, and with one.
const NOTHING: u8 = 0;
const FOUND: u8 = 3;
/// A run that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// The packages whose code is in the simulator.
const OWN: [&str; 8] =
    ["journal", "link", "nbd", "control", "agent", "target", "simdisk", "simulate"];

/// What is to be played.
#[derive(clap::Args)]
pub struct Options {
    /// How many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Steps of each seed in which things go wrong.
    #[arg(long, default_value_t = 2500)]
    steps: u64,
    /// Say what happens.
    #[arg(long)]
    tell: bool,
    /// Plant the bug `tests/mutants/NAME.patch` in a copy of the tree first; `all` takes each in
    /// turn. It has to be found by fewer than 1000 seeds.
    #[arg(long, value_name = "NAME")]
    mutant: Option<String>,
}

impl Options {
    /// So many seeds from 0 on.
    pub fn seeds(seeds: u64) -> Options {
        Options { seeds, from: 0, steps: 2500, tell: false, mutant: None }
    }

    /// All planted bugs.
    pub fn mutants() -> Options {
        Options { mutant: Some("all".to_owned()), ..Options::seeds(0) }
    }
}

/// Plays the seeds, or looks for planted bugs.
pub fn run(root: &Path, options: &Options) -> Result<ExitCode> {
    let Some(mutant) = &options.mutant else {
        return play(root, None, options).map(|played| ExitCode::from(played.code));
    };
    let dir = root.join("tests/mutants");
    let mut patches: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        let wanted = mutant == "all" || name == Some(mutant);
        if wanted && path.extension().is_some_and(|ext| ext == "patch") {
            patches.push(path);
        }
    }
    patches.sort();
    if patches.is_empty() {
        bail!("there is no tests/mutants/{mutant}.patch");
    }
    let target = target_directory(root)?;
    let work = target.join("mutants");
    let tree = work.join("tree");
    copy(root, &tree)?;
    // What the tree itself is built of, so that only its own code has to be built for the copy.
    build(root)?;
    lend(&target.join("release"), &work.join("build/release"))?;
    let mut missed = Vec::new();
    let mut times = Vec::new();
    for patch in patches {
        let name = patch.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        println!("=== mutant {name}");
        let start = Instant::now();
        let found = plant(&work, &tree, &patch, options)?;
        if let Some(seed) = found {
            innocent(root, seed, options)?;
        }
        times.push((name.clone(), start.elapsed(), found));
        if found.is_none() {
            missed.push(name);
        }
    }
    println!("=== mutants");
    for (name, time, found) in &times {
        let verdict = found.map_or("NOT FOUND".to_owned(), |seed| format!("seed {seed}"));
        println!("{name:<44} {verdict:<9} {:>6.1} s", time.as_secs_f64());
    }
    if !missed.is_empty() {
        bail!("planted bugs that no seed has found: {}", missed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

/// Copies the tree. All bugs are planted in the same copy, so that little has to be built for each;
/// what the compiler made of an earlier copy is older than every file of it.
fn copy(root: &Path, tree: &Path) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    fs::create_dir_all(tree).with_context(|| format!("cannot make {}", tree.display()))?;
    let copy = "tar --create --exclude=./target --exclude=./.git . \
                | tar --extract --touch --directory \"$0\"";
    process::run(Command::new("sh").args(["-c", copy]).arg(tree).current_dir(root))?;
    Ok(())
}

/// Has the copy's builds begin with what was built of other people's crates: cargo takes it for its own,
/// as long as all it was built with is the same, and else builds it again.
fn lend(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let lend = "cp -a \"$0/.fingerprint\" \"$0/build\" . && mkdir deps \
                && find \"$0/deps\" -name '*.rlib' -o -name '*.rmeta' -o -name '*.so' -o -name '*.d' \
                | xargs cp -al --target-directory deps \
                && find . -maxdepth 2 -name '*tidemark[-_]*' -print0 | xargs -0 rm -rf";
    process::run(Command::new("sh").args(["-c", lend]).arg(from).current_dir(to))
}

/// Plays the seeds on the copied tree with the patch applied, and takes it out again. The seed that has
/// found a violation.
fn plant(work: &Path, tree: &Path, patch: &Path, options: &Options) -> Result<Option<u64>> {
    let apply = |arguments: &[&str]| {
        let mut git = Command::new("git");
        // The copy may lie inside the repository; to git it is a directory like any other.
        git.arg("apply").args(arguments).arg(patch).current_dir(tree);
        git.env("GIT_CEILING_DIRECTORIES", work);
        process::run(&mut git)
    };
    apply(&[]).with_context(|| format!("{} does not apply any more", patch.display()))?;
    let Options { from, steps, tell, .. } = *options;
    let options = Options { seeds: SEEDS_FOR_A_MUTANT, from, steps, tell, mutant: None };
    let played = play(tree, Some(&work.join("build")), &options)?;
    apply(&["--reverse"])?;
    match played {
        Played { code: FOUND, seed: Some(seed) } => Ok(Some(seed)),
        Played { code: NOTHING, .. } => Ok(None),
        Played { code, .. } => {
            bail!("the simulator with {} ended with {code}: does it build?", patch.display())
        }
    }
}

/// An error if the tree as it is fails this seed too: what was found is not the planted bug then.
fn innocent(root: &Path, seed: u64, options: &Options) -> Result<()> {
    let options = Options { seeds: 1, from: seed, steps: options.steps, tell: false, mutant: None };
    if play(root, None, &options)?.code == FOUND {
        bail!("seed {seed} is violated without a planted bug");
    }
    Ok(())
}

fn build(tree: &Path) -> Result<()> {
    let arguments = ["build", "--quiet", "--release", "--package", "tidemark-simulate"];
    process::run(Command::new("cargo").args(arguments).current_dir(tree))
}

/// How the simulator has ended, and the seed that it has named.
struct Played {
    code: u8,
    seed: Option<u64>,
}

/// Builds the simulator of a tree and plays the seeds. What a copy of the tree builds goes to a place of
/// its own, since cargo tells two trees in one place apart by their files' times alone; and is built for
/// soon being there rather than for speed.
fn play(tree: &Path, copy_builds: Option<&Path>, options: &Options) -> Result<Played> {
    let mut command = Command::new("cargo");
    command.args(["run", "--quiet", "--release", "--package", "tidemark-simulate"]);
    if let Some(builds) = copy_builds {
        command.env("CARGO_TARGET_DIR", builds).env("CARGO_INCREMENTAL", "1");
        for own in OWN {
            let profile = format!("profile.release.package.tidemark-{own}");
            command.args(["--config", &format!("{profile}.opt-level=1")]);
            command.args(["--config", &format!("{profile}.debug=false")]);
        }
    }
    command.args(["--", "--seeds", &options.seeds.to_string()]);
    command.args(["--from", &options.from.to_string(), "--steps", &options.steps.to_string()]);
    if options.tell {
        command.arg("--tell");
    }
    let named = Mutex::new(None);
    let status = process::watch(command.current_dir(tree), LIMIT, |line| {
        let seed = line.strip_prefix("seed ").and_then(|rest| rest.split_once(':'));
        if let Some(seed) = seed.and_then(|(seed, _)| seed.parse().ok())
            && let Ok(mut named) = named.lock()
        {
            *named = Some(seed);
        }
    })?;
    let seed = named.into_inner().ok().flatten();
    match status.code() {
        Some(code) => Ok(Played { code: u8::try_from(code).unwrap_or(u8::MAX), seed }),
        None => bail!("the simulator did not end by itself: {status}"),
    }
}
