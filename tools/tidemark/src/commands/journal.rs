//! `journal dump`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;
use tidemark_control::Answer;
use tidemark_journal::segment::{self, BLOCK_BYTES, Next, SegmentEnd, SegmentStart};
use tidemark_journal::{
    FrameView, GapReason, GroupId, Kind, Position, Record, Seq, VolumeId, dump,
};

use crate::cli::JournalAction;
use crate::output::{Output, Usage};

/// A frame in JSON, one a line.
#[derive(Serialize)]
struct Frame {
    /// Byte of the file.
    offset: u64,
    group: GroupId,
    before: Position,
    last: Position,
    first_seq: Seq,
    time_ns: u64,
    wall_ns: i64,
    frame_bytes: u64,
    raw_bytes: u64,
    chunks: u32,
    records: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    seq: Seq,
    kind: &'static str,
    volume: Option<VolumeId>,
    start: Option<u64>,
    sectors: Option<u64>,
    flags: u8,
    time_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

/// Prints a file of frames.
pub fn run(action: &JournalAction, output: Output) -> Result<ExitCode> {
    let JournalAction::Dump { file: path } = action;
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let bytes = file.metadata().context("cannot look at the file")?.len();
    let mut out = BufWriter::new(io::stdout().lock());
    let source = Source { file, path, bytes };
    let damaged = source.dump(&mut out, output)?;
    out.flush()?;
    match damaged {
        None => Ok(ExitCode::SUCCESS),
        Some(sentence) => Err(anyhow::anyhow!("{}: {sentence}", path.display())),
    }
}

struct Source<'a> {
    file: File,
    path: &'a Path,
    bytes: u64,
}

impl Source<'_> {
    /// Prints all frames; returns what is damaged, if something is.
    fn dump(&self, out: &mut impl Write, output: Output) -> Result<Option<String>> {
        let (mut offset, end) = self.bounds(out, output)?;
        let mut frames = 0_u64;
        while offset < end {
            let head = self.read(offset, BLOCK_BYTES.min(end - offset))?;
            match segment::next(offset, &head) {
                Next::Pad(further) => offset = further,
                Next::Frame(frame_bytes) => {
                    let frame_bytes = frame_bytes as u64;
                    if frame_bytes > end - offset {
                        return Ok(Some(format!("the frame at byte {offset} is cut off")));
                    }
                    let bytes = self.read(offset, frame_bytes)?;
                    match FrameView::parse(&bytes) {
                        Ok(view) => {
                            print_frame(out, output, offset, &view)?;
                            if let Err(error) = view.verify_chunks() {
                                return Ok(Some(format!("the frame at byte {offset}: {error}")));
                            }
                        }
                        Err(error) => {
                            return Ok(Some(format!("the frame at byte {offset}: {error}")));
                        }
                    }
                    frames += 1;
                    offset += frame_bytes;
                }
                Next::End(_) if head.iter().all(|byte| *byte == 0) => break,
                Next::End(error) if frames == 0 && offset == 0 => {
                    return Err(Usage(format!(
                        "{} is neither a segment nor a file of frames: {error}",
                        self.path.display()
                    ))
                    .into());
                }
                Next::End(error) => return Ok(Some(format!("at byte {offset}: {error}"))),
            }
        }
        Ok(None)
    }

    /// Where the frames begin and end. Prints what a segment says of itself, in words only.
    fn bounds(&self, out: &mut impl Write, output: Output) -> Result<(u64, u64)> {
        if self.bytes < BLOCK_BYTES {
            return Ok((0, self.bytes));
        }
        let Ok(start) = SegmentStart::decode(&self.read(0, BLOCK_BYTES)?) else {
            return Ok((0, self.bytes));
        };
        let last_block = self.bytes / BLOCK_BYTES * BLOCK_BYTES - BLOCK_BYTES;
        let end = SegmentEnd::decode(&self.read(last_block, BLOCK_BYTES)?).ok();
        if !output.is_json() {
            writeln!(out, "segment {} group {} after {}", start.number, start.group, start.before)?;
            match &end {
                Some(end) => writeln!(out, "sealed at {}", end.last)?,
                None => writeln!(out, "not sealed")?,
            }
        }
        let frames_end = end.map_or(self.bytes, |end| end.index_at.min(self.bytes));
        Ok((BLOCK_BYTES, frames_end))
    }

    fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let mut buffer = vec![0; usize::try_from(bytes).context("too long for this machine")?];
        self.file
            .read_exact_at(&mut buffer, offset)
            .with_context(|| format!("cannot read {} at byte {offset}", self.path.display()))?;
        Ok(buffer)
    }
}

fn print_frame(
    out: &mut impl Write,
    output: Output,
    offset: u64,
    view: &FrameView<'_>,
) -> Result<()> {
    if !output.is_json() {
        let mut text = String::new();
        dump::frame(&mut text, view).context("a frame cannot be put into words")?;
        out.write_all(text.as_bytes())?;
        return Ok(());
    }
    let header = view.header();
    let frame = Frame {
        offset,
        group: header.group(),
        before: header.before(),
        last: header.last(),
        first_seq: Seq(header.first_seq.get()),
        time_ns: header.time_ns.get(),
        wall_ns: header.wall_ns.get(),
        frame_bytes: header.frame_bytes() as u64,
        raw_bytes: header.raw_bytes.get(),
        chunks: header.chunks.get(),
        records: view.records().map(|record| line(&record)).collect(),
    };
    serde_json::to_writer(&mut *out, &Answer::new(frame)).map_err(io::Error::from)?;
    out.write_all(b"\n")?;
    Ok(())
}

fn line(record: &Record) -> Line {
    let ranged = record.kind.has_range();
    let whole = matches!(record.kind, Kind::Mark | Kind::Void);
    Line {
        seq: record.seq,
        kind: record.kind.name(),
        volume: (!whole).then_some(record.volume),
        start: ranged.then_some(record.start.0),
        sectors: ranged.then_some(record.sectors.into()),
        flags: record.flags,
        time_ns: record.time_ns,
        reason: (record.kind == Kind::GapBegin)
            .then(|| GapReason::from_u8(record.flags).map_or("?", GapReason::describe)),
    }
}
