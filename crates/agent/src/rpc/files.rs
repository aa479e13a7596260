//! File operations in the guest.

use bytes::{Bytes, BytesMut};
use connectrpc::{ConnectError, InboundStream, ServiceStream};
use futures::{StreamExt as _, stream};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use wrenn_model::limits::{FILE_CHUNK_BYTES, MAX_FILE_MESSAGE_BYTES};
use wrenn_proto::rpc::{
    filesystem as guest,
    hostagent::v1::{self as pb, __buffa::oneof::write_file_stream_request::Part},
};

use super::{AgentService, InUse};
use crate::envd_client::Download;

/// File of a sandbox, and the guest user that accesses it.
struct Target {
    in_use: InUse,
    path: String,
    user: String,
}

fn target(
    service: &AgentService,
    meta: impl Into<Option<pb::FileMeta>>,
) -> Result<Target, ConnectError> {
    let Some(meta) = meta.into() else {
        return Err(ConnectError::invalid_argument("`meta` is required"));
    };
    let in_use = service.in_use(&meta.id)?;
    if meta.path.is_empty() {
        return Err(ConnectError::invalid_argument("`path` is required"));
    }
    if meta.path.contains('\0') {
        return Err(ConnectError::invalid_argument(
            "`path`: NUL bytes are not allowed",
        ));
    }
    Ok(Target {
        in_use,
        path: meta.path,
        user: meta.user,
    })
}

pub(super) async fn write(
    service: &AgentService,
    request: pb::WriteFileRequest,
) -> Result<pb::WriteFileResponse, ConnectError> {
    if request.content.len() > MAX_FILE_MESSAGE_BYTES {
        return Err(ConnectError::resource_exhausted(format!(
            "`content`: exceeds the limit of {MAX_FILE_MESSAGE_BYTES} bytes; use a stream instead"
        )));
    }
    let target = target(service, request.meta.into_option())?;
    let envd = &target.in_use.running.envd;
    let content = Bytes::from(request.content);
    let call = envd.write(&target.path, &target.user, content);
    target.in_use.wait_for(call).await?;
    Ok(pb::WriteFileResponse::default())
}

pub(super) async fn read(
    service: &AgentService,
    request: pb::ReadFileRequest,
) -> Result<pb::ReadFileResponse, ConnectError> {
    let target = target(service, request.meta.into_option())?;
    let collect = async {
        let envd = &target.in_use.running.envd;
        let mut download = envd.download(&target.path, &target.user).await?;
        let mut content = BytesMut::new();
        while let Some(piece) = download.next().await? {
            if content.len() + piece.len() > MAX_FILE_MESSAGE_BYTES {
                return Err(ConnectError::resource_exhausted(format!(
                    "`{}` exceeds the limit of {MAX_FILE_MESSAGE_BYTES} bytes; use a stream instead",
                    target.path
                )));
            }
            content.extend_from_slice(&piece);
        }
        Ok(content)
    };
    let content = target.in_use.wait_for(collect).await?;
    Ok(pb::ReadFileResponse {
        content: content.into(),
        ..Default::default()
    })
}

/// Passes a file on as it arrives. If the stream is interrupted for any reason, the request to the
/// guest is interrupted as well.
pub(super) async fn write_stream(
    service: &AgentService,
    mut requests: InboundStream<pb::WriteFileStreamRequest>,
) -> Result<pb::WriteFileStreamResponse, ConnectError> {
    let first = match requests.next().await {
        Some(message) => message?.to_owned_message().part,
        None => None,
    };
    let Some(Part::Meta(meta)) = first else {
        return Err(ConnectError::invalid_argument(
            "`meta`: must be the first message",
        ));
    };
    let target = target(service, *meta)?;
    let size = Arc::new(AtomicU64::new(0));
    let (counted, in_use) = (size.clone(), target.in_use.clone());
    let content = requests.map(move |message| {
        let Some(Part::Chunk(chunk)) = message?.to_owned_message().part else {
            return Err(ConnectError::invalid_argument(
                "`chunk`: required in every message after the first",
            ));
        };
        in_use.sandbox.touch();
        counted.fetch_add(
            u64::try_from(chunk.len()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        Ok(Bytes::from(chunk))
    });
    let envd = &target.in_use.running.envd;
    let call = envd.upload(&target.path, &target.user, content);
    target.in_use.wait_for(call).await?;
    Ok(pb::WriteFileStreamResponse {
        size_bytes: size.load(Ordering::Relaxed),
        ..Default::default()
    })
}

pub(super) async fn read_stream(
    service: &AgentService,
    request: pb::ReadFileStreamRequest,
) -> Result<ServiceStream<pb::ReadFileStreamResponse>, ConnectError> {
    let target = target(service, request.meta.into_option())?;
    let envd = &target.in_use.running.envd;
    let call = envd.download(&target.path, &target.user);
    let download = target.in_use.wait_for(call).await?;
    Ok(chunks(target.in_use, download))
}

/// Download in progress. Fetches data only as fast as the caller takes it.
struct Transfer {
    in_use: InUse,
    download: Download,
    /// Data fetched and not yet passed on.
    rest: Bytes,
}

impl Transfer {
    async fn next(&mut self) -> Result<Option<Bytes>, ConnectError> {
        if self.rest.is_empty() {
            match self.in_use.wait_for(self.download.next()).await? {
                Some(piece) => self.rest = piece,
                None => return Ok(None),
            }
            self.in_use.sandbox.touch();
        }
        let length = self.rest.len().min(FILE_CHUNK_BYTES);
        Ok(Some(self.rest.split_to(length)))
    }
}

fn chunks(in_use: InUse, download: Download) -> ServiceStream<pb::ReadFileStreamResponse> {
    let transfer = Transfer {
        in_use,
        download,
        rest: Bytes::new(),
    };
    let step = async |state: Option<Transfer>| {
        let mut transfer = state?;
        match transfer.next().await {
            Ok(chunk) => {
                let response = pb::ReadFileStreamResponse {
                    chunk: chunk?.into(),
                    ..Default::default()
                };
                Some((Ok(response), Some(transfer)))
            }
            // The stream ends after an error.
            Err(error) => Some((Err(error), None)),
        }
    };
    stream::unfold(Some(transfer), step).boxed()
}

pub(super) async fn list_dir(
    service: &AgentService,
    request: pb::ListDirRequest,
) -> Result<pb::ListDirResponse, ConnectError> {
    let target = target(service, request.meta.into_option())?;
    let list = guest::ListDirRequest {
        path: target.path,
        depth: request.depth,
        ..Default::default()
    };
    let call = target.in_use.running.envd.list_dir(list, &target.user);
    Ok(pb::ListDirResponse {
        entries: target.in_use.wait_for(call).await?,
        ..Default::default()
    })
}

pub(super) async fn make_dir(
    service: &AgentService,
    request: pb::MakeDirRequest,
) -> Result<pb::MakeDirResponse, ConnectError> {
    let target = target(service, request.meta.into_option())?;
    let make = guest::MakeDirRequest {
        path: target.path,
        ..Default::default()
    };
    let call = target.in_use.running.envd.make_dir(make, &target.user);
    Ok(pb::MakeDirResponse {
        entry: target.in_use.wait_for(call).await?.into(),
        ..Default::default()
    })
}

pub(super) async fn remove_path(
    service: &AgentService,
    request: pb::RemovePathRequest,
) -> Result<pb::RemovePathResponse, ConnectError> {
    let target = target(service, request.meta.into_option())?;
    let remove = guest::RemoveRequest {
        path: target.path,
        ..Default::default()
    };
    let call = target.in_use.running.envd.remove(remove, &target.user);
    target.in_use.wait_for(call).await?;
    Ok(pb::RemovePathResponse::default())
}
