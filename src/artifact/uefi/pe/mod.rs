//! PE32+ images for UEFI on x86-64, read strictly: what is malformed, ambiguous or unsigned by nature is refused.
//!
//! The firmware, `sbverify` and the kernel each forgive other things, and signatures were forged in between. Here
//! every byte of a file has one place: headers, then sections that follow one another without gap or overlap, then
//! certificates. So the bytes that a signature covers are all but three known ranges, whichever way they are counted.
//! Layout: "PE Format" (Microsoft), UEFI 2.10 §2.1.1. Pure; nothing is copied but the section table.

mod certificates;
mod checksum;
mod fields;

use std::ops::Range;

pub use certificates::Certificate;
pub(super) use certificates::{PKCS_SIGNED_DATA, REVISION};
pub(super) use checksum::set_checksum;
use fields::{le16, le32, le64, range};

/// IMAGE_FILE_MACHINE_AMD64.
const MACHINE_X86_64: u16 = 0x8664;
/// The magic of a PE32+ optional header.
const PE32_PLUS: u16 = 0x020b;
/// IMAGE_FILE_EXECUTABLE_IMAGE.
const EXECUTABLE: u16 = 0x0002;
/// IMAGE_FILE_DLL.
const DLL: u16 = 0x2000;
/// IMAGE_SUBSYSTEM_EFI_APPLICATION to IMAGE_SUBSYSTEM_EFI_ROM.
const EFI_SUBSYSTEMS: Range<u16> = 10..14;
/// "Note that the Windows loader limits the number of sections to 96."
const SECTIONS_MAX: u16 = 96;
/// The index of the certificate table among the data directories.
const CERTIFICATE_TABLE: usize = 4;
const DIRECTORIES_MAX: u32 = 16;
const FILE_HEADER_BYTES: usize = 24;
/// The optional header up to its data directories.
const FIXED_BYTES: usize = 112;
/// A section header.
pub(super) const SECTION_BYTES: usize = 40;
/// What the end of an image is padded to before its certificates.
pub(super) const CERTIFICATE_ALIGNMENT: usize = 8;

/// Why a file is not an image that kiln works on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeError {
    /// The file ends inside of something.
    #[error("the file ends inside the {0}")]
    Truncated(&'static str),
    /// No DOS or PE signature.
    #[error("the file is not a PE image: no {0} signature")]
    NotPe(&'static str),
    /// For another processor.
    #[error("the image is for machine type {0:#06x}, not for x86-64 (0x8664)")]
    Machine(u16),
    /// Not a PE32+ image.
    #[error("the image's optional header is of type {0:#06x}, not PE32+ (0x020b)")]
    Kind(u16),
    /// Not an EFI program.
    #[error("the image is of subsystem {0}, not an EFI program (10 to 13)")]
    Subsystem(u16),
    /// A header field with a value it cannot have.
    #[error("the image's {field} is {value:#x}: {wanted}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        wanted: &'static str,
    },
    /// A section with a value it cannot have.
    #[error("section {index} (`{name}`) of the image {fault}")]
    Section {
        /// Its place in the table, from zero.
        index: usize,
        /// Its name, printable.
        name: String,
        /// What is wrong.
        fault: SectionFault,
    },
    /// A symbol table that is not right behind the sections, or not as long as it says.
    #[error("the image's symbol table does not fill the room behind its sections")]
    Symbols,
    /// Bytes after the last section that are no certificates and no padding.
    #[error("{bytes} bytes follow the image's last section and belong to nothing")]
    Trailing {
        /// How many.
        bytes: u64,
    },
    /// The certificate table is not what its directory says.
    #[error("the image's certificate table {0}")]
    Certificates(&'static str),
}

/// What is wrong with a section.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SectionFault {
    /// Its name has bytes after its end, or none.
    #[error("has a name that is empty, or is not printable ASCII")]
    Name,
    /// It leaves the file.
    #[error("lies outside the file")]
    OutsideFile,
    /// It leaves the image.
    #[error("lies outside SizeOfImage")]
    OutsideImage,
    /// Not on a multiple of FileAlignment.
    #[error("is not aligned in the file")]
    Unaligned,
    /// It begins before what is before it ends.
    #[error("overlaps what is before it in the file")]
    OverlapsInFile,
    /// It begins after what is before it ends.
    #[error("leaves a gap before it in the file")]
    Gap,
    /// In memory.
    #[error("overlaps another, or the headers, in memory")]
    OverlapsInMemory,
    /// Neither size.
    #[error("is empty")]
    Empty,
    /// COFF relocations or line numbers, which images have not.
    #[error("has relocations or line numbers of its own")]
    Relocations,
}

/// One section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name, without padding.
    pub name: String,
    /// Where it is loaded, from the image's base.
    pub virtual_address: u32,
    /// Its length in memory; shorter than its bytes in the file where these are padded.
    pub virtual_size_bytes: u32,
    /// Its bytes in the file; empty for what is all zero.
    pub file: Range<usize>,
    /// IMAGE_SCN_*.
    pub characteristics: u32,
}

impl Section {
    /// Where it ends in memory, from the image's base.
    pub(super) fn memory_end(&self) -> u64 {
        let length = match self.virtual_size_bytes {
            // "If this value is zero", loaders take the size in the file.
            0 => u64::try_from(self.file.len()).unwrap_or(u64::MAX),
            length => u64::from(length),
        };
        u64::from(self.virtual_address).saturating_add(length)
    }
}

/// An image, and where everything in it is.
#[derive(Debug, Clone)]
pub struct Image<'a> {
    bytes: &'a [u8],
    pub(super) places: Places,
    sections: Vec<Section>,
    /// Where the last section ends.
    sections_end: usize,
    /// Where the symbol table behind it ends, or the last section where there is none.
    end: usize,
    certificates: Option<Range<usize>>,
}

/// Offsets of what is written again, and the values that a writer starts from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub section_count: usize,
    pub symbols: usize,
    pub code_bytes: usize,
    pub data_bytes: usize,
    pub image_bytes: usize,
    pub checksum: usize,
    pub certificate_directory: usize,
    pub debug_directory: Option<usize>,
    pub section_table: usize,
    pub section_alignment: u32,
    pub file_alignment: u32,
    pub size_of_image: u32,
    pub size_of_headers: u32,
    /// Where the last of the tables that data directories name ends in memory.
    pub tables_end: u32,
}

impl<'a> Image<'a> {
    /// Reads `bytes`, a whole file.
    ///
    /// # Errors
    /// [`PeError`], which names what is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PeError> {
        let headers = Headers::read(bytes)?;
        let sections = sections(bytes, &headers)?;
        let places = headers.places;
        let directory = places.certificate_directory;
        let begin = le32(bytes, directory, "certificate directory")?;
        let length = le32(bytes, directory + 4, "certificate directory")?;
        let sections_end = tile(bytes, &places, &sections)?;
        let end = symbols_end(bytes, &places, sections_end)?;
        let certificates = certificates::locate(bytes, end, begin, length)?;
        let image_end = certificates.as_ref().map_or(bytes.len(), |table| table.start);
        // Signers pad to eight bytes; nothing may hide there. With more, an image would have another digest once it is signed
        // and its signatures are taken off.
        let padding = &bytes[end..image_end];
        if image_end > end.next_multiple_of(CERTIFICATE_ALIGNMENT) || padding.iter().any(|byte| *byte != 0) {
            return Err(PeError::Trailing { bytes: padding.len() as u64 });
        }
        Ok(Self { bytes, places, sections, sections_end, end, certificates })
    }

    /// The whole file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The sections, in the order of the table.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The content of `section`: its bytes in the file, without what pads them there.
    pub fn content(&self, section: &Section) -> &'a [u8] {
        let bytes = &self.bytes[section.file.clone()];
        let length = usize::try_from(section.virtual_size_bytes).unwrap_or(usize::MAX);
        if length == 0 { bytes } else { &bytes[..length.min(bytes.len())] }
    }

    /// The certificates at the end, in their order; their contents are not looked at.
    pub fn certificates(&self) -> Vec<Certificate<'a>> {
        self.certificates
            .as_ref()
            .map_or_else(Vec::new, |table| certificates::entries(&self.bytes[table.clone()]))
    }

    /// The image up to where its last section ends.
    pub(super) fn sections_end(&self) -> usize {
        self.sections_end
    }

    /// The image without padding and certificates: where its last section ends, or its symbols.
    pub(super) fn unsigned_end(&self) -> usize {
        self.end
    }

    /// The ranges that a signature covers (Authenticode, UEFI 2.10 §32.2.4.1): all but CheckSum, the directory
    /// entry of the certificate table, and that table.
    pub(super) fn covered(&self) -> [Range<usize>; 3] {
        let Places { checksum, certificate_directory, .. } = self.places;
        let end = self.certificates.as_ref().map_or(self.bytes.len(), |table| table.start);
        [0..checksum, checksum + 4..certificate_directory, certificate_directory + 8..end]
    }
}

/// Where a symbol table and its strings end that follow sections which end at `end`; `end` where there is none.
fn symbols_end(bytes: &[u8], places: &Places, end: usize) -> Result<usize, PeError> {
    const SYMBOL_BYTES: u64 = 18;
    const TABLE: &str = "symbol table";
    let pointer = le32(bytes, places.symbols, TABLE)?;
    let count = le32(bytes, places.symbols + 4, TABLE)?;
    // Linux says that it has one symbol, nowhere.
    if pointer == 0 {
        return Ok(end);
    }
    if usize::try_from(pointer) != Ok(end) {
        return Err(PeError::Symbols);
    }
    let strings = u64::from(pointer) + SYMBOL_BYTES * u64::from(count);
    let strings = usize::try_from(strings).map_err(|_| PeError::Symbols)?;
    // Its length counts the four bytes that say it.
    let length = le32(bytes, strings, TABLE)?;
    let end = strings.saturating_add(usize::try_from(length).map_err(|_| PeError::Symbols)?);
    if length < 4 || end > bytes.len() { Err(PeError::Symbols) } else { Ok(end) }
}

/// What the headers say, checked as far as they alone can be.
struct Headers {
    places: Places,
    sections: u16,
}

impl Headers {
    fn read(bytes: &[u8]) -> Result<Self, PeError> {
        const DOS: &str = "DOS header";
        const PE: &str = "PE header";
        const OPTIONAL: &str = "optional header";
        if !bytes.starts_with(b"MZ") {
            return Err(PeError::NotPe("MZ"));
        }
        let at = usize::try_from(le32(bytes, 0x3c, DOS)?).map_err(|_| PeError::Truncated(PE))?;
        if at < 0x40 {
            return Err(field("e_lfanew", at, "the PE header lies in the DOS header"));
        }
        let header = bytes.get(range(at, FILE_HEADER_BYTES)).ok_or(PeError::Truncated(PE))?;
        if !header.starts_with(b"PE\0\0") {
            return Err(PeError::NotPe("PE"));
        }
        let machine = le16(bytes, at + 4, PE)?;
        if machine != MACHINE_X86_64 {
            return Err(PeError::Machine(machine));
        }
        let sections = le16(bytes, at + 6, PE)?;
        if !(1..=SECTIONS_MAX).contains(&sections) {
            return Err(field("NumberOfSections", sections, "it must be from 1 to 96"));
        }
        let characteristics = le16(bytes, at + 22, PE)?;
        if characteristics & EXECUTABLE == 0 || characteristics & DLL != 0 {
            return Err(field("Characteristics", characteristics, "it is no executable image"));
        }
        let optional = at + FILE_HEADER_BYTES;
        let optional_bytes = usize::from(le16(bytes, at + 20, PE)?);
        let magic = le16(bytes, optional, OPTIONAL)?;
        if magic != PE32_PLUS {
            return Err(PeError::Kind(magic));
        }
        let directories = le32(bytes, optional + 108, OPTIONAL)?;
        if !(5..=DIRECTORIES_MAX).contains(&directories) {
            return Err(field("NumberOfRvaAndSizes", directories, "it must be from 5 to 16"));
        }
        let directories = usize::try_from(directories).map_err(|_| PeError::Truncated(OPTIONAL))?;
        if optional_bytes != FIXED_BYTES + 8 * directories {
            return Err(field(
                "SizeOfOptionalHeader",
                optional_bytes,
                "it does not end with the data directories",
            ));
        }
        let section_table = optional + optional_bytes;
        let places = Places {
            section_count: at + 6,
            symbols: at + 12,
            code_bytes: optional + 4,
            data_bytes: optional + 8,
            image_bytes: optional + 56,
            checksum: optional + 64,
            certificate_directory: optional + FIXED_BYTES + 8 * CERTIFICATE_TABLE,
            debug_directory: (directories > 6).then_some(optional + FIXED_BYTES + 8 * 6),
            section_table,
            section_alignment: le32(bytes, optional + 32, OPTIONAL)?,
            file_alignment: le32(bytes, optional + 36, OPTIONAL)?,
            size_of_image: le32(bytes, optional + 56, OPTIONAL)?,
            size_of_headers: le32(bytes, optional + 60, OPTIONAL)?,
            tables_end: 0,
        };
        let mut headers = Self { places, sections };
        headers.check(bytes, optional)?;
        headers.places.tables_end = headers.tables_end(bytes, optional, directories)?;
        Ok(headers)
    }

    /// The relations between fields of the optional header, which begins at `optional`.
    fn check(&self, bytes: &[u8], optional: usize) -> Result<(), PeError> {
        const OPTIONAL: &str = "optional header";
        let Places { section_alignment, file_alignment, size_of_image, size_of_headers, .. } = self.places;
        // 32 is what images of EDK II have, which are not padded to a disk's sectors.
        if !file_alignment.is_power_of_two() || !(0x20..=0x1_0000).contains(&file_alignment) {
            return Err(field(
                "FileAlignment",
                file_alignment,
                "it must be a power of two from 32 to 65,536",
            ));
        }
        if !section_alignment.is_power_of_two() || section_alignment < file_alignment {
            let wanted = "it must be a power of two, and not below FileAlignment";
            return Err(field("SectionAlignment", section_alignment, wanted));
        }
        let subsystem = le16(bytes, optional + 68, OPTIONAL)?;
        if !EFI_SUBSYSTEMS.contains(&subsystem) {
            return Err(PeError::Subsystem(subsystem));
        }
        let table_end = self.places.section_table + usize::from(self.sections) * SECTION_BYTES;
        if bytes.len() < table_end {
            return Err(PeError::Truncated("section table"));
        }
        let headers_end = usize::try_from(size_of_headers).unwrap_or(usize::MAX);
        if headers_end < table_end {
            return Err(field("SizeOfHeaders", size_of_headers, "the section table does not fit in"));
        }
        if headers_end > bytes.len() {
            return Err(PeError::Truncated("headers"));
        }
        if size_of_headers % file_alignment != 0 {
            return Err(field("SizeOfHeaders", size_of_headers, "it must be a multiple of FileAlignment"));
        }
        if size_of_image <= size_of_headers {
            return Err(field("SizeOfImage", size_of_image, "it must be above SizeOfHeaders"));
        }
        Ok(())
    }

    /// Where the tables end that the first `directories` data directories name, all of which lie in the image.
    fn tables_end(&self, bytes: &[u8], optional: usize, directories: usize) -> Result<u32, PeError> {
        const OPTIONAL: &str = "optional header";
        let mut last = 0;
        for index in (0..directories).filter(|index| *index != CERTIFICATE_TABLE) {
            let at = optional + FIXED_BYTES + 8 * index;
            let end = le32(bytes, at, OPTIONAL)?.checked_add(le32(bytes, at + 4, OPTIONAL)?);
            let end = end.filter(|end| *end <= self.places.size_of_image).ok_or_else(|| {
                field("data directory", index, "that directory's table lies outside SizeOfImage")
            })?;
            last = last.max(end);
        }
        Ok(last)
    }
}

fn field(field: &'static str, value: impl TryInto<u64>, wanted: &'static str) -> PeError {
    PeError::Field { field, value: value.try_into().unwrap_or(u64::MAX), wanted }
}

/// The section table, each section checked alone and against the others in memory.
fn sections(bytes: &[u8], headers: &Headers) -> Result<Vec<Section>, PeError> {
    const TABLE: &str = "section table";
    let mut sections = Vec::with_capacity(usize::from(headers.sections));
    for index in 0..usize::from(headers.sections) {
        let at = headers.places.section_table + index * SECTION_BYTES;
        let raw = bytes.get(range(at, 8)).ok_or(PeError::Truncated(TABLE))?;
        let shown = String::from_utf8_lossy(raw).replace(|c: char| !c.is_ascii_graphic(), "");
        let fault = |fault| PeError::Section { index, name: shown.clone(), fault };
        let length = raw.iter().position(|byte| *byte == 0).unwrap_or(raw.len());
        if length == 0
            || !raw[..length].iter().all(u8::is_ascii_graphic)
            || raw[length..].iter().any(|byte| *byte != 0)
        {
            return Err(fault(SectionFault::Name));
        }
        let virtual_size_bytes = le32(bytes, at + 8, TABLE)?;
        let virtual_address = le32(bytes, at + 12, TABLE)?;
        let size = le32(bytes, at + 16, TABLE)?;
        let pointer = le32(bytes, at + 20, TABLE)?;
        if le64(bytes, at + 24, TABLE)? != 0
            || le16(bytes, at + 32, TABLE)? != 0
            || le16(bytes, at + 34, TABLE)? != 0
        {
            return Err(fault(SectionFault::Relocations));
        }
        if virtual_size_bytes == 0 && size == 0 {
            return Err(fault(SectionFault::Empty));
        }
        let file = if size == 0 {
            0..0
        } else {
            let begin = usize::try_from(pointer).map_err(|_| fault(SectionFault::OutsideFile))?;
            let length = usize::try_from(size).map_err(|_| fault(SectionFault::OutsideFile))?;
            range(begin, length)
        };
        if file.end > bytes.len() {
            return Err(fault(SectionFault::OutsideFile));
        }
        if pointer % headers.places.file_alignment != 0 && size != 0 {
            return Err(fault(SectionFault::Unaligned));
        }
        let characteristics = le32(bytes, at + 36, TABLE)?;
        let name = shown.clone();
        let section = Section { name, virtual_address, virtual_size_bytes, file, characteristics };
        if section.memory_end() > u64::from(headers.places.size_of_image) {
            return Err(fault(SectionFault::OutsideImage));
        }
        sections.push(section);
    }
    apart_in_memory(&sections, headers.places.size_of_headers)?;
    Ok(sections)
}

/// No two sections, nor a section and the headers, share an address.
fn apart_in_memory(sections: &[Section], size_of_headers: u32) -> Result<(), PeError> {
    let mut order: Vec<usize> = (0..sections.len()).collect();
    order.sort_by_key(|index| sections[*index].virtual_address);
    let mut end = u64::from(size_of_headers);
    for index in order {
        let section = &sections[index];
        if u64::from(section.virtual_address) < end {
            let fault = SectionFault::OverlapsInMemory;
            return Err(PeError::Section { index, name: section.name.clone(), fault });
        }
        end = section.memory_end();
    }
    Ok(())
}

/// Walks headers and sections as they follow one another in the file, and returns where they end.
fn tile(bytes: &[u8], places: &Places, sections: &[Section]) -> Result<usize, PeError> {
    let mut order: Vec<usize> =
        (0..sections.len()).filter(|index| !sections[*index].file.is_empty()).collect();
    order.sort_by_key(|index| sections[*index].file.start);
    let mut end = usize::try_from(places.size_of_headers).map_err(|_| PeError::Truncated("headers"))?;
    for index in order {
        let Section { name, file, .. } = &sections[index];
        let fault = |fault| PeError::Section { index, name: name.clone(), fault };
        if file.start < end {
            return Err(fault(SectionFault::OverlapsInFile));
        }
        // A size that is no multiple of FileAlignment is padded to the next section; only zeros may be there.
        let alignment = usize::try_from(places.file_alignment).unwrap_or(1);
        if file.start > end.next_multiple_of(alignment)
            || bytes[end..file.start].iter().any(|byte| *byte != 0)
        {
            return Err(fault(SectionFault::Gap));
        }
        end = file.end;
    }
    Ok(end)
}

#[cfg(test)]
pub(in crate::uefi) mod sample;
#[cfg(test)]
mod tests;
