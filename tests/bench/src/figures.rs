//! Figures of several things that were measured in turn, round by round, and what they say.
//!
//! A machine that is shared and emulated gives no figure twice. So what counts is the ratio of two things within one
//! round; and of the ratios the median, with the interval that holds the true one with 95 % confidence.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Serialize;

/// How much is asked.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No less.
    AtLeast(f64),
    /// No more.
    AtMost(f64),
}

/// What is asked of one of the things, or of the ratio of two.
#[derive(Clone, Debug, Serialize)]
pub struct Bar {
    /// The number of the one, among [`Comparison::names`].
    pub of: usize,
    /// The number of what it is divided by; none if its figure itself is meant.
    pub to: Option<usize>,
    /// How much; none if it is only printed.
    pub bound: Option<Bound>,
}

impl Bar {
    /// Asks for a ratio.
    pub fn ratio(of: usize, to: usize, bound: Bound) -> Bar {
        Bar { of, to: Some(to), bound: Some(bound) }
    }

    /// Has a ratio printed.
    pub fn printed(of: usize, to: usize) -> Bar {
        Bar { of, to: Some(to), bound: None }
    }

    /// Asks for a figure.
    pub fn figure(of: usize, bound: Bound) -> Bar {
        Bar { of, to: None, bound: Some(bound) }
    }
}

/// One comparison. Whether more or less is better, its bars say.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What was measured.
    pub what: String,
    /// The figures' unit.
    pub unit: &'static str,
    /// The things.
    pub names: Vec<String>,
    /// Of each round the figure of each thing.
    pub rounds: Vec<Vec<f64>>,
    /// What is asked.
    pub bars: Vec<Bar>,
}

/// A median, and the order statistics around it that hold the true one with 95 % confidence: with fewer than six
/// values there are none, and all there is is given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The median.
    pub median: f64,
    /// The upper end.
    pub high: f64,
}

impl Interval {
    /// Of these values.
    ///
    /// # Panics
    /// When there are none.
    pub fn of(values: &[f64]) -> Interval {
        assert!(!values.is_empty(), "a median of nothing");
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let middle = (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0;
        // The number of values below the true median is binomial: each is, or is not, with even odds.
        let (mut chance, mut term) = (0.0, 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX)));
        let mut outside = 0;
        for below in 0..count / 2 {
            chance += term;
            if chance > 0.025 {
                break;
            }
            outside = below + 1;
            term *= (count - below) as f64 / (below + 1) as f64;
        }
        let at = outside.saturating_sub(1);
        Interval { low: sorted[at], median: middle, high: sorted[count - 1 - at] }
    }
}

impl Comparison {
    /// The figures of one of the things.
    pub fn figures(&self, of: usize) -> Interval {
        Interval::of(&self.rounds.iter().map(|round| round[of]).collect::<Vec<_>>())
    }

    /// The ratio or the figure that a bar is about.
    pub fn value(&self, bar: &Bar) -> Interval {
        let values =
            self.rounds.iter().map(|round| round[bar.of] / bar.to.map_or(1.0, |to| round[to]));
        Interval::of(&values.collect::<Vec<_>>())
    }

    /// Whether a bar holds: its interval reaches it. None if nothing is asked.
    pub fn holds(&self, bar: &Bar) -> Option<bool> {
        let Interval { low, high, .. } = self.value(bar);
        bar.bound.map(|bound| match bound {
            Bound::AtLeast(least) => high >= least,
            Bound::AtMost(most) => low <= most,
        })
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::AtLeast(least) => write!(out, "at least {least:.2}"),
            Bound::AtMost(most) => write!(out, "at most {most:.2}"),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{} ({} rounds)", self.what, self.rounds.len())?;
        for (number, name) in self.names.iter().enumerate() {
            let Interval { low, median, high } = self.figures(number);
            writeln!(out, "  {name:<34} {median:>12.1} {}   [{low:.1} to {high:.1}]", self.unit)?;
        }
        for bar in &self.bars {
            let Interval { low, median, high } = self.value(bar);
            let verdict = match (bar.bound, self.holds(bar)) {
                (Some(bound), Some(true)) => format!("bar {bound}: holds"),
                (Some(bound), _) => format!("bar {bound}: DOES NOT HOLD"),
                (None, _) => "no bar".to_owned(),
            };
            let to = bar.to.map(|to| format!(" / {}", self.names[to])).unwrap_or_default();
            let name = &self.names[bar.of];
            writeln!(out, "  {name}{to}: {median:.2} [{low:.2} to {high:.2}]   {verdict}")?;
        }
        Ok(())
    }
}

/// What was measured so far of one name: printed, and written as JSON if that is asked for, as soon as it is there. It
/// is not lost when something fails hours later.
pub struct Report {
    path: Option<PathBuf>,
    comparisons: Vec<Comparison>,
}

impl Report {
    /// Nothing yet; to be written to a file.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn new(path: Option<PathBuf>) -> anyhow::Result<Report> {
        if let Some(directory) = path.as_deref().and_then(Path::parent) {
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        Ok(Report { path, comparisons: Vec::new() })
    }

    /// Adds what is complete.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, comparison: Comparison) -> anyhow::Result<()> {
        println!("{comparison}");
        self.comparisons.push(comparison);
        if let Some(path) = &self.path {
            fs::write(path, serde_json::to_vec_pretty(&self.comparisons)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Measures things in turn, so many rounds, each round beginning with another of them: what drifts does not favour
/// one. `measure` is given the number of the thing.
///
/// # Errors
/// The first that `measure` gives.
pub fn in_turn(
    things: usize,
    rounds: usize,
    mut measure: impl FnMut(usize) -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<Vec<f64>>> {
    in_rounds(rounds, |round| {
        let mut figures = vec![0.0; things];
        for turn in 0..things {
            let thing = (round + turn) % things;
            figures[thing] = measure(thing)?;
        }
        Ok(figures)
    })
}

/// Measures so many rounds of what gives all its figures at once. `measure` is given the number of the round.
///
/// # Errors
/// The first that `measure` gives.
pub fn in_rounds(
    rounds: usize,
    mut measure: impl FnMut(usize) -> anyhow::Result<Vec<f64>>,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut all = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let before = processors()?;
        let figures = measure(round)?;
        let after = processors()?;
        let done = figures.iter().all(|figure| *figure > 0.0);
        anyhow::ensure!(done, "nothing was done in a measurement: {figures:?}");
        let stolen = (after.stolen - before.stolen) * 100 / (after.all - before.all).max(1);
        eprintln!("round {} of {rounds}: {figures:.1?}, {stolen} % stolen", round + 1);
        all.push(figures);
    }
    Ok(all)
}

/// What this machine's processors have done since it was started, in ticks.
struct Processors {
    all: u64,
    /// The host had something else to do.
    stolen: u64,
}

fn processors() -> anyhow::Result<Processors> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    // The name; user, nice, system, idle, iowait, irq, softirq, steal. What guests have is in user already (proc(5)).
    let ticks = line.split_whitespace().skip(1).take(8).map(str::parse);
    let ticks: Vec<u64> =
        ticks.collect::<Result<_, _>>().with_context(|| format!("no times: {line}"))?;
    Ok(Processors { all: ticks.iter().sum(), stolen: ticks.get(7).copied().unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ranks of tables of the sign test: of 11 values the second from either end, of 6 the outermost; of 5 none
    /// would do.
    #[test]
    fn the_interval_has_the_ranks_of_the_sign_test() {
        let of = |count: u32| {
            let values: Vec<f64> = (1..=count).rev().map(f64::from).collect();
            let Interval { low, median, high } = Interval::of(&values);
            (low, median, high)
        };
        assert_eq!(of(11), (2.0, 6.0, 10.0));
        assert_eq!(of(6), (1.0, 3.5, 6.0));
        assert_eq!(of(20), (6.0, 10.5, 15.0));
        assert_eq!(of(1), (1.0, 1.0, 1.0));
    }

    #[test]
    fn a_bar_is_about_ratios_within_a_round() {
        let rounds = vec![vec![10.0, 20.0], vec![1.0, 2.0], vec![100.0, 200.0]];
        let names = vec!["one".to_owned(), "other".to_owned()];
        let bars = vec![
            Bar::ratio(0, 1, Bound::AtLeast(0.5)),
            Bar::ratio(0, 1, Bound::AtLeast(0.51)),
            Bar::ratio(0, 1, Bound::AtMost(0.5)),
            Bar::ratio(0, 1, Bound::AtMost(0.49)),
            Bar::figure(1, Bound::AtMost(2.0)),
            Bar::figure(1, Bound::AtMost(1.0)),
            Bar::printed(0, 1),
        ];
        let comparison = Comparison { what: "x".into(), unit: "1/s", names, rounds, bars };
        let verdicts: Vec<_> = comparison.bars.iter().map(|bar| comparison.holds(bar)).collect();
        let (yes, no) = (Some(true), Some(false));
        assert_eq!(verdicts, [yes, no, yes, no, yes, no, None]);
        assert_eq!(comparison.figures(1).median, 20.0);
        let text = comparison.to_string();
        assert!(text.contains("one / other: 0.50"), "{text}");
        assert!(text.contains("bar at least 0.50: holds"), "{text}");
        assert!(
            text.contains("other: 20.00 [2.00 to 200.00]   bar at most 1.00: DOES NOT"),
            "{text}"
        );
    }

    #[test]
    fn each_round_begins_with_another_thing() {
        let mut order = Vec::new();
        let rounds = in_turn(3, 4, |thing| {
            order.push(thing);
            Ok(thing as f64 + 1.0)
        });
        assert_eq!(rounds.expect("no error"), vec![vec![1.0, 2.0, 3.0]; 4]);
        assert_eq!(order, [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]);
        assert!(in_turn(1, 1, |_| Ok(0.0)).is_err(), "nothing was done");
    }
}
