//! The device process beside one QEMU: its devices, and the loop that does what the parent asks.
//!
//! The parent starts it with inherited descriptors and talks to it through [`crate::control`]. Each device has
//! two threads (QEMU's messages, the queues), and the caller's thread serves the control connection. Whatever
//! sandbox the process is to run in is put around it by the launcher.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::control::{Ask, Event, FrameError, Request, receive, send};
use crate::fs::{Fs, Settings, Share, Shares};
use crate::vhost_user::{Carrier, CarryError};

/// Most bytes of private memory a device process should need.
pub const MEMORY_BYTES: u64 = 15 << 20;

/// Why a device process ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A thread could not be started.
    #[error("cannot start a device thread")]
    Thread(#[source] io::Error),
    /// The parent sent what is not a request.
    #[error("cannot receive from the parent")]
    Control(#[from] FrameError),
    /// A device could not be served.
    #[error("device `{device}` failed")]
    Device {
        /// `fs` or `vsock`.
        device: &'static str,
        /// Why.
        #[source]
        source: CarryError,
    },
}

/// Serves the fs (and, where given, vsock) device of one machine.
///
/// A vhost-user socket here is the *listener*: a bound, listening unix socket. The parent connects to it
/// before it starts this process, unlinks its path, and gives the connected end to QEMU
/// (`-chardev socket,id=fs,fd=N`), or lets QEMU connect by path and unlinks afterwards.
#[derive(Debug)]
pub struct DeviceProcess {
    /// The vhost-user listener of the fs device, tag `kiln`.
    pub fs: OwnedFd,
    /// The vhost-user listener of the vsock device, and the guest's CID.
    pub vsock: Option<(OwnedFd, u64)>,
    /// The connection to the parent's [`crate::control::Client`].
    pub control: UnixStream,
}

impl DeviceProcess {
    /// Serves until the parent closes the control connection. That QEMU hangs up ends a device, but not the
    /// process: the record is asked for afterwards.
    ///
    /// # Errors
    /// See [`ProcessError`].
    pub fn run(self) -> Result<(), ProcessError> {
        let (fs, shares) = Fs::new(Settings::default());
        let devices = vec![start("fs", Carrier::new(fs), self.fs)?];
        let control = Control { socket: Arc::new(self.control), sending: Arc::default(), shares };
        control.serve()?;
        for (device, thread) in devices {
            // A device whose QEMU still runs ends with the process.
            if thread.is_finished()
                && let Ok(Err(source)) = thread.join()
            {
                return Err(ProcessError::Device { device, source });
            }
        }
        Ok(())
    }
}

type Running = (&'static str, JoinHandle<Result<(), CarryError>>);

fn start<D: crate::device::Device<()> + 'static>(
    name: &'static str,
    carrier: Carrier<D>,
    listener: OwnedFd,
) -> Result<Running, ProcessError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let thread = thread.stack_size(256 << 10).spawn(move || carrier.serve(listener));
    Ok((name, thread.map_err(ProcessError::Thread)?))
}

/// The connection to the parent.
#[derive(Clone)]
struct Control {
    socket: Arc<UnixStream>,
    // Held while a frame is sent, so that frames of two threads do not mix.
    sending: Arc<Mutex<()>>,
    shares: Shares,
}

impl Control {
    fn serve(&self) -> Result<(), FrameError> {
        while let Some((request, descriptor)) = receive::<Request>(&self.socket)? {
            let id = request.id;
            let result = self.answer(request, descriptor)?;
            self.send(&Event::Reply { id, result }, None)?;
        }
        Ok(())
    }

    fn answer(
        &self,
        request: Request,
        descriptor: Option<OwnedFd>,
    ) -> Result<Result<(), String>, FrameError> {
        Ok(match (request.what, descriptor) {
            (Ask::AddShare { name, attributes }, Some(directory)) => {
                let share = Share { directory, attributes };
                let added = self.shares.with_tree(|tree| tree.add_share(&name.0, share));
                added.map_err(|error| error.to_string())
            }
            (Ask::RemoveShare { name }, None) => {
                let removed = self.shares.with_tree(|tree| tree.remove_share(&name.0));
                if removed { Ok(()) } else { Err("no share of that name".to_owned()) }
            }
            (Ask::Finish, None) => {
                let id = request.id;
                self.shares.with_tree(|tree| {
                    tree.settle();
                    tree.export(|part| self.send(&Event::Record { id, part }, None))
                })?;
                Ok(())
            }
            (Ask::Listen { .. } | Ask::Connect { .. }, _) => Err("there is no vsock device".to_owned()),
            _ => Err("a descriptor is missing, or one too many".to_owned()),
        })
    }

    fn send(&self, event: &Event, stream: Option<&UnixStream>) -> Result<(), FrameError> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        send(&self.socket, event, stream.map(UnixStream::as_fd))
    }
}
