//! Subscriptions to a process's output, and their queues.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, ready},
};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use wrenn_proto::rpc::process::process_event::DataEvent;

use super::{Event, Output};

/// Subscription, as seen by the readers of the output.
#[derive(Debug, Clone)]
pub(super) struct Subscriber {
    pub(super) sender: mpsc::Sender<DataEvent>,
    pub(super) queue: Arc<Mutex<Queue>>,
}

/// Events that a subscriber has not taken. Shared, because the readers of the output take back the
/// queue of a subscriber that is too slow.
#[derive(Debug)]
pub(super) struct Queue {
    /// Events that precede those of the channel.
    backlog: VecDeque<Event>,
    /// `None` if the subscription began after the end, or after its last event.
    channel: Option<mpsc::Receiver<DataEvent>>,
}

impl Queue {
    /// Creates the queue of a subscription that began before the end.
    pub(super) fn open(
        backlog: VecDeque<Event>,
        channel: mpsc::Receiver<DataEvent>,
    ) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            backlog,
            channel: Some(channel),
        }))
    }

    /// Creates the queue of a subscription that began after the end.
    pub(super) fn ended(backlog: VecDeque<Event>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            backlog,
            channel: None,
        }))
    }

    /// Returns and forgets all events.
    fn take_all(&mut self) -> Vec<Event> {
        let mut events: Vec<_> = self.backlog.drain(..).collect();
        if let Some(mut channel) = self.channel.take() {
            channel.close();
            events.extend(std::iter::from_fn(|| channel.try_recv().ok()).map(Event::Data));
        }
        events
    }

    /// Ends the queue of a subscriber that is too slow. Returns the events that it has not taken.
    pub(super) fn give_up(&mut self) -> Vec<Event> {
        let untaken = self.take_all();
        self.backlog.push_back(Event::TooSlow);
        untaken
    }
}

/// Subscription to a process's output. Ends when it is dropped.
#[derive(Debug)]
pub struct Subscription {
    output: Arc<Output>,
    queue: Arc<Mutex<Queue>>,
}

impl Subscription {
    pub(super) fn new(output: Arc<Output>, queue: Arc<Mutex<Queue>>) -> Self {
        Self { output, queue }
    }

    /// Returns the next event, or `None` after [`Event::End`] or [`Event::TooSlow`]. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut queue = self.queue.lock();
        if let Some(event) = queue.backlog.pop_front() {
            return Poll::Ready(Some(event));
        }
        let Some(channel) = &mut queue.channel else {
            return Poll::Ready(None);
        };
        let data = ready!(channel.poll_recv(context));
        if data.is_none() {
            queue.channel = None;
        }
        // The other lock is never taken while this one is held.
        drop(queue);
        let event = data.map(Event::Data).or_else(|| {
            let mut listeners = self.output.lock();
            listeners.queues -= 1;
            listeners.end.clone().map(Event::End)
        });
        Poll::Ready(event)
    }
}

impl Drop for Subscription {
    /// Keeps the events that the client did not take, because the client may reconnect. Queued
    /// events that other subscribers get as well are not kept.
    fn drop(&mut self) {
        let mut listeners = self.output.lock();
        let mut queue = self.queue.lock();
        let has_queue = queue.channel.is_some();
        let mut untaken: Vec<_> = queue.backlog.drain(..).collect();
        if has_queue {
            listeners.queues -= 1;
            let queued = queue.take_all();
            if listeners.queues == 0 {
                untaken.extend(queued);
            }
        }
        listeners.put_back(untaken);
    }
}
