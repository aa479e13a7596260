//! Process with guest memory, in place of a VMM.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::net::UnixStream},
    thread,
    time::Instant,
};

use wrenn_sys::{
    mapping::Mapping,
    scm,
    uffd::{Features, Uffd},
};

use crate::{
    Failure, process,
    source::{DATA_BYTES, MEMORY_BYTES, PAGE, first_word},
};

/// Part of guest memory that random pages come from.
pub(crate) const SPAN_PAGES: usize = (256 << 20) / PAGE;

/// Returns `count` page numbers in the order of an access.
pub(crate) fn pages(order: &str, count: usize) -> Vec<usize> {
    match order {
        "zeros" => (DATA_BYTES / PAGE..).take(count).collect(),
        "random" => {
            let mut pages: Vec<usize> = (0..SPAN_PAGES).collect();
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            for last in (1..SPAN_PAGES).rev() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let other = usize::try_from(state >> 33).unwrap_or(0) % (last + 1);
                pages.swap(last, other);
            }
            pages.truncate(count);
            pages
        }
        _ => (0..count).collect(),
    }
}

/// Memory of the VM. The userfaultfd stays open, as in a VMM.
struct Memory {
    mapping: Mapping,
    _uffd: Option<Uffd>,
}

pub(crate) fn run() -> Result<(), Failure> {
    let mut memory = None;
    process::serve(|words| match (words, &memory) {
        (["map", kind, path, socket], None) => {
            let mapped = map(kind, path, socket)?;
            let address = mapped.mapping.address().to_string();
            memory = Some(mapped);
            Ok(address)
        }
        (["touch", order, count, threads], Some(memory)) => {
            let pages = pages(order, count.parse()?);
            touch(&memory.mapping, &pages, threads.parse()?)
        }
        (["write", order, count], Some(memory)) => {
            write(&memory.mapping, &pages(order, count.parse()?))
        }
        _ => Err("unknown command".into()),
    })
}

fn map(kind: &str, path: &str, socket: &str) -> Result<Memory, Failure> {
    let mapping = match path {
        "-" => Mapping::anonymous(MEMORY_BYTES)?,
        _ => Mapping::private_of(File::open(path)?.as_fd(), MEMORY_BYTES)?,
    };
    if kind != "uffd" {
        return Ok(Memory {
            mapping,
            _uffd: None,
        });
    }
    let uffd = Uffd::open()?;
    let features = Features::MISSING_SHMEM.and(Features::EVENT_REMOVE);
    uffd.handshake(features, Features::NONE)?;
    let (address, len) = (mapping.address(), mapping.len());
    uffd.register_missing(address, len as u64)?;
    let regions = format!(
        r#"[{{"base_host_virt_addr":{address},"size":{len},"offset":0,"page_size":4096,"page_size_kib":4096}}]"#
    );
    let stream = UnixStream::connect(socket)?;
    scm::send(stream.as_fd(), regions.as_bytes(), &[uffd.as_fd()])?;
    Ok(Memory {
        mapping,
        _uffd: Some(uffd),
    })
}

/// Reads a word of each page and checks it. Returns the time in ns.
fn touch(memory: &Mapping, pages: &[usize], threads: usize) -> Result<String, Failure> {
    let all = |pages: &[usize]| {
        let is_right = |page: &usize| memory.load(page * PAGE) == Some(first_word(*page));
        pages.iter().all(is_right)
    };
    let begun = Instant::now();
    let is_right = if threads == 1 {
        all(pages)
    } else {
        thread::scope(|scope| {
            let parts = pages.chunks(pages.len().div_ceil(threads));
            let parts: Vec<_> = parts.map(|part| scope.spawn(|| all(part))).collect();
            parts.into_iter().all(|part| part.join().unwrap_or(false))
        })
    };
    let time = begun.elapsed();
    if !is_right {
        return Err("a page has wrong content".into());
    }
    Ok(time.as_nanos().to_string())
}

/// Writes a word of each page. Returns the time in ns.
fn write(memory: &Mapping, pages: &[usize]) -> Result<String, Failure> {
    let begun = Instant::now();
    for page in pages {
        memory.store(page * PAGE + 8, 1).ok_or("outside")?;
    }
    Ok(begun.elapsed().as_nanos().to_string())
}
