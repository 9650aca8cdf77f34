//! Where a request comes from, when a proxy in front of ours says it: `X-Forwarded-For`, believed of those that are trusted
//! and of nobody else.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

const FORWARDED: HeaderName = HeaderName::from_static("x-forwarded-for");

/// A network, or a single address: `10.0.0.0/8`, `::1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let network =
            text.parse().or_else(|_| text.parse::<IpAddr>().map(|address| IpNet::from(address.to_canonical())));
        let is_what = "is no network: write an address such as 10.0.0.7, or a network such as 10.0.0.0/8 or fd00::/8";
        network.map(Self).map_err(|_| format!("'{text}' {is_what}"))
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.0.to_string()
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The networks of the proxies that are believed.
#[derive(Clone, Debug, Default)]
pub struct Trusted(Box<[Network]>);

impl Trusted {
    /// Believes who is in one of these networks.
    pub fn new(networks: &[Network]) -> Self {
        Self(networks.into())
    }

    /// Where a request comes from, that a peer has brought: the last of the forwarders whom nobody has vouched for. Each
    /// proxy writes behind what it got, so the list is read from its end for as long as its writer is trusted. The port is 0
    /// where it is not said.
    pub(super) fn client(&self, peer: SocketAddr, headers: &HeaderMap) -> SocketAddr {
        if self.0.is_empty() || !self.believes(peer.ip()) {
            return peer;
        }
        let mut client = peer;
        let lists = headers.get_all(FORWARDED).iter().rev();
        for entry in lists.flat_map(|list| list.as_bytes().rsplit(|byte| *byte == b',')) {
            // What is no address was written by somebody who is trusted, or is hidden by him: he is the last who is known.
            let Some(named) = address(entry) else { return client };
            client = named;
            if !self.believes(client.ip()) {
                break;
            }
        }
        client
    }

    fn believes(&self, address: IpAddr) -> bool {
        // A socket for both kinds of addresses shows IPv4 in the form of IPv6.
        let address = address.to_canonical();
        self.0.iter().any(|Network(network)| network.contains(&address))
    }
}

/// An address of the list: bare, in brackets, or with a port.
fn address(entry: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(entry).ok()?.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse::<IpAddr>().map(|address| SocketAddr::new(address, 0));
    let client = ip.or_else(|_| text.parse::<SocketAddr>()).ok()?;
    Some(SocketAddr::new(client.ip().to_canonical(), client.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "10.0.0.7:4000";

    fn trusted(networks: &[&str]) -> Trusted {
        Trusted::new(&networks.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>())
    }

    fn client(trusted: &Trusted, peer: &str, lists: &[&str]) -> String {
        let headers = lists.iter().map(|list| (FORWARDED, list.parse().unwrap())).collect();
        trusted.client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn nobody_is_believed_who_is_not_trusted() {
        for networks in [&[][..], &["192.168.0.0/16"]] {
            assert_eq!(client(&trusted(networks), PEER, &["1.2.3.4"]), PEER);
        }
        assert_eq!(client(&trusted(&["10.0.0.0/8"]), "11.0.0.7:4000", &["10.0.0.8"]), "11.0.0.7:4000");
    }

    #[test]
    fn the_last_one_whom_nobody_vouches_for_is_the_client() {
        let trusted = trusted(&["10.0.0.0/8", "fd00::/8", "::1"]);
        for (lists, wanted) in [
            (&["1.2.3.4"][..], "1.2.3.4:0"),
            (&["1.2.3.4, 10.0.0.9"], "1.2.3.4:0"),
            // What the client itself has written is in front of what its proxy wrote.
            (&["9.9.9.9, 10.0.0.1, 1.2.3.4"], "1.2.3.4:0"),
            (&["9.9.9.9", "10.0.0.1, 1.2.3.4 , 10.0.0.9"], "1.2.3.4:0"),
            (&["1.2.3.4", "10.0.0.9"], "1.2.3.4:0"),
            (&["1.2.3.4:5678"], "1.2.3.4:5678"),
            (&["2001:db8::1"], "[2001:db8::1]:0"),
            (&["[2001:db8::1]"], "[2001:db8::1]:0"),
            (&["[2001:db8::1]:5678,fd00::1"], "[2001:db8::1]:5678"),
            (&["::ffff:1.2.3.4"], "1.2.3.4:0"),
            (&["1.2.3.4, ::ffff:10.0.0.9"], "1.2.3.4:0"),
            // All are trusted: the first of them.
            (&["10.0.0.8, 10.0.0.9"], "10.0.0.8:0"),
            (&[], PEER),
        ] {
            assert_eq!(client(&trusted, PEER, lists), wanted, "{lists:?}");
        }
        assert_eq!(client(&trusted, "[::ffff:10.0.0.7]:1", &["1.2.3.4"]), "1.2.3.4:0");
        assert_eq!(client(&trusted, "[::1]:1", &["1.2.3.4"]), "1.2.3.4:0");
    }

    #[test]
    fn what_is_no_address_is_no_client() {
        let trusted = trusted(&["10.0.0.0/8"]);
        for list in
            ["", " ", "unknown", "_hidden", "1.2.3.4.5", "9.9.9.9, ", "9.9.9.9, unknown", "1.2.3", "host:80", "\u{e9}"]
        {
            assert_eq!(client(&trusted, PEER, &[list]), PEER, "{list:?}");
        }
        assert_eq!(client(&trusted, PEER, &["9.9.9.9, unknown, 10.0.0.9"]), "10.0.0.9:0");
        let long = "9.9.9.9,".repeat(10_000) + "1.2.3.4";
        assert_eq!(client(&trusted, PEER, &[&long]), "1.2.3.4:0");
    }

    #[test]
    fn a_network_is_read_or_refused() {
        for text in ["10.0.0.0/8", "10.0.0.1", "::1", "fd00::/8", " 10.0.0.1 "] {
            assert!(text.parse::<Network>().is_ok(), "{text}");
        }
        for text in ["", "10.0.0.0/33", "localhost", "10.0.0", "10.*"] {
            assert!(text.parse::<Network>().unwrap_err().contains("is no network: write"), "{text}");
        }
    }
}
