//! Directories of the guest.

use connectrpc::{ConnectError, client::CallOptions};
use wrenn_proto::rpc::filesystem::{EntryInfo, ListDirRequest, MakeDirRequest, RemoveRequest};

use crate::{
    EnvdClient,
    client::{as_user, unknown_user},
    deadline::{CALL_DEADLINE, within},
};

impl EnvdClient {
    /// Lists a directory, down to `depth` levels; 0 means 1.
    ///
    /// # Errors
    /// If there is no such directory, or the call fails.
    pub async fn list_dir(
        &self,
        path: &str,
        depth: u32,
        user: &str,
    ) -> Result<Vec<EntryInfo>, ConnectError> {
        let request = ListDirRequest {
            path: path.to_owned(),
            depth,
            ..Default::default()
        };
        let options = as_user(CallOptions::default(), user)?;
        let (filesystem, broken) = self.filesystem();
        let call = broken.watch_message(filesystem.list_dir_with_options(request, options));
        let answer = within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))?;
        Ok(answer.into_owned().entries)
    }

    /// Creates a directory and its missing parents.
    ///
    /// # Errors
    /// `already_exists` if the path exists; if the call fails.
    pub async fn make_dir(&self, path: &str, user: &str) -> Result<EntryInfo, ConnectError> {
        let request = MakeDirRequest {
            path: path.to_owned(),
            ..Default::default()
        };
        let options = as_user(CallOptions::default(), user)?;
        let (filesystem, broken) = self.filesystem();
        let call = broken.watch_message(filesystem.make_dir_with_options(request, options));
        let answer = within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))?;
        Ok(answer.into_owned().entry.into_option().unwrap_or_default())
    }

    /// Removes a file, or a directory with its contents. Succeeds if the path does not exist.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn remove(&self, path: &str, user: &str) -> Result<(), ConnectError> {
        let request = RemoveRequest {
            path: path.to_owned(),
            ..Default::default()
        };
        let options = as_user(CallOptions::default(), user)?;
        let (filesystem, broken) = self.filesystem();
        let call = broken.watch_message(filesystem.remove_with_options(request, options));
        within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))
            .map(drop)
    }
}
