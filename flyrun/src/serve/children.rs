//! Monitors that this process has started: when they have ended, they wait for somebody who asks how.

use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::{Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Those that are not known to have ended.
#[derive(Debug, Default)]
pub struct Children {
    all: Mutex<Vec<Child>>,
    /// One was killed, and has left what is to be taken away: an interface, for instance.
    has_left: Notify,
}

impl Children {
    /// One more.
    pub fn add(&self, child: Child) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(child);
        // It may have ended before it was one of them.
        self.reap();
    }

    fn reap(&self) {
        let mut children = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        children.retain_mut(|child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) if status.signal().is_some() => {
                self.left_something();
                false
            }
            Ok(Some(_)) | Err(_) => false,
        });
    }

    /// There may be something to be taken away.
    pub fn left_something(&self) {
        self.has_left.notify_one();
    }

    /// Returns when there may be something to be taken away.
    pub async fn leavings(&self) {
        self.has_left.notified().await;
    }

    /// Asks each when it has ended.
    pub async fn keep_reaping(&self) {
        let Ok(mut ends) = signal(SignalKind::child()) else { return };
        // Nobody told of those who ended before.
        self.reap();
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
            while children.all.lock().unwrap().len() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        remain(1).await;
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
        drop(stdin);
        remain(0).await;
        let has_left = tokio::time::timeout(Duration::ZERO, children.leavings()).await;
        assert!(has_left.is_err(), "they ended as they should");
        let mut killed = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        killed.kill().unwrap();
        children.add(killed);
        children.leavings().await;
    }
}
