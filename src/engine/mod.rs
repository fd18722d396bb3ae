//! Steps and builds of them. A step's life: its inputs opened and checked, its machine started, its command run, its outputs collected and
//! merged, its reads recorded.

pub mod build;
pub mod collect;
mod enter;
mod error;
mod event;
mod host;
mod inputs;
pub mod lock;
mod make;
pub mod merge;
mod prepare;
mod reads;
mod ready;
mod run;
mod step;

pub use enter::{Entered, enter};
pub use error::RunError;
pub use event::{Event, Listener, Phase};
pub use host::{Boundary, Host, HostError, KernelChoice, Require, jail_of};
pub use inputs::{DiskArgument, InputError, MountArgument};
pub use reads::{ReadsError, ReadsReport, ShareReads};
pub use run::{Collected, Ended, Report, Run, run};
pub use step::{Clock, Keep, OPEN_NETWORK, Step, View};
