//! Guest of a fake sandbox: a real guest agent in this process. The agent's processes and files are
//! those of the host, and it runs commands as root.

use std::{net::SocketAddr, process::Command, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinHandle};
use wrenn_envd::{
    app::App,
    process::registry::Registry,
    server::{self, Config},
    settings::{Init, Unnamed},
};

/// Running guest agent. Dropping it ends its connections and kills its processes.
pub(super) struct Guest {
    pub(super) address: SocketAddr,
    app: App,
    processes: Arc<Registry>,
    server: JoinHandle<std::io::Result<()>>,
}

impl Guest {
    /// Starts a guest agent that requires a token, and drops a client that takes no output for
    /// `patience`.
    pub(super) async fn start(token: &str, patience: Duration) -> Self {
        let config = Config {
            // Processes stay in the cgroup of the tests.
            cgroup_root: "/nonexistent".into(),
            patience,
            ..Config::default()
        };
        let (app, launcher) = server::initial_state(&config);
        let processes = launcher.processes.clone();
        let init = Init {
            access_token: Some(token.to_owned()),
            default_user: Some("root".to_owned()),
            ..Init::default()
        };
        app.settings.apply(init, Unnamed::Keep);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self {
            address: listener.local_addr().unwrap(),
            app: app.clone(),
            processes,
            server: tokio::spawn(server::serve(listener, app, launcher)),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.server.abort();
        self.app.connections.drain();
        self.app.connections.cut();
        for process in self.processes.list() {
            // The id of a process is also the id of its group.
            let group = format!("-{}", process.pid);
            let _ = Command::new("kill").args(["-9", "--", &group]).status();
        }
    }
}
