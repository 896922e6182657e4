//! What all apps of a host share: how many machines start at once, and how much memory machines have together.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::{Error, Result};

/// The host's limits.
#[derive(Clone, Debug)]
pub struct HostLimits {
    starts: Arc<Semaphore>,
    memory: Arc<AllMemory>,
}

#[derive(Debug)]
struct AllMemory {
    mib: u64,
    books: Mutex<Books>,
    /// Somebody waits, and something has changed.
    shortage: Notify,
}

#[derive(Debug, Default)]
struct Books {
    /// Machines that were found to run may have more than there is.
    used_mib: u64,
    /// Who came first is served first, however little others want.
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    mib: u64,
    gives: oneshot::Sender<Memory>,
}

/// Memory that a machine has, until this is dropped.
#[derive(Debug)]
pub struct Memory {
    mib: u64,
    of: Option<Arc<AllMemory>>,
}

impl Memory {
    /// How much it is.
    pub fn mib(&self) -> u64 {
        self.mib
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(all) = self.of.take() {
            all.lock().used_mib -= self.mib;
            all.hand_out();
        }
    }
}

/// Whoever waits no more lets the next one through.
struct Patience(Arc<AllMemory>);

impl Drop for Patience {
    fn drop(&mut self) {
        self.0.hand_out();
    }
}

impl HostLimits {
    /// At least one start at a time, and so much memory.
    pub fn new(starts: u32, memory_mib: u64) -> HostLimits {
        let memory = AllMemory { mib: memory_mib, books: Mutex::default(), shortage: Notify::new() };
        HostLimits { starts: Arc::new(Semaphore::new(starts.max(1) as usize)), memory: Arc::new(memory) }
    }

    /// Waits for a machine's memory.
    ///
    /// # Errors
    /// It is more than there is.
    pub async fn memory(&self, mib: u64) -> Result<Memory> {
        if mib > self.memory.mib {
            let all = self.memory.mib;
            return Err(Error::new(format!(
                "a machine of {mib} MiB never fits into the {all} MiB that machines may have together"
            ))
            .advice("Raise `flyrun serve --memory`, or lower memory in [[vm]]."));
        }
        let (gives, given) = oneshot::channel();
        self.memory.lock().waiting.push_back(Waiting { mib, gives });
        self.memory.hand_out();
        let _patience = Patience(self.memory.clone());
        given.await.map_err(|error| Error::caused("no memory is given away", &error))
    }

    /// The memory of a machine that runs already, whether there is so much or not.
    pub fn memory_of_running(&self, mib: u64) -> Memory {
        self.memory.lock().used_mib += mib;
        Memory { mib, of: Some(self.memory.clone()) }
    }

    /// What machines that run have taken.
    pub fn memory_in_use_mib(&self) -> u64 {
        self.memory.lock().used_mib
    }

    /// Returns when somebody waits for memory, or still does and something has changed.
    pub async fn shortage(&self) {
        self.memory.shortage.notified().await;
    }

    /// How much is lacking for those who could start now if they had it, in MiB.
    pub fn lacking_mib(&self) -> u64 {
        let starts = self.starts.available_permits().max(1);
        let books = self.memory.lock();
        let first = books.waiting.iter().filter(|waiting| !waiting.gives.is_closed()).take(starts);
        let wanted = first.fold(0_u64, |sum, waiting| sum.saturating_add(waiting.mib));
        if wanted == 0 {
            return 0;
        }
        books.used_mib.saturating_add(wanted).saturating_sub(self.memory.mib)
    }

    /// A machine may have become idle: to be told to those who wait for memory.
    pub fn may_have_room(&self) {
        if !self.memory.lock().waiting.is_empty() {
            self.memory.shortage.notify_one();
        }
    }

    /// Waits until another start may begin; it has begun until this is dropped.
    ///
    /// # Errors
    /// None do any more.
    pub async fn start(&self) -> Result<OwnedSemaphorePermit> {
        let permit = self.starts.clone().acquire_owned().await;
        permit.map_err(|error| Error::caused("no machine is started", &error))
    }
}

impl AllMemory {
    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives what there is to those who wait.
    fn hand_out(self: &Arc<Self>) {
        let mut books = self.lock();
        books.waiting.retain(|waiting| !waiting.gives.is_closed());
        while let Some(first) = books.waiting.pop_front() {
            if books.used_mib.saturating_add(first.mib) > self.mib {
                books.waiting.push_front(first);
                break;
            }
            let memory = Memory { mib: first.mib, of: Some(self.clone()) };
            match first.gives.send(memory) {
                Ok(()) => books.used_mib += first.mib,
                // Nobody takes it. It is not given back either, for which the books would be locked again.
                Err(mut memory) => memory.of = None,
            }
        }
        if !books.waiting.is_empty() {
            self.shortage.notify_one();
        }
    }
}

/// What machines may have together if nobody says: four fifths of the host's memory, in MiB.
pub fn default_memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = total.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(1 << 20);
    kib / 1024 * 4 / 5
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody who waits for so much, and is known to by now.
    async fn waits(limits: &HostLimits, mib: u64) -> tokio::task::JoinHandle<Memory> {
        let own = limits.clone();
        let waits = tokio::spawn(async move { own.memory(mib).await.unwrap() });
        tokio::task::yield_now().await;
        waits
    }

    #[tokio::test]
    async fn memory_is_given_back_and_what_never_fits_is_refused() {
        let limits = HostLimits::new(2, 512);
        let first = limits.memory(256).await.unwrap();
        let _second = limits.memory(256).await.unwrap();
        assert_eq!(limits.memory_in_use_mib(), 512);
        let third = waits(&limits, 128).await;
        drop(first);
        assert_eq!(third.await.unwrap().mib(), 128);
        assert!(limits.memory(513).await.unwrap_err().to_string().contains("--memory"));
        assert!(default_memory_mib() > 0);
    }

    #[tokio::test]
    async fn who_comes_first_is_served_first_and_who_leaves_is_in_nobody_s_way() {
        let limits = HostLimits::new(2, 512);
        let first = limits.memory(300).await.unwrap();
        let large = waits(&limits, 400).await;
        let small = waits(&limits, 100).await;
        assert!(!small.is_finished(), "or the large one might wait for ever");
        large.abort();
        assert!(large.await.is_err());
        let small = small.await.unwrap();
        assert_eq!(limits.memory_in_use_mib(), 400);
        drop((first, small));
        assert_eq!(limits.memory_in_use_mib(), 0);
    }

    #[tokio::test]
    async fn what_is_lacking_is_told_of_those_who_could_start() {
        let limits = HostLimits::new(2, 512);
        let mut all = vec![limits.memory(256).await.unwrap(), limits.memory(200).await.unwrap()];
        assert_eq!(limits.lacking_mib(), 0);
        let waiting = [waits(&limits, 128).await, waits(&limits, 64).await, waits(&limits, 300).await];
        limits.shortage().await;
        assert_eq!(limits.lacking_mib(), 128 + 64 - 56, "two may start");
        let _started = limits.start().await.unwrap();
        assert_eq!(limits.lacking_mib(), 128 - 56);
        all.clear();
        let [first, second, third] = waiting;
        assert_eq!(limits.memory_in_use_mib(), 492);
        drop((first.await, second.await, third.await));
        assert_eq!((limits.memory_in_use_mib(), limits.lacking_mib()), (0, 0));
    }

    #[tokio::test]
    async fn machines_that_run_have_what_they_have() {
        let limits = HostLimits::new(2, 100);
        let (one, other) = (limits.memory_of_running(80), limits.memory_of_running(80));
        assert_eq!(limits.memory_in_use_mib(), 160);
        assert_eq!(limits.lacking_mib(), 0, "nobody wants it");
        let next = waits(&limits, 50).await;
        assert_eq!(limits.lacking_mib(), 110);
        drop(one);
        tokio::task::yield_now().await;
        assert!(!next.is_finished());
        drop(other);
        next.await.unwrap();
    }
}
