//! What a disk with a volatile cache may hold after its power was cut: everything before the last flush, and of what was written
//! since then any part, in any order, sector by sector.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::device::{Content, Entry};

/// What a disk writes whole or not at all. Disks with smaller sectors are gone; XFS does not survive torn directory blocks on them.
const SECTOR: usize = 4096;

/// xorshift64*: small, seeded, the same on every machine.
pub struct Random(pub u64);

impl Random {
    /// One of `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap() % n.max(1)
    }
}

/// What becomes of the writes since the last flush.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// All are lost.
    Lost,
    /// All arrived.
    Kept,
    /// Each is lost or not.
    Dropped,
    /// Each sector of each is lost or not.
    Torn,
    /// The older half is lost, the newer arrived.
    Reordered,
}

/// A cut before the entry `at`.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub at: usize,
    pub fate: Fate,
}

/// `count` cuts at `from` or later, in order: when something was just `promised`, on both sides of flushes, and anywhere between.
pub fn choose(log: &[Entry], from: usize, promised: &[usize], count: usize, random: &mut Random) -> Vec<Cut> {
    fn thin(mut places: Vec<usize>, to: usize, random: &mut Random) -> Vec<usize> {
        while places.len() > to {
            places.swap_remove(random.below(places.len()));
        }
        places
    }
    let fate = |n: usize| [Fate::Lost, Fate::Kept, Fate::Dropped, Fate::Torn, Fate::Reordered][n];
    // Nothing but what was flushed: the least that a promise may rest on.
    let mut cuts: Vec<Cut> =
        thin(promised.iter().copied().filter(|at| *at >= from).collect(), count / 3, random).into_iter().map(|at| Cut { at, fate: Fate::Lost }).collect();
    // Just before a flush is where most is at stake, just after it where most is durable.
    let flushes: Vec<usize> = (from..log.len()).filter(|n| matches!(log[*n], Entry::Flush)).flat_map(|n| [n, n + 1]).collect();
    cuts.extend(thin(flushes, count / 3, random).into_iter().map(|at| Cut { at, fate: fate(random.below(5)) }));
    while cuts.len() < count {
        cuts.push(Cut { at: from + random.below(log.len() + 1 - from), fate: fate(random.below(5)) });
    }
    cuts.sort_unstable_by_key(|c| c.at);
    cuts
}

/// Plays a log up to one cut after the other.
pub struct Replay<'a> {
    log: &'a [Entry],
    size: u64,
    next: usize,
    durable: Content,
    pending: Vec<(u64, &'a [u8])>,
}

impl<'a> Replay<'a> {
    /// Of a disk that held `content` before.
    pub fn new(log: &'a [Entry], size: u64, content: Content) -> Self {
        Self { log, size, next: 0, durable: content, pending: Vec::new() }
    }

    /// Makes the file at `path` what the disk holds after `cut`, which is no earlier than the one before.
    pub fn cut(&mut self, cut: Cut, path: &Path, random: &mut Random) {
        for entry in &self.log[self.next..cut.at] {
            match entry {
                Entry::Write(offset, data) => self.pending.push((*offset, data)),
                Entry::Flush => self.pending.drain(..).for_each(|(offset, data)| self.durable.write(offset, data)),
            }
        }
        self.next = cut.at;
        self.durable.store(path, self.size);
        let file = File::options().write(true).open(path).unwrap();
        let newer = random.below(self.pending.len() + 1);
        for (n, (offset, data)) in self.pending.iter().enumerate() {
            let whole = match cut.fate {
                Fate::Lost => false,
                Fate::Kept => true,
                Fate::Dropped => random.below(2) == 0,
                Fate::Reordered => n >= newer,
                Fate::Torn => {
                    for (i, sector) in data.chunks(SECTOR).enumerate().filter(|_| random.below(2) == 0) {
                        file.write_all_at(sector, offset + (i * SECTOR) as u64).unwrap();
                    }
                    false
                }
            };
            if whole {
                file.write_all_at(data, *offset).unwrap();
            }
        }
    }
}
