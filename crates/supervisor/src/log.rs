//! Log of a supervisor: JSON lines in the sandbox's directory, in at most two files of bounded
//! size.
//!
//! Every line has the field `sandbox_id`, also those of threads and tasks outside of any span. A
//! full `supervisor.log` replaces `supervisor.log.1`, and a new one is begun.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use wrenn_proto::supervise::{MAX_LOG_BYTES, files};

/// Writer of the log. Each call of [`Write::write`] takes one line: a JSON object with a line feed.
#[derive(Debug)]
pub struct SupervisorLog {
    path: PathBuf,
    file: fs::File,
    len: u64,
    /// Beginning of every line.
    prefix: String,
}

impl SupervisorLog {
    /// Opens the log in the directory of a sandbox, whose name is the id of the sandbox. Lines of
    /// earlier supervisors are kept.
    ///
    /// # Errors
    /// Fails if the file cannot be opened.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let id = dir.file_name().unwrap_or_default().to_string_lossy();
        let id = serde_json::to_string(&id)?;
        let path = dir.join(files::LOG);
        let file = open(&path)?;
        Ok(Self {
            len: file.metadata()?.len(),
            path,
            file,
            prefix: format!("{{\"sandbox_id\":{id},"),
        })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        // Another output, such as that of a panic, is kept as it is.
        let line = match line.strip_prefix(b"{") {
            Some(rest) => [self.prefix.as_bytes(), rest].concat(),
            None => line.to_vec(),
        };
        let bytes = line.len() as u64;
        if self.len > 0 && self.len + bytes > MAX_LOG_BYTES {
            fs::rename(&self.path, self.path.with_file_name(files::OLD_LOG))?;
            self.file = open(&self.path)?;
            self.len = 0;
        }
        self.file.write_all(&line)?;
        self.len += bytes;
        Ok(())
    }
}

impl Write for SupervisorLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.append(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<fs::File> {
    fs::File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(path).expect("readable");
        let parse = |line| serde_json::from_str(line).expect("JSON");
        text.lines().map(parse).collect()
    }

    #[test]
    fn every_line_names_the_sandbox_and_earlier_lines_are_kept() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let dir = dir.path().join("sb-1");
        fs::create_dir(&dir).expect("created");
        for n in 0..2 {
            let mut log = SupervisorLog::open(&dir).expect("opened");
            writeln!(log, "{{\"n\":{n}}}").expect("written");
        }
        let lines = lines(&dir.join(files::LOG));
        let expected = |n| serde_json::json!({ "sandbox_id": "sb-1", "n": n });
        assert_eq!(lines, [expected(0), expected(1)]);
    }

    #[test]
    fn log_is_bounded_and_has_the_newest_lines() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut log = SupervisorLog::open(dir.path()).expect("opened");
        let padding = "x".repeat(1000);
        let count = 4 * MAX_LOG_BYTES / 1000;
        for n in 0..count {
            let line = format!("{{\"n\":{n},\"padding\":\"{padding}\"}}\n");
            log.write_all(line.as_bytes()).expect("written");
        }
        let (old, new) = (dir.path().join(files::OLD_LOG), dir.path().join(files::LOG));
        for path in [&old, &new] {
            let len = fs::metadata(path).expect("there").len();
            assert!(len <= MAX_LOG_BYTES, "{len}");
        }
        let kept: Vec<_> = lines(&old).into_iter().chain(lines(&new)).collect();
        let numbers = kept
            .iter()
            .map(|line| line["n"].as_u64().expect("a number"));
        let numbers: Vec<_> = numbers.collect();
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert_eq!(numbers.last(), Some(&(count - 1)));
    }
}
