//! Reasons why a process was not started.

use std::{
    io,
    path::{Path, PathBuf},
};

use connectrpc::ConnectError;
use http::HeaderValue;
use rustix::io::Errno;
use wrenn_proto::headers::EXIT_CODE;
use wrenn_sys::spawn::SpawnError;

/// Exit codes that a shell reports for a program that does not exist, and for one that cannot be
/// executed.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Failure to start a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The request is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The user cannot work in the directory.
    #[error("{}", directory_problem(.path, .user, .source))]
    Directory {
        /// Directory.
        path: PathBuf,
        /// Name of the user.
        user: String,
        /// Cause.
        source: io::Error,
    },
    /// The program cannot be executed.
    #[error("error starting process: {program}: {source}")]
    Program {
        /// Name of the program.
        program: String,
        /// Cause.
        source: io::Error,
    },
    /// The program exists, but its interpreter or loader does not.
    #[error("error starting process: {program}: its interpreter does not exist")]
    Interpreter {
        /// Name of the program.
        program: String,
    },
    /// The process cannot be created.
    #[error("error starting process: {program}: {source}")]
    Spawn {
        /// Name of the program.
        program: String,
        /// Cause.
        source: io::Error,
    },
}

impl StartError {
    /// Converts the error of a process of `user` that was to run `program` in `directory`.
    pub(super) fn of(error: SpawnError, program: &str, directory: PathBuf, user: &str) -> Self {
        let program = program.to_owned();
        match error {
            SpawnError::NoDirectory(source) => Self::Directory {
                path: directory,
                user: user.to_owned(),
                source,
            },
            SpawnError::NoInterpreter(_) => Self::Interpreter { program },
            SpawnError::NoProgram(source) => Self::Program { program, source },
            other => Self::Spawn {
                program,
                source: other.into_io(),
            },
        }
    }

    /// Returns the exit code that a shell reports for the program, if the program is the reason.
    fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Program { source, .. } if is_exhaustion(source) => None,
            Self::Program { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some(NOT_FOUND)
            }
            Self::Program { .. } | Self::Interpreter { .. } => Some(NOT_EXECUTABLE),
            Self::Invalid(_) | Self::Directory { .. } | Self::Spawn { .. } => None,
        }
    }
}

impl From<StartError> for ConnectError {
    fn from(error: StartError) -> Self {
        let text = error.to_string();
        let code = error.exit_code();
        let mut converted = match error {
            // Memory, processes or descriptors are exhausted. The request itself is valid.
            StartError::Spawn { source, .. } | StartError::Program { source, .. }
                if is_exhaustion(&source) =>
            {
                Self::resource_exhausted(text)
            }
            _ => Self::invalid_argument(text),
        };
        if let Some(code) = code {
            let value = HeaderValue::from(u16::from(code));
            converted.trailers_mut().insert(EXIT_CODE, value);
        }
        converted
    }
}

fn is_exhaustion(error: &io::Error) -> bool {
    let all = [Errno::NOMEM, Errno::AGAIN, Errno::MFILE, Errno::NFILE];
    Errno::from_io_error(error).is_some_and(|errno| all.contains(&errno))
}

/// Describes a problem with a working directory. The first text is part of the contract.
fn directory_problem(path: &Path, user: &str, source: &io::Error) -> String {
    let path = path.display();
    match source.kind() {
        io::ErrorKind::NotFound => format!("cwd '{path}' does not exist"),
        io::ErrorKind::NotADirectory => format!("cwd '{path}' is not a directory"),
        io::ErrorKind::PermissionDenied => {
            format!("cwd '{path}' cannot be entered by user '{user}'")
        }
        _ => format!("cwd '{path}' cannot be entered: {source}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(error: SpawnError) -> (String, Option<u8>) {
        let error = StartError::of(error, "prog", "/dir".into(), "someone");
        (error.to_string(), error.exit_code())
    }

    fn errno(errno: Errno) -> io::Error {
        errno.into()
    }

    #[test]
    fn a_program_has_the_exit_code_of_a_shell() {
        let code = |number| of(SpawnError::NoProgram(errno(number))).1;
        assert_eq!(code(Errno::NOENT), Some(127));
        assert_eq!(code(Errno::ACCESS), Some(126));
        assert_eq!(code(Errno::TOOBIG), Some(126));
        assert_eq!(code(Errno::NOMEM), None);
        let (text, code) = of(SpawnError::NoInterpreter(errno(Errno::NOENT)));
        assert_eq!(code, Some(126));
        assert!(text.contains("prog: its interpreter"), "{text}");
        assert_eq!(of(SpawnError::NoProcess(errno(Errno::AGAIN))).1, None);
        let error = StartError::of(
            SpawnError::NoProgram(errno(Errno::NOENT)),
            "prog",
            "/".into(),
            "root",
        );
        let error = ConnectError::from(error);
        assert_eq!(error.trailers()[EXIT_CODE], "127");
    }

    #[test]
    fn a_directory_has_its_reason() {
        let text = |number| of(SpawnError::NoDirectory(errno(number)));
        let plain = |text: &str| (text.to_owned(), None);
        assert_eq!(text(Errno::NOENT), plain("cwd '/dir' does not exist"));
        assert_eq!(text(Errno::NOTDIR), plain("cwd '/dir' is not a directory"));
        assert_eq!(
            text(Errno::ACCESS),
            plain("cwd '/dir' cannot be entered by user 'someone'")
        );
        assert!(
            text(Errno::LOOP)
                .0
                .starts_with("cwd '/dir' cannot be entered: ")
        );
    }
}
