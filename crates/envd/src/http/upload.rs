//! `POST /files`: files from a multipart form, or one as the raw body; gzipped or not.
//!
//! What watchers see is part of the contract: the file is created, given to its user, and then written. A host asks for more:
//! that an upload which breaks off leaves the file that was there ([`Draft`]).

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use async_compression::tokio::bufread::GzipDecoder;
use axum::{
    Json,
    body::Body,
    extract::{FromRequest as _, Multipart, Query, Request, State, rejection::QueryRejection},
};
use futures::{StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, header, request::Parts};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::io::StreamReader;
use wrenn_proto::limits::{FILE_CHUNK_BYTES, WHOLE_UPLOAD_HEADER};

use super::{draft::Draft, error::HttpError, link::FileQuery};
use crate::{filesystem::metadata, server::App, users::User};

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Written {
    path: String,
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

impl Written {
    /// A file without words.
    #[must_use]
    pub fn plain(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self {
            path: path.display().to_string(),
            name: name.into_owned(),
            kind: "file",
            metadata: BTreeMap::new(),
        }
    }
}

/// Writes files.
///
/// # Errors
/// 400 for a bad form or path, 401, 507 when the disk is full.
pub async fn upload(
    State(app): State<App>,
    query: Result<Query<FileQuery>, QueryRejection>,
    request: Request,
) -> Result<Json<Vec<Written>>, HttpError> {
    let query = FileQuery::checked(query)?;
    let (parts, body) = request.into_parts();
    let headers = &parts.headers;
    let user = query.admit(&app, headers, "write")?;
    let target = Target {
        metadata: metadata::from_headers(headers).map_err(HttpError::bad_request)?,
        app: &app,
        query: &query,
        user: &user,
        whole: headers.contains_key(WHOLE_UPLOAD_HEADER),
    };
    let kind = text(headers, header::CONTENT_TYPE)
        .unwrap_or_default()
        .to_ascii_lowercase();
    let body = decoded(body, headers)?;
    if kind.starts_with("multipart/form-data") {
        write_form(&target, parts.clone(), body).await.map(Json)
    } else {
        if query.path.is_empty() {
            return Err(HttpError::bad_request(
                "the query needs a path for a body that is one file",
            ));
        }
        let path = query.resolve(&query.path, &app, &user)?;
        Ok(Json(vec![target.write(&path, body).await?]))
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// The body's bytes as they were before compression.
fn decoded(body: Body, headers: &HeaderMap) -> Result<Reader, HttpError> {
    let stream = body.into_data_stream().map_err(io::Error::other);
    let reader = StreamReader::new(stream);
    match text(headers, header::CONTENT_ENCODING)
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        None | Some("" | "identity") => Ok(Box::new(reader)),
        Some("gzip") => Ok(Box::new(GzipDecoder::new(reader))),
        Some(other) => Err(HttpError::bad_request(format!(
            "unsupported Content-Encoding '{other}'"
        ))),
    }
}

/// Each part named `file` is a file; others are passed over.
async fn write_form(
    target: &Target<'_>,
    parts: Parts,
    body: Reader,
) -> Result<Vec<Written>, HttpError> {
    let bad =
        |e: &dyn std::fmt::Display| HttpError::bad_request(format!("bad multipart form: {e}"));
    // The parts say what the boundary is, and that there is no limit.
    let body = Body::from_stream(tokio_util::io::ReaderStream::new(body));
    let plain = Request::from_parts(parts, body);
    let mut form = Multipart::from_request(plain, &())
        .await
        .map_err(|e| bad(&e))?;
    let mut written: Vec<Written> = Vec::new();
    while let Some(part) = form.next_field().await.map_err(|e| bad(&e.body_text()))? {
        if part.name() != Some("file") {
            continue;
        }
        let path = target.path_of_part(part.file_name())?;
        let shown = path.display().to_string();
        if written.iter().any(|w| w.path == shown) {
            return Err(HttpError::bad_request(format!(
                "'{shown}' is in the form twice"
            )));
        }
        let content = StreamReader::new(part.map_err(io::Error::other).boxed());
        written.push(target.write(&path, content).await?);
    }
    if written.is_empty() {
        return Err(HttpError::bad_request("the form has no part named 'file'"));
    }
    Ok(written)
}

struct Target<'a> {
    app: &'a App,
    query: &'a FileQuery,
    user: &'a User,
    metadata: BTreeMap<String, String>,
    /// A file takes its place when all of it is there.
    whole: bool,
}

impl Target<'_> {
    /// The query's path, or the part's whole file name, directories and all.
    fn path_of_part(&self, file_name: Option<&str>) -> Result<PathBuf, HttpError> {
        let path = match (self.query.path.as_str(), file_name) {
            ("", None | Some("")) => {
                return Err(HttpError::bad_request(
                    "neither the query nor the part names a path",
                ));
            }
            ("", Some(name)) => name,
            (path, _) => path,
        };
        self.query.resolve(path, self.app, self.user)
    }

    async fn write(
        &self,
        path: &Path,
        content: impl AsyncRead + Unpin,
    ) -> Result<Written, HttpError> {
        if self.whole {
            write_whole(path, self.user, content).await?;
        } else {
            make_parents(path, self.user).await?;
            let file = create(path, self.user).await?;
            copy(content, file, path).await?;
        }
        let stored =
            metadata::replace(path, &self.metadata).map_err(|e| HttpError::of_file(path, &e))?;
        let mut written = Written::plain(path);
        if stored {
            written.metadata.clone_from(&self.metadata);
        }
        Ok(written)
    }
}

async fn write_whole(
    path: &Path,
    user: &User,
    content: impl AsyncRead + Unpin,
) -> Result<(), HttpError> {
    let (place, owner) = (path.to_owned(), user.clone());
    let (draft, file) = blocking(path, move || Draft::begin(&place, &owner)).await?;
    copy(content, tokio::fs::File::from_std(file), path).await?;
    blocking(path, || draft.take_place()).await
}

async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, HttpError> + Send + 'static,
) -> Result<T, HttpError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|lost| Err(HttpError::of_file(path, &io::Error::other(lost))))
}

async fn make_parents(path: &Path, user: &User) -> Result<(), HttpError> {
    let parent = path.parent().unwrap_or(Path::new("/")).to_owned();
    let owner = user.clone();
    let made = tokio::task::spawn_blocking(move || {
        crate::filesystem::entry::make_directories(&parent, &owner)
    });
    match made.await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(HttpError::of_file(path, &error)),
        Err(error) => Err(HttpError::of_file(path, &io::Error::other(error))),
    }
}

/// Opens the file empty and owned by the user. What is there and not a regular file is refused: a pipe would block, a
/// device would be written to.
async fn create(path: &Path, user: &User) -> Result<tokio::fs::File, HttpError> {
    let (target, uid, gid) = (path.to_owned(), user.uid, user.gid);
    let opened = tokio::task::spawn_blocking(move || {
        let there = std::fs::metadata(&target);
        match &there {
            Ok(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(there) if !there.is_file() => {
                return Err(io::Error::new(
                    io::ErrorKind::NotADirectory,
                    "not a regular file",
                ));
            }
            _ => {}
        }
        let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
        let mut options = std::fs::OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(nonblocking);
        let file = options.open(&target)?;
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
        // Only now, as emptying it is writing; a new file is empty, and was not written yet.
        if there.is_ok() || file.metadata()?.len() > 0 {
            file.set_len(0)?;
        }
        Ok(file)
    });
    match opened.await {
        Ok(Ok(file)) => Ok(tokio::fs::File::from_std(file)),
        Ok(Err(error)) => Err(HttpError::of_file(path, &error)),
        Err(error) => Err(HttpError::of_file(path, &io::Error::other(error))),
    }
}

/// Copies in pieces of one size, so that a small file is one write.
async fn copy(
    mut content: impl AsyncRead + Unpin,
    mut file: tokio::fs::File,
    path: &Path,
) -> Result<(), HttpError> {
    file.set_max_buf_size(FILE_CHUNK_BYTES);
    let mut piece = Vec::with_capacity(FILE_CHUNK_BYTES);
    loop {
        piece.clear();
        let limit = u64::try_from(FILE_CHUNK_BYTES).unwrap_or(u64::MAX);
        let mut limited = (&mut content).take(limit);
        let read = limited.read_to_end(&mut piece).await;
        // A file in its place keeps what came before: the client knows that it broke off.
        let read =
            read.map_err(|e| HttpError::bad_request(format!("the upload broke off: {e}")))?;
        if read == 0 {
            break;
        }
        file.write_all(&piece)
            .await
            .map_err(|e| HttpError::of_file(path, &e))?;
    }
    // A write's error may come only now: tokio writes behind.
    file.flush().await.map_err(|e| HttpError::of_file(path, &e))
}
