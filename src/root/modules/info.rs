//! What a module says of itself: the `.modinfo` section and the symbol table of its ELF file (ELF-64, gABI 4.1).
//!
//! Modules come from outside; every offset is checked before it is used and nothing is allocated by their word.

const SECTION_HEADER_BYTES: usize = 64;
const SYMBOL_BYTES: usize = 24;
/// `SHT_SYMTAB`
const SYMBOL_TABLE: u32 = 2;
/// A symbol of this prefix stands for one that the module exports (`include/linux/export-internal.h`).
const EXPORT_PREFIX: &[u8] = b"__ksymtab_";

/// Bytes that are no kernel module.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it is no kernel module: {0}")]
pub struct InfoError(&'static str);

/// What a module says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModuleInfo {
    /// Modules that must be loaded before.
    pub depends: Vec<String>,
    /// Names or aliases that should be loaded before.
    pub soft_depends: Vec<String>,
    /// What it answers to.
    pub aliases: Vec<String>,
    /// What it exports.
    pub symbols: Vec<String>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    number(bytes, at).map(|n| usize::from(u16::from_le_bytes(n)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(number(bytes, at)?)).ok()
}

struct Section<'a> {
    name: &'a [u8],
    kind: u32,
    link: u32,
    body: &'a [u8],
}

/// The text at `at` up to the next NUL.
fn text_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    bytes.get(at..)?.split(|&byte| byte == 0).next()
}

fn sections(elf: &[u8]) -> Option<Vec<Section<'_>>> {
    let start = u64_at(elf, 40)?;
    let count = u16_at(elf, 60)?;
    let names_index = u16_at(elf, 62)?;
    if u16_at(elf, 58)? != SECTION_HEADER_BYTES {
        return None;
    }
    let header = |index: usize| -> Option<&[u8]> {
        let at = start.checked_add(index.checked_mul(SECTION_HEADER_BYTES)?)?;
        elf.get(at..at.checked_add(SECTION_HEADER_BYTES)?)
    };
    let body = |header: &[u8]| -> Option<&[u8]> {
        let (at, length) = (u64_at(header, 24)?, u64_at(header, 32)?);
        elf.get(at..at.checked_add(length)?)
    };
    let names = body(header(names_index)?)?;
    let mut sections = Vec::new();
    for index in 0..count {
        let header = header(index)?;
        let name = text_at(names, usize::try_from(u32_at(header, 0)?).ok()?)?;
        // A section without bytes in the file (.bss) may claim any length.
        sections.push(Section {
            name,
            kind: u32_at(header, 4)?,
            link: u32_at(header, 40)?,
            body: body(header).unwrap_or_default(),
        });
    }
    Some(sections)
}

impl ModuleInfo {
    /// Reads the module `elf`, which is not compressed.
    ///
    /// # Errors
    /// [`InfoError`].
    pub fn parse(elf: &[u8]) -> Result<Self, InfoError> {
        if !elf.starts_with(b"\x7fELF\x02\x01\x01") {
            return Err(InfoError("it is not a 64-bit little-endian ELF file"));
        }
        let sections = sections(elf).ok_or(InfoError("its section headers lie outside the file"))?;
        let info = sections.iter().find(|section| section.name == b".modinfo");
        let info = info.ok_or(InfoError("it has no .modinfo section"))?;
        let mut module = Self::default();
        for entry in info.body.split(|&byte| byte == 0) {
            let Some((key, value)) = std::str::from_utf8(entry).ok().and_then(|entry| entry.split_once('='))
            else {
                continue;
            };
            match key {
                "depends" => {
                    module
                        .depends
                        .extend(value.split(',').filter(|name| !name.is_empty()).map(ToOwned::to_owned));
                }
                "alias" => module.aliases.push(value.to_owned()),
                "softdep" => module.soft_depends.extend(soft_before(value)),
                _ => {}
            }
        }
        module.symbols = exports(&sections);
        Ok(module)
    }
}

/// The aliases in `modules.builtin.modinfo` (`NAME.alias=ALIAS`), `_` for `-`, each with the name of its module.
pub(super) fn builtin_aliases(modinfo: &[u8]) -> Vec<(String, String)> {
    let entries = modinfo.split(|&byte| byte == 0).filter_map(|entry| std::str::from_utf8(entry).ok());
    let aliases = entries.filter_map(|entry| {
        let (key, alias) = entry.split_once('=')?;
        let name = key.strip_suffix(".alias")?;
        Some((super::depmod::normal_alias(alias), super::normal_name(name)))
    });
    aliases.collect()
}

/// The names after `pre:` in a soft dependency: `pre: a b post: c`.
fn soft_before(value: &str) -> Vec<String> {
    let mut is_before = false;
    let mut names = Vec::new();
    for word in value.split_ascii_whitespace() {
        match word {
            "pre:" => is_before = true,
            "post:" => is_before = false,
            name if is_before => names.push(name.to_owned()),
            _ => {}
        }
    }
    names
}

fn exports(sections: &[Section<'_>]) -> Vec<String> {
    let Some(table) = sections.iter().find(|section| section.kind == SYMBOL_TABLE) else { return Vec::new() };
    let strings = usize::try_from(table.link).ok().and_then(|link| sections.get(link));
    let Some(strings) = strings else { return Vec::new() };
    let names = table.body.chunks_exact(SYMBOL_BYTES).filter_map(|symbol| {
        let at = usize::try_from(u32_at(symbol, 0)?).ok()?;
        // Most symbols are not exports: look at the beginning before looking for the end.
        if !strings.body.get(at..)?.starts_with(EXPORT_PREFIX) {
            return None;
        }
        let name = text_at(strings.body, at + EXPORT_PREFIX.len())?;
        std::str::from_utf8(name).ok().map(ToOwned::to_owned)
    });
    names.collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A module with one .modinfo section.
    pub(crate) fn module(modinfo: &[u8], exported: &[&str]) -> Vec<u8> {
        let mut strings = vec![0];
        let mut symbols = vec![0; SYMBOL_BYTES];
        for name in exported {
            symbols.extend(u32::try_from(strings.len()).expect("small").to_le_bytes());
            symbols.extend([0; SYMBOL_BYTES - 4]);
            strings.extend(EXPORT_PREFIX.iter().chain(name.as_bytes()).chain(&[0]));
        }
        let names = b"\0.modinfo\0.symtab\0.strtab\0";
        let bodies: [(u32, u32, u32, &[u8]); 4] =
            [(0, 3, 0, names), (1, 1, 0, modinfo), (10, SYMBOL_TABLE, 3, &symbols), (18, 3, 0, &strings)];
        let mut elf = vec![0; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let mut headers = Vec::new();
        for (name, kind, link, body) in bodies {
            let mut header = [0; SECTION_HEADER_BYTES];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            header[24..32].copy_from_slice(&(elf.len() as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(body.len() as u64).to_le_bytes());
            header[40..44].copy_from_slice(&link.to_le_bytes());
            elf.extend_from_slice(body);
            headers.extend(header);
        }
        let start = elf.len() as u64;
        elf[40..48].copy_from_slice(&start.to_le_bytes());
        elf[58..60].copy_from_slice(&64_u16.to_le_bytes());
        elf[60..62].copy_from_slice(&4_u16.to_le_bytes());
        elf.extend(headers);
        elf
    }

    const MODINFO: &[u8] =
        b"license=GPL\0alias=fs-erofs\0depends=libcrc32c,netfs\0softdep=pre: crc32c post: x\0alias=y\0junk\0";

    #[test]
    fn a_module_says_what_it_needs_and_answers_to() {
        let info = ModuleInfo::parse(&module(MODINFO, &["erofs_read"])).expect("a module");
        assert_eq!(info.depends, ["libcrc32c", "netfs"]);
        assert_eq!(info.aliases, ["fs-erofs", "y"]);
        assert_eq!(info.soft_depends, ["crc32c"]);
        assert_eq!(info.symbols, ["erofs_read"]);
        let none = ModuleInfo::parse(&module(b"depends=\0", &[])).expect("a module");
        assert_eq!(none, ModuleInfo::default());
    }

    #[test]
    fn changed_and_cut_modules_never_panic() {
        let good = module(MODINFO, &["erofs_read"]);
        for position in 0..good.len() {
            let _ = ModuleInfo::parse(&good[..position]);
            for value in [0, 0x7f, 0xff] {
                let mut changed = good.clone();
                changed[position] = value;
                let _ = ModuleInfo::parse(&changed);
            }
        }
        assert!(ModuleInfo::parse(b"").is_err());
        assert!(ModuleInfo::parse(&[b"\x7fELF\x02\x01\x01", &[0xff; 80][..]].concat()).is_err());
    }
}
