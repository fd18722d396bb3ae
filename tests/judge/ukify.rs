//! The judge of unified kernel images: `ukify inspect`, of systemd.

#![allow(clippy::panic, reason = "a judge fails by panicking")]
#![allow(dead_code, reason = "each test program looks at some of it")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What ukify says of each section of the image, the stub's own among them: its size and SHA-256.
pub fn sections_of(image: &Path) -> BTreeMap<String, (u64, String)> {
    // The host's, or where it has none the one that ci/setup takes from a later Debian.
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/ukify/usr/bin/ukify");
    let mut ukify = Command::new(if other.is_file() { "/usr/bin/python3" } else { "ukify" });
    if other.is_file() {
        ukify.arg("-I").arg(other);
    }
    ukify.args(["--json=short", "--all", "inspect"]).arg(image);
    let output = ukify.output();
    let output =
        output.unwrap_or_else(|error| panic!("this test needs `ukify` to judge by: {error} (ci/setup test)"));
    assert!(output.status.success(), "ukify: {}", String::from_utf8_lossy(&output.stderr));
    let said: BTreeMap<String, Value> = serde_json::from_slice(&output.stdout).expect("ukify says JSON");
    let field = |section: &Value| {
        let digest = section["sha256"].as_str().map(str::to_owned);
        section["size"].as_u64().zip(digest).unwrap_or_else(|| panic!("of a section ukify says {section}"))
    };
    said.iter().map(|(name, section)| (name.clone(), field(section))).collect()
}
