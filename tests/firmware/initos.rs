//! initOS from the recipe that ships, small: built of Debian packages, signed, and booted as its recipe says, from NVMe, virtio
//! and USB, as it is and with changes that somebody must find; and what follows a changed init.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_digest::Digest;

use rustix::process::{Pid, Signal, kill_process};

use super::acceptance::held;
use super::canary::Canaries;
use super::host::{Host, Running, Told};

const RECIPE: &str = include_str!("../../images/initos/kiln.toml");
const ROOT: &str = r#"packages = ["iproute2", "kmod", "login", "openssh-server"]"#;

/// The recipe with few packages in the root.
fn small() -> String {
    let (before, rest) = RECIPE.split_once("[roots.recovery]\n").expect("the root");
    let (_, after) = rest.split_once("\n]\n").expect("the end of its packages");
    format!("{before}[roots.recovery]\nfrom = \"debian:trixie\"\n{ROOT}\n{after}")
}

struct Built {
    host: Host,
}

impl Built {
    fn new() -> Self {
        Self::on(Host::new())
    }

    fn on(host: Host) -> Self {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/initos");
        let copied = Command::new("cp").arg("-r").arg(shipped).arg(host.path("initos")).status();
        assert!(copied.expect("cp").success());
        fs::write(host.path("initos/kiln.toml"), small()).expect("room");
        Self { host }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut kiln = self.host.kiln();
        kiln.args(arguments).current_dir(self.host.path("initos")).env("SECRETS", self.host.path("secrets"));
        kiln
    }

    fn kiln(&self, arguments: &[&str]) -> Told {
        self.host.end(&mut self.command(arguments), &[])
    }

    /// As [`Built::kiln`], with all processes looked at for keys meanwhile.
    fn watched(&self, arguments: &[&str], canaries: &Canaries) -> Told {
        let kiln = Running::start(self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()));
        let search = canaries.watch(kiln.id());
        let told = kiln.end();
        let found = search.end();
        found.is_clean_but_for(&[PLACE]);
        assert!(found.has(PLACE, "environ of kiln") && found.places > 4, "{found:?}");
        told
    }

    /// Asserts that the files and links below WORK/boot are these and no others: `*` is each kernel's release.
    fn boot_is(&self, expected: &[&str]) {
        let boot = self.host.path("work/boot");
        let mut find = Command::new("find");
        find.args([".", "-mindepth", "1", "!", "-type", "d", "-printf", "%P\\n"]).current_dir(&boot);
        let output = find.output().expect("find");
        let found = String::from_utf8(output.stdout).expect("text");
        let releases = ["version", "version-virt"].map(|name| self.host.read(&format!("work/boot/{name}")));
        let expected: BTreeSet<String> = expected
            .iter()
            .flat_map(|path| releases.iter().map(|release| path.replace('*', release)))
            .collect();
        assert_eq!(found.lines().map(str::to_owned).collect::<BTreeSet<_>>(), expected);
    }

    /// The files and links below WORK/boot: the digest of each, and when it was written.
    fn files(&self) -> BTreeMap<String, (Digest, SystemTime)> {
        let boot = self.host.path("work/boot");
        let mut find = Command::new("find");
        let output = find
            .args([".", "!", "-type", "d", "-printf", "%P\\n"])
            .current_dir(&boot)
            .output()
            .expect("find");
        let paths = String::from_utf8(output.stdout).expect("text");
        let look = |path: &str| {
            let file = boot.join(path);
            let digest = Digest::of(&fs::read(&file).expect("a file"));
            (path.to_owned(), (digest, fs::metadata(&file).and_then(|it| it.modified()).expect("a time")))
        };
        paths.lines().map(look).collect()
    }

    /// Asserts of a squashfs image, as another's reader lists it: it has each path of `there`, and none that begins with what
    /// signs, with what building leaves, or with what a container has.
    fn image_has(&self, image: &str, there: &[&str]) {
        let path = self.host.path("work/boot/efi").join(image);
        let listed =
            Command::new("unsquashfs").args(["-l", "-d", ""]).arg(path).output().expect("squashfs-tools");
        let listed = String::from_utf8(listed.stdout).expect("text");
        let files: BTreeSet<&str> = listed.lines().map(|line| line.trim_start_matches('/')).collect();
        for path in there {
            assert!(files.contains(path), "{image} has no {path}: {} files", files.len());
        }
        let strange = |path: &&&str| {
            let name = path.rsplit('/').next().unwrap_or_default();
            [".dockerenv", "lost+found"].contains(*path)
                || ["etc/uefi-keys", "var/cache/apt/", "var/lib/apt/lists/", "etc/apk/cache", "var/cache/apk"]
                    .iter()
                    .any(|below| path.starts_with(below))
                || name.ends_with(".deb")
                || name.starts_with("ssh_host_")
        };
        let strange: Vec<_> = files.iter().filter(strange).collect();
        assert!(strange.is_empty(), "{image} has {strange:?}");
    }

    /// The release that a kernel's image says itself that it is of (Linux/x86 boot protocol, `kernel_version`).
    fn release_of(&self, kernel: &str) -> String {
        let image = fs::read(self.host.path("work/boot").join(kernel)).expect("built");
        let at = usize::from(u16::from_le_bytes([image[0x20e], image[0x20f]])) + 0x200;
        let words: Vec<u8> = image[at..].iter().copied().take_while(|byte| !b" \0".contains(byte)).collect();
        String::from_utf8(words).expect("text")
    }

    fn keys(&self) -> PathBuf {
        self.host.path("secrets/uefi-keys")
    }
}

/// What `all` and `sign` leave in WORK/boot, the images of the root apart.
const BOOT: [&str; 27] = [
    "cmdline",
    "cmdline.secure",
    "cmdline.usb",
    "config-*",
    "efi/EFI/BOOT/BOOTX64.EFI",
    "efi/EFI/BOOT/Initos-NEW-*.EFI",
    "efi/InitOS-*.EFI",
    "efi/InitOS-Signed-*.EFI",
    "efi/InitOS-Signed-usb.EFI",
    "efi/KEYS/KEK.auth",
    "efi/KEYS/KEK.cer",
    "efi/KEYS/KEK.crt",
    "efi/KEYS/PK.auth",
    "efi/KEYS/PK.cer",
    "efi/KEYS/PK.crt",
    "efi/KEYS/db.auth",
    "efi/KEYS/db.cer",
    "efi/KEYS/db.crt",
    "efi/KEYS/root.pem",
    "initos-hashes-*.cpio",
    "initos-xtra.cpio.gz",
    "initrd-initos.img-*",
    "linuxx64.efi.stub",
    "record.json",
    "version",
    "version-virt",
    "vmlinuz-*",
];

/// What is looked for to see that a search finds something: where SECRETS are, and the owner's public key.
const PLACE: &str = "where they are";
const PUBLIC: &str = "a public key";

#[test]
fn a_small_initos_is_built_signed_and_booted_and_what_was_changed_is_refused() {
    let start = kiln::clock::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs_f64();
    let built = Built::new();
    built.kiln(&["build", "all", "check"]).ends(0, &["nothing was signed", "check: done"]);
    built
        .kiln(&["build", "boot-nvme"])
        .ends(1, &["there are no keys in `boot/efi/KEYS`", "`kiln sign --init` makes keys"]);
    assert!(!built.host.path("secrets").exists(), "a build makes no keys");
    built.kiln(&["sign"]).ends(0, &["made keys", "signed 3 images"]);
    let separate = ["recovery", "modules-*", "firmware"].map(|name| {
        [format!("efi/{name}.sqfs"), format!("efi/{name}.sqfs.verity"), format!("efi/hash.{name}")]
    });
    let separate = separate.iter().flatten().map(String::as_str);
    built.boot_is(&BOOT.into_iter().chain(separate).collect::<Vec<_>>());
    no_unsigned_file_is_left_and_all_are_listed(&built);
    held("tree-complete");
    let versions = ["version", "version-virt"].map(|name| built.host.read(&format!("work/boot/{name}")));
    for version in &versions {
        built.image_has(&format!("modules-{version}.sqfs"), &["modules.dep", "modules.alias", "kernel"]);
        assert_eq!(&built.release_of(&format!("vmlinuz-{version}")), version);
    }
    built.image_has("recovery.sqfs", &["etc/initos-packages", "usr/sbin/initos-init-manual"]);
    built.image_has("firmware.sqfs", &[]);
    held("sqfs-content");
    let image = built.host.path("work/boot/efi/EFI/BOOT/BOOTX64.EFI");
    let verify = |certificate: &str| {
        let mut sbverify = Command::new("sbverify");
        sbverify.arg("--cert").arg(built.keys().join(certificate)).arg(&image);
        sbverify.output().expect("sbverify").status.success()
    };
    assert!(verify("db.crt") && !verify("KEK.crt"));
    let unsigned = built.host.path("work/boot/efi").join(format!("InitOS-{}.EFI", versions[0]));
    let listed = Command::new("sbverify").arg("--list").arg(unsigned).output().expect("sbverify");
    assert!(
        String::from_utf8_lossy(&[listed.stdout, listed.stderr].concat())
            .contains("No signature table present")
    );
    held("sbverify-secure");
    let signed = fs::read(&image).expect("it was signed");
    let public = fs::read(built.keys().join("authorized_keys")).expect("made");
    let canaries = Canaries::of(&built.keys())
        .with_control(PLACE, built.host.path("secrets").as_os_str().as_encoded_bytes())
        .with_control(PUBLIC, public.split(|byte| *byte == b' ').nth(1).expect("its second word"));

    // With keys a build signs by itself, the same bytes, and does nothing else.
    let again = built.watched(&["build", "all"], &canaries);
    again.ends(0, &["signatures are made anew each time", "1 run, 7 up to date"]);
    assert!(fs::read(&image).expect("signed") == signed, "signing twice gives the same bytes");

    // The boots of the recipe: each tells of itself in a report.
    let tested = built.watched(&["build", "test", "-j", "2"], &canaries);
    tested.ends(0, &["boot-nvme: done", "boot_usb: done"]);
    for report in REPORTS {
        let xml = built.host.read(&format!("work/reports/{report}/junit.xml"));
        assert!(xml.contains("failures=\"0\" errors=\"0\" skipped=\"0\""), "{report}: {xml}");
    }
    for (report, version) in [("boot_usb", &versions[0]), ("boot-nvme", &versions[1])] {
        let said = built.host.read(&format!("work/reports/{report}/timeline.jsonl"));
        assert!(said.lines().any(|line| line.contains(&format!("\"{version}\""))), "`uname -r`: {said}");
    }
    let console = built.host.read("work/reports/other_hash/console.txt");
    assert!(console.contains("INITOS: FAILED") && !console.contains("login:"), "{console}");
    let events = built.kiln(&["build", "test", "--json", "--trace-out", "../trace.json"]);
    events.ends(0, &[]);
    assert!(events.text().contains("\"run\":1,\"cut_off\":14,"), "{}", events.text());
    fs::write(built.host.path("events"), &events.stdout).expect("room");

    let told = boot_of_a_stranger(&built, &canaries);
    told.ends(1, &["met: expect login:", "the guest does not take the key for root"]);
    held("ssh-access");
    for (name, output) in [("stdout", &told.stdout), ("stderr", &told.stderr.into_bytes())] {
        fs::write(built.host.path(name), output).expect("room");
    }
    no_step_sees_a_key(&built, &canaries);

    // And no file that was made meanwhile: events, reports and consoles, WORK, the store's contents, records and traces.
    let store = fs::canonicalize(built.host.path("store/blobs")).expect("the shared store's");
    let found = canaries.below(start, &[&built.host.path(""), store.parent().expect("a folder")]);
    let (there, elsewhere): (Vec<_>, Vec<_>) =
        found.hits.iter().partition(|(_, place)| place.contains("/secrets/uefi-keys/"));
    assert!(there.len() >= 4, "the keys themselves: {found:?}");
    let elsewhere: Vec<_> =
        elsewhere.iter().filter(|(name, _)| ![PLACE, PUBLIC].contains(&&name[..])).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
    held("sign-offline");
}

/// Its sshd takes the owner's key and no other. While it runs, nothing of the machine has a private key in it.
fn boot_of_a_stranger(built: &Built, canaries: &Canaries) -> Told {
    let stranger = built.host.path("stranger");
    let mut keys = built.host.kiln();
    keys.args(["sign", "--init"]).current_dir(built.host.path("initos")).env("SECRETS", &stranger);
    built.host.end(&mut keys, &[]).ends(0, &["made keys"]);
    let esp = built.host.path("work/boot/efi");
    let key = stranger.join("uefi-keys/root.key");
    let shown = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (esp, trusted, key) = (shown(&esp), shown(&esp.join("KEYS")), shown(&key));
    let mut arguments = vec!["boot", &esp, "--bus", "nvme", "--label", "BOOTA", "--secure-boot", &trusted];
    arguments.extend(["--ssh-key", &key, "-e", "within 6m", "-e", "expect INITOS: sshd is up"]);
    arguments.extend(["-e", "expect login:", "-e", "ssh true"]);
    let mut kiln = Running::start(built.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()));
    kiln.read_until("INITOS: sshd is up");
    // The machine lives for as long as its kiln does nothing.
    let signal = |signal| kill_process(Pid::from_child(&kiln), signal).expect("it runs");
    signal(Signal::STOP);
    let found = canaries.inside(kiln.id());
    signal(Signal::CONT);
    found.is_clean_but_for(&[PLACE, PUBLIC]);
    assert!(found.has(PUBLIC, "memory of qemu") && found.bytes > 100 << 20, "{found:?}");
    kiln.end()
}

/// A step that waits, in the middle of a build's life: its machine has nothing of SECRETS.
fn no_step_sees_a_key(built: &Built, canaries: &Canaries) {
    let mut step = built.host.command(&["--stdin"], &["sh", "-c", "echo ready-$((1 + 1)); read word"]);
    step.env("SECRETS", built.host.path("secrets")).stdin(Stdio::piped());
    let mut kiln = Running::start(step.stdout(Stdio::piped()).stderr(Stdio::piped()));
    kiln.read_until("ready-2");
    let found = canaries.clone().with_control("what it printed", b"ready-2").inside(kiln.id());
    found.is_clean_but_for(&[PLACE, "what it printed"]);
    assert!(found.has("what it printed", "memory of qemu"), "{found:?}");
    drop(kiln.stdin.take());
    kiln.end().ends(1, &["exited with status 1"]);
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn one_image_with_all_in_it_boots_and_is_opened_by_the_signed_hash_alone() {
    let built = Built::new();
    built.kiln(&["sign", "--init"]).ends(0, &["made keys"]);
    built
        .kiln(&[
            "build",
            "boot-nvme",
            "corrupt_root_single",
            "corrupt_hashes_single",
            "other_hash_single",
            "--set",
            "layout=single",
            "-j",
            "2",
        ])
        .ends(0, &["boot-nvme: done", "other_hash_single: done"]);
    let single =
        ["initos.sqfs", "initos.sqfs.verity", "initos.hash"].map(|name| format!("efi/initos/{name}"));
    built.boot_is(&BOOT.into_iter().chain(single.iter().map(String::as_str)).collect::<Vec<_>>());
    let console = built.host.read("work/reports/boot-nvme/console.txt");
    assert!(
        console.contains("Mounted verity root") && !console.contains("Mounted verity modules"),
        "{console}"
    );
    held("tree-complete");
    let version = built.host.read("work/boot/version");
    let modules = format!("usr/lib/modules/{version}/modules.dep");
    built.image_has(
        "initos/initos.sqfs",
        &[&modules, "lib", "usr/lib/firmware", "usr/sbin/initos-init-manual"],
    );
    held("sqfs-content");
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn two_builds_in_two_places_are_the_same_bytes_signatures_too() {
    // The packages are fetched once; roots and all else the other makes for itself.
    let (one, other) = (Built::new(), Built::on(Host::without(&["images", "records"])));
    one.kiln(&["sign", "--init"]).ends(0, &["made keys"]);
    let mut copy = Command::new("cp");
    copy.arg("-rp").arg(one.host.path("secrets")).arg(other.host.path("secrets"));
    assert!(copy.status().expect("cp").success());
    for built in [&one, &other] {
        // Nothing that another build has noted is taken for this one.
        let name: String = built.host.path("").to_string_lossy().bytes().map(|b| format!("{b:x}")).collect();
        let scope = &name[name.len() - 30..];
        let told = built.kiln(&["build", "all", "--scope", scope]);
        told.ends(0, &["8 run", "signatures are made anew"]);
    }
    let works = [&one, &other].map(|built| built.host.path("work"));
    let diff = Command::new("diff").args(["-r", "--no-dereference"]).args(&works).output().expect("diff");
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
    let [first, second] = works.each_ref().map(|work| {
        let mut find = Command::new("find");
        find.current_dir(work).args([".", "-printf", "%p %y %m %n\n"]);
        let mut lines: Vec<String> = String::from_utf8_lossy(&find.output().expect("find").stdout)
            .lines()
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    });
    assert_eq!(first, second, "kinds, modes and links");
    assert!(works[0].join("boot/efi/EFI/BOOT/BOOTX64.EFI").exists());
    held("reproducible");
}

/// Those of what must boot, and of what must not.
const REPORTS: [&str; 14] = [
    "boot-nvme",
    "boot-virtio",
    "boot_usb",
    "refused-linux",
    "refused-initrd",
    "refused-cmdline",
    "refused-none",
    "refused-stranger",
    "insecure-none",
    "insecure-stranger",
    "no_way_in",
    "corrupt_root",
    "corrupt_hashes",
    "other_hash",
];

/// How long a build takes that makes the patch of the initrd and the images anew, on a host that does nothing else.
const INCREMENTAL: Duration = Duration::from_secs(2);

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn a_changed_init_makes_the_patch_and_the_images_anew_and_nothing_else() {
    let built = Built::new();
    built.kiln(&["sign", "--init"]).ends(0, &["made keys"]);
    let script = |word: &str| {
        let text = format!("#!/bin/sh\necho EDITION-{word} >/dev/console\nexec /usr/bin/sleep 1h\n");
        let path = built.host.path("initos/sbin/initos-init-manual");
        fs::write(&path, text).expect("room");
        fs::set_permissions(path, Permissions::from_mode(0o755)).expect("it is ours");
    };
    fs::create_dir(built.host.path("initos/sbin")).expect("a folder");
    script("first");
    built.kiln(&["build", "all"]).ends(0, &[]);
    let before = built.files();
    let mut took = Vec::new();
    for word in ["second", "third"] {
        script(word);
        let start = Instant::now();
        // Nothing is fetched.
        let told = built.kiln(&["build", "all", "--offline"]);
        took.push(start.elapsed());
        told.ends(0, &["efi2: ", "2 run, 6 up to date"]);
    }
    // Of all others the bytes are the same, and so are the times: they were not written again.
    let after = built.files();
    let names = |files: &BTreeMap<String, (Digest, SystemTime)>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
    let changed: Vec<&String> =
        after.iter().filter(|(path, now)| before[*path].0 != now.0).map(|(p, _)| p).collect();
    let written: Vec<&String> =
        after.iter().filter(|(path, now)| before[*path].1 != now.1).map(|(p, _)| p).collect();
    let is_made_anew = |path: &&String| {
        let signed = path.starts_with("efi/InitOS-Signed-") || path.as_str() == "efi/EFI/BOOT/BOOTX64.EFI";
        let debug = path.starts_with("efi/EFI/BOOT/Initos-NEW-");
        signed || debug || ["initos-xtra.cpio.gz", "record.json"].contains(&path.as_str())
    };
    assert_eq!(changed, after.keys().filter(is_made_anew).collect::<Vec<_>>());
    let only_written: Vec<_> = written.iter().filter(|path| !changed.contains(*path)).collect();
    // Public keys go with signatures, all together.
    assert!(only_written.iter().all(|path| path.starts_with("efi/KEYS/")), "{only_written:?}");
    assert!(took.iter().min().is_some_and(|least| *least < INCREMENTAL), "it took {took:?}");
    // And what was edited last is what runs, signed.
    let esp = built.host.path("work/boot/efi");
    let cloud = before.keys().find(|path| path.ends_with("cloud-amd64.EFI") && path.contains("Signed"));
    let cloud = built.host.path("work/boot").join(cloud.expect("signed"));
    fs::copy(cloud, esp.join("EFI/BOOT/BOOTX64.EFI")).expect("room");
    let shown = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (esp, keys) = (shown(&esp), shown(&esp.join("KEYS")));
    let mut arguments = vec!["boot", &esp, "--bus", "nvme", "--label", "BOOTA", "--secure-boot", &keys];
    arguments.extend([
        "-e",
        "within 4m",
        "-e",
        "expect SECURE: Secure Boot is on",
        "-e",
        "reject EDITION-first",
    ]);
    arguments.extend(["-e", "reject EDITION-second", "-e", "expect EDITION-third"]);
    built.kiln(&arguments).ends(0, &["as the script wants it"]);
    held("efi2-incremental");
}

/// Nothing is unsigned but what says so by its name, and the record that goes with what is signed has the digest of each file
/// that it is made of: an image's is the root of its hash tree.
fn no_unsigned_file_is_left_and_all_are_listed(built: &Built) {
    let files = built.files();
    let record = built.host.read("work/boot/record.json");
    for (path, (digest, _)) in &files {
        let is_program = path.to_ascii_lowercase().ends_with(".efi");
        let is_debug = path.contains("Initos-NEW-") || (path.contains("InitOS-") && !path.contains("Signed"));
        if is_program {
            let mut sbverify = Command::new("sbverify");
            sbverify
                .arg("--cert")
                .arg(built.keys().join("db.crt"))
                .arg(built.host.path("work/boot").join(path));
            assert_eq!(sbverify.output().expect("sbverify").status.success(), !is_debug, "{path}");
        }
        let is_ingredient = ["vmlinuz-", "initrd-", "initos-xtra", "linuxx64", "cmdline.", "efi/hash."]
            .iter()
            .any(|start| path.starts_with(start));
        if is_ingredient || path.ends_with(".verity") {
            assert!(record.contains(&digest.to_string()), "the record has no digest of {path}: {record}");
        }
    }
}
