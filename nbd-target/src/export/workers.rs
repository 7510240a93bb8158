//! Threads for what blocks on the disk: a bounded number at once, and fewer for any one client, so that
//! whoever asks for much waits for itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tidemark_nbd::{Errno, Error};
use tokio::sync::Semaphore;

use crate::points::latest::Client;

/// The threads of a target.
pub struct Workers {
    all: Arc<Semaphore>,
    each: usize,
    clients: Mutex<HashMap<Client, Weak<Semaphore>>>,
}

/// What one client may have of them, over all its connections.
#[derive(Clone)]
pub struct Share {
    all: Arc<Semaphore>,
    own: Arc<Semaphore>,
}

impl Workers {
    /// So many at once, of which a client has at most `each`.
    pub fn new(most: usize, each: usize) -> Workers {
        Workers { all: Arc::new(Semaphore::new(most)), each, clients: Mutex::default() }
    }

    /// A client's share.
    pub fn share(&self, client: &Client) -> Share {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let own = clients.get(client).and_then(Weak::upgrade).unwrap_or_else(|| {
            clients.retain(|_, share| share.strong_count() > 0);
            let own = Arc::new(Semaphore::new(self.each));
            clients.insert(client.clone(), Arc::downgrade(&own));
            own
        });
        Share { all: Arc::clone(&self.all), own }
    }
}

impl Share {
    /// Runs something that blocks, once there is a thread for this client. Both queues are first come,
    /// first served, and a client is in the common one with no more than its share.
    ///
    /// # Errors
    /// When it panics or the target ends.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let ended = |_| Error::new(Errno::Shutdown, "the target is ending");
        let own = Arc::clone(&self.own).acquire_owned().await.map_err(ended)?;
        let place = Arc::clone(&self.all).acquire_owned().await.map_err(ended)?;
        let work = move || {
            let _places = (own, place);
            work()
        };
        let failed = |error| Error::new(Errno::Io, format!("a read failed: {error}"));
        tokio::task::spawn_blocking(work).await.map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, SocketAddr},
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        time::Duration,
    };

    use tidemark_nbd::{ClientInfo, Origin};

    use super::*;

    fn client(number: u8) -> Client {
        let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, number), 1));
        Client::of(&ClientInfo { origin: Origin::Tcp(address), ..ClientInfo::default() })
    }

    /// One client that asked for hundreds of slow reads took all threads, and everybody else waited for
    /// all of them.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_client_with_many_slow_reads_leaves_threads_for_others() {
        let workers = Workers::new(4, 2);
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let started = Arc::new(AtomicUsize::new(0));
        let mut slow = Vec::new();
        for _ in 0..100 {
            // Each of another connection of the same client.
            let (share, held) = (workers.share(&client(1)), Arc::clone(&held));
            let started = Arc::clone(&started);
            slow.push(tokio::spawn(async move {
                let work = move || {
                    started.fetch_add(1, Ordering::SeqCst);
                    let _ = held.lock().expect("no panic").recv();
                };
                share.run(work).await
            }));
        }
        while started.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let other = workers.share(&client(2));
        let answer = tokio::time::timeout(Duration::from_secs(20), other.run(|| 7)).await;
        assert_eq!(answer.expect("a thread is left").expect("it ran"), 7);
        assert_eq!(started.load(Ordering::SeqCst), 2);
        drop(release);
        for read in slow {
            read.await.expect("no panic").expect("it ran");
        }
    }
}
