//! Sockets that somebody else uses, to be shut down when the time has come.

use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What can be held without being kept.
pub(crate) trait Held: Sized {
    type Inner;
    fn weak(&self) -> Weak<Self::Inner>;
    fn strong(weak: &Weak<Self::Inner>) -> Option<Self>;
}

/// A set that forgets what is gone.
pub(crate) struct Registry<T: Held> {
    items: Mutex<Items<T::Inner>>,
}

struct Items<I> {
    all: Vec<Weak<I>>,
    /// Those that are gone are looked for when there are so many.
    sweep_at: usize,
}

impl<T: Held> Default for Registry<T> {
    fn default() -> Registry<T> {
        Registry { items: Mutex::new(Items { all: Vec::new(), sweep_at: 64 }) }
    }
}

impl<T: Held> Registry<T> {
    pub fn add(&self, item: &T) {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        if items.all.len() >= items.sweep_at {
            items.all.retain(|one| one.strong_count() > 0);
            items.sweep_at = (items.all.len() * 2).max(64);
        }
        items.all.push(item.weak());
    }

    /// Calls `what` with all that are still there.
    pub fn each(&self, what: impl Fn(&T)) {
        let all = self.items.lock().unwrap_or_else(PoisonError::into_inner).all.clone();
        for one in all.iter().filter_map(T::strong) {
            what(&one);
        }
    }
}

impl<I: Send + Sync> Held for Arc<I> {
    type Inner = I;

    fn weak(&self) -> Weak<I> {
        Arc::downgrade(self)
    }

    fn strong(weak: &Weak<I>) -> Option<Arc<I>> {
        weak.upgrade()
    }
}
