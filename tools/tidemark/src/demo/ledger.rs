//! A small bank on a raw disk: a workload whose content can be judged by rules.
//!
//! ```text
//! table A (256 KiB) | table B (256 KiB) | transfers, one per 4 KiB block
//! ```
//!
//! A transfer is first written as a block of its own, numbered from 1; when it and all before it are
//! flushed, it is acknowledged. Every so often the table of balances is written, to A and B in turn,
//! with the number of the last transfer in it. Whatever moment a disk is recovered at, these rules
//! hold for a bank that was not harmed:
//!
//! 1. at least one table is whole, and its balances add up to what was paid in at the start;
//! 2. the transfers are whole and numbered without a gap from 1 to the last;
//! 3. a table's balances are what the transfers up to its number make of the start;
//! 4. every transfer that was acknowledged before that moment is there.

use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tidemark_nbd::client::Client;

/// Accounts, each of which begins with [`START`].
pub const ACCOUNTS: usize = 1000;
const START: u64 = 1_000;
const BLOCK: usize = 4096;
const TABLE_BYTES: u64 = 256 << 10;
const TRANSFERS_AT: u64 = 2 * TABLE_BYTES;
/// Transfers under way together, between two flushes.
const BATCH: u64 = 16;
/// Batches between two writings of the table.
const TABLE_EVERY: u64 = 8;
const MAGIC: &[u8; 8] = b"TRANSFER";
const TABLE_MAGIC: &[u8; 8] = b"BALANCES";

/// Bytes that a bank takes on a disk, with room for transfers at any pace a demo has.
pub const LEDGER_BYTES: u64 = 1 << 30;

/// An acknowledged transfer.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledged {
    /// Its number.
    pub number: u64,
    /// When, on the wall clock.
    pub at: SystemTime,
}

/// A bank at work on a disk, from `offset` on.
pub struct Ledger {
    disk: Client,
    offset: u64,
    next: u64,
    batches: u64,
    random: u64,
    balances: Vec<u64>,
    /// The last transfer of each batch, when it was acknowledged.
    pub acknowledged: Vec<Acknowledged>,
}

impl Ledger {
    /// Opens a new bank: writes its first table.
    ///
    /// # Errors
    /// The disk's.
    pub async fn open(disk: Client, offset: u64) -> Result<Ledger> {
        let ledger = Ledger {
            disk,
            offset,
            next: 1,
            batches: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            balances: vec![START; ACCOUNTS],
            acknowledged: Vec::new(),
        };
        ledger.write_table().await?;
        ledger.disk.flush().await?;
        Ok(ledger)
    }

    /// Does a batch of transfers and acknowledges them.
    ///
    /// # Errors
    /// The disk's.
    pub async fn work(&mut self) -> Result<()> {
        let first = self.next;
        let mut writes = Vec::new();
        for number in first..first + BATCH {
            let (from, to) = (self.pick(ACCOUNTS), self.pick(ACCOUNTS));
            let amount = (self.pick(20) as u64).min(self.balances[from]);
            self.balances[from] -= amount;
            self.balances[to] += amount;
            let block = Transfer { number, from, to, amount }.encode();
            let at = self.offset + place(number)?;
            let disk = self.disk.clone();
            writes
                .push(tokio::spawn(async move { disk.write(at, Bytes::from(block), false).await }));
        }
        for write in writes {
            write.await??;
        }
        self.disk.flush().await?;
        self.next += BATCH;
        let number = self.next - 1;
        self.acknowledged.push(Acknowledged { number, at: SystemTime::now() });
        self.batches += 1;
        if self.batches.is_multiple_of(TABLE_EVERY) {
            self.write_table().await?;
        }
        Ok(())
    }

    /// Transfers acknowledged so far.
    pub fn done(&self) -> u64 {
        self.next - 1
    }

    /// The last transfer that was acknowledged at this time or before.
    pub fn acknowledged_by(&self, at: SystemTime) -> u64 {
        let before = self.acknowledged.partition_point(|ack| ack.at <= at);
        before.checked_sub(1).map_or(0, |index| self.acknowledged[index].number)
    }

    async fn write_table(&self) -> Result<()> {
        let through = self.next - 1;
        let mut table = Vec::with_capacity(16 + ACCOUNTS * 8 + 32);
        table.extend_from_slice(TABLE_MAGIC);
        table.extend_from_slice(&through.to_le_bytes());
        for balance in &self.balances {
            table.extend_from_slice(&balance.to_le_bytes());
        }
        let sum = blake3::hash(&table);
        table.extend_from_slice(sum.as_bytes());
        table.resize(table.len().next_multiple_of(BLOCK), 0);
        let turn = self.batches / TABLE_EVERY % 2;
        Ok(self.disk.write(self.offset + turn * TABLE_BYTES, Bytes::from(table), false).await?)
    }

    /// A small generator; the demo is the same each time.
    fn pick(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % below as u64) as usize
    }
}

/// What was found on a disk that obeys the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The last transfer.
    pub transfers: u64,
    /// Money in all accounts.
    pub money: u64,
}

/// Judges a disk by the rules.
///
/// # Errors
/// The rule that is broken.
pub async fn judge(disk: &Client, offset: u64) -> Result<Judged> {
    let mut transfers = Vec::new();
    'all: loop {
        let at = offset + place(transfers.len() as u64 + 1)?;
        let content = disk.read(at, 1 << 20).await?;
        for block in content.chunks(BLOCK) {
            match Transfer::decode(block) {
                Some(transfer) if transfer.number == transfers.len() as u64 + 1 => {
                    transfers.push(transfer);
                }
                _ => break 'all,
            }
        }
    }
    let mut money = None;
    for turn in 0..2 {
        let table = disk.read(offset + turn * TABLE_BYTES, table_bytes()).await?;
        let Some((through, balances)) = decode_table(&table) else { continue };
        let mut expected = vec![START; ACCOUNTS];
        let known = usize::try_from(through)?;
        ensure!(
            known <= transfers.len(),
            "the table speaks of transfer {through}, but only {} are there",
            transfers.len()
        );
        for transfer in &transfers[..known] {
            expected[transfer.from] -= transfer.amount;
            expected[transfer.to] += transfer.amount;
        }
        ensure!(balances == expected, "the balances are not what the transfers make of them");
        let sum: u64 = balances.iter().sum();
        ensure!(sum == START * ACCOUNTS as u64, "money was lost or made: {sum}");
        money = Some(sum);
    }
    let money = money.context("no table of balances is whole")?;
    Ok(Judged { transfers: transfers.len() as u64, money })
}

struct Transfer {
    number: u64,
    from: usize,
    to: usize,
    amount: u64,
}

impl Transfer {
    fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK);
        block.extend_from_slice(MAGIC);
        for value in [self.number, self.from as u64, self.to as u64, self.amount] {
            block.extend_from_slice(&value.to_le_bytes());
        }
        let sum = blake3::hash(&block);
        block.extend_from_slice(sum.as_bytes());
        let note = format!(
            "transfer {} of {} from {} to {}. ",
            self.number, self.amount, self.from, self.to
        );
        while block.len() + note.len() <= BLOCK {
            block.extend_from_slice(note.as_bytes());
        }
        block.resize(BLOCK, 0);
        block
    }

    fn decode(block: &[u8]) -> Option<Transfer> {
        let (head, rest) = block.split_at_checked(40)?;
        let whole = head.starts_with(MAGIC) && rest.get(..32)? == blake3::hash(head).as_bytes();
        let value = |index: usize| {
            let bytes = head.get(8 + index * 8..16 + index * 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let account = |index| value(index).map(|v| v as usize).filter(|v| *v < ACCOUNTS);
        whole.then_some(())?;
        Some(Transfer { number: value(0)?, from: account(1)?, to: account(2)?, amount: value(3)? })
    }
}

fn place(number: u64) -> Result<u64> {
    let at = TRANSFERS_AT + (number - 1) * BLOCK as u64;
    ensure!(at + (1 << 20) <= LEDGER_BYTES, "the ledger is full");
    Ok(at)
}

fn table_bytes() -> u32 {
    ((16 + ACCOUNTS * 8 + 32).next_multiple_of(BLOCK)) as u32
}

fn decode_table(table: &[u8]) -> Option<(u64, Vec<u64>)> {
    let (body, rest) = table.split_at_checked(16 + ACCOUNTS * 8)?;
    let whole = body.starts_with(TABLE_MAGIC) && rest.get(..32)? == blake3::hash(body).as_bytes();
    let mut values =
        body[8..].chunks_exact(8).map(|v| u64::from_le_bytes(v.try_into().unwrap_or_default()));
    let through = values.next()?;
    whole.then(|| (through, values.collect()))
}
