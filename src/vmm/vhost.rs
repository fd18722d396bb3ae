//! A device that another process serves over vhost-user: kiln's device process, which holds the shares.
//!
//! This process is the front end. It tells the other one of guest memory and of the driver's queues, and hands it the
//! descriptors by which KVM notifies it and it raises interrupts; what is in the queues never comes by here.

use std::io;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::mmio::{Queue, Target};

/// VHOST_USER_F_PROTOCOL_FEATURES, which is between the two processes.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL, likewise.
const LOG_ALL: u64 = 1 << 26;

/// What of a device is known before its process is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    /// The device type.
    pub device_type: u32,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The configuration space.
    pub config: Vec<u8>,
}

/// Bytes of a file system's tag in its configuration (virtio 1.3 §5.11.4).
const TAG_BYTES: usize = 36;

impl Kind {
    /// A file system under `tag`, with one queue for requests.
    #[must_use]
    pub fn fs(tag: &str) -> Self {
        let mut config = tag.as_bytes().to_vec();
        config.resize(TAG_BYTES, 0);
        config.extend(1_u32.to_le_bytes());
        Self { device_type: 26, queue_sizes: vec![1024, 1024], config }
    }

    /// Stream sockets of the guest `cid`.
    #[must_use]
    pub fn vsock(cid: u64) -> Self {
        Self { device_type: 19, queue_sizes: vec![256, 256, 256], config: cid.to_le_bytes().to_vec() }
    }
}

/// A device in another process.
pub struct VhostUser {
    kind: Kind,
    frontend: Frontend,
    features: u64,
    memory: GuestMemoryMmap,
    /// The queues that it serves.
    serving: Vec<usize>,
}

fn failed(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

impl VhostUser {
    /// Speaks to the process behind `stream`, which is to serve a device of `kind` in `memory`.
    ///
    /// # Errors
    /// It does not answer, or not as such a process does.
    pub fn new(stream: UnixStream, kind: Kind, memory: &GuestMemoryMmap) -> io::Result<Self> {
        let queues = u64::try_from(kind.queue_sizes.len()).unwrap_or(u64::MAX);
        let mut frontend = Frontend::from_stream(stream, queues);
        frontend.set_owner().map_err(failed)?;
        let features = frontend.get_features().map_err(failed)?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(failed("the device process is none for this VMM"));
        }
        frontend.set_features(features & PROTOCOL_FEATURES).map_err(failed)?;
        let protocol = frontend.get_protocol_features().map_err(failed)?;
        let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(protocol & wanted).map_err(failed)?;
        let regions = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions: Vec<_> = regions.collect::<Result<_, _>>().map_err(failed)?;
        frontend.set_mem_table(&regions).map_err(failed)?;
        let features = features & !(PROTOCOL_FEATURES | LOG_ALL);
        Ok(Self { kind, frontend, features, memory: memory.clone(), serving: Vec::new() })
    }

    fn serve(
        &mut self,
        index: usize,
        queue: &Queue,
        notified: &EventFd,
        interrupt: &EventFd,
    ) -> io::Result<()> {
        // The protocol names what lies in guest memory by its place in this process.
        let host = |address: GuestAddress| {
            self.memory.get_host_address(address).map(|place| place as u64).map_err(failed)
        };
        let config = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: host(queue.descriptors)?,
            used_ring_addr: host(queue.used)?,
            avail_ring_addr: host(queue.available)?,
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size).map_err(failed)?;
        frontend.set_vring_addr(index, &config).map_err(failed)?;
        frontend.set_vring_base(index, 0).map_err(failed)?;
        frontend.set_vring_call(index, interrupt).map_err(failed)?;
        frontend.set_vring_kick(index, notified).map_err(failed)?;
        frontend.set_vring_enable(index, true).map_err(failed)?;
        self.serving.push(index);
        Ok(())
    }
}

impl Target for VhostUser {
    fn device_type(&self) -> u32 {
        self.kind.device_type
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.kind.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.kind.config
    }

    fn start(
        &mut self,
        features: u64,
        queues: &[Option<Queue>],
        notified: &[EventFd],
        interrupt: &EventFd,
    ) -> io::Result<()> {
        self.frontend.set_features(features | PROTOCOL_FEATURES).map_err(failed)?;
        for (index, (queue, notified)) in queues.iter().zip(notified).enumerate() {
            if let Some(queue) = queue {
                self.serve(index, queue, notified, interrupt)?;
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        // A queue that was not stopped stays among those that are served: the next stop fails too.
        while let Some(index) = self.serving.last() {
            self.frontend.get_vring_base(*index).map_err(failed)?;
            self.serving.pop();
        }
        Ok(())
    }
}
