//! Why there is no template or no copy of one, and what follows from that.

use std::io;
use std::time::Duration;

use crate::machine::{Death, MachineError};
use crate::shortage::Shortage;

/// In these words QEMU says that KVM does not serve it (accel/kvm/kvm-all.c, system/vl.c).
const KVM_REFUSED: [&str; 3] =
    ["Could not access KVM", "ioctl(KVM_CREATE_VM) failed", "failed to initialize kvm"];

/// Why there is no template, or no copy of one.
#[derive(Debug, thiserror::Error)]
pub(in crate::machine) enum TemplateError {
    /// A file.
    #[error("cannot {what}: {source}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// The machine to be frozen, or the copy, did not come up.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// It does not come up: its kernel hangs, or its agent.
    #[error("its agent said nothing for {0:.0?}")]
    Silent(Duration),
    /// Its agent does not answer as it should.
    #[error("cannot hear the agent: {0}")]
    Unheard(#[source] io::Error),
    /// It came up and is gone.
    #[error("{0}")]
    Died(Death),
    /// It came up without all that it should have: a module that was not loaded, say.
    #[error("its agent said: {0}")]
    Complained(String),
    /// Its clock goes wrong, which every copy's would: on a busy host an emulated kernel may measure its processor so.
    #[error(
        "its clock showed {uptime:.1?} at most {most:.1?} after it was started, and {counted:.1?} more at least {least:.1?} after \
         it first answered"
    )]
    Untimely { most: Duration, uptime: Duration, least: Duration, counted: Duration },
    /// Its files are not what was written.
    #[error("{0}")]
    Damaged(&'static str),
    /// Another kiln makes the template, and takes too long.
    #[error("another kiln that makes it does not come to an end")]
    Locked,
    /// It could not be made a short time ago.
    #[error("it could not be made before")]
    Barren,
}

impl TemplateError {
    /// What the host lacked, where that is why.
    pub(super) fn shortage(&self) -> Option<Shortage> {
        match self {
            Self::Died(death) | Self::Machine(MachineError::DiedAtStart(death)) => death.shortage(),
            // The store's ceiling.
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => Some(Shortage::Room),
            error => {
                let mut chain =
                    std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
                chain.find_map(|error| Shortage::in_words(&error.to_string()))
            }
        }
    }

    /// Whether the host lacked something or was in the way: that says nothing about a template.
    pub(super) fn is_hosts(&self) -> bool {
        match (self.shortage(), self) {
            // Room is different: what wrote a gibibyte in vain need not do so again at once.
            (Some(lack), _) => lack != Shortage::Room,
            (None, Self::Died(death) | Self::Machine(MachineError::DiedAtStart(death))) => match death {
                Death::Failed(failure) => failure.is_hosts,
                // QEMU's, where KVM does not serve it.
                Death::Killed { said, .. } => KVM_REFUSED.iter().any(|words| said.contains(words)),
                _ => false,
            },
            (None, Self::Machine(MachineError::Failed(failure))) => failure.is_hosts,
            // What is done before the machine is there, and takes nothing from the template.
            (None, Self::Machine(error)) => !matches!(error, MachineError::Device(_)),
            (None, _) => false,
        }
    }

    /// Whether another machine of the same parts may fare better.
    pub(super) fn is_chance(&self) -> bool {
        let came_up_badly = match self {
            Self::Died(_) | Self::Complained(_) | Self::Untimely { .. } | Self::Unheard(_) => true,
            // It is waited for again when it is booted without a template.
            Self::Silent(_) => false,
            Self::Io { .. } | Self::Machine(_) | Self::Damaged(_) | Self::Locked | Self::Barren => false,
        };
        came_up_badly && !self.is_hosts()
    }

    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_silent_from_the_start_is_not_booted_again_for_a_template() {
        assert!(!TemplateError::Silent(Duration::from_secs(60)).is_chance());
        assert!(TemplateError::Unheard(io::ErrorKind::TimedOut.into()).is_chance(), "it had answered before");
        assert!(TemplateError::Complained("no module".to_owned()).is_chance());
    }
}
