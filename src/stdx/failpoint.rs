//! Fail points: named places at which a test makes the process die, to prove that nothing is lost.
//!
//! `MESOCRI_FAILPOINT=name[:n]` kills the process with SIGKILL at the n-th (default first) passage of `name`. Without the
//! variable a passage costs one atomic load. Names are `rpc.step`; the kill matrix finds them by reading the sources.
//!
//! Those that begin with `shim.` are the shim's: the daemon hands the variable on to shims that it starts, which get no other
//! environment, and each of them counts its own passages.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Environment variable that arms a point.
pub const VARIABLE: &str = "MESOCRI_FAILPOINT";

/// How the names of the shim's points begin.
const OF_SHIMS: &str = "shim.";

struct Armed {
    name: String,
    left: AtomicUsize,
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let text = std::env::var(VARIABLE).ok()?;
            let (name, count) = match text.split_once(':') {
                Some((name, n)) => (name, n.parse().unwrap_or(1)),
                None => (text.as_str(), 1),
            };
            Some(Armed { name: name.to_owned(), left: AtomicUsize::new(count) })
        })
        .as_ref()
}

/// What a shim is to be given of the variable.
pub fn for_shims() -> Option<String> {
    let armed = armed().filter(|armed| armed.name.starts_with(OF_SHIMS))?;
    Some(format!("{}:{}", armed.name, armed.left.load(Ordering::Relaxed)))
}

/// Dies here if this point is armed and its turn has come.
pub fn hit(name: &str) {
    if let Some(armed) = armed()
        && armed.name == name
        && armed.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        // SIGKILL, not exit: no destructor, no flush, exactly what a crash is.
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}
