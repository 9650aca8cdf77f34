//! The networks of this machine, and which of them discovery may use.

use std::collections::BTreeMap;
use std::net::IpAddr;

use if_addrs::{IfAddr, Interface};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A network of this machine, by the name of its interface or an address that this machine has there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Named(String);

impl TryFrom<String> for Named {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let text = text.trim();
        if text.is_empty() || text.len() > 64 || text.contains(char::is_whitespace) {
            return Err("an interface is named by its name or an address of this machine: \"eth0\", \"192.168.1.7\"");
        }
        Ok(Self(text.to_owned()))
    }
}

impl From<Named> for String {
    fn from(named: Named) -> Self {
        named.0
    }
}

/// The interfaces that may be used; those of none named are all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Networks(Vec<String>);

impl Networks {
    /// Those that are named, which must be there.
    pub(super) fn of(named: &[Named]) -> Result<Self, String> {
        Self::among(named, &all())
    }

    fn among(wanted: &[Named], there: &[Interface]) -> Result<Self, String> {
        let mut names = Vec::new();
        for Named(text) in wanted {
            let bare = text.trim_start_matches('[').trim_end_matches(']').split('%').next().unwrap_or_default();
            let ip = bare.parse::<IpAddr>().ok();
            let interface = there.iter().find(|one| one.name == *text || Some(one.ip()) == ip);
            let interface = interface.ok_or_else(|| {
                format!("there is no network interface '{text}' on this machine; there are {}", listed(there))
            })?;
            if !names.contains(&interface.name) {
                names.push(interface.name.clone());
            }
        }
        Ok(Self(names))
    }

    /// Whether an interface is one of them.
    pub(super) fn allow(&self, interface: &Interface) -> bool {
        self.0.is_empty() || self.0.contains(&interface.name)
    }

    /// Those of them that there are now.
    pub(super) fn now(&self) -> Vec<Interface> {
        all().into_iter().filter(|interface| self.allow(interface)).collect()
    }
}

/// The addresses of this machine.
pub(crate) fn addresses() -> Vec<IpAddr> {
    all().iter().map(Interface::ip).collect()
}

fn all() -> Vec<Interface> {
    if_addrs::get_if_addrs().unwrap_or_else(|error| {
        tracing::warn!(%error, "the networks of this machine cannot be listed");
        Vec::new()
    })
}

/// Interfaces with their addresses: `lo (127.0.0.1), eth0 (192.168.1.7, fe80::1)`.
fn listed(interfaces: &[Interface]) -> String {
    let mut by_name: BTreeMap<(u32, &str), Vec<String>> = BTreeMap::new();
    for one in interfaces {
        by_name.entry((one.index.unwrap_or(0), &one.name)).or_default().push(one.ip().to_string());
    }
    let shown: Vec<String> =
        by_name.iter().map(|((_, name), addresses)| format!("{name} ({})", addresses.join(", "))).collect();
    if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
}

/// The network that an interface is in with its address.
pub(super) fn network(interface: &Interface) -> Option<IpNet> {
    let (ip, prefix) = match &interface.addr {
        IfAddr::V4(v4) => (IpAddr::V4(v4.ip), v4.prefixlen),
        IfAddr::V6(v6) => (IpAddr::V6(v6.ip), v6.prefixlen),
    };
    Some(IpNet::new(ip, prefix).ok()?.trunc())
}

/// Whether only this link knows an address, so that it needs the name of the interface.
pub(super) fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// How an address is dialled that was told on an interface, if it is on the network there; nobody may send us elsewhere.
pub(super) fn host_on(interface: &[Interface], index: u32, ip: IpAddr) -> Option<String> {
    let mut on_it = interface.iter().filter(|one| one.index == Some(index));
    if is_link_local(ip) {
        return on_it.next().map(|one| format!("{ip}%{}", one.name));
    }
    on_it.any(|one| network(one).is_some_and(|network| network.contains(&ip))).then(|| ip.to_string())
}

/// Whether nobody beyond the own networks has such an address.
pub(super) fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_private() || v4.is_link_local() || v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local() || v6.is_loopback(),
    }
}

/// Whether an address can be that of one server that others of the cluster reach: not that of many or of nobody, nor one of IPv4
/// that means something else on every link, such as 169.254.169.254, where clouds give their secrets away.
pub(crate) fn is_of_one_server(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    let is_of_a_link = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast() || v4.is_link_local());
    !(ip.is_unspecified() || ip.is_multicast() || is_of_a_link)
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    pub(in super::super) fn interface(name: &str, index: u32, ip: IpAddr, prefixlen: u8) -> Interface {
        let addr = match ip {
            IpAddr::V4(ip) => {
                IfAddr::V4(if_addrs::Ifv4Addr { ip, netmask: Ipv4Addr::UNSPECIFIED, prefixlen, broadcast: None })
            }
            IpAddr::V6(ip) => {
                IfAddr::V6(if_addrs::Ifv6Addr { ip, netmask: Ipv6Addr::UNSPECIFIED, prefixlen, broadcast: None })
            }
        };
        Interface {
            name: name.to_owned(),
            addr,
            index: Some(index),
            oper_status: if_addrs::IfOperStatus::Up,
            is_p2p: false,
            #[cfg(windows)]
            adapter_name: String::new(),
        }
    }

    fn there() -> Vec<Interface> {
        let ip = |text: &str| text.parse().unwrap();
        vec![
            interface("lo", 1, ip("127.0.0.1"), 8),
            interface("eth0", 2, ip("192.168.1.7"), 24),
            interface("eth0", 2, ip("fe80::7"), 64),
            interface("eth1", 3, ip("10.0.0.7"), 16),
        ]
    }

    fn named(texts: &[&str]) -> Vec<Named> {
        texts.iter().map(|text| Named::try_from((*text).to_owned()).unwrap()).collect()
    }

    #[test]
    fn an_interface_is_known_by_its_name_and_by_its_addresses() {
        for (texts, names) in [
            (&["eth1"][..], &["eth1"][..]),
            (&["192.168.1.7", "eth0"], &["eth0"]),
            (&["fe80::7%eth0", "10.0.0.7"], &["eth0", "eth1"]),
        ] {
            assert_eq!(Networks::among(&named(texts), &there()).unwrap().0, names);
        }
        assert!(there().iter().all(|one| Networks::default().allow(one)));
    }

    #[test]
    fn who_names_an_interface_that_is_not_there_learns_what_there_is() {
        for text in ["eth9", "10.9.9.9"] {
            assert_eq!(
                Networks::among(&named(&[text]), &there()).unwrap_err(),
                format!(
                    "there is no network interface '{text}' on this machine; there are lo (127.0.0.1), eth0 (192.168.1.7, \
                     fe80::7), eth1 (10.0.0.7)"
                )
            );
        }
        assert!(Named::try_from(" ".to_owned()).is_err());
    }

    #[test]
    fn nobody_sends_us_beyond_the_network_where_they_are() {
        let (there, ip) = (there(), |text: &str| text.parse().unwrap());
        for (index, address, host) in [
            (2, "192.168.1.9", Some("192.168.1.9")),
            (2, "fe80::9", Some("fe80::9%eth0")),
            (1, "127.0.0.1", Some("127.0.0.1")),
            (2, "127.0.0.1", None),
            (3, "192.168.1.9", None),
            (2, "1.1.1.1", None),
            (9, "fe80::9", None),
        ] {
            assert_eq!(host_on(&there, index, ip(address)).as_deref(), host, "{address}");
        }
    }

    #[test]
    fn private_networks_are_told_from_those_of_all() {
        for (ip, is) in [
            ("10.1.2.3", true),
            ("169.254.1.1", true),
            ("127.0.0.1", true),
            ("fd00::1", true),
            ("fe80::1", true),
            ("8.8.8.8", false),
            ("172.32.0.1", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(is_private(ip.parse().unwrap()), is, "{ip}");
        }
    }
}
