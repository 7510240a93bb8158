//! Marks, a row each: there may be a hundred thousand of them, and what changes of a history with each sealed segment
//! is the newest few.

use redb::{ReadTransaction, ReadableTable, TableDefinition, TableHandle, WriteTransaction};

use super::row::RowPlace;
use crate::history::{History, Mark};

/// By the group's name and the mark's sequence, big-endian in the checksum.
pub const MARKS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("marks");

/// The place of a mark's row.
pub fn place<'a>(of: &'a str, seq: &'a [u8; 8]) -> RowPlace<'a> {
    RowPlace { table: MARKS.name(), of, rest: seq }
}

/// All marks of a group, in order.
pub fn read(tx: &ReadTransaction, group: &str) -> anyhow::Result<Vec<Mark>> {
    let table = tx.open_table(MARKS)?;
    let rows = table.range((group, 0)..=(group, u64::MAX))?;
    rows.map(|row| {
        let (key, value) = row?;
        place(group, &key.value().1.to_be_bytes()).open(value.value())
    })
    .collect()
}

/// Makes the rows those of `history`: takes in what is newer than the newest of them, and forgets what it no longer
/// reaches. Between the two, marks neither come nor go: a history that was cut short is kept before it goes on.
pub fn keep(tx: &WriteTransaction, group: &str, history: &History) -> Result<(), redb::Error> {
    let mut table = tx.open_table(MARKS)?;
    let (first, last) = (history.oldest.0, history.end.seq.0);
    table.retain_in((group, 0)..(group, first), |_, _| false)?;
    if let Some(above) = last.checked_add(1) {
        table.retain_in((group, above)..=(group, u64::MAX), |_, _| false)?;
    }
    let newest = {
        let mut rows = table.range((group, first)..=(group, last))?;
        rows.next_back().transpose()?.map(|(key, _)| key.value().1)
    };
    let new = history.marks.partition_point(|mark| newest.is_some_and(|seq| mark.seq.0 <= seq));
    for mark in &history.marks[new..] {
        let row = place(group, &mark.seq.0.to_be_bytes()).seal(mark);
        // A name and two numbers always have a form.
        let row = row.map_err(|error| redb::Error::Io(std::io::Error::other(error)))?;
        table.insert((group, mark.seq.0), row.as_slice())?;
    }
    Ok(())
}

/// Forgets a group's marks.
pub fn forget(tx: &WriteTransaction, group: &str) -> Result<(), redb::Error> {
    tx.open_table(MARKS)?.retain_in((group, 0)..=(group, u64::MAX), |_, _| false)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tempfile::TempDir;
    use tidemark_journal::{Position, Seq};

    use super::super::{HistoryRow, tests::open};
    use super::*;

    fn row(marks: &[u64], (oldest, end): (u64, u64)) -> HistoryRow {
        let mark = |seq: &u64| Mark { seq: Seq(*seq), name: format!("mark {seq}"), wall_ns: 5 };
        let mut row = HistoryRow::default();
        row.history.marks = Arc::new(marks.iter().map(mark).collect());
        row.history.oldest = Seq(oldest);
        row.history.end = Position { seq: Seq(end), ..Position::default() };
        row
    }

    /// The steps of a life: marks come, a fold takes the oldest, a loss the newest, and others come in their place.
    #[test]
    fn a_history_comes_back_with_its_marks_whatever_became_of_them() {
        let dir = TempDir::new().expect("a directory");
        let path = dir.path().join("catalogue.redb");
        let catalogue = open(&path).expect("made");
        let other = row(&[3, 9], (0, 20));
        for neighbour in ["sho", "shop2"] {
            catalogue.put_history(neighbour, &other).expect("kept");
        }
        for now in [
            row(&[], (0, 5)),
            row(&[10, 20], (0, 25)),
            row(&[10, 20, 30, 40], (0, 40)),
            row(&[20, 30, 40], (20, 45)),
            row(&[20, 30], (20, 39)),
            row(&[20, 30, 35, 50], (20, 60)),
            row(&[50], (50, 60)),
            row(&[], (61, 70)),
        ] {
            catalogue.put_history("shop", &now).expect("kept");
            assert_eq!(catalogue.history("shop").expect("read"), now);
        }
        catalogue.put_history("shop", &row(&[80], (61, 80))).expect("kept");
        catalogue.verify().expect("all is well");
        catalogue.forget("shop").expect("forgotten");
        assert_eq!(catalogue.history("shop").expect("read"), HistoryRow::default());
        drop(catalogue);
        let catalogue = open(&path).expect("opened again");
        for neighbour in ["sho", "shop2"] {
            assert_eq!(catalogue.history(neighbour).expect("read"), other);
        }
    }

    /// A transaction may bring many rows and take many away.
    #[test]
    fn copies_are_alike_while_they_are_written() {
        let dir = TempDir::new().expect("a directory");
        let catalogue = open(&dir.path().join("catalogue.redb")).expect("made");
        let (none, many) = (row(&[], (0, 0)), (1..=50).collect::<Vec<_>>());
        let many = row(&many, (0, 60));
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                for _ in 0..20 {
                    catalogue.put_history("shop", &many).expect("kept");
                    catalogue.put_history("shop", &none).expect("kept");
                }
            });
            let mut verified = 0;
            while !writing.is_finished() {
                catalogue.verify().expect("all is well");
                verified += 1;
            }
            assert!(verified > 1, "it was not looked at meanwhile");
        });
    }

    #[test]
    fn golden_bytes() {
        let mark = Mark { seq: Seq(0x0102), name: "noon".to_owned(), wall_ns: 7 };
        let bytes = place("shop", &mark.seq.0.to_be_bytes()).seal(&mark).expect("sealed");
        assert_eq!(bytes[8..], *br#"{"seq":258,"name":"noon","wall_ns":7}"#);
        let checked = [b"marks\0shop\0\0\0\0\0\0\0\x01\x02\0".as_slice(), &bytes[8..]].concat();
        assert_eq!(bytes[..8], tidemark_journal::checksum::crc64(&checked).to_le_bytes());
    }
}
