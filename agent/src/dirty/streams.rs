//! Writes that go through a volume from one region to the next. The regions that such a stream comes to next are made
//! active along with the one that it waits for: so a stream waits for one commit in many regions, and not in each.
//!
//! What is foreseen for nothing is compared for nothing after a crash. So it takes three regions in a row, each entered
//! at its begin, which writes here and there hardly ever do.

use std::{collections::VecDeque, ops::Range};

use tidemark_journal::VolumeId;

use super::RegionId;

/// Streams that are told apart.
const STREAMS: usize = 8;
/// Regions in a row that make a stream.
const IN_A_ROW: u32 = 3;
/// The fewest and the most regions that are foreseen of a stream; more each time that it has come so far.
const AHEAD: (u32, u32) = (4, 64);

struct Stream {
    volume: VolumeId,
    /// How often it has waited.
    waits: u32,
    /// What it has last waited for, and what was foreseen then.
    foreseen: Range<u32>,
}

/// The streams that were seen last, the newest last.
#[derive(Default)]
pub struct Streams(VecDeque<Stream>);

impl Streams {
    /// A write waits for a region, which is not active, and enters it at its begin: the regions that are likely to be
    /// next, at most so many. They may lie beyond the end of the volume.
    pub fn missed(&mut self, region: RegionId, most: u32) -> Range<u32> {
        let RegionId { volume, index } = region;
        let none = index..index;
        let streams = &mut self.0;
        let of = |stream: &Stream| stream.volume == volume && stream.foreseen.contains(&index);
        if streams.iter().any(of) {
            // It is on its way already, or was given up soon.
            return none;
        }
        let follows = |stream: &Stream| stream.volume == volume && stream.foreseen.end == index;
        let known = streams.iter().position(follows).and_then(|at| streams.remove(at));
        let (before, came) = known.map_or((0, 1), |Stream { waits, foreseen, .. }| {
            (waits, foreseen.end - foreseen.start)
        });
        let waits = before.saturating_add(1);
        let ahead = match waits {
            IN_A_ROW.. => (2 * (came - 1)).clamp(AHEAD.0, AHEAD.1).min(most),
            _ => 0,
        };
        if streams.len() == STREAMS {
            streams.pop_front();
        }
        let end = index.saturating_add(1).saturating_add(ahead);
        streams.push_back(Stream { volume, waits, foreseen: index..end });
        index.saturating_add(1)..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(volume: u16, index: u32) -> RegionId {
        RegionId { volume: VolumeId(volume), index }
    }

    #[test]
    fn the_longer_a_stream_the_more_is_foreseen_of_it() {
        let mut streams = Streams::default();
        let (mut at, mut seen) = (100, Vec::new());
        for _ in 0..8 {
            let ahead = streams.missed(region(1, at), u32::MAX);
            assert_eq!(ahead.start, at + 1);
            // Several writes at a time have come for what is on its way.
            for index in ahead.clone() {
                assert!(streams.missed(region(1, index), u32::MAX).is_empty(), "{index}");
            }
            seen.push(ahead.len());
            at = ahead.end;
        }
        assert_eq!(seen, [0, 0, 4, 8, 16, 32, 64, 64]);
    }

    #[test]
    fn streams_do_not_disturb_each_other_unless_there_are_too_many() {
        for (count, foreseen) in [(STREAMS, true), (STREAMS + 1, false)] {
            let mut streams = Streams::default();
            // Two volumes, at the same places.
            let of =
                |stream: usize, step| region(stream as u16 % 2, 1000 * (stream / 2) as u32 + step);
            for step in 0..3 {
                for stream in 0..count {
                    let ahead = streams.missed(of(stream, step), u32::MAX);
                    assert_eq!(!ahead.is_empty(), foreseen && step > 1, "{stream} of {count}");
                }
            }
        }
    }

    #[test]
    fn nothing_is_foreseen_of_writes_here_and_there_nor_beyond_what_is_allowed() {
        let mut streams = Streams::default();
        for index in [5, 3, 9, 7, 4, 20, 10, 0, u32::MAX - 2, u32::MAX - 1, 12, 8] {
            assert!(streams.missed(region(1, index), 2).is_empty(), "{index}");
        }
        assert_eq!(streams.missed(region(1, 11), 2), 12..14, "9, 10, 11");
        assert!(streams.missed(region(1, 13), 2).is_empty(), "it is on its way");
        assert!(streams.missed(region(1, 14), 0).is_empty(), "none is allowed");
        assert!(streams.missed(region(1, u32::MAX), 2).is_empty(), "there is none");
    }
}
