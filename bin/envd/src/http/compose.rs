//! `POST /files/compose`: concatenates several files into one.
//!
//! The parts are copied in order to a draft of the destination. After the draft has replaced the
//! destination, the parts are removed. If a part cannot be read or the draft cannot be written, the
//! parts and the destination stay unchanged.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use axum::{Json, extract::State, extract::rejection::JsonRejection};
use serde::Deserialize;

use super::{
    draft::{Draft, refuse_irregular},
    link,
    upload::Written,
};
use crate::{app::App, http_error::HttpError, users::User};

/// Maximum number of parts of one file.
const MAX_PARTS: usize = 10_000;

/// Body of `/files/compose`.
#[derive(Debug, Deserialize)]
pub struct Compose {
    /// Paths of the parts, in order.
    source_paths: Vec<String>,
    /// Path of the resulting file.
    destination: String,
    /// User whose home directory and ownership apply.
    #[serde(default)]
    username: Option<String>,
}

/// Concatenates files.
///
/// # Errors
/// 400 if there are no parts or a part is not a regular file, 401 for an unknown user, 404 if a
/// part does not exist, 507 if the disk is full.
pub async fn compose(
    State(app): State<App>,
    request: Result<Json<Compose>, JsonRejection>,
) -> Result<Json<Written>, HttpError> {
    let Json(request) = request.map_err(|e| HttpError::bad_request(e.body_text()))?;
    if request.source_paths.is_empty() || request.source_paths.len() > MAX_PARTS {
        let problem = format!("`source_paths` must contain 1 to {MAX_PARTS} paths");
        return Err(HttpError::bad_request(problem));
    }
    if request.destination.is_empty() {
        return Err(HttpError::bad_request("`destination` must not be empty"));
    }
    let user = link::user_of(&app, request.username.as_deref())?;
    let destination = link::resolve(&request.destination, &app, &user)?;
    let parts = request.source_paths.iter();
    let parts: Vec<PathBuf> = parts
        .map(|path| link::resolve(path, &app, &user))
        .collect::<Result<_, _>>()?;
    let done = tokio::task::spawn_blocking(move || {
        put_together(&parts, &destination, &user)?;
        Ok(Written::plain(&destination))
    });
    done.await
        .unwrap_or_else(|lost| {
            let status = http::StatusCode::INTERNAL_SERVER_ERROR;
            Err(HttpError::new(status, lost.to_string()))
        })
        .map(Json)
}

fn put_together(parts: &[PathBuf], destination: &Path, user: &User) -> Result<(), HttpError> {
    let at = |path: &Path, error: &io::Error| HttpError::of_file(path, error);
    for part in parts {
        // The parts are opened one at a time. This only checks that all of them exist.
        let there = fs::metadata(part).map_err(|e| at(part, &e))?;
        refuse_irregular(part, &there)?;
    }
    let (draft, file) = Draft::begin(destination, user)?;
    append(parts, file)?;
    let destination = draft.place().to_owned();
    draft.take_place()?;
    for part in parts {
        if fs::canonicalize(part).is_ok_and(|real| real == destination) {
            continue;
        }
        match fs::remove_file(part) {
            // The part was listed twice or was removed by another process.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(part, &error)),
            _ => {}
        }
    }
    Ok(())
}

fn append(parts: &[PathBuf], mut file: File) -> Result<(), HttpError> {
    for part in parts {
        let mut source = open_regular(part)?;
        // The kernel copies the data, or shares the blocks where it can.
        io::copy(&mut source, &mut file).map_err(|e| HttpError::of_file(part, &e))?;
    }
    Ok(())
}

/// Opens a regular file without blocking. The path may have become a pipe in the meantime, and
/// opening a pipe would wait for a writer.
fn open_regular(path: &Path) -> Result<File, HttpError> {
    let failed = |error: io::Error| HttpError::of_file(path, &error);
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(nonblocking)
        .open(path)
        .map_err(failed)?;
    refuse_irregular(path, &file.metadata().map_err(failed)?)?;
    Ok(file)
}
