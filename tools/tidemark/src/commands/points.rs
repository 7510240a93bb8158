//! `points`.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Result;
use tidemark_control::target::{DamagedPoints, PointRange, Points as Answer};

use crate::cli::{Global, Points};
use crate::output::{Output, Usage};
use crate::{daemons, words};

/// Lists what can be recovered.
pub fn run(args: &Points, global: &Global, output: Output) -> Result<ExitCode> {
    let target = daemons::target(global).client;
    let mut points = target.client().wait(target.points(args.scope.group.as_str()))?;
    if let Some(volume) = &args.scope.volume {
        points.volumes.retain(|found| found.name == volume.as_str());
        let Some(found) = points.volumes.first() else {
            let sentence = format!("group '{}' has no volume '{volume}'", args.scope.group);
            return Err(Usage(sentence).into());
        };
        points.ranges = found.ranges.clone();
    }
    output.answer(&points, || show(&points, args))?;
    Ok(ExitCode::SUCCESS)
}

fn show(points: &Answer, args: &Points) -> String {
    let mut out = String::new();
    let scope = match &args.scope.volume {
        Some(volume) => format!("{}/{volume}", points.group),
        None => points.group.clone(),
    };
    if points.ranges.is_empty() {
        let _ = writeln!(out, "{scope} cannot be recovered yet: the first sync is not complete.");
    } else {
        let _ = writeln!(out, "{scope} can be recovered as of any write in:");
        ranges(&mut out, &points.ranges);
    }
    if !points.marks.is_empty() {
        let _ = writeln!(out, "marks:");
    }
    for mark in &points.marks {
        let time = words::time_before(mark.wall_ns);
        let _ = write!(out, "  @mark:{}  {time}  @seq:{}", mark.name, mark.seq);
        if let Some(refused) = &mark.refused {
            let _ = write!(out, "  not recoverable: {refused}");
        }
        out.push('\n');
    }
    let apart = points.volumes.iter().filter(|volume| volume.ranges != points.ranges);
    for volume in apart.filter(|_| args.scope.volume.is_none()) {
        let _ = writeln!(out, "{}/{} by itself:", points.group, volume.name);
        ranges(&mut out, &volume.ranges);
    }
    let of_scope = |damage: &&DamagedPoints| {
        args.scope.volume.as_ref().is_none_or(|volume| volume.as_str() == damage.volume)
    };
    let damaged: Vec<&DamagedPoints> = points.damage.iter().filter(of_scope).collect();
    if !damaged.is_empty() {
        let _ = writeln!(out, "damaged (reads fail there, all else is right):");
    }
    for damage in &damaged {
        let _ = writeln!(out, "  {}", self::damage(&points.group, damage));
    }
    if damaged.iter().any(|damage| damage.last_seq.is_none()) {
        let _ = match points.newest_whole {
            Some(seq) => writeln!(out, "the newest point without damage: @seq:{seq}"),
            None => writeln!(out, "there is no point of the whole group without damage"),
        };
    }
    out
}

/// Damaged points in words.
pub fn damage(group: &str, damage: &DamagedPoints) -> String {
    let last = damage.last_seq.map_or("the newest".to_owned(), |seq| format!("@seq:{seq}"));
    format!(
        "{} of {group}/{}  @seq:{} to {last}",
        words::bytes(damage.bytes),
        damage.volume,
        damage.first_seq
    )
}

fn ranges(out: &mut String, ranges: &[PointRange]) {
    let mut gap_from_ns = None;
    for range in ranges {
        if let Some(from_ns) = gap_from_ns.replace(range.last_wall_ns) {
            let gap_ns = u64::try_from(range.first_wall_ns - from_ns).unwrap_or(0);
            let _ = writeln!(out, "  (a gap of {})", words::duration_ns(gap_ns));
        }
        let _ = writeln!(
            out,
            "  {} to {}  @seq:{} to @seq:{}",
            words::time_after(range.first_wall_ns),
            words::time_before(range.last_wall_ns),
            range.first_seq,
            range.last_seq
        );
    }
}

#[cfg(test)]
mod tests {
    use tidemark_control::target::{MarkedPoint, VolumePoints};
    use tidemark_journal::Seq;

    use super::*;

    #[test]
    fn points_are_told_with_names_that_can_be_used() {
        let second = 1_000_000_000;
        let at = 1_795_427_970 * second;
        let range = |first, last| PointRange {
            first_seq: Seq(first),
            last_seq: Seq(last),
            first_wall_ns: at + 1,
            last_wall_ns: at + 60 * second,
        };
        let after = PointRange {
            first_wall_ns: at + 75 * second,
            last_wall_ns: at + 90 * second,
            ..range(55, 90)
        };
        let around_a_gap = vec![range(5, 40), after];
        let points = Answer {
            group: "shop".into(),
            ranges: around_a_gap.clone(),
            marks: vec![MarkedPoint {
                name: "m".into(),
                seq: Seq(3),
                wall_ns: at,
                refused: Some("it lies in a gap".into()),
            }],
            volumes: vec![
                VolumePoints { name: "data".into(), ranges: around_a_gap },
                VolumePoints { name: "log".into(), ranges: vec![range(2, 90)] },
            ],
            damage: vec![
                DamagedPoints {
                    volume: "data".into(),
                    bytes: 8192,
                    first_seq: Seq(20),
                    last_seq: Some(Seq(29)),
                },
                DamagedPoints {
                    volume: "log".into(),
                    bytes: 4096,
                    first_seq: Seq(80),
                    last_seq: None,
                },
            ],
            newest_whole: Some(Seq(79)),
        };
        let args = Points { scope: "shop".parse().unwrap() };
        assert_eq!(
            show(&points, &args),
            "shop can be recovered as of any write in:\n\
             \x20 2026-11-23T09:59:30.001Z to 2026-11-23T10:00:30Z  @seq:5 to @seq:40\n\
             \x20 (a gap of 15 s)\n\
             \x20 2026-11-23T10:00:45Z to 2026-11-23T10:01:00Z  @seq:55 to @seq:90\n\
             marks:\n\
             \x20 @mark:m  2026-11-23T09:59:30Z  @seq:3  not recoverable: it lies in a gap\n\
             shop/log by itself:\n\
             \x20 2026-11-23T09:59:30.001Z to 2026-11-23T10:00:30Z  @seq:2 to @seq:90\n\
             damaged (reads fail there, all else is right):\n\
             \x20 8.0 KiB of shop/data  @seq:20 to @seq:29\n\
             \x20 4.0 KiB of shop/log  @seq:80 to the newest\n\
             the newest point without damage: @seq:79\n"
        );
    }
}
