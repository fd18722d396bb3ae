//! The record that a build leaves in WORK beside what is to be signed: every image and its parts, by digest.
//!
//! It is `boot/record.json`, so that WORK can be copied to the host that has the keys. It is not believed: it is what
//! the files are held against, so that what is signed is what was built, whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use kiln_digest::Digest;
use serde::{Deserialize, Serialize};

/// Where it is below WORK.
pub const PATH: &str = "boot/record.json";
/// The version that this kiln writes and reads.
pub const VERSION: u32 = 1;

/// Why a record is not one.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No JSON, or a field missing, unknown or of another type.
    #[error("`{PATH}` is no record of a build")]
    Form(#[source] serde_json::Error),
    /// Another kiln's.
    #[error("`{PATH}` is of version {0}; this kiln reads version {VERSION}")]
    Version(u32),
    /// A path that could leave WORK.
    #[error("`{PATH}` names `{0}`, which is no plain path below WORK")]
    Path(String),
    /// Nothing to sign.
    #[error("`{PATH}` names no images to sign")]
    Empty,
    /// Two images under one name.
    #[error("`{PATH}` wants two images to be signed as `{0}`")]
    Twice(String),
    /// An image that would replace what it is made of.
    #[error("`{PATH}` wants `{0}` signed in place, and could then not be held against it")]
    InPlace(String),
    /// A record that leaves the part open that must be signed.
    #[error("`{PATH}` has no digest for section `{section}` of `{file}`")]
    Section {
        /// The image.
        file: String,
        /// The section.
        section: &'static str,
    },
}

/// A file below WORK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where, from WORK.
    pub file: String,
    /// Its content.
    pub sha256: Digest,
}

/// A unified kernel image that is to be signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unified {
    /// Where it is, unsigned, from WORK.
    pub file: String,
    /// Its content.
    pub sha256: Digest,
    /// Where it goes when it is signed, from WORK.
    pub signed: String,
    /// Its sections but the stub's own, `.sbat` among them, by name.
    pub sections: BTreeMap<String, Digest>,
}

/// What a build says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// What is signed.
    pub unified: Vec<Unified>,
    /// What is not signed itself, but named in what is: images of roots, and their hash trees.
    #[serde(default)]
    pub images: Vec<File>,
    /// The folder that enrolment files go to, from WORK.
    #[serde(default = "keys")]
    pub keys: String,
}

fn keys() -> String {
    "boot/efi/KEYS".to_owned()
}

impl Record {
    /// Reads a record and checks all that it alone can show.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn parse(json: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(json).map_err(RecordError::Form)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let record: Self = serde_json::from_slice(json).map_err(RecordError::Form)?;
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), RecordError> {
        if self.unified.is_empty() {
            return Err(RecordError::Empty);
        }
        let unified = self.unified.iter().flat_map(|image| [&image.file, &image.signed]);
        for path in unified.chain(self.images.iter().map(|image| &image.file)).chain([&self.keys]) {
            let plain = |component| matches!(component, Component::Normal(_));
            if path.is_empty() || path.ends_with('/') || !Path::new(path).components().all(plain) {
                return Err(RecordError::Path(path.clone()));
            }
        }
        let read: BTreeSet<&String> = self
            .unified
            .iter()
            .map(|image| &image.file)
            .chain(self.images.iter().map(|image| &image.file))
            .collect();
        let mut names = BTreeSet::new();
        for image in &self.unified {
            if read.contains(&image.signed) {
                return Err(RecordError::InPlace(image.signed.clone()));
            }
            // Signatures that come from elsewhere are told by the last part, and FAT knows no case.
            if !names.insert(image.name().to_ascii_lowercase()) {
                return Err(RecordError::Twice(image.name().to_owned()));
            }
            for section in [".linux", ".initrd", ".cmdline"] {
                if !image.sections.contains_key(section) {
                    return Err(RecordError::Section { file: image.file.clone(), section });
                }
            }
        }
        Ok(())
    }
}

impl Unified {
    /// The last part of where it goes.
    pub fn name(&self) -> &str {
        self.signed.rsplit('/').next().unwrap_or(&self.signed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        let sections =
            [".linux", ".initrd", ".cmdline"].map(|name| (name.to_owned(), Digest::of(name.as_bytes())));
        let image = Unified {
            file: "boot/a.efi".to_owned(),
            sha256: Digest::of(b"a"),
            signed: "boot/efi/A.EFI".to_owned(),
            sections: sections.into(),
        };
        Record { version: VERSION, unified: vec![image], images: Vec::new(), keys: keys() }
    }

    fn parse(change: impl FnOnce(&mut Record)) -> Result<Record, RecordError> {
        let mut record = sample();
        change(&mut record);
        Record::parse(&serde_json::to_vec(&record).expect("plain data"))
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        assert_eq!(parse(|_| ()).expect("good"), sample());
    }

    #[test]
    fn what_a_record_may_not_say_is_refused() {
        for path in ["/etc/passwd", "../x", "boot/../../x", "", "boot/", "./a"] {
            let refused = parse(|record| record.unified[0].signed = path.to_owned());
            assert!(matches!(refused, Err(RecordError::Path(_))), "{path}: {refused:?}");
        }
        let refused = parse(|record| record.unified[0].signed = "boot/a.efi".to_owned());
        assert!(matches!(refused, Err(RecordError::InPlace(_))));
        let refused = parse(|record| {
            let mut other = record.unified[0].clone();
            other.signed = "boot/efi/a.efi".to_owned();
            record.unified.push(other);
        });
        assert!(matches!(refused, Err(RecordError::Twice(_))));
        let refused = parse(|record| record.unified[0].sections.retain(|name, _| name != ".initrd"));
        assert!(matches!(refused, Err(RecordError::Section { section: ".initrd", .. })));
        assert!(matches!(parse(|record| record.unified.clear()), Err(RecordError::Empty)));
        assert!(matches!(parse(|record| record.version = 2), Err(RecordError::Version(2))));
    }
}
