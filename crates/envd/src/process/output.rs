//! From a process's pipes to everyone who listens: nothing is lost, nothing is stored.
//!
//! Each subscriber has a short queue. The one who reads the pipe waits until every subscriber has taken a piece before it
//! reads the next: a slow subscriber slows the process (its pipe fills), and no queue grows. Who goes away stops counting at
//! once. Without subscribers output is read and dropped, so that a process never hangs for lack of listeners.
//!
//! The starter subscribes before the process exists, so even the first byte finds it. Who comes later hears what comes
//! from then on, and in any case the end.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use tokio::sync::mpsc;
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_event::data_event::Output as Stream, process_event,
};

/// Pieces of output in a subscriber's queue: with pieces of 32 KiB, half a megabyte at most.
const QUEUE: usize = 16;

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
    end: Option<process_event::EndEvent>,
}

/// One who listens. Dropping it ends that.
#[derive(Debug)]
pub struct Subscription {
    queue: mpsc::Receiver<Event>,
}

impl Subscription {
    /// The next event; `None` if the process was lost without an end.
    pub async fn next(&mut self) -> Option<Event> {
        self.queue.recv().await
    }
}

impl Output {
    /// Listens from now on. If the process has ended, its end is all there is.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        let (sender, queue) = mpsc::channel(QUEUE);
        let mut listeners = self.lock();
        if let Some(end) = &listeners.end {
            // The queue is empty, so there is room.
            let _ = sender.try_send(Event::End(end.clone()));
        } else {
            listeners.senders.push(sender);
        }
        Subscription { queue }
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
        self.send(&Event::Data(data)).await;
        self.done.fetch_add(1, Ordering::Relaxed);
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
        self.lock().end = Some(end.clone());
        self.send(&Event::End(end)).await;
        self.lock().senders.clear();
    }

    async fn send(&self, event: &Event) {
        let senders = self.lock().senders.clone();
        let mut gone = false;
        for sender in &senders {
            gone |= sender.send(event.clone()).await.is_err();
        }
        if gone {
            self.lock().senders.retain(|sender| !sender.is_closed());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        // Each change is one step: a panic in between leaves nothing half done.
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn end() -> process_event::EndEvent {
        process_event::EndEvent {
            exit_code: 3,
            exited: true,
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_slow_subscriber_holds_the_process_back_and_loses_nothing() {
        let output = Arc::new(Output::default());
        let mut slow = output.subscribe();
        let writer = {
            let output = output.clone();
            tokio::spawn(async move {
                for number in 0..1000_u32 {
                    output
                        .publish(Kind::Stdout, Bytes::from(number.to_string()))
                        .await;
                }
                output.finish(end()).await;
            })
        };
        tokio::task::yield_now().await;
        assert!(!writer.is_finished(), "it waits for its reader");
        for number in 0..1000_u32 {
            let Some(Event::Data(data)) = slow.next().await else {
                panic!("lost {number}");
            };
            assert_eq!(
                data.output,
                Some(Stream::Stdout(number.to_string().into_bytes()))
            );
        }
        assert!(matches!(slow.next().await, Some(Event::End(_))));
        writer.await.expect("no panic");
    }

    #[tokio::test]
    async fn a_subscriber_that_goes_away_stops_counting() {
        let output = Arc::new(Output::default());
        let gone = output.subscribe();
        let mut stays = output.subscribe();
        let writer = {
            let output = output.clone();
            tokio::spawn(async move {
                for _ in 0..100 {
                    output.publish(Kind::Stderr, Bytes::from_static(b"x")).await;
                }
                output.finish(end()).await;
            })
        };
        tokio::task::yield_now().await;
        drop(gone);
        let mut pieces = 0;
        while let Some(Event::Data(_)) = stays.next().await {
            pieces += 1;
        }
        assert_eq!(pieces, 100);
        writer.await.expect("no panic");
    }

    #[tokio::test]
    async fn who_comes_late_hears_the_end() {
        let output = Output::default();
        output
            .publish(Kind::Stdout, Bytes::from_static(b"nobody hears this"))
            .await;
        output.finish(end()).await;
        let mut late = output.subscribe();
        assert!(matches!(late.next().await, Some(Event::End(end)) if end.exit_code == 3));
    }
}
