//! glibc's heap of a process.

/// Has all threads that begin from now on allocate from the heap that is there. Else each has one of its own from its first allocation on,
/// which is four system calls and two pages: more than a thread that allocates little ever waits for another.
pub fn share() {
    // SAFETY: mallopt(3) takes no pointers, and this parameter concerns only arenas that are not made yet.
    let _unknown_there = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

#[cfg(test)]
mod tests {
    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test's threads")]
    fn threads_allocate_from_one_heap() {
        super::share();
        // A heap of its own reserves 64 MiB of addresses.
        let reserved = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let bytes = |line: &str| {
                let (start, rest) = line.split_once('-')?;
                let (end, rest) = rest.split_once(' ')?;
                let number = |text| u64::from_str_radix(text, 16).ok();
                rest.starts_with("---p").then_some(number(end)? - number(start)?)
            };
            maps.lines().filter_map(bytes).filter(|bytes| *bytes > 32 << 20).count()
        };
        let before = reserved();
        let threads: Vec<_> =
            (0..4).map(|size| std::thread::spawn(move || vec![1u8; 100 << size].len())).collect();
        threads.into_iter().for_each(|thread| assert!(thread.join().unwrap() >= 100));
        assert_eq!(reserved(), before);
    }
}
