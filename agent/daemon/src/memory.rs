//! How the agent's memory allocator gives memory back.
//!
//! Loading eBPF objects takes some ten MiB for a moment, on whichever thread does it. By its defaults glibc keeps much of
//! that: an arena for each thread, and thresholds that grow with what was freed. An agent idles most of its life.

#![expect(unsafe_code, reason = "mallopt(3) and malloc_trim(3) have no safe form")]

use std::time::Duration;

use nix::libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, malloc_trim, mallopt};
use tokio::time::sleep;

/// Two workers, two arenas.
const ARENAS: i32 = 2;
/// glibc's own starting value, in bytes; setting it keeps it from growing.
const THRESHOLD: i32 = 128 * 1024;

/// By then objects are loaded and sources have looked at everything once.
const BEGINNING: Duration = Duration::from_secs(3);

/// Gives back, when the beginning is over, what it has left free between what is in use: thresholds only reach the heap's end.
pub(crate) async fn give_back_the_beginnings() {
    sleep(BEGINNING).await;
    // SAFETY: malloc_trim takes an integer, may be called from any thread at any time, and touches only what is free.
    unsafe { malloc_trim(0) };
}

/// To be called before threads are started. A value that is refused leaves the default.
pub(crate) fn give_back_early() {
    for (parameter, value) in
        [(M_ARENA_MAX, ARENAS), (M_TRIM_THRESHOLD, THRESHOLD), (M_MMAP_THRESHOLD, THRESHOLD)]
    {
        // SAFETY: mallopt takes two integers and changes only the allocator's own parameters; no other thread runs yet.
        unsafe { mallopt(parameter, value) };
    }
}
