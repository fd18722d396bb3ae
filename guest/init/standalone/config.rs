//! What a machine is told by the files in its signed initrd's /local: cards (interfaces(5), as much of it as is read here),
//! its name, and variables. Pure.

use std::net::Ipv4Addr;

use crate::dhcp;

/// How a card gets its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// It asks.
    Dhcp,
    /// It is told.
    Static {
        /// The address.
        address: Ipv4Addr,
        /// How many bits of it are the network's.
        prefix: u8,
        /// Where the rest of the world is.
        gateway: Option<Ipv4Addr>,
        /// Who knows names.
        name_servers: Vec<Ipv4Addr>,
    },
}

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// How it gets its address.
    pub method: Method,
}

/// The cards that a file `interfaces` names, and what of it is not understood.
#[must_use]
pub fn interfaces(text: &str) -> (Vec<Interface>, Vec<String>) {
    let (mut found, mut unknown) = (Vec::new(), Vec::new());
    let mut open: Option<Open> = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            ["auto" | "allow-hotplug" | "allow-auto", ..] => close(&mut open, &mut found, &mut unknown),
            ["iface", name, "inet", method] => {
                close(&mut open, &mut found, &mut unknown);
                match method {
                    "dhcp" => found.push(Interface { name: name.to_owned(), method: Method::Dhcp }),
                    "static" => open = Some(Open { name: name.to_owned(), ..Open::default() }),
                    "loopback" => {}
                    _ => unknown.push(line.to_owned()),
                }
            }
            _ if open.as_mut().is_some_and(|open| open.takes(&words)) => {}
            _ => unknown.push(line.to_owned()),
        }
    }
    close(&mut open, &mut found, &mut unknown);
    (found, unknown)
}

/// A card whose lines are being read.
#[derive(Default)]
struct Open {
    name: String,
    address: Option<Ipv4Addr>,
    prefix: Option<u8>,
    gateway: Option<Ipv4Addr>,
    name_servers: Vec<Ipv4Addr>,
}

impl Open {
    fn takes(&mut self, words: &[&str]) -> bool {
        match words {
            ["address", text] => {
                let (address, prefix) = text.split_once('/').map_or((*text, None), |(a, p)| (a, Some(p)));
                self.address = address.parse().ok();
                let prefix = prefix.map(|prefix| prefix.parse().ok().filter(|bits| *bits <= 32));
                self.prefix = prefix.unwrap_or(self.prefix);
                self.address.is_some() && prefix != Some(None)
            }
            ["netmask", text] => {
                self.prefix = text.parse().ok().map(dhcp::prefix);
                self.prefix.is_some()
            }
            ["gateway", text] => {
                self.gateway = text.parse().ok();
                self.gateway.is_some()
            }
            ["dns-nameservers" | "dns-nameserver", rest @ ..] => {
                self.name_servers.extend(rest.iter().filter_map(|text| text.parse::<Ipv4Addr>().ok()));
                true
            }
            _ => false,
        }
    }
}

fn close(open: &mut Option<Open>, found: &mut Vec<Interface>, unknown: &mut Vec<String>) {
    let Some(open) = open.take() else { return };
    match open.address {
        Some(address) => found.push(Interface {
            name: open.name,
            method: Method::Static {
                address,
                prefix: open.prefix.unwrap_or(24),
                gateway: open.gateway,
                name_servers: open.name_servers,
            },
        }),
        None => unknown.push(format!("iface {} inet static, without an address", open.name)),
    }
}

/// The first line of a file `hostname` that can be a host's name (hostname(7)).
#[must_use]
pub fn host_name(text: &str) -> Option<&str> {
    let name = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '.';
    (name.len() <= 64 && name.chars().all(is_letter) && !name.starts_with(['-', '.'])).then_some(name)
}

/// The variables of a file `initos.env`: lines `NAME=VALUE`, with or without `export`, the value perhaps in quotes. It is
/// not a script: nothing in it is expanded or run.
#[must_use]
pub fn variables(text: &str) -> Vec<(String, String)> {
    let line = |line: &str| {
        let line = line.trim();
        let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
        let is_name = !name.is_empty()
            && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
            && !name.starts_with(|letter: char| letter.is_ascii_digit());
        let quoted = |quote| value.strip_prefix(quote).and_then(|value: &str| value.strip_suffix(quote));
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
        // What a loader takes from its environment is not for others to say.
        (is_name && !name.starts_with("LD_") && !value.contains('\0'))
            .then(|| (name.to_owned(), value.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_read_and_what_is_not_understood_is_told() {
        let (found, unknown) = interfaces(
            "auto lo\niface lo inet loopback\n# wired\nauto eth0\niface eth0 inet static\n    address 10.1.2.3/20\n    \
             gateway 10.1.0.1\n    dns-nameservers 10.1.0.2 1.1.1.1\niface eth1 inet dhcp\niface eth2 inet6 auto\n\
             iface eth3 inet static\n    netmask 255.255.0.0\n    address 10.3.0.9\n    pre-up rm -rf /\n",
        );
        let fixed = |address: [u8; 4], prefix, gateway: Option<[u8; 4]>, names: &[[u8; 4]]| Method::Static {
            address: address.into(),
            prefix,
            gateway: gateway.map(Into::into),
            name_servers: names.iter().map(|name| (*name).into()).collect(),
        };
        let card = |name: &str, method| Interface { name: name.to_owned(), method };
        let names = [[10, 1, 0, 2], [1, 1, 1, 1]];
        assert_eq!(
            found,
            [
                card("eth0", fixed([10, 1, 2, 3], 20, Some([10, 1, 0, 1]), &names)),
                card("eth1", Method::Dhcp),
                card("eth3", fixed([10, 3, 0, 9], 16, None, &[])),
            ]
        );
        assert_eq!(unknown, ["iface eth2 inet6 auto", "pre-up rm -rf /"]);
        let (found, unknown) = interfaces("iface eth0 inet static\n address 10.0.0.1/33\n");
        assert_eq!((found.len(), unknown), (1, vec!["address 10.0.0.1/33".to_owned()]));
        assert_eq!(interfaces("iface eth0 inet static\n").1.len(), 1);
    }

    #[test]
    fn only_names_are_names() {
        assert_eq!(host_name("# mine\n kitchen.home \n"), Some("kitchen.home"));
        for text in ["", "a b", "-x", ".x", "a/b", &"a".repeat(65)] {
            assert_eq!(host_name(text), None, "{text}");
        }
    }

    #[test]
    fn variables_are_read_and_never_run() {
        let read = variables("A=1\nexport B=\"x $(rm)\"\n#C=2\n2D=3\nLD_PRELOAD=/x\nE='y'\nnone\n");
        let pairs: Vec<(&str, &str)> = read.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        assert_eq!(pairs, [("A", "1"), ("B", "x $(rm)"), ("E", "y")]);
    }
}
