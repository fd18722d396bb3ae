//! Linux kernels for x86-64 as distributions ship them: the uncompressed ELF out of a bzImage, and what it says of
//! itself. A virtual machine that starts the ELF directly saves the guest its own unpacking.
//!
//! Sources: the kernel's `Documentation/arch/x86/boot.rst` (setup header), `xen/interface/elfnote.h` (PVH note), the
//! ELF-64 specification. It reads untrusted files: every offset is checked, and no more than [`MAX_KERNEL_BYTES`]
//! are ever produced.

use std::io::{self, Read};

/// The longest uncompressed kernel that is accepted.
pub const MAX_KERNEL_BYTES: u64 = 512 << 20;

/// A kernel ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The uncompressed ELF file (`vmlinux`).
    pub elf: Vec<u8>,
    /// Its release, as `uname -r` shows it.
    pub release: Option<String>,
    /// The 32-bit entry point for a boot by the PVH protocol, where the kernel has one.
    pub pvh_entry: Option<u64>,
}

/// Why a file is not a kernel that can be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Neither a bzImage nor an ELF file.
    #[error("neither a Linux bzImage nor an ELF file")]
    NotAKernel,
    /// The file ends before something its headers promise.
    #[error("the kernel image ends within its {0}")]
    Truncated(&'static str),
    /// A header says something impossible.
    #[error("the kernel image has an impossible {0}")]
    BadHeader(&'static str),
    /// A boot protocol before 2.08 (Linux 2.6.26), which does not say where the payload is.
    #[error("the kernel's boot protocol {major}.{minor:02} is older than 2.08")]
    OldProtocol {
        /// Before the dot.
        major: u16,
        /// After it.
        minor: u16,
    },
    /// A compression this does not undo.
    #[error("the kernel's payload is compressed with {0}, which is not supported")]
    UnsupportedCompression(&'static str),
    /// The payload does not decompress.
    #[error("the kernel's payload does not decompress ({format})")]
    Decompress {
        /// How it is compressed.
        format: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It is, or says it is, longer than [`MAX_KERNEL_BYTES`].
    #[error("the uncompressed kernel is longer than {MAX_KERNEL_BYTES} bytes")]
    TooLarge,
    /// What was in it is not an ELF file for x86-64.
    #[error("the uncompressed kernel is not an ELF file for x86-64")]
    NotElf,
}

/// Reads a bzImage, or an ELF file as it is.
///
/// # Errors
/// [`KernelError`], as its variants say.
pub fn read(image: &[u8]) -> Result<Kernel, KernelError> {
    let (elf, header_release) = if image.starts_with(ELF_MAGIC) {
        if image.len() as u64 > MAX_KERNEL_BYTES {
            return Err(KernelError::TooLarge);
        }
        (image.to_vec(), None)
    } else {
        let setup = Setup::parse(image)?;
        (decompress(setup.payload)?, setup.release)
    };
    let pvh_entry = elf_pvh_entry(&elf)?;
    let release = header_release.or_else(|| banner_release(&elf));
    Ok(Kernel { elf, release, pvh_entry })
}

/// The bytes of `image` at `offset`, or that it ends within `what`.
fn slice<'a>(image: &'a [u8], offset: u64, length: u64, what: &'static str) -> Result<&'a [u8], KernelError> {
    let start = usize::try_from(offset).ok();
    let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
    start.zip(end).and_then(|(start, end)| image.get(start..end)).ok_or(KernelError::Truncated(what))
}

fn le16(image: &[u8], offset: u64, what: &'static str) -> Result<u16, KernelError> {
    Ok(slice(image, offset, 2, what)?.try_into().map(u16::from_le_bytes).expect("two bytes"))
}

fn le32(image: &[u8], offset: u64, what: &'static str) -> Result<u32, KernelError> {
    Ok(slice(image, offset, 4, what)?.try_into().map(u32::from_le_bytes).expect("four bytes"))
}

fn le64(image: &[u8], offset: u64, what: &'static str) -> Result<u64, KernelError> {
    Ok(slice(image, offset, 8, what)?.try_into().map(u64::from_le_bytes).expect("eight bytes"))
}

/// What is needed of the setup header (boot.rst, "The Real-Mode Kernel Header").
struct Setup<'a> {
    payload: &'a [u8],
    release: Option<String>,
}

impl<'a> Setup<'a> {
    fn parse(image: &'a [u8]) -> Result<Self, KernelError> {
        const HEADER: &str = "setup header";
        if image.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) || image.get(0x202..0x206) != Some(b"HdrS") {
            return Err(KernelError::NotAKernel);
        }
        let version = le16(image, 0x206, HEADER)?;
        if version < 0x208 {
            return Err(KernelError::OldProtocol { major: version >> 8, minor: version & 0xff });
        }
        // "For backwards compatibility, if the setup_sects field contains 0, the real value is 4."
        let setup_sectors = match slice(image, 0x1f1, 1, HEADER)? {
            [0] => 4,
            [count] => u64::from(*count),
            _ => return Err(KernelError::Truncated(HEADER)),
        };
        let protected_mode = (setup_sectors + 1) * 512;
        let payload_offset = u64::from(le32(image, 0x248, HEADER)?);
        let payload_length = u64::from(le32(image, 0x24c, HEADER)?);
        let payload = slice(image, protected_mode + payload_offset, payload_length, "payload")?;
        // "This field ... should be less than 0x200*setup_sects": it counts from 0x200.
        let release = match u64::from(le16(image, 0x20e, HEADER)?) {
            0 => None,
            offset if offset >= 0x200 * setup_sectors => {
                return Err(KernelError::BadHeader("kernel_version"));
            }
            offset => {
                let text = slice(image, 0x200 + offset, protected_mode - 0x200 - offset, "version text")?;
                release_word(text)
            }
        };
        Ok(Self { payload, release })
    }
}

/// The first word of a version text: printable ASCII up to a space or NUL, as long as `uname` has room for.
fn release_word(text: &[u8]) -> Option<String> {
    let word = text.iter().take(65).take_while(|byte| byte.is_ascii_graphic()).count();
    let word = &text[..word];
    (word.first()?.is_ascii_digit() && word.len() <= 64).then(|| String::from_utf8_lossy(word).into_owned())
}

/// The release in the banner that every kernel holds (`init/version.c`).
fn banner_release(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = elf;
    while let Some(at) = rest.windows(BANNER.len()).position(|window| window == BANNER) {
        rest = &rest[at + BANNER.len()..];
        if let Some(release) = release_word(rest) {
            return Some(release);
        }
    }
    None
}

/// Undoes the compression of a payload, which its first bytes tell (boot.rst, `payload_offset`). Whatever the
/// format, its last four bytes are the uncompressed length (`arch/x86/boot/compressed/mkpiggy.c`).
fn decompress(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    const PAYLOAD: &str = "payload";
    if payload.starts_with(ELF_MAGIC) {
        return bounded(payload, "none", MAX_KERNEL_BYTES);
    }
    let stream_bytes = payload.len().checked_sub(4).ok_or(KernelError::Truncated(PAYLOAD))?;
    let (stream, _) = payload.split_at(stream_bytes);
    let length = u64::from(le32(payload, stream_bytes as u64, PAYLOAD)?);
    let check_length = || if length > MAX_KERNEL_BYTES { Err(KernelError::TooLarge) } else { Ok(length) };
    let elf = match stream {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let format = "zstd";
            let failed = |source| KernelError::Decompress { format, source };
            let decoder = zstd::stream::read::Decoder::with_buffer(stream).map_err(failed)?.single_frame();
            bounded(decoder, format, check_length()?)?
        }
        // The length at the end of a gzip stream is its own (RFC 1952, ISIZE), so the stream is the whole payload.
        [0x1f, 0x8b, ..] => bounded(flate2::bufread::GzDecoder::new(payload), "gzip", check_length()?)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            bounded(lzma_rust2::XzReader::new(stream, false), "xz", check_length()?)?
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4_legacy(blocks, check_length()?)?,
        [b'B', b'Z', b'h', ..] => return Err(KernelError::UnsupportedCompression("bzip2")),
        [0x5d, 0, 0, ..] => return Err(KernelError::UnsupportedCompression("lzma")),
        [0x89, b'L', b'Z', b'O', ..] => return Err(KernelError::UnsupportedCompression("lzo")),
        _ => return Err(KernelError::UnsupportedCompression("an unknown format")),
    };
    if elf.len() as u64 != length {
        return Err(KernelError::BadHeader("uncompressed length"));
    }
    Ok(elf)
}

/// Everything `reader` gives, unless that is more than `limit_bytes`.
fn bounded(reader: impl Read, format: &'static str, limit_bytes: u64) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    let read = reader.take(limit_bytes + 1).read_to_end(&mut bytes);
    read.map_err(|source| KernelError::Decompress { format, source })?;
    if bytes.len() as u64 > limit_bytes {
        return Err(if limit_bytes < MAX_KERNEL_BYTES {
            KernelError::BadHeader("uncompressed length")
        } else {
            KernelError::TooLarge
        });
    }
    Ok(bytes)
}

/// The "legacy" frame of LZ4 (lz4_Frame_format.md, "Legacy frame"), after its magic number: blocks, each with its
/// compressed length before it, each but the last of 8 MiB.
fn lz4_legacy(mut blocks: &[u8], length: u64) -> Result<Vec<u8>, KernelError> {
    const BLOCK_BYTES: usize = 8 << 20;
    let failed = |source| KernelError::Decompress { format: "lz4", source };
    let mut bytes = Vec::new();
    let mut block = vec![0; BLOCK_BYTES];
    while !blocks.is_empty() {
        let compressed_bytes = u64::from(le32(blocks, 0, "LZ4 block")?);
        let compressed = slice(blocks, 4, compressed_bytes, "LZ4 block")?;
        let count = lz4_flex::block::decompress_into(compressed, &mut block)
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        bytes.extend_from_slice(&block[..count]);
        if bytes.len() as u64 > length {
            return Err(KernelError::BadHeader("uncompressed length"));
        }
        blocks = &blocks[4 + compressed.len()..];
    }
    Ok(bytes)
}

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Checks that `elf` is a 64-bit little-endian x86-64 file whose segments lie within it, and finds the entry point
/// in its Xen note.
fn elf_pvh_entry(elf: &[u8]) -> Result<Option<u64>, KernelError> {
    const HEADER: &str = "ELF header";
    const PROGRAM_HEADER_BYTES: u64 = 56;
    const PT_LOAD: u32 = 1;
    const PT_NOTE: u32 = 4;
    const CLASS_64_LITTLE_ENDIAN: &[u8] = &[2, 1];
    const EM_X86_64: u16 = 62;
    if !elf.starts_with(ELF_MAGIC) {
        return Err(KernelError::NotElf);
    }
    if slice(elf, 4, 2, HEADER)? != CLASS_64_LITTLE_ENDIAN || le16(elf, 18, HEADER)? != EM_X86_64 {
        return Err(KernelError::NotElf);
    }
    let table = le64(elf, 32, HEADER)?;
    if u64::from(le16(elf, 54, HEADER)?) != PROGRAM_HEADER_BYTES {
        return Err(KernelError::BadHeader("program header size"));
    }
    let mut entry = None;
    for index in 0..u64::from(le16(elf, 56, HEADER)?) {
        const TABLE: &str = "program headers";
        let at = table.checked_add(index * PROGRAM_HEADER_BYTES).ok_or(KernelError::Truncated(TABLE))?;
        let kind = le32(elf, at, TABLE)?;
        let _whole_header = slice(elf, at, PROGRAM_HEADER_BYTES, TABLE)?;
        if kind == PT_LOAD || kind == PT_NOTE {
            let segment = slice(elf, le64(elf, at + 8, TABLE)?, le64(elf, at + 32, TABLE)?, "segments")?;
            if kind == PT_NOTE {
                entry = entry.or(xen_entry(segment)?);
            }
        }
    }
    Ok(entry)
}

/// The value of the note `XEN_ELFNOTE_PHYS32_ENTRY` in a note segment.
fn xen_entry(mut notes: &[u8]) -> Result<Option<u64>, KernelError> {
    const PHYS32_ENTRY: u32 = 18;
    const NOTES: &str = "ELF notes";
    while !notes.is_empty() {
        let name_bytes = u64::from(le32(notes, 0, NOTES)?);
        let value_bytes = u64::from(le32(notes, 4, NOTES)?);
        let kind = le32(notes, 8, NOTES)?;
        let value_at = 12 + name_bytes.next_multiple_of(4);
        let name = slice(notes, 12, name_bytes, NOTES)?;
        let value = slice(notes, value_at, value_bytes, NOTES)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            return match value.len() {
                4 => Ok(Some(u64::from(le32(value, 0, NOTES)?))),
                8 => Ok(Some(le64(value, 0, NOTES)?)),
                _ => Err(KernelError::BadHeader("PVH entry note")),
            };
        }
        // The last note's padding may be missing.
        let next = usize::try_from(value_at + value_bytes.next_multiple_of(4)).unwrap_or(usize::MAX);
        notes = notes.get(next..).unwrap_or_default();
    }
    Ok(None)
}
