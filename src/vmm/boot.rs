//! What is in memory before a machine's first instruction: kernel, initramfs, command line, and the boot parameters that
//! tell the kernel of them and of its memory (Linux, x86/boot and x86/zero-page).
//!
//! Kernels come as vmlinux (ELF) or as bzImage, and either is entered by the 64-bit protocol. Nothing is believed of
//! their headers but what fits memory; a kernel that lies about itself spoils its own machine.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::memory::{ACPI, COMMAND_LINE, GENERATION_ID, HIGH_MEMORY, MOST_COMMAND_LINE_BYTES, ZERO_PAGE};

/// What ELF files begin with.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// The magic number in the boot parameters, and that of a boot sector.
const HEADER: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// "Other" in the list of boot loaders.
const LOADER_TYPE: u8 = 0xff;
/// Where a bzImage's 64-bit entry is, behind its start, and the flag that says there is one.
const ENTRY_64: u64 = 0x200;
const KERNEL_64: u16 = 1;
/// As high as an initramfs may lie where the kernel does not say: below what kernels take for a negative number.
const HIGHEST_INITRAMFS: u64 = 0x7fff_ffff;
const PAGE_BYTES: u64 = 4096;

/// Kinds of memory in the table for the kernel.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Why a machine cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is neither an ELF file nor a bzImage.
    #[error("the kernel is neither a vmlinux nor a bzImage")]
    NoKernel,
    /// Its headers are broken, or it does not fit.
    #[error("the kernel cannot be loaded: {0}")]
    Load(linux_loader::loader::Error),
    /// It has no 64-bit entry.
    #[error("the kernel cannot be entered in 64-bit mode")]
    No64Bit,
    /// It reaches beyond memory.
    #[error("the kernel does not fit in memory: it ends at {end:#x}, memory at {memory:#x}")]
    KernelTooLarge {
        /// Where it would end.
        end: u64,
        /// Where memory does.
        memory: u64,
    },
    /// The initramfs does not fit.
    #[error("the initramfs of {bytes} bytes does not fit in memory beside the kernel")]
    InitramfsTooLarge {
        /// Its size.
        bytes: u64,
    },
    /// The command line is too long or has a zero byte.
    #[error("the kernel's command line is longer than {} bytes, or has a zero in it", MOST_COMMAND_LINE_BYTES - 1)]
    CommandLine,
    /// A file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// Memory ends before something.
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
}

impl BootError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::KernelTooLarge { .. } | Self::InitramfsTooLarge { .. } => {
                Some("give the machine more memory")
            }
            Self::NoKernel | Self::Load(_) | Self::No64Bit => {
                Some("name the vmlinux or bzImage of a 64-bit x86 Linux")
            }
            _ => None,
        }
    }
}

/// Loads all of it, and gives the address of the kernel's entry.
///
/// # Errors
/// [`BootError`] where something is not what it should be or does not fit.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initramfs: &mut File,
    command_line: &str,
) -> Result<GuestAddress, BootError> {
    let low_end = memory.find_region(GuestAddress(0)).map_or(0, |region| region.len());
    let (loaded, entry) = load_kernel(memory, kernel)?;
    let header = loaded.setup_header;
    // A bzImage unpacks itself behind its start, or to where it would rather be; an ELF file is where it says.
    let end = header.map_or(loaded.kernel_end, |header| {
        let start = loaded.kernel_load.0.max(header.pref_address);
        loaded.kernel_end.max(start.saturating_add(u64::from(header.init_size)))
    });
    if end > low_end {
        return Err(BootError::KernelTooLarge { end, memory: low_end });
    }
    let mut parameters = boot_params { hdr: header.unwrap_or_default(), ..boot_params::default() };
    let highest = match header {
        Some(header) if header.initrd_addr_max != 0 => u64::from(header.initrd_addr_max),
        _ => HIGHEST_INITRAMFS,
    };
    let (at, bytes) = load_initramfs(memory, initramfs, end, low_end.min(highest + 1))?;
    write_command_line(memory, command_line)?;

    let header = &mut parameters.hdr;
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER;
    header.type_of_loader = LOADER_TYPE;
    header.ramdisk_image = at;
    header.ramdisk_size = bytes;
    header.cmd_line_ptr = u32::try_from(COMMAND_LINE.0).unwrap_or_default();
    header.cmdline_size = u32::try_from(MOST_COMMAND_LINE_BYTES).unwrap_or_default();
    header.kernel_alignment = header.kernel_alignment.max(0x0100_0000);
    // The rest of the setup data is a list of addresses, of which there is none.
    header.setup_data = 0;
    parameters.acpi_rsdp_addr = ACPI.0;
    let map = memory_map(memory);
    for (place, entry) in parameters.e820_table.iter_mut().zip(&map) {
        *place = *entry;
    }
    parameters.e820_entries = u8::try_from(map.len()).unwrap_or_default();
    memory.write_obj(parameters, ZERO_PAGE)?;
    Ok(entry)
}

fn load_kernel(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
) -> Result<(KernelLoaderResult, GuestAddress), BootError> {
    let read = |source| BootError::Read { what: "kernel", source };
    let mut magic = [0; 4];
    kernel.rewind().map_err(read)?;
    let is_elf = match kernel.read_exact(&mut magic) {
        Ok(()) => magic == ELF_MAGIC,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(BootError::NoKernel),
        Err(error) => return Err(read(error)),
    };
    if is_elf {
        let loaded = Elf::load(memory, None, kernel, Some(HIGH_MEMORY)).map_err(BootError::Load)?;
        let entry = loaded.kernel_load;
        return match entry.0 < loaded.kernel_end {
            true => Ok((loaded, entry)),
            false => Err(BootError::Load(linux_loader::loader::elf::Error::InvalidEntryAddress.into())),
        };
    }
    if !has_setup_header(kernel).map_err(read)? {
        return Err(BootError::NoKernel);
    }
    let loaded = BzImage::load(memory, None, kernel, Some(HIGH_MEMORY)).map_err(BootError::Load)?;
    match loaded.setup_header {
        Some(header) if header.xloadflags & KERNEL_64 != 0 => {
            let entry = GuestAddress(loaded.kernel_load.0.saturating_add(ENTRY_64));
            Ok((loaded, entry))
        }
        _ => Err(BootError::No64Bit),
    }
}

/// Whether there is a bzImage's header, and all of it.
fn has_setup_header(kernel: &mut File) -> std::io::Result<bool> {
    const SETUP_HEADER: u64 = 0x1f1;
    const MAGIC: usize = 0x202 - 0x1f1;
    let mut bytes = [0; size_of::<setup_header>()];
    kernel.seek(SeekFrom::Start(SETUP_HEADER))?;
    match kernel.read_exact(&mut bytes) {
        Ok(()) => Ok(bytes.get(MAGIC..MAGIC + 4) == Some(&HEADER.to_le_bytes()[..])),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts the initramfs as high as it may lie below `highest`, above `lowest`.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    initramfs: &mut File,
    lowest: u64,
    highest: u64,
) -> Result<(u32, u32), BootError> {
    let read = |source| BootError::Read { what: "initramfs", source };
    let bytes = initramfs.seek(SeekFrom::End(0)).map_err(read)?;
    initramfs.rewind().map_err(read)?;
    let too_large = || BootError::InitramfsTooLarge { bytes };
    let at = highest.checked_sub(bytes).map(|at| at / PAGE_BYTES * PAGE_BYTES).ok_or_else(too_large)?;
    if at < lowest {
        return Err(too_large());
    }
    let length = usize::try_from(bytes).map_err(|_| too_large())?;
    memory.read_exact_volatile_from(GuestAddress(at), initramfs, length)?;
    Ok((u32::try_from(at).map_err(|_| too_large())?, u32::try_from(bytes).map_err(|_| too_large())?))
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str) -> Result<(), BootError> {
    if line.len() >= MOST_COMMAND_LINE_BYTES || line.contains('\0') {
        return Err(BootError::CommandLine);
    }
    memory.write_slice(line.as_bytes(), COMMAND_LINE)?;
    Ok(memory.write_obj(0_u8, GuestAddress(COMMAND_LINE.0 + line.len() as u64))?)
}

/// What the kernel may use of its memory. The first pages of the last part below 1 MiB are not its own: the generation id
/// and the tables.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind: u32| boot_e820_entry {
        addr: start,
        size: end.saturating_sub(start),
        r#type: kind,
    };
    let mut map = vec![entry(0, GENERATION_ID.0, RAM), entry(GENERATION_ID.0, HIGH_MEMORY.0, RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().0;
        map.push(entry(start.max(HIGH_MEMORY.0), start + region.len(), RAM));
    }
    map
}

#[cfg(test)]
mod tests;
