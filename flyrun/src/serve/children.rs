//! Monitors that this process has started: when they have ended, they wait for somebody who asks how.

use std::process::Child;
use std::sync::{Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

/// Those that are not known to have ended.
#[derive(Debug, Default)]
pub struct Children(Mutex<Vec<Child>>);

impl Children {
    /// One more.
    pub fn add(&self, child: Child) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(child);
        // It may have ended before it was one of them.
        self.reap();
    }

    fn reap(&self) {
        let mut children = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// Asks each when it has ended.
    pub async fn keep_reaping(&self) {
        let Ok(mut ends) = signal(SignalKind::child()) else { return };
        while ends.recv().await.is_some() {
            self.reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn nobody_stays_who_has_ended() {
        let children = Arc::new(Children::default());
        tokio::spawn({
            let children = children.clone();
            async move { children.keep_reaping().await }
        });
        let mut lasting = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let (stdin, pid) = (lasting.stdin.take(), lasting.id());
        children.add(lasting);
        children.add(Command::new("true").spawn().unwrap());
        let remain = async |count: usize| {
            while children.0.lock().unwrap().len() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        remain(1).await;
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
        drop(stdin);
        remain(0).await;
    }
}
