//! Boots a kernel on KVM with its console on standard output: `boot KERNEL INITRAMFS MEMORY_MIB CPUS [WORD]...`.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use kiln_vmm::cpu::Model;
use kiln_vmm::{Machine, Origin, Parts, memory};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or("usage: boot KERNEL INITRAMFS MEMORY_MIB CPUS [WORD]...");
    let (kernel, initramfs) = (File::open(next()?)?, File::open(next()?)?);
    let (bytes, cpus) = (next()?.parse::<u64>()? << 20, next()?.parse()?);
    let words: Vec<String> = arguments.collect();
    let (sender, ends) = mpsc::channel();
    let started = Instant::now();
    let machine = Machine::new(Parts {
        kvm: OpenOptions::new().read(true).write(true).open("/dev/kvm")?.into(),
        origin: Origin::Boot {
            kernel,
            initramfs,
            command_line: format!("console=ttyS0 panic=-1 reboot=a {}", words.join(" ")),
        },
        generation: [0; 16],
        memory: memory::map(&memory::make_file(bytes)?, bytes)?,
        cpus,
        model: Model::Fixed,
        console: Box::new(std::io::stdout()),
        devices: Vec::new(),
        on_end: Arc::new(move |end| drop(sender.send(end))),
    })?;
    let _running = machine.start(|| Ok(()))?;
    let end = ends.recv()?;
    let line = format!("\n{end}, after {:.3} s\n", started.elapsed().as_secs_f64());
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())?;
    Ok(())
}
