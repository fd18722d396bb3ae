//! The entry of the `kiln` command.

fn main() {}
