//! Machines by name: which there are, who holds them, and how others reach one that was kept.
//!
//! Every machine lives in one kiln, which holds it by descriptors and by the signal that its children get when it dies: a
//! kiln that is killed leaves no machine. So a kept machine is a kiln that stays. [`background`] lets one stay without
//! keeping its caller waiting; [`Registry`] is the folder in which each has a place of its own, known to be alive by a lock
//! that the system lets go of however its holder ends; at the [`Registration`]'s socket it answers whoever is of the same
//! user. [`Kept`] serves commands in a machine whose step is over, and [`Door`] is the way in.
//!
//! A machine is running, kept, or ready: held by a process of its own ([`ready`]) for the next run that wants such a one.

pub mod background;
mod door;
mod entry;
mod kept;
mod place;
pub mod ready;
mod registration;
mod registry;
mod relay;
mod talk;

pub use door::{Door, DoorError};
pub use entry::{Entry, State};
pub use kept::{Keeper, Kept};
pub use registration::Registration;
pub use registry::{Registry, RegistryError};
