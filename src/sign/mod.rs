//! Keys and signatures of boot images: made, checked and put to use on the host, with no machine and no network, and
//! with nothing executed that came from a guest. `kiln sign` and steps that sign are the callers, and
//! builds ask [`Leaks`] whether what they make has a key in it.
//!
//! [`make`] makes a set of keys below SECRETS, and [`keys`] opens it and refuses what is not safe to sign with.
//! [`record`] is what a build says of the parts that it left in WORK; [`work`] reads those and nothing else, [`local`] is
//! what the owner adds, `assemble` makes images of both, and [`images`] signs them. The formats are `kiln_artifact::uefi`'s.

mod assemble;
mod error;
mod folder;
pub mod images;
pub mod keys;
mod leak;
pub mod local;
pub mod make;
mod private;
pub mod record;
pub mod work;

pub use error::SignError;
pub use folder::FolderError;
pub use leak::Leaks;
pub use private::close_process;

/// The folder of SECRETS that has the keys for firmware and the mesh.
pub const KEYS: &str = "uefi-keys";
