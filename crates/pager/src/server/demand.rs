//! Resolves page faults, in the order of their arrival.

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
};
use wrenn_sys::{
    mapping::PageBuffer,
    pinned::PinnedWriter,
    uffd::{Event, MAX_BATCH, UffdError},
};

use super::{
    Backing,
    core::{Core, ServeError, fill, has_page},
};
use crate::{PAGE_BYTES, region::Region};

/// Size of the aligned window around a fault in which zeros are installed: the range covered by one
/// page table.
const ZERO_WINDOW_BYTES: u64 = 2 * 1024 * 1024;
/// Maximum number of extents examined before a fault, and of existing pages skipped.
const MAX_STEPS: usize = 32;
/// Delay before a postponed request is retried, if no event arrives earlier.
const RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Returns the body of the thread, with everything allocated.
pub(super) fn prepare(core: Arc<Core>) -> io::Result<impl FnOnce() + Send + 'static> {
    let mut demand = Demand {
        page: PageBuffer::new(1)?,
        writer: PinnedWriter::new(1)?,
        events: Vec::with_capacity(MAX_BATCH),
        waiting: Vec::with_capacity(MAX_BATCH),
        core: Arc::clone(&core),
    };
    Ok(move || core.run(|| demand.serve()))
}

struct Demand {
    core: Arc<Core>,
    page: PageBuffer,
    writer: PinnedWriter,
    events: Vec<Event>,
    /// Addresses of unresolved faults.
    waiting: Vec<u64>,
}

/// Result of one fault.
#[derive(PartialEq)]
enum Answer {
    Done,
    /// The address space is changing: an event must be read first.
    Later,
}

impl Demand {
    fn serve(&mut self) -> Result<(), ServeError> {
        while self.wait()? {
            let begun = Instant::now();
            self.core.gate.close();
            let result = self.batch();
            self.core.gate.open();
            self.core.progress.add_fault_time(begun.elapsed());
            result?;
        }
        Ok(())
    }

    /// Waits for events. Returns false when the server must stop.
    fn wait(&self) -> Result<bool, ServeError> {
        let mut fds = [
            PollFd::new(&self.core.stop, PollFlags::IN),
            PollFd::new(&self.core.uffd, PollFlags::IN),
        ];
        let timeout = (!self.waiting.is_empty()).then_some(&RETRY);
        match rustix::event::poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(ServeError::Poll(error.into())),
        }
        let [stop, faults] = fds.map(|fd| fd.revents());
        if faults.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(ServeError::Closed);
        }
        Ok(stop.is_empty() && !self.core.is_stopping())
    }

    fn batch(&mut self) -> Result<(), ServeError> {
        self.read_events()?;
        let waiting = std::mem::take(&mut self.waiting);
        for address in waiting {
            if self.answer(address)? == Answer::Later {
                self.waiting.push(address);
            }
        }
        Ok(())
    }

    /// Reads the available events. Discarded ranges take effect before the faults of the same
    /// batch: a thread that waits for such a page gets zeros.
    fn read_events(&mut self) -> Result<(), ServeError> {
        let mut removed = self.core.removed();
        self.events.clear();
        self.core.uffd.read_events(&mut self.events)?;
        for event in &self.events {
            match *event {
                Event::Fault {
                    address,
                    missing: true,
                } => {
                    let address = address / PAGE_BYTES * PAGE_BYTES;
                    let region = self.core.regions.at_address(address);
                    let region = region.ok_or(ServeError::Nowhere(address))?;
                    self.core.progress.fault(offset_in(region, address));
                    self.waiting.push(address);
                }
                Event::Fault { address, .. } => return Err(ServeError::NotMissing(address)),
                Event::Remove { start, end } => {
                    for (offset, len) in self.core.regions.parts(start, end) {
                        removed.insert(offset, len);
                        let pages = &self.core.progress.pages_removed;
                        pages.fetch_add(len / PAGE_BYTES, Relaxed);
                    }
                }
                _ => return Err(ServeError::UnknownEvent),
            }
        }
        Ok(())
    }

    fn answer(&mut self, address: u64) -> Result<Answer, ServeError> {
        let region = self.core.regions.at_address(address);
        let region = *region.ok_or(ServeError::Nowhere(address))?;
        let offset = offset_in(&region, address);
        if let Some(zeros) = self.zeros_around(&region, offset)? {
            return self.answer_zero(&region, offset, zeros);
        }
        let progress = &self.core.progress;
        let result = match &self.core.backing {
            Backing::Shared(memfd) => {
                if has_page(memfd, offset)? {
                    progress.present_faults.fetch_add(1, Relaxed);
                } else {
                    self.core.read(offset, &mut self.page)?;
                    fill(&mut self.writer, memfd, offset, &self.page)?;
                    progress.pages_loaded.fetch_add(1, Relaxed);
                }
                self.core.uffd.wake(address, PAGE_BYTES)
            }
            Backing::Private => {
                self.core.read(offset, &mut self.page)?;
                self.core.uffd.copy(address, &self.page).inspect(|()| {
                    progress.pages_loaded.fetch_add(1, Relaxed);
                })
            }
        };
        self.settle(address, result)
    }

    /// Interprets the result of an attempt to install the page at `address`.
    fn settle(&self, address: u64, result: Result<(), UffdError>) -> Result<Answer, ServeError> {
        match result {
            Ok(()) => Ok(Answer::Done),
            Err(UffdError::Again { .. }) => {
                self.core.progress.retries.fetch_add(1, Relaxed);
                Ok(Answer::Later)
            }
            Err(UffdError::Exists) => {
                self.core.progress.present_faults.fetch_add(1, Relaxed);
                self.core.uffd.wake(address, PAGE_BYTES)?;
                Ok(Answer::Done)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the range around `offset` that is all zeros, as (start, end), or `None` if the page
    /// is data.
    fn zeros_around(&self, region: &Region, offset: u64) -> Result<Option<(u64, u64)>, ServeError> {
        let window = offset / ZERO_WINDOW_BYTES * ZERO_WINDOW_BYTES;
        let first = window.max(region.offset);
        let last = window
            .saturating_add(ZERO_WINDOW_BYTES)
            .min(region.offset + region.len);
        let mut end = offset;
        while end < last {
            let (zero, len) = self.kind_at(end, last - end)?;
            if !zero {
                break;
            }
            end += len;
        }
        if end == offset {
            return Ok(None);
        }
        let mut start = first;
        let mut position = first;
        for _ in 0..MAX_STEPS {
            if position >= offset {
                return Ok(Some((start, end)));
            }
            let (zero, len) = self.kind_at(position, offset - position)?;
            position += len;
            if !zero {
                start = position;
            }
        }
        Ok(Some((offset, end)))
    }

    /// Returns true if zeros begin at `offset`, and the length of that range, at most `limit`
    /// bytes.
    fn kind_at(&self, offset: u64, limit: u64) -> Result<(bool, u64), ServeError> {
        let removed = self.core.removed();
        let given_back = removed.run(offset, limit, true);
        if given_back > 0 {
            return Ok((true, given_back));
        }
        let extent = self.core.extent(offset)?;
        let limit = limit.min(extent.len);
        if extent.zero {
            return Ok((true, limit));
        }
        Ok((false, removed.run(offset, limit, false)))
    }

    fn answer_zero(
        &self,
        region: &Region,
        offset: u64,
        (start, end): (u64, u64),
    ) -> Result<Answer, ServeError> {
        let address = address_of(region, offset);
        self.core.progress.zero_faults.fetch_add(1, Relaxed);
        let mut zeroed = 0;
        // The requested page and the zeros after it come first. The zeros before it are optional.
        let mut result = self.core.uffd.zero(address, end - offset);
        if result.is_ok() {
            zeroed += end - offset;
        } else if let Err(UffdError::Again { done }) = result
            && done > 0
        {
            zeroed += done + self.zero_missing(address + done, end - offset - done)?;
            result = Ok(());
        }
        let answer = self.settle(address, result)?;
        if answer == Answer::Done {
            zeroed += self.zero_missing(address_of(region, start), offset - start)?;
        }
        let pages = &self.core.progress.pages_zeroed;
        pages.fetch_add(zeroed / PAGE_BYTES, Relaxed);
        Ok(answer)
    }

    /// Fills missing pages with zeros as far as possible within `MAX_STEPS` requests. Returns the
    /// number of bytes filled.
    fn zero_missing(&self, address: u64, len: u64) -> Result<u64, ServeError> {
        let mut at = 0;
        let mut zeroed = 0;
        for _ in 0..MAX_STEPS {
            if at >= len {
                break;
            }
            match self.core.uffd.zero(address + at, len - at) {
                Ok(()) => return Ok(zeroed + len - at),
                Err(UffdError::Exists) => at += PAGE_BYTES,
                Err(UffdError::Again { done: 0 }) => break,
                Err(UffdError::Again { done }) => {
                    zeroed += done;
                    at += done;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(zeroed)
    }
}

/// Returns the offset of an address within the region.
fn offset_in(region: &Region, address: u64) -> u64 {
    region.offset + (address - region.address)
}

/// Returns the address of an offset within the region.
fn address_of(region: &Region, offset: u64) -> u64 {
    region.address + (offset - region.offset)
}
