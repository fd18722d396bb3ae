//! Unified kernel images: a kernel, its initrd and command line as sections of one PE image, behind a stub that starts
//! them. Written onto any PE stub that has room for the headers; checked again before anybody signs one.
//!
//! The format is the UAPI group's "Unified Kernel Image (UKI)". Addresses follow the stub's: images that fix them
//! (as `objcopy` recipes do) work with one release of a stub and not with the next, whose base is another.

use std::ops::Range;

use super::pe::{Image, PeError, SECTION_BYTES, Section, set_checksum};
use super::sbat::{self, SbatError};

/// The kernel's own limit with its NUL (`COMMAND_LINE_SIZE` of x86).
const COMMAND_LINE_BYTES_MAX: usize = 2047;
/// `uname -r` has room for 64 bytes.
const RELEASE_BYTES_MAX: usize = 64;
/// Stubs map and protect memory by pages.
const PAGE_BYTES: u32 = 4096;
/// IMAGE_SCN_CNT_INITIALIZED_DATA and IMAGE_SCN_MEM_READ.
const DATA: u32 = 0x4000_0040;
/// IMAGE_SCN_CNT_CODE, IMAGE_SCN_MEM_EXECUTE and IMAGE_SCN_MEM_READ: stubs jump into kernels that have no LoadImage path.
const CODE: u32 = 0x6000_0020;

/// Names that only a finished image has ("Unified Kernel Image", PE sections); `.sbat` a stub may have too.
const PAYLOADS: [&str; 14] = [
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".dtbauto", ".hwids", ".efifw",
    ".uname", ".pcrsig", ".pcrpkey", ".profile",
];

/// What a unified kernel image is made of, besides its stub.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// os-release(5) of what is booted.
    pub os_release: Option<&'a [u8]>,
    /// The kernel's release.
    pub release: Option<&'a str>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// A kernel with an EFI stub; a signature that it has stays in it.
    pub kernel: &'a [u8],
    /// Archives that are the initrd together, in this order.
    pub initrds: &'a [&'a [u8]],
    /// Lines to add to the stub's SBAT, or the whole where it has none.
    pub sbat: Option<&'a [u8]>,
}

/// Why there is no unified kernel image, or none that may be signed.
#[derive(Debug, thiserror::Error)]
pub enum UkiError {
    /// The stub or image is not one that kiln works on.
    #[error("the {0} is no PE image that can be used")]
    Image(&'static str, #[source] PeError),
    /// The stub has signatures.
    #[error("the stub is signed, and a changed image has no valid signature")]
    Signed,
    /// The stub is not empty.
    #[error("the stub has a section `{0}` already")]
    NotEmpty(String),
    /// Section headers do not fit behind those that the stub has.
    #[error("the stub has room for {room} more section headers, and {needed} are needed")]
    NoRoom {
        /// How many fit.
        room: usize,
        /// How many there would be.
        needed: usize,
    },
    /// The stub's sections cannot be moved.
    #[error("the stub has debug data, which would be moved by replacing its SBAT")]
    Debug,
    /// The kernel has no EFI entry, or is for another processor.
    #[error("the kernel cannot be started by firmware")]
    Kernel(#[source] PeError),
    /// A unified kernel image in place of a kernel.
    #[error("the kernel is a unified kernel image itself")]
    Nested,
    /// A part that may not be empty, or has bytes it may not have.
    #[error("the {part} {fault}")]
    Part {
        /// Which.
        part: &'static str,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// SBAT that is not well formed.
    #[error("the image cannot be revoked by its SBAT")]
    Sbat(#[from] SbatError),
    /// Neither the stub nor the caller has SBAT.
    #[error("neither the stub nor the parts have SBAT")]
    NoSbat,
    /// Sizes in an image have 32 bits.
    #[error("with its {0} the image would be longer than 4 GiB")]
    TooLarge(&'static str),
    /// An image without a section that must be there.
    #[error("the image has no `{0}` section")]
    Missing(&'static str),
    /// An image that says something twice.
    #[error("the image has more than one `{0}` section")]
    Twice(String),
}

impl UkiError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Signed => Some("take a stub without signatures, and sign the image that is made of it"),
            Self::NoRoom { .. } => Some("take another stub: systemd's of Debian 12 and 13 have room"),
            Self::Missing(".linux") => {
                Some("a kernel or a loader is not signed alone, as it would start anything")
            }
            Self::Missing(".cmdline" | ".initrd") => {
                Some("firmware or a boot menu could choose what is missing, and no signature would cover it")
            }
            _ => None,
        }
    }
}

/// Writes a unified kernel image of `parts` onto `stub`: `.osrel`, `.uname`, `.cmdline`, `.linux`, `.initrd` and
/// `.sbat` in this order, after the sections that the stub has. Equal input gives equal bytes.
///
/// # Errors
/// [`UkiError`].
pub fn write(stub: &[u8], parts: &Parts<'_>) -> Result<Vec<u8>, UkiError> {
    let image = Image::parse(stub).map_err(|error| UkiError::Image("stub", error))?;
    if !image.certificates().is_empty() {
        return Err(UkiError::Signed);
    }
    if let Some(section) = image.sections().iter().find(|section| PAYLOADS.contains(&section.name.as_str())) {
        return Err(UkiError::NotEmpty(section.name.clone()));
    }
    check_parts(parts)?;
    let initrd = join(parts.initrds);
    let own = image.sections().iter().position(|section| section.name == ".sbat");
    let merged = match (own.map(|index| image.content(&image.sections()[index])), parts.sbat) {
        (None, None) => return Err(UkiError::NoSbat),
        (Some(own), None) => sbat::check(own).map(|_| None)?,
        (None, Some(given)) => Some(sbat::check(given)?.to_owned()),
        (Some(own), Some(given)) => Some(sbat::merge(own, given)?),
    };
    let removed = own.filter(|_| merged.is_some());
    let mut added: Vec<(&'static str, &[u8], u32)> = Vec::new();
    added.extend(parts.os_release.map(|text| (".osrel", text, DATA)));
    added.extend(parts.release.map(|text| (".uname", text.as_bytes(), DATA)));
    added.push((".cmdline", parts.command_line.as_bytes(), DATA));
    added.push((".linux", parts.kernel, CODE));
    added.push((".initrd", &initrd, DATA));
    added.extend(merged.as_ref().map(|text| (".sbat", text.as_bytes(), DATA)));
    Writer::new(&image, removed)?.finish(&added)
}

fn check_parts(parts: &Parts<'_>) -> Result<(), UkiError> {
    let part = |part, fault| UkiError::Part { part, fault };
    command_line(parts.command_line.as_bytes())?;
    let plain = |release: &str| {
        (1..=RELEASE_BYTES_MAX).contains(&release.len())
            && release.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if !parts.release.is_none_or(plain) {
        return Err(part("kernel release", "is not one to 64 printable bytes without spaces"));
    }
    if parts.os_release.is_some_and(|text| text.is_empty() || text.contains(&0)) {
        return Err(part("os-release", "is empty or has a NUL"));
    }
    if parts.initrds.iter().all(|archive| archive.is_empty()) {
        return Err(part("initrd", "is empty"));
    }
    // Before they are put together, which takes the memory for all of them.
    let joined = parts.initrds.iter().try_fold(0_usize, |sum, archive| sum.checked_add(archive.len()));
    number(joined.unwrap_or(usize::MAX), "initrd")?;
    kernel(parts.kernel)
}

/// A stub takes an empty command line for none, and then what firmware or a menu says.
fn command_line(text: &[u8]) -> Result<(), UkiError> {
    let fault = |fault| UkiError::Part { part: "command line", fault };
    if text.trim_ascii().is_empty() {
        return Err(fault("is empty"));
    }
    if text.len() > COMMAND_LINE_BYTES_MAX {
        return Err(fault("is longer than 2,047 bytes, which is all that a kernel takes"));
    }
    let text = std::str::from_utf8(text).map_err(|_| fault("is not UTF-8"))?;
    if text.chars().any(char::is_control) {
        return Err(fault("has a NUL, a newline or another control character"));
    }
    Ok(())
}

fn kernel(kernel: &[u8]) -> Result<(), UkiError> {
    let image = Image::parse(kernel).map_err(UkiError::Kernel)?;
    if image.sections().iter().any(|section| section.name == ".linux") {
        return Err(UkiError::Nested);
    }
    Ok(())
}

/// Archives one after another; the kernel looks for the next at a multiple of four.
fn join(archives: &[&[u8]]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(archives.iter().map(|archive| archive.len() + 3).sum());
    for archive in archives {
        joined.resize(joined.len().next_multiple_of(4), 0);
        joined.extend_from_slice(archive);
    }
    joined
}

/// An image that grows by sections.
struct Writer<'a> {
    image: &'a Image<'a>,
    bytes: Vec<u8>,
    sections: usize,
    /// Where the next section is loaded at the earliest.
    address: u32,
    code_bytes: u32,
    data_bytes: u32,
}

impl<'a> Writer<'a> {
    /// One that begins with `image`, without its section `removed`.
    fn new(image: &'a Image<'a>, removed: Option<usize>) -> Result<Self, UkiError> {
        let mut bytes = image.bytes()[..image.sections_end()].to_vec();
        // A symbol table behind them is nothing that is loaded, and has no place between sections.
        bytes[image.places.symbols..image.places.symbols + 8].fill(0);
        let count = image.sections().len();
        let end = image.sections().iter().map(Section::memory_end).max().unwrap_or(0);
        let address = u32::try_from(end).map_err(|_| UkiError::TooLarge("sections"))?;
        // What is behind its sections and belongs to the image all the same stays its own.
        let address = address.max(image.places.size_of_headers).max(image.places.tables_end);
        let mut writer = Self { image, bytes, sections: count, address, code_bytes: 0, data_bytes: 0 };
        if let Some(index) = removed {
            writer.remove(index)?;
        }
        Ok(writer)
    }

    /// Takes a section's header and bytes out; the sections after it in the file move to the front.
    fn remove(&mut self, index: usize) -> Result<(), UkiError> {
        if self.image.places.debug_directory.is_some_and(|at| self.bytes[at..at + 8] != [0; 8]) {
            return Err(UkiError::Debug);
        }
        let table = self.image.places.section_table;
        let gone = &self.image.sections()[index].file;
        let next =
            self.image.sections().iter().map(|section| section.file.start).filter(|start| *start >= gone.end);
        let gone = gone.start..next.min().unwrap_or(self.bytes.len());
        for (place, section) in self.image.sections().iter().enumerate() {
            if section.file.start >= gone.end {
                let start = number(section.file.start - gone.len(), "sections")?;
                self.put(table + place * SECTION_BYTES + 20, start);
            }
        }
        self.bytes.drain(gone);
        let headers = self.headers();
        let (header, end) = (table + index * SECTION_BYTES, headers.start);
        self.bytes.copy_within(header + SECTION_BYTES..end, header);
        self.bytes[end - SECTION_BYTES..end].fill(0);
        self.sections -= 1;
        Ok(())
    }

    /// Where section headers can be added: from the end of the table to that of the headers.
    fn headers(&self) -> Range<usize> {
        let begin = self.image.places.section_table + self.sections * SECTION_BYTES;
        begin..usize::try_from(self.image.places.size_of_headers).unwrap_or(begin)
    }

    /// Adds the sections and puts the headers right.
    fn finish(mut self, added: &[(&'static str, &[u8], u32)]) -> Result<Vec<u8>, UkiError> {
        let free = &self.bytes[self.headers()];
        // Something else may have been put there; it would be overwritten.
        let room = free.iter().take_while(|byte| **byte == 0).count() / SECTION_BYTES;
        if room < added.len() {
            return Err(UkiError::NoRoom { room, needed: added.len() });
        }
        for (name, content, characteristics) in added {
            self.add(name, content, *characteristics)?;
        }
        let places = self.image.places;
        let end = self
            .address
            .checked_next_multiple_of(places.section_alignment)
            .ok_or(UkiError::TooLarge("sections"))?;
        let count = u16::try_from(self.sections).map_err(|_| UkiError::TooLarge("sections"))?;
        self.bytes[places.section_count..places.section_count + 2].copy_from_slice(&count.to_le_bytes());
        self.put(places.image_bytes, end);
        for (at, more) in [(places.code_bytes, self.code_bytes), (places.data_bytes, self.data_bytes)] {
            let before = self.get(at);
            self.put(at, before.checked_add(more).ok_or(UkiError::TooLarge("sections"))?);
        }
        set_checksum(&mut self.bytes, places.checksum);
        Ok(self.bytes)
    }

    fn add(&mut self, name: &'static str, content: &[u8], characteristics: u32) -> Result<(), UkiError> {
        let places = self.image.places;
        let what = name.trim_start_matches('.');
        let too_large = || UkiError::TooLarge(what);
        let header = self.headers().start;
        let alignment = usize::try_from(places.file_alignment).map_err(|_| too_large())?;
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
        let file = number(self.bytes.len(), what)?;
        self.bytes.reserve(content.len() + alignment);
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
        let file_bytes = number(self.bytes.len(), what)? - file;
        let length = number(content.len(), what)?;
        let page = places.section_alignment.max(PAGE_BYTES);
        let address = self.address.checked_next_multiple_of(page).ok_or_else(too_large)?;
        self.address = address.checked_add(length).ok_or_else(too_large)?;
        self.bytes[header..header + name.len()].copy_from_slice(name.as_bytes());
        for (offset, value) in
            [(8, length), (12, address), (16, file_bytes), (20, file), (36, characteristics)]
        {
            self.put(header + offset, value);
        }
        let total = if characteristics == CODE { &mut self.code_bytes } else { &mut self.data_bytes };
        *total = total.checked_add(file_bytes).ok_or_else(too_large)?;
        self.sections += 1;
        Ok(())
    }

    fn put(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, at: usize) -> u32 {
        self.bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
    }
}

fn number(value: usize, what: &'static str) -> Result<u32, UkiError> {
    u32::try_from(value).map_err(|_| UkiError::TooLarge(what))
}

/// A unified kernel image that has all that must be signed together.
#[derive(Debug)]
pub struct Uki<'a> {
    image: Image<'a>,
}

impl<'a> Uki<'a> {
    /// Reads `bytes` and checks that it is one: no section twice, none longer in memory than in the file, a kernel that
    /// firmware can start, an initrd, a command line and SBAT.
    ///
    /// # Errors
    /// [`UkiError`].
    pub fn read(bytes: &'a [u8]) -> Result<Self, UkiError> {
        let image = Image::parse(bytes).map_err(|error| UkiError::Image("image", error))?;
        for (index, section) in image.sections().iter().enumerate() {
            if image.sections()[..index].iter().any(|other| other.name == section.name) {
                return Err(UkiError::Twice(section.name.clone()));
            }
            let payload = section.name == ".sbat" || PAYLOADS.contains(&section.name.as_str());
            if payload
                && usize::try_from(section.virtual_size_bytes)
                    .map_or(true, |length| length > section.file.len())
            {
                return Err(UkiError::Part {
                    part: "image",
                    fault: "has a section that ends outside of its bytes",
                });
            }
        }
        let uki = Self { image };
        kernel(uki.need(".linux")?)?;
        uki.need(".initrd")?;
        command_line(uki.need(".cmdline")?)?;
        sbat::check(uki.need(".sbat")?)?;
        Ok(uki)
    }

    /// The image.
    pub fn image(&self) -> &Image<'a> {
        &self.image
    }

    /// The content of the section `name`.
    pub fn section(&self, name: &str) -> Option<&'a [u8]> {
        let section = self.image.sections().iter().find(|section| section.name == name)?;
        Some(self.image.content(section))
    }

    /// The sections that are not the stub's own: names and contents, in the order of the table.
    pub fn payloads(&self) -> impl Iterator<Item = (&str, &'a [u8])> {
        let payloads =
            |section: &&Section| section.name == ".sbat" || PAYLOADS.contains(&section.name.as_str());
        self.image
            .sections()
            .iter()
            .filter(payloads)
            .map(|section| (section.name.as_str(), self.image.content(section)))
    }

    fn need(&self, name: &'static str) -> Result<&'a [u8], UkiError> {
        self.section(name).filter(|content| !content.is_empty()).ok_or(UkiError::Missing(name))
    }
}

#[cfg(test)]
#[path = "uki_tests.rs"]
mod tests;
