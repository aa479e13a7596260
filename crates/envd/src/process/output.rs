//! From a process's pipes to everyone who listens: nothing is lost, next to nothing is stored.
//!
//! Each subscriber has a short queue. The one who reads the pipe waits until every subscriber has taken a piece before it
//! reads the next: a slow subscriber slows the process (its pipe fills), and no queue grows. Who goes away stops counting at
//! once, and what was for nobody else counts as unheard. Without subscribers a process never hangs: the newest [`UNHEARD_BYTES`] that nobody heard are kept, the rest is
//! dropped.
//!
//! The starter subscribes before the process exists, so even the first byte finds it. Who comes when nobody listened
//! first hears what is kept, so that a client that lost its connection misses nothing it did not see; who joins others
//! hears what comes from then on. Nobody is told anything twice, and everyone hears the end.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::mpsc;
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_event::data_event::Output as Stream, process_event,
};

/// Pieces of output in a subscriber's queue: with pieces of 32 KiB, half a megabyte at most.
const QUEUE: usize = 16;

/// Output that nobody heard and that is kept for the next subscriber, bytes at most.
pub const UNHEARD_BYTES: usize = 64 * 1024;

/// What a subscriber hears.
#[derive(Debug, Clone)]
pub enum Event {
    /// A piece of output.
    Data(process_event::DataEvent),
    /// The process has ended, and all its output came before.
    End(process_event::EndEvent),
}

/// Which stream a piece is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A terminal: both.
    Terminal,
}

/// A process's output and its listeners.
#[derive(Debug, Default)]
pub struct Output {
    listeners: Mutex<Listeners>,
    begun: AtomicU64,
    done: AtomicU64,
}

/// How much was handed out so far: two equal values mean that nothing happened in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    begun: u64,
    done: u64,
}

impl Activity {
    /// Whether a listener was being waited for.
    #[must_use]
    pub fn is_busy(self) -> bool {
        self.begun != self.done
    }
}

#[derive(Debug, Default)]
struct Listeners {
    senders: Vec<mpsc::Sender<Event>>,
    /// Subscriptions that have a queue, also after the end.
    queues: usize,
    unheard: VecDeque<process_event::DataEvent>,
    unheard_bytes: usize,
    end: Option<process_event::EndEvent>,
}

impl Listeners {
    /// Keeps a piece for who comes next, and forgets the oldest beyond the limit.
    fn keep(&mut self, data: process_event::DataEvent) {
        self.unheard_bytes += length(&data);
        self.unheard.push_back(data);
        self.forget_oldest();
    }

    /// Keeps what was taken out before, or came before, all that is kept.
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

/// One who listens. Dropping it ends that.
#[derive(Debug)]
pub struct Subscription {
    output: Arc<Output>,
    /// What was there before the queue.
    backlog: VecDeque<Event>,
    /// None if it came after the end.
    queue: Option<mpsc::Receiver<Event>>,
}

impl Subscription {
    /// The next event; `None` if the process was lost without an end. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        match self.backlog.pop_front() {
            Some(event) => Some(event),
            None => self.queue.as_mut()?.recv().await,
        }
    }
}

impl Drop for Subscription {
    /// Its client may come again: what it did not take is kept, unless others hear it.
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
    /// Listens: to what nobody heard, if nobody listens, and to what comes from now on, if the process has not ended.
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

    /// Hands a piece to everyone; returns when all have room for the next.
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

    /// Who listens. If nobody does, the piece is kept.
    fn audience(&self, data: &process_event::DataEvent) -> Option<Vec<mpsc::Sender<Event>>> {
        let mut listeners = self.lock();
        listeners.senders.retain(|sender| !sender.is_closed());
        if listeners.senders.is_empty() {
            listeners.keep(data.clone());
            return None;
        }
        Some(listeners.senders.clone())
    }

    /// What was handed out so far.
    #[must_use]
    pub fn activity(&self) -> Activity {
        Activity {
            begun: self.begun.load(Ordering::Relaxed),
            done: self.done.load(Ordering::Relaxed),
        }
    }

    /// Tells everyone that it is over. Later subscribers are told at once.
    pub async fn finish(&self, end: process_event::EndEvent) {
        let senders = {
            let mut listeners = self.lock();
            listeners.end = Some(end.clone());
            std::mem::take(&mut listeners.senders)
        };
        send(&senders, &Event::End(end)).await;
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        // Each change is one step: a panic in between leaves nothing half done.
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hands an event to each; true if one of them took it.
async fn send(senders: &[mpsc::Sender<Event>], event: &Event) -> bool {
    let mut heard = false;
    for sender in senders {
        heard |= sender.send(event.clone()).await.is_ok();
    }
    heard
}

#[cfg(test)]
mod tests;
