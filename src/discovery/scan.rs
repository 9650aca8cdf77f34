//! Looks at each address of small private networks for agents and Ollamas: off unless the operator turns it on.
//!
//! Only networks whose addresses nobody else has are looked at, none larger than a /22, with few connections at a time and a
//! pause between two rounds that no two proxies share. Whoever answers tells what it is, and is believed no more than others
//! that were found.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use if_addrs::Interface;
use ipnet::IpNet;
use olol_middleware::BoxError;
use olol_middleware::instruments::{self, Probed};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::Config;
use super::badge::{self, Badge};
use super::mdns::Seen;
use super::networks::{self, Networks};
use crate::pool::{AGENT_PORT, OLLAMA_PORT};
use crate::security::tls::Connector;

/// The largest network that is looked at, by the bits of its addresses that differ: a /22 of IPv4.
const LARGEST: u8 = 10;
/// The most networks.
const MOST: usize = 16;
/// Addresses that are looked at at the same time.
const AT_ONCE: usize = 64;
/// How long a connection may take on a local network, and all that is said on it.
const CONNECT: Duration = Duration::from_millis(500);
const ANSWER: Duration = Duration::from_secs(2);
/// The longest answer, bytes.
const LONGEST: usize = 16 << 10;

/// Which networks are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scan {
    /// None.
    #[default]
    Off,
    /// Those of this machine.
    Own,
    /// These.
    Of(Vec<Range>),
}

/// A network that may be looked at: private and small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range(IpNet);

impl std::str::FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let net: IpNet = text
            .parse()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| format!("'{text}' is no network, such as 192.168.1.0/24"))?;
        let net = net.trunc();
        if !networks::is_private(net.network()) || !networks::is_private(net.broadcast()) {
            return Err(format!(
                "'{text}' is not private: only networks whose addresses nobody else has are looked at"
            ));
        }
        if net.max_prefix_len() - net.prefix_len() > LARGEST {
            let smallest = net.max_prefix_len() - LARGEST;
            return Err(format!("'{text}' is too large: at most a /{smallest}, {} addresses", 1_u32 << LARGEST));
        }
        Ok(Self(net))
    }
}

impl Serialize for Scan {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => false.serialize(to),
            Self::Own => true.serialize(to),
            Self::Of(ranges) => to.collect_seq(ranges.iter().map(|range| range.0.to_string())),
        }
    }
}

impl<'de> Deserialize<'de> for Scan {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Scan;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "false, true (the networks of this machine), or a list of networks such as [\"192.168.1.0/24\"]",
                )
            }

            fn visit_bool<E: de::Error>(self, is_on: bool) -> Result<Scan, E> {
                Ok(if is_on { Scan::Own } else { Scan::Off })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Scan, A::Error> {
                let mut ranges: Vec<Range> = Vec::new();
                while let Some(text) = list.next_element::<String>()? {
                    let range = text.parse().map_err(de::Error::custom)?;
                    if !ranges.contains(&range) {
                        ranges.push(range);
                    }
                    if ranges.len() > MOST {
                        return Err(de::Error::custom(format!("at most {MOST} networks are looked at")));
                    }
                }
                Ok(if ranges.is_empty() { Scan::Off } else { Scan::Of(ranges) })
            }
        }

        from.deserialize_any(Reader)
    }
}

impl Scan {
    /// The networks that are meant, on a machine with these interfaces; those that it is on alone.
    fn ranges(&self, interfaces: &[Interface]) -> Vec<IpNet> {
        let mut ranges: Vec<IpNet> = match self {
            Self::Off => Vec::new(),
            Self::Own => {
                interfaces.iter().filter(|one| !one.is_loopback() && one.ip().is_ipv4()).filter_map(own).collect()
            }
            Self::Of(ranges) => {
                let is_ours = |range: &IpNet| {
                    interfaces
                        .iter()
                        .filter_map(networks::network)
                        .any(|net| net.contains(range) || range.contains(&net))
                };
                ranges.iter().map(|range| range.0).filter(is_ours).collect()
            }
        };
        ranges.sort();
        ranges.dedup();
        ranges.truncate(MOST);
        ranges
    }

    /// Those that were named and that this machine is not on.
    pub(super) fn elsewhere(&self, networks: &Networks) -> Vec<String> {
        let Self::Of(ranges) = self else { return Vec::new() };
        let here = self.ranges(&networks.now());
        ranges.iter().filter(|range| !here.contains(&range.0)).map(|range| range.0.to_string()).collect()
    }
}

/// The network of an interface, or the part of it around its address that is small enough.
fn own(interface: &Interface) -> Option<IpNet> {
    let net = networks::network(interface)?;
    let smallest = net.max_prefix_len() - LARGEST;
    let net = IpNet::new(interface.ip(), net.prefix_len().max(smallest)).ok()?.trunc();
    (networks::is_private(net.network()) && networks::is_private(net.broadcast())).then_some(net)
}

/// Looks again and again, until it is dropped.
pub(super) async fn scan(config: Config, networks: Networks, tls: Option<Connector>, tell: mpsc::Sender<Seen>) {
    for range in config.scan.elsewhere(&networks) {
        tracing::warn!(range, "this machine is not on that network, so it is not looked at; see `scan` of [discovery]");
    }
    let pause = config.scan_interval_s.time();
    loop {
        let mut addresses: Vec<IpAddr> =
            config.scan.ranges(&networks.now()).iter().flat_map(|range| range.hosts().take(1 << LARGEST)).collect();
        // Nobody is asked by all proxies at the same moment.
        fastrand::shuffle(&mut addresses);
        let mut looks =
            futures_util::stream::iter(addresses).map(|ip| look(ip, tls.as_ref())).buffer_unordered(AT_ONCE);
        while let Some(found) = looks.next().await {
            for seen in found {
                if tell.send(seen).await.is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
    }
}

/// Who answers at an address.
async fn look(ip: IpAddr, tls: Option<&Connector>) -> Vec<Seen> {
    let (agent, ollama) = tokio::join!(agent(ip, tls), ollama(ip));
    instruments::probed(if agent.is_some() { Probed::Agent } else { Probed::Nobody });
    instruments::probed(if ollama.is_some() { Probed::Ollama } else { Probed::Nobody });
    agent.into_iter().chain(ollama).collect()
}

/// An agent answers even plain HTTP, with what it is; one that wants TLS says so, and the rest over that.
async fn agent(ip: IpAddr, tls: Option<&Connector>) -> Option<Seen> {
    let badge = |(_, headers, _): Said| headers.get(badge::HEADER).map(Badge::of_header);
    let secure = match tls {
        Some(tls) => ask(ip, AGENT_PORT, "/", Some(tls)).await?.ok().and_then(badge),
        None => None,
    };
    let badge = match secure {
        Some(secure) => secure,
        None => badge(ask(ip, AGENT_PORT, "/", None).await?.ok()?)?,
    };
    Some(Seen { is_agent: true, badge, ..at(ip, AGENT_PORT) })
}

async fn ollama(ip: IpAddr) -> Option<Seen> {
    #[derive(Deserialize)]
    struct Version {
        version: String,
    }
    let (status, headers, body) = ask(ip, OLLAMA_PORT, "/api/version", None).await?.ok()?;
    let is_proxy = headers.keys().any(|name| name.as_str().starts_with("x-olol-"));
    let version = serde_json::from_slice::<Version>(&body).ok()?.version;
    (status == StatusCode::OK && !is_proxy && !version.is_empty())
        .then(|| Seen { is_agent: false, ..at(ip, OLLAMA_PORT) })
}

fn at(ip: IpAddr, port: u16) -> Seen {
    let key = std::net::SocketAddr::new(ip, port).to_string();
    Seen { key, hosts: vec![ip.to_string()], port, ..Seen::default() }
}

type Said = (StatusCode, HeaderMap, Bytes);

/// What is answered there to one request. Nothing if nobody takes a connection; an error if it does not speak HTTP.
async fn ask(ip: IpAddr, port: u16, path: &str, tls: Option<&Connector>) -> Option<Result<Said, BoxError>> {
    let stream = tokio::time::timeout(CONNECT, TcpStream::connect((ip, port))).await.ok()?.ok()?;
    let asking = async {
        match tls {
            None => said(stream, path).await,
            Some(tls) => said(tls.connect(&ip.to_string(), stream).await?, path).await,
        }
    };
    Some(tokio::time::timeout(ANSWER, asking).await.unwrap_or_else(|_| Err("no answer".into())))
}

async fn said<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(stream: S, path: &str) -> Result<Said, BoxError> {
    let (mut sender, connection) = http1::Builder::new().max_buf_size(LONGEST).handshake(TokioIo::new(stream)).await?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::get(path).header("host", "localhost").body(Empty::<Bytes>::new())?;
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, LONGEST).collect().await?.to_bytes();
    Ok((head.status, head.headers, body))
}

#[cfg(test)]
mod tests {
    use super::super::networks::tests::interface;
    use super::*;

    #[derive(Deserialize, Serialize)]
    struct Table {
        scan: Scan,
    }

    fn read(text: &str) -> Result<Scan, String> {
        toml::from_str::<Table>(&format!("scan = {text}")).map(|table| table.scan).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn an_answer_without_end_is_none() {
        use tokio::io::AsyncWriteExt;
        for (begins, goes_on) in [
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "4\r\nabcd\r\n"),
            ("HTTP/1.1 200 OK\r\n", "A: b\r\n"),
            ("HTTP/1.1 200 OK\r\nA: ", "a"),
            ("", "HTTP/1.1 103 Early Hints\r\n\r\n"),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let _endless = AbortOnDropHandle::new(tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(begins.as_bytes()).await.unwrap();
                let more = goes_on.repeat(1000);
                while stream.write_all(more.as_bytes()).await.is_ok() {}
            }));
            let answer = ask(address.ip(), address.port(), "/", None).await;
            assert!(matches!(answer, Some(Err(_))), "{begins:?}");
        }
    }

    #[test]
    fn networks_are_read_and_written() {
        for (text, back) in [
            ("false", "false"),
            ("[]", "false"),
            ("true", "true"),
            ("[\"192.168.1.7/24\", \"192.168.1.0/24\", \"10.0.0.1\"]", "[\"192.168.1.0/24\", \"10.0.0.1/32\"]"),
        ] {
            let table = Table { scan: read(text).unwrap() };
            assert_eq!(toml::to_string(&table).unwrap().trim(), format!("scan = {back}"));
        }
    }

    #[test]
    fn what_is_large_or_belongs_to_others_is_not_looked_at() {
        for (text, why) in [
            ("[\"8.8.8.0/24\"]", "not private"),
            ("[\"0.0.0.0/0\"]", "not private"),
            ("[\"10.0.0.0/8\"]", "at most a /22, 1024 addresses"),
            ("[\"fd00::/64\"]", "at most a /118"),
            ("[\"lab\"]", "no network, such as"),
            ("3", "the networks of this machine"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn only_networks_of_this_machine_are_looked_at() {
        let ip = |text: &str| text.parse().unwrap();
        let there = [
            interface("lo", 1, ip("127.0.0.1"), 8),
            interface("eth0", 2, ip("192.168.1.7"), 24),
            interface("eth1", 3, ip("10.1.2.3"), 8),
            interface("ppp0", 4, ip("8.8.8.7"), 24),
        ];
        let shown = |scan: &str| read(scan).unwrap().ranges(&there).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(shown("true"), ["10.1.0.0/22", "192.168.1.0/24"]);
        assert_eq!(
            shown("[\"192.168.1.64/26\", \"192.168.2.0/24\", \"127.0.0.1\"]"),
            ["127.0.0.1/32", "192.168.1.64/26"]
        );
    }
}
