//! The document that `--reads` writes: JSON with an entry on a line. docs/reads.md says what it means; whoever
//! changes one changes the other, and [`VERSION`] where a reader could be misled.

use std::io::{self, Write};

use kiln_digest::Digest;
use kiln_virtio::fs::Attributes;
use kiln_virtio::fs::record::{Entry, Kind, Observed, PathBytes};
use serde::Serialize;

use super::{ReadsReport, ShareReads};
use crate::machine::Identity;
use crate::machine::jail::Layer;

/// The name of the format.
const FORMAT: &str = "kiln-reads";
/// Its version.
const VERSION: u32 = 1;

/// What ran the step. How the machine came to be is left out, as it makes no difference.
#[derive(Serialize)]
struct Machine<'a> {
    backend: &'a str,
    accelerator: &'a str,
    jail: &'a [Layer],
    jail_missing: Vec<Layer>,
}

impl<'a> Machine<'a> {
    fn of(identity: &'a Identity) -> Self {
        Self {
            backend: &identity.backend,
            accelerator: identity.accelerator.name(),
            jail: &identity.jail.layers,
            jail_missing: identity.jail.missing_layers(),
        }
    }
}

/// One path and what was asked about it: a member for each kind of question.
#[derive(Serialize)]
struct Line<'a> {
    path: &'a PathBytes,
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Content>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Shown>,
    #[serde(skip_serializing_if = "Option::is_none")]
    listing: Option<Shown>,
    #[serde(skip_serializing_if = "Option::is_none")]
    xattrs: Option<Shown>,
}

#[derive(Serialize)]
struct Metadata {
    mode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    digest: Digest,
}

#[derive(Serialize)]
struct Content {
    size: u64,
    digest: Option<Digest>,
}

#[derive(Serialize)]
struct Shown {
    digest: Option<Digest>,
}

#[derive(Serialize)]
struct ChangedLine<'a> {
    path: &'a PathBytes,
    what: &'a str,
}

#[derive(Serialize)]
struct EmptyLine<'a> {
    path: &'a PathBytes,
    filesystem: &'a str,
}

impl ReadsReport {
    /// Writes the document.
    ///
    /// # Errors
    /// What `out` fails with.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write!(
            out,
            "{{\n\"format\": \"{FORMAT}\",\n\"version\": {VERSION},\n\"complete\": {}",
            self.is_complete()
        )?;
        member(out, "machine", &self.beside.machine.as_ref().map(Machine::of))?;
        member(out, "root", &self.beside.root)?;
        member(out, "bundle", &self.beside.bundle)?;
        member(out, "unrecorded", &self.beside.unrecorded)?;
        out.write_all(b",\n\"shares\": [")?;
        for (index, share) in self.shares.iter().enumerate() {
            out.write_all(if index == 0 { b"\n" } else { b",\n" })?;
            share.write(out)?;
        }
        out.write_all(b"\n]\n}\n")
    }
}

impl ShareReads {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(b"{\n\"name\": ")?;
        serde_json::to_writer(&mut *out, &self.record.name)?;
        member(out, "guest", &self.guest)?;
        member(
            out,
            "attributes",
            match self.attributes {
                Attributes::Fixed { .. } => "fixed",
                Attributes::Real => "real",
            },
        )?;
        list(out, "entries", self.entries(), |out, (entry, digest)| {
            serde_json::to_writer(out, &line(&entry, digest, self.attributes))
        })?;
        list(out, "missed", self.record.missed.iter(), |out, path| serde_json::to_writer(out, &path))?;
        list(out, "changed", self.changed.iter(), |out, (path, what)| {
            serde_json::to_writer(out, &ChangedLine { path, what })
        })?;
        list(out, "empty", self.empty.iter(), |out, (path, filesystem)| {
            serde_json::to_writer(out, &EmptyLine { path, filesystem })
        })?;
        out.write_all(b"\n}")
    }
}

fn member<W: Write, T: Serialize + ?Sized>(out: &mut W, name: &str, value: &T) -> io::Result<()> {
    write!(out, ",\n\"{name}\": ")?;
    Ok(serde_json::to_writer(out, value)?)
}

/// A member that is a list, an item on a line.
fn list<W: Write, T>(
    out: &mut W,
    name: &str,
    items: impl Iterator<Item = T>,
    mut write: impl FnMut(&mut W, T) -> serde_json::Result<()>,
) -> io::Result<()> {
    write!(out, ",\n\"{name}\": [")?;
    let mut any = false;
    for item in items {
        out.write_all(if any { b",\n" } else { b"\n" })?;
        write(out, item)?;
        any = true;
    }
    out.write_all(if any { b"\n]" } else { b"]" })
}

fn line<'a>(entry: &'a Entry, content: Option<Digest>, attributes: Attributes) -> Line<'a> {
    let asked = |what| entry.observed.contains(what);
    let (size, is_link) = (entry.fingerprint.size_bytes, entry.kind == Kind::Link);
    Line {
        path: &entry.path,
        kind: entry.kind,
        metadata: asked(Observed::METADATA).then(|| Metadata {
            mode: format!("{:04o}", entry.fingerprint.mode & 0o7777),
            size: matches!(entry.kind, Kind::Regular | Kind::Link).then_some(size),
            digest: Digest::of(entry.metadata_line(attributes).as_bytes()),
        }),
        content: (asked(Observed::CONTENT) && !is_link).then_some(Content { size, digest: content }),
        target: (asked(Observed::CONTENT) && is_link).then_some(Shown { digest: content }),
        listing: asked(Observed::LISTING).then_some(Shown { digest: entry.listing }),
        xattrs: asked(Observed::XATTRS).then_some(Shown { digest: entry.xattrs }),
    }
}
