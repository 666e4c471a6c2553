//! Samples of use. All counters are cumulative; `None` means "this host cannot say".

use super::image::FsUsage;

/// Pressure of one resource (PSI), one line of a `*.pressure` file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PressureLine {
    /// Percent over 10 s.
    pub avg10: f64,
    /// Percent over 60 s.
    pub avg60: f64,
    /// Percent over 300 s.
    pub avg300: f64,
    /// Stalled time, **nanoseconds** (the kernel prints microseconds).
    pub total: u64,
}

/// `some` and `full` lines.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// At least one task stalled.
    pub some: PressureLine,
    /// All tasks stalled.
    pub full: PressureLine,
}

/// Use of one cgroup at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CgroupStats {
    /// When, nanoseconds since the epoch.
    pub at: i64,
    /// CPU time, nanoseconds.
    pub cpu_usage: Option<u64>,
    /// CPU time in user mode, nanoseconds.
    pub cpu_user: Option<u64>,
    /// CPU time in kernel mode, nanoseconds.
    pub cpu_system: Option<u64>,
    /// CFS periods: elapsed, throttled, throttled nanoseconds.
    pub cpu_throttling: Option<(u64, u64, u64)>,
    /// Bytes charged.
    pub memory_usage: Option<u64>,
    /// Bytes limit; `None` when unlimited.
    pub memory_limit: Option<u64>,
    /// Highest bytes charged.
    pub memory_peak: Option<u64>,
    /// Usage minus inactive file pages, not below 0.
    pub memory_working_set: Option<u64>,
    /// Anonymous bytes.
    pub memory_rss: Option<u64>,
    /// File cache bytes.
    pub memory_cache: Option<u64>,
    /// Mapped file bytes.
    pub memory_mapped_file: Option<u64>,
    /// Kernel bytes.
    pub memory_kernel: Option<u64>,
    /// Page faults.
    pub page_faults: Option<u64>,
    /// Major page faults.
    pub major_page_faults: Option<u64>,
    /// Times the limit was hit.
    pub memory_failcnt: Option<u64>,
    /// Swapped bytes.
    pub swap_usage: Option<u64>,
    /// Swap limit minus use; `None` when unlimited or not accounted.
    pub swap_available: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Processes and threads allowed; `None` when unlimited.
    pub pids_limit: Option<u64>,
    /// CPU pressure.
    pub cpu_pressure: Option<Pressure>,
    /// Memory pressure.
    pub memory_pressure: Option<Pressure>,
    /// IO pressure.
    pub io_pressure: Option<Pressure>,
}

/// Counters of one network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// Name inside the pod.
    pub name: String,
    /// Received bytes.
    pub rx_bytes: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Received packets.
    pub rx_packets: u64,
    /// Dropped on receive.
    pub rx_dropped: u64,
    /// Sent bytes.
    pub tx_bytes: u64,
    /// Send errors.
    pub tx_errors: u64,
    /// Sent packets.
    pub tx_packets: u64,
    /// Dropped on send.
    pub tx_dropped: u64,
}

/// Use of a container.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerStats {
    /// Its cgroup; `None` when it does not run.
    pub cgroup: Option<CgroupStats>,
    /// Bytes and inodes of its writable layer, and when they were counted.
    pub writable: Option<(FsUsage, i64)>,
}
