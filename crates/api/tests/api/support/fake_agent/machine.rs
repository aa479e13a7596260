//! Life of the fake sandboxes.

use std::sync::{Arc, atomic::Ordering};

use connectrpc::{ConnectError, ErrorCode};
use wrenn_proto::rpc::hostagent::v1::{self as rpc, SandboxState as S};

use super::{FakeSandbox, State, lock, now_ms};

impl State {
    /// Fails unless the sandbox runs. Counts as activity.
    pub(super) fn require(&self, id: &str) -> Result<(), ConnectError> {
        self.require_running(id)?;
        if let Some(sandbox) = lock(&self.sandboxes).get_mut(id) {
            sandbox.last_active_ms = now_ms();
        }
        Ok(())
    }

    /// Same as [`require`](Self::require), without counting as activity.
    pub(super) fn require_running(&self, id: &str) -> Result<(), ConnectError> {
        match self.state(id)? {
            S::SANDBOX_STATE_RUNNING => Ok(()),
            S::SANDBOX_STATE_ERROR => {
                let reason = lock(&self.sandboxes).get(id).map(|s| s.reason.clone());
                let message = format!("sandbox {id} is lost: {}", reason.unwrap_or_default());
                Err(ConnectError::new(ErrorCode::FailedPrecondition, message))
            }
            _ => Err(ConnectError::new(
                ErrorCode::FailedPrecondition,
                "the sandbox does not run",
            )),
        }
    }

    pub(super) fn info(&self, id: &str) -> Option<rpc::SandboxInfo> {
        let sandboxes = lock(&self.sandboxes);
        let sandbox = sandboxes.get(id)?;
        Some(rpc::SandboxInfo {
            id: id.to_owned(),
            state: sandbox.state.into(),
            template: sandbox.request.template.clone(),
            vcpus: sandbox.request.vcpus,
            memory_mb: sandbox.request.memory_mb,
            timeout_sec: sandbox.request.timeout_sec,
            host_ip: "10.11.0.1".to_owned(),
            guest_ip: "169.254.0.21".to_owned(),
            created_unix_ms: now_ms(),
            last_active_unix_ms: sandbox.last_active_ms,
            reason: sandbox.reason.clone(),
            envd_token: format!("token-of-{id}"),
            warning: sandbox.warning.clone(),
            cpu: "max,-avx".to_owned(),
            accel: "tcg".to_owned(),
            boot: rpc::BootTimes {
                prepared_ms: 1,
                vmm_started_ms: 2,
                kernel_ms: 3,
                init_ms: 4,
                envd_ms: 5,
                ..Default::default()
            }
            .into(),
            ..Default::default()
        })
    }
}

/// Removes an unfinished sandbox when its create is dropped.
struct Undo<'a>(&'a State, String, bool);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.2 {
            lock(&self.0.sandboxes).remove(&self.1);
        }
    }
}

impl State {
    pub(super) async fn create(
        &self,
        request: rpc::CreateSandboxRequest,
    ) -> Result<(), ConnectError> {
        let id = request.id.clone();
        {
            let mut sandboxes = lock(&self.sandboxes);
            if sandboxes.contains_key(&id) {
                return Err(ConnectError::new(
                    ErrorCode::AlreadyExists,
                    "the sandbox exists",
                ));
            }
            let sandbox = FakeSandbox {
                state: rpc::SandboxState::SANDBOX_STATE_STARTING,
                reason: String::new(),
                warning: String::new(),
                last_active_ms: now_ms(),
                request,
            };
            sandboxes.insert(id.clone(), sandbox);
        }
        let mut undo = Undo(self, id.clone(), true);
        let delay = *lock(&self.create_delay);
        tokio::time::sleep(delay).await;
        self.create_gate.pass().await;
        self.check("CreateSandbox")?;
        undo.2 = false;
        match lock(&self.sandboxes).get_mut(&id) {
            Some(sandbox) => {
                sandbox.state = rpc::SandboxState::SANDBOX_STATE_RUNNING;
                Ok(())
            }
            None => Err(ConnectError::new(
                ErrorCode::Aborted,
                "the sandbox was destroyed while it was being created",
            )),
        }
    }
}

impl State {
    /// Fails if the test has set an error for this call.
    pub(super) fn check(&self, call: &str) -> Result<(), ConnectError> {
        match lock(&self.errors).get(call) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Runs work in a task of its own, as the real agent does: the work continues if the caller
    /// disconnects. Counts operations that start on a busy sandbox.
    pub(super) async fn detached<T: Send + 'static, F>(
        self: &Arc<Self>,
        id: &str,
        work: impl FnOnce(Arc<Self>, String) -> F,
    ) -> Result<T, ConnectError>
    where
        F: Future<Output = Result<T, ConnectError>> + Send + 'static,
    {
        if !lock(&self.busy).insert(id.to_owned()) {
            self.overlaps.fetch_add(1, Ordering::SeqCst);
        }
        let work = work(Arc::clone(self), id.to_owned());
        let (state, id) = (Arc::clone(self), id.to_owned());
        let task = tokio::spawn(async move {
            let done = work.await;
            lock(&state.busy).remove(&id);
            done
        });
        task.await.unwrap()
    }

    fn set(&self, id: &str, state: S, warning: &str) -> Result<(), ConnectError> {
        match lock(&self.sandboxes).get_mut(id) {
            Some(sandbox) => {
                sandbox.state = state;
                warning.clone_into(&mut sandbox.warning);
                Ok(())
            }
            None => Err(ConnectError::new(
                ErrorCode::Aborted,
                "the sandbox was destroyed",
            )),
        }
    }

    fn state(&self, id: &str) -> Result<S, ConnectError> {
        let sandboxes = lock(&self.sandboxes);
        sandboxes
            .get(id)
            .map(|sandbox| sandbox.state)
            .ok_or_else(|| {
                ConnectError::new(ErrorCode::NotFound, format!("there is no sandbox `{id}`"))
            })
    }

    pub(super) async fn pause(self: Arc<Self>, id: String) -> Result<(), ConnectError> {
        match self.state(&id)? {
            S::SANDBOX_STATE_PAUSED => return Ok(()),
            S::SANDBOX_STATE_RUNNING => {}
            _ => {
                return Err(ConnectError::new(
                    ErrorCode::FailedPrecondition,
                    "the sandbox does not run",
                ));
            }
        }
        self.set(&id, S::SANDBOX_STATE_PAUSING, "")?;
        self.cut(&id);
        self.pause_gate.pass().await;
        if let Err(error) = self.check("PauseSandbox") {
            self.set(&id, S::SANDBOX_STATE_RUNNING, "the host's warning")?;
            return Err(error);
        }
        self.set(&id, S::SANDBOX_STATE_PAUSED, "")
    }

    pub(super) async fn resume(self: Arc<Self>, id: String) -> Result<(), ConnectError> {
        match self.state(&id)? {
            S::SANDBOX_STATE_RUNNING => return Ok(()),
            S::SANDBOX_STATE_PAUSED => {}
            _ => {
                return Err(ConnectError::new(
                    ErrorCode::FailedPrecondition,
                    "the sandbox is not paused",
                ));
            }
        }
        self.set(&id, S::SANDBOX_STATE_RESUMING, "")?;
        self.resume_gate.pass().await;
        if let Err(error) = self.check("ResumeSandbox") {
            self.set(&id, S::SANDBOX_STATE_PAUSED, "the host's warning")?;
            return Err(error);
        }
        self.set(&id, S::SANDBOX_STATE_RUNNING, "")
    }

    pub(super) async fn snapshot(
        self: Arc<Self>,
        request: rpc::CreateSnapshotRequest,
    ) -> Result<rpc::TemplateInfo, ConnectError> {
        let before = self.state(&request.id)?;
        let taken = lock(&self.templates).iter().any(|t| t.name == request.name);
        if taken && !request.overwrite {
            return Err(ConnectError::new(
                ErrorCode::AlreadyExists,
                "the name is taken",
            ));
        }
        // The snapshot pauses a running VM.
        if before == S::SANDBOX_STATE_RUNNING {
            self.set(&request.id, S::SANDBOX_STATE_PAUSED, "")?;
        }
        self.snapshot_gate.pass().await;
        self.set(&request.id, before, "")?;
        self.check("CreateSnapshot")?;
        let sandbox = lock(&self.sandboxes).get(&request.id).cloned();
        let sandbox =
            sandbox.ok_or_else(|| ConnectError::new(ErrorCode::Aborted, "the sandbox is gone"))?;
        let template = rpc::TemplateInfo {
            name: request.name.clone(),
            vcpus: sandbox.request.vcpus,
            memory_mb: sandbox.request.memory_mb,
            disk_size_mb: sandbox.request.disk_size_mb,
            size_bytes: 1 << 20,
            created_unix_ms: now_ms(),
            kind: rpc::TemplateKind::TEMPLATE_KIND_SNAPSHOT.into(),
            generation: 1,
            ..Default::default()
        };
        let mut templates = lock(&self.templates);
        templates.retain(|t| t.name != request.name);
        templates.push(template.clone());
        Ok(template)
    }

    pub(super) fn delete_snapshot(&self, name: &str) -> Result<(), ConnectError> {
        self.check("DeleteSnapshot")?;
        let mut templates = lock(&self.templates);
        let before = templates.len();
        templates.retain(|t| t.name != name);
        if templates.len() == before {
            return Err(ConnectError::new(
                ErrorCode::NotFound,
                "there is no such template",
            ));
        }
        Ok(())
    }

    pub(super) fn push_snapshot(&self, name: &str) -> Result<(), ConnectError> {
        self.check("PushSnapshot")?;
        match lock(&self.templates).iter().any(|t| t.name == name) {
            true => Ok(()),
            false => Err(ConnectError::not_found("there is no such template")),
        }
    }

    pub(super) fn pull_snapshot(
        &self,
        name: &str,
        overwrite: bool,
    ) -> Result<rpc::TemplateInfo, ConnectError> {
        self.check("PullSnapshot")?;
        let mut templates = lock(&self.templates);
        if templates.iter().any(|t| t.name == name) && !overwrite {
            return Err(ConnectError::already_exists("the name is taken"));
        }
        let template = rpc::TemplateInfo {
            name: name.to_owned(),
            vcpus: 1,
            memory_mb: 512,
            disk_size_mb: 5120,
            created_unix_ms: now_ms(),
            kind: rpc::TemplateKind::TEMPLATE_KIND_SNAPSHOT.into(),
            ..Default::default()
        };
        templates.retain(|t| t.name != name);
        templates.push(template.clone());
        Ok(template)
    }

    pub(super) async fn fork(
        self: Arc<Self>,
        request: rpc::ForkSandboxRequest,
    ) -> Result<Vec<String>, ConnectError> {
        if self.state(&request.id)? != S::SANDBOX_STATE_RUNNING {
            return Err(ConnectError::new(
                ErrorCode::FailedPrecondition,
                "the sandbox does not run",
            ));
        }
        self.fork_gate.pass().await;
        self.check("ForkSandbox")?;
        let mut sandboxes = lock(&self.sandboxes);
        let Some(source) = sandboxes.get(&request.id).cloned() else {
            return Err(ConnectError::new(ErrorCode::Aborted, "the sandbox is gone"));
        };
        for id in &request.copy_ids {
            let mut copy = source.clone();
            copy.last_active_ms = now_ms();
            sandboxes.insert(id.clone(), copy);
        }
        Ok(request.copy_ids)
    }
}
