//! Settings of the C library's allocator, from which libtorch takes a CPU tensor's memory.
#![expect(unsafe_code)]

/// Keeps freed memory for the next tensor instead of giving it back to the system. A training step frees gigabytes and
/// asks for them again, and every page that comes fresh is cleared first: a tenth of a step of SmolLM2-135M in f32.
///
/// To be called once, before the first tensor. Does nothing where the C library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes two integers and only changes numbers that later calls of malloc and free read; no other
    // thread runs yet. It refuses what it cannot take, which leaves the defaults.
    unsafe {
        // Setting one of the two ends glibc's own adjustment of both. Above 32 MiB it refuses.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
