//! Service that runs in this process next to others: started, monitored, and stopped within a
//! deadline.

use std::{future::Future, net::SocketAddr, time::Duration};

use anyhow::{Context, anyhow};
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// Time within which a service must listen. This includes opening the database and reading the
/// directories of all sandboxes.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Running service. Dropping it aborts it; [`Service::stop`] lets it finish its current work.
#[derive(Debug)]
pub(crate) struct Service {
    name: &'static str,
    /// Address on which the service listens.
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Service {
    /// Starts a service and waits until it listens. `serve` receives a sender for its address and
    /// the token that stops it.
    pub(crate) async fn start<F>(
        name: &'static str,
        serve: impl FnOnce(oneshot::Sender<SocketAddr>, CancellationToken) -> F,
    ) -> anyhow::Result<Self>
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let (ready, listening) = oneshot::channel();
        let mut task = tokio::spawn(serve(ready, stop.clone()));
        let address = tokio::select! {
            // If the sender is dropped, the task has ended too, and its result contains the reason.
            Ok(address) = listening => address,
            ended = &mut task => return Err(early(name, flatten(ended))),
            () = tokio::time::sleep(START_TIMEOUT) => {
                task.abort();
                return Err(anyhow!("the {name} did not start within {} s", START_TIMEOUT.as_secs()));
            }
        };
        Ok(Self {
            name,
            address,
            stop,
            task,
        })
    }

    /// Waits for an unexpected end and returns its cause. Cancel-safe.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        early(self.name, flatten((&mut self.task).await))
    }

    /// Stops the service and waits for its end.
    pub(crate) async fn stop(mut self, within: Duration) -> anyhow::Result<()> {
        self.stop.cancel();
        match tokio::time::timeout(within, &mut self.task).await {
            Ok(ended) => {
                flatten(ended).with_context(|| format!("the {} failed to stop cleanly", self.name))
            }
            Err(_) => Err(anyhow!(
                "the {} did not stop within {within:?} and was aborted",
                self.name
            )),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn flatten(ended: Result<anyhow::Result<()>, tokio::task::JoinError>) -> anyhow::Result<()> {
    ended.unwrap_or_else(|e| Err(anyhow!("task failed: {e}")))
}

fn early(name: &str, result: anyhow::Result<()>) -> anyhow::Error {
    match result {
        Ok(()) => anyhow!("the {name} stopped unexpectedly"),
        Err(error) => error.context(format!("the {name} failed")),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn somewhere() -> SocketAddr {
        ([127, 0, 0, 1], 1).into()
    }

    #[tokio::test]
    async fn a_service_runs_until_it_is_stopped() {
        let service = Service::start("test", |ready, stop| async move {
            let _ = ready.send(somewhere());
            stop.cancelled().await;
            Ok(())
        })
        .await
        .expect("started");
        assert_eq!(service.address, somewhere());
        service.stop(Duration::from_secs(5)).await.expect("stopped");
    }

    #[tokio::test]
    async fn failure_to_start_is_reported() {
        let error = Service::start("test", |_ready, _stop| async move { bail!("no database") })
            .await
            .expect_err("it failed");
        assert_eq!(format!("{error:#}"), "the test failed: no database");
    }

    #[tokio::test]
    async fn failure_while_running_is_reported() {
        let (fill, full) = oneshot::channel::<()>();
        let mut service = Service::start("test", |ready, _stop| async move {
            let _ = ready.send(somewhere());
            let _ = full.await;
            bail!("disk full")
        })
        .await
        .expect("started");
        drop(fill);
        assert_eq!(
            format!("{:#}", service.ended().await),
            "the test failed: disk full"
        );
    }

    #[tokio::test]
    async fn service_that_does_not_stop_is_aborted() {
        let service = Service::start("test", |ready, _stop| async move {
            let _ = ready.send(somewhere());
            std::future::pending().await
        })
        .await
        .expect("started");
        let error = service
            .stop(Duration::from_millis(50))
            .await
            .expect_err("stuck");
        assert!(error.to_string().contains("within 50ms"), "{error}");
    }
}
