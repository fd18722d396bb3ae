//! The judge of what has a JSON schema: Debian's python3-jsonschema.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Holds each line of standard input after the schema against that, and against members that it does not know.
const JUDGE: &str = r#"
import json, sys
from jsonschema import Draft202012Validator
schema, *lines = sys.stdin.buffer.read().decode().split("\n")
schema = json.loads(schema)
Draft202012Validator.check_schema(schema)
schema["unevaluatedProperties"] = False
if "items" in schema:
    schema["items"]["unevaluatedProperties"] = False
validator = Draft202012Validator(schema)
for line in filter(None, lines):
    for error in validator.iter_errors(json.loads(line)):
        sys.exit(f"{line}\nis not as the schema says: {error.message[:2000]}\n{[e.message[:300] for e in error.context or []]}")
"#;

/// Asserts that each line is JSON as `schema` says, and has nothing else.
pub fn holds(schema: &str, lines: &str) {
    let schema: Value = serde_json::from_str(schema).expect("a schema is JSON");
    // Debian's, which every user has, and nothing of a user's own.
    let own = "/usr/bin/python3";
    let mut judge = Command::new(if std::path::Path::new(own).is_file() { own } else { "python3" });
    judge.args(["-I", "-c", JUDGE]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut judge = judge.spawn().expect("python3 is there: ci/setup installs it");
    let mut input = judge.stdin.take().expect("it is piped");
    let sent = input.write_all(format!("{schema}\n{lines}").as_bytes());
    drop(input);
    let output = judge.wait_with_output().expect("it ends");
    assert!(sent.is_ok() && output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
