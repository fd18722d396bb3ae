//! What a step is, as pure data and pure functions: no file, no clock, no process, no environment.

pub mod boot;
mod environment;
pub mod graph;
pub mod make;
mod output;
mod overlap;
mod quantity;
pub mod recipe;
mod root;
pub mod script;
mod shell;
mod text;

pub use environment::{DEFAULT_SOURCE_DATE_EPOCH, EnvError, Environment, FIXED_PATH};
pub use graph::{Plan, PlannedStep, StepId, is_commit};
pub use output::{OutputError, Outputs};
pub use overlap::globs_meet;
pub use quantity::{
    MEMORY_BYTES, ParseQuantityError, SCRATCH_BYTES, parse_bytes, parse_duration, show_age, show_bytes,
    show_duration,
};
pub use recipe::nearest;
pub use root::{ParseRootError, RootSpec};
pub use shell::quote;
pub use text::{harmless, harmless_bytes, without_commands};
