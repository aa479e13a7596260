//! Faulting side of the tests: maps memory, sends its userfaultfd to a page server, and runs the
//! commands on standard input.
//!
//! One command per line, one reply per line. Any error ends the process, which the test sees as a
//! missing reply.

use std::{
    error::Error,
    fs::File,
    io::{BufRead as _, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    sync::Arc,
    thread,
};

use wrenn_sys::{
    mapping::Mapping,
    scm,
    uffd::{Features, Uffd},
};

const PAGE: usize = 4096;

type Failure = Box<dyn Error + Send + Sync>;

/// State of the faulting process. The process keeps the userfaultfd open, as a VMM does, so its
/// threads wait even if the page server exits.
struct Machine {
    memory: Arc<Mapping>,
    uffd: Option<Uffd>,
}

fn main() -> Result<(), Failure> {
    let mut lines = std::io::stdin().lock().lines();
    let first = lines.next().ok_or("no command")??;
    let memory = match first.split(' ').collect::<Vec<_>>()[..] {
        ["anonymous", len] => Mapping::anonymous(len.parse()?)?,
        ["private", path, len] => Mapping::private_of(File::open(path)?.as_fd(), len.parse()?)?,
        _ => return Err("unknown mapping".into()),
    };
    let mut machine = Machine {
        memory: Arc::new(memory),
        uffd: None,
    };
    reply(&machine.memory.address().to_string())?;
    for line in lines {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        if let Some(answer) = machine.command(&words)? {
            reply(&answer)?;
        }
    }
    Ok(())
}

fn reply(text: &str) -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{text}")?;
    Ok(output.flush()?)
}

impl Machine {
    fn command(&mut self, words: &[&str]) -> Result<Option<String>, Failure> {
        let memory = Arc::clone(&self.memory);
        let answer = match *words {
            ["connect", socket] => {
                self.connect(socket, Features::MISSING_SHMEM.and(Features::EVENT_REMOVE))?;
                "ok".to_owned()
            }
            // As the library in QEMU does: the page server is not told what is discarded.
            ["connect-quietly", socket] => {
                self.connect(socket, Features::MISSING_SHMEM)?;
                "ok".to_owned()
            }
            ["load", offset] => value(memory.load(offset.parse()?))?,
            ["store", offset, value] => {
                memory
                    .store(offset.parse()?, value.parse()?)
                    .ok_or("outside")?;
                "ok".to_owned()
            }
            ["discard", offset, len] => {
                memory.discard(offset.parse()?, len.parse()?)?;
                "ok".to_owned()
            }
            // As the library in QEMU discards memory.
            ["zero", offset, len] => {
                let (offset, len): (usize, usize) = (offset.parse()?, len.parse()?);
                memory.discard(offset, len)?;
                let uffd = self.uffd.as_ref().ok_or("not connected")?;
                uffd.zero(memory.address() + offset as u64, len as u64)?;
                "ok".to_owned()
            }
            ["checksum", offset, len] => {
                checksum(&memory, offset.parse()?, len.parse()?)?.to_string()
            }
            // Like `load` and `discard`, but each runs in its own thread, which replies when it is
            // done.
            ["later", "load", offset] => {
                let offset = offset.parse()?;
                thread::spawn(move || reply(&value(memory.load(offset))?));
                return Ok(None);
            }
            ["later", "discard", offset, len] => {
                let (offset, len) = (offset.parse()?, len.parse()?);
                thread::spawn(move || {
                    memory.discard(offset, len)?;
                    reply("discarded")
                });
                return Ok(None);
            }
            ["touch", threads] => {
                touch(&memory, threads.parse()?)?;
                "touched".to_owned()
            }
            _ => return Err("unknown command".into()),
        };
        Ok(Some(answer))
    }

    fn connect(&mut self, socket: &str, features: Features) -> Result<(), Failure> {
        let uffd = Uffd::open()?;
        uffd.handshake(features, Features::NONE)?;
        let (address, len) = (self.memory.address(), self.memory.len() as u64);
        uffd.register_missing(address, len)?;
        let half = len / 2 / 4096 * 4096;
        // Sends two regions, the second one first, as a VMM with a hole in its memory may do.
        let json = format!(
            r#"[{{"base_host_virt_addr":{},"size":{},"offset":{half},"page_size":4096,"page_size_kib":4096}},{{"base_host_virt_addr":{address},"size":{half},"offset":0,"page_size":4096,"page_size_kib":4096}}]"#,
            address + half,
            len - half,
        );
        let stream = UnixStream::connect(socket)?;
        scm::send(stream.as_fd(), json.as_bytes(), &[uffd.as_fd()])?;
        self.uffd = Some(uffd);
        Ok(())
    }
}

fn value(loaded: Option<u64>) -> Result<String, Failure> {
    Ok(loaded.ok_or("outside")?.to_string())
}

/// FNV-1a over 8-byte values.
fn checksum(memory: &Mapping, offset: usize, len: usize) -> Result<u64, Failure> {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for at in (offset..offset + len).step_by(8) {
        let word = memory.load(at).ok_or("outside")?;
        sum = (sum ^ word).wrapping_mul(0x0100_0000_01b3);
    }
    Ok(sum)
}

/// Reads every page. Thread i of n reads the pages with page % n == i.
fn touch(memory: &Arc<Mapping>, threads: usize) -> Result<(), Failure> {
    let spawn = |first: usize| {
        let memory = Arc::clone(memory);
        thread::spawn(move || {
            let offsets = (first * PAGE..memory.len()).step_by(threads * PAGE);
            offsets
                .map(|offset| memory.load(offset))
                .all(|word| word.is_some())
        })
    };
    let running: Vec<_> = (0..threads).map(spawn).collect();
    for thread in running {
        if !thread.join().map_err(|_| "a thread panicked")? {
            return Err("outside".into());
        }
    }
    Ok(())
}
