//! The network, on a thread of its own for as long as the machine runs: cards up, an address by DHCP and its renewal, or
//! the one that a file says.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use crate::config::{Interface, Method};
use crate::dhcp::{self, Answer, Ask, Lease};
use crate::netlink::{Change, apply};
use crate::report::say;
use crate::sys;

/// How long a first wired card is waited for.
const CARD_PATIENCE: Duration = Duration::from_secs(30);
/// Between looks at cards.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long answers are waited for; each time twice as long (RFC 2131 §4.1), up to the last.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
const LONGEST_PATIENCE: Duration = Duration::from_secs(32);
const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;
/// `ARPHRD_ETHER` of linux/if_arp.h.
const ETHERNET: &str = "1";

/// Brings up the cards that are named, or the first wired one.
pub fn run(interfaces: &[Interface]) {
    if let Err(why) = up("lo") {
        say(&format!("lo: {why}"));
    }
    let first = if interfaces.is_empty() { first_wired() } else { None };
    let chosen = first.map(|name| Interface { name, method: Method::Dhcp });
    thread::scope(|scope| {
        for interface in interfaces.iter().chain(&chosen) {
            scope.spawn(move || {
                if let Err(why) = keep(interface) {
                    say(&format!("{}: {why}", interface.name));
                }
            });
        }
    });
}

/// Goes on for as long as a lease has to be renewed.
fn keep(interface: &Interface) -> io::Result<()> {
    let card = up(&interface.name)?;
    match &interface.method {
        Method::Static { address, prefix, gateway, name_servers } => {
            set(&interface.name, card, (*address, *prefix), *gateway, name_servers)
        }
        Method::Dhcp => loop {
            let lease = ask_for_address(&interface.name)?;
            let own = (lease.address, lease.prefix);
            set(&interface.name, card, own, lease.gateway, &lease.name_servers)?;
            hold(&interface.name, lease);
            say(&format!("{}: the lease is over", interface.name));
            let (address, prefix) = own;
            apply(Change::NoAddress { card, address, prefix })?;
        },
    }
}

fn set(
    name: &str,
    card: u32,
    (address, prefix): (Ipv4Addr, u8),
    gateway: Option<Ipv4Addr>,
    name_servers: &[Ipv4Addr],
) -> io::Result<()> {
    apply(Change::Address { card, address, prefix })?;
    if let Some(address) = gateway {
        apply(Change::Gateway { card, address })?;
    }
    if !name_servers.is_empty() {
        let lines: String = name_servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        fs::write("/etc/resolv.conf", lines)?;
    }
    say(&format!("{name} has the address {address}/{prefix}"));
    Ok(())
}

fn about(card: &str, what: &str) -> Option<String> {
    fs::read_to_string(format!("/sys/class/net/{card}/{what}")).ok().map(|text| text.trim().to_owned())
}

/// Switches a card on, and gives its number.
fn up(name: &str) -> io::Result<u32> {
    let card = about(name, "ifindex").and_then(|text| text.parse().ok());
    let card = card.ok_or(io::ErrorKind::NotFound)?;
    apply(Change::Up { card })?;
    Ok(card)
}

/// The first wired card with a cable in it; where none has one in time, the first.
fn first_wired() -> Option<String> {
    let give_up = Instant::now() + CARD_PATIENCE;
    loop {
        let mut cards: Vec<String> = fs::read_dir("/sys/class/net")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| is_wired(name))
            .collect();
        cards.sort_unstable();
        for name in &cards {
            // One that is off does not say whether it has a cable.
            let _ = up(name);
        }
        let connected = cards.iter().find(|name| about(name, "carrier").as_deref() == Some("1"));
        let is_late = Instant::now() >= give_up;
        if let Some(name) = connected.or_else(|| cards.first().filter(|_| is_late)) {
            return Some(name.clone());
        }
        if is_late {
            say("no wired network card");
            return None;
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn is_wired(name: &str) -> bool {
    let has = |what| fs::metadata(format!("/sys/class/net/{name}/{what}")).is_ok();
    about(name, "type").as_deref() == Some(ETHERNET) && has("device") && !has("phy80211")
}

fn mac(name: &str) -> io::Result<[u8; 6]> {
    let text = about(name, "address").unwrap_or_default();
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn new_xid() -> u32 {
    let mut bytes = [0; 4];
    // What it is must differ between cards, not be a secret.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    u32::from_ne_bytes(bytes)
}

/// Asks until there is an address.
fn ask_for_address(name: &str) -> io::Result<Lease> {
    let socket = UdpSocket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT_PORT))?;
    socket.set_broadcast(true)?;
    sys::bind_to_card(&socket, name)?;
    let mac = mac(name)?;
    let mut patience = ANSWER_PATIENCE;
    loop {
        let ask = |ask| exchange(&socket, Ipv4Addr::BROADCAST, ask, new_xid(), mac, patience);
        let offer = ask(Ask::Discover)?;
        if let Some(Answer::Offer { address, server }) = offer
            && let Some(Answer::Lease(lease)) = ask(Ask::Take { address, server })?
        {
            return Ok(lease);
        }
        patience = (patience * 2).min(LONGEST_PATIENCE);
    }
}

/// Keeps a lease for as long as somebody renews it.
fn hold(name: &str, mut lease: Lease) {
    loop {
        thread::sleep(lease.renew_after);
        let over = Instant::now() + (lease.lifetime - lease.renew_after);
        let renewed = loop {
            match renew(name, lease.address) {
                Ok(Some(Answer::Lease(new))) if new.address == lease.address => break Some(new),
                Ok(Some(Answer::Refused | Answer::Lease(_))) => break None,
                _ if Instant::now() >= over => break None,
                _ => thread::sleep(LONGEST_PATIENCE),
            }
        };
        match renewed {
            Some(new) => lease = new,
            None => return,
        }
    }
}

fn renew(name: &str, address: Ipv4Addr) -> io::Result<Option<Answer>> {
    // From the address, to whoever hands them out: the server may be another by now.
    let socket = UdpSocket::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT_PORT))?;
    socket.set_broadcast(true)?;
    sys::bind_to_card(&socket, name)?;
    exchange(&socket, Ipv4Addr::BROADCAST, Ask::Renew(address), new_xid(), mac(name)?, ANSWER_PATIENCE)
}

/// Sends `ask`, and waits so long for the answer.
fn exchange(
    socket: &UdpSocket,
    to: Ipv4Addr,
    ask: Ask,
    xid: u32,
    mac: [u8; 6],
    patience: Duration,
) -> io::Result<Option<Answer>> {
    let give_up = Instant::now() + patience;
    // A card that is not ready is asked again like a server that does not answer.
    let _ = socket.send_to(&dhcp::message(ask, xid, mac), SocketAddrV4::new(to, SERVER_PORT));
    let mut buffer = [0; 1500];
    loop {
        let left = give_up.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        if let Ok((length, _)) = socket.recv_from(&mut buffer)
            && let Some(answer) = dhcp::read(buffer.get(..length).unwrap_or_default(), xid, mac)
        {
            return Ok(Some(answer));
        }
    }
}
