//! `POST /files/compose`: several files become one.
//!
//! The parts are copied, one after the other, to a draft of the destination. When that has taken its place, the parts are
//! removed. If something fails, all is as it was.

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
    error::HttpError,
    link,
    upload::Written,
};
use crate::{server::App, users::User};

/// Parts of one file, at most.
const MAX_PARTS: usize = 10_000;

/// Body of `/files/compose`.
#[derive(Debug, Deserialize)]
pub struct Compose {
    /// The parts, in their order.
    source_paths: Vec<String>,
    /// The file that they become.
    destination: String,
    /// User whose home and ownership count.
    #[serde(default)]
    username: Option<String>,
}

/// Puts files together.
///
/// # Errors
/// 400 for no parts or what is not a regular file, 401 for an unknown user, 404 for a part that is not there, 507.
pub async fn compose(
    State(app): State<App>,
    request: Result<Json<Compose>, JsonRejection>,
) -> Result<Json<Written>, HttpError> {
    let Json(request) = request.map_err(|e| HttpError::bad_request(e.body_text()))?;
    if request.source_paths.is_empty() || request.source_paths.len() > MAX_PARTS {
        let problem = format!("source_paths: 1 to {MAX_PARTS} paths");
        return Err(HttpError::bad_request(problem));
    }
    if request.destination.is_empty() {
        return Err(HttpError::bad_request("destination: must not be empty"));
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
        // One is opened at a time; this only asks whether all are there.
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
            // Named twice, or removed by another.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(part, &error)),
            _ => {}
        }
    }
    Ok(())
}

fn append(parts: &[PathBuf], mut file: File) -> Result<(), HttpError> {
    for part in parts {
        let mut source = open_regular(part)?;
        // The kernel copies, or shares the blocks where it can.
        io::copy(&mut source, &mut file).map_err(|e| HttpError::of_file(part, &e))?;
    }
    Ok(())
}

/// Not blocking: what was a file may have become a pipe, whose open would wait for a writer.
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
