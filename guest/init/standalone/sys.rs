//! What the standard library and rustix do not offer safely. Every `unsafe` of this program is here.
#![expect(unsafe_code, reason = "a socket option, a session for a child, and a signal to all")]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Binds a socket to a card, also where that has no address yet.
///
/// # Errors
/// There is no such card.
pub fn bind_to_card(socket: &UdpSocket, card: &str) -> io::Result<()> {
    let length = libc::socklen_t::try_from(card.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: reads `length` bytes at the pointer, which are those of the text, and keeps none.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            card.as_ptr().cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes what is started the leader of a session, whose terminal is its standard input where it `has_terminal`.
pub fn in_own_session(command: &mut Command, has_terminal: bool) {
    let enter = move || {
        rustix::process::setsid()?;
        if has_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: runs between fork and exec of a process with threads, where only what is safe in a signal handler may be
    // called: these are two system calls, and nothing is allocated.
    unsafe { command.pre_exec(enter) };
}

/// Sends a signal to every process but this one, init (kill(2)).
pub fn signal_all(signal: libc::c_int) {
    // SAFETY: takes two numbers and touches no memory.
    unsafe { libc::kill(-1, signal) };
}
