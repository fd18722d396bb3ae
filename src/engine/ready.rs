//! Borrowing a machine that is ready for a step, and having another made for the next.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln_digest::Digest;

use super::host::Host;
use super::prepare::Prepared;
use crate::keeper::Registry;
use crate::keeper::ready::{
    Backend as OrderedBackend, Order, is_in_succession, order, take_failure, take_turn,
};
use crate::machine::ready::{Lent, Readies as _};
use crate::machine::{Machine, Spec, drawn, serial};

/// Runs that belong together, as the steps of a build do: of none are machines that are made ready taken from another.
pub struct Series {
    /// What it says when one of its runs begins; drawn once.
    turn: String,
    at_once: usize,
    alike: usize,
}

impl Series {
    /// Runs of which so many go on `at_once`, beside so many that are got `ahead` for their turn.
    pub fn new(at_once: usize, ahead: usize) -> Self {
        // A turn that is another's makes more or fewer machines ready, and nothing else.
        let number = drawn().unwrap_or([0; 16]);
        let at_once = at_once.max(1);
        Self { turn: Digest::of(&number).to_string(), at_once, alike: at_once.saturating_add(ahead) }
    }
}

/// What a run has to do with ready machines.
pub(super) struct Readiness {
    key: Digest,
    order: Order,
    disks: Vec<OwnedFd>,
}

impl Readiness {
    /// For machines of `spec`; none where they have to be made for their step.
    pub fn of(host: &Host, series: &Series, prepared: &Prepared, spec: &Spec) -> Option<Self> {
        let idle = host.keeper_idle()?;
        let (key, backend) = match &prepared.vmm {
            Some(vmm) => (vmm.ready_key(spec), OrderedBackend::Vmm),
            None => {
                // A keeper is elsewhere.
                let program = std::path::absolute(prepared.qemu.program()).ok()?;
                let kvm = prepared.qemu.uses_kvm();
                (prepared.qemu.ready_key(spec), OrderedBackend::Qemu { program, kvm })
            }
        };
        let key = key.ok()??;
        let read_only = spec.disks.iter().filter(|disk| disk.read_only);
        let [scratch] = &spec.disks.iter().filter(|disk| !disk.read_only).collect::<Vec<_>>()[..] else {
            return None;
        };
        if scratch.serial != serial::SCRATCH {
            return None;
        }
        let disks = read_only.clone().map(|disk| disk.file.try_clone()).collect::<Result<_, _>>().ok()?;
        let store = host.settings.store.value.clone();
        // A build knows how many it wants.
        let is_pressed = series.alike == 1 && is_in_succession(&store);
        take_turn(&store, &series.turn).ok()?;
        let order = Order {
            turn: series.turn.clone(),
            key,
            store,
            backend,
            kernel: spec.kernel.clone(),
            initramfs: spec.initramfs.clone(),
            bundle: spec.bundle,
            memory_bytes: spec.memory_bytes,
            cpus: spec.cpus,
            cpu: spec.cpu,
            disks: read_only.map(|disk| disk.serial.clone()).collect(),
            scratch_bytes: scratch.size().ok()?,
            rehearsal: spec.rehearsal.clone()?,
            is_pressed,
            idle_seconds: Duration::as_secs(&idle),
            at_once: series.at_once,
            alike: series.alike,
            makes_templates: !host.store.has_limit(),
        };
        Some(Self { key, order, disks })
    }

    /// A machine that is ready for `spec`, with its shares.
    pub fn borrow(&mut self, host: &Host, spec: &Spec) -> Option<Box<dyn Machine>> {
        let loan = Registry::open(&host.store.run()).ok()?.borrow(&self.key)?;
        // One that had the time to rehearse shows that there is time for the next too.
        self.order.is_pressed &= !loan.has_rehearsed;
        let lent = Lent::new(loan.identity, loan.descriptors, loan.lender, loan.notes, &spec.shares).ok()?;
        Some(Box::new(lent))
    }

    /// Why the last keeper that was to hold such a machine could not; told once.
    pub fn failure(&self) -> Option<String> {
        take_failure(&self.order.store)
    }

    /// Whether the next run is expected to follow at once: its machine is made beside this one's step.
    pub fn is_pressed(&self) -> bool {
        self.order.is_pressed
    }

    /// Has another made for the next step. Where that fails, the next makes its own.
    pub fn order(self) -> Option<UnixStream> {
        order(&self.order, &self.disks).ok()
    }
}
