//! What a program asked of the shares, by the paths that it named: every name on the way is a question.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A path in a share.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub share: String,
    pub path: Vec<u8>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.share, self.path.escape_ascii())
    }
}

/// What can be asked about a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    Metadata,
    Content,
    Target,
    Listing,
    Xattrs,
    Absence,
}

impl Question {
    pub const ALL: [Self; 6] =
        [Self::Metadata, Self::Content, Self::Target, Self::Listing, Self::Xattrs, Self::Absence];
    /// The members of an entry of the document.
    pub const MEMBERS: [(&'static str, Self); 5] = [
        ("metadata", Self::Metadata),
        ("content", Self::Content),
        ("target", Self::Target),
        ("listing", Self::Listing),
        ("xattrs", Self::Xattrs),
    ];
}

/// Questions.
#[derive(Debug, Default)]
pub struct Asked(pub BTreeSet<(Place, Question)>);

impl Asked {
    pub fn note(&mut self, place: Place, question: Question) {
        self.0.insert((place, question));
    }
}

/// Where shares are in the guest, and on the host.
pub struct World(Vec<(String, Vec<u8>, PathBuf)>);

impl World {
    /// Shares: name, where the guest sees it, where it is.
    pub fn new(shares: &[(&str, &str, &Path)]) -> Self {
        let share = |(name, guest, host): &(&str, &str, &Path)| {
            ((*name).to_owned(), guest.as_bytes().to_vec(), host.to_path_buf())
        };
        Self(shares.iter().map(share).collect())
    }

    /// What an absolute path of the guest's names, if that is in a share.
    pub fn place(&self, path: &[u8]) -> Option<Place> {
        self.0.iter().find_map(|(share, guest, _)| {
            let rest = path.strip_prefix(&guest[..])?;
            let inside = if rest.is_empty() { Some(rest) } else { rest.strip_prefix(b"/") };
            inside.map(|path| Place { share: share.clone(), path: path.to_vec() })
        })
    }

    pub fn on_host(&self, place: &Place) -> PathBuf {
        let share = self.0.iter().find(|(name, ..)| *name == place.share).expect("a share of that name");
        share.2.join(OsStr::from_bytes(&place.path))
    }

    /// Walks `path` from the folder `from` as the kernel does, and notes what that asks. Gives the absolute path it
    /// leads to; none where it leads nowhere, as far as the shares say.
    pub fn resolve(&self, from: &[u8], path: &[u8], follow: bool, asked: &mut Asked) -> Option<Vec<u8>> {
        let mut at = if path.starts_with(b"/") { Vec::new() } else { from.to_vec() };
        while at.last() == Some(&b'/') {
            at.pop();
        }
        let follow = follow || path.ends_with(b"/");
        let mut names: VecDeque<Vec<u8>> = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = names.pop_front() {
            if name.is_empty() || name == b"." {
                continue;
            }
            if let Some(place) = self.place(&at)
                && !self.on_host(&place).is_dir()
            {
                return None;
            }
            if name == b".." {
                at.truncate(at.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                continue;
            }
            let next = [&at[..], b"/", &name].concat();
            let Some(place) = self.place(&next) else {
                at = next;
                continue;
            };
            let on_host = self.on_host(&place);
            let Ok(meta) = on_host.symlink_metadata() else {
                asked.note(place, Question::Absence);
                return None;
            };
            asked.note(place.clone(), Question::Metadata);
            let is_last = names.iter().all(|name| name.is_empty());
            if meta.is_symlink() && (follow || !is_last) {
                links += 1;
                if links > 40 {
                    return None;
                }
                asked.note(place, Question::Target);
                let text = std::fs::read_link(&on_host).expect("a link");
                let text = text.as_os_str().as_bytes();
                if text.starts_with(b"/") {
                    at.clear();
                }
                text.rsplit(|byte| *byte == b'/').for_each(|name| names.push_front(name.to_vec()));
                continue;
            }
            at = next;
        }
        Some(if at.is_empty() { b"/".to_vec() } else { at })
    }
}
