//! Keys and signatures of boot images: made, checked and put to use on the host, with no machine and no network, and
//! with nothing executed that came from a guest. `kiln sign` is the only caller.
//!
//! [`make`] makes a set of keys below SECRETS, [`keys`] opens it and refuses what is not safe to sign with, [`record`]
//! is what a build says of the images that it left in WORK, and [`images`] signs those and nothing else. The formats are
//! `kiln_artifact::uefi`'s.

mod folder;
pub mod images;
pub mod keys;
pub mod make;
pub mod record;

pub use folder::FolderError;

/// The folder of SECRETS that has the keys for firmware and the mesh.
pub const KEYS: &str = "uefi-keys";
