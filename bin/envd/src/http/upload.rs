//! `POST /files`: receives files in a multipart form, or one file as the raw body, optionally
//! gzipped.
//!
//! The events that watchers see are part of the contract: the file is created, gets its owner, and
//! is then written. The host agent requests a stronger guarantee: an aborted upload leaves the old
//! file ([`Draft`]).

use std::{
    collections::{BTreeMap, HashSet},
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
use wrenn_model::limits::FILE_CHUNK_BYTES;
use wrenn_proto::headers::WHOLE_UPLOAD as WHOLE_UPLOAD_HEADER;

use super::{draft::Draft, link::FileQuery};
use crate::{
    app::App,
    filesystem::{metadata, mount},
    http_error::HttpError,
    users::User,
};

/// File that was written.
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
    /// Describes a file without metadata.
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
/// 400 for an invalid form or path, 401, 507 if the disk is full.
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
                "a raw body requires `path` in the query",
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

/// Returns a reader of the uncompressed body.
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

/// Writes each part named `file` as a file. Ignores other parts.
async fn write_form(
    target: &Target<'_>,
    parts: Parts,
    body: Reader,
) -> Result<Vec<Written>, HttpError> {
    let bad =
        |e: &dyn std::fmt::Display| HttpError::bad_request(format!("invalid multipart form: {e}"));
    // The headers in `parts` contain the boundary, and the extensions in `parts` the absence of a
    // limit.
    let body = Body::from_stream(tokio_util::io::ReaderStream::new(body));
    let plain = Request::from_parts(parts, body);
    let mut form = Multipart::from_request(plain, &())
        .await
        .map_err(|e| bad(&e))?;
    let mut written: Vec<Written> = Vec::new();
    // A form may have many thousands of files, so their paths are not compared one by one.
    let mut paths = HashSet::new();
    while let Some(part) = form.next_field().await.map_err(|e| bad(&e.body_text()))? {
        if part.name() != Some("file") {
            continue;
        }
        let path = target.path_of_part(part.file_name())?;
        if !paths.insert(path.clone()) {
            let path = path.display();
            return Err(HttpError::bad_request(format!(
                "path '{path}' occurs more than once in the form"
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
    /// True if a file replaces its destination only when it is complete.
    whole: bool,
}

impl Target<'_> {
    /// Returns the path in the query, or the part's whole file name including directories.
    fn path_of_part(&self, file_name: Option<&str>) -> Result<PathBuf, HttpError> {
        let path = match (self.query.path.as_str(), file_name) {
            ("", None | Some("")) => {
                return Err(HttpError::bad_request(
                    "neither the query nor the form part contains a path",
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

/// Opens the file empty and owned by the user. Rejects an existing entry that is not a regular
/// file: a pipe would block, and a device would be written to.
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
        // A value of the kernel stays the kernel's, even where it could have an owner.
        if !mount::is_kernel(&target) {
            let owned = std::os::unix::fs::fchown(&file, Some(uid), Some(gid));
            mount::tolerate(owned, &file)?;
        }
        // Truncated only now, because truncation counts as a write. A new file is empty and was not
        // written yet.
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

/// Copies in chunks of one size, so that a small file is one write.
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
        // A file written in place keeps the data received so far. The client knows that the upload
        // was aborted.
        let read = read
            .map_err(|e| HttpError::bad_request(format!("failed to read the request body: {e}")))?;
        if read == 0 {
            break;
        }
        file.write_all(&piece)
            .await
            .map_err(|e| HttpError::of_file(path, &e))?;
    }
    // A write error may be reported only here, because tokio writes in the background.
    file.flush().await.map_err(|e| HttpError::of_file(path, &e))
}
