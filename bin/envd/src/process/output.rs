//! Distribution of a process's output to its subscribers, without loss and with minimal buffering.
//!
//! Each subscriber has a short queue. The reader of a pipe waits until every subscriber's queue has
//! accepted a chunk before it reads the next one. A slow subscriber therefore slows the process,
//! because the pipe fills up, and no queue grows. A subscriber that disconnects no longer applies
//! back-pressure, and output that was queued for no other subscriber counts as undelivered. With no
//! subscribers, a process never blocks: the newest [`UNHEARD_BYTES`] of undelivered output are kept
//! and the rest is dropped.
//!
//! The caller that starts a process subscribes before any output is read, so it gets the first
//! byte. A client that subscribes when there are no subscribers first gets the kept output, so a
//! client that reconnects misses none of the kept output. A client that joins other subscribers
//! gets the output from then on. No output is delivered twice to a subscriber, and all subscribers
//! get the end event.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_event::data_event::Output as Stream, process_event,
};

/// Maximum number of chunks in a subscriber's queue. Chunks have at most 32 KiB, so a queue holds
/// at most half a megabyte.
const QUEUE: usize = 16;

/// Maximum amount of undelivered output that is kept for the next subscriber, in bytes.
pub const UNHEARD_BYTES: usize = 64 * 1024;

/// Event for a subscriber.
#[derive(Debug, Clone)]
pub enum Event {
    /// Chunk of output.
    Data(process_event::DataEvent),
    /// End of the process. All output precedes this event.
    End(process_event::EndEvent),
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
#[derive(Debug, Default)]
pub struct Output {
    listeners: Mutex<Listeners>,
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
    senders: Vec<mpsc::Sender<Event>>,
    /// Number of subscriptions that have a queue, including those that remain after the end.
    queues: usize,
    unheard: VecDeque<process_event::DataEvent>,
    unheard_bytes: usize,
    end: Option<process_event::EndEvent>,
}

impl Listeners {
    /// Keeps a chunk for the next subscriber, and drops the oldest chunks beyond the limit.
    fn keep(&mut self, data: process_event::DataEvent) {
        self.unheard_bytes += length(&data);
        self.unheard.push_back(data);
        self.forget_oldest();
    }

    /// Puts chunks that are older than the kept chunks back in front of them.
    fn put_back(&mut self, pieces: Vec<process_event::DataEvent>) {
        for data in pieces.into_iter().rev() {
            self.unheard_bytes += length(&data);
            self.unheard.push_front(data);
        }
        self.forget_oldest();
    }

    fn forget_oldest(&mut self) {
        while self.unheard_bytes > UNHEARD_BYTES {
            let Some(oldest) = self.unheard.pop_front() else {
                break;
            };
            self.unheard_bytes -= length(&oldest);
        }
    }
}

fn length(data: &process_event::DataEvent) -> usize {
    match &data.output {
        Some(Stream::Stdout(bytes) | Stream::Stderr(bytes) | Stream::Pty(bytes)) => bytes.len(),
        None => 0,
    }
}

/// Subscription to a process's output. Ends when it is dropped.
#[derive(Debug)]
pub struct Subscription {
    output: Arc<Output>,
    /// Events that precede the queue.
    backlog: VecDeque<Event>,
    /// `None` if the subscription began after the end.
    queue: Option<mpsc::Receiver<Event>>,
}

impl Subscription {
    /// Returns the next event, or `None` if the output ended without an end event. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        match self.backlog.pop_front() {
            Some(event) => Some(event),
            None => self.queue.as_mut()?.recv().await,
        }
    }
}

impl Drop for Subscription {
    /// Keeps the events that the client did not take, because the client may reconnect. Queued
    /// events that other subscribers get as well are not kept.
    fn drop(&mut self) {
        let mut listeners = self.output.lock();
        let mut untaken: Vec<_> = self.backlog.drain(..).collect();
        if let Some(queue) = &mut self.queue {
            queue.close();
            listeners.queues -= 1;
            if listeners.queues == 0 {
                untaken.extend(std::iter::from_fn(|| queue.try_recv().ok()));
            }
        }
        let data = |event| match event {
            Event::Data(data) => Some(data),
            Event::End(_) => None,
        };
        listeners.put_back(untaken.into_iter().filter_map(data).collect());
    }
}

impl Output {
    /// Subscribes to the output: first the kept undelivered output, then, unless the process has
    /// ended, the output from now on.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut listeners = self.lock();
        listeners.unheard_bytes = 0;
        let mut backlog: VecDeque<_> = listeners.unheard.drain(..).map(Event::Data).collect();
        let queue = match &listeners.end {
            Some(end) => {
                backlog.push_back(Event::End(end.clone()));
                None
            }
            None => {
                let (sender, queue) = mpsc::channel(QUEUE);
                listeners.senders.push(sender);
                listeners.queues += 1;
                Some(queue)
            }
        };
        Subscription {
            output: self.clone(),
            backlog,
            queue,
        }
    }

    /// Delivers a chunk to all subscribers. Returns when the queues of all of them have accepted
    /// it.
    pub async fn publish(&self, kind: Kind, piece: Bytes) {
        let piece = piece.to_vec();
        let output = match kind {
            Kind::Stdout => Stream::Stdout(piece),
            Kind::Stderr => Stream::Stderr(piece),
            Kind::Terminal => Stream::Pty(piece),
        };
        let data = process_event::DataEvent {
            output: Some(output),
            ..Default::default()
        };
        self.begun.fetch_add(1, Ordering::Relaxed);
        while let Some(senders) = self.audience(&data) {
            if send(&senders, &Event::Data(data.clone())).await {
                break;
            }
        }
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the current subscribers. If there are none, keeps the chunk.
    fn audience(&self, data: &process_event::DataEvent) -> Option<Vec<mpsc::Sender<Event>>> {
        let mut listeners = self.lock();
        listeners.senders.retain(|sender| !sender.is_closed());
        if listeners.senders.is_empty() {
            listeners.keep(data.clone());
            return None;
        }
        Some(listeners.senders.clone())
    }

    /// Returns the progress of the delivery.
    #[must_use]
    pub fn activity(&self) -> Activity {
        Activity {
            begun: self.begun.load(Ordering::Relaxed),
            done: self.done.load(Ordering::Relaxed),
        }
    }

    /// Delivers the end event to all subscribers. Later subscribers get it immediately.
    pub async fn finish(&self, end: process_event::EndEvent) {
        let senders = {
            let mut listeners = self.lock();
            listeners.end = Some(end.clone());
            std::mem::take(&mut listeners.senders)
        };
        send(&senders, &Event::End(end)).await;
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        // Each change is one step, so a panic in between leaves a consistent state.
        self.listeners.lock()
    }
}

/// Delivers an event to each subscriber. Returns true if at least one of them accepted it.
async fn send(senders: &[mpsc::Sender<Event>], event: &Event) -> bool {
    let mut heard = false;
    for sender in senders {
        heard |= sender.send(event.clone()).await.is_ok();
    }
    heard
}

#[cfg(test)]
mod tests;
