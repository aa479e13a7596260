//! Repeated scan of the kernel's socket tables, without allocations.
//!
//! The cost of a scan is the kernel's walk over its table of connections. The walk happens for each
//! table, even for an empty one, and grows with the machine's memory: microseconds in a guest of
//! half a gigabyte, a millisecond on a host of 24 GB. (`sock_diag(7)` would walk listeners only,
//! but needs a kernel module that a guest may not have.)

use std::{
    fs::File,
    io::{self, Seek as _},
};

use super::table::{Line, Listener, parse_line};

/// Size of the buffer. Lines are much shorter, and the kernel returns one page per read.
const BUFFER_BYTES: usize = 4096;

/// Socket tables, opened once.
#[derive(Debug)]
pub struct Scanner {
    tables: Vec<File>,
    buffer: Box<[u8]>,
}

impl Scanner {
    /// Opens the tables of the caller's network namespace. A kernel without IPv6 has only one
    /// table.
    ///
    /// # Errors
    /// Fails if there is no table.
    pub fn open() -> io::Result<Self> {
        let mut tables = vec![File::open("/proc/net/tcp")?];
        tables.extend(File::open("/proc/net/tcp6"));
        Ok(Self {
            tables,
            buffer: vec![0; BUFFER_BYTES].into(),
        })
    }

    /// Calls `each` for each current listener.
    ///
    /// # Errors
    /// Fails if a table cannot be read.
    pub fn scan(&mut self, mut each: impl FnMut(Listener)) -> io::Result<()> {
        for table in &mut self.tables {
            table.rewind()?;
            scan(table, &mut self.buffer, &mut each)?;
        }
        Ok(())
    }
}

/// Reads lines up to the first connection. Skips lines that do not fit into the buffer.
fn scan(
    table: &mut impl io::Read,
    buffer: &mut [u8],
    each: &mut impl FnMut(Listener),
) -> io::Result<()> {
    let mut filled = 0;
    loop {
        let read = table.read(&mut buffer[filled..])?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let mut begin = 0;
        while let Some(length) = buffer[begin..filled].iter().position(|b| *b == b'\n') {
            match parse_line(&buffer[begin..begin + length]) {
                Line::Listener(listener) => each(listener),
                Line::Connection => return Ok(()),
                Line::Other => {}
            }
            begin += length + 1;
        }
        if begin == 0 && filled == buffer.len() {
            begin = filled;
        }
        buffer.copy_within(begin..filled, 0);
        filled -= begin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reader that returns its bytes in pieces of one size.
    struct Pieces<'a>(&'a [u8], usize);

    impl io::Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.1.min(buffer.len()).min(self.0.len());
            self.0.read(&mut buffer[..length])
        }
    }

    fn ports(table: &[u8], piece: usize, room: usize) -> Vec<u16> {
        let mut ports = Vec::new();
        let mut buffer = vec![0; room];
        scan(&mut Pieces(table, piece), &mut buffer, &mut |listener| {
            ports.push(listener.port);
        })
        .expect("memory can be read");
        ports
    }

    fn table(listeners: u16, noise: &str) -> Vec<u8> {
        let mut table = format!("  sl local_address {noise}\n");
        for port in 1..=listeners {
            table.push_str(&format!(
                "  {port}: 0100007F:{port:04X} 0:0 0A 0:0 0:0 0 0 0 {port}5 1\n"
            ));
        }
        table.push_str("  9: 0100007F:0001 0:0 01 0:0 0:0 0 0 0 1 1\n");
        table.push_str("  9: 0100007F:FFFF 0:0 0A 0:0 0:0 0 0 0 1 1\n");
        table.into_bytes()
    }

    proptest! {
        #[test]
        fn however_it_is_cut_it_is_read_the_same(listeners in 0_u16..100, piece in 1_usize..300, room in 128_usize..300) {
            let wanted: Vec<u16> = (1..=listeners).collect();
            prop_assert_eq!(ports(&table(listeners, ""), piece, room), wanted);
        }

        #[test]
        fn any_bytes_come_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..2000), piece in 1_usize..300) {
            let _ = ports(&bytes, piece, 128);
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over() {
        let table = table(3, &"x".repeat(1000));
        assert_eq!(ports(&table, 50, 128), [1, 2, 3]);
    }

    #[test]
    fn a_table_can_be_read_again_and_again() {
        let mut scanner = Scanner::open().expect("there");
        let server = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bound");
        let port = server.local_addr().expect("bound").port();
        let mut seen = false;
        for _ in 0..2 {
            seen = false;
            scanner.scan(|one| seen |= one.port == port).expect("read");
        }
        assert!(seen);
        drop(server);
        scanner
            .scan(|one| assert_ne!(one.port, port))
            .expect("read");
    }
}
