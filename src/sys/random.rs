//! Random bytes from the kernel.

/// Fills `buf` from `getrandom(2)`, retrying on signals. Falls back to nothing: a kernel of our floor always has it.
///
/// # Panics
/// When the kernel has no random source at all, which `getrandom` without flags cannot report on Linux >= 3.17.
pub fn fill(buf: &mut [u8]) {
    let mut done = 0;
    while done < buf.len() {
        match rustix::rand::getrandom(&mut buf[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("getrandom: {e}"),
        }
    }
}
