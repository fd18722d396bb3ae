//! The word of an acceptance test of initOS, by the name that it has in `docs/initos.md`.

use std::io::{self, Write};

/// Says that the acceptance test `name` held as far as the test shows it that says so.
pub fn held(name: &str) {
    // `println!` would be swallowed by the test runner where the test passes, which is when it is to be read.
    let _ = writeln!(io::stdout().lock(), "acceptance {name}: held");
}
