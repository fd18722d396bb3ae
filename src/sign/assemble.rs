//! What is signed, before it is: images assembled from parts with the hashes and the configuration of the moment, and images
//! that a build has assembled. Each is one private copy, of which everything that follows is made.

use std::path::Path;

use kiln_artifact::kernel::{self, KernelError};
use kiln_artifact::uefi::uki::{self, Parts, Uki, UkiError};
use kiln_digest::Digest;

use super::error::SignError;
use super::local::Local;
use super::record::{Kernel, Unified, command_line};
use super::work::{IMAGE_BYTES_MAX, Roots, Work, same};

/// os-release, a command line and SBAT are some lines.
const TEXT_BYTES_MAX: u64 = 64 << 10;

/// An image of the record.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    Kernel(&'a Kernel),
    Unified(&'a Unified),
}

impl<'a> Target<'a> {
    /// What it is called where it is signed elsewhere.
    pub fn name(self) -> &'a str {
        match self {
            Self::Kernel(kernel) => kernel.name(),
            Self::Unified(image) => image.name(),
        }
    }

    /// What it is called in errors.
    pub fn file(self) -> String {
        match self {
            Self::Kernel(kernel) => format!("kernel {}", kernel.release),
            Self::Unified(image) => image.file.clone(),
        }
    }

    /// Where it goes.
    pub fn signed(self) -> &'a [String] {
        match self {
            Self::Kernel(kernel) => &kernel.signed,
            Self::Unified(image) => std::slice::from_ref(&image.signed),
        }
    }
}

impl Work {
    pub(super) fn targets(&self) -> impl Iterator<Item = Target<'_>> {
        let kernels = self.record.kernels.iter().map(Target::Kernel);
        kernels.chain(self.record.unified.iter().map(Target::Unified))
    }

    /// The bytes to sign.
    pub(super) fn unsigned(
        &self,
        target: Target<'_>,
        roots: &Roots,
        local: &Local<'_>,
    ) -> Result<Vec<u8>, SignError> {
        match target {
            Target::Kernel(kernel) => self.assemble(kernel, roots, local),
            Target::Unified(image) => self.unified(image),
        }
    }

    fn assemble(&self, kernel: &Kernel, roots: &Roots, local: &Local<'_>) -> Result<Vec<u8>, SignError> {
        let text = |part| self.part(part, TEXT_BYTES_MAX);
        let image = |part| self.part(part, IMAGE_BYTES_MAX);
        let failed = |source| SignError::Unified { file: Target::Kernel(kernel).file(), source };
        // Before any is read: this host may have less memory than all of them take.
        let (linux, linux_bytes) = self.part_file(&kernel.linux, IMAGE_BYTES_MAX)?;
        let (mut opened, mut length_bytes) = (Vec::new(), linux_bytes);
        for part in &kernel.initrds {
            let (file, part_bytes) = self.part_file(part, IMAGE_BYTES_MAX)?;
            opened.push((part, file));
            length_bytes = length_bytes.saturating_add(part_bytes);
        }
        if length_bytes >= IMAGE_BYTES_MAX {
            return Err(failed(UkiError::TooLarge("initrd")));
        }
        let linux = self.part_of(&kernel.linux, linux, IMAGE_BYTES_MAX)?;
        let (stub, osrel) = (image(&kernel.stub)?, text(&kernel.osrel)?);
        let sbat = kernel.sbat.as_ref().map(text).transpose()?;
        let written = String::from_utf8(text(&kernel.cmdline)?);
        let written = written.map_err(|_| SignError::CommandLine(kernel.cmdline.file.clone()))?;
        let command_line = command_line(&written);
        check_release(kernel, &linux)?;
        let read = |(part, file)| self.part_of(part, file, IMAGE_BYTES_MAX);
        let mut initrds = opened.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        // The record has been checked, and all its images are verified.
        let hashes = kernel.verity.iter().filter_map(|image| Some((image.name.as_str(), roots.get(image)?)));
        initrds.push(local.archive(hashes)?);
        let initrds: Vec<&[u8]> = initrds.iter().map(Vec::as_slice).collect();
        let parts = Parts {
            os_release: Some(&osrel),
            release: Some(&kernel.release),
            command_line: &command_line,
            kernel: &linux,
            initrds: &initrds,
            sbat: sbat.as_deref(),
        };
        let bytes = uki::write(&stub, &parts).map_err(failed)?;
        // By the rules that hold for images that others assembled.
        Uki::read(&bytes).map_err(failed)?;
        Ok(bytes)
    }

    /// An image that was found, with each of its sections, to be what the record has.
    fn unified(&self, image: &Unified) -> Result<Vec<u8>, SignError> {
        let file = || image.file.clone();
        let bytes = self.folder.read(Path::new(&image.file), IMAGE_BYTES_MAX)?;
        let unified = Uki::read(&bytes).map_err(|source| SignError::Unified { file: file(), source })?;
        if !unified.image().certificates().is_empty() {
            return Err(SignError::Signed(file()));
        }
        for (name, content) in unified.payloads() {
            let recorded = image.sections.get(name);
            let recorded =
                recorded.ok_or_else(|| SignError::Unknown { file: file(), section: name.to_owned() })?;
            same(&format!("{} ({name})", image.file), Digest::of(content), *recorded)?;
        }
        for name in image.sections.keys() {
            if unified.section(name).is_none() {
                return Err(SignError::Gone { file: file(), section: name.clone() });
            }
        }
        same(&image.file, Digest::of(&bytes), image.sha256)?;
        Ok(bytes)
    }
}

/// A kernel that says of what release it is must say what the record says: its modules and their hash go by that.
fn check_release(kernel: &Kernel, linux: &[u8]) -> Result<(), SignError> {
    let file = || kernel.linux.file.clone();
    match kernel::release(linux) {
        Ok(Some(found)) if found != kernel.release => {
            Err(SignError::Release { file: file(), found, recorded: kernel.release.clone() })
        }
        // What firmware can start and is no bzImage is judged as a PE image.
        Ok(_) | Err(KernelError::NotAKernel) => Ok(()),
        Err(source) => Err(SignError::Kernel { file: file(), source }),
    }
}
