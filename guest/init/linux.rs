//! The real machine behind [`System`]: mounts, devices and files, each done once and said in words where it fails.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind_recursive, mount_move, mount_remount, unmount,
};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::boot::{Image, Loaded, Role, System, VOLUME_OPTIONS, Volume};
use crate::devices;
use crate::fat;
use crate::modules::Modules;
use crate::sys;
use crate::verity::{OnCorruption, SUPERBLOCK_BYTES, Superblock, tables_start};

/// Where the partition that is booted from is mounted.
const VOLUME: &str = "/boot/efi";
/// How.
const VOLUME_FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
/// Where images and layers are mounted.
const PLACE: &str = "/initos";
/// Where the root is put together.
const ROOT: &str = "/sysroot";
/// Where each kernel's modules are.
const MODULES: &str = "/lib/modules";
/// The largest small file that is read from a partition that nothing vouches for.
const SMALL_BYTES: u64 = 4096;
/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h.
const COMPRESSED: libc::c_int = 4;

/// Of file systems that are mounted as they are.
const NO_OPTIONS: Option<&CStr> = None;

/// The machine.
pub struct Linux {
    release: String,
    modules: Modules,
    opened: Vec<Opened>,
}

struct Opened {
    role: Role,
    name: String,
    device: String,
    // A loop device that nobody has open is let go of.
    _loops: [File; 2],
}

fn words(what: &str) -> impl Fn(rustix::io::Errno) -> String + '_ {
    move |errno| format!("{what}: {errno}")
}

fn folder(path: &str) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|error| format!("{path}: {error}"))
}

impl Linux {
    /// Mounts the kernel's own file systems.
    #[must_use]
    pub fn prepare() -> Self {
        let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
        let no_code = MountFlags::NOSUID | MountFlags::NOEXEC;
        for (kind, path, flags, options) in [
            ("devtmpfs", "/dev", no_code, c"mode=0755"),
            ("proc", "/proc", quiet, c""),
            ("sysfs", "/sys", quiet, c""),
            ("tmpfs", "/run", quiet, c"mode=0755"),
        ] {
            // What is not there is missed by who needs it, and said then.
            let _ = fs::create_dir_all(path);
            let _ = mount(kind, path, kind, flags, Some(options));
        }
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let modules = Self::read_modules(&release);
        Self { release, modules, opened: Vec::new() }
    }

    /// The kernel's release.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    fn read_modules(release: &str) -> Modules {
        let read = |name| fs::read_to_string(format!("{MODULES}/{release}/{name}")).unwrap_or_default();
        Modules::new(read("modules.dep"), read("modules.alias"), read("modules.builtin"))
    }

    fn attach(&self, path: &str) -> Result<(u32, File, File), String> {
        let file = File::open(path).map_err(|error| format!("{path}: {error}"))?;
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .map_err(|error| format!("/dev/loop-control: {error}"))?;
        let open = |number| {
            let path = format!("/dev/loop{number}");
            let device = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            Ok(File::from(device))
        };
        let (number, device) =
            sys::attach_loop(&control, &file, open).map_err(words("attaching a loop device"))?;
        Ok((number, device, file))
    }

    fn mapper() -> Result<File, String> {
        let path = "/dev/mapper/control";
        File::options().read(true).write(true).open(path).map_err(|error| format!("{path}: {error}"))
    }

    /// Gives the root to its own init: everything mounted moves into it, and the initrd's files go.
    ///
    /// # Errors
    /// What could not be done; the machine is of no use then.
    pub fn hand_over(&mut self, init: &str) -> Result<std::convert::Infallible, String> {
        for path in ["/dev", "/proc", "/sys", "/run", VOLUME] {
            let to = format!("{ROOT}{path}");
            folder(&to)?;
            mount_move(path, to.as_str()).map_err(words(path))?;
        }
        rustix::process::chdir(ROOT).map_err(words(ROOT))?;
        // The initrd is memory that nobody else would give back.
        if let Ok(here) = fs::metadata("/") {
            clear(Path::new("/"), here.dev());
        }
        mount_move(".", "/").map_err(words("moving the root"))?;
        rustix::process::chroot(".").map_err(words("entering the root"))?;
        rustix::process::chdir("/").map_err(words("entering the root"))?;
        // The environment of the kernel's command line is not the root's business.
        let mut command = Command::new(init);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("TERM", "linux");
        let error = command.exec();
        Err(format!("{init}: {error}"))
    }

    /// Restarts the machine.
    pub fn restart(&self) -> ! {
        rustix::fs::sync();
        let _ = reboot(RebootCommand::Restart);
        loop {
            std::thread::park();
        }
    }
}

/// Removes everything on the device `device` beneath `folder`.
fn clear(folder: &Path, device: u64) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.dev() != device {
            continue;
        }
        if meta.is_dir() {
            clear(&path, device);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// A path of the root's as it is here.
fn in_root(path: &str) -> PathBuf {
    Path::new(ROOT).join(path.trim_start_matches('/'))
}

impl System for Linux {
    fn say(&mut self, text: &str) {
        crate::report::say(text);
    }

    fn load_module(&mut self, name: &str) -> Result<Loaded, String> {
        let Some(files) = self.modules.files(name) else {
            return Ok(if self.modules.is_built_in(name) { Loaded::Yes } else { Loaded::Absent });
        };
        for below in files {
            let shown = format!("{MODULES}/{}/{below}", self.release);
            let file = rustix::fs::openat(CWD, &shown, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
            let file = file.map_err(words(&shown))?;
            let flags = if shown.ends_with(".ko") { 0 } else { COMPRESSED };
            match finit_module(&file, c"", flags) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(errno) => return Err(format!("{shown}: {errno}")),
            }
        }
        Ok(Loaded::Yes)
    }

    fn drivers(&mut self, with_usb: bool) -> Vec<String> {
        let devices = devices::modaliases();
        self.modules.answering(&devices, with_usb).into_iter().map(ToOwned::to_owned).collect()
    }

    fn variable(&mut self, name: &str) -> Option<Vec<u8>> {
        let folder = "/sys/firmware/efi/efivars";
        if fs::read_dir(folder).ok()?.next().is_none() {
            // The root goes on with it: whoever installs the other slot writes there which is next.
            let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
            let _ = mount("efivarfs", folder, "efivarfs", flags, NO_OPTIONS);
        }
        fs::read(format!("{folder}/{name}")).ok()
    }

    fn initrd_file(&mut self, path: &str) -> Option<Vec<u8>> {
        fs::read(path).ok()
    }

    fn volumes(&mut self) -> Vec<Volume> {
        let mut volumes = Vec::new();
        for entry in fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
            let device = entry.file_name().to_string_lossy().into_owned();
            if ["loop", "dm-", "ram", "zram"].iter().any(|kind| device.starts_with(kind)) {
                continue;
            }
            let Ok(file) = File::open(format!("/dev/{device}")) else { continue };
            if let Some(label) = fat::label(&|at, bytes| file.read_exact_at(bytes, at)) {
                volumes.push(Volume { device, label });
            }
        }
        volumes.sort_by(|a, b| a.device.cmp(&b.device));
        volumes
    }

    fn mount_volume(&mut self, device: &str) -> Result<(), String> {
        folder(VOLUME)?;
        let source = format!("/dev/{device}");
        let flags = VOLUME_FLAGS | MountFlags::RDONLY;
        mount(source.as_str(), VOLUME, "vfat", flags, VOLUME_OPTIONS).map_err(words("it cannot be mounted"))
    }

    fn write_volume(&mut self) -> Result<(), String> {
        mount_remount(VOLUME, VOLUME_FLAGS, c"").map_err(words("it cannot be written to"))
    }

    fn unmount_volume(&mut self) {
        let _ = unmount(VOLUME, UnmountFlags::empty());
    }

    fn volume_file(&mut self, path: &str) -> Option<Vec<u8>> {
        let path = Path::new(VOLUME).join(path);
        let small = fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() <= SMALL_BYTES);
        small.then(|| fs::read(path).ok())?
    }

    fn open(&mut self, image: &Image, corruption: OnCorruption) -> Result<(), String> {
        let path = format!("{VOLUME}/{}", image.file);
        let (data, data_device, data_file) = self.attach(&path)?;
        let (tree, tree_device, tree_file) = self.attach(&format!("{path}.verity"))?;
        let mut superblock = [0; SUPERBLOCK_BYTES];
        tree_file.read_exact_at(&mut superblock, 0).map_err(|e| e.to_string())?;
        let length = data_file.metadata().map_err(|error| error.to_string())?.len();
        let read = Superblock::read(&superblock).map_err(|error| error.to_string())?;
        let sectors = read.sectors(length).map_err(|error| error.to_string())?;
        let devices = [data, tree].map(|number| format!("/dev/loop{number}"));
        let parameters = |corruption| read.parameters(&devices[0], &devices[1], &image.hash, corruption);
        let name = match image.role {
            Role::Root => "initos",
            Role::Modules => "initos-modules",
            Role::Firmware => "initos-firmware",
        };
        let control = Self::mapper()?;
        let make = |corruption| {
            let minor = sys::make_verity(&control, name, sectors, &parameters(corruption));
            minor.map(|minor| format!("/dev/dm-{minor}")).map_err(words("verity"))
        };
        if corruption == OnCorruption::Restart {
            // Where nothing of it runs yet, another partition may be whole, and there is time for words and logs.
            let looked_at = look_at(&make(OnCorruption::Fail)?, sectors * 512);
            sys::remove(&control, name);
            looked_at.map_err(|error| format!("it is not what its hash tree says: {error}"))?;
        }
        let device = make(corruption)?;
        self.opened.push(Opened {
            role: image.role,
            name: name.to_owned(),
            device,
            _loops: [data_device, tree_device],
        });
        Ok(())
    }

    fn close(&mut self) {
        if let Ok(control) = Self::mapper() {
            for opened in self.opened.drain(..) {
                sys::remove(&control, &opened.name);
            }
        }
    }

    fn mount_image(&mut self, role: Role, release: &str) -> Result<(), String> {
        let opened = self.opened.iter().find(|opened| opened.role == role).ok_or("it was not opened")?;
        let flags = MountFlags::RDONLY | MountFlags::NODEV;
        let at = match role {
            Role::Root => {
                folder(PLACE)?;
                mount("initos", PLACE, "tmpfs", MountFlags::NODEV, Some(c"mode=0755"))
                    .map_err(words("tmpfs"))?;
                format!("{PLACE}/ro")
            }
            Role::Modules => format!("{ROOT}/lib/modules/{release}"),
            Role::Firmware => format!("{ROOT}/lib/firmware"),
        };
        folder(&at)?;
        mount(opened.device.as_str(), at.as_str(), "squashfs", flags, NO_OPTIONS)
            .map_err(words("squashfs"))?;
        if role == Role::Root {
            for path in ["rw", "work", "rootfs"] {
                folder(&format!("{PLACE}/{path}"))?;
            }
            let layers = c"lowerdir=/initos/ro,upperdir=/initos/rw,workdir=/initos/work";
            let rootfs = format!("{PLACE}/rootfs");
            mount("initos", rootfs.as_str(), "overlay", MountFlags::NODEV, Some(layers))
                .map_err(words("overlay"))?;
            folder(ROOT)?;
            mount_bind_recursive(rootfs.as_str(), ROOT).map_err(words("binding the root"))?;
        }
        Ok(())
    }

    fn root_has(&mut self, path: &str) -> bool {
        // A link of the root's leads somewhere else from here; that it is there is enough.
        in_root(path).symlink_metadata().is_ok()
    }

    fn write_root(&mut self, path: &str, bytes: &[u8]) -> Result<(), String> {
        let path = in_root(path);
        let parent = path.parent().unwrap_or(Path::new(ROOT));
        let written = fs::create_dir_all(parent).and_then(|()| fs::write(&path, bytes));
        written.map_err(|error| format!("{}: {error}", path.display()))
    }

    fn copy_local(&mut self, to: &str) -> Result<(), String> {
        let from = Path::new("/local");
        if !from.is_dir() {
            return Ok(());
        }
        copy_tree(from, &in_root(to)).map_err(|error| format!("{to}: {error}"))
    }

    fn copy_programs(&mut self, prefixes: &[&str]) -> Result<(), String> {
        for entry in fs::read_dir("/sbin").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !prefixes.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let to = in_root(&format!("/sbin/{name}"));
            // What is there may be a link, which must not be written through.
            let _ = fs::remove_file(&to);
            fs::copy(entry.path(), &to).map_err(|error| format!("{}: {error}", to.display()))?;
        }
        Ok(())
    }

    fn write_logs(&mut self) {
        let logs = Path::new(VOLUME).join("log");
        // Only where a partition is mounted: else it would be the initrd.
        let mounted =
            fs::read_to_string("/proc/mounts").is_ok_and(|all| all.contains(&format!(" {VOLUME} ")));
        if !mounted || fs::create_dir_all(&logs).is_err() {
            return;
        }
        for (name, from) in [
            ("filesystems", "/proc/filesystems"),
            ("devices", "/proc/partitions"),
            ("lsmod.log", "/proc/modules"),
        ] {
            let _ = fs::read(from).and_then(|bytes| fs::write(logs.join(name), bytes));
        }
        let volumes =
            self.volumes().into_iter().map(|volume| format!("{} {}\n", volume.device, volume.label));
        let _ = fs::write(logs.join("blkid.log"), volumes.collect::<String>());
        let mut buffer = vec![0; 1 << 20];
        if let Ok(length) = read_kernel_log(&mut buffer) {
            let _ = fs::write(logs.join("dmesg.log"), &buffer[..length]);
        }
        rustix::fs::sync();
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn uptime(&mut self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
    }
}

/// Reads what mounting the squashfs on `device` reads, of `length` bytes.
fn look_at(device: &str, length: u64) -> std::io::Result<()> {
    let file = File::open(device)?;
    let mut buffer = vec![0; 1 << 16];
    // A block, which the superblock is in.
    let first = usize::try_from(length.min(4096)).unwrap_or(0);
    file.read_exact_at(&mut buffer[..first], 0)?;
    let mut at = tables_start(&buffer[..first], length);
    while at < length {
        let count = buffer.len().min(usize::try_from(length - at).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..count], at)?;
        at += count as u64;
    }
    Ok(())
}

/// What /dev/kmsg gives until there is no more, a record a read.
fn read_kernel_log(buffer: &mut [u8]) -> Result<usize, rustix::io::Errno> {
    let log =
        rustix::fs::open("/dev/kmsg", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    let mut length = 0;
    while buffer.len() - length > 8192 {
        match rustix::io::read(&log, &mut buffer[length..]) {
            Ok(count @ 1..) => length += count,
            // A record that was overwritten meanwhile.
            Err(rustix::io::Errno::PIPE) => {}
            _ => break,
        }
    }
    Ok(length)
}
