//! Names on which the daemon's launcher and our shim agree beyond containerd's shim protocol.

/// Private ttrpc service of our shim.
pub const EXTRA_SERVICE: &str = "mesocri.shim.v1.Extra";
/// Its method that starts a new log file: `StateRequest { id }` to `Empty`.
pub const REOPEN_LOG: &str = "ReopenLog";
/// Environment variable of the `start` verb: path of the socket to listen on.
pub const SOCKET_VARIABLE: &str = "MESOCRI_SHIM_SOCKET";
/// Task service names a shim may answer to; the messages are the same.
pub const TASK_V2: &str = "containerd.task.v2.Task";
/// See [`TASK_V2`].
pub const TASK_V3: &str = "containerd.task.v3.Task";
/// Sandbox service name.
pub const SANDBOX_SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
