//! Packet headers of virtio-vsock (virtio 1.3 §5.10.6): the layout and the numbers.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender will receive no more.
pub const SHUT_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender will send no more.
pub const SHUT_SEND: u32 = 2;

/// Operations (VIRTIO_VSOCK_OP_*).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts it.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends it.
    pub const RST: u16 = 3;
    /// Ends one direction or both.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells of room.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// struct virtio_vsock_hdr: 44 bytes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Where it comes from.
    pub src_cid: U64,
    /// Where it goes.
    pub dst_cid: U64,
    /// Where it comes from.
    pub src_port: U32,
    /// Where it goes.
    pub dst_port: U32,
    /// Bytes of data behind the header.
    pub length: U32,
    /// Kind of socket.
    pub kind: U16,
    /// One of [`op`].
    pub op: U16,
    /// For SHUTDOWN.
    pub flags: U32,
    /// The sender's receive buffer for this connection, bytes.
    pub buf_alloc: U32,
    /// Bytes that the sender has taken out of it so far, modulo 2^32.
    pub fwd_cnt: U32,
}

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 44;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

impl Header {
    /// The answer that ends the connection this packet belongs to, from the side it was sent to.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST.into(),
            ..Self::default()
        }
    }
}
