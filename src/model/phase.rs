//! Phases of pods and containers, each with the data that exists in it.
//!
//! ```text
//! pod:        Creating ──> Ready ──> NotReady ──> (removed)
//!                 └───────(undo failed)──^
//! container:  Creating ──> Created ──> Running ──> Exited ──> (removed)
//!                              └──(start failed: StartError 128)──^        Unknown: the shim cannot say; only stop and remove
//! ```

use serde::{Deserialize, Serialize};

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Process code, 128+n for signal n, 255 when it is not known.
    pub code: i32,
    /// When, nanoseconds since the epoch.
    pub at: i64,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ShimLost`.
    pub reason: String,
    /// For people; empty when the code says it all.
    pub message: String,
}

impl Exit {
    /// `Completed` for 0, `OOMKilled` when the cgroup counted a kill, else `Error` (cri-behaviour §6).
    pub fn of_process(code: i32, at: i64, oom: bool) -> Self {
        let reason = if oom {
            "OOMKilled"
        } else if code == 0 {
            "Completed"
        } else {
            "Error"
        };
        Self { code, at, reason: reason.to_owned(), message: String::new() }
    }

    /// The process was never started.
    pub fn start_error(at: i64, message: String) -> Self {
        Self { code: 128, at, reason: "StartError".to_owned(), message }
    }

    /// The shim is gone and with it the real code.
    pub fn lost(at: i64, message: String) -> Self {
        Self { code: 255, at, reason: "ShimLost".to_owned(), message }
    }
}

/// Phase of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase")]
pub enum ContainerPhase {
    /// Recorded, resources being acquired; not listed.
    Creating,
    /// Everything is in place, the process is not started.
    Created {
        /// Blocked first process.
        pid: u32,
    },
    /// Running.
    Running {
        /// First process in the host's process namespace.
        pid: u32,
        /// Nanoseconds since the epoch.
        started_at: i64,
    },
    /// Ended; never runs again.
    Exited {
        /// Nanoseconds since the epoch; 0 when it never started.
        started_at: i64,
        /// How it ended.
        exit: Exit,
    },
    /// Nobody can say; only stop and remove are possible.
    Unknown {
        /// Nanoseconds since the epoch; 0 when it never started.
        started_at: i64,
    },
}

/// Phase of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodPhase {
    /// Recorded, resources being acquired; not listed.
    Creating,
    /// Its namespaces live.
    Ready,
    /// Stopped or lost; never ready again.
    NotReady,
}
