//! `wrenn completions SHELL`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Arguments of `wrenn completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Shell; for bash: `wrenn completions bash > /etc/bash_completion.d/wrenn`
    shell: Shell,
}

/// Prints the completion script.
pub(crate) fn run(args: &CompletionsArgs) -> anyhow::Result<i32> {
    let mut script = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut crate::cli::Cli::command(),
        "wrenn",
        &mut script,
    );
    std::io::Write::write_all(&mut std::io::stdout().lock(), &script)?;
    Ok(0)
}
