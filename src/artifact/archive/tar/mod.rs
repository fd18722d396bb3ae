//! tar archives: v7, POSIX ustar and pax (IEEE 1003.1-2017 "pax"), and GNU with its long names and sparse files.
//!
//! Stricter than the tools that unpack to disk: where readers are known to disagree about where a member begins
//! or what it is called, the archive is refused. The `tar` crate's header layout is used; iteration is our own, because
//! the crate's buffers extension headers without a limit and splits pax records at newlines, which values may hold.

mod block;
mod pax;
mod sparse;

use std::io::{self, Read};

use ::tar::{EntryType, Header};

use self::block::{Blocks, Body, fields};
use self::pax::{Pax, Records};
use self::sparse::SparseReader;
use super::ContentSink;
use crate::tree::{Builder, Kind, Meta, Node, PathError, Timestamp, Tree, TreeError, TreePath};

/// The longest extension header (pax records, a long name) that is read into memory.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// What an archive may hold at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Members, and folders that are not named but have something in them.
    pub members: u64,
    /// The lengths of all files together, holes included.
    pub content_bytes: u64,
}

/// Why an archive was refused. Members are named as the archive has them, unprintable bytes escaped.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The archive could not be read.
    #[error("the archive could not be read")]
    Read(#[source] io::Error),
    /// It ends within a member or without its end mark.
    #[error("the archive is cut off at byte {at}")]
    Truncated {
        /// How many bytes there were.
        at: u64,
    },
    /// A block that should be a header is none.
    #[error("the archive has no good header at byte {at}: {what}")]
    Header {
        /// Where the block begins.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A member whose path no tree can hold.
    #[error("the archive's member `{member}` has an impossible name")]
    Name {
        /// Its name.
        member: String,
        /// Why.
        source: PathError,
    },
    /// A member that says something impossible, or something readers disagree about.
    #[error("the archive's member `{member}` has {what}")]
    Member {
        /// Its name.
        member: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A member beneath something that is not a folder.
    #[error("the archive's member `{member}` lies beneath `{parent}`, which is not a folder")]
    Parent {
        /// Its name.
        member: String,
        /// What is no folder.
        parent: TreePath,
    },
    /// A hard link to what is not, or not yet, in the archive, or to a folder.
    #[error("the archive's member `{member}` is a hard link to `{target}`, which is no file before it")]
    Link {
        /// Its name.
        member: String,
        /// What it names.
        target: String,
    },
    /// More than the caller allows.
    #[error("the archive holds more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// A file's content could not be kept.
    #[error("the content of the archive's member `{member}` could not be stored")]
    Store {
        /// Its name.
        member: String,
        /// Why.
        source: io::Error,
    },
    /// The whole is not a well-formed tree.
    #[error("the archive's files are not a well-formed tree")]
    Tree(#[from] TreeError),
}

/// Reads an archive up to its end mark; `reader` is left after it. A folder that is not named but has something in
/// it gets mode 0755, owner 0:0 and time zero. Of two members of one name the later wins.
///
/// # Errors
/// [`TarError`].
pub fn read(reader: impl Read, sink: &mut dyn ContentSink, limits: &Limits) -> Result<Tree, TarError> {
    let mut builder = Builder::new();
    read_into(&mut builder, reader, sink, limits)?;
    Ok(builder.finish()?)
}

/// As [`read`], over what `builder` holds already: folders there need not be named again, and hard links may
/// name its files.
///
/// # Errors
/// [`TarError`]; `builder` then holds the members before the one that failed.
pub fn read_into(
    builder: &mut Builder,
    reader: impl Read,
    sink: &mut dyn ContentSink,
    limits: &Limits,
) -> Result<(), TarError> {
    let blocks = Blocks::new(reader);
    let mut archive =
        Archive { blocks, builder, sink, limits, global: Records::default(), members: 0, content_bytes: 0 };
    while let Some(member) = archive.next_member()? {
        archive.unpack(member)?;
    }
    Ok(())
}

struct Archive<'a, R> {
    blocks: Blocks<R>,
    builder: &'a mut Builder,
    sink: &'a mut dyn ContentSink,
    limits: &'a Limits,
    global: Records,
    /// So far, to be held to `limits`.
    members: u64,
    content_bytes: u64,
}

/// A header with what the extension headers before it add.
struct Member {
    header: Header,
    name: Vec<u8>,
    link_name: Vec<u8>,
    pax: Pax,
    body_bytes: u64,
}

impl Member {
    fn shown(&self) -> String {
        self.name.escape_ascii().to_string()
    }

    fn bad(&self, what: &'static str) -> TarError {
        TarError::Member { member: self.shown(), what }
    }
}

impl<R: Read> Archive<'_, R> {
    /// The next member with its extensions, or none at the end mark.
    fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let (mut long_name, mut long_link, mut records) = (None, None, None);
        loop {
            let at = self.blocks.offset();
            let header = self.blocks.header()?;
            let has_extension = long_name.is_some() || long_link.is_some() || records.is_some();
            let Some(header) = header else {
                let what = "an extension header has no member after it";
                return if has_extension { Err(TarError::Header { at, what }) } else { Ok(None) };
            };
            let size =
                fields::size(&header).ok_or(TarError::Header { at, what: "its size is not a number" })?;
            let kind = header.entry_type();
            let twice = TarError::Header { at, what: "two extension headers of one kind for one member" };
            match kind {
                EntryType::GNULongName if long_name.is_some() => return Err(twice),
                EntryType::GNULongLink if long_link.is_some() => return Err(twice),
                EntryType::XHeader if records.is_some() => return Err(twice),
                EntryType::GNULongName => long_name = Some(self.extension(at, size)?),
                EntryType::GNULongLink => long_link = Some(self.extension(at, size)?),
                EntryType::XHeader => records = Some(Records::parse(&self.extension(at, size)?, at)?),
                EntryType::XGlobalHeader if has_extension => {
                    return Err(TarError::Header { at, what: "a global header follows another extension" });
                }
                EntryType::XGlobalHeader => {
                    let records = Records::parse(&self.extension(at, size)?, at)?;
                    self.global.extend(records);
                }
                _ => {
                    let pax = Pax::new(&self.global, records.as_ref(), at)?;
                    let clash = TarError::Header { at, what: "a pax and a GNU name for one member" };
                    if (pax.path.is_some() && long_name.is_some())
                        || (pax.link_path.is_some() && long_link.is_some())
                    {
                        return Err(clash);
                    }
                    let until_nul =
                        |name: Vec<u8>| name.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
                    let name = long_name.map(until_nul).or_else(|| pax.path.clone());
                    let link_name = long_link.map(until_nul).or_else(|| pax.link_path.clone());
                    let body_bytes = pax.size.unwrap_or(size);
                    return Ok(Some(Member {
                        name: name.unwrap_or_else(|| header.path_bytes().into_owned()),
                        link_name: link_name
                            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
                            .unwrap_or_default(),
                        header,
                        pax,
                        body_bytes,
                    }));
                }
            }
        }
    }

    /// The whole body of an extension header.
    fn extension(&mut self, at: u64, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION_BYTES {
            return Err(TarError::Header { at, what: "an extension header is longer than 1 MiB" });
        }
        let mut bytes = Vec::new();
        let mut body = Body::new(&mut self.blocks, size);
        let read = body.read_to_end(&mut bytes);
        self.blocks.outcome(read)?;
        self.blocks.skip_padding(size)?;
        Ok(bytes)
    }

    fn count_member(&mut self) -> Result<(), TarError> {
        self.members += 1;
        let limit = self.limits.members;
        if self.members > limit { Err(TarError::Limit { what: "members", limit }) } else { Ok(()) }
    }

    fn unpack(&mut self, member: Member) -> Result<(), TarError> {
        self.count_member()?;
        let kind = member.header.entry_type();
        if kind.as_byte() == b'V' {
            // A GNU volume label names no file.
            return self.blocks.skip(member.body_bytes);
        }
        let path = TreePath::from_archive(&member.name)
            .map_err(|source| TarError::Name { member: member.shown(), source })?;
        self.make_parents(&path, &member)?;
        // v7 and GNU tar: a regular file whose name ends in a slash is a folder.
        let is_regular = matches!(kind, EntryType::Regular | EntryType::Continuous);
        let is_folder = kind == EntryType::Directory || is_regular && member.name.ends_with(b"/");
        let is_file = is_regular && !is_folder || kind == EntryType::GNUSparse;
        if !is_file && member.body_bytes != 0 {
            return Err(member.bad("a body, and is no file"));
        }
        if path.is_root() && !is_folder {
            return Err(member.bad("the root's name, and is no folder"));
        }
        let device = || fields::device(&member.header).ok_or_else(|| member.bad("no good device number"));
        let node_kind = match kind {
            EntryType::Link => return self.link(path, &member),
            _ if is_folder => Kind::Directory,
            _ if is_file => self.store(&member)?,
            EntryType::Symlink => Kind::Symlink(member.link_name.clone().into()),
            EntryType::Char => device().map(|(major, minor)| Kind::CharDevice { major, minor })?,
            EntryType::Block => device().map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            EntryType::Fifo => Kind::Fifo,
            _ => return Err(member.bad("a type that is not supported")),
        };
        let meta = meta(&member)?;
        self.builder.put(path, Node { kind: node_kind, meta });
        Ok(())
    }

    fn link(&mut self, path: TreePath, member: &Member) -> Result<(), TarError> {
        let no_target =
            || TarError::Link { member: member.shown(), target: member.link_name.escape_ascii().to_string() };
        let target = TreePath::from_archive(&member.link_name).map_err(|_| no_target())?;
        if self.builder.link(path, &target) { Ok(()) } else { Err(no_target()) }
    }

    fn make_parents(&mut self, path: &TreePath, member: &Member) -> Result<(), TarError> {
        let mut missing = Vec::new();
        let mut next = path.parent();
        while let Some(parent) = next {
            match self.builder.get(&parent).map(|node| &node.kind) {
                Some(Kind::Directory) => break,
                Some(_) => return Err(TarError::Parent { member: member.shown(), parent }),
                None => {
                    next = parent.parent();
                    missing.push(parent);
                }
            }
        }
        for parent in missing {
            self.count_member()?;
            let meta = Meta { mode: 0o755, ..Meta::default() };
            self.builder.put(parent, Node { kind: Kind::Directory, meta });
        }
        Ok(())
    }

    /// Hands a file's content to the sink.
    fn store(&mut self, member: &Member) -> Result<Kind, TarError> {
        let map = sparse::Map::of(member, &mut self.blocks)?;
        let (stored_bytes, size) = match &map {
            Some(map) => (map.stored_bytes, map.size),
            None => (member.body_bytes, member.body_bytes),
        };
        self.content_bytes = self.content_bytes.saturating_add(size);
        if self.content_bytes > self.limits.content_bytes {
            return Err(TarError::Limit { what: "bytes of content", limit: self.limits.content_bytes });
        }
        let body = Body::new(&mut self.blocks, stored_bytes);
        let stored = match map {
            Some(map) => self.sink.store(&mut SparseReader::new(map, body)),
            None => {
                let mut body = body;
                self.sink.store(&mut body)
            }
        };
        let failed = |source| TarError::Store { member: member.shown(), source };
        let (digest, stored_size) = self.blocks.outcome_of_store(stored, failed)?;
        if stored_size != size {
            return Err(failed(io::Error::other("the store took another length than it was given")));
        }
        self.blocks.skip_padding(stored_bytes)?;
        Ok(Kind::File { digest, size })
    }
}

fn meta(member: &Member) -> Result<Meta, TarError> {
    let Member { header, pax, .. } = member;
    let old = header.as_old();
    let number = |field: &[u8], what| fields::number(field).ok_or_else(|| member.bad(what));
    let owner = |field: &[u8], pax: Option<u64>, what| {
        let id = pax.map_or_else(|| number(field, what), |id| Ok(i128::from(id)))?;
        u32::try_from(id).map_err(|_| member.bad(what))
    };
    let mode = number(&old.mode, "no good mode")? & 0o7777;
    let mtime = match pax.mtime {
        Some(mtime) => mtime,
        None => {
            let seconds = number(&old.mtime, "no good modification time")?;
            let seconds = i64::try_from(seconds).map_err(|_| member.bad("no good modification time"))?;
            Timestamp { seconds, nanoseconds: 0 }
        }
    };
    Ok(Meta {
        mode: u16::try_from(mode).map_err(|_| member.bad("no good mode"))?,
        uid: owner(&old.uid, pax.uid, "no good owner")?,
        gid: owner(&old.gid, pax.gid, "no good group")?,
        mtime,
        xattrs: pax.xattrs.clone(),
    })
}
