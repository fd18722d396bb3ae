//! Looking after a store: what is in it and what keeps it ([`census`]), what may go ([`collect`]), and whether it is
//! what was written ([`verify`]).
//!
//! It knows every kind of thing that names a blob. Nothing here runs a step or fetches anything: what is taken away is
//! had anew by the next build that needs it.

pub mod census;
pub mod collect;
pub mod verify;

use std::io;
use std::path::{Path, PathBuf};

/// Why a store cannot be looked after.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} `{path}`")]
pub struct UpkeepError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl UpkeepError {
    fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { what, path, source }
    }
}
