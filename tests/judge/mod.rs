//! Judges of what kiln writes for programs, which know nothing of how kiln writes it. Unit tests and test programs use them.

mod schema;
mod timeline;

pub use schema::holds;
pub use timeline::timeline;
