//! Frames as text, for people.

use std::fmt::{self, Write};

use crate::{
    frame::FrameView,
    record::{GapReason, Kind, MARK_ID_BYTES, Record, flag},
};

/// One line for the frame and one for each of its records.
pub fn frame(out: &mut impl Write, frame: &FrameView<'_>) -> fmt::Result {
    let header = frame.header();
    writeln!(
        out,
        "frame {}..{} term {} after {} group {} records {} chunks {} bytes {} raw {} time {} ns wall {} ns",
        header.first_seq,
        header.last_seq,
        header.last().term,
        header.before(),
        header.group(),
        header.records,
        header.chunks,
        header.frame_bytes(),
        header.raw_bytes,
        header.time_ns,
        header.wall_ns,
    )?;
    for (index, item) in frame.records().enumerate() {
        write!(out, "  {} +{} us ", item.seq, (item.time_ns - header.time_ns.get()) / 1000)?;
        record(out, &item)?;
        if item.kind == Kind::Mark {
            match frame.payload(index) {
                Ok(payload) => {
                    let name = payload.get(MARK_ID_BYTES..).unwrap_or_default();
                    write!(out, " {:?}", String::from_utf8_lossy(name))?;
                }
                Err(error) => write!(out, " ({error})")?,
            }
        }
        for piece in frame.pieces(index).take(1) {
            write!(out, " chunk {}+{}", piece.chunk, piece.offset)?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// A record without its place and time.
pub fn record(out: &mut impl Write, record: &Record) -> fmt::Result {
    write!(out, "{}", record.kind.name())?;
    if matches!(record.kind, Kind::Mark | Kind::Void) {
        return Ok(());
    }
    write!(out, " volume {}", record.volume)?;
    if record.kind.has_range() {
        write!(out, " sectors {}..{}", record.start.0, record.end().0)?;
    }
    match record.kind {
        Kind::Write if record.flags & flag::FUA != 0 => write!(out, " fua"),
        Kind::Sync if record.flags & flag::ZEROS != 0 => write!(out, " zeros"),
        Kind::Zero | Kind::Discard if record.flags & flag::UNMAP != 0 => write!(out, " unmap"),
        Kind::Resize => write!(out, " to {} sectors", record.start.0),
        Kind::GapBegin => {
            let reason = GapReason::from_u8(record.flags).map_or("?", GapReason::describe);
            write!(out, " ({reason})")
        }
        _ => Ok(()),
    }
}
