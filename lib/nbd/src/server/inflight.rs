//! The requests of a connection that are under way: futures in reusable slots.
//!
//! Completions from any thread gather in one list, and only the first wakes the connection, so a
//! batch of completions costs one wake-up and is answered by one write. A slot's waker is made
//! once and reused: a request costs no allocation here.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Something to drive to its end.
pub(crate) trait Task {
    type Output;

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Self::Output>;
}

pub(crate) struct InFlight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<usize>,
    /// Swapped with the shared list, to poll without its lock; empty in between.
    woken: VecDeque<usize>,
    shared: Arc<Shared>,
    count: usize,
}

struct Slot<T> {
    task: Option<T>,
    flag: Arc<SlotWaker>,
    waker: Waker,
}

#[derive(Default)]
struct Shared(Mutex<SharedState>);

#[derive(Default)]
struct SharedState {
    woken: VecDeque<usize>,
    connection: Option<Waker>,
}

struct SlotWaker {
    index: usize,
    queued: AtomicBool,
    shared: Arc<Shared>,
}

impl<T: Task> InFlight<T> {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            woken: VecDeque::new(),
            shared: Arc::default(),
            count: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Polls a new task once, at once; keeps it unless that ended it.
    pub(crate) fn start(&mut self, mut task: T) -> Option<T::Output> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::new(self.slots.len(), &self.shared));
            self.slots.len() - 1
        });
        let slot = self.slots.get_mut(index)?;
        match task.poll(&mut Context::from_waker(&slot.waker)) {
            Poll::Ready(output) => {
                self.free.push(index);
                Some(output)
            }
            Poll::Pending => {
                slot.task = Some(task);
                self.count += 1;
                None
            }
        }
    }

    /// Polls the tasks woken so far, once each; appends the outputs of those that have ended.
    ///
    /// Once only: a task that wakes itself, as tokio's do when their budget is used up, must not
    /// keep the connection from yielding. It has woken the connection too.
    pub(crate) fn poll_ended(&mut self, cx: &mut Context<'_>, ended: &mut Vec<T::Output>) {
        {
            let mut shared = self.shared.lock();
            if !shared.connection.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                shared.connection = Some(cx.waker().clone());
            }
            std::mem::swap(&mut shared.woken, &mut self.woken);
        }
        while let Some(index) = self.woken.pop_front() {
            ended.extend(self.poll_slot(index));
        }
    }

    fn poll_slot(&mut self, index: usize) -> Option<T::Output> {
        let slot = self.slots.get_mut(index)?;
        slot.flag.queued.store(false, Ordering::Release);
        // None: a late wake-up for a task that has ended.
        let Poll::Ready(output) = slot.task.as_mut()?.poll(&mut Context::from_waker(&slot.waker))
        else {
            return None;
        };
        slot.task = None;
        self.free.push(index);
        self.count -= 1;
        Some(output)
    }
}

impl<T> Slot<T> {
    fn new(index: usize, shared: &Arc<Shared>) -> Self {
        let queued = AtomicBool::new(false);
        let flag = Arc::new(SlotWaker { index, queued, shared: Arc::clone(shared) });
        Self { task: None, waker: Waker::from(Arc::clone(&flag)), flag }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, SharedState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let connection = {
            let mut shared = self.shared.lock();
            shared.woken.push_back(self.index);
            // With others already there, the connection has been woken and not looked yet.
            if shared.woken.len() == 1 { shared.connection.clone() } else { None }
        };
        if let Some(connection) = connection {
            connection.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    struct Wait(oneshot::Receiver<u32>);

    impl Task for Wait {
        type Output = u32;

        fn poll(&mut self, cx: &mut Context<'_>) -> Poll<u32> {
            std::pin::Pin::new(&mut self.0).poll(cx).map(|value| value.expect("a value"))
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_task_ends_once_though_woken_from_other_threads() {
        let mut set = InFlight::new();
        let mut seen = Vec::new();
        for round in 0..200 {
            let mut senders = Vec::new();
            for task in 0..16 {
                let (sender, receiver) = oneshot::channel();
                assert!(set.start(Wait(receiver)).is_none());
                senders.push((sender, round * 16 + task));
            }
            tokio::spawn(async move {
                for (sender, value) in senders {
                    sender.send(value).expect("awaited");
                }
            });
            std::future::poll_fn(|cx| {
                set.poll_ended(cx, &mut seen);
                if set.is_empty() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..3200).collect::<Vec<_>>());
        assert_eq!(set.slots.len(), 16, "slots are reused");
    }
}
