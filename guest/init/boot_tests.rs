//! Boots of a machine that is played: which partitions there are, what is on them, and what the firmware says.

use std::collections::BTreeMap;

use super::*;

/// A partition: label, files by path.
type Partition = (&'static str, BTreeMap<String, Vec<u8>>);

#[derive(Default)]
struct Played {
    said: Vec<String>,
    initrd: BTreeMap<String, Vec<u8>>,
    variables: BTreeMap<String, Vec<u8>>,
    partitions: BTreeMap<&'static str, Partition>,
    /// When a device appears.
    late: BTreeMap<&'static str, Duration>,
    root: Vec<&'static str>,
    written: BTreeMap<String, Vec<u8>>,
    mounted: Option<String>,
    /// Partitions that were made writable.
    writable: Vec<String>,
    /// That cannot be.
    protected: Vec<&'static str>,
    opened: Vec<(String, RootHash)>,
    time: Duration,
    /// Files that verity refuses.
    damaged: Vec<&'static str>,
    logs: usize,
    /// The partition that was mounted then.
    logged_on: Option<String>,
    loaded: Vec<String>,
    /// Devices that appear when `usb-storage` is loaded, and how long that takes.
    on_usb: Vec<&'static str>,
    usb_takes: Duration,
    programs: Vec<String>,
}

impl System for Played {
    fn say(&mut self, text: &str) {
        self.said.push(text.to_owned());
    }
    fn load_module(&mut self, name: &str) -> Result<Loaded, String> {
        self.loaded.push(name.to_owned());
        if name == "usb-storage" {
            self.time += self.usb_takes;
        }
        if name == "simpledrm" { Ok(Loaded::Absent) } else { Ok(Loaded::Yes) }
    }
    fn drivers(&mut self, with_usb: bool) -> Vec<String> {
        // What is behind a controller appears once that has its driver.
        let behind = self.loaded.iter().any(|name| name == "vmd").then_some("ahci");
        let usb = with_usb.then_some("sdhci_usb");
        ["vmd"].into_iter().chain(behind).chain(usb).map(ToOwned::to_owned).collect()
    }
    fn variable(&mut self, name: &str) -> Option<Vec<u8>> {
        self.variables.get(name).cloned()
    }
    fn initrd_file(&mut self, path: &str) -> Option<Vec<u8>> {
        self.initrd.get(path).cloned()
    }
    fn volumes(&mut self) -> Vec<Volume> {
        let has_usb = self.loaded.iter().any(|name| name == "usb-storage");
        let there = |device: &&str| {
            self.late.get(device).is_none_or(|from| self.time >= *from)
                && (has_usb || !self.on_usb.contains(device))
        };
        let volume = |(device, (label, _)): (&&str, &Partition)| Volume {
            device: (*device).to_owned(),
            label: (*label).to_owned(),
        };
        self.partitions.iter().filter(|(device, _)| there(device)).map(volume).collect()
    }
    fn mount_volume(&mut self, device: &str) -> Result<(), String> {
        assert_eq!(self.mounted, None, "one at a time");
        self.mounted = Some(device.to_owned());
        Ok(())
    }
    fn write_volume(&mut self) -> Result<(), String> {
        let device = self.mounted.clone().expect("one that is mounted");
        if self.protected.iter().any(|protected| *protected == device) {
            return Err("it is protected".to_owned());
        }
        self.writable.push(device);
        Ok(())
    }
    fn unmount_volume(&mut self) {
        self.mounted = None;
    }
    fn volume_file(&mut self, path: &str) -> Option<Vec<u8>> {
        self.partitions.get(self.mounted.as_deref()?)?.1.get(path).cloned()
    }
    fn open(&mut self, image: &Image, _: OnCorruption) -> Result<(), String> {
        if self.damaged.iter().any(|file| *file == image.file) {
            return Err("damaged".to_owned());
        }
        self.opened.push((image.file.clone(), image.hash.clone()));
        Ok(())
    }
    fn close(&mut self) {
        self.opened.clear();
    }
    fn mount_image(&mut self, _: Role, _: &str) -> Result<(), String> {
        Ok(())
    }
    fn root_has(&mut self, path: &str) -> bool {
        self.root.contains(&path)
    }
    fn write_root(&mut self, path: &str, bytes: &[u8]) -> Result<(), String> {
        self.written.insert(path.to_owned(), bytes.to_vec());
        Ok(())
    }
    fn copy_local(&mut self, _: &str) -> Result<(), String> {
        Ok(())
    }
    fn copy_programs(&mut self, prefixes: &[&str]) -> Result<(), String> {
        assert!(self.mounted.is_some(), "the root is there");
        self.programs.extend(prefixes.iter().map(ToString::to_string));
        Ok(())
    }
    fn write_logs(&mut self) {
        self.logs += 1;
        self.logged_on.clone_from(&self.mounted);
    }
    fn pause(&mut self, time: Duration) {
        self.time += time;
    }
    fn uptime(&mut self) -> Duration {
        self.time
    }
}

const OURS: &str = "aa";
const THEIRS: &str = "bb";

fn files(hash: &str) -> BTreeMap<String, Vec<u8>> {
    [("initos/initos.hash".to_owned(), hash.repeat(32).into_bytes())].into()
}

/// A secure machine started by `entry`, with our image in both slots.
fn machine(entry: u16) -> Played {
    let [low, high] = entry.to_le_bytes();
    Played {
        initrd: [("/local/initos.hash".to_owned(), OURS.repeat(32).into_bytes())].into(),
        variables: [
            (format!("SecureBoot-{}", efi::GLOBAL), vec![6, 0, 0, 0, 1]),
            (format!("BootCurrent-{}", efi::GLOBAL), vec![6, 0, 0, 0, low, high]),
        ]
        .into(),
        partitions: [("vda1", ("BOOTA", files(OURS))), ("vda2", ("BOOTB", files(OURS)))].into(),
        root: vec!["/etc", "/lib/modules/6.12/modules.dep", "/sbin/initos-init-manual", "/sbin/init"],
        ..Played::default()
    }
}

fn start(played: &mut Played, command_line: &str) -> Result<&'static str, Fatal> {
    boot(played, &Orders::read("6.12", command_line))
}

fn written(played: &Played, name: &str) -> String {
    String::from_utf8_lossy(&played.written[&format!("/var/initos/{name}")]).into_owned()
}

#[test]
fn the_slot_of_the_firmwares_entry_is_booted() {
    for (entry, device, next) in [(0x1001, "vda1", "B"), (0x1002, "vda2", "A"), (0x0003, "vda1", "B")] {
        let mut played = machine(entry);
        assert_eq!(start(&mut played, ""), Ok("/sbin/initos-init-manual"));
        assert_eq!(played.mounted.as_deref(), Some(device));
        assert_eq!(written(&played, "BOOT_NEXT"), next);
        assert_eq!(written(&played, "BOOT_SECURE"), "1");
        assert_eq!(written(&played, "BOOT_CURRENT"), format!("{entry:04X}"));
    }
}

#[test]
fn a_slot_of_another_version_or_a_damaged_one_is_passed_over_with_a_word() {
    let mut played = machine(0x1001);
    played.partitions.insert("vda1", ("BOOTA", files(THEIRS)));
    assert!(start(&mut played, "").is_ok());
    assert_eq!(played.mounted.as_deref(), Some("vda2"));
    assert!(played.said.iter().any(|line| line.contains("vda1") && line.contains("another version")));
    let mut played = machine(0x1001);
    played.damaged = vec!["initos/initos.sqfs"];
    assert!(matches!(start(&mut played, ""), Err(Fatal::NoPartition(_))));
    assert_eq!((played.mounted, played.opened), (None, vec![]), "nothing of it stays");
}

#[test]
fn what_is_opened_is_opened_with_the_signed_hash() {
    let mut played = machine(0x1001);
    start(&mut played, "").expect("it boots");
    let signed = RootHash::read(OURS.repeat(32).as_bytes()).expect("a hash");
    assert_eq!(played.opened, [("initos/initos.sqfs".to_owned(), signed)]);
}

#[test]
fn without_a_partition_it_waits_and_then_fails_without_a_hang() {
    let mut played = machine(0x1001);
    played.partitions.clear();
    let fatal = start(&mut played, "").expect_err("there is none");
    assert!(fatal.to_string().contains("boot partition not found"), "{fatal}");
    assert!(played.time >= DEVICE_PATIENCE && played.time < 2 * DEVICE_PATIENCE, "{:?}", played.time);
    let before = played.time;
    fail(&mut played, &fatal);
    assert_eq!((played.logs, played.time - before), (1, BEFORE_RESTART));
    assert_eq!(played.logged_on, None, "there is no partition");
    assert!(played.said.iter().any(|line| line.starts_with("FAILED: ")));
    assert!(played.said.iter().any(|line| line == "Rebooting in 20 sec"));
}

#[test]
fn only_the_partition_that_is_booted_from_is_written_to_and_it_need_not_be() {
    let mut played = machine(0x1001);
    // In front of it, and somebody else's.
    played.partitions.insert("sda1", ("BOOTA", files(THEIRS)));
    start(&mut played, "").expect("it boots");
    assert_eq!(played.writable, ["vda1"]);
    let mut played = machine(0x1001);
    played.protected.push("vda1");
    start(&mut played, "").expect("it boots");
    assert_eq!((played.mounted.as_deref(), played.writable), (Some("vda1"), vec![]));
    assert!(played.said.iter().any(|line| line.starts_with("No logs on vda1")), "{:?}", played.said);
}

#[test]
fn a_failure_leaves_its_logs_on_the_partition_or_on_one_that_was_passed_over() {
    let mut played = machine(0x1001);
    for device in ["vda1", "vda2"] {
        played.partitions.get_mut(device).expect("it is there").1 = files(THEIRS);
    }
    // In front of them, and somebody else's.
    played.partitions.insert("sda1", ("DATA", files(THEIRS)));
    played.partitions.insert("sdb1", ("", files(THEIRS)));
    let fatal = start(&mut played, "").expect_err("none is right");
    fail(&mut played, &fatal);
    assert_eq!(
        (played.logged_on.as_deref(), played.mounted.as_deref()),
        (Some("vda1"), None),
        "of ours, and not in use"
    );
    for device in ["vda1", "vda2"] {
        played.partitions.remove(device);
    }
    fail(&mut played, &fatal);
    assert_eq!((played.logged_on, played.mounted), (None, None), "none on what may be anybody's");
    let mut played = machine(0x1002);
    played.root.clear();
    let fatal = start(&mut played, "").expect_err("it is no root");
    fail(&mut played, &fatal);
    assert_eq!(played.logged_on.as_deref(), Some("vda2"));
}

#[test]
fn a_disk_that_comes_late_is_waited_for_before_the_other_slot_is_taken() {
    let mut played = machine(0x1001);
    played.late.insert("vda1", Duration::from_secs(3));
    start(&mut played, "").expect("it boots");
    assert_eq!(played.mounted.as_deref(), Some("vda1"));
}

#[test]
fn a_partition_of_another_label_or_of_none_is_the_last_resort() {
    for (label, entry, next) in [("", 0x1001, "B"), ("QEMU VVFAT", 0x1002, "A"), ("BOOTUSB", 0x0003, "B")] {
        let mut played = machine(entry);
        played.partitions = [
            ("sda1", ("DATA", files(THEIRS))),
            ("sdb1", (label, files(OURS))),
            ("vda1", ("BOOTA", files(THEIRS))),
        ]
        .into();
        played.on_usb = vec!["sdb1"];
        start(&mut played, "").expect("it boots");
        assert_eq!((played.mounted.as_deref(), played.time), (Some("sdb1"), DEVICE_PATIENCE));
        // Which slot is next is a matter of the entry, as ever.
        assert_eq!(
            (written(&played, "BOOT_NEXT").as_str(), written(&played, "BOOT_DEVICE").as_str()),
            (next, "sdb1")
        );
        let skipped: Vec<&str> =
            played.said.iter().filter_map(|line| line.strip_prefix("Skipping ")).collect();
        let why = "initos/initos.hash is of another version";
        assert_eq!(skipped, [format!("vda1 (BOOTA): {why}"), format!("sda1 (DATA): {why}")]);
        let signed = RootHash::read(OURS.repeat(32).as_bytes()).expect("a hash");
        assert_eq!(played.opened, [("initos/initos.sqfs".to_owned(), signed)]);
    }
    let mut played = machine(0x1001);
    played.partitions = [("sda", ("", files(THEIRS)))].into();
    let fatal = start(&mut played, "").expect_err("a hash is the signed one, or nothing is");
    assert_eq!(fatal, Fatal::NoPartition("BOOTA, BOOTB".to_owned()));
    assert!(
        played.said.iter().any(|line| line.starts_with("Skipping sda (no label): ")),
        "{:?}",
        played.said
    );
    assert_eq!((played.mounted, played.opened), (None, vec![]));
}

#[test]
fn a_slot_that_comes_at_last_wins_over_what_is_there_without_a_label() {
    for late in [Duration::from_secs(3), DEVICE_PATIENCE] {
        for label in ["BOOTA", "BOOTB"] {
            let mut played = machine(0x1001);
            played.partitions = [("sda1", ("", files(OURS))), ("vda1", (label, files(OURS)))].into();
            played.late.insert("vda1", late);
            start(&mut played, "").expect("it boots");
            assert_eq!(played.mounted.as_deref(), Some("vda1"), "{label} after {late:?}");
            assert!(!played.said.iter().any(|line| line.contains("any label")), "{:?}", played.said);
        }
    }
}

#[test]
fn separate_images_are_all_needed() {
    let hash = |hash: &str| hash.repeat(32).into_bytes();
    let names = ["hash.recovery", "hash.modules-6.12", "hash.firmware"];
    let mut played = machine(0x1001);
    played.initrd = names.iter().map(|name| (format!("/boot/{name}"), hash(OURS))).collect();
    let all: BTreeMap<String, Vec<u8>> = names.iter().map(|name| ((*name).to_owned(), hash(OURS))).collect();
    let mut without = all.clone();
    without.remove("hash.firmware");
    played.partitions = [("vda1", ("BOOTA", without)), ("vda2", ("BOOTB", all))].into();
    start(&mut played, "").expect("it boots");
    let opened: Vec<&str> = played.opened.iter().map(|(file, _)| file.as_str()).collect();
    assert_eq!(opened, ["recovery.sqfs", "modules-6.12.sqfs", "firmware.sqfs"]);
    assert_eq!(played.mounted.as_deref(), Some("vda2"));
}

#[test]
fn an_initrd_without_a_hash_or_with_a_broken_one_starts_nothing() {
    let mut played = machine(0x1001);
    played.initrd.clear();
    assert_eq!(start(&mut played, ""), Err(Fatal::NoHash));
    played.initrd.insert("/local/initos.hash".to_owned(), b"short".to_vec());
    assert!(matches!(start(&mut played, ""), Err(Fatal::BadHash { .. })));
    assert_eq!(played.mounted, None);
}

#[test]
fn a_root_that_lacks_what_it_needs_is_not_started() {
    for missing in ["/etc", "/lib/modules/6.12/modules.dep"] {
        let mut played = machine(0x1001);
        played.root.retain(|path| *path != missing);
        assert_eq!(start(&mut played, ""), Err(Fatal::NotARoot(missing.to_owned())));
    }
    let mut played = machine(0x1001);
    played.root.truncate(2);
    assert!(matches!(start(&mut played, ""), Err(Fatal::NotARoot(_))));
}

#[test]
fn the_partition_says_who_unlocks_and_a_secure_boot_never_takes_the_insecure_way() {
    let mut played = machine(0x1001);
    played.root.extend(["/sbin/initos-init-tpm2", "/sbin/initos-init-insecure"]);
    let partition = played.partitions.get_mut("vda1").expect("it is there");
    partition.1.insert("initos/tpm_handle".to_owned(), b"0x81000001".to_vec());
    assert_eq!(start(&mut played, ""), Ok("/sbin/initos-init-tpm2"));
    played.mounted = None;
    assert_eq!(start(&mut played, "initos=usb"), Ok("/sbin/initos-init-tpm2"));
    played.mounted = None;
    played.variables.clear();
    assert_eq!(start(&mut played, "initos=USB"), Ok("/sbin/initos-init-insecure"));
}

#[test]
fn drivers_are_loaded_for_what_appears_and_absent_modules_are_one_line() {
    let mut played = machine(0x1001);
    start(&mut played, "").expect("it boots");
    let count = |played: &Played, wanted: &str| played.loaded.iter().filter(|name| *name == wanted).count();
    assert_eq!((count(&played, "vmd"), count(&played, "ahci"), count(&played, "sdhci_usb")), (1, 1, 0));
    assert_eq!(count(&played, "usb-storage"), 0, "sticks are for the image of sticks");
    assert!(played.said.iter().any(|line| line == "Not in this initrd: simpledrm"), "{:?}", played.said);
    assert_eq!(played.programs, PROGRAMS, "the initrd's programs win");
    let mut played = machine(0x1001);
    start(&mut played, "initos=usb").expect("it boots");
    assert_eq!((count(&played, "usb-storage"), count(&played, "sdhci_usb")), (1, 1));
    assert!(played.loaded.ends_with(&["efivarfs", "vmd", "sdhci_usb", "ahci"].map(ToOwned::to_owned)));
}

#[test]
fn a_stick_is_found_under_secure_boot_when_no_other_bus_has_the_partition() {
    let mut played = machine(0x0003);
    played.partitions = [("sda", ("BOOTA", files(OURS)))].into();
    played.on_usb = vec!["sda"];
    start(&mut played, "").expect("it boots");
    assert_eq!((played.mounted.as_deref(), played.time), (Some("sda"), WITHOUT_USB + LOOK_AGAIN));
    for name in ["usb-storage", "sdhci_usb", "vmd"] {
        assert_eq!(played.loaded.iter().filter(|loaded| *loaded == name).count(), 1, "{name}");
    }
    // The disk of another version beside it makes no difference, nor does what the stick is called beside the slots.
    let mut played = machine(0x0003);
    played.partitions = [
        ("nvme0n1p1", ("BOOTA", files(THEIRS))),
        ("sda", ("BOOTA", files(OURS))),
        ("sdb", ("BOOTUSB", files(OURS))),
    ]
    .into();
    played.on_usb = vec!["sda", "sdb"];
    start(&mut played, "").expect("it boots");
    assert_eq!((played.mounted.as_deref(), written(&played, "BOOT_DEVICE")), (Some("sda"), "sda".to_owned()));
}

#[test]
fn a_stick_of_another_version_is_not_taken_and_the_machine_does_not_wait_longer() {
    let mut played = machine(0x1001);
    played.partitions = [("sda", ("BOOTA", files(THEIRS)))].into();
    played.on_usb = vec!["sda"];
    assert!(matches!(start(&mut played, ""), Err(Fatal::NoPartition(_))));
    assert_eq!((played.mounted, played.opened), (None, vec![]));
    assert!(played.said.iter().any(|line| line.contains("sda") && line.contains("another version")));
    assert_eq!(played.time, DEVICE_PATIENCE);
}

#[test]
fn the_time_that_loading_takes_is_not_that_of_the_devices() {
    let mut played = machine(0x1001);
    played.partitions = [("sda", ("BOOTA", files(OURS)))].into();
    played.on_usb = vec!["sda"];
    played.usb_takes = DEVICE_PATIENCE;
    played.late.insert("sda", DEVICE_PATIENCE + Duration::from_secs(3));
    start(&mut played, "").expect("it boots");
    assert_eq!(played.mounted.as_deref(), Some("sda"));
}

#[test]
fn corruption_restarts_unless_a_panic_is_asked_for() {
    assert_eq!(Orders::read("x", "quiet").corruption, OnCorruption::Restart);
    assert_eq!(Orders::read("x", "quiet initos.corruption=panic").corruption, OnCorruption::Panic);
}

#[test]
fn the_partition_is_mounted_by_the_tables_that_are_loaded_for_it() {
    let options = VOLUME_OPTIONS.to_str().expect("text");
    let tables: Vec<String> = options
        .split(',')
        .filter_map(|option| match option.split_once('=')? {
            ("codepage", number) => Some(format!("nls_cp{number}")),
            ("iocharset", name) => Some(format!("nls_{name}")),
            _ => None,
        })
        .collect();
    assert_eq!(tables.len(), 2, "{options}");
    for table in &tables {
        assert!(MODULES.contains(&table.as_str()), "{table}");
    }
}
