//! The initrd's modules: which files to load for a name, and which names answer to a device. Pure, over the texts that
//! depmod(8) writes. Names are compared as the kernel does: `-` and `_` are one letter.

/// The indexes of one kernel's modules.
#[derive(Debug, Default)]
pub struct Modules {
    dep: String,
    alias: String,
    builtin: String,
}

/// Modules of these folders are of USB, which is left alone where another bus has what is looked for.
const USB: &str = "kernel/drivers/usb/";

impl Modules {
    /// From `modules.dep`, `modules.alias` and `modules.builtin`.
    #[must_use]
    pub fn new(dep: String, alias: String, builtin: String) -> Self {
        Self { dep, alias, builtin }
    }

    /// The files to load for a module, dependencies first, below the folder of modules; none where there is no such
    /// module.
    #[must_use]
    pub fn files(&self, name: &str) -> Option<Vec<&str>> {
        let name = normal(name);
        self.dep.lines().find_map(|line| {
            let (file, needed) = line.split_once(':')?;
            (stem(file)? == name).then(|| needed.split_ascii_whitespace().rev().chain([file]).collect())
        })
    }

    /// Whether the kernel has it without loading.
    #[must_use]
    pub fn is_built_in(&self, name: &str) -> bool {
        let name = normal(name);
        self.builtin.lines().any(|line| stem(line).as_deref() == Some(&name))
    }

    /// The modules that answer to one of these devices, by their modaliases; those of USB only `with_usb`.
    #[must_use]
    pub fn answering(&self, devices: &[String], with_usb: bool) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        for line in self.alias.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("alias"), Some(pattern), Some(name)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            if !found.contains(&name)
                && devices.iter().any(|device| matches(pattern.as_bytes(), device.as_bytes()))
                && (with_usb || !self.is_of_usb(name))
            {
                found.push(name);
            }
        }
        found
    }

    fn is_of_usb(&self, name: &str) -> bool {
        self.files(name).is_some_and(|files| files.iter().any(|file| file.starts_with(USB)))
    }
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The normal name of a module's file.
fn stem(path: &str) -> Option<String> {
    Some(normal(path.rsplit('/').next()?.split_once(".ko")?.0))
}

/// Whether `text` is what the pattern of an alias says: fnmatch(3) with `*`, `?` and `[…]`, which is all that aliases of
/// modules use.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut from) = (0, 0);
    // Where the last `*` was, and where what it stands for may end next.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&b'*') {
            star = Some((at + 1, from));
            at += 1;
            continue;
        }
        let rest = pattern.get(at..).unwrap_or_default();
        match (one(rest), text.get(from)) {
            (None, None) => return true,
            (Some((length, set)), Some(letter)) if admits(set, *letter) => {
                at += length;
                from += 1;
            }
            _ => match star {
                Some((after, end)) if end < text.len() => {
                    star = Some((after, end + 1));
                    (at, from) = (after, end + 1);
                }
                _ => return false,
            },
        }
    }
}

/// The pattern of one letter at the start of `pattern`: its length, and what stands in it.
fn one(pattern: &[u8]) -> Option<(usize, &[u8])> {
    let end = pattern.iter().position(|byte| *byte == b']').filter(|_| pattern.first() == Some(&b'['));
    let length = end.map_or(1, |end| end + 1);
    pattern.get(..length).map(|set| (length, set))
}

fn admits(set: &[u8], letter: u8) -> bool {
    match set {
        [b'[', inner @ .., b']'] => {
            let is_in_range =
                |range: &[u8]| matches!(range, [from, b'-', to] if (*from..=*to).contains(&letter));
            inner.contains(&letter) && letter != b'-' || inner.windows(3).any(is_in_range)
        }
        b"?" => true,
        other => other == [letter],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Modules {
        Modules::new(
            "kernel/drivers/md/dm-verity.ko.xz: kernel/drivers/md/dm-bufio.ko.xz kernel/drivers/md/dm-mod.ko.xz\n\
             kernel/drivers/ata/ahci.ko.xz: kernel/drivers/ata/libata.ko.xz\n\
             kernel/drivers/usb/host/xhci-pci.ko: kernel/drivers/usb/core/usbcore.ko\n"
                .to_owned(),
            "# Aliases\n\
             alias pci:v*d*sv*sd*bc01sc06i01* ahci\n\
             alias pci:v00008086d00002922sv*sd*bc*sc*i* ahci\n\
             alias pci:v*d*sv*sd*bc0Csc03i30* xhci_pci\n"
                .to_owned(),
            "kernel/drivers/nvme/host/nvme-core.ko\n".to_owned(),
        )
    }

    #[test]
    fn what_a_module_needs_comes_first() {
        let modules = modules();
        let files = modules.files("dm_verity").expect("it is there");
        assert_eq!(
            files,
            [
                "kernel/drivers/md/dm-mod.ko.xz",
                "kernel/drivers/md/dm-bufio.ko.xz",
                "kernel/drivers/md/dm-verity.ko.xz"
            ]
        );
        assert_eq!(modules.files("verity"), None);
        assert!(modules.is_built_in("nvme_core") && !modules.is_built_in("nvme"));
    }

    #[test]
    fn devices_find_their_drivers_once_and_usb_only_where_it_is_wanted() {
        let modules = modules();
        let devices = [
            "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01".to_owned(),
            "pci:v00001B36d0000000Dsv00001AF4sd00001100bc0Csc03i30".to_owned(),
            "acpi:PNP0A08:".to_owned(),
        ];
        assert_eq!(modules.answering(&devices, false), ["ahci"]);
        assert_eq!(modules.answering(&devices, true), ["ahci", "xhci_pci"]);
        assert!(modules.answering(&[], true).is_empty());
    }

    #[test]
    fn patterns_are_those_of_fnmatch() {
        for (pattern, text, wanted) in [
            ("a*c", "abbc", true),
            ("a*c", "abbd", false),
            ("*", "", true),
            ("**b*", "aab", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a[0-9B]c", "a7c", true),
            ("a[0-9B]c", "aBc", true),
            ("a[0-9B]c", "a-c", false),
            ("a[0-9", "a[0-9", true),
            ("ab", "abc", false),
            ("abc", "ab", false),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), wanted, "{pattern} {text}");
        }
    }
}
