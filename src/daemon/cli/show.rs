//! What `mesocri run` shows beside the container's own output: one line per change, with the time since the start.

use std::time::Instant;

use crate::wire::operator::{Layer, pull_progress::Event};

/// A layer's progress is shown again when it grew by this part of its size.
const STEP: u64 = 4;

/// Prints to standard error, so that standard output is the container's alone.
pub struct Show {
    start: Instant,
    quiet: bool,
    layers: Vec<(Layer, u64)>,
}

impl Show {
    /// Starts the clock.
    pub fn new(quiet: bool) -> Self {
        Self { start: Instant::now(), quiet, layers: Vec::new() }
    }

    /// One line.
    pub fn line(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            eprintln!("{:>9.1} ms  {text}", self.start.elapsed().as_secs_f64() * 1e3);
        }
    }

    /// One step of a pull.
    pub fn pull(&mut self, event: Event) {
        match event {
            Event::Resolved(resolved) => {
                let total: u64 = resolved.layers.iter().map(|l| l.size).sum();
                self.line(format_args!("manifest: {} layers, {}", resolved.layers.len(), bytes(total)));
                self.layers = resolved.layers.into_iter().map(|l| (l, 0)).collect();
            }
            Event::Exists(layer) => self.layer(layer, "is in the store already"),
            Event::Downloaded(step) => {
                let Some((layer, shown)) = self.layers.get_mut(step.layer as usize) else { return };
                if step.bytes < layer.size && step.bytes < *shown + layer.size / STEP {
                    return;
                }
                *shown = step.bytes;
                let text = format!("{} of {}", bytes(step.bytes), bytes(layer.size));
                self.layer(step.layer, &text);
            }
            Event::Unpacked(layer) => self.layer(layer, "unpacked and verified"),
            Event::ImageId(id) => self.line(format_args!("image {}", short(&id))),
        }
    }

    fn layer(&self, index: u32, text: &str) {
        if let Some((layer, _)) = self.layers.get(index as usize) {
            self.line(format_args!("layer {}/{} {}: {text}", index + 1, self.layers.len(), short(&layer.digest)));
        }
    }
}

/// The first 12 digits of a digest or id.
pub fn short(id: &str) -> &str {
    let hex = id.rsplit(':').next().unwrap_or(id);
    hex.get(..12).unwrap_or(hex)
}

/// A number of bytes for people.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["B", "kB", "MB", "GB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_for_people() {
        assert_eq!(super::bytes(0), "0 B");
        assert_eq!(super::bytes(999), "999 B");
        assert_eq!(super::bytes(1_234_567), "1.2 MB");
        assert_eq!(super::short("sha256:0123456789abcdef"), "0123456789ab");
    }
}
