//! `wrenn sandbox cp`: copies one file to or from a sandbox.
//!
//! A download is written next to its destination and renamed, so a failed copy leaves an existing
//! file unchanged.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, bail};
use clap::Args;
use futures::TryStreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use wrenn_api_types::FilePath;
use wrenn_durable::Draft;
use wrenn_model::SandboxId;

use crate::{
    client::{Client, Upload},
    interrupt::Interrupts,
    output,
};

/// Arguments of `wrenn sandbox cp`.
#[derive(Debug, Args)]
#[command(
    after_help = "A path in a sandbox has the form ID:PATH, such as sb-1a2b3c4d:/root/data.csv; `-` is standard input or \
        output. A destination that ends in `/` keeps the file's name. To copy a directory, use tar:\n  \
        tar -cC DIR . | wrenn sandbox exec -i ID -- tar -xC /root/dir"
)]
pub(crate) struct CpArgs {
    /// Source: a local file, `-`, or ID:PATH
    from: Place,
    /// Destination: a local file or directory, `-`, or ID:PATH
    to: Place,
    /// User in the sandbox: owner of the file, and home directory of relative paths [default: the
    /// template's]
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,
}

impl CpArgs {
    /// Checks that exactly one path is in a sandbox.
    pub(crate) fn check(&self) -> Result<(), String> {
        match (&self.from, &self.to) {
            (Place::There(..), Place::There(..)) => {
                Err("both paths are in a sandbox; one of them must be a local file".to_owned())
            }
            (Place::There(..), _) | (_, Place::There(..)) => Ok(()),
            (from, to) => Err(format!(
                "neither `{from}` nor `{to}` is in a sandbox; a path in a sandbox has the form ID:PATH, such as sb-1a2b3c4d:/root/file"
            )),
        }
    }
}

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Standard input or output, written `-`.
    Standard,
    /// File on this machine.
    Local(PathBuf),
    /// File in a sandbox.
    There(SandboxId, String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "-" {
            return Ok(Self::Standard);
        }
        let there = s
            .split_once(':')
            .and_then(|(id, path)| Some((id.parse::<SandboxId>().ok()?, path)));
        match there {
            Some((id, "")) => Err(format!("missing path after `{id}:`")),
            Some((id, path)) => Ok(Self::There(id, path.to_owned())),
            None if s.is_empty() => Err("the path is empty".to_owned()),
            None => Ok(Self::Local(s.into())),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standard => f.write_str("-"),
            Self::Local(path) => path.display().fmt(f),
            Self::There(id, path) => write!(f, "{id}:{path}"),
        }
    }
}

/// Copies a file.
pub(crate) async fn run(client: &Client, args: CpArgs) -> anyhow::Result<i32> {
    let mut interrupts = Interrupts::new()?;
    let copy = async {
        match (args.from, args.to) {
            (Place::There(id, path), to) => download(client, &id, path, &to, args.user).await,
            (from, Place::There(id, path)) => upload(client, &from, &id, &path, args.user).await,
            // Rejected by `check`.
            _ => bail!("neither path is in a sandbox"),
        }
    };
    tokio::select! {
        done = copy => done.map(|()| 0),
        // Dropping the copy removes the partial file.
        interrupted = interrupts.recv() => Ok(interrupted.exit_code()),
    }
}

async fn upload(
    client: &Client,
    from: &Place,
    id: &SandboxId,
    path: &str,
    user: Option<String>,
) -> anyhow::Result<()> {
    let mut to = FilePath {
        path: path.to_owned(),
        user,
    };
    let Place::Local(local) = from else {
        if path.ends_with('/') {
            bail!(
                "`{path}` is a directory, but standard input has no file name to keep; give the path of a file"
            );
        }
        let bar = bar(None, path);
        let sent = client
            .upload(id, &to, sending(tokio::io::stdin(), None, &bar))
            .await;
        bar.finish_and_clear();
        return Ok(sent?);
    };
    let file = tokio::fs::File::open(local)
        .await
        .with_context(|| format!("failed to open {}", local.display()))?;
    let about = file.metadata().await?;
    if about.is_dir() {
        bail!(
            "{0} is a directory, but `cp` copies single files; use tar: tar -cC {0} . | wrenn sandbox exec -i {id} -- tar -xC {path}",
            local.display()
        );
    }
    if path.ends_with('/') {
        to.path.push_str(&name_of(local)?);
    }
    let len_bytes = about.is_file().then_some(about.len());
    let bar = bar(len_bytes, &to.path);
    let sent = client.upload(id, &to, sending(file, len_bytes, &bar)).await;
    bar.finish_and_clear();
    Ok(sent?)
}

fn sending<R>(reader: R, len_bytes: Option<u64>, bar: &ProgressBar) -> Upload<R> {
    let bar = bar.clone();
    Upload {
        reader,
        len_bytes,
        progress: Box::new(move |n| bar.inc(n)),
    }
}

fn name_of(path: &Path) -> anyhow::Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    Ok(name
        .with_context(|| format!("{} has no file name that can be used", path.display()))?
        .to_owned())
}

async fn download(
    client: &Client,
    id: &SandboxId,
    path: String,
    to: &Place,
    user: Option<String>,
) -> anyhow::Result<()> {
    let to = match to {
        Place::Local(local) => Some(destination(local, &path)?),
        _ => None,
    };
    let from = FilePath { path, user };
    let (len_bytes, chunks) = client.download(id, &from).await?;
    let bar = bar(len_bytes, &from.path);
    let result = receive(chunks, to.as_deref(), &bar).await;
    bar.finish_and_clear();
    result
}

async fn receive(
    chunks: impl futures::Stream<Item = Result<bytes::Bytes, crate::client::ClientError>>,
    to: Option<&Path>,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let Some(path) = to else {
        return pass(chunks, &mut tokio::io::stdout(), bar).await;
    };
    // A device or pipe is written to instead of replaced.
    if fs::metadata(path).is_ok_and(|about| !about.is_file()) {
        let mut out = tokio::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .await
            .with_context(|| format!("failed to write {}", path.display()))?;
        return pass(chunks, &mut out, bar).await;
    }
    // With the permissions of any new file.
    let mut draft =
        Draft::new(path, 0o666).with_context(|| format!("failed to write {}", path.display()))?;
    let mut out = tokio::fs::File::from_std(draft.file().try_clone()?);
    pass(chunks, &mut out, bar)
        .await
        .with_context(|| format!("failed to copy to {}", path.display()))?;
    draft
        .replace()
        .with_context(|| format!("failed to write {}", path.display()))?;
    Ok(())
}

async fn pass(
    chunks: impl futures::Stream<Item = Result<bytes::Bytes, crate::client::ClientError>>,
    out: &mut (impl AsyncWrite + Unpin),
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let mut chunks = std::pin::pin!(chunks);
    while let Some(chunk) = chunks.try_next().await? {
        out.write_all(&chunk).await?;
        bar.inc(chunk.len() as u64);
    }
    out.flush().await?;
    Ok(())
}

/// Returns the path of the file to write. In a directory, the file gets the name of the source.
fn destination(local: &Path, source: &str) -> anyhow::Result<PathBuf> {
    if local.is_dir() {
        return Ok(local.join(name_of(Path::new(source))?));
    }
    if local.as_os_str().as_encoded_bytes().ends_with(b"/") {
        bail!("{} is not a directory", local.display());
    }
    Ok(local.to_owned())
}

fn bar(len_bytes: Option<u64>, name: &str) -> ProgressBar {
    if !output::stderr_is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match len_bytes {
        Some(len) => (
            ProgressBar::new(len),
            "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        ),
        None => (
            ProgressBar::no_length(),
            "{msg} {spinner} {bytes} {bytes_per_sec}",
        ),
    };
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.with_style(style).with_message(output::printable(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(id: &str, path: &str) -> Place {
        Place::There(id.parse().expect("an id"), path.to_owned())
    }

    #[test]
    fn path_is_remote_only_with_an_id_before_the_colon() {
        for (text, expected) in [
            ("sb-1:/root/a", there("sb-1", "/root/a")),
            ("sb-1:a:b", there("sb-1", "a:b")),
            ("sb-1:~/a", there("sb-1", "~/a")),
            ("sb-1", Place::Local("sb-1".into())),
            ("./sb-1:a", Place::Local("./sb-1:a".into())),
            ("other:a", Place::Local("other:a".into())),
            ("sb-BIG:a", Place::Local("sb-BIG:a".into())),
            ("/tmp/a b", Place::Local("/tmp/a b".into())),
            ("-", Place::Standard),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        assert!("sb-1:".parse::<Place>().is_err());
        assert!("".parse::<Place>().is_err());
    }

    #[test]
    fn a_directory_keeps_the_name_of_the_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let to = |local: &Path, source| destination(local, source).map_err(|e| e.to_string());
        assert_eq!(to(dir.path(), "/root/x.csv"), Ok(dir.path().join("x.csv")));
        let file = dir.path().join("y");
        assert_eq!(to(&file, "/root/x.csv"), Ok(file));
        assert!(to(&dir.path().join("none/"), "/root/x.csv").is_err());
        assert!(to(dir.path(), "/").is_err());
    }

    #[tokio::test]
    async fn interrupted_copy_keeps_the_old_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        fs::write(&path, "old").expect("writable");
        let chunks = futures::stream::iter([
            Ok(bytes::Bytes::from_static(b"new")),
            Err(crate::client::ClientError::Stalled { seconds: 1 }),
        ]);
        let result = receive(chunks, Some(&path), &ProgressBar::hidden()).await;
        assert!(result.is_err());
        assert_eq!(fs::read_to_string(&path).expect("still there"), "old");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
    }

    #[tokio::test]
    async fn complete_copy_replaces_the_old_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        fs::write(&path, "old").expect("writable");
        let chunks = futures::stream::iter([Ok(bytes::Bytes::from_static(b"new"))]);
        receive(chunks, Some(&path), &ProgressBar::hidden())
            .await
            .expect("copied");
        assert_eq!(fs::read_to_string(&path).expect("there"), "new");
    }
}
