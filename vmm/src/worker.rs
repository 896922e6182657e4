//! The thread that does what the event loop cannot wait for. It is there before the event loop is confined
//! ([`crate::seccomp`]), as no thread begins afterwards.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
};

use crate::seccomp::{self, Thread};

type Job = Box<dyn FnOnce(&Queue) + Send>;

/// The end that gives the work. The thread ends with it.
#[derive(Debug, Default)]
pub struct Worker {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    queue: Queue,
}

/// How much work waits.
#[derive(Clone, Debug, Default)]
pub struct Queue(Arc<AtomicUsize>);

impl Queue {
    /// Whether there is other work, for which what may be left undone had better end.
    pub fn is_waiting(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Worker {
    /// Begins the thread, unless it is there.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(&self) -> io::Result<()> {
        self.with(|_| Ok(()))
    }

    /// Has the work done, behind what was given before.
    ///
    /// # Errors
    /// There is no thread, and the host gives none; or it has ended.
    pub fn give(&self, job: impl FnOnce(&Queue) + Send + 'static) -> io::Result<()> {
        self.with(|jobs| {
            self.queue.0.fetch_add(1, Ordering::Relaxed);
            jobs.send(Box::new(job)).map_err(|_| io::Error::other("the worker has ended"))
        })
    }

    fn with(&self, work: impl FnOnce(&mpsc::Sender<Job>) -> io::Result<()>) -> io::Result<()> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let there = match jobs.take() {
            Some(there) => there,
            None => begin(self.queue.clone())?,
        };
        work(jobs.insert(there))
    }
}

fn begin(queue: Queue) -> io::Result<mpsc::Sender<Job>> {
    let (jobs, given) = mpsc::channel::<Job>();
    seccomp::spawn(Thread::Worker, move || {
        for job in given {
            queue.0.fetch_sub(1, Ordering::Relaxed);
            job(&queue);
        }
    })?;
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_order_by_another_thread() {
        let worker = Worker::default();
        worker.start().unwrap();
        let (done, told) = mpsc::channel();
        for number in 0..3 {
            let done = done.clone();
            let name = || std::thread::current().name().map(str::to_owned);
            worker.give(move |_| done.send((number, name())).unwrap()).unwrap();
        }
        for number in 0..3 {
            assert_eq!(told.recv().unwrap(), (number, Some("worker".to_owned())));
        }
    }

    #[test]
    fn work_that_is_under_way_learns_of_work_that_waits() {
        let worker = Worker::default();
        let (seen, told) = mpsc::channel();
        let (go, gone) = mpsc::channel();
        worker
            .give(move |queue| {
                gone.recv().unwrap();
                seen.send(queue.is_waiting()).unwrap();
            })
            .unwrap();
        worker.give(|queue| assert!(!queue.is_waiting())).unwrap();
        go.send(()).unwrap();
        assert!(told.recv().unwrap());
    }
}
