//! Why something could not be made.

use std::io;

use kiln_artifact::cpio::CpioError;
use kiln_artifact::erofs::ErofsError;
use kiln_artifact::fat::FatError;
use kiln_artifact::squashfs::SquashfsError;
use kiln_artifact::tree::{PathError, TreeError, TreePath};
use kiln_artifact::uefi::uki::UkiError;
use kiln_artifact::verity::VerityError;

use crate::apart::Overlap;
use crate::engine::error::RunError;
use crate::root::debian::ArchiveError;
use crate::root::directory::DirectoryError;
use crate::root::modules::ModulesError;
use crate::sign::record::RecordError;

/// Why something could not be made. Nothing of the step is in WORK then.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// A star that stands for nothing.
    #[error("nothing matches `{0}`")]
    Nothing(String),
    /// A star that stands for several things where one is made.
    #[error("`{path}` is one, and `*` of `{pattern}` could be `{one}` and `{other}`")]
    Several {
        /// What is made.
        path: String,
        /// Of what the star is.
        pattern: String,
        /// A match.
        one: String,
        /// Another.
        other: String,
    },
    /// A default that is none of what is to be signed: nothing would go to the places of the default.
    #[error("`{path}` has {text:?} as the default, and the kernels are {}", .releases.join(", "))]
    NoDefault {
        /// The file that says so.
        path: String,
        /// What it says, or how that begins.
        text: String,
        /// What there is.
        releases: Vec<String>,
    },
    /// An ingredient that is not there.
    #[error("there is no `{path}` in {place}")]
    Missing {
        /// The path.
        path: String,
        /// Where it was looked for.
        place: String,
    },
    /// Nothing to make it of.
    #[error("nothing goes into `{0}`: all of it is left out")]
    Empty(String),
    /// Something else where one file is needed.
    #[error("`{0}` is not one regular file")]
    NotAFile(String),
    /// A part of an image that no image can hold.
    #[error("`{0}` has 4 GiB or more, and a part of a unified kernel image has less")]
    TooLong(String),
    /// A command line that is no text.
    #[error("the command line is not UTF-8")]
    CommandLine,
    /// Two things at one path.
    #[error("`{0}` is made twice")]
    Twice(TreePath),
    /// A program of kiln's own that is not installed.
    #[error("kiln's program `{0}` was not found beside its agent")]
    Program(String),
    /// SRCDIR is needed.
    #[error("there is no SRCDIR to take `{0}` from")]
    NoSource(String),
    /// What is taken from SRCDIR shows signing keys.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// A copy of a signing key, which would be in what is made.
    #[error("`{path}`, which would go into `{artifact}`, has the key `{key}` of SECRETS in it")]
    Private {
        /// The file.
        path: TreePath,
        /// The key.
        key: String,
        /// What is made.
        artifact: String,
        /// Whether the store, which took it in for this, has no copy any more.
        is_gone: bool,
    },
    /// A path that no tree has.
    #[error("a path cannot be made")]
    Path(#[from] PathError),
    /// What was put together is no tree.
    #[error("what was put together is no file tree")]
    Tree(#[from] TreeError),
    /// A folder of SRCDIR cannot be read.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Modules that are not there.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// Modules that cannot be read.
    #[error(transparent)]
    Kernel(ArchiveError),
    /// A root cannot be had.
    #[error(transparent)]
    Root(Box<RunError>),
    /// squashfs.
    #[error("`{path}` cannot be made")]
    Squashfs {
        /// The image.
        path: String,
        /// Why.
        #[source]
        source: SquashfsError,
    },
    /// erofs.
    #[error("`{path}` cannot be made")]
    Erofs {
        /// The image.
        path: String,
        /// Why.
        #[source]
        source: ErofsError,
    },
    /// cpio.
    #[error("`{path}` cannot be made")]
    Cpio {
        /// The archive.
        path: String,
        /// Why.
        #[source]
        source: CpioError,
    },
    /// FAT.
    #[error("`{path}` cannot be made")]
    Fat {
        /// The image.
        path: String,
        /// Why.
        #[source]
        source: FatError,
    },
    /// A hash tree.
    #[error("`{path}` cannot get a hash tree")]
    Verity {
        /// The image.
        path: String,
        /// Why.
        #[source]
        source: VerityError,
    },
    /// A unified kernel image.
    #[error("the unified kernel image cannot be made")]
    Unified(#[from] UkiError),
    /// A record that could not be signed by.
    #[error("the record would be of no use")]
    Record(#[from] RecordError),
    /// The store or a file.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl MakeError {
    pub fn io(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// Whether it may be that the store has lost something of what it was made of.
    pub fn may_be_of_contents(&self) -> bool {
        matches!(
            self,
            Self::Squashfs { .. }
                | Self::Erofs { .. }
                | Self::Cpio { .. }
                | Self::Fat { .. }
                | Self::Verity { .. }
                | Self::Kernel(_)
                | Self::Record(_)
                | Self::Io { .. }
        )
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Nothing(_) => {
                "needs = [\"STEP\"] makes a step's outputs visible; optional = true makes nothing then"
                    .to_owned()
            }
            Self::Several { .. } => {
                "give what is made a name with `*`, or a path that only one matches".to_owned()
            }
            Self::NoDefault { .. } => {
                "write one kernel's release into it, and nothing else: its image goes where a path has no `*`"
                    .to_owned()
            }
            Self::Missing { .. } => {
                "needs = [\"STEP\"] makes a step's outputs visible in WORK; an ignored path is not there"
                    .to_owned()
            }
            Self::Program(_) => "ci/build puts kiln's programs into target/dist".to_owned(),
            Self::Overlap(overlap) => overlap.hint().to_owned(),
            Self::Private { is_gone, .. } => {
                let store = match is_gone {
                    true => "kiln's store keeps no copy",
                    false => "kiln's store has a copy, too, of what a step put out or a root",
                };
                format!(
                    "take it out where it comes from; whoever had it may have the key, so make other keys; {store}"
                )
            }
            Self::Directory(error) => return error.hint(),
            Self::Root(error) => return error.hint(),
            Self::Squashfs { source, .. } => return source.hint().map(str::to_owned),
            Self::Fat { source, .. } => return source.hint().map(str::to_owned),
            Self::Unified(error) => return error.hint().map(str::to_owned),
            _ => return None,
        })
    }
}
