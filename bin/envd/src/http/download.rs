//! `GET /files`: sends a regular file, whole or in part, plain or gzipped.

use std::{
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_compression::{Level, tokio::bufread::GzipEncoder};
use axum::{
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    response::Response,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, BufReader};
use tokio_util::io::ReaderStream;
use wrenn_model::limits::FILE_CHUNK_BYTES;

use super::{draft::refuse_irregular, link::FileQuery};
use crate::{app::App, http_error::HttpError};

/// Sends a file.
///
/// # Errors
/// 400 if the path is not a regular file, 401, 404, 406, 416.
pub async fn download(
    State(app): State<App>,
    query: Result<Query<FileQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let query = FileQuery::checked(query)?;
    let user = query.admit(&app, &headers, "read")?;
    let path = query.resolve(&query.path, &app, &user)?;
    let (file, metadata) = open_regular(&path).await?;
    let modified = metadata.modified().unwrap_or(UNIX_EPOCH);
    let tag = format!(
        "\"{:x}-{:x}-{:x}\"",
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec()
    );
    let mut response = Response::new(Body::empty());
    describe(response.headers_mut(), &path, &tag, modified);
    if not_modified(&headers, &tag, modified) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    match plan(&headers, &tag, modified, metadata.len())? {
        Plan::Whole if is_unmeasured(&metadata) => send_unmeasured(response, file, &path).await,
        Plan::Whole => send(response, file, 0, metadata.len()).await,
        Plan::Gzip => {
            let gzip = GzipEncoder::with_quality(
                BufReader::with_capacity(FILE_CHUNK_BYTES, file),
                Level::Fastest,
            );
            response
                .headers_mut()
                .insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            *response.body_mut() =
                Body::from_stream(ReaderStream::with_capacity(gzip, FILE_CHUNK_BYTES));
            Ok(response)
        }
        Plan::Part { first, last } => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            put(
                response.headers_mut(),
                header::CONTENT_RANGE,
                &format!("bytes {first}-{last}/{}", metadata.len()),
            );
            send(response, file, first, last - first + 1).await
        }
        Plan::OutOfRange => {
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            put(
                response.headers_mut(),
                header::CONTENT_RANGE,
                &format!("bytes */{}", metadata.len()),
            );
            Ok(response)
        }
    }
}

/// Opens a regular file for reading. Rejects devices, pipes and directories, which never end or
/// have no content.
async fn open_regular(path: &Path) -> Result<(tokio::fs::File, Metadata), HttpError> {
    let fails = |error: io::Error| HttpError::of_file(path, &error);
    let before = tokio::fs::metadata(path).await.map_err(fails)?;
    refuse_irregular(path, &before)?;
    // Opened without blocking: the path may have become a pipe in the meantime, and opening a pipe
    // would wait for a writer.
    let mut options = tokio::fs::OpenOptions::new();
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = options
        .read(true)
        .custom_flags(nonblocking)
        .open(path)
        .await
        .map_err(fails)?;
    let metadata = file.metadata().await.map_err(fails)?;
    refuse_irregular(path, &metadata)?;
    Ok((file, metadata))
}

fn describe(headers: &mut HeaderMap, path: &Path, tag: &str, modified: SystemTime) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    put(headers, header::ETAG, tag);
    put(headers, header::LAST_MODIFIED, &http_date(modified));
    let plain: String = name
        .chars()
        .filter(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\'))
        .collect();
    put(
        headers,
        header::CONTENT_DISPOSITION,
        &format!("inline; filename=\"{plain}\""),
    );
}

fn put(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

async fn send(
    mut response: Response,
    mut file: tokio::fs::File,
    first: u64,
    length: u64,
) -> Result<Response, HttpError> {
    if first > 0 {
        let seek = file.seek(io::SeekFrom::Start(first)).await;
        seek.map_err(|e| HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    }
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    // Sends no more than the announced length, even if the file grows. If the file shrinks, the
    // connection is cut, so that the client sees an error and not a short file.
    let stream = ReaderStream::with_capacity(file.take(length), FILE_CHUNK_BYTES);
    *response.body_mut() = Body::from_stream(stream);
    Ok(response)
}

/// True if a file's length does not tell how much can be read. Files of the kernel have the length
/// 0 (`/proc`) or that of a page (`/sys`), and no blocks on a disk.
fn is_unmeasured(metadata: &Metadata) -> bool {
    metadata.len() == 0 || (metadata.blocks() == 0 && metadata.len() <= 4096)
}

/// Sends a file of unknown length up to its end.
async fn send_unmeasured(
    mut response: Response,
    mut file: tokio::fs::File,
    path: &Path,
) -> Result<Response, HttpError> {
    let mut first = vec![0; FILE_CHUNK_BYTES];
    let length = file.read(&mut first).await;
    let length = length.map_err(|e| HttpError::of_file(path, &e))?;
    first.truncate(length);
    if first.is_empty() {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(0));
        return Ok(response);
    }
    let whole = io::Cursor::new(first).chain(file);
    *response.body_mut() = Body::from_stream(ReaderStream::with_capacity(whole, FILE_CHUNK_BYTES));
    Ok(response)
}

fn header_text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn not_modified(headers: &HeaderMap, tag: &str, modified: SystemTime) -> bool {
    if let Some(tags) = header_text(headers, header::IF_NONE_MATCH) {
        return tags
            .split(',')
            .map(str::trim)
            .any(|t| t == "*" || t.trim_start_matches("W/") == tag);
    }
    header_text(headers, header::IF_MODIFIED_SINCE)
        .and_then(parse_http_date)
        .is_some_and(|since| whole_seconds(modified) <= whole_seconds(since))
}

/// Content of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Whole,
    Gzip,
    Part { first: u64, last: u64 },
    OutOfRange,
}

fn plan(headers: &HeaderMap, tag: &str, modified: SystemTime, len: u64) -> Result<Plan, HttpError> {
    let current = header_text(headers, header::IF_RANGE).is_none_or(|v| {
        v == tag || parse_http_date(v).is_some_and(|d| whole_seconds(d) == whole_seconds(modified))
    });
    if let Some(range) = header_text(headers, header::RANGE).filter(|_| current) {
        return Ok(match parse_range(range, len) {
            Range::Part { first, last } => Plan::Part { first, last },
            Range::Ignored => Plan::Whole,
            Range::OutOfRange => Plan::OutOfRange,
        });
    }
    match accepted(header_text(headers, header::ACCEPT_ENCODING)) {
        // In a conditional request, the client compares the plain bytes that it has.
        _ if headers.contains_key(header::RANGE) => Ok(Plan::Whole),
        Accepted::Gzip => Ok(Plan::Gzip),
        Accepted::Identity => Ok(Plan::Whole),
        Accepted::Neither => Err(HttpError::new(
            StatusCode::NOT_ACCEPTABLE,
            "no acceptable encoding: gzip and identity are supported",
        )),
    }
}

/// Meaning of a `Range` header for a file of a given length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// From byte `first` to byte `last`, both included.
    Part {
        /// First byte.
        first: u64,
        /// Last byte.
        last: u64,
    },
    /// Not understood, or several ranges. The whole file is a valid response.
    Ignored,
    /// Beyond the end of the file.
    OutOfRange,
}

/// Parses a `Range` header (RFC 9110, section 14.2).
#[must_use]
pub fn parse_range(header: &str, len: u64) -> Range {
    let Some((first, last)) = header
        .strip_prefix("bytes=")
        .and_then(|spec| spec.split_once('-'))
    else {
        return Range::Ignored;
    };
    let number = |text: &str| -> Option<u64> {
        let text = text.trim();
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse().ok())
            .flatten()
    };
    let part = match (
        first.trim().is_empty(),
        number(first),
        last.trim().is_empty(),
        number(last),
    ) {
        (false, Some(first), true, _) => (first, len.saturating_sub(1)),
        (false, Some(first), false, Some(last)) if first <= last => {
            (first, last.min(len.saturating_sub(1)))
        }
        (true, _, false, Some(suffix)) if suffix > 0 => {
            (len.saturating_sub(suffix), len.saturating_sub(1))
        }
        (true, _, false, Some(_)) => return Range::OutOfRange,
        _ => return Range::Ignored,
    };
    if part.0 >= len {
        return Range::OutOfRange;
    }
    Range::Part {
        first: part.0,
        last: part.1,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accepted {
    Gzip,
    Identity,
    Neither,
}

/// Returns the encoding for an `Accept-Encoding` header (RFC 9110, section 12.5.3).
fn accepted(header: Option<&str>) -> Accepted {
    let Some(header) = header.filter(|h| !h.trim().is_empty()) else {
        return Accepted::Identity;
    };
    let mut weights: Vec<(&str, f32)> = Vec::new();
    for entry in header.split(',') {
        let mut parts = entry.split(';');
        let name = parts.next().unwrap_or_default().trim();
        let weight = parts.find_map(|p| p.trim().strip_prefix("q=")?.parse().ok());
        weights.push((name, weight.unwrap_or(1.0)));
    }
    let weight = |name: &str| {
        weights
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, w)| *w)
    };
    let any = weight("*");
    let gzip = weight("gzip").or(any).unwrap_or(0.0);
    let identity = weight("identity")
        .or(any.filter(|w| *w == 0.0))
        .unwrap_or(0.001);
    if gzip > 0.0 && gzip >= identity {
        Accepted::Gzip
    } else if identity > 0.0 {
        Accepted::Identity
    } else {
        Accepted::Neither
    }
}

fn whole_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn http_date(time: SystemTime) -> String {
    let timestamp = jiff::Timestamp::try_from(time).unwrap_or_default();
    let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
    printer
        .timestamp_to_rfc9110_string(&timestamp)
        .unwrap_or_default()
}

fn parse_http_date(text: &str) -> Option<SystemTime> {
    let parser = jiff::fmt::rfc2822::DateTimeParser::new();
    let timestamp = parser.parse_timestamp(text).ok()?;
    let seconds = u64::try_from(timestamp.as_second()).ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_read_as_the_standard_says() {
        let part = |first, last| Range::Part { first, last };
        assert_eq!(parse_range("bytes=0-0", 10), part(0, 0));
        assert_eq!(parse_range("bytes=2-", 10), part(2, 9));
        assert_eq!(parse_range("bytes=-3", 10), part(7, 9));
        assert_eq!(parse_range("bytes=-30", 10), part(0, 9));
        assert_eq!(parse_range("bytes=5-99", 10), part(5, 9));
        assert_eq!(parse_range("bytes=10-", 10), Range::OutOfRange);
        assert_eq!(parse_range("bytes=0-", 0), Range::OutOfRange);
        assert_eq!(parse_range("bytes=5-2", 10), Range::Ignored);
        assert_eq!(parse_range("bytes=0-1,3-4", 10), Range::Ignored);
        assert_eq!(parse_range("lines=1-2", 10), Range::Ignored);
    }

    #[test]
    fn the_encoding_is_the_best_that_is_accepted() {
        assert_eq!(accepted(None), Accepted::Identity);
        assert_eq!(accepted(Some("gzip, deflate")), Accepted::Gzip);
        assert_eq!(accepted(Some("gzip;q=0")), Accepted::Identity);
        assert_eq!(accepted(Some("identity")), Accepted::Identity);
        assert_eq!(accepted(Some("br")), Accepted::Identity);
        assert_eq!(accepted(Some("identity;q=0, br")), Accepted::Neither);
        assert_eq!(accepted(Some("*;q=0")), Accepted::Neither);
        assert_eq!(accepted(Some("gzip;q=0.5, identity")), Accepted::Identity);
    }

    #[test]
    fn dates_survive_the_wire() {
        let time = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(http_date(time), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(time));
    }

    proptest! {
        #[test]
        fn a_part_lies_within_the_file(header in "bytes=[0-9]{0,20}-[0-9]{0,20}", len in 0_u64..1000) {
            if let Range::Part { first, last } = parse_range(&header, len) {
                prop_assert!(first <= last && last < len);
            }
        }
    }
}
