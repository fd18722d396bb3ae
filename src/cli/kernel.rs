//! `kiln kernel`: the boot bundle, made now rather than by the first run.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;
use super::show::{Narrator, line};
use crate::engine::{Host, KernelChoice};
use crate::machine::Carrier;
use crate::root::image;

/// Which kernel machines boot.
#[derive(Debug, Args, Clone)]
pub(super) struct KernelFlags {
    /// Boot this kernel (vmlinux or bzImage) instead of Debian's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Debian suite whose cloud kernel is booted
    #[arg(long, value_name = "SUITE", default_value = crate::root::debian::DEFAULT_KERNEL_SUITE, conflicts_with = "kernel")]
    kernel_suite: String,
    /// Its modules: a folder such as /lib/modules/RELEASE
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
}

impl KernelFlags {
    pub fn choice(&self) -> KernelChoice {
        match &self.kernel {
            Some(kernel) => KernelChoice::File { kernel: kernel.clone(), modules: self.modules.clone() },
            None => KernelChoice::Debian(self.kernel_suite.clone()),
        }
    }
}

/// Arguments of `kiln kernel`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kiln kernel                                     Debian's 6.12 cloud kernel, verified and locked
  kiln kernel --kernel ./bzImage --modules ./lib/modules/6.12.1")]
pub(super) struct KernelArguments {
    #[command(flatten)]
    kernel: KernelFlags,
}

/// Makes the bundle and says what it is.
pub(super) fn kernel(arguments: &KernelArguments, host: &Host) -> Result<ExitCode, Failure> {
    let mut narrator = Narrator::new(false);
    let choice = arguments.kernel.choice();
    let bundle = host.bundle(&choice, Carrier::Serial, &mut |text| narrator.progress(text))?;
    narrator.clear();
    line(&format!("release    {}", bundle.release));
    line(&format!("kernel     {}", host.store.blobs().path(&bundle.kernel).display()));
    line(&format!("initramfs  {}", host.store.blobs().path(&bundle.initramfs).display()));
    if let Some(modules) = &bundle.modules {
        line(&format!("modules    {}", image::path(&host.store, modules).display()));
    }
    line(&format!("bundle     sha256:{}", bundle.digest()));
    Ok(ExitCode::SUCCESS)
}
