//! What UEFI firmware loads and trusts: PE images, unified kernel images, their signatures, and the variables that
//! say whose signatures count.
//!
//! [`pe`] reads strictly, so that everything after it may believe what it says; [`uki`] writes onto a stub;
//! [`authenticode`] hashes, attaches and verifies; [`esl`] and [`auth`] are what enrols keys. No private key comes
//! here: who signs is given what is to be signed, and hands back a signature. UEFI is version 2.10 throughout.

pub mod auth;
pub mod authenticode;
pub mod esl;
pub mod pe;
mod pkcs7;
pub mod sbat;
pub mod uki;

pub use pkcs7::{CertificateError, Signer};
