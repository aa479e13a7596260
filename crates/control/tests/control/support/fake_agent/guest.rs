//! Guest of a fake sandbox: a real guest agent in this process. Its processes and files are those of
//! the host, and it runs commands as root.

use std::{net::SocketAddr, process::Command};

use tokio::{net::TcpListener, task::JoinHandle};
use wrenn_envd::{
    server::{self, App, Config},
    settings::{Init, Unnamed},
};

/// Running guest agent. Dropping it ends its connections and kills its processes.
pub(super) struct Guest {
    pub(super) address: SocketAddr,
    app: App,
    server: JoinHandle<std::io::Result<()>>,
}

impl Guest {
    /// Starts a guest agent that requires a token.
    pub(super) async fn start(token: &str) -> Self {
        let config = Config {
            // Processes stay in the cgroup of the tests.
            cgroup_root: "/nonexistent".into(),
            ..Config::default()
        };
        let app = App::new(&config);
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
            server: tokio::spawn(server::serve(listener, app)),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.server.abort();
        self.app.connections.drain();
        self.app.connections.cut();
        for process in self.app.processes.list() {
            // The id of a process is also the id of its group.
            let group = format!("-{}", process.pid);
            let _ = Command::new("kill").args(["-9", "--", &group]).status();
        }
    }
}
