//! Both ends of a lease with all that may happen between them: clocks whose rates differ, messages
//! that are late or lost, links that are cut, threads that are held up, gaps, and ends of either
//! side. Real time goes in steps of a millisecond, and neither side sees it.
//!
//! The oracle: at no real moment does the target hold a lease while a write that was answered is not
//! durable there. And nothing waits for longer than was stated. Each [`Flaw`] is one mistake that
//! somebody might make; the oracle has to see all of them.

use std::{collections::VecDeque, time::Duration};

use tidemark_journal::Seq;
use tidemark_link::lease::{ASK_EVERY, Asks, Claim, Holder, LEASE, Moment, outlived_ns};

use super::{Facts, Peer, Stage, SyncMode};
use crate::{capture::core::answers::Answers, dirty::tests::random::Random};

const MS_NS: u64 = 1_000_000;
/// The largest difference that the margin allows, in thousandths: 1.024 / 0.976 < 1.05.
const DRIFT_PERMILLE: u64 = 24;

/// A mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    None,
    /// The target counts from the grant's coming.
    CountFromArrival,
    /// The target counts from its newest asking, whichever the grant answers.
    CountFromNewestAsk,
    /// What waits is answered as soon as leaving begins.
    AnswerWhileLeaving,
    /// A new agent does not wait for what an earlier one granted.
    NoOutlast,
    /// A lease is granted before everything answered is final-durable.
    GrantWhileEntering,
    /// A lease is counted by the clock as it was when the thread last looked.
    StaleClock,
    /// A write without a record is answered at once.
    AnswerUncaptured,
    /// A lease is granted though the state does not name it durably.
    GrantUnnoted,
    /// The clocks differ by more than the margin.
    Drift,
}

pub const FLAWS: [Flaw; 9] = [
    Flaw::CountFromArrival,
    Flaw::CountFromNewestAsk,
    Flaw::AnswerWhileLeaving,
    Flaw::NoOutlast,
    Flaw::GrantWhileEntering,
    Flaw::StaleClock,
    Flaw::AnswerUncaptured,
    Flaw::GrantUnnoted,
    Flaw::Drift,
];

/// A clock: where it stood, and how many nanoseconds it shows for a millisecond.
#[derive(Clone, Copy)]
struct Clock(u64, u64);

impl Clock {
    fn at(self, now_ms: u64) -> u64 {
        self.0 + now_ms * self.1
    }
}

struct Write {
    /// The record with its content: none while it has none.
    record: Option<u64>,
    /// When it is locally done; none after that, or when its agent has died.
    done_ms: Option<u64>,
    local_ms: u64,
    answered: bool,
}

#[derive(Clone, Copy)]
enum Message {
    Frames(u64),
    Grant(u64, Duration),
    Ask(u64),
    Ack(u64),
}

struct Wire {
    messages: VecDeque<(u64, Message)>,
}

impl Wire {
    fn send(&mut self, at_ms: u64, message: Message) {
        let after = self.messages.back().map_or(0, |(at, _)| *at);
        self.messages.push_back((at_ms.max(after), message));
    }

    fn next(&mut self, now_ms: u64) -> Option<Message> {
        self.messages.pop_front_if(|(at, _)| *at <= now_ms).map(|(_, message)| message)
    }
}

pub struct Outcome {
    pub wrong: Option<String>,
    pub held_ms: u64,
    pub calm_held_ms: u64,
    pub waited_ms_max: u64,
    /// The longest that an answer should wait, if the source's thread was never held up.
    pub waited_ms_bound: Option<u64>,
}

pub struct World {
    random: Random,
    flaw: Flaw,
    now_ms: u64,
    clocks: [Clock; 2],
    timeout: Duration,
    // The source.
    mode: SyncMode,
    answers: Answers<usize>,
    writes: Vec<Write>,
    last_seq: u64,
    durable: u64,
    overflow: bool,
    catch_up_ms: Option<u64>,
    noted: Duration,
    noting: Option<(u64, Duration)>,
    held_up_until_ms: u64,
    looked_ns: u64,
    /// The source's thread is never held up.
    prompt: bool,
    // The link.
    linked: bool,
    sent: u64,
    slow: bool,
    wires: [Wire; 2],
    // The target.
    asks: Asks,
    asked_ns: u64,
    holder: Holder,
    stored: VecDeque<(u64, u64)>,
    target_durable: u64,
    ask_ms: u64,
    outcome: Outcome,
}

fn wires() -> [Wire; 2] {
    [Wire { messages: VecDeque::new() }, Wire { messages: VecDeque::new() }]
}

impl World {
    pub fn new(seed: u64, flaw: Flaw) -> World {
        let mut random = Random::new(seed);
        let drift = if flaw == Flaw::Drift { 80 } else { DRIFT_PERMILLE };
        let rate = |ahead: bool| MS_NS / 1000 * if ahead { 1000 + drift } else { 1000 - drift };
        // More often than not the worst: the source's clock runs fast, the target's slow.
        let fast = random.percent(70);
        let clocks = [true, false].map(|source| Clock(random.below(1 << 40), rate(source == fast)));
        let timeout = Duration::from_secs(1 + random.below(5));
        let mode = SyncMode::new(Some(timeout), None, clocks[0].at(0));
        // By a slow clock; and the thread sleeps for a while.
        let bound_ms = outlived_ns(timeout.as_nanos() as u64, LEASE) / MS_NS * 1025 / 1000 + 400;
        let prompt = seed.is_multiple_of(2);
        let waited_ms_bound = prompt.then_some(bound_ms);
        World {
            random,
            flaw,
            now_ms: 0,
            clocks,
            timeout,
            mode,
            answers: Answers::with_capacity(64),
            writes: Vec::new(),
            last_seq: 0,
            durable: 0,
            overflow: false,
            catch_up_ms: None,
            noted: Duration::ZERO,
            noting: None,
            held_up_until_ms: 0,
            looked_ns: 0,
            prompt,
            linked: false,
            sent: 0,
            slow: false,
            wires: wires(),
            asks: Asks::default(),
            asked_ns: 0,
            holder: Holder::default(),
            stored: VecDeque::new(),
            target_durable: 0,
            ask_ms: 0,
            outcome: Outcome {
                wrong: None,
                held_ms: 0,
                calm_held_ms: 0,
                waited_ms_max: 0,
                waited_ms_bound,
            },
        }
    }

    /// So much trouble, then as much calm.
    pub fn run(mut self, trouble_ms: u64) -> Outcome {
        while self.now_ms < 2 * trouble_ms && self.outcome.wrong.is_none() {
            self.now_ms += 1;
            if self.now_ms < trouble_ms {
                self.trouble();
            } else {
                self.slow = false;
                self.overflow = false;
                self.linked |= self.random.below(100) == 0 && self.link();
            }
            self.source();
            self.target();
            self.check(self.now_ms > trouble_ms);
        }
        self.outcome
    }

    fn once_in(&mut self, ms: u64) -> bool {
        self.random.below(ms) == 0
    }

    fn trouble(&mut self) {
        if self.once_in(4000) {
            self.cut();
        }
        if !self.linked && self.once_in(500) {
            self.link();
        }
        if self.once_in(3000) {
            self.slow = !self.slow && self.random.percent(40);
        }
        if !self.prompt && self.once_in(5000) {
            self.held_up_until_ms = self.now_ms + self.random.below(4000);
        }
        if self.once_in(6000) {
            self.overflow = true;
        }
        if self.once_in(200) {
            self.overflow = false;
        }
        if self.once_in(8000) {
            self.restart_source();
        }
        if self.once_in(15_000) {
            // What it holds in memory is gone, what it has made durable is not.
            self.cut();
            self.holder = Holder::default();
            self.stored.clear();
        }
    }

    fn cut(&mut self) {
        self.linked = false;
        self.wires = wires();
    }

    fn link(&mut self) -> bool {
        self.cut();
        self.linked = true;
        self.asks = Asks::default();
        self.sent = self.target_durable;
        self.durable = self.durable.max(self.target_durable);
        self.stored.clear();
        true
    }

    fn restart_source(&mut self) {
        self.cut();
        self.answers = Answers::with_capacity(64);
        for write in &mut self.writes {
            write.done_ms = None;
        }
        if self.random.percent(50) {
            // Its memory is gone too: what was on its way has to be read off the disk again.
            for write in &mut self.writes {
                write.record = write.record.filter(|record| *record <= self.target_durable);
            }
        }
        self.overflow = false;
        self.noting = None;
        self.now_ms += self.random.below(1500);
        let timeout = self.random.percent(80).then_some(self.timeout);
        let left = (!self.noted.is_zero() && self.flaw != Flaw::NoOutlast).then_some(self.noted);
        self.mode = SyncMode::new(timeout, left, self.clocks[0].at(self.now_ms));
        if self.flaw == Flaw::GrantUnnoted {
            self.mode.noted();
        }
    }

    fn facts(&self, now_ns: u64) -> Facts {
        Facts {
            now_ns,
            last_seq: Seq(self.last_seq),
            durable: Seq(self.durable),
            whole: !self.overflow
                && self.catch_up_ms.is_none()
                && self.uncaptured().next().is_none(),
            peer: if self.linked { Peer::Able } else { Peer::Away },
            waiting_since_ns: self.answers.waiting_since_ns(),
        }
    }

    fn uncaptured(&self) -> impl Iterator<Item = usize> + '_ {
        let recent = self.writes.len().saturating_sub(400);
        (recent..self.writes.len()).filter(|index| self.writes[*index].record.is_none())
    }

    fn source(&mut self) {
        if self.now_ms < self.held_up_until_ms {
            return;
        }
        if self.random.percent(3) {
            self.write();
        }
        let now_ns = self.clocks[0].at(self.now_ms);
        for index in self.writes.len().saturating_sub(400)..self.writes.len() {
            let write = &mut self.writes[index];
            if write.done_ms.is_some_and(|at| at <= self.now_ms) {
                (write.done_ms, write.local_ms) = (None, self.now_ms);
                self.answers.hold(index, write.record.map(Seq), now_ns);
            }
        }
        self.catch_up();
        while let Some(message) = self.wires[0].next(self.now_ms) {
            match message {
                Message::Ask(number) => self.asked(number),
                Message::Ack(seq) => self.durable = self.durable.max(seq),
                Message::Frames(_) | Message::Grant(..) => unreachable!("a source's own"),
            }
        }
        // Not every millisecond: the thread sleeps.
        if self.random.percent(5) {
            self.looked_ns = now_ns;
            self.mode.turn(&self.facts(now_ns));
            self.note();
            self.answer();
        }
        if self.linked && self.sent < self.last_seq && !self.random.percent(90) {
            self.sent = self.last_seq;
            let at_ms = self.now_ms + self.delay();
            self.wires[1].send(at_ms, Message::Frames(self.sent));
        }
    }

    fn delay(&mut self) -> u64 {
        match self.random.below(20) {
            0 => self.random.below(2500),
            _ if self.slow => 500 + self.random.below(3000),
            _ => 1 + self.random.below(30),
        }
    }

    fn write(&mut self) {
        let record = (!self.overflow).then(|| {
            self.last_seq += 1;
            self.last_seq
        });
        let done_ms = Some(self.now_ms + self.random.below(20));
        self.writes.push(Write { record, done_ms, local_ms: 0, answered: false });
    }

    fn catch_up(&mut self) {
        if self.overflow || self.uncaptured().next().is_none() {
            return;
        }
        match self.catch_up_ms {
            None => self.catch_up_ms = Some(self.now_ms + self.random.below(3000)),
            Some(at) if at <= self.now_ms => {
                self.catch_up_ms = None;
                self.last_seq += 1;
                for index in self.uncaptured().collect::<Vec<_>>() {
                    self.writes[index].record = Some(self.last_seq);
                }
            }
            Some(_) => {}
        }
    }

    fn note(&mut self) {
        if let Some(lease) = self.mode.to_note() {
            self.noting = Some((self.now_ms + self.random.below(300), lease));
        }
        if let Some((at, lease)) = self.noting
            && at <= self.now_ms
        {
            (self.noted, self.noting) = (lease, None);
            self.mode.noted();
        }
    }

    fn asked(&mut self, number: u64) {
        let fresh = self.clocks[0].at(self.now_ms);
        let now_ns = if self.flaw == Flaw::StaleClock { self.looked_ns } else { fresh };
        let granted = self.mode.asked(&self.facts(now_ns));
        let entering =
            self.flaw == Flaw::GrantWhileEntering && self.mode.view().stage == Stage::Entering;
        let granted = granted.or(entering.then_some(LEASE));
        if let Some(lease) = granted.filter(|_| !self.random.percent(10)) {
            let at_ms = self.now_ms + self.delay();
            self.wires[1].send(at_ms, Message::Grant(number, lease));
        }
    }

    fn answer(&mut self) {
        let view = self.mode.view();
        let leaving = self.flaw == Flaw::AnswerWhileLeaving && view.stage == Stage::Leaving;
        let holds = self.mode.holds() && !leaving;
        let (writes, now_ms) = (&mut self.writes, self.now_ms);
        let waited = &mut self.outcome.waited_ms_max;
        self.answers.release(Seq(self.durable), holds, |index| {
            writes[index].answered = true;
            *waited = (*waited).max(now_ms - writes[index].local_ms);
        });
        if self.flaw == Flaw::AnswerUncaptured {
            for write in writes.iter_mut().rev().take(100) {
                write.answered |= write.record.is_none() && write.done_ms.is_none();
            }
        }
    }

    fn target(&mut self) {
        let now_ns = self.clocks[1].at(self.now_ms);
        while let Some((at, seq)) = self.stored.front().copied()
            && at <= self.now_ms
        {
            self.stored.pop_front();
            self.target_durable = self.target_durable.max(seq);
            let at_ms = self.now_ms + self.delay();
            if self.linked {
                self.wires[0].send(at_ms, Message::Ack(self.target_durable));
            }
        }
        while let Some(message) = self.wires[1].next(self.now_ms) {
            match message {
                Message::Frames(seq) => {
                    let took_ms = if self.slow { self.random.below(4000) } else { 3 };
                    let after = self.stored.back().map_or(0, |(at, _)| *at);
                    self.stored.push_back(((self.now_ms + took_ms).max(after), seq));
                }
                Message::Grant(number, lease) => self.granted(number, lease, Moment(now_ns)),
                Message::Ask(_) | Message::Ack(_) => unreachable!("a target's own"),
            }
        }
        if self.linked && self.now_ms >= self.ask_ms {
            self.ask_ms = self.now_ms + ASK_EVERY.as_millis() as u64;
            let number = self.asks.ask(Moment(now_ns));
            self.asked_ns = now_ns;
            let at_ms = self.now_ms + self.delay();
            if !self.random.percent(10) {
                self.wires[0].send(at_ms, Message::Ask(number));
            }
        }
    }

    fn granted(&mut self, number: u64, lease: Duration, now: Moment) {
        let until = self.asks.granted(number, lease).expect("what this session asked");
        let until = match self.flaw {
            Flaw::CountFromArrival => until.map(|_| Moment(now.0 + lease.as_nanos() as u64)),
            Flaw::CountFromNewestAsk => {
                until.map(|_| Moment(self.asked_ns + lease.as_nanos() as u64))
            }
            _ => until,
        };
        if let Some(until) = until {
            self.holder.hold(until);
        }
    }

    fn check(&mut self, calm: bool) {
        let now = Moment(self.clocks[1].at(self.now_ms));
        if self.holder.look(now, true) != Claim::Held {
            return;
        }
        self.outcome.held_ms += 1;
        self.outcome.calm_held_ms += u64::from(calm);
        let there = |record: Option<u64>| record.is_some_and(|seq| seq <= self.target_durable);
        let recent = self.writes.len().saturating_sub(400);
        let missing =
            self.writes[recent..].iter().position(|write| write.answered && !there(write.record));
        if let Some(index) = missing {
            let view = self.mode.view();
            self.outcome.wrong = Some(format!(
                "at {} ms write {} is answered and missing, in {view:?}",
                self.now_ms,
                recent + index
            ));
        }
    }
}
