//! `kiln completion` and `kiln man`: what shells and manual readers know of the command line, made from the types that
//! read it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::aot;

use super::{Cli, FAILED, Failure};

/// The name under which completions are looked for.
const PROGRAM: &str = "kiln";

/// A shell that can be told how to complete.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Arguments of `kiln completion`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kiln completion bash >~/.local/share/bash-completion/completions/kiln
  kiln completion zsh >~/.zfunc/_kiln              with ~/.zfunc in fpath
  kiln completion fish >~/.config/fish/completions/kiln.fish")]
pub(super) struct CompletionArguments {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Arguments of `kiln man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kiln man | man -l -
  kiln man ~/.local/share/man/man1                 kiln.1, kiln-run.1 and one for each other verb")]
pub(super) struct ManArguments {
    /// Write the pages of all verbs here, rather than the main one to standard output
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// Prints the script for a shell.
pub(super) fn completion(arguments: &CompletionArguments) -> Result<ExitCode, Failure> {
    let shell = match arguments.shell {
        Shell::Bash => aot::Shell::Bash,
        Shell::Zsh => aot::Shell::Zsh,
        Shell::Fish => aot::Shell::Fish,
    };
    // Into memory first: the generators panic where their writer fails.
    let mut script = Vec::new();
    aot::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    print(&script)
}

/// Prints the main page, or writes all pages.
pub(super) fn man(arguments: &ManArguments) -> Result<ExitCode, Failure> {
    let failed = |path: &Path, error: &io::Error| Failure {
        text: format!("cannot write the manual to `{}`: {error}", path.display()),
        hint: None,
        code: FAILED,
    };
    match &arguments.folder {
        None => {
            let mut page = Vec::new();
            // As the pages in a folder: there is none of `kiln help`.
            let command = Cli::command().disable_help_subcommand(true);
            let rendered = clap_mangen::Man::new(command).render(&mut page);
            rendered.map_err(|error| failed(Path::new("-"), &error))?;
            print(&page)
        }
        Some(folder) => {
            let made = std::fs::create_dir_all(folder);
            made.and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
                .map_err(|error| failed(folder, &error))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Whoever stops reading has seen enough.
fn print(bytes: &[u8]) -> Result<ExitCode, Failure> {
    let _ = io::Write::write_all(&mut io::stdout().lock(), bytes);
    Ok(ExitCode::SUCCESS)
}
