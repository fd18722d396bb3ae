//! The record of what is to be assembled and signed: every part by path and digest, as `kiln sign` takes it.

use kiln_artifact::tree::{Kind, Tree, TreePath};

use super::{Bench, MakeError};
use crate::plan::make::{From, Origin, Pattern, Recorded, fill};
use crate::sign::record::{File, Kernel, Record, Verity};

/// As much of a file that should be a release as an error shows: one has 64 bytes.
const SHOWN_CHARS: usize = 80;

impl Bench<'_> {
    /// The record of `recorded`, with a kernel for each match of `range`, behind those that `made` has at `path`.
    pub(super) fn record(
        &self,
        recorded: &Recorded,
        range: Option<&From>,
        made: &Tree,
        path: &TreePath,
    ) -> Result<Vec<u8>, MakeError> {
        let stars = match range {
            Some(range) => self.stars(range, made)?,
            None => vec![String::new()],
        };
        let mut record = match made.get(path).map(|node| &node.kind) {
            Some(Kind::File { digest, .. }) => {
                let read = self.store.blobs().read(digest);
                Record::parse(&read.map_err(MakeError::io("read a record"))?)?
            }
            _ => Record::default(),
        };
        let default = match &recorded.default {
            Some(path) if stars.len() > 1 => {
                let digest = self.named(path.text(), made)?.sha256;
                let text = self.store.blobs().read(&digest).map_err(MakeError::io("read a release"))?;
                Some(String::from_utf8_lossy(&text).trim().to_owned())
            }
            _ => None,
        };
        let mut releases = Vec::with_capacity(stars.len());
        for star in &stars {
            let mut kernel = self.kernel(recorded, star, made)?;
            releases.push(kernel.release.clone());
            if default.as_ref().is_some_and(|default| *default != kernel.release) {
                let own = recorded.signed.iter().filter(|path| path.has_star());
                kernel.signed = own.map(|path| path.bind(star)).collect();
                // All of it is for the other.
                if kernel.signed.is_empty() {
                    continue;
                }
            }
            record.kernels.push(kernel);
        }
        if let (Some(path), Some(text)) = (&recorded.default, default)
            && !releases.contains(&text)
        {
            let text = text.chars().take(SHOWN_CHARS).collect();
            return Err(MakeError::NoDefault { path: path.text().to_owned(), text, releases });
        }
        record.check()?;
        let mut text = serde_json::to_vec_pretty(&record).unwrap_or_default();
        text.push(b'\n');
        Ok(text)
    }

    fn kernel(&self, recorded: &Recorded, star: &str, made: &Tree) -> Result<Kernel, MakeError> {
        let parts = &recorded.parts;
        let named = |from: &From| match &from.origin {
            Origin::Work(path) => self.named(&path.bind(star), made),
            _ => Err(MakeError::NotAFile(format!("{:?}", from.origin))),
        };
        let mut verity = Vec::new();
        for (path, may_lack) in &recorded.images {
            match self.image(path, star, made) {
                Err(MakeError::Missing { .. }) if *may_lack => {}
                image => verity.push(image?),
            }
        }
        let mut initrds = Vec::with_capacity(parts.initrds.len());
        for from in &parts.initrds {
            match named(from) {
                Err(MakeError::Missing { .. }) if from.optional => {}
                initrd => initrds.push(initrd?),
            }
        }
        let os_release = parts.os_release.as_ref().ok_or_else(|| MakeError::NotAFile("osrel".to_owned()))?;
        Ok(Kernel {
            release: parts.release.as_ref().map(|text| fill(text, star)).unwrap_or_default(),
            signed: recorded.signed.iter().map(|path| path.bind(star)).collect(),
            stub: named(&parts.stub)?,
            linux: named(&parts.linux)?,
            osrel: named(os_release)?,
            cmdline: named(&parts.command_line)?,
            initrds,
            sbat: parts.sbat.as_ref().map(named).transpose()?,
            verity,
        })
    }

    /// An image with its hash tree and the file of its root hash: `initos/initos.hash` of `initos/initos.sqfs`,
    /// `hash.NAME` of any other `NAME.sqfs`.
    fn image(&self, path: &Pattern, star: &str, made: &Tree) -> Result<Verity, MakeError> {
        let image = path.bind(star);
        let (folder, name) = image.rsplit_once('/').map_or(("", &*image), |(folder, name)| (folder, name));
        let stem = name.strip_suffix(".sqfs").unwrap_or(name);
        let hash = match name {
            "initos.sqfs" => "initos.hash".to_owned(),
            _ => format!("hash.{stem}"),
        };
        let beside =
            |name: &str| if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
        self.named(&image, made)?;
        Ok(Verity {
            tree: self.named(&format!("{image}.verity"), made)?,
            hash: self.named(&beside(&hash), made)?,
            name: hash,
            image,
        })
    }

    /// The file at `path` in WORK.
    fn named(&self, path: &str, made: &Tree) -> Result<File, MakeError> {
        let at = TreePath::new(path.as_bytes())?;
        let missing =
            || MakeError::Missing { path: path.to_owned(), place: "WORK, as this step sees it".to_owned() };
        let node = made.shown(&at).or_else(|| self.view.shown(&at)).ok_or_else(missing)?;
        match &node.kind {
            Kind::File { digest, .. } => Ok(File { file: path.to_owned(), sha256: *digest }),
            _ => Err(MakeError::NotAFile(path.to_owned())),
        }
    }
}
