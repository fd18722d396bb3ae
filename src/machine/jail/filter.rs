//! Seccomp: which system calls are left, by process and by thread.
//!
//! Our own device process does what is listed and dies of anything else: a filter for the whole process, and a narrower
//! one that each thread enters when it has been set up. QEMU is a program of many versions and C libraries, so what
//! is not on its list fails with ENOSYS as on an older kernel, which libraries have answers to; its own `-sandbox`
//! comes on top. Filters only ever add up.

use std::collections::BTreeMap;
use std::io;

use kiln_virtio::process::Thread;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use serde::{Deserialize, Serialize};

use super::Profile;

/// A system call's number, and the arguments it is restricted to.
type Allowed = (libc::c_long, Arguments);

/// Which arguments are let through.
#[derive(Debug, Clone, Copy)]
enum Arguments {
    Any,
    /// The 32-bit argument of this index has one of these values.
    OneOf(u8, &'static [u32]),
    /// The 32-bit argument of this index has none of these bits.
    Without(u8, u32),
    /// The 32-bit argument of this index has all of these bits.
    With(u8, u32),
    /// The 32-bit argument of this index is this process's number.
    OwnProcess(u8),
}

use Arguments::{Any, OneOf, OwnProcess, With, Without};

const EXECUTABLE: u32 = libc::PROT_EXEC as u32;
const A_THREAD: u32 = libc::CLONE_THREAD as u32;

/// Whether a socket's calls wait (asm-generic/ioctls.h).
const FIONBIO: u32 = 0x5421;

/// What the kernel told the program at its start (linux/prctl.h); libraries ask late.
const PR_GET_AUXV: u32 = 0x4155_5856;

/// prctl(2) as threads are named and filters installed. Not the signal at a parent's death, which must stay.
const PRCTL: Arguments = OneOf(
    0,
    &[
        libc::PR_SET_NAME as u32,
        libc::PR_SET_NO_NEW_PRIVS as u32,
        libc::PR_SET_SECCOMP as u32,
        libc::PR_GET_NAME as u32,
        libc::PR_SET_TIMERSLACK as u32,
        libc::PR_CAPBSET_READ as u32,
        libc::PR_SET_VMA as u32,
        PR_GET_AUXV,
    ],
);

/// What a thread does that only computes, locks, and reads and writes descriptors that it holds, to its end.
const BARE: &[Allowed] = &[
    (libc::SYS_read, Any),
    (libc::SYS_write, Any),
    (libc::SYS_close, Any),
    (libc::SYS_futex, Any),
    (libc::SYS_mmap, Without(2, EXECUTABLE)),
    (libc::SYS_mprotect, Without(2, EXECUTABLE)),
    (libc::SYS_munmap, Any),
    (libc::SYS_mremap, Any),
    (libc::SYS_madvise, Any),
    (libc::SYS_brk, Any),
    (libc::SYS_clock_gettime, Any),
    (libc::SYS_restart_syscall, Any),
    (libc::SYS_sched_yield, Any),
    // The allocator asks how many processors there are, and for a file of the kernel's, which a filter of the process's says
    // is not there.
    (libc::SYS_sched_getaffinity, Any),
    (libc::SYS_openat, Any),
    // An abort signals its own thread, and a thread that ends gives back the stack that signals had.
    (libc::SYS_getpid, Any),
    (libc::SYS_gettid, Any),
    (libc::SYS_tgkill, OwnProcess(0)),
    (libc::SYS_rt_sigprocmask, Any),
    (libc::SYS_rt_sigreturn, Any),
    (libc::SYS_sigaltstack, Any),
    (libc::SYS_exit, Any),
    (libc::SYS_exit_group, Any),
];

/// What any other thread does beside [`BARE`]: it waits for several things, draws numbers, and has a name and handlers.
const WAITS: &[Allowed] = &[
    (libc::SYS_writev, Any),
    (libc::SYS_fcntl, OneOf(1, &[libc::F_GETFD as u32])),
    (libc::SYS_clock_nanosleep, Any),
    (libc::SYS_getrandom, Any),
    (libc::SYS_prctl, PRCTL),
    (libc::SYS_rt_sigaction, Any),
    (libc::SYS_epoll_wait, Any),
    (libc::SYS_epoll_pwait, Any),
    (libc::SYS_epoll_ctl, Any),
    (libc::SYS_poll, Any),
    (libc::SYS_ppoll, Any),
];

/// To start threads, and for them to enter their own filter.
const THREADS: &[Allowed] = &[
    (libc::SYS_clone, With(0, A_THREAD)),
    (libc::SYS_clone3, Any),
    (libc::SYS_set_robust_list, Any),
    (libc::SYS_rseq, Any),
    (libc::SYS_prlimit64, Any),
    (libc::SYS_seccomp, Any),
    (libc::SYS_epoll_create1, Any),
    (libc::SYS_eventfd2, Any),
];

/// What is done to connected sockets.
const STREAMS: &[Allowed] = &[
    (libc::SYS_recvmsg, Any),
    (libc::SYS_sendmsg, Any),
    (libc::SYS_recvfrom, Any),
    (libc::SYS_sendto, Any),
    (libc::SYS_shutdown, Any),
    (libc::SYS_getsockopt, Any),
    (libc::SYS_setsockopt, Any),
    (libc::SYS_fcntl, Any),
    (libc::SYS_ioctl, OneOf(1, &[FIONBIO])),
];

/// Reading beneath a directory.
const FILES: &[Allowed] = &[
    (libc::SYS_openat2, Any),
    (libc::SYS_getdents64, Any),
    (libc::SYS_fstat, Any),
    (libc::SYS_newfstatat, Any),
    (libc::SYS_statx, Any),
    (libc::SYS_fstatfs, Any),
    (libc::SYS_lseek, Any),
    (libc::SYS_readlinkat, Any),
    (libc::SYS_pread64, Any),
    (libc::SYS_preadv, Any),
    (libc::SYS_preadv2, Any),
    (libc::SYS_readv, Any),
    (libc::SYS_flistxattr, Any),
    (libc::SYS_fgetxattr, Any),
];

/// To be narrowed to the shares that there are.
const LANDLOCK: &[Allowed] = &[
    (libc::SYS_landlock_create_ruleset, Any),
    (libc::SYS_landlock_add_rule, Any),
    (libc::SYS_landlock_restrict_self, Any),
];

/// The door for QEMU: connections come with its messages, guest memory as descriptors.
const DOOR: &[Allowed] = &[(libc::SYS_accept4, Any), (libc::SYS_fstat, Any), (libc::SYS_lseek, Any)];

/// Streams for the guest's connections.
const PAIRS: &[Allowed] = &[(libc::SYS_socketpair, Any), (libc::SYS_readv, Any)];

/// What KVM is asked for a machine that is put together, frozen or goes on (linux/kvm.h), with the types' sizes on x86-64.
const KVM: Allowed = (
    libc::SYS_ioctl,
    OneOf(
        1,
        &[
            // Its version, a machine, what it can do, memory for a processor's exits, its features and registers.
            0xae00,
            0xae01,
            0xae03,
            0xae04,
            0xc008_ae05,
            0xc004_ae02,
            // Of a machine: a processor, memory, interrupt controllers and their state, places that KVM needs, descriptors
            // for interrupts and notifications, an interrupt, the clock.
            0xae41,
            0x4020_ae46,
            0xae47,
            0x4008_ae48,
            0xae60,
            0x4008_ae61,
            0xc208_ae62,
            0x8208_ae63,
            0x4020_ae76,
            0x4040_ae79,
            0x4030_ae7b,
            0x8030_ae7c,
            // Of a processor: to run, and its state, told and taken.
            KVM_RUN,
            0x8090_ae81,
            0x4090_ae82,
            0x8138_ae83,
            0x4138_ae84,
            0xc008_ae88,
            0x4008_ae89,
            0x8400_ae8e,
            0x4400_ae8f,
            0x4008_ae90,
            0x8004_ae98,
            0x4004_ae99,
            0x8040_ae9f,
            0x4040_aea0,
            0x8080_aea1,
            0x4080_aea2,
            0xaea2,
            0xaea3,
            0x9000_aea4,
            0x5000_aea5,
            0x8188_aea6,
            0x4188_aea7,
            // Memory that is mapped for it before it runs.
            0xc040_aed5,
            FIONBIO,
        ],
    ),
);
const KVM_RUN: u32 = 0xae80;

/// Of [`KVM`], what is asked of a machine that is being frozen: to finish an instruction, and its state.
const KVM_TOLD: Allowed = (
    libc::SYS_ioctl,
    OneOf(
        1,
        &[
            KVM_RUN,
            0xc208_ae62,
            0x8030_ae7c,
            0x8090_ae81,
            0x8138_ae83,
            0xc008_ae88,
            0x8400_ae8e,
            0x8004_ae98,
            0x8040_ae9f,
            0x8080_aea1,
            0xaea3,
            0x9000_aea4,
            0x8188_aea6,
            FIONBIO,
        ],
    ),
);

/// What is done to a disk's file.
const DISK: &[Allowed] = &[
    (libc::SYS_preadv, Any),
    (libc::SYS_pread64, Any),
    (libc::SYS_pwrite64, Any),
    (libc::SYS_pwritev, Any),
    (libc::SYS_fadvise64, Any),
    (libc::SYS_fallocate, Any),
    (libc::SYS_fdatasync, Any),
    (libc::SYS_fcntl, Any),
];

/// QEMU: a loader, memory that is executed, files, timers, signals to itself; no processes, no sockets to others.
const QEMU: &[Allowed] = &[
    (libc::SYS_clone, With(0, A_THREAD)),
    (libc::SYS_execve, Any),
    (libc::SYS_mmap, Any),
    (libc::SYS_mprotect, Any),
    (libc::SYS_msync, Any),
    (libc::SYS_mincore, Any),
    (libc::SYS_membarrier, Any),
    (libc::SYS_memfd_create, Any),
    (libc::SYS_arch_prctl, Any),
    (libc::SYS_set_tid_address, Any),
    (libc::SYS_set_robust_list, Any),
    (libc::SYS_rseq, Any),
    (libc::SYS_prctl, PRCTL),
    (libc::SYS_seccomp, Any),
    (libc::SYS_prlimit64, Any),
    (libc::SYS_getrlimit, Any),
    (libc::SYS_getrusage, Any),
    (libc::SYS_sched_getaffinity, Any),
    (libc::SYS_sched_getparam, Any),
    (libc::SYS_sched_getscheduler, Any),
    (libc::SYS_sched_get_priority_max, Any),
    (libc::SYS_sched_get_priority_min, Any),
    (libc::SYS_getcpu, Any),
    (libc::SYS_sysinfo, Any),
    (libc::SYS_uname, Any),
    (libc::SYS_times, Any),
    (libc::SYS_time, Any),
    (libc::SYS_gettimeofday, Any),
    (libc::SYS_clock_getres, Any),
    (libc::SYS_nanosleep, Any),
    (libc::SYS_getuid, Any),
    (libc::SYS_geteuid, Any),
    (libc::SYS_getgid, Any),
    (libc::SYS_getegid, Any),
    (libc::SYS_getppid, Any),
    (libc::SYS_kill, OwnProcess(0)),
    (libc::SYS_getpgrp, Any),
    (libc::SYS_getpgid, Any),
    (libc::SYS_getsid, Any),
    (libc::SYS_getgroups, Any),
    (libc::SYS_capget, Any),
    (libc::SYS_umask, Any),
    (libc::SYS_getcwd, Any),
    (libc::SYS_chdir, Any),
    (libc::SYS_open, Any),
    (libc::SYS_openat, Any),
    (libc::SYS_openat2, Any),
    (libc::SYS_close_range, Any),
    (libc::SYS_access, Any),
    (libc::SYS_faccessat, Any),
    (libc::SYS_faccessat2, Any),
    (libc::SYS_stat, Any),
    (libc::SYS_lstat, Any),
    (libc::SYS_fstat, Any),
    (libc::SYS_newfstatat, Any),
    (libc::SYS_statx, Any),
    (libc::SYS_statfs, Any),
    (libc::SYS_fstatfs, Any),
    (libc::SYS_readlink, Any),
    (libc::SYS_readlinkat, Any),
    (libc::SYS_getdents64, Any),
    (libc::SYS_lseek, Any),
    (libc::SYS_readv, Any),
    (libc::SYS_pread64, Any),
    (libc::SYS_preadv, Any),
    (libc::SYS_preadv2, Any),
    (libc::SYS_pwrite64, Any),
    (libc::SYS_pwritev, Any),
    (libc::SYS_pwritev2, Any),
    (libc::SYS_fallocate, Any),
    (libc::SYS_ftruncate, Any),
    (libc::SYS_fsync, Any),
    (libc::SYS_fdatasync, Any),
    (libc::SYS_sync_file_range, Any),
    (libc::SYS_fadvise64, Any),
    (libc::SYS_copy_file_range, Any),
    (libc::SYS_dup, Any),
    (libc::SYS_dup2, Any),
    (libc::SYS_dup3, Any),
    (libc::SYS_pipe, Any),
    (libc::SYS_pipe2, Any),
    (libc::SYS_fcntl, Any),
    (libc::SYS_eventfd2, Any),
    (libc::SYS_epoll_create1, Any),
    (libc::SYS_epoll_pwait2, Any),
    (libc::SYS_select, Any),
    (libc::SYS_pselect6, Any),
    (libc::SYS_signalfd4, Any),
    (libc::SYS_timerfd_create, Any),
    (libc::SYS_timerfd_settime, Any),
    (libc::SYS_timerfd_gettime, Any),
    (libc::SYS_timer_create, Any),
    (libc::SYS_timer_settime, Any),
    (libc::SYS_timer_gettime, Any),
    (libc::SYS_timer_getoverrun, Any),
    (libc::SYS_timer_delete, Any),
    (libc::SYS_rt_sigpending, Any),
    (libc::SYS_rt_sigtimedwait, Any),
    (libc::SYS_rt_sigsuspend, Any),
    (libc::SYS_recvmsg, Any),
    (libc::SYS_sendmsg, Any),
    (libc::SYS_recvfrom, Any),
    (libc::SYS_sendto, Any),
    (libc::SYS_shutdown, Any),
    (libc::SYS_getsockopt, Any),
    (libc::SYS_setsockopt, Any),
    (libc::SYS_getsockname, Any),
    (libc::SYS_getpeername, Any),
    (libc::SYS_socketpair, Any),
];

/// What QEMU needs beside [`QEMU`] to serve its guest's network with sockets of its own.
const NETWORK: &[Allowed] = &[
    (libc::SYS_socket, Any),
    (libc::SYS_bind, Any),
    (libc::SYS_listen, Any),
    (libc::SYS_accept, Any),
    (libc::SYS_accept4, Any),
    (libc::SYS_connect, Any),
];

/// What an emulated TPM does beside what QEMU does: it keeps its state in files that it replaces.
const TPM: &[Allowed] = &[
    (libc::SYS_rename, Any),
    (libc::SYS_renameat, Any),
    (libc::SYS_renameat2, Any),
    (libc::SYS_unlink, Any),
    (libc::SYS_unlinkat, Any),
    (libc::SYS_flock, Any),
    (libc::SYS_chmod, Any),
    (libc::SYS_fchmod, Any),
    (libc::SYS_mlock, Any),
    (libc::SYS_munlock, Any),
];

/// ioctl(2) without KVM: what streams, terminals and disks are asked.
const QEMU_IOCTL: Allowed = (
    libc::SYS_ioctl,
    OneOf(
        1,
        &[
            // asm-generic/ioctls.h: TCGETS, FIONREAD, FIOCLEX.
            0x5401,
            0x541b,
            0x5451,
            FIONBIO,
            // linux/fs.h: BLKROGET, BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKALIGNOFF, BLKDISCARD, BLKZEROOUT, BLKFLSBUF.
            0x125e,
            0x8008_1272,
            0x1268,
            0x127b,
            0x127a,
            0x1277,
            0x127f,
            0x1261,
        ],
    ),
);

/// Filters the calling process for `profile`, before it has a second thread or starts its program.
///
/// # Errors
/// The kernel has no seccomp filters, or refuses: then nothing must run.
pub(super) fn enter(profile: &Profile) -> io::Result<()> {
    // The C library starts threads with clone where there is no clone3, whose arguments no filter can see.
    refuse(libc::SYS_clone3, libc::ENOSYS)?;
    match profile {
        Profile::Devices => {
            // Files are opened beneath a share, with openat2, and nowhere else.
            refuse(libc::SYS_openat, libc::ENOENT)?;
            let all = [BARE, WAITS, THREADS, STREAMS, FILES, LANDLOCK, DOOR, PAIRS].concat();
            install(&program(&all, SeccompAction::Allow, SeccompAction::KillProcess)?)
        }
        Profile::Vmm => {
            // As a device process, which it is too.
            refuse(libc::SYS_openat, libc::ENOENT)?;
            let all = [BARE, WAITS, THREADS, STREAMS, FILES, LANDLOCK, PAIRS, DISK, &[KVM]].concat();
            install(&program(&all, SeccompAction::Allow, SeccompAction::KillProcess)?)
        }
        Profile::Tpm { .. } => {
            let mut all = [BARE, WAITS, QEMU, TPM].concat();
            all.push(QEMU_IOCTL);
            install(&program(&all, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?)
        }
        Profile::Qemu { kvm, network, .. } => {
            let ioctl = if *kvm { (libc::SYS_ioctl, Any) } else { QEMU_IOCTL };
            let mut all = [BARE, WAITS, QEMU, if *network { NETWORK } else { &[] }].concat();
            all.push(ioctl);
            install(&program(&all, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?)
        }
    }
}

/// Lets `call` fail with `errno`, whatever other filters say of it but death.
fn refuse(call: libc::c_long, errno: libc::c_int) -> io::Result<()> {
    install(&program(&[(call, Any)], SeccompAction::Errno(errno.cast_unsigned()), SeccompAction::Allow)?)
}

/// Filters the calling thread of a device process, in addition to the process's filter.
///
/// # Errors
/// As [`enter`].
pub fn enter_thread(thread: Thread) -> io::Result<()> {
    ThreadKind::from(thread).enter()
}

/// The threads that have a filter of their own: of a VMM, of a device process or of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ThreadKind {
    /// Runs a guest's processor.
    Processor,
    /// Owns the machine.
    Owner,
    /// Serves a disk.
    Disk,
    /// Serves a device that takes the kernel's random numbers or gives memory back.
    Plain,
    /// Serves the shares.
    Files,
    /// Serves a device that is streams.
    Streams,
    /// Does what the parent asks.
    Control,
    /// Takes QEMU's messages.
    Messages,
}

impl From<Thread> for ThreadKind {
    fn from(thread: Thread) -> Self {
        match thread {
            Thread::Control => Self::Control,
            Thread::Messages => Self::Messages,
            Thread::FsQueues => Self::Files,
            Thread::StreamQueues => Self::Streams,
        }
    }
}

impl ThreadKind {
    /// Those of a VMM.
    pub const OF_VMM: [Self; 7] =
        [Self::Processor, Self::Owner, Self::Disk, Self::Plain, Self::Files, Self::Streams, Self::Control];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Processor => "processor",
            Self::Owner => "owner",
            Self::Disk => "disk",
            Self::Plain => "plain",
            Self::Files => "files",
            Self::Streams => "streams",
            Self::Control => "control",
            Self::Messages => "messages",
        }
    }

    fn list(self) -> Vec<Allowed> {
        // The last entry of a call counts.
        match self {
            Self::Processor => [BARE, &[(libc::SYS_ioctl, OneOf(1, &[KVM_RUN]))]].concat(),
            Self::Owner => [BARE, WAITS, STREAMS, PAIRS, DISK, &[KVM_TOLD]].concat(),
            Self::Disk => [BARE, WAITS, DISK].concat(),
            Self::Plain => [BARE, WAITS].concat(),
            Self::Files => [BARE, WAITS, FILES, LANDLOCK].concat(),
            Self::Streams => [BARE, WAITS, STREAMS, PAIRS].concat(),
            Self::Control => [BARE, WAITS, STREAMS, FILES, LANDLOCK].concat(),
            Self::Messages => [BARE, WAITS, THREADS, STREAMS, DOOR].concat(),
        }
    }

    /// Filters the calling thread, in addition to the process's filter.
    pub(super) fn enter(self) -> io::Result<()> {
        install(&program(&self.list(), SeccompAction::Allow, SeccompAction::KillProcess)?)
    }
}

/// Filters the calling thread of a VMM, which is to run a guest's processor: it may do no more than that, ring for the devices
/// and print what the guest's kernel does.
///
/// # Errors
/// As [`enter`].
pub fn enter_processor() -> io::Result<()> {
    ThreadKind::Processor.enter()
}

/// Filters the calling thread of a VMM, which owns the machine: it freezes it or passes on what it left, and opens nothing.
///
/// # Errors
/// As [`enter`].
pub fn enter_owner() -> io::Result<()> {
    ThreadKind::Owner.enter()
}

/// Filters the calling thread of a VMM, which is to serve a disk.
///
/// # Errors
/// As [`enter`].
pub fn enter_disk() -> io::Result<()> {
    ThreadKind::Disk.enter()
}

/// Filters the calling thread of a VMM, which is to serve a device that takes the kernel's random numbers or gives memory back.
///
/// # Errors
/// As [`enter`].
pub fn enter_plain_device() -> io::Result<()> {
    ThreadKind::Plain.enter()
}

/// A filter that answers `listed` to the calls on `list`, and `other` to all else.
fn program(list: &[Allowed], listed: SeccompAction, other: SeccompAction) -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // The last entry of a call counts: QEMU's mmap is wider than anybody's.
    for (call, arguments) in list {
        rules.insert(*call, conditions(*arguments)?);
    }
    let filter = SeccompFilter::new(rules, other, listed, TargetArch::x86_64).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

/// One rule for each value that is let through; none where all are.
fn conditions(arguments: Arguments) -> io::Result<Vec<SeccompRule>> {
    let rule = |index, compare, value: u32| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, compare, value.into());
        condition.and_then(|condition| SeccompRule::new(vec![condition])).map_err(io::Error::other)
    };
    match arguments {
        Any => Ok(Vec::new()),
        OneOf(index, values) => values.iter().map(|value| rule(index, SeccompCmpOp::Eq, *value)).collect(),
        Without(index, bits) => Ok(vec![rule(index, SeccompCmpOp::MaskedEq(bits.into()), 0)?]),
        With(index, bits) => Ok(vec![rule(index, SeccompCmpOp::MaskedEq(bits.into()), bits)?]),
        OwnProcess(index) => {
            let own = rustix::process::getpid().as_raw_pid().cast_unsigned();
            Ok(vec![rule(index, SeccompCmpOp::Eq, own)?])
        }
    }
}

fn install(program: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn calls(list: &[Allowed]) -> BTreeSet<libc::c_long> {
        list.iter().map(|(call, _)| *call).collect()
    }

    fn requests(list: &[Allowed]) -> BTreeSet<u32> {
        let ioctl = list.iter().rev().find(|(call, _)| *call == libc::SYS_ioctl);
        match ioctl {
            Some((_, OneOf(1, requests))) => requests.iter().copied().collect(),
            other => panic!("what may be asked is listed: {other:?}"),
        }
    }

    #[test]
    fn a_thread_may_do_what_its_process_may_and_mostly_less() {
        let process = calls(&[BARE, WAITS, THREADS, STREAMS, FILES, LANDLOCK, PAIRS, DISK, &[KVM]].concat());
        for kind in ThreadKind::OF_VMM {
            let own = calls(&kind.list());
            assert!(own.is_subset(&process) && own.len() + 10 < process.len(), "{}", kind.name());
        }
        let processor = calls(&ThreadKind::Processor.list());
        assert!(processor.is_subset(&calls(&[BARE, WAITS, &[KVM]].concat())));
        for call in [libc::SYS_poll, libc::SYS_prctl, libc::SYS_epoll_ctl, libc::SYS_rt_sigaction] {
            assert!(!processor.contains(&call), "{call}");
        }
        let told = requests(&ThreadKind::Owner.list());
        assert!(told.is_subset(&requests(&[KVM])));
        // KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_IRQFD, KVM_IOEVENTFD.
        for request in [0xae01, 0xae41, 0x4020_ae46, 0x4020_ae76, 0x4040_ae79] {
            assert!(requests(&[KVM]).contains(&request) && !told.contains(&request), "{request:#x}");
        }
    }

    #[test]
    fn the_threat_model_counts_what_is_left() {
        const TEXT: &str = include_str!("../../../SECURITY.md");
        let count = |kind: ThreadKind| calls(&kind.list()).len();
        let of_devices =
            [ThreadKind::Control, ThreadKind::Messages, ThreadKind::Files, ThreadKind::Streams].map(count);
        let (least, most) = (of_devices.iter().min().expect("some"), of_devices.iter().max().expect("some"));
        let of_vmm = format!(
            "{} calls for a processor, {} for the sources of numbers and of memory, {} for a disk, {} for the owner, and {} to {} for the others",
            count(ThreadKind::Processor),
            count(ThreadKind::Plain),
            count(ThreadKind::Disk),
            count(ThreadKind::Owner),
            count(ThreadKind::Streams),
            count(ThreadKind::Control),
        );
        for words in [format!("{least} to {most} calls for each thread"), of_vmm] {
            assert!(TEXT.contains(&words), "no `{words}` in SECURITY.md");
        }
    }
}
