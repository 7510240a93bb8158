//! Where the agent's time goes in a guest: what each of its threads took of the processor and how often it was put on
//! one, for each request.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result};
use tidemark_tests::pair::Pair;

/// What threads of the agent took, by their names.
#[derive(Default)]
pub struct Profile {
    threads: BTreeMap<String, Spent>,
    requests: f64,
}

#[derive(Clone, Copy, Default)]
struct Spent {
    run_ns: u64,
    /// Times that it was put on a processor.
    turns: u64,
}

impl Profile {
    /// Adds what was spent during a load of so many seconds, which says how many requests it had in each.
    ///
    /// # Errors
    /// A guest that fails, or the load.
    pub fn of(
        &mut self,
        pair: &Pair,
        seconds: u64,
        load: impl FnOnce() -> Result<f64>,
    ) -> Result<f64> {
        let before = threads(pair)?;
        let rate = load()?;
        let after = threads(pair)?;
        for (name, spent) in after {
            let first = before.get(&name).copied().unwrap_or_default();
            let sum = self.threads.entry(name).or_default();
            sum.run_ns += spent.run_ns.saturating_sub(first.run_ns);
            sum.turns += spent.turns.saturating_sub(first.turns);
        }
        self.requests += rate * seconds as f64;
        Ok(rate)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = |number: u64| number as f64 / self.requests.max(1.0);
        for (name, Spent { run_ns, turns }) in &self.threads {
            let us = each(*run_ns) / 1e3;
            if us >= 0.5 {
                writeln!(
                    f,
                    "  {name:16} {us:8.1} us of the processor, {:6.2} turns",
                    each(*turns)
                )?;
            }
        }
        Ok(())
    }
}

/// Of each thread of the agent that captures; of several with one name, their sum.
fn threads(pair: &Pair) -> Result<BTreeMap<String, Spent>> {
    let mut threads = BTreeMap::<String, Spent>::new();
    // One that ends meanwhile is left out.
    let ask = "cd /proc/$(systemctl show --property=MainPID --value tidemark-agent)/task && for task in *; do \
               spent=$(cat $task/schedstat $task/comm 2>/dev/null) || continue; echo $spent; done";
    for line in pair.source.sh(ask)?.lines() {
        // Nanoseconds on a processor, and of waiting for one; times that it was put on one; the name.
        let mut words = line.split_whitespace();
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let spent = number().zip(number()).zip(number());
        let ((run_ns, _), turns) = spent.with_context(|| format!("no statistics: {line}"))?;
        let sum = threads.entry(words.collect::<Vec<_>>().join(" ")).or_default();
        *sum = Spent { run_ns: sum.run_ns + run_ns, turns: sum.turns + turns };
    }
    Ok(threads)
}
