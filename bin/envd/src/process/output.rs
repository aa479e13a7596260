//! Distribution of a process's output to its subscribers, with minimal buffering, and without loss
//! that is not marked.
//!
//! Each subscriber has a short queue. The reader of a pipe waits until every subscriber's queue has
//! accepted a chunk before it reads the next one. A slow subscriber therefore slows the process,
//! because the pipe fills up, and no queue grows. A subscriber that disconnects no longer applies
//! back-pressure, and output that was queued for no other subscriber counts as undelivered. The
//! same holds for a subscriber whose queue accepts nothing for the output's patience: it is
//! dropped, and its stream ends with [`Event::TooSlow`].
//!
//! With no subscribers, a process never blocks: the newest [`UNHEARD_BYTES`] of undelivered output
//! are kept and the rest is dropped. [`Event::Lost`] precedes the output after the dropped part.
//!
//! The caller that starts a process subscribes before any output is read, so it gets the first
//! byte. A client that subscribes when there are no subscribers first gets the kept output, so a
//! client that reconnects misses none of the kept output. A client that joins other subscribers
//! gets the output from then on. No output is delivered twice to a subscriber, and all subscribers
//! get the end event.

mod subscription;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::mpsc, time::timeout};
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_event::data_event::Output as Stream,
    process_event::{DataEvent, EndEvent},
};

pub use self::subscription::Subscription;
use self::subscription::{Queue, Subscriber};

/// Maximum number of chunks in a subscriber's queue. Chunks have at most 32 KiB, so a queue holds
/// at most half a megabyte.
const QUEUE: usize = 16;

/// Maximum amount of undelivered output that is kept for the next subscriber, in bytes.
pub const UNHEARD_BYTES: usize = 64 * 1024;

/// Default of the time after which a subscriber that takes nothing is dropped. Long enough for a
/// user who stops the output to read it.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Event for a subscriber.
#[derive(Debug, Clone)]
pub enum Event {
    /// Chunk of output.
    Data(DataEvent),
    /// Number of bytes of output that were dropped. Older output precedes this event, and newer
    /// output follows.
    Lost(u64),
    /// End of the process. All output precedes this event.
    End(EndEvent),
    /// The subscriber took no output for too long. This is the last event for it, although the
    /// process goes on.
    TooSlow,
}

/// Source of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Terminal: standard output and standard error.
    Terminal,
}

/// Output of a process, and its subscribers.
#[derive(Debug)]
pub struct Output {
    listeners: Mutex<Listeners>,
    /// Time after which a subscriber whose queue accepts nothing is dropped.
    patience: Duration,
    begun: AtomicU64,
    done: AtomicU64,
}

/// Progress of the delivery. Two equal values mean that nothing was delivered in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    begun: u64,
    done: u64,
}

impl Activity {
    /// True if the delivery was waiting for a subscriber.
    #[must_use]
    pub fn is_busy(self) -> bool {
        self.begun != self.done
    }
}

#[derive(Debug, Default)]
struct Listeners {
    subscribers: Vec<Subscriber>,
    /// Number of subscriptions that have a queue, including those that remain after the end.
    queues: usize,
    unheard: VecDeque<DataEvent>,
    unheard_bytes: usize,
    /// Number of dropped bytes that precede the kept output.
    lost_bytes: u64,
    end: Option<EndEvent>,
}

impl Listeners {
    /// Keeps a chunk for the next subscriber, and drops the oldest chunks beyond the limit.
    fn keep(&mut self, data: DataEvent) {
        self.unheard_bytes += length(&data);
        self.unheard.push_back(data);
        self.forget_oldest();
    }

    /// Puts events that are older than the kept output back in front of it. If output in between is
    /// lost already, they are dropped, so that only one loss precedes the kept output.
    fn put_back(&mut self, events: Vec<Event>) {
        let is_contiguous = self.lost_bytes == 0;
        for event in events.into_iter().rev() {
            match event {
                Event::Data(data) if is_contiguous => {
                    self.unheard_bytes += length(&data);
                    self.unheard.push_front(data);
                }
                Event::Data(data) => self.lose(&data),
                Event::Lost(bytes) => self.lost_bytes += bytes,
                Event::End(_) | Event::TooSlow => {}
            }
        }
        self.forget_oldest();
    }

    fn lose(&mut self, data: &DataEvent) {
        self.lost_bytes += u64::try_from(length(data)).unwrap_or(u64::MAX);
    }

    fn forget_oldest(&mut self) {
        while self.unheard_bytes > UNHEARD_BYTES {
            let Some(oldest) = self.unheard.pop_front() else {
                break;
            };
            self.unheard_bytes -= length(&oldest);
            self.lose(&oldest);
        }
    }

    /// Returns and forgets the kept output, after the loss that precedes it.
    fn take_unheard(&mut self) -> VecDeque<Event> {
        self.unheard_bytes = 0;
        let lost = std::mem::take(&mut self.lost_bytes);
        let lost = (lost > 0).then_some(Event::Lost(lost));
        let kept = self.unheard.drain(..).map(Event::Data);
        lost.into_iter().chain(kept).collect()
    }
}

fn length(data: &DataEvent) -> usize {
    match &data.output {
        Some(Stream::Stdout(bytes) | Stream::Stderr(bytes) | Stream::Pty(bytes)) => bytes.len(),
        None => 0,
    }
}

/// Returns the event for a chunk of output.
pub(super) fn data_event(kind: Kind, bytes: Vec<u8>) -> DataEvent {
    let output = match kind {
        Kind::Stdout => Stream::Stdout(bytes),
        Kind::Stderr => Stream::Stderr(bytes),
        Kind::Terminal => Stream::Pty(bytes),
    };
    DataEvent {
        output: Some(output),
        ..Default::default()
    }
}

impl Default for Output {
    fn default() -> Self {
        Self::new(PATIENCE)
    }
}

impl Output {
    /// Creates the output of a process. A subscriber that takes nothing for `patience` is dropped.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self {
            listeners: Mutex::default(),
            patience,
            begun: AtomicU64::new(0),
            done: AtomicU64::new(0),
        }
    }

    /// Subscribes to the output: first the kept undelivered output, then, unless the process has
    /// ended, the output from now on.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut listeners = self.lock();
        let mut backlog = listeners.take_unheard();
        let queue = match &listeners.end {
            Some(end) => {
                backlog.push_back(Event::End(end.clone()));
                Queue::ended(backlog)
            }
            None => {
                let (sender, receiver) = mpsc::channel(QUEUE);
                let queue = Queue::open(backlog, receiver);
                listeners.subscribers.push(Subscriber {
                    sender,
                    queue: Arc::clone(&queue),
                });
                listeners.queues += 1;
                queue
            }
        };
        Subscription::new(Arc::clone(self), queue)
    }

    /// Delivers a chunk to all subscribers. Returns when the queues of all of them have accepted
    /// it, or those that have not were dropped.
    pub async fn publish(&self, kind: Kind, piece: Bytes) {
        let data = data_event(kind, piece.to_vec());
        self.begun.fetch_add(1, Ordering::Relaxed);
        while let Some(audience) = self.audience(&data) {
            if self.send(&audience, &data).await {
                break;
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the current subscribers. If there are none, keeps the chunk.
    fn audience(&self, data: &DataEvent) -> Option<Vec<Subscriber>> {
        let mut listeners = self.lock();
        listeners
            .subscribers
            .retain(|subscriber| !subscriber.sender.is_closed());
        if listeners.subscribers.is_empty() {
            listeners.keep(data.clone());
            return None;
        }
        Some(listeners.subscribers.clone())
    }

    /// Delivers a chunk to each subscriber, and drops subscribers that are too slow. Returns true
    /// if at least one subscriber accepted the chunk.
    async fn send(&self, audience: &[Subscriber], data: &DataEvent) -> bool {
        let mut heard = false;
        for subscriber in audience {
            match timeout(self.patience, subscriber.sender.send(data.clone())).await {
                Ok(sent) => heard |= sent.is_ok(),
                Err(_) => self.drop_slow(subscriber),
            }
        }
        heard
    }

    /// Drops a subscriber. Its queue counts as undelivered if there is no other subscriber.
    fn drop_slow(&self, slow: &Subscriber) {
        let mut listeners = self.lock();
        let before = listeners.subscribers.len();
        listeners
            .subscribers
            .retain(|subscriber| !subscriber.sender.same_channel(&slow.sender));
        if listeners.subscribers.len() == before {
            // The subscriber has disconnected, or the reader of the other stream has dropped it.
            return;
        }
        tracing::warn!(patience = ?self.patience, "subscriber took no output, dropping it");
        listeners.queues -= 1;
        let untaken = slow.queue.lock().give_up();
        if listeners.queues == 0 {
            listeners.put_back(untaken);
        }
    }

    /// Returns the progress of the delivery.
    #[must_use]
    pub fn activity(&self) -> Activity {
        Activity {
            begun: self.begun.load(Ordering::Relaxed),
            done: self.done.load(Ordering::Relaxed),
        }
    }

    /// Ends the output. Each subscriber gets the end event after the output in its queue, and later
    /// subscribers get it after the kept output.
    pub fn finish(&self, end: EndEvent) {
        let mut listeners = self.lock();
        listeners.end = Some(end);
        listeners.subscribers.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        // Each change is one step, so a panic in between leaves a consistent state.
        self.listeners.lock()
    }
}

#[cfg(test)]
mod tests;
