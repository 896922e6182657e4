//! How much input may still be sent: a session's window, shared by the thread that sends and the one that hears.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use protocol::session::STDIN_WINDOW;

/// The window. Open to its full width at first.
#[derive(Debug)]
pub struct Window {
    /// `None` when nothing will be taken any more.
    room: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Default for Window {
    fn default() -> Window {
        Window { room: Mutex::new(Some(STDIN_WINDOW)), changed: Condvar::new() }
    }
}

impl Window {
    fn room(&self) -> MutexGuard<'_, Option<usize>> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something may be sent, and says how much; 0 when the window was shut.
    pub fn wait(&self) -> usize {
        let waited = self.changed.wait_while(self.room(), |room| *room == Some(0));
        waited.unwrap_or_else(PoisonError::into_inner).unwrap_or(0)
    }

    /// So many bytes are about to be sent.
    pub fn narrow(&self, bytes: usize) {
        let mut room = self.room();
        *room = room.map(|room| room.saturating_sub(bytes));
    }

    /// The other side has taken so many.
    pub fn widen(&self, bytes: usize) {
        let mut room = self.room();
        *room = room.map(|room| room.saturating_add(bytes).min(STDIN_WINDOW));
        drop(room);
        self.changed.notify_all();
    }

    /// Nothing will be taken any more: who waits is let go.
    pub fn shut(&self) {
        *self.room() = None;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_never_opens_further_than_at_first() {
        let window = Window::default();
        window.widen(usize::MAX);
        assert_eq!(window.wait(), STDIN_WINDOW);
        window.narrow(STDIN_WINDOW - 1);
        assert_eq!(window.wait(), 1);
    }

    #[test]
    fn who_waits_is_let_go_when_it_opens_or_shuts() {
        for (change, expected) in [(Window::shut as fn(&Window), 0), (|window| window.widen(5), 5)] {
            let window = Window::default();
            window.narrow(STDIN_WINDOW);
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| window.wait());
                change(&window);
                assert_eq!(waiting.join().unwrap(), expected);
            });
        }
    }
}
