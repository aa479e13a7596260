//! `POST /files/compose`: several files become one.
//!
//! The parts are copied, one after the other, to a new file beside the destination, which then takes its place: whoever
//! looks sees the old one or the whole new one. Only then are the parts removed. If something fails, all is as it was.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use axum::{Json, extract::State, extract::rejection::JsonRejection};
use serde::Deserialize;

use super::{error::HttpError, link, upload::Written};
use crate::{filesystem::entry, server::App, users::User};

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
    if let Ok(there) = fs::metadata(destination) {
        refuse_irregular(destination, &there)?;
    }
    // A link at the destination stays one, as with an upload.
    let destination = fs::canonicalize(destination).unwrap_or_else(|_| destination.to_owned());
    let parent = destination.parent().unwrap_or(Path::new("/"));
    entry::make_directories(parent, user).map_err(|e| at(&destination, &e))?;
    let draft = parent.join(draft_name());
    let written = write_draft(parts, &draft, user)
        .and_then(|()| fs::rename(&draft, &destination).map_err(|e| at(&destination, &e)));
    if let Err(error) = written {
        // It may not have come to be.
        let _ = fs::remove_file(&draft);
        return Err(error);
    }
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

fn write_draft(parts: &[PathBuf], draft: &Path, user: &User) -> Result<(), HttpError> {
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o644);
    let mut file = options
        .open(draft)
        .map_err(|e| HttpError::of_file(draft, &e))?;
    fchown(&file, Some(user.uid), Some(user.gid)).map_err(|e| HttpError::of_file(draft, &e))?;
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

/// 400 for what is not a regular file.
///
/// # Errors
/// As said.
pub fn refuse_irregular(path: &Path, metadata: &Metadata) -> Result<(), HttpError> {
    let path = path.display();
    if metadata.is_dir() {
        return Err(HttpError::bad_request(format!(
            "path '{path}' is a directory"
        )));
    }
    if !metadata.is_file() {
        return Err(HttpError::bad_request(format!(
            "path '{path}' is not a regular file"
        )));
    }
    Ok(())
}

/// A name that nobody else uses.
fn draft_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".envd-compose-{}-{number}", std::process::id())
}
