//! What was meant by a key that does not exist.

/// Rewrites serde's complaint about an unknown key or value for people; others pass as they are.
pub(super) fn improve(message: &str) -> String {
    let (what, rest) = if let Some(rest) = message.strip_prefix("unknown field `") {
        ("key", rest)
    } else if let Some(rest) = message.strip_prefix("unknown variant `") {
        ("value", rest)
    } else if let Some(rest) = message.strip_prefix("missing field `") {
        return format!("the key '{}' is missing", rest.trim_end_matches('`'));
    } else {
        return message.lines().collect::<Vec<_>>().join("; ");
    };
    let (found, expected) = rest.split_once('`').unwrap_or((rest, ""));
    // Every second piece between backquotes is a name.
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let nearest = known
        .iter()
        .map(|name| (distance(found, name), *name))
        .min()
        .filter(|(distance, name)| *distance <= (name.len() / 3).max(1));
    match nearest {
        Some((_, name)) => format!("unknown {what} '{found}'; did you mean '{name}'?"),
        None if known.is_empty() => format!("unknown {what} '{found}'; none is wanted here"),
        None => format!("unknown {what} '{found}'; known here: {}", known.join(", ")),
    }
}

/// Insertions, deletions, replacements and swaps of neighbours that lead from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let replaced = rows[i][j] + usize::from(x != y);
            let mut best = replaced.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                best = best.min(rows[i - 1][j - 1] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}
