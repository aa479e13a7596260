//! Measurements of one way in one round.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
    sync::Arc,
    time::Instant,
};

use wrenn_pager::{MemorySource as _, dirty};

use crate::{
    Failure,
    instance::{Instance, Pages, Vm, Way},
    source::{ChainSource, DATA_BYTES, Files, MEMORY_BYTES, PAGE},
    table::Table,
    vm::SPAN_PAGES,
};

/// Accesses at random, if the content is cached.
const RANDOM: Pages = Pages("random", 16_384);
/// Accesses at random, if it is not.
const RANDOM_COLD: Pages = Pages("random", 4096);
const SEQUENTIAL: Pages = Pages("sequential", SPAN_PAGES);
const ZEROS: Pages = Pages("zeros", 16_384);
/// Use of memory: pages touched, and pages of those that are written.
const TOUCHED: Pages = Pages("sequential", (64 << 20) / PAGE);
const WRITTEN: Pages = Pages("sequential", (8 << 20) / PAGE);
const VMS: usize = 4;
const MIB: f64 = (1 << 20) as f64;

/// Results of one way.
pub(crate) struct Measure<'a> {
    pub(crate) way: Way,
    pub(crate) files: &'a Files,
    pub(crate) table: &'a mut Table,
}

impl Measure<'_> {
    fn add(&mut self, what: &'static str, value: f64) {
        self.table.add(what, self.way.name(), value);
    }

    fn open(&self, cached: bool) -> Result<Instance, Failure> {
        self.files.set_cached(cached)?;
        Instance::open(self.way, self.files)
    }

    pub(crate) fn run(&mut self) -> Result<(), Failure> {
        self.random()?;
        self.sequential()?;
        self.cold()?;
        self.zeros()?;
        self.write()?;
        self.complete()?;
        self.memory()
    }

    fn random(&mut self) -> Result<(), Failure> {
        let mut instance = self.open(true)?;
        let mut first = instance.start_vm(RANDOM)?;
        self.add("ready, first VM, ms", ms(instance.opened + first.ready));
        let before = (instance.usage()?, first.process.usage()?);
        let time = first.touch(RANDOM, 1)?;
        let (server, vm) = (instance.usage()?, first.process.usage()?);
        let (server, vm) = (server.since(before.0), vm.since(before.1));
        let pages = RANDOM.1 as f64;
        self.add("first touch at random, µs per page", time / pages);
        self.add(
            "– CPU time of the server, µs per page",
            server.cpu_us / pages,
        );
        self.add("– CPU time of the VM, µs per page", vm.cpu_us / pages);
        self.add("– faults per 100 pages", vm.faults / pages * 100.0);
        let mut second = instance.start_vm(RANDOM)?;
        self.add("ready, second VM, ms", ms(second.ready));
        let time = second.touch(RANDOM, 1)?;
        self.add("touch at random, second VM, µs per page", time / pages);
        Ok(())
    }

    fn sequential(&mut self) -> Result<(), Failure> {
        let pages = SEQUENTIAL.1 as f64;
        let mut instance = self.open(true)?;
        let mut first = instance.start_vm(SEQUENTIAL)?;
        let before = (instance.usage()?, first.process.usage()?);
        let time = first.touch(SEQUENTIAL, 1)?;
        let (server, vm) = (instance.usage()?, first.process.usage()?);
        let (server, vm) = (server.since(before.0), vm.since(before.1));
        self.add("first touch in order, µs per page", time / pages);
        self.add(
            "– CPU time of the server, in order, µs per page",
            server.cpu_us / pages,
        );
        self.add(
            "– CPU time of the VM, in order, µs per page",
            vm.cpu_us / pages,
        );
        self.add(
            "– faults per 100 pages, in order",
            vm.faults / pages * 100.0,
        );
        self.add("touching 256 MiB, MiB/s", rate(time));
        let mut second = instance.start_vm(SEQUENTIAL)?;
        let time = second.touch(SEQUENTIAL, 1)?;
        self.add("touching 256 MiB, second VM, MiB/s", rate(time));
        drop((first, second, instance));
        let mut instance = self.open(true)?;
        let mut vm = instance.start_vm(SEQUENTIAL)?;
        let time = vm.touch(SEQUENTIAL, 2)?;
        self.add("touching 256 MiB, 2 threads, MiB/s", rate(time));
        Ok(())
    }

    fn cold(&mut self) -> Result<(), Failure> {
        let mut instance = self.open(false)?;
        let mut vm = instance.start_vm(RANDOM_COLD)?;
        let time = vm.touch(RANDOM_COLD, 1)?;
        self.add(
            "cold: touch at random, µs per page",
            time / RANDOM_COLD.1 as f64,
        );
        drop((vm, instance));
        let mut instance = self.open(false)?;
        let mut vm = instance.start_vm(SEQUENTIAL)?;
        let time = vm.touch(SEQUENTIAL, 1)?;
        self.add("cold: touching 256 MiB, MiB/s", rate(time));
        Ok(())
    }

    fn zeros(&mut self) -> Result<(), Failure> {
        let mut instance = self.open(true)?;
        let mut vm = instance.start_vm(ZEROS)?;
        let time = vm.touch(ZEROS, 1)?;
        self.add(
            "pages of zeros in order, µs per page",
            time / ZEROS.1 as f64,
        );
        Ok(())
    }

    fn write(&mut self) -> Result<(), Failure> {
        let mut instance = self.open(true)?;
        let mut vm = instance.start_vm(RANDOM)?;
        let time = vm.write(RANDOM)? / RANDOM.1 as f64;
        self.add("first write to a new page at random, µs per page", time);
        Ok(())
    }

    /// Loads all of the memory before it is used.
    fn complete(&mut self) -> Result<(), Failure> {
        const LOAD: &str = "complete load, cached source, ms";
        let mut instance = self.open(true)?;
        let begun = Instant::now();
        let mut vm = match self.way {
            Way::Uffd | Way::Prefetch | Way::Shared => {
                let vm = instance.start_vm_with(Pages("all", 0))?;
                instance.wait_prefetched()?;
                self.add(LOAD, ms(begun.elapsed()));
                vm
            }
            Way::File => {
                let file = write_complete(self.files, &self.files.dir.join("copy"))?;
                self.add(LOAD, ms(begun.elapsed()));
                file.sync_all()?;
                self.add("complete load with fsync, ms", ms(begun.elapsed()));
                fs::remove_file(self.files.dir.join("copy"))?;
                instance.start_vm(SEQUENTIAL)?
            }
            Way::Fuse | Way::FusePage => {
                read_all(Path::new(&instance.path))?;
                self.add(LOAD, ms(begun.elapsed()));
                instance.start_vm(SEQUENTIAL)?
            }
        };
        let time = vm.touch(SEQUENTIAL, 1)?;
        self.add("– touching 256 MiB afterwards, MiB/s", rate(time));
        Ok(())
    }

    fn memory(&mut self) -> Result<(), Failure> {
        let mut instance = self.open(false)?;
        let mut vms = Vec::new();
        for count in 1..=VMS {
            let mut vm = instance.start_vm(TOUCHED)?;
            vm.touch(TOUCHED, 1)?;
            let time = vm.write(WRITTEN)?;
            vms.push(vm);
            if count == 1 {
                self.add(
                    "first write to a touched page, µs per page",
                    time / WRITTEN.1 as f64,
                );
                let (private, proportional) = memory_of(&vms)?;
                self.add("1 VM: private memory, MiB", private);
                self.add("1 VM: proportional memory (PSS), MiB", proportional);
            }
        }
        let (private, proportional) = memory_of(&vms)?;
        self.add("4 VMs: private memory of each, MiB", private);
        self.add(
            "4 VMs: proportional memory (PSS) of each, MiB",
            proportional,
        );
        let cached = match instance.path.as_str() {
            "-" => 0.0,
            path => cached_mib(Path::new(path))?,
        };
        self.add("4 VMs: memory of the mapped file, MiB", cached);
        let chain = self.files.chain();
        let cached: f64 = chain
            .iter()
            .map(|path| cached_mib(path))
            .sum::<Result<_, _>>()?;
        self.add("4 VMs: page cache of the source, MiB", cached);
        let vm = vms.last().ok_or("no VM")?;
        let begun = Instant::now();
        let runs = dirty::scan(vm.process.pid(), vm.address, MEMORY_BYTES as u64)?;
        self.add("scan of the page tables, ms", ms(begun.elapsed()));
        let found: u64 = runs.iter().map(|run| run.len / PAGE as u64).sum();
        self.add("– pages found as changed, of 2048", found as f64);
        Ok(())
    }
}

/// Writes all of the memory to a file. Zeros are holes.
pub(crate) fn write_complete(files: &Files, path: &Path) -> Result<File, Failure> {
    let source = ChainSource::open(&files.dir, Arc::default())?;
    let file = File::create(path)?;
    file.set_len(MEMORY_BYTES as u64)?;
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < DATA_BYTES as u64 {
        source.read_at(offset, &mut buffer)?;
        file.write_all_at(&buffer, offset)?;
        offset += buffer.len() as u64;
    }
    Ok(file)
}

fn read_all(path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Returns the mean private and proportional size of guest memory, in MiB.
fn memory_of(vms: &[Vm]) -> Result<(f64, f64), Failure> {
    let (mut private, mut proportional) = (0.0, 0.0);
    for vm in vms {
        let text = fs::read_to_string(format!("/proc/{}/smaps", vm.process.pid()))?;
        let mut is_inside = false;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            if let Some((start, _)) = name.split_once('-') {
                let start = u64::from_str_radix(start, 16)?;
                is_inside = (vm.address..vm.address + MEMORY_BYTES as u64).contains(&start);
            }
            match name {
                _ if !is_inside => {}
                "Private_Clean:" | "Private_Dirty:" => private += value.parse::<f64>()?,
                "Pss:" => proportional += value.parse::<f64>()?,
                _ => {}
            }
        }
    }
    let kib = 1024.0 * vms.len() as f64;
    Ok((private / kib, proportional / kib))
}

/// Returns how much of a file is in memory.
fn cached_mib(path: &Path) -> Result<f64, Failure> {
    let output = Command::new("fincore")
        .args(["--noheadings", "--bytes", "--output", "RES"])
        .arg(path)
        .output()?;
    let bytes: f64 = String::from_utf8(output.stdout)?.trim().parse()?;
    Ok(bytes / MIB)
}

fn ms(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Returns the rate of touching 256 MiB in a number of µs, in MiB/s.
fn rate(us: f64) -> f64 {
    (SPAN_PAGES * PAGE) as f64 / MIB / us * 1e6
}
