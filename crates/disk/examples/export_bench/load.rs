//! Requests to a raw file, and their rates.

use std::{
    fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::Advice;

/// Duration of each measurement with small requests.
const DURATION: Duration = Duration::from_secs(3);
const BLOCK: usize = 4096;
/// Number of readers at the same time.
const READERS: usize = 4;
/// Length of sequential requests.
const LARGE: usize = 1 << 20;
/// Number of blocks that are read twice in a row, and of such rounds.
const CACHED: usize = 1000;
const CACHED_ROUNDS: usize = 20;
/// Number of `fsync` calls that are measured.
const SYNCS: usize = 300;

/// Pseudo-random numbers, the same in every run (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 1).unwrap_or_default() % limit
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
}

/// Measures a raw file. `lower` are the files that its content comes from.
pub(crate) fn run(
    raw: &Path,
    lower: &[PathBuf],
    size_mib: u32,
) -> io::Result<Vec<(&'static str, f64)>> {
    let file = fs::OpenOptions::new().read(true).write(true).open(raw)?;
    let lower: Vec<_> = lower
        .iter()
        .map(fs::File::open)
        .collect::<io::Result<_>>()?;
    let load = Load {
        file,
        lower,
        size: size_mib as usize * LARGE,
    };
    let mut results = vec![("sequential read, cold, MiB/s", load.cold(Load::read_all)?)];
    // The files below are cached now.
    let first = load.first_access(Load::read_all)?;
    results.push(("sequential read, first access, MiB/s", first));
    results.push(("sequential read, second, MiB/s", load.read_all()?));
    results.push((
        "random read 4 KiB, cached, IOPS",
        load.read_cached_blocks()?,
    ));
    let first = load.first_access(Load::read_blocks)?;
    results.push(("random read 4 KiB, first access, IOPS", first));
    let first = load.first_access(Load::read_blocks_at_once)?;
    results.push(("random read 4 KiB, first access, 4 readers, IOPS", first));
    results.push((
        "random read 4 KiB, cold, IOPS",
        load.cold(Load::read_blocks)?,
    ));
    results.push(("random write 4 KiB, first, IOPS", load.write_blocks()?));
    results.push(("random write 4 KiB, second, IOPS", load.write_blocks()?));
    let (median, slow) = load.sync_times()?;
    results.push(("write 4 KiB and fsync, median, ms", median));
    results.push(("write 4 KiB and fsync, 99th percentile, ms", slow));
    results.push(("sequential write, first, MiB/s", load.write_all()?));
    results.push(("sequential write, second, MiB/s", load.write_all()?));
    Ok(results)
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

struct Load {
    file: fs::File,
    lower: Vec<fs::File>,
    size: usize,
}

impl Load {
    fn first_access(&self, measure: fn(&Self) -> io::Result<f64>) -> io::Result<f64> {
        drop_cache(&self.file)?;
        measure(self)
    }

    fn cold(&self, measure: fn(&Self) -> io::Result<f64>) -> io::Result<f64> {
        drop_cache(&self.file)?;
        for file in &self.lower {
            drop_cache(file)?;
        }
        measure(self)
    }

    /// Reads the whole file in order. Returns MiB/s.
    fn read_all(&self) -> io::Result<f64> {
        let mut buffer = vec![0; LARGE];
        let begin = Instant::now();
        for offset in (0..self.size).step_by(LARGE) {
            self.file.read_exact_at(&mut buffer, offset as u64)?;
        }
        Ok(rate(self.size / LARGE, begin))
    }

    /// Writes the whole file in order. Returns MiB/s.
    fn write_all(&self) -> io::Result<f64> {
        let mut buffer = vec![0; LARGE];
        Random::new(5).fill(&mut buffer);
        let begin = Instant::now();
        for offset in (0..self.size).step_by(LARGE) {
            self.file.write_all_at(&buffer, offset as u64)?;
        }
        self.file.sync_all()?;
        Ok(rate(self.size / LARGE, begin))
    }

    /// Returns reads per second of one reader. Each block is read once.
    fn read_blocks(&self) -> io::Result<f64> {
        self.read_each(0, 1)
    }

    /// Returns reads per second of several readers together. Each block is read once.
    fn read_blocks_at_once(&self) -> io::Result<f64> {
        std::thread::scope(|threads| {
            let readers: Vec<_> = (0..READERS)
                .map(|first| threads.spawn(move || self.read_each(first, READERS)))
                .collect();
            let rates = readers.into_iter().map(|reader| {
                let ended = reader.join();
                ended.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
            });
            rates.sum()
        })
    }

    fn read_each(&self, first: usize, step: usize) -> io::Result<f64> {
        let mut block = [0; BLOCK];
        let (begin, mut count) = (Instant::now(), 0);
        for number in (first..self.blocks()).step_by(step) {
            self.file.read_exact_at(&mut block, self.offset(number))?;
            count += 1;
            if begin.elapsed() > DURATION {
                break;
            }
        }
        Ok(rate(count, begin))
    }

    /// Returns reads per second of blocks that were read just before.
    fn read_cached_blocks(&self) -> io::Result<f64> {
        let mut block = [0; BLOCK];
        let (mut count, mut time) = (0, Duration::ZERO);
        for first in 0..CACHED_ROUNDS {
            let some = || first * CACHED..(first + 1) * CACHED;
            for number in some() {
                self.file.read_exact_at(&mut block, self.offset(number))?;
            }
            let begin = Instant::now();
            for number in some() {
                self.file.read_exact_at(&mut block, self.offset(number))?;
            }
            time += begin.elapsed();
            count += CACHED;
        }
        Ok(per_second(count, time))
    }

    /// Returns writes per second. Each call writes to the same blocks, in the same order.
    fn write_blocks(&self) -> io::Result<f64> {
        let block = [5; BLOCK];
        let (begin, mut count) = (Instant::now(), 0);
        for number in 0..self.blocks() {
            self.file.write_all_at(&block, self.offset(number))?;
            count += 1;
            if begin.elapsed() > DURATION {
                break;
            }
        }
        self.file.sync_all()?;
        Ok(rate(count, begin))
    }

    fn blocks(&self) -> usize {
        self.size / BLOCK
    }

    /// Returns the offset of a block in a random order, in which each block occurs once. The number
    /// of blocks is a power of two.
    fn offset(&self, number: usize) -> u64 {
        let mask = self.blocks() - 1;
        let random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask;
        let random = random ^ (random >> 7);
        let block = random.wrapping_mul(0x2545_f491_4f6c_dd1d) & mask;
        (block * BLOCK) as u64
    }

    /// Returns the median and the 99th percentile of a write of a block that is made durable.
    fn sync_times(&self) -> io::Result<(f64, f64)> {
        let mut random = Random::new(13);
        let mut times = Vec::new();
        for _ in 0..SYNCS {
            let offset = random.below(self.size / BLOCK) * BLOCK;
            let begin = Instant::now();
            self.file.write_all_at(&[3; BLOCK], offset as u64)?;
            self.file.sync_all()?;
            times.push(ms(begin.elapsed()));
        }
        times.sort_by(f64::total_cmp);
        Ok((times[SYNCS / 2], times[SYNCS * 99 / 100]))
    }
}

/// Drops the pages of a file from the kernel's cache.
fn drop_cache(file: &fs::File) -> io::Result<()> {
    // Dirty pages are not dropped.
    file.sync_all()?;
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

fn rate(count: usize, begin: Instant) -> f64 {
    per_second(count, begin.elapsed())
}

fn per_second(count: usize, time: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let count = count as f64;
    count / time.as_secs_f64()
}
