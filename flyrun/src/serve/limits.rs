//! What all apps of a host share: how many machines start at once, and how much memory machines have together.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// The host's limits.
#[derive(Clone, Debug)]
pub struct HostLimits {
    starts: Arc<Semaphore>,
    memory_mib: Arc<Semaphore>,
    all_memory_mib: u32,
}

/// Memory that a machine has, until this is dropped.
#[derive(Debug)]
pub struct Memory(#[expect(dead_code, reason = "it is held")] OwnedSemaphorePermit);

impl HostLimits {
    /// At least one start at a time, and so much memory.
    pub fn new(starts: u32, memory_mib: u64) -> HostLimits {
        let all_memory_mib = u32::try_from(memory_mib).unwrap_or(u32::MAX);
        HostLimits {
            starts: Arc::new(Semaphore::new(starts.max(1) as usize)),
            memory_mib: Arc::new(Semaphore::new(all_memory_mib as usize)),
            all_memory_mib,
        }
    }

    /// Waits for a machine's memory.
    ///
    /// # Errors
    /// It is more than there is.
    pub async fn memory(&self, mib: u64) -> Result<Memory> {
        let too_much = || {
            Error::new(format!(
                "a machine of {mib} MiB never fits into the {} MiB that machines may have together",
                self.all_memory_mib
            ))
            .advice("Raise `flyrun serve --memory`, or lower memory in [[vm]].")
        };
        let wanted = u32::try_from(mib).ok().filter(|mib| *mib <= self.all_memory_mib);
        let permit = self.memory_mib.clone().acquire_many_owned(wanted.ok_or_else(too_much)?).await;
        permit.map(Memory).map_err(|error| Error::caused("no memory is given away", &error))
    }

    /// The memory of a machine that runs already; `None` if others have it all.
    pub fn memory_of_running(&self, mib: u64) -> Option<Memory> {
        let wanted = u32::try_from(mib).ok()?;
        self.memory_mib.clone().try_acquire_many_owned(wanted).ok().map(Memory)
    }

    /// What machines that run have taken.
    pub fn memory_in_use_mib(&self) -> u64 {
        u64::from(self.all_memory_mib).saturating_sub(self.memory_mib.available_permits() as u64)
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

    #[tokio::test]
    async fn memory_is_given_back_and_what_never_fits_is_refused() {
        let limits = HostLimits::new(2, 512);
        let first = limits.memory(256).await.unwrap();
        let _second = limits.memory(256).await.unwrap();
        assert_eq!(limits.memory_in_use_mib(), 512);
        let waits = tokio::spawn({
            let limits = limits.clone();
            async move { limits.memory(128).await.map(drop) }
        });
        drop(first);
        waits.await.unwrap().unwrap();
        assert!(limits.memory(513).await.unwrap_err().to_string().contains("--memory"));
        assert!(default_memory_mib() > 0);
    }
}
