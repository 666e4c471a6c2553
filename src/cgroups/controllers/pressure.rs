//! Pressure (PSI): how long tasks waited for CPU, memory and IO. v2 only, also the v2 hierarchy of a hybrid host; absent when
//! the kernel was built or started without it.

use crate::cgroups::file::{Group, Reader};
use crate::model::stats::{CgroupStats, Pressure, PressureLine};

pub(super) fn stats(group: &Group, reader: &mut Reader, stats: &mut CgroupStats) {
    let mut read = |file| reader.read(group, file).ok().flatten().and_then(parse);
    stats.cpu_pressure = read("cpu.pressure");
    stats.memory_pressure = read("memory.pressure");
    stats.io_pressure = read("io.pressure");
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and the same with `full` (missing for CPU before 5.13: zeros).
fn parse(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    let mut seen = false;
    for line in text.lines() {
        let (what, values) = line.split_once(' ')?;
        let slot = match what {
            "some" => &mut pressure.some,
            "full" => &mut pressure.full,
            _ => continue,
        };
        *slot = parse_line(values)?;
        seen = true;
    }
    seen.then_some(pressure)
}

fn parse_line(values: &str) -> Option<PressureLine> {
    let mut line = PressureLine::default();
    for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
        match key {
            "avg10" => line.avg10 = value.parse().ok()?,
            "avg60" => line.avg60 = value.parse().ok()?,
            "avg300" => line.avg300 = value.parse().ok()?,
            "total" => line.total = value.parse::<u64>().ok()?.saturating_mul(1000),
            _ => {}
        }
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micros_become_nanos() {
        let p = parse("some avg10=1.50 avg60=0.10 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2\n").unwrap();
        assert_eq!((p.some.avg10, p.some.total, p.full.total), (1.5, 7000, 2000));
        assert_eq!(parse("some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n").unwrap().full, PressureLine::default());
        assert!(parse("").is_none());
        assert!(parse("some avg10=x").is_none());
    }
}
