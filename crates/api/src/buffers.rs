//! Bodies that are held in memory as a whole: they are accounted to one budget of the process.
//!
//! | body | over the budget |
//! |---|---|
//! | JSON of a request, beyond its first 64 KiB | 503 `resource_exhausted` |
//! | output of an exec | 503 before the command starts; later output is dropped and marked |
//! | list of a directory, log of a sandbox | 503 |
//! | file of known length (`files/read`) | streamed |
//! | file of unknown length (`files/read`) | 503 |
//!
//! All other bodies are streamed, and need a few pieces of 64 KiB each.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use wrenn_model::{BudgetExhausted, Reservation, limits};

use crate::error::{ApiError, Code};

/// Maximum time until a client takes the next piece of a body.
const TAKE_TIMEOUT: Duration = Duration::from_secs(300);

impl From<BudgetExhausted> for ApiError {
    fn from(error: BudgetExhausted) -> Self {
        Self::new(Code::ResourceExhausted, error.to_string())
    }
}

/// Returns a JSON response. Its bytes stay reserved until the client has taken them.
pub(crate) fn json(
    status: StatusCode,
    value: &impl Serialize,
    reserved: Reservation,
) -> Result<Response, ApiError> {
    let json = serde_json::to_vec(value).map_err(|error| {
        tracing::error!(%error, "failed to encode a response");
        ApiError::new(Code::Internal, "failed to encode the response")
    })?;
    let length = json.len();
    let kind = HeaderValue::from_static("application/json");
    let mut response = whole(pieces(vec![Bytes::from(json)], reserved), length, kind);
    *response.status_mut() = status;
    Ok(response)
}

/// Returns a response whose body has a known length.
pub(crate) fn whole(body: Body, length: usize, kind: HeaderValue) -> Response {
    let length = HeaderValue::from(length);
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_LENGTH, length),
    ];
    (headers, body).into_response()
}

/// Returns a body in pieces, so that a slow client does not move all of it to the connection's own
/// buffer. Its bytes stay reserved until the last piece was taken. A client that takes no piece for
/// [`TAKE_TIMEOUT`] loses the rest of the body, so that it does not keep them for ever.
pub(crate) fn pieces(parts: Vec<Bytes>, reserved: Reservation) -> Body {
    if parts.iter().all(Bytes::is_empty) {
        return Body::empty();
    }
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        let send_all = async {
            for mut rest in parts {
                while !rest.is_empty() {
                    let piece = rest.split_to(rest.len().min(limits::FILE_CHUNK_BYTES));
                    let place = timeout(TAKE_TIMEOUT, sender.reserve()).await.ok()?.ok()?;
                    place.send(Ok(piece));
                }
            }
            // The last piece was taken once there is place for another one.
            timeout(TAKE_TIMEOUT, sender.reserve()).await.ok()?.ok()?;
            Some(())
        };
        // The connection ends if its body is shorter than announced.
        send_all.await;
        drop(reserved);
    });
    Body::from_stream(ReceiverStream::new(receiver))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use futures::StreamExt as _;
    use wrenn_model::ByteBudget;

    use super::*;

    #[tokio::test]
    async fn bytes_of_a_body_are_reserved_until_its_last_piece_is_taken() {
        let budget = ByteBudget::new(1 << 20);
        let reserved = budget.reserve(200_000).unwrap();
        let parts = vec![
            Bytes::from(vec![b'x'; 100_000]),
            Bytes::new(),
            Bytes::from(vec![b'y'; 100_000]),
        ];
        let mut body = pieces(parts, reserved).into_data_stream();
        let mut taken = Vec::new();
        while let Some(piece) = body.next().await {
            assert_eq!(budget.used_bytes(), 200_000);
            let piece = piece.unwrap();
            assert!(!piece.is_empty() && piece.len() <= limits::FILE_CHUNK_BYTES);
            taken.extend_from_slice(&piece);
        }
        assert_eq!((taken.len(), budget.used_bytes()), (200_000, 0));
        drop(pieces(Vec::new(), budget.reserve(7).unwrap()));
        assert_eq!(budget.used_bytes(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_loses_the_rest_of_its_body() {
        let budget = ByteBudget::new(1 << 20);
        let reserved = budget.reserve(200_000).unwrap();
        let body = pieces(vec![Bytes::from(vec![b'x'; 200_000])], reserved);
        let mut body = body.into_data_stream();
        let first = body.next().await.unwrap().unwrap();
        tokio::time::sleep(TAKE_TIMEOUT - Duration::from_secs(1)).await;
        assert_eq!(budget.used_bytes(), 200_000);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(budget.used_bytes(), 0);
        let mut taken = first.len();
        while let Some(piece) = body.next().await {
            taken += piece.unwrap().len();
        }
        assert!(taken < 200_000, "{taken}");
    }
}
