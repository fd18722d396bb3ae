//! The system calls of the jail that no library here wraps safely.

#![expect(
    unsafe_code,
    reason = "descriptors closed by number, unshare, clone, mount_setattr, ptrace, fork, ioctl and mmap have no safe wrapper"
)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::UnshareFlags;

/// Closes all descriptors but standard input, output and error. What a careless parent of kiln's left open, kiln's
/// own children would inherit otherwise.
///
/// # Errors
/// What close_range(2) says.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: called at the start of a child, before anything in it has opened a descriptor: none above 2 is owned
    // by a value of this program.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves the namespaces of `flags`, which must not say FILES.
///
/// # Errors
/// What unshare(2) says.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    if flags.contains(UnshareFlags::FILES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor table stays shared among threads, which is the one thing that must not change.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// Goes on in a copy of this process, which is the first of a namespace of process numbers and a child of this one's parent, and dies
/// with that. This one gives `tell` the number that its parent knows the other by, and ends before that goes on. Where the parent
/// was not told, it does not.
///
/// # Errors
/// What clone(2) says.
pub(super) fn go_on_as_first(tell: impl FnOnce(i32) -> io::Result<()>) -> io::Result<()> {
    let (until_told, telling) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let flags = libc::CLONE_NEWPID | libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with a null stack this is fork(2): the child runs on a copy of this memory. What glibc's fork() adds
    // concerns programs with other threads or handlers, and there are none here. glibc takes the number of the first thread for what it
    // was before, which may be another thread's in the new namespace: it goes by it for the owner of recursive locks, of which there is
    // the loader's alone here, and for signals to the first thread, which nothing sends.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        drop(telling);
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        if !matches!(rustix::io::retry_on_intr(|| rustix::io::read(&until_told, &mut [0])), Ok(1)) {
            // SAFETY: _exit does not return and runs nothing of this program's.
            unsafe { libc::_exit(1) }
        }
        return Ok(());
    }
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let told = i32::try_from(child).map_err(io::Error::other).and_then(tell);
    let told = told.and_then(|()| Ok(rustix::io::write(&telling, &[1])?));
    // SAFETY: _exit does not return and runs nothing of this program's.
    unsafe { libc::_exit(i32::from(told.is_err())) }
}

/// mount_setattr(2), as Linux 5.12 has it.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Lets nothing be written, and no set-user-ID program or device node act, in the detached mount `tree` and all
/// beneath it. `devices` lets device nodes act.
///
/// # Errors
/// What mount_setattr(2) says.
pub(super) fn seal_mount(tree: impl AsFd, devices: bool) -> io::Result<()> {
    const EMPTY: &CStr = c"";
    let mut set = libc::MOUNT_ATTR_NOSUID;
    set |= if devices { 0 } else { libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV };
    let attributes = MountAttributes { set, clear: 0, propagation: 0, user_namespace: 0 };
    // SAFETY: the path is a constant that ends in a zero byte, and the structure is as long as is said; the kernel
    // reads both and keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Becomes the tracer of the process `number`, which runs on, until this one ends.
///
/// # Errors
/// What ptrace(2) says.
pub(super) fn trace(number: i32) -> io::Result<()> {
    // SAFETY: no memory is handed over; a process that is seized and not stopped does what it did.
    let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, number, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a process, which ends at once.
///
/// # Errors
/// What fork(2) says.
pub(super) fn fork() -> io::Result<()> {
    // SAFETY: the child does nothing but end, by a call that runs nothing of this program's.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let child = rustix::process::Pid::from_raw(child);
    rustix::process::waitpid(child, rustix::process::WaitOptions::empty())?;
    Ok(())
}

/// Asks standard input `request`, an ioctl of KVM's that takes nothing from this program's memory. That it is not KVM's is an
/// answer of the kernel's, to which the request has come then.
///
/// # Errors
/// Another answer.
pub(super) fn ask_kvm(request: u32) -> io::Result<()> {
    // SAFETY: standard input is a socket, which knows no such request; nothing is read or written at the address of zero.
    let result = unsafe { libc::ioctl(0, request.into(), 0) };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        error if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(()),
        error => Err(error),
    }
}

/// Maps a page that may be executed, and unmaps it.
///
/// # Errors
/// What mmap(2) says.
pub(super) fn map_executable() -> io::Result<()> {
    const PAGE_BYTES: usize = 4096;
    let flags = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: the kernel chooses an address that nothing uses, and nothing is done with it but unmapping.
    unsafe {
        let page = rustix::mm::mmap_anonymous(std::ptr::null_mut(), PAGE_BYTES, flags, MapFlags::PRIVATE)?;
        rustix::mm::munmap(page, PAGE_BYTES)?;
    }
    Ok(())
}
