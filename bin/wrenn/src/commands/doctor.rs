//! `wrenn doctor`.

use clap::Args;

use crate::{
    config::Settings,
    doctor::{self, ThisMachine},
    output,
};

/// Arguments of `wrenn doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Checks this machine. The exit code is 1 if sandboxes cannot run on it.
pub(crate) fn run(settings: &Settings, args: DoctorArgs) -> anyhow::Result<i32> {
    let findings = doctor::examine(&ThisMachine::new(settings));
    if args.json {
        output::json(&findings)?;
    } else {
        let colour = output::stdout_is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let text = doctor::render(&findings, colour);
        std::io::Write::write_all(&mut std::io::stdout().lock(), text.as_bytes())?;
    }
    Ok(i32::from(!doctor::healthy(&findings)))
}
