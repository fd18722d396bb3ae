//! Judges of what kiln writes for programs, which know nothing of how kiln writes it. Unit tests and test programs use them.

mod schema;
mod timeline;
mod ukify;

pub use schema::holds;
pub use timeline::timeline;
#[allow(unused_imports, reason = "not every test program makes images")]
pub use ukify::sections_of;
