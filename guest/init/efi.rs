//! What the firmware says of this boot: whether Secure Boot is on, and which of its entries was taken. Pure.

/// The GUID of the variables that the UEFI specification defines (UEFI 2.10 §3.3), as efivarfs spells it.
pub const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// How the machine was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Start {
    /// Whether Secure Boot was on. Without firmware, or where it does not say, it was not.
    pub is_secure: bool,
    /// The number of the firmware's entry.
    pub entry: Option<u16>,
}

impl Start {
    /// From the variables SecureBoot and BootCurrent as efivarfs gives them: four bytes of attributes, then the value.
    #[must_use]
    pub fn of(secure_boot: Option<&[u8]>, boot_current: Option<&[u8]>) -> Self {
        let entry = match boot_current {
            Some(&[_, _, _, _, low, high]) => Some(u16::from_le_bytes([low, high])),
            _ => None,
        };
        Self { is_secure: matches!(secure_boot, Some(&[_, _, _, _, 1])), entry }
    }
}

/// Which of two sets of files on disk is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// The first.
    A,
    /// The second.
    B,
}

impl Slot {
    /// The label of its partition.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::A => "BOOTA",
            Self::B => "BOOTB",
        }
    }

    /// Its letter.
    #[must_use]
    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
        }
    }

    /// The other one, where the next version goes.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// The slot to start from. The firmware's entries 1001 and 1002 are made for the secure image of each slot, 1003 and 1004
/// for the other one.
#[must_use]
pub fn slot(start: Start) -> Slot {
    match start.entry {
        Some(0x1002 | 0x1004) => Slot::B,
        _ => Slot::A,
    }
}

/// What the partitions of initOS are called.
pub const LABELS: [&str; 3] = ["BOOTA", "BOOTB", STICK];
const STICK: &str = "BOOTUSB";

/// Labels of partitions in the order in which they are looked at. A USB stick comes first only where the image is the
/// one for sticks, and only without Secure Boot.
#[must_use]
pub fn labels(start: Start, is_usb: bool) -> Vec<&'static str> {
    let slot = slot(start);
    let from_slot = start.entry.is_some_and(|entry| (0x1001..=0x1004).contains(&entry));
    let stick = (is_usb && !start.is_secure && !from_slot).then_some(STICK);
    stick.into_iter().chain([slot.label(), slot.other().label()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secure_boot_is_on_only_where_the_variable_says_one() {
        let on = |value: Option<&[u8]>| Start::of(value, None).is_secure;
        assert!(on(Some(&[6, 0, 0, 0, 1])));
        for value in
            [None, Some(&[6, 0, 0, 0, 0][..]), Some(&[1]), Some(&[6, 0, 0, 0, 1, 1]), Some(&[6, 0, 0, 0, 2])]
        {
            assert!(!on(value), "{value:?}");
        }
    }

    #[test]
    fn the_firmwares_entry_decides_the_slot() {
        let start = |low, high| Start::of(Some(&[6, 0, 0, 0, 1]), Some(&[6, 0, 0, 0, low, high]));
        assert_eq!(labels(start(0x01, 0x10), false), ["BOOTA", "BOOTB"]);
        assert_eq!(labels(start(0x02, 0x10), false), ["BOOTB", "BOOTA"]);
        assert_eq!(labels(start(0, 0), false), ["BOOTA", "BOOTB"]);
        assert_eq!(slot(Start::default()).other().letter(), "B");
    }

    #[test]
    fn a_stick_is_never_first_under_secure_boot() {
        let insecure = Start { is_secure: false, entry: Some(0) };
        let secure = Start { is_secure: true, ..insecure };
        assert_eq!(labels(insecure, true)[0], "BOOTUSB");
        assert_eq!(labels(Start { entry: Some(0x1004), ..insecure }, true)[0], "BOOTB");
        assert!(!labels(secure, true).contains(&"BOOTUSB"));
        assert!(!labels(insecure, false).contains(&"BOOTUSB"));
    }
}
