//! Memory for machines that are to start: where there is none, those that are idle for longest end before their time.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use app::pool::{Life, Moment};

use super::group::{Group, Shared};

/// The groups of all apps.
#[derive(Debug, Default)]
pub struct Groups(Mutex<Vec<Weak<Group>>>);

/// A machine that could end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Idle {
    since: Moment,
    life: Life,
}

impl Groups {
    /// Counts this one in, as long as it is there.
    pub fn add(&self, group: &Arc<Group>) {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
    }

    fn all(&self) -> Vec<Arc<Group>> {
        let groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Makes room whenever somebody waits for it.
pub async fn keep_making_room(shared: Arc<Shared>) {
    loop {
        shared.limits.shortage().await;
        make_room(&shared);
    }
}

fn make_room(shared: &Shared) {
    let groups = shared.groups.all();
    let ending: u64 = groups.iter().map(|group| group.ending_mib()).sum();
    let mut lacking = shared.limits.lacking_mib().saturating_sub(ending);
    while lacking > 0 {
        let idle =
            groups.iter().filter_map(|group| group.idle().map(|(since, life)| (Idle { since, life }, group)));
        let Some((idle, group)) = idle.min_by_key(|(idle, _)| *idle) else { return };
        group.make_room(idle.life);
        lacking = lacking.saturating_sub(group.memory_mib());
    }
}
