//! Linux kernels for x86-64 as distributions ship them: the uncompressed ELF out of a bzImage, and what it says of
//! itself. A virtual machine that starts the ELF directly saves the guest its own unpacking.
//!
//! Sources: the kernel's `Documentation/arch/x86/boot.rst` (setup header), `xen/interface/elfnote.h` (PVH note), the
//! ELF-64 specification. It reads untrusted files: every offset is checked, and no more than [`MAX_KERNEL_BYTES`]
//! are ever produced.

use std::io::{self, Read};

use lzma_rust2::{Action, Status, XzStream};

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

/// The release that a bzImage's header says, without unpacking it; none where it says none.
///
/// # Errors
/// [`KernelError`]: [`KernelError::NotAKernel`] for what is no bzImage.
pub fn release(image: &[u8]) -> Result<Option<String>, KernelError> {
    Setup::parse(image).map(|setup| setup.release)
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
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => xz(stream, check_length()?)?,
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

/// An xz stream. The kernel build's dictionary has 32 or 128 MiB (`scripts/xz_wrap.sh`); the format could ask for 4 GiB.
fn xz(mut stream: &[u8], length: u64) -> Result<Vec<u8>, KernelError> {
    const MEMORY_LIMIT_KIB: u32 = 192 << 10;
    let failed = |source| KernelError::Decompress { format: "xz", source };
    let mut decoder = XzStream::new_mem_limit(false, MEMORY_LIMIT_KIB);
    let mut bytes = Vec::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let done = decoder.process(stream, &mut piece, Action::Finish).map_err(failed)?;
        bytes.extend_from_slice(&piece[..done.bytes_produced]);
        if bytes.len() as u64 > length {
            return Err(KernelError::BadHeader("uncompressed length"));
        }
        if done.status == Status::StreamEnd {
            return Ok(bytes);
        }
        if done.bytes_consumed == 0 && done.bytes_produced == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        stream = &stream[done.bytes_consumed..];
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const RELEASE: &str = "6.12.95+deb12-cloud-amd64";

    /// An ELF file with one loaded segment, `banner` in it, and a note segment of `notes`.
    fn elf(banner: &str, notes: &[u8]) -> Vec<u8> {
        let mut elf = vec![0; 64 + 2 * 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 2;
        let body = [vec![0x90; 5000], banner.as_bytes().to_vec(), vec![0; 3]].concat();
        let load_at = elf.len();
        for (header, kind, at, length) in
            [(64, 1, load_at, body.len()), (120, 4, load_at + body.len(), notes.len())]
        {
            elf[header] = kind;
            elf[header + 8..header + 16].copy_from_slice(&(at as u64).to_le_bytes());
            elf[header + 32..header + 40].copy_from_slice(&(length as u64).to_le_bytes());
        }
        [elf, body, notes.to_vec()].concat()
    }

    fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for number in
            [u32::try_from(name.len()).expect("short"), u32::try_from(value.len()).expect("short"), kind]
        {
            note.extend(number.to_le_bytes());
        }
        for part in [name, value] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    fn vmlinux() -> Vec<u8> {
        let notes = [note(b"GNU\0", 3, b"build"), note(b"Xen\0", 18, &0x100_0a30_u64.to_le_bytes())].concat();
        elf(&format!("Linux version %s\0Linux version {RELEASE} (builder)"), &notes)
    }

    /// A bzImage of protocol 2.15 round a payload.
    fn bz_image(payload: &[u8], setup_sectors: u8) -> Vec<u8> {
        let setup_bytes = (usize::from(if setup_sectors == 0 { 4 } else { setup_sectors }) + 1) * 512;
        let mut image = vec![0; setup_bytes + 100];
        image[0x1f1] = setup_sectors;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        image[0x20e..0x210].copy_from_slice(&[0x00, 0x02]);
        image[0x248] = 100;
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).expect("short").to_le_bytes());
        let version = format!("{RELEASE} (someone@somewhere) #1 SMP\0");
        image[0x400..0x400 + version.len()].copy_from_slice(version.as_bytes());
        [image, payload.to_vec(), vec![0; 50]].concat()
    }

    fn with_length(stream: Vec<u8>, length: usize) -> Vec<u8> {
        [stream, u32::try_from(length).expect("short").to_le_bytes().to_vec()].concat()
    }

    fn zstd_payload(content: &[u8]) -> Vec<u8> {
        with_length(zstd::encode_all(content, 1).expect("memory"), content.len())
    }

    fn payloads(content: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(content).expect("memory");
        let mut xz =
            lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).expect("memory");
        xz.write_all(content).expect("memory");
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        for block in content.chunks(8 << 20) {
            let block = lz4_flex::block::compress(block);
            lz4.extend(u32::try_from(block.len()).expect("short").to_le_bytes());
            lz4.extend(block);
        }
        vec![
            ("none", content.to_vec()),
            ("zstd", zstd_payload(content)),
            ("gzip", gzip.finish().expect("memory")),
            ("xz", with_length(xz.finish().expect("memory"), content.len())),
            ("lz4", with_length(lz4, content.len())),
        ]
    }

    #[test]
    fn every_compression_gives_the_same_kernel() {
        let elf = vmlinux();
        let expected =
            Kernel { elf: elf.clone(), release: Some(RELEASE.into()), pvh_entry: Some(0x100_0a30) };
        for (format, payload) in payloads(&elf) {
            for setup_sectors in [0, 4, 63] {
                let kernel = read(&bz_image(&payload, setup_sectors)).expect(format);
                assert_eq!(kernel, expected, "{format}");
            }
        }
        assert_eq!(read(&elf).expect("an ELF file"), expected);
    }

    #[test]
    fn lz4_kernels_have_more_than_one_block() {
        let mut content = vmlinux();
        content.resize(20 << 20, 0x90);
        let (_, payload) = payloads(&content).pop().expect("lz4 is last");
        assert!(read(&bz_image(&payload, 4)).expect("a kernel").elf == content);
    }

    #[test]
    fn a_kernel_may_lack_release_and_entry() {
        let kernel = read(&elf("", &note(b"Xenon\0", 18, &[0; 8]))).expect("an ELF file");
        assert_eq!((kernel.release, kernel.pvh_entry), (None, None));
        let kernel = read(&elf("", &note(b"Xen\0", 18, &[1, 0, 0, 0]))).expect("an ELF file");
        assert_eq!(kernel.pvh_entry, Some(1));
        let mut image = bz_image(&zstd_payload(&vmlinux()), 4);
        image[0x20e..0x210].fill(0);
        assert_eq!(read(&image).expect("a kernel").release.as_deref(), Some(RELEASE));
    }

    #[test]
    fn every_truncation_is_refused() {
        for (format, payload) in payloads(&vmlinux()) {
            let image = bz_image(&payload, 4);
            let needed = image.len() - 50;
            for end in (0..needed).filter(|end| end % 7 == 0 || *end < 0x300 || needed - end < 40) {
                assert!(read(&image[..end]).is_err(), "{format} cut at {end}");
                // A payload that is cut, in an image that says so and is whole.
                let header_end = 5 * 512 + 100;
                if end > header_end && format != "none" {
                    assert!(read(&bz_image(&payload[..end - header_end], 4)).is_err(), "{format} of {end}");
                }
            }
            read(&image[..needed]).expect(format);
        }
        let elf = vmlinux();
        for end in 0..elf.len() {
            assert!(read(&elf[..end]).is_err(), "an ELF file cut at {end}");
        }
    }

    #[test]
    fn headers_that_lie_are_told_from_each_other() {
        let payload = zstd_payload(&vmlinux());
        let changed = |at: usize, bytes: &[u8]| {
            let mut image = bz_image(&payload, 4);
            image[at..at + bytes.len()].copy_from_slice(bytes);
            read(&image)
        };
        assert!(matches!(read(b""), Err(KernelError::NotAKernel)));
        assert!(matches!(changed(0x1fe, &[0, 0]), Err(KernelError::NotAKernel)));
        assert!(matches!(changed(0x202, b"hdrs"), Err(KernelError::NotAKernel)));
        assert!(matches!(changed(0x206, &[7, 2]), Err(KernelError::OldProtocol { major: 2, minor: 7 })));
        assert!(matches!(changed(0x248, &[0xff; 4]), Err(KernelError::Truncated("payload"))));
        assert!(matches!(changed(0x24c, &[0xff; 4]), Err(KernelError::Truncated("payload"))));
        assert!(matches!(changed(0x24c, &[0, 0, 0, 0]), Err(KernelError::Truncated("payload"))));
        assert!(matches!(changed(0x20e, &[0xff; 2]), Err(KernelError::BadHeader("kernel_version"))));
        assert!(matches!(changed(0x1f1, &[255]), Err(KernelError::Truncated(_))));
        let mut short = payload.clone();
        short.truncate(payload.len() - 4);
        let says = |length: u32| read(&bz_image(&[short.clone(), length.to_le_bytes().to_vec()].concat(), 4));
        let length = u32::try_from(vmlinux().len()).expect("short");
        says(length).expect("a kernel");
        assert!(matches!(says(length - 1), Err(KernelError::BadHeader("uncompressed length"))));
        assert!(matches!(says(length + 1), Err(KernelError::BadHeader("uncompressed length"))));
        assert!(matches!(says((512 << 20) + 1), Err(KernelError::TooLarge)));
        for magic in [&b"BZh9"[..], b"\x5d\0\0\0", b"\x89LZO", b"\0\0\0\0"] {
            let unsupported = read(&bz_image(&[magic, &[0; 100]].concat(), 4));
            assert!(
                matches!(unsupported, Err(KernelError::UnsupportedCompression(_))),
                "{}",
                magic.escape_ascii()
            );
        }
        assert!(matches!(read(&bz_image(&zstd_payload(b"no ELF file"), 4)), Err(KernelError::NotElf)));
        for at in [4, 5, 18] {
            let mut elf = vmlinux();
            elf[at] ^= 0xff;
            assert!(matches!(read(&elf), Err(KernelError::NotElf)), "byte {at}");
        }
    }

    #[test]
    fn a_payload_that_grows_beyond_its_length_is_stopped() {
        // 1 GiB of zeros, as long as it says or far longer.
        let mut bomb = zstd::stream::Encoder::new(Vec::new(), 1).expect("memory");
        for _ in 0..1024 {
            bomb.write_all(&vec![0; 1 << 20]).expect("memory");
        }
        let bomb = bomb.finish().expect("memory");
        let says = |length: u32| read(&bz_image(&[bomb.clone(), length.to_le_bytes().to_vec()].concat(), 4));
        assert!(matches!(says(1 << 30), Err(KernelError::TooLarge)));
        assert!(matches!(says(1 << 20), Err(KernelError::BadHeader("uncompressed length"))));
    }

    #[test]
    fn an_xz_stream_that_wants_gigabytes_is_refused() {
        let (_, mut payload) = payloads(&vmlinux()).remove(3);
        read(&bz_image(&payload, 4)).expect("a kernel");
        // The xz file format 1.2.1, §3.1: after the stream header a block header: length, flags, LZMA2's filter number,
        // one byte of properties, which is the dictionary's size (§5.3.1), padding, CRC32.
        assert_eq!(payload[12..16], [2, 0, 0x21, 1]);
        payload[16] = 40;
        let mut crc = flate2::Crc::new();
        crc.update(&payload[12..20]);
        payload[20..24].copy_from_slice(&crc.sum().to_le_bytes());
        let refused = read(&bz_image(&payload, 4)).expect_err("4 GiB of dictionary");
        let KernelError::Decompress { format: "xz", source } = refused else { unreachable!("{refused}") };
        assert!(source.to_string().contains("memory"), "{source}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            for (_, payload) in payloads(&vmlinux()) {
                let mut image = bz_image(&payload, 4);
                let mut elf = vmlinux();
                for (at, byte) in &changes {
                    let in_headers = at.index(0x260);
                    image[in_headers] = *byte;
                    let anywhere = at.index(image.len());
                    image[anywhere] = *byte;
                    elf[at.index(64 + 2 * 56)] = *byte;
                }
                let _ = read(&image);
                let _ = read(&elf);
            }
        }
    }
}
