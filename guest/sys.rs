//! The system calls that rustix does not offer safely. Every `unsafe` of the agent is in this file.
//!
//! The agent and all that it forks until they call execve are single-threaded: nothing in this crate starts a thread
//! (unit tests do, and call none of the forking functions). Several arguments below rest on that.
#![expect(unsafe_code, reason = "fork, execve and calls without a safe wrapper")]

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::mem::{size_of, zeroed};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::Pid;

/// The error that libc left in errno.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A libc result whose -1 means errno.
fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result == -1 { Err(last_errno()) } else { Ok(result) }
}

/// The same for raw system calls.
fn check_long(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result == -1 { Err(last_errno()) } else { Ok(result) }
}

/// clone3(2): in the control group of `clone_args.cgroup`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// In which process a fork returned.
pub enum Fork {
    /// The caller's.
    Parent {
        /// The new process.
        child: Pid,
    },
    /// The new one.
    Child,
}

/// The namespaces of a step's world: processes, mounts, and the IPC of System V.
pub const OWN_WORLD: libc::c_int = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC;

/// fork(2), with new namespaces for the child (`libc::CLONE_NEW…`; 0 for none).
///
/// # Errors
/// Those of clone3(2).
pub fn fork(namespaces: libc::c_int) -> Result<Fork, Errno> {
    fork_into(namespaces, None)
}

/// The same, of which the child is in the control group whose folder `group` is.
///
/// # Errors
/// Those of clone3(2); EAGAIN where the group has as many processes as it may.
pub fn fork_into(namespaces: libc::c_int, group: Option<BorrowedFd<'_>>) -> Result<Fork, Errno> {
    let flags = u64::try_from(namespaces).map_err(|_| Errno::INVAL)?;
    // SAFETY: clone_args is a C struct of integers, for which all zeros is a value.
    let mut arguments: libc::clone_args = unsafe { zeroed() };
    arguments.exit_signal = u64::try_from(libc::SIGCHLD).map_err(|_| Errno::INVAL)?;
    arguments.flags = flags;
    if let Some(group) = group {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(group.as_raw_fd()).map_err(|_| Errno::BADF)?;
    }
    // SAFETY: Without CLONE_VM and with a null stack this is fork(2): the child runs on a copy of this memory, stack
    // included, so Rust's rules hold in each process by itself. What glibc's fork() adds (locks taken by other threads,
    // atfork handlers, the list of threads) concerns only programs with threads or handlers; there are none here. The
    // arguments are live and as long as is said.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let child = i32::try_from(check_long(result)?).map_err(|_| Errno::RANGE)?;
    Ok(Pid::from_raw(child).map_or(Fork::Child, |child| Fork::Parent { child }))
}

/// Ends this process at once: nothing of the parent's copied state (buffers, destructors) runs.
pub fn exit(status: u8) -> ! {
    // SAFETY: _exit does not return and touches no memory of this process.
    unsafe { libc::_exit(status.into()) }
}

/// Strings as execve(2) wants them.
pub struct StringArray {
    pointers: Vec<*const libc::c_char>,
    _strings: Vec<CString>,
}

impl StringArray {
    /// An array of these strings.
    pub fn new(strings: Vec<CString>) -> Self {
        // A CString's bytes are on the heap, so they stay where they are when the vector moves.
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Self { pointers, _strings: strings }
    }
}

/// execve(2); returns only to say why not.
pub fn execve(path: &CStr, argv: &StringArray, env: &StringArray) -> Errno {
    // SAFETY: path is NUL-terminated; both arrays end in a null pointer and point to strings that their StringArray
    // owns, which the borrows keep alive during the call.
    unsafe { libc::execve(path.as_ptr(), argv.pointers.as_ptr(), env.pointers.as_ptr()) };
    last_errno()
}

/// What a child was when it ended, and what it and all it waited for used.
pub struct Ended {
    /// The child.
    pub pid: Pid,
    /// Its wait status.
    pub status: libc::c_int,
    /// Its resources.
    pub rusage: libc::rusage,
}

/// wait4(2) for one child, or for any. `None`: `block` is false and no such child has ended.
///
/// # Errors
/// ECHILD: there is no such child.
pub fn wait(pid: Option<Pid>, block: bool) -> Result<Option<Ended>, Errno> {
    let mut status = 0;
    // SAFETY: rusage is a C struct of integers, for which all zeros is a value.
    let mut rusage: libc::rusage = unsafe { zeroed() };
    let which = pid.map_or(-1, |pid| pid.as_raw_nonzero().get());
    let options = if block { 0 } else { libc::WNOHANG };
    // SAFETY: both pointers are to live, writable values of the types that wait4 fills.
    let result = unsafe { libc::wait4(which, &raw mut status, options, &raw mut rusage) };
    Ok(Pid::from_raw(check(result)?).map(|pid| Ended { pid, status, rusage }))
}

/// Puts this process before all ordinary ones: a step that starts thousands of processes must not keep its time-out from
/// being enforced. What it forks is ordinary again.
///
/// # Errors
/// Those of sched_setscheduler(2).
pub fn run_first() -> Result<(), Errno> {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameter is live; 0 is the calling process.
    check(unsafe {
        libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const lowest)
    })
    .map(drop)
}

/// Sends a signal to every process this one may signal, in its pid namespace, save itself and the namespace's init.
///
/// # Errors
/// ESRCH: there is none.
pub fn kill_everyone(signal: u8) -> Result<(), Errno> {
    // SAFETY: kill takes integers only.
    check(unsafe { libc::kill(-1, signal.into()) }).map(drop)
}

/// Sends a signal to the process group of `leader`.
///
/// # Errors
/// ESRCH: there is no such group.
pub fn kill_group(leader: Pid, signal: u8) -> Result<(), Errno> {
    // SAFETY: kill takes integers only.
    check(unsafe { libc::kill(-leader.as_raw_nonzero().get(), signal.into()) }).map(drop)
}

/// Blocks SIGCHLD and gives a descriptor that is readable while one is pending.
///
/// # Errors
/// Those of signalfd(2).
pub fn child_signals() -> Result<OwnedFd, Errno> {
    // SAFETY: an empty sigset_t is all zeros on Linux, and sigemptyset writes one anyway before it is used; the
    // pointers are to that live value; the descriptor is new, so nothing else owns it.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Gives a program about to be executed the signals it expects: none blocked, and SIGPIPE, which Rust's runtime ignores,
/// back to its default. The others are at their defaults in this process.
pub fn reset_signals() {
    // SAFETY: as in child_signals; SIG_DFL is a valid disposition.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Marks every descriptor from 3 on to be closed by execve.
///
/// # Errors
/// Those of close_range(2).
pub fn close_on_exec_above_stdio() -> Result<(), Errno> {
    // SAFETY: this closes nothing now, so no owner of a descriptor is cheated.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    check_long(result).map(drop)
}

/// Closes every descriptor of this process but the given ones, and never returns to code that owns one of them.
pub fn close_all_but(mut keep: [BorrowedFd<'_>; 2], then: impl FnOnce() -> Infallible) -> ! {
    keep.sort_by_key(|fd| fd.as_raw_fd());
    let mut first: libc::c_uint = 0;
    for last in keep.iter().map(|fd| fd.as_raw_fd()).chain([RawFd::MAX]) {
        let Ok(end) = libc::c_uint::try_from(last) else { continue };
        if end > first {
            // SAFETY: owners of these descriptors are in frames below this one, to which control never returns: `then`
            // cannot return, and a panic powers off. Their destructors never run, so nobody closes or uses a
            // descriptor that was closed here.
            unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0 as libc::c_uint) };
        }
        first = end.saturating_add(1);
    }
    match then() {}
}

/// mount_setattr(2) on the mount that `mount` is the root of: adds `attributes` (`MOUNT_ATTR_…`).
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_mount_attributes(mount: impl AsFd, attributes: u64) -> Result<(), Errno> {
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty C string, attr is live and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check_long(result).map(drop)
}

/// swapon(2) with default flags.
///
/// # Errors
/// Those of swapon(2).
pub fn swap_on(device: &CStr) -> Result<(), Errno> {
    // SAFETY: the path is a C string.
    check(unsafe { libc::swapon(device.as_ptr(), 0) }).map(drop)
}

/// swapoff(2).
///
/// # Errors
/// Those of swapoff(2).
pub fn swap_off(device: &CStr) -> Result<(), Errno> {
    // SAFETY: the path is a C string.
    check(unsafe { libc::swapoff(device.as_ptr()) }).map(drop)
}

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Credits `seed` with its full entropy and makes the generator use it at once (random(4)).
///
/// # Errors
/// Those of the ioctls.
pub fn add_entropy(random: &File, seed: &[u8; 64]) -> Result<(), Errno> {
    /// `struct rand_pool_info` of linux/random.h, with its flexible array at our length.
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        buffer: [u8; 64],
    }
    let pool = Pool { entropy_bits: 512, bytes: 64, buffer: *seed };
    // SAFETY: RNDADDENTROPY reads the two integers and then `bytes` bytes, all within pool; RNDRESEEDCRNG takes nothing.
    unsafe {
        check(libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool))?;
        check(libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG)).map(drop)
    }
}

/// Brings the loopback interface up (netdevice(7)); the kernel then gives it its addresses.
///
/// # Errors
/// Those of socket(2) and the ioctls.
pub fn loopback_up() -> Result<(), Errno> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    bring_up(&socket, &mut interface_request("lo"))
}

/// Brings the interface up that `request` names.
fn bring_up(socket: &impl AsRawFd, request: &mut libc::ifreq) -> Result<(), Errno> {
    // SAFETY: both ioctls take a pointer to a live ifreq with a NUL-terminated name; SIOCGIFFLAGS fills the flags, which
    // are the union's member then.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut *request))?;
        request.ifr_ifru.ifru_flags |= libc::c_short::try_from(libc::IFF_UP).map_err(|_| Errno::RANGE)?;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const *request)).map(drop)
    }
}

/// An `ifreq` for the interface `name`.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is a C struct and union of integers, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    let most = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(most).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// An IPv4 address as netdevice(7) and rtentry take it.
fn socket_address(address: Ipv4Addr) -> Result<libc::sockaddr, Errno> {
    // SAFETY: sockaddr is a C struct of integers, for which all zeros is a value.
    let mut generic: libc::sockaddr = unsafe { zeroed() };
    generic.sa_family = libc::sa_family_t::try_from(libc::AF_INET).map_err(|_| Errno::RANGE)?;
    // sockaddr_in: two bytes of port, then the address (ip(7)).
    for (to, from) in generic.sa_data.iter_mut().skip(2).zip(address.octets()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(generic)
}

/// Gives an interface an address and brings it up (netdevice(7)).
///
/// # Errors
/// ENODEV: there is no such interface; else those of socket(2) and the ioctls.
pub fn interface_up(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> Result<(), Errno> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let mut request = interface_request(name);
    // SAFETY: the ioctls take a pointer to a live ifreq with a NUL-terminated name, whose union holds an address.
    unsafe {
        request.ifr_ifru.ifru_addr = socket_address(address)?;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request))?;
        request.ifr_ifru.ifru_addr = socket_address(mask)?;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNETMASK, &raw const request))?;
    }
    bring_up(&socket, &mut request)
}

/// Sends by `gateway` what no other route takes (`struct rtentry` of linux/route.h).
///
/// # Errors
/// Those of socket(2) and SIOCADDRT.
pub fn default_route(gateway: Ipv4Addr) -> Result<(), Errno> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: rtentry is a C struct of integers and pointers, for which all zeros is a value.
    let mut route: libc::rtentry = unsafe { zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED)?;
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED)?;
    route.rt_gateway = socket_address(gateway)?;
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads the live rtentry; its pointer to a device's name is null, which means any.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) }).map(drop)
}

/// A stream to a vsock port of the host (vsock(7)).
///
/// # Errors
/// Those of socket(2) and connect(2).
pub fn connect_vsock(cid: u32, port: u32) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::VSOCK,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: sockaddr_vm is a C struct of integers, for which all zeros is a value.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).map_err(|_| Errno::RANGE)?;
    address.svm_cid = cid;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(|_| Errno::RANGE)?;
    // SAFETY: the address is live and its length is given.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}
