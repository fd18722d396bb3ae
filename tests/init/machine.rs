//! A machine that boots a kernel and an initrd directly: no firmware, so there is neither Secure Boot nor an entry that was
//! taken. Its serial console is read as it comes, and what is typed goes to it. It never restarts: where it would, it ends.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::images;

/// How long one machine may take for each thing that is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Machine {
    process: Child,
    console: Receiver<Vec<u8>>,
    /// All that was printed.
    seen: String,
    /// Up to where it was matched.
    matched: usize,
    /// What it writes to its virtio console.
    virtio_console: PathBuf,
}

/// How a disk is attached.
#[derive(Clone, Copy)]
pub enum Bus {
    Virtio,
    Nvme,
}

/// What a machine is made of.
pub struct Shape<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub command_line: &'a str,
    pub disks: &'a [(&'a Path, Bus)],
    /// Whether what it writes to its disks stays there.
    pub keeps_writes: bool,
    /// Whether it has a network card, and something to ask for an address.
    pub has_network: bool,
}

impl Machine {
    pub fn start(shape: &Shape<'_>) -> Self {
        let virtio_console = images::fresh("hvc");
        let mut qemu = Command::new("qemu-system-x86_64");
        // /dev/kvm may be there and run no code.
        qemu.args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "512M",
        ])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args([
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtconsole,chardev=hvc",
        ])
        .args(["-chardev", &format!("file,id=hvc,path={}", virtio_console.to_str().expect("text"))])
        .arg("-kernel")
        .arg(shape.kernel)
        .arg("-initrd")
        .arg(shape.initrd)
        .args(["-append", &format!("console=ttyS0 no_timer_check panic=-1 {}", shape.command_line)]);
        for (index, (path, bus)) in shape.disks.iter().enumerate() {
            let device = match bus {
                Bus::Virtio => "virtio-blk-pci".to_owned(),
                Bus::Nvme => format!("nvme,serial={index}"),
            };
            let path = path.to_str().expect("text");
            let snapshot = if shape.keeps_writes { "off" } else { "on" };
            qemu.args(["-drive", &format!("id=d{index},if=none,format=raw,snapshot={snapshot},file={path}")])
                .args(["-device", &format!("{device},drive=d{index}")]);
        }
        if shape.has_network {
            qemu.args(["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"]);
        }
        let qemu = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut process = qemu.spawn().expect("QEMU is installed");
        let mut stdout = process.stdout.take().expect("it is piped");
        let (sender, console) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { process, console, seen: String::new(), matched: 0, virtio_console }
    }

    /// Waits until the console prints `text`, after what was matched last. Gives what came before it.
    pub fn expect(&mut self, text: &str) -> String {
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen[self.matched..].find(text) {
                let before = self.seen[self.matched..self.matched + at].to_owned();
                self.matched += at + text.len();
                return before;
            }
            assert!(self.read(give_up), "`{text}` was not printed, and this was:\n{}", self.seen);
        }
    }

    /// Waits until the console has printed all of `texts`, in any order, after what was matched last. Gives all that came.
    pub fn expect_all(&mut self, texts: &[&str]) -> String {
        let give_up = Instant::now() + PATIENCE;
        let start = self.matched;
        loop {
            let missing: Vec<&&str> =
                texts.iter().filter(|text| !self.seen[start..].contains(**text)).collect();
            if missing.is_empty() {
                self.matched = self.seen.len();
                return self.seen[start..].to_owned();
            }
            let missing = format!("{missing:?}");
            assert!(self.read(give_up), "{missing} were not printed, and this was:\n{}", self.seen);
        }
    }

    /// Types it.
    pub fn types(&mut self, text: &str) {
        // A machine that has ended takes nothing; what it printed tells.
        let _ = self.process.stdin.as_mut().expect("it is piped").write_all(text.as_bytes());
    }

    /// Waits until it switches itself off or would restart. Gives all that it printed.
    pub fn ends(mut self) -> String {
        let give_up = Instant::now() + PATIENCE;
        while self.read(give_up) {}
        assert!(Instant::now() < give_up, "it goes on, after:\n{}", self.seen);
        assert!(self.process.wait().expect("it is ours").success(), "{}", self.seen);
        std::mem::take(&mut self.seen)
    }

    /// As [`Machine::ends`], with what it wrote to its virtio console beside it.
    pub fn ends_with_both_consoles(self) -> (String, String) {
        let path = self.virtio_console.clone();
        let printed = self.ends();
        (printed, String::from_utf8_lossy(&fs::read(path).expect("QEMU made it")).into_owned())
    }

    /// Reads on; `false` at the end and when it is too late.
    fn read(&mut self, give_up: Instant) -> bool {
        match self.console.recv_timeout(give_up.saturating_duration_since(Instant::now())) {
            Ok(bytes) => {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
