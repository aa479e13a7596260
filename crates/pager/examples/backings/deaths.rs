//! Effects of a server or source that fails, on a VM that runs.

use std::{fs::File, time::Duration};

use crate::{
    Failure,
    instance::{Instance, Pages, Vm, Way},
    process::{Effect, describe},
    source::{Files, PAGE},
    table::Table,
};

/// Pages that are loaded before the failure.
const LOADED: Pages = Pages("sequential", 16);
/// All data, most of which is not loaded.
const NEW: Pages = Pages("sequential", 65_536);
/// Time after which a VM counts as waiting.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn run(way: Way, files: &Files, table: &mut Table) -> Result<(), Failure> {
    files.set_cached(true)?;
    let mut note = |what, text| table.note(what, way.name(), text);
    if way == Way::File {
        note("file truncated, new page", truncated(files)?);
        return Ok(());
    }
    let (mut instance, mut vm) = start(way, files)?;
    let server = instance.server.as_mut().ok_or("no server")?;
    server.kill(PATIENCE)?;
    note("server killed, loaded page", effect(&mut vm, LOADED)?);
    note("server killed, new page", effect(&mut vm, NEW)?);
    drop((vm, instance));
    let (mut instance, mut vm) = start(way, files)?;
    let server = instance.server.as_mut().ok_or("no server")?;
    server.ask("fail")?;
    note("source fails, new page", effect(&mut vm, NEW)?);
    drop((vm, instance));
    let (mut instance, mut vm) = start(way, files)?;
    let server = instance.server.as_mut().ok_or("no server")?;
    server.ask("stall")?;
    note("source never answers, new page", effect(&mut vm, NEW)?);
    let killed = match vm.process.kill(PATIENCE)? {
        Some(_) => "ends",
        None => "does not end",
    };
    note("– this VM is killed", killed.to_owned());
    let server = instance.server.as_mut().ok_or("no server")?;
    server.kill(PATIENCE)?;
    let killed = match vm.process.kill(PATIENCE)? {
        Some(_) => "ends",
        None => "does not end",
    };
    note("– then the server is killed", killed.to_owned());
    Ok(())
}

fn start(way: Way, files: &Files) -> Result<(Instance, Vm), Failure> {
    let mut instance = Instance::open(way, files)?;
    let mut vm = instance.start_vm(LOADED)?;
    vm.touch(LOADED, 1)?;
    Ok((instance, vm))
}

/// Returns what happens if a VM touches pages.
fn effect(vm: &mut Vm, Pages(order, count): Pages) -> Result<String, Failure> {
    vm.process.send(&format!("touch {order} {count} 1"))?;
    Ok(match vm.process.effect(PATIENCE)? {
        Effect::Reply(_) => "content".to_owned(),
        Effect::Exit(status) => describe(status),
        Effect::Waits => "waits".to_owned(),
    })
}

/// Truncates the file of a VM, and restores its length.
fn truncated(files: &Files) -> Result<String, Failure> {
    let (_instance, mut vm) = start(Way::File, files)?;
    let file = File::options().write(true).open(files.complete())?;
    file.set_len((LOADED.1 * PAGE) as u64)?;
    effect(&mut vm, NEW)
}
