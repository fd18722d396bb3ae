//! DHCP for IPv4 as a client speaks it (RFC 2131, RFC 2132): messages as bytes, and what an answer says. Pure.

use std::net::Ipv4Addr;
use std::time::Duration;

/// What BOOTP messages begin with, up to the options.
const FIXED_BYTES: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Servers may drop shorter ones (RFC 1542 §2.1).
const LEAST_BYTES: usize = 300;
/// A lease of less is of no use; it would be asked for without end.
const LEAST_LEASE: Duration = Duration::from_secs(30);

const SUBNET_MASK: u8 = 1;
const ROUTER: u8 = 3;
const NAME_SERVERS: u8 = 6;
const REQUESTED: u8 = 50;
const LEASE_TIME: u8 = 51;
const KIND: u8 = 53;
const SERVER: u8 = 54;
const PARAMETERS: u8 = 55;
const RENEWAL_TIME: u8 = 58;
const END: u8 = 255;

/// What a client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Who has an address for me?
    Discover,
    /// I take the one that this server offered.
    Take {
        /// The address.
        address: Ipv4Addr,
        /// The server.
        server: Ipv4Addr,
    },
    /// I want to keep the one that I have.
    Renew(Ipv4Addr),
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// An address that can be taken.
    Offer {
        /// The address.
        address: Ipv4Addr,
        /// The server.
        server: Ipv4Addr,
    },
    /// It is the client's.
    Lease(Lease),
    /// It is not.
    Refused,
}

/// An address on time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// How many bits of it are the network's.
    pub prefix: u8,
    /// Where the rest of the world is.
    pub gateway: Option<Ipv4Addr>,
    /// Who knows names.
    pub name_servers: Vec<Ipv4Addr>,
    /// When to ask again.
    pub renew_after: Duration,
    /// When it is over.
    pub lifetime: Duration,
}

/// The message `ask` of the card `mac`; `xid` ties the answer to it.
#[must_use]
pub fn message(ask: Ask, xid: u32, mac: [u8; 6]) -> Vec<u8> {
    // BOOTREQUEST, Ethernet, six bytes of address.
    let mut bytes = vec![1, 1, 6, 0];
    bytes.extend(xid.to_be_bytes());
    // Answers are to be broadcast while there is no address to send them to.
    let (own, flags) = match ask {
        Ask::Renew(address) => (address, [0, 0]),
        Ask::Discover | Ask::Take { .. } => (Ipv4Addr::UNSPECIFIED, [0x80, 0]),
    };
    bytes.extend([0, 0]);
    bytes.extend(flags);
    bytes.extend(own.octets());
    bytes.resize(28, 0);
    bytes.extend(mac);
    bytes.resize(FIXED_BYTES, 0);
    bytes.extend(COOKIE);
    let kind = if ask == Ask::Discover { 1 } else { 3 };
    bytes.extend([KIND, 1, kind]);
    if let Ask::Take { address, server } = ask {
        for (option, address) in [(REQUESTED, address), (SERVER, server)] {
            bytes.extend([option, 4]);
            bytes.extend(address.octets());
        }
    }
    bytes.extend([PARAMETERS, 3, SUBNET_MASK, ROUTER, NAME_SERVERS, END]);
    bytes.resize(bytes.len().max(LEAST_BYTES), 0);
    bytes
}

/// What `bytes` answer to the message `xid` of the card `mac`; none where they are not for it.
#[must_use]
pub fn read(bytes: &[u8], xid: u32, mac: [u8; 6]) -> Option<Answer> {
    let is_ours = bytes.first() == Some(&2)
        && bytes.get(4..8)? == xid.to_be_bytes()
        && bytes.get(28..34)? == mac
        && bytes.get(FIXED_BYTES..FIXED_BYTES + 4)? == COOKIE;
    if !is_ours {
        return None;
    }
    let options = bytes.get(FIXED_BYTES + 4..)?;
    let address = first(bytes.get(16..20)?)?;
    match option(options, KIND)? {
        [2] => Some(Answer::Offer { address, server: first(option(options, SERVER)?)? }),
        [5] => Some(Answer::Lease(lease(options, address)?)),
        [6] => Some(Answer::Refused),
        _ => None,
    }
}

fn lease(options: &[u8], address: Ipv4Addr) -> Option<Lease> {
    if address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.is_loopback() {
        return None;
    }
    let mask = option(options, SUBNET_MASK).and_then(first).map_or(24, prefix);
    let seconds = |number| {
        let bytes: [u8; 4] = option(options, number)?.try_into().ok()?;
        Some(Duration::from_secs(u32::from_be_bytes(bytes).into()))
    };
    let lifetime = seconds(LEASE_TIME)?.max(LEAST_LEASE);
    let renew_after = seconds(RENEWAL_TIME).unwrap_or(lifetime / 2).clamp(LEAST_LEASE / 2, lifetime);
    let name_servers = option(options, NAME_SERVERS).unwrap_or_default();
    Some(Lease {
        address,
        prefix: mask,
        gateway: option(options, ROUTER).and_then(first),
        name_servers: name_servers.chunks_exact(4).filter_map(first).collect(),
        renew_after,
        lifetime,
    })
}

/// How many bits a mask has.
#[must_use]
pub fn prefix(mask: Ipv4Addr) -> u8 {
    u8::try_from(u32::from(mask).leading_ones()).unwrap_or(32)
}

fn first(bytes: &[u8]) -> Option<Ipv4Addr> {
    let address: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    Some(address.into())
}

fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [END, ..] | [] | [_] => return None,
            [number, length, rest @ ..] => {
                let length = usize::from(*length);
                if *number == wanted {
                    return rest.get(..length);
                }
                options = rest.get(length..)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn answer(kind: u8, options: &[u8]) -> Vec<u8> {
        let mut bytes = message(Ask::Discover, 7, MAC);
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&[10, 0, 2, 15]);
        bytes.truncate(FIXED_BYTES + 4);
        bytes.extend([KIND, 1, kind]);
        bytes.extend(options);
        bytes.push(END);
        bytes
    }

    #[test]
    fn an_offer_is_taken_and_a_lease_says_all_of_the_network() {
        let offer = answer(2, &[SERVER, 4, 10, 0, 2, 2]);
        let (address, server) = ([10, 0, 2, 15].into(), [10, 0, 2, 2].into());
        assert_eq!(read(&offer, 7, MAC), Some(Answer::Offer { address, server }));
        let take = message(Ask::Take { address, server }, 7, MAC);
        assert_eq!(take.len(), LEAST_BYTES);
        assert_eq!(option(&take[FIXED_BYTES + 4..], REQUESTED), Some(&[10, 0, 2, 15][..]));
        assert_eq!(take[10..12], [0x80, 0], "it asks for a broadcast");
        let lease = answer(
            5,
            &[
                0,
                SUBNET_MASK,
                4,
                255,
                255,
                240,
                0,
                ROUTER,
                4,
                10,
                0,
                2,
                2,
                NAME_SERVERS,
                8,
                10,
                0,
                2,
                3,
                1,
                1,
                1,
                1,
                LEASE_TIME,
                4,
                0,
                1,
                0x51,
                0x80,
            ],
        );
        let Some(Answer::Lease(lease)) = read(&lease, 7, MAC) else { panic!("a lease") };
        assert_eq!((lease.address, lease.prefix, lease.gateway), (address, 20, Some(server)));
        assert_eq!(lease.name_servers, [Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(1, 1, 1, 1)]);
        assert_eq!((lease.lifetime.as_secs(), lease.renew_after.as_secs()), (86_400, 43_200));
        assert_eq!(read(&answer(6, &[]), 7, MAC), Some(Answer::Refused));
    }

    #[test]
    fn what_is_for_others_or_cut_off_or_senseless_is_no_answer() {
        let good = answer(5, &[LEASE_TIME, 4, 0, 0, 0, 0]);
        let Some(Answer::Lease(lease)) = read(&good, 7, MAC) else { panic!("a lease") };
        assert!(lease.renew_after >= LEAST_LEASE / 2, "it is not asked for without end");
        assert_eq!(read(&good, 8, MAC), None);
        assert_eq!(read(&good, 7, [0; 6]), None);
        for length in 0..good.len() - 1 {
            assert_eq!(read(&good[..length], 7, MAC), None, "{length}");
        }
        let mut loopback = good.clone();
        loopback[16..20].copy_from_slice(&[127, 0, 0, 1]);
        assert_eq!(read(&loopback, 7, MAC), None);
        let mut own = good;
        own[0] = 1;
        assert_eq!(read(&own, 7, MAC), None);
    }

    #[test]
    fn one_renews_by_the_address_that_one_has() {
        let renew = message(Ask::Renew([10, 0, 2, 15].into()), 7, MAC);
        assert_eq!((&renew[12..16], &renew[10..12]), (&[10, 0, 2, 15][..], &[0, 0][..]));
        assert_eq!(option(&renew[FIXED_BYTES + 4..], REQUESTED), None);
    }
}
