//! The FUSE server: takes one request off a descriptor chain, asks the tree, and writes the answer. What it sends
//! is [`Recorded`] or a [`Refusal`]; only the tree makes those that tell of a share.
//!
//! What it decides for all shares:
//! - **No open round trips.** OPEN and OPENDIR answer ENOSYS, after which the kernel opens files by itself.
//!   That loses nothing of the record: an open that reads nothing learns nothing beyond the metadata that the
//!   lookup gave, and every byte that comes is asked for with READ, through page faults and exec too.
//! - **Long timeouts.** What a share shows does not change while it is shown, so names, attributes and absence
//!   may be cached for ever. Only the names of shares themselves come and go.
//! - **Nothing is written.** Whatever would change a share answers EROFS; what is not known, ENOSYS.
//! - **Holes are not shown**: LSEEK is ENOSYS, so SEEK_DATA finds data everywhere, on every host. STATFS shows
//!   an empty file system for the same reason.
//! - **Listings carry attributes where they will be asked for.** All entries of a READDIRPLUS that is answered in full
//!   count as asked about, so only a process that has asked about all it listed before is told unasked (`walks`). Others
//!   get names and types from the same request.

use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, init, op};
use super::index::NodeId;
use super::record::Kind;
use super::recorded::{Recorded, Refusal};
use super::share::NAME_BYTES;
use super::state;
use super::tree::{Found, Page, Tree};
use crate::device::StateError;
use crate::ring::{Chain, Readable, Writable};

/// Largest READ, and the reason for `max_pages`.
pub const MOST_READ_BYTES: usize = 1 << 20;
/// Largest answer that is put together in memory: listings, attributes, link texts.
const MOST_ANSWER_BYTES: usize = 128 << 10;
/// Largest request body that is looked at: two names and the largest structure before them.
const MOST_BODY_BYTES: usize = 4 << 10;
/// How long names and attributes may be cached: ten years.
const FOR_EVER: u64 = 10 * 365 * 24 * 3600;

/// The server of one fs device.
pub struct Server {
    tree: Tree,
    answer: Vec<u8>,
    started: bool,
}

/// What a request comes to.
enum Reply {
    /// The bytes in `Server::answer`.
    Bytes,
    /// So many bytes, already behind the room for the header.
    Written(usize),
    /// The request has no answer.
    None,
}

impl Server {
    /// A server of `tree`.
    pub fn new(tree: Tree) -> Self {
        Self { tree, answer: Vec::new(), started: false }
    }

    /// The tree, for adding shares and taking the record.
    pub fn tree(&mut self) -> &mut Tree {
        &mut self.tree
    }

    /// Forgets the driver that was there.
    pub fn reset(&mut self) {
        self.tree.forget_all();
        self.started = false;
    }

    /// The server as [`super::state`] keeps it.
    ///
    /// # Errors
    /// [`StateError::InUse`] where there are, or were, shares.
    pub fn freeze(&self) -> Result<Vec<u8>, StateError> {
        if self.tree.had_shares() {
            return Err(StateError::InUse);
        }
        Ok(state::encode(self.started))
    }

    /// Takes over the driver of a server that was frozen. Shares may be there already: it has not seen them.
    ///
    /// # Errors
    /// [`StateError::InUse`] where there is a driver; [`StateError::Malformed`].
    pub fn thaw(&mut self, state: &[u8]) -> Result<(), StateError> {
        if self.started {
            return Err(StateError::InUse);
        }
        self.started = state::decode(state)?;
        Ok(())
    }

    /// Answers the request in `chain` and returns how many bytes were written.
    pub fn serve<B: Bitmap + 'static>(&mut self, mut chain: Chain<'_, B>) -> u32 {
        let length = chain.readable.remaining_bytes();
        let Some(bytes) = chain.readable.read_array::<40>() else { return 0 };
        let Ok(header) = abi::InHeader::read_from_bytes(&bytes) else { return 0 };
        self.answer.clear();
        let room = size_of::<abi::OutHeader>();
        let mut body = chain.writable.split_off(room);
        let result = if header.length.get() as usize == length {
            self.dispatch(&header, &mut chain.readable, body.as_mut())
        } else {
            Err(Refusal::constant(Errno::IO))
        };
        let (error, payload) = match result.map(Recorded::into_answer) {
            Ok(Reply::None) => return 0,
            Ok(Reply::Written(count)) => (0, count),
            Ok(Reply::Bytes) => match body.as_mut().is_some_and(|body| body.write(&self.answer)) {
                true => (0, self.answer.len()),
                false => (Errno::IO.raw_os_error(), 0),
            },
            Err(refusal) => (refusal.errno().raw_os_error(), 0),
        };
        let Ok(written) = u32::try_from(room + payload) else { return 0 };
        let out = abi::OutHeader { length: written.into(), error: (-error).into(), unique: header.unique };
        if chain.writable.write(out.as_bytes()) { written } else { 0 }
    }

    fn dispatch<B: Bitmap + 'static>(
        &mut self,
        header: &abi::InHeader,
        request: &mut Readable<'_, B>,
        room: Option<&mut Writable<'_, B>>,
    ) -> Result<Recorded<Reply>, Refusal> {
        let opcode = header.opcode.get();
        match opcode {
            // These have no answer.
            op::FORGET => {
                if let Some(count) = request.read_array::<8>() {
                    self.tree.forget(header.nodeid.get(), u64::from_le_bytes(count));
                }
                return Ok(Recorded::constant(Reply::None));
            }
            op::BATCH_FORGET => {
                self.batch_forget(request);
                return Ok(Recorded::constant(Reply::None));
            }
            op::INTERRUPT | op::NOTIFY_REPLY => return Ok(Recorded::constant(Reply::None)),
            _ => {}
        }
        // Without room for a header nothing can be answered, so nothing is done.
        let Some(room) = room else { return Ok(Recorded::constant(Reply::None)) };
        if opcode == op::INIT {
            return self.init(request);
        }
        if !self.started {
            return Err(Refusal::constant(Errno::IO));
        }
        let node = || self.tree.held(header.nodeid.get());
        match opcode {
            op::LOOKUP => {
                let directory = node()?;
                let name = read_body(request)?;
                self.lookup(directory, &name, header.pid.get(), room.remaining_bytes())
            }
            op::GETATTR => {
                let attr = self.tree.attributes(node()?)?;
                // The top changes when shares come and go.
                let valid = if header.nodeid.get() == abi::ROOT_ID { 0 } else { FOR_EVER };
                let out = |attr| abi::AttrOut { attr_valid: valid.into(), attr, ..Default::default() };
                Ok(self.put(attr.map(out)))
            }
            op::READLINK => {
                let text = self.tree.link_text(node()?)?;
                Ok(text.map(|text| self.put_bytes(text)))
            }
            op::READ => {
                let node = node()?;
                let ask: abi::ReadIn = read_struct(request)?;
                let offset = ask.offset.get();
                if i64::try_from(offset).is_err() {
                    return Err(Refusal::constant(Errno::INVAL));
                }
                let wanted = (ask.size.get() as usize).min(MOST_READ_BYTES).min(room.remaining_bytes());
                let count =
                    self.tree.read(node, offset, wanted, |file| room.read_file_at(file, offset, wanted));
                Ok(count?.map(Reply::Written))
            }
            op::READDIR | op::READDIRPLUS => {
                let node = node()?;
                let ask: abi::ReadIn = read_struct(request)?;
                let walker = (opcode == op::READDIRPLUS).then_some(header.pid.get());
                self.list(node, &ask, walker, room.remaining_bytes())
            }
            op::GETXATTR => {
                let node = node()?;
                let ask: abi::XattrSize = read_struct(request)?;
                let name = read_body(request)?;
                let value = self.tree.xattr(node, one_name(&name)?)?;
                value.and_then(|value| self.put_sized(value.ok_or(Errno::NODATA)?, ask.size.get()))
            }
            op::LISTXATTR => {
                let node = node()?;
                let ask: abi::XattrSize = read_struct(request)?;
                let names = self.tree.xattrs(node)?;
                names.and_then(|names| self.put_sized(names, ask.size.get()))
            }
            op::STATFS => Ok(self.put(Recorded::constant(abi::Statfs {
                block_size: 4096.into(),
                fragment_size: 4096.into(),
                name_length: 255.into(),
                ..Default::default()
            }))),
            op::DESTROY => {
                self.reset();
                Ok(Recorded::constant(Reply::Bytes))
            }
            op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::WRITE
            | op::SETXATTR
            | op::REMOVEXATTR
            | op::CREATE
            | op::TMPFILE
            | op::FALLOCATE
            | op::COPY_FILE_RANGE => Err(Refusal::constant(Errno::ROFS)),
            _ => Err(Refusal::constant(Errno::NOSYS)),
        }
    }

    fn init<B: Bitmap + 'static>(
        &mut self,
        request: &mut Readable<'_, B>,
    ) -> Result<Recorded<Reply>, Refusal> {
        let ask: abi::InitIn = read_struct(request)?;
        let mut out = abi::InitOut { major: abi::VERSION.into(), ..Default::default() };
        match ask.major.get() {
            // A newer driver asks again with this version.
            major if major > abi::VERSION => return Ok(self.put(Recorded::constant(out))),
            abi::VERSION if ask.minor.get() >= abi::OLDEST_MINOR => {}
            _ => return Err(Refusal::constant(Errno::PROTO)),
        }
        self.reset();
        self.started = true;
        let can = init::ASYNC_READ
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::NO_OPEN_SUPPORT
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::NO_OPENDIR_SUPPORT
            | init::INIT_EXT;
        out.minor = ask.minor.get().min(abi::NEWEST_MINOR).into();
        out.max_readahead = ask.max_readahead;
        out.flags = (ask.flags.get() & can).into();
        out.max_background = 64.into();
        out.congestion_threshold = 48.into();
        out.max_write = 4096.into();
        out.time_granularity = 1.into();
        out.max_pages = 256.into();
        Ok(self.put(Recorded::constant(out)))
    }

    fn lookup(
        &mut self,
        directory: NodeId,
        body: &[u8],
        process: u32,
        room: usize,
    ) -> Result<Recorded<Reply>, Refusal> {
        let name = one_name(body)?;
        if name.len() > NAME_BYTES {
            return Err(Refusal::constant(Errno::NAMETOOLONG));
        }
        if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
            return Err(Refusal::constant(Errno::INVAL));
        }
        if room < size_of::<abi::EntryOut>() {
            return Err(Refusal::constant(Errno::IO));
        }
        let found = self.tree.lookup(directory, name, process)?;
        let entry = found.and_then(|found| entry_out(&found).ok_or(Errno::NOENT));
        Ok(self.put(entry?))
    }

    fn list(
        &mut self,
        directory: NodeId,
        ask: &abi::ReadIn,
        walker: Option<u32>,
        room: usize,
    ) -> Result<Recorded<Reply>, Refusal> {
        let most = (ask.size.get() as usize).min(room).min(MOST_ANSWER_BYTES);
        let mut page =
            Answer { bytes: &mut self.answer, most, plus: walker.is_some(), last: 0, is_full: false };
        let listed = self.tree.list(directory, ask.offset.get(), walker, &mut page)?;
        // An empty answer would say that there is nothing more.
        let none_fits = page.is_full && page.bytes.is_empty();
        listed.and_then(|()| if none_fits { Err(Errno::INVAL) } else { Ok(Reply::Bytes) })
    }

    fn batch_forget<B: Bitmap + 'static>(&mut self, request: &mut Readable<'_, B>) {
        // The count that is claimed does not matter: what is there is taken.
        if let Some(_count) = request.read_array::<8>() {
            while let Some(bytes) = request.read_array::<16>() {
                if let Ok(one) = abi::ForgetOne::read_from_bytes(&bytes) {
                    self.tree.forget(one.nodeid.get(), one.nlookup.get());
                }
            }
        }
    }

    fn put(&mut self, answer: Recorded<impl IntoBytes + zerocopy::Immutable>) -> Recorded<Reply> {
        answer.map(|answer| {
            self.answer.extend_from_slice(answer.as_bytes());
            Reply::Bytes
        })
    }

    fn put_bytes(&mut self, answer: Vec<u8>) -> Reply {
        self.answer = answer;
        Reply::Bytes
    }

    /// Answers with `value`, or with its size where `room` is 0.
    fn put_sized(&mut self, value: Vec<u8>, room: u32) -> Result<Reply, Errno> {
        let size = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
        if room == 0 {
            let size = abi::XattrSize { size: size.into(), padding: 0.into() };
            return Ok(self.put_bytes(size.as_bytes().to_vec()));
        }
        if size > room { Err(Errno::RANGE) } else { Ok(self.put_bytes(value)) }
    }
}

/// What LOOKUP answers, and READDIRPLUS for each entry. None where nothing may be cached.
fn entry_out(found: &Found) -> Option<abi::EntryOut> {
    match *found {
        Found::Node { nodeid, attr, is_share } => Some(abi::EntryOut {
            nodeid: nodeid.into(),
            entry_valid: if is_share { 0 } else { FOR_EVER }.into(),
            attr_valid: FOR_EVER.into(),
            attr,
            ..Default::default()
        }),
        Found::Absent => Some(abi::EntryOut { entry_valid: FOR_EVER.into(), ..Default::default() }),
        Found::NoShare => None,
    }
}

/// The answer to READDIR or READDIRPLUS.
struct Answer<'a> {
    bytes: &'a mut Vec<u8>,
    most: usize,
    plus: bool,
    /// Where the last entry begins.
    last: usize,
    is_full: bool,
}

impl Page for Answer<'_> {
    fn push(&mut self, name: &[u8], inode: u64, kind: Kind, next: u64) -> bool {
        self.last = self.bytes.len();
        // DT_*.
        let kind = match kind {
            Kind::Fifo => 1,
            Kind::Character => 2,
            Kind::Directory => 4,
            Kind::Block => 6,
            Kind::Regular => 8,
            Kind::Link => 10,
            Kind::Socket => 12,
        };
        let head = abi::Dirent {
            ino: inode.into(),
            offset: next.into(),
            name_length: u32::try_from(name.len()).unwrap_or(0).into(),
            kind: u32::into(kind),
        };
        if self.plus {
            self.bytes.extend_from_slice(&abi::NOTHING_TOLD);
        }
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.is_full = self.bytes.len() > self.most;
        if self.is_full {
            self.bytes.truncate(self.last);
        }
        !self.is_full
    }

    fn describe(&mut self, found: Recorded<Found>) {
        let place = self.bytes.get_mut(self.last..self.last + size_of::<abi::EntryOut>());
        if let (true, Some(place), Some(entry)) = (self.plus, place, entry_out(&found.into_answer())) {
            place.copy_from_slice(entry.as_bytes());
        }
    }
}

fn read_struct<T: FromBytes, B: Bitmap + 'static>(request: &mut Readable<'_, B>) -> Result<T, Refusal> {
    let mut bytes = [0; 64];
    let bytes = bytes.get_mut(..size_of::<T>()).ok_or(Refusal::constant(Errno::INVAL))?;
    if request.read(bytes) < bytes.len() {
        return Err(Refusal::constant(Errno::INVAL));
    }
    T::read_from_bytes(bytes).map_err(|_| Refusal::constant(Errno::INVAL))
}

/// All that is left of the request.
fn read_body<B: Bitmap + 'static>(request: &mut Readable<'_, B>) -> Result<Vec<u8>, Refusal> {
    if request.remaining_bytes() > MOST_BODY_BYTES {
        return Err(Refusal::constant(Errno::NAMETOOLONG));
    }
    let mut body = vec![0; request.remaining_bytes()];
    let read = request.read(&mut body);
    body.truncate(read);
    Ok(body)
}

/// The name in a body that is one name and its final zero byte.
fn one_name(body: &[u8]) -> Result<&[u8], Refusal> {
    match body.split_last() {
        Some((0, name)) if !name.contains(&0) => Ok(name),
        _ => Err(Refusal::constant(Errno::INVAL)),
    }
}
