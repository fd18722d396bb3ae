//! Messages to the kernel's routing socket (rtnetlink(7)) as bytes, and sending them: cards up, addresses, a gateway.

use std::io;
use std::net::Ipv4Addr;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, sendto, socket};

/// `NLM_F_REQUEST | NLM_F_ACK`.
const ASK: u16 = 1 | 4;
/// `NLM_F_REPLACE | NLM_F_CREATE`, which the kernel refuses of cards that are there.
const PUT: u16 = 0x100 | 0x400;
const HEADER_BYTES: usize = 16;
const INTERNET: u8 = 2;
const LINK_UP: u32 = 1;

/// What the kernel is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Switch a card on.
    Up {
        /// Its number.
        card: u32,
    },
    /// Give it an address.
    Address {
        /// Its number.
        card: u32,
        /// The address.
        address: Ipv4Addr,
        /// How many bits of it are the network's.
        prefix: u8,
    },
    /// Take an address away.
    NoAddress {
        /// The card's number.
        card: u32,
        /// The address.
        address: Ipv4Addr,
        /// How many bits of it are the network's.
        prefix: u8,
    },
    /// Send what is for nobody near by this one.
    Gateway {
        /// The card's number.
        card: u32,
        /// Who.
        address: Ipv4Addr,
    },
}

impl Change {
    /// As a message.
    #[must_use]
    pub fn message(self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind: u16 = match self {
            Self::Up { card } => {
                body.extend([0; 4]);
                body.extend([card, LINK_UP, LINK_UP].map(u32::to_ne_bytes).concat());
                16
            }
            Self::Address { card, address, prefix } | Self::NoAddress { card, address, prefix } => {
                body.extend([INTERNET, prefix, 0, 0]);
                body.extend(card.to_ne_bytes());
                // IFA_ADDRESS, IFA_LOCAL; of networks with room for one, IFA_BROADCAST.
                attribute(1, address.octets(), &mut body);
                attribute(2, address.octets(), &mut body);
                if let Some(host) = u32::MAX.checked_shr(prefix.into()).filter(|host| *host > 1) {
                    attribute(4, (u32::from(address) | host).to_be_bytes(), &mut body);
                }
                if matches!(self, Self::Address { .. }) { 20 } else { 21 }
            }
            Self::Gateway { card, address } => {
                // RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST.
                body.extend([INTERNET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0]);
                // RTA_OIF, RTA_GATEWAY.
                attribute(4, card.to_ne_bytes(), &mut body);
                attribute(5, address.octets(), &mut body);
                24
            }
        };
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or_default();
        let mut message = length.to_ne_bytes().to_vec();
        let flags = match self {
            Self::Address { .. } | Self::Gateway { .. } => ASK | PUT,
            Self::Up { .. } | Self::NoAddress { .. } => ASK,
        };
        message.extend([kind, flags].map(u16::to_ne_bytes).concat());
        message.extend([1_u32, 0].map(u32::to_ne_bytes).concat());
        message.extend(body);
        message
    }
}

fn attribute(kind: u16, value: [u8; 4], body: &mut Vec<u8>) {
    body.extend([8, kind].map(u16::to_ne_bytes).concat());
    body.extend(value);
}

/// Does it.
///
/// # Errors
/// The kernel's.
pub fn apply(change: Change) -> io::Result<()> {
    // The first protocol of this family is NETLINK_ROUTE.
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    sendto(&socket, &change.message(), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 512];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    verdict(answer.get(..length).unwrap_or_default())
}

/// What the kernel's answer says: NLMSG_ERROR, with a number that is zero where all is well.
fn verdict(answer: &[u8]) -> io::Result<()> {
    let is_verdict = answer.get(4..6) == Some(&2_u16.to_ne_bytes()[..]);
    let number = answer.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|bytes| bytes.try_into().ok());
    match number.map(i32::from_ne_bytes) {
        Some(0) if is_verdict => Ok(()),
        Some(negative) if is_verdict => Err(io::Error::from_raw_os_error(negative.saturating_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_long_as_they_say() {
        let address = [192, 168, 7, 9].into();
        for (change, length) in [
            (Change::Up { card: 2 }, 32),
            (Change::Address { card: 2, address, prefix: 24 }, 48),
            (Change::NoAddress { card: 2, address, prefix: 32 }, 40),
            (Change::Gateway { card: 2, address }, 44),
        ] {
            let message = change.message();
            assert_eq!(
                (message.len(), &message[..4]),
                (length, &u32::try_from(length).expect("short").to_ne_bytes()[..]),
                "{change:?}"
            );
        }
        let message = Change::Address { card: 2, address, prefix: 24 }.message();
        assert_eq!(message[44..], [192, 168, 7, 255], "where broadcasts go");
    }

    #[test]
    fn the_kernels_refusal_is_an_error() {
        let answer = |kind: u16, number: i32| {
            let mut bytes = vec![0; HEADER_BYTES];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes.extend(number.to_ne_bytes());
            bytes
        };
        assert!(verdict(&answer(2, 0)).is_ok());
        assert_eq!(verdict(&answer(2, -1)).map_err(|e| e.raw_os_error()), Err(Some(1)));
        assert!(verdict(&answer(3, 0)).is_err());
        assert!(verdict(&[]).is_err());
    }
}
