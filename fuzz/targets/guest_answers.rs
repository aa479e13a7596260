//! Answers of the guest agent to calls of the host. A guest can replace its agent, so every byte of
//! an answer is untrusted.
//!
//! The first three bytes of the input select the call, the HTTP status, and the size of the pieces
//! in which the body arrives. The rest is the body.
#![no_main]

use std::sync::LazyLock;

use bytes::Bytes;
use connectrpc::{
    ConnectError,
    client::{ClientBody, ClientConfig, ClientTransport},
};
use futures::{
    executor::block_on,
    future::{BoxFuture, FutureExt as _, ready},
    stream::{self, Iter},
};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use libfuzzer_sys::fuzz_target;
use wrenn_proto::rpc::{
    filesystem::{FilesystemClient, ListDirRequest, MakeDirRequest, RemoveRequest},
    process::{ConnectRequest, ListRequest, ProcessClient, StartRequest},
};

/// Length of an envelope's header, in bytes. No message of a stream is shorter.
const ENVELOPE_BYTES: usize = 5;

type Body = StreamBody<Iter<std::vec::IntoIter<Result<Frame<Bytes>, ConnectError>>>>;

static CONFIG: LazyLock<ClientConfig> = LazyLock::new(|| {
    let base = "http://guest".parse().expect("a URI");
    // The host agent's limit.
    ClientConfig::new(base).with_default_max_message_size(64 * 1024 * 1024)
});

/// Transport that answers every call with the same bytes.
#[derive(Clone)]
struct Replay {
    status: u16,
    piece: usize,
    body: Bytes,
}

impl ClientTransport for Replay {
    type ResponseBody = Body;
    type Error = ConnectError;

    fn send(
        &self,
        _: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Body>, ConnectError>> {
        let starts = (0..self.body.len()).step_by(self.piece);
        let piece = |start| {
            let end = self.body.len().min(start + self.piece);
            Ok(Frame::data(self.body.slice(start..end)))
        };
        let pieces: Vec<_> = starts.map(piece).collect();
        let response = Response::builder()
            .status(self.status)
            .body(StreamBody::new(stream::iter(pieces)))
            .map_err(|_| ConnectError::internal("invalid status"));
        ready(response).boxed()
    }
}

/// Reads a stream until it ends. Evaluates to the number of its messages.
macro_rules! count_messages {
    ($call:expr) => {{
        let mut count = 0;
        if let Ok(mut stream) = $call.await {
            while let Ok(Some(message)) = stream.message().await {
                let _ = message.to_owned_message();
                count += 1;
            }
        }
        count
    }};
}

fuzz_target!(|input: &[u8]| {
    let Some((&[call, status, piece], body)) = input.split_first_chunk::<3>() else {
        return;
    };
    let transport = Replay {
        status: [200, 400, 401, 404, 500][usize::from(status) % 5],
        piece: usize::from(piece).max(1),
        body: Bytes::copy_from_slice(body),
    };
    let process = ProcessClient::new(transport.clone(), CONFIG.clone());
    let filesystem = FilesystemClient::new(transport, CONFIG.clone());
    block_on(async {
        match call % 6 {
            0 => {
                let count = count_messages!(process.start(StartRequest::default()));
                assert!(count <= body.len() / ENVELOPE_BYTES);
            }
            1 => {
                let count = count_messages!(process.connect(ConnectRequest::default()));
                assert!(count <= body.len() / ENVELOPE_BYTES);
            }
            2 => {
                let answer = process.list(ListRequest::default()).await;
                let _ = answer.map(|answer| answer.into_owned());
            }
            3 => {
                let answer = filesystem.list_dir(ListDirRequest::default()).await;
                let _ = answer.map(|answer| answer.into_owned());
            }
            4 => {
                let answer = filesystem.make_dir(MakeDirRequest::default()).await;
                let _ = answer.map(|answer| answer.into_owned());
            }
            _ => {
                let answer = filesystem.remove(RemoveRequest::default()).await;
                let _ = answer.map(|answer| answer.into_owned());
            }
        }
    });
});
