//! What a bench makes of a WORK that a test says, or why it does not.

use std::sync::Arc;

use super::*;
use crate::plan::graph::Command;
use crate::plan::recipe::Recipe;
use crate::plan::{Plan, RootSpec};

const RECORD: &str = r#"
[[steps.s.make]]
record = "boot/record.json"
stub = "boot/stub"
linux = "boot/vmlinuz-*"
initrd = ["boot/initrd"]
cmdline = "boot/cmdline"
osrel = "boot/os-release"
uname = "%{*}"
signed = ["boot/efi/A-*.EFI", "boot/efi/EFI/BOOT/BOOTX64.EFI"]
default = "boot/version"
"#;

const UKI: &str = r#"
[[steps.s.make]]
uki = "boot/a.efi"
stub = "boot/stub"
linux = "boot/linux"
initrd = ["boot/one", "boot/two"]
cmdline = "boot/cmdline"
"#;

/// There is nothing beside WORK.
struct Nothing;

impl Materials for Nothing {
    fn source(&self, _path: &str) -> Result<Option<Source>, MakeError> {
        Ok(None)
    }

    fn root(&self, _spec: &RootSpec) -> Result<Arc<Tree>, MakeError> {
        Ok(Arc::new(Tree::new()))
    }

    fn program(&self, name: &str) -> Result<(Digest, u64), MakeError> {
        Err(MakeError::Program(name.to_owned()))
    }
}

/// A WORK, and the store that has what is in it.
struct Work {
    _folder: tempfile::TempDir,
    store: Store,
    view: Tree,
}

impl Work {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&folder.path().join("store")).expect("a store");
        Self { _folder: folder, store, view: Tree::new() }
    }

    fn file(&mut self, path: &str, text: &str) {
        let (digest, size) = self.store.blobs().put(text.as_bytes()).expect("room");
        self.node(path, Kind::File { digest, size });
    }

    /// A file that is so long. The store does not have it.
    fn long_file(&mut self, path: &str, size: u64) {
        self.node(path, Kind::File { digest: Digest::of(path.as_bytes()), size });
    }

    fn node(&mut self, path: &str, kind: Kind) {
        let path = TreePath::new(path.as_bytes()).expect("a path");
        if let Some(folder) = path.parent() {
            self.view.insert(folder, Node { kind: Kind::Directory, meta: Meta::default() });
        }
        self.view.insert(path, Node { kind, meta: Meta::default() });
    }

    /// What the step `s` of `recipe` makes.
    fn make(&self, recipe: &str) -> Result<Tree, MakeError> {
        let parsed = Recipe::parse(recipe, "kiln.toml").unwrap_or_else(|fault| panic!("{fault}"));
        let plan = Plan::of(&parsed, recipe, "kiln.toml").unwrap_or_else(|fault| panic!("{fault}"));
        let step = plan.step(plan.named("s").expect("a step"));
        let Command::Make(makes) = &step.command else { panic!("{:?} makes nothing", step.command) };
        let leaks = Leaks::default();
        let bench =
            Bench { store: &self.store, materials: &Nothing, view: &self.view, epoch: 0, leaks: &leaks };
        bench.make(makes, &mut |_| {})
    }

    /// The text of the file that was made at `path`.
    fn text(&self, made: &Tree, path: &str) -> String {
        let path = TreePath::new(path.as_bytes()).expect("a path");
        let digest = made.get(&path).and_then(content).expect("it was made");
        String::from_utf8(self.store.blobs().read(&digest).expect("it is kept")).expect("text")
    }
}

#[test]
fn a_default_that_is_no_kernel_is_an_error_that_says_what_there_is() {
    let mut work = Work::new();
    for name in ["stub", "vmlinuz-6.1", "vmlinuz-6.12", "initrd", "cmdline", "os-release"] {
        work.file(&format!("boot/{name}"), name);
    }
    work.file("boot/version", "6.12\n");
    let made = work.make(RECORD).expect("a record");
    let record = work.text(&made, "boot/record.json");
    for place in ["A-6.1.EFI", "A-6.12.EFI", "BOOTX64.EFI"] {
        assert_eq!(record.matches(place).count(), 1, "{place} in {record}");
    }
    for (text, shown) in [("6.13\n", r#""6.13""#), ("6.1\n6.12\n", r#""6.1\n6.12""#), ("", r#""""#)] {
        work.file("boot/version", text);
        let error = work.make(RECORD).expect_err("none is the default").to_string();
        let wanted = format!("`boot/version` has {shown} as the default, and the kernels are 6.1, 6.12");
        assert_eq!(error, wanted);
    }
    // What is no release at all is shown in part, and does nothing to a terminal.
    work.file("boot/version", &"\u{1b}[31m\u{202e}".repeat(1000));
    let error = work.make(RECORD).expect_err("none is the default").to_string();
    assert!(error.len() < 1000 && !error.contains(['\u{1b}', '\u{202e}']), "{error}");
}

#[test]
fn initrds_that_are_too_long_together_are_refused_before_any_is_read() {
    let mut work = Work::new();
    for name in ["stub", "linux", "cmdline"] {
        work.file(&format!("boot/{name}"), name);
    }
    for name in ["boot/one", "boot/two"] {
        work.long_file(name, 1 << 31);
    }
    let error = work.make(UKI).expect_err("no image has 4 GiB");
    assert!(matches!(error, MakeError::Unified(UkiError::TooLarge("initrd"))), "{error:?}");
    work.long_file("boot/two", 1 << 32);
    let error = work.make(UKI).expect_err("no part has 4 GiB");
    assert!(matches!(&error, MakeError::TooLong(path) if path == "boot/two"), "{error:?}");
    // Less is read, which the store does not have here.
    work.long_file("boot/two", 1 << 30);
    let error = work.make(UKI).expect_err("it is not there");
    assert!(matches!(error, MakeError::Io { what: "read a part", .. }), "{error:?}");
}
