//! Machines of QEMU's that are frozen, and copies of them: the memory is a file that QEMU maps, and all else goes through its
//! migration stream, the devices' state among it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use kiln_digest::Digest;

use super::devices::Devices;
use super::vm::QemuMachine;
use super::{Origins, Qemu, argv, key};
use crate::machine::Spec;
use crate::machine::template::{
    COPY_PATIENCE, Freezer, Frozen, Template, TemplateError, Templates, answer, ram, settle,
};
use crate::threads;

impl Freezer for Qemu {
    type Machine = QemuMachine;

    fn templates(&self) -> Option<&Templates> {
        self.templates.as_ref()
    }

    fn key(&self, spec: &Spec) -> io::Result<Digest> {
        key::of(self, spec)
    }

    fn freeze(&self, spec: &Spec, state: File) -> Result<Frozen, TemplateError> {
        let io = TemplateError::io;
        let ram = kiln_virtio::ram::new(spec.memory_bytes).map_err(io("make memory for a template"))?;
        let given = ram.try_clone().map_err(io("hold a template's memory"))?;
        let devices = Devices::start(spec.carrier)?;
        let origins = Origins::Freeze { ram: given.into(), state: state.into() };
        let started = Instant::now();
        let (mut machine, mut qmp) = self.bring_up(spec, Some(devices), origins)?;
        let complaints = settle(&mut machine, started)?;
        qmp.freeze(argv::STATE_SET).map_err(io("freeze the machine"))?;
        // Nothing writes the memory any more when these are dropped.
        Ok(Frozen { ram, version: qmp.version.to_string(), complaints })
    }

    fn thaw(&self, template: &Template, spec: &Spec) -> Result<QemuMachine, TemplateError> {
        let io = TemplateError::io;
        let ram = kiln_virtio::ram::new(spec.memory_bytes).map_err(io("make memory for a copy"))?;
        let given = ram.try_clone().map_err(io("hold a copy's memory"))?;
        let (mut sender, state) = UnixStream::pair().map_err(io("make a socket pair"))?;
        sender.set_write_timeout(Some(COPY_PATIENCE)).map_err(io("make a socket pair"))?;
        let origins = Origins::Thaw { ram: given.into(), state: state.into() };
        let devices = Devices::start(spec.carrier)?;
        let (mut machine, qmp) = thread::scope(|scope| {
            // While QEMU starts, which touches no memory before it has a state.
            let fill = || ram::fill(&ram, &template.ram);
            let filling = threads::start_in(scope, "filling", fill);
            let (machine, mut qmp) = self.bring_up(spec, Some(devices), origins)?;
            qmp.ignore_shared_memory().map_err(io("prepare QEMU for a state"))?;
            let filled = match filling {
                Ok(filling) => filling.join().unwrap_or_else(|_| Err(io::Error::other("it panicked"))),
                Err(_) => fill(),
            };
            filled.map_err(io("fill a copy's memory"))?;
            Ok::<_, TemplateError>((machine, qmp))
        })?;
        if qmp.version.to_string() != template.version {
            return Err(TemplateError::Damaged("another QEMU made it"));
        }
        match sender.write_all(&template.state) {
            Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
                return Err(io("send a state")(source));
            }
            // A QEMU that is gone says why below.
            _ => drop(sender),
        }
        machine.watch = qmp.watch().map_err(io("listen to QEMU"))?;
        // Nobody takes the wire of a machine that is lent.
        if let Some(wire) = machine.wire.held() {
            machine.watch.hang_up_at_trouble(wire.try_clone().map_err(io("hold the wire"))?);
        }
        answer(&mut machine, COPY_PATIENCE)?;
        Ok(machine)
    }
}
