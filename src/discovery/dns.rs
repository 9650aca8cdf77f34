//! Names of DNS that stand for servers: looked up again when their records expire, so that servers come and go with them.
//!
//! `dns://gpus.lab:50051` is an agent at each address of the name, `dns+http://ollamas.lab:11434` a bare Ollama at each;
//! `srv://_olol._tcp.lab` and `srv+http://…` are those that SRV records name (RFC 2782), with their ports and weights. Where a
//! look-up fails for want of an answer those that were there stay; where the name leads nowhere they leave.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{RData, RecordType};
use hickory_resolver::{Resolver, TokioResolver};
use olol_middleware::cluster::Source;
use olol_middleware::instruments::{self, LookUp};
use olol_middleware::{BoxError, ServerId};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::Config;
use super::networks;
use crate::ollama::{Endpoint, EndpointError};
use crate::pool::{AGENT_PORT, OLLAMA_PORT, Pool, ServerSpec, Way};
use crate::security::Wire;

/// The shortest time between two look-ups of all names.
const SHORTEST: Duration = Duration::from_secs(1);
/// The most servers that one name may stand for.
const MOST: usize = 1024;
/// The longest that all look-ups for one name may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The heaviest server.
const HEAVIEST: u16 = 1000;

/// A name server: its address, with a port if that is not 53.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct NameServer(SocketAddr);

impl TryFrom<String> for NameServer {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let address = text.parse().or_else(|_| IpAddr::from_str(&text).map(|ip| SocketAddr::new(ip, 53)));
        address
            .map(Self)
            .map_err(|_| format!("'{text}' is no address of a name server, such as 10.0.0.2 or 127.0.0.1:8600"))
    }
}

impl From<NameServer> for String {
    fn from(server: NameServer) -> Self {
        server.0.to_string()
    }
}

/// A name that stands for servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameSpec {
    is_agent: bool,
    name: String,
    /// The port; SRV records have their own.
    port: Option<u16>,
    /// The weight of each; those that SRV records tell are times this.
    weight: NonZeroU32,
}

impl NameSpec {
    /// Reads `dns://name[:port][=WEIGHT]`, `srv://name[=WEIGHT]`, or either with `+http`; nothing if it is something else.
    pub fn parse(text: &str) -> Result<Option<Self>, EndpointError> {
        let Some((scheme, rest)) = text.split_once("://") else { return Ok(None) };
        let (is_srv, is_agent) = match scheme {
            "dns" => (false, true),
            "dns+http" => (false, false),
            "srv" => (true, true),
            "srv+http" => (true, false),
            _ => return Ok(None),
        };
        let (rest, weight) = ServerSpec::weight(text, rest)?;
        let rest = rest.trim_end_matches('/');
        let (name, port) = match rest.rsplit_once(':') {
            Some(_) if is_srv => {
                return Err(EndpointError(format!("'{text}' has a port, which SRV records tell themselves")));
            }
            Some((name, port)) => {
                let port = port.parse().ok().filter(|port: &u16| *port > 0);
                (name, Some(port.ok_or_else(|| EndpointError(format!("'{text}' has no port from 1 to 65535")))?))
            }
            None => (rest, None),
        };
        if name.len() > 253 || !name.trim_end_matches('.').split('.').all(is_label) {
            return Err(EndpointError(format!("'{name}' in '{text}' is no name of DNS")));
        }
        let port = (!is_srv).then(|| port.unwrap_or(if is_agent { AGENT_PORT } else { OLLAMA_PORT }));
        Ok(Some(Self { is_agent, name: name.to_owned(), port, weight }))
    }

    /// Whether it leads to agents.
    pub fn is_agent(&self) -> bool {
        self.is_agent
    }

    /// Whether another stands for the same.
    pub(super) fn is_twin(&self, other: &Self) -> bool {
        (self.is_agent, &self.name, self.port) == (other.is_agent, &other.name, other.port)
    }

    fn server(&self, id: &str, address: SocketAddr, weight: NonZeroU32) -> Result<ServerSpec, EndpointError> {
        let way = if self.is_agent {
            Way::Agent(Endpoint::parse(&address.to_string(), AGENT_PORT)?)
        } else {
            Way::Ollama(Endpoint::parse(&format!("http://{address}"), OLLAMA_PORT)?)
        };
        Ok(ServerSpec { id: ServerId::new(id), way, wire: Wire::Usual, weight })
    }
}

impl fmt::Display for NameSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.port.is_some() { "dns" } else { "srv" };
        let http = if self.is_agent { "" } else { "+http" };
        write!(f, "{scheme}{http}://{}", self.name)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// Keeps the servers behind names in a pool, until it is dropped.
#[derive(Debug)]
pub struct Names {
    wanted: watch::Sender<Vec<NameSpec>>,
    /// How many lists of names were looked up.
    settled: watch::Receiver<u64>,
    _task: AbortOnDropHandle<()>,
}

impl Names {
    /// Begins with no names.
    pub fn start(pool: Pool, config: &Config) -> anyhow::Result<Self> {
        let resolver = resolver(config)?;
        let (wanted, names) = watch::channel(Vec::new());
        let (tell, settled) = watch::channel(0);
        let longest = config.dns_max_age_s.time();
        let task = tokio::spawn(keep(pool, resolver, names, tell, longest));
        Ok(Self { wanted, settled, _task: AbortOnDropHandle::new(task) })
    }

    /// From now on it is these.
    pub fn set(&self, names: Vec<NameSpec>) {
        self.wanted.send_if_modified(|now| {
            let is_new = *now != names;
            *now = names;
            is_new
        });
    }

    /// Returns when the names have been looked up for the first time, if there are any.
    pub fn settled(&self) -> impl Future<Output = ()> + Send + 'static {
        let (mut settled, has_any) = (self.settled.clone(), !self.wanted.borrow().is_empty());
        async move {
            if has_any {
                let _ = settled.wait_for(|rounds| *rounds > 0).await;
            }
        }
    }
}

fn resolver(config: &Config) -> anyhow::Result<TokioResolver> {
    let provider = TokioRuntimeProvider::default();
    let mut builder = if config.dns.is_empty() {
        // Where the system names none, as in a bare container, every look-up fails and says so.
        Resolver::builder(provider.clone())
            .unwrap_or_else(|_| Resolver::builder_with_config(ResolverConfig::default(), provider))
    } else {
        let server = |server: &NameServer| {
            let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
            for connection in &mut connections {
                connection.port = server.0.port();
            }
            NameServerConfig::new(server.0.ip(), true, connections)
        };
        let servers = config.dns.iter().map(server).collect();
        Resolver::builder_with_config(ResolverConfig::from_parts(None, Vec::new(), servers), provider)
    };
    let options = builder.options_mut();
    // One server for a machine that has addresses of both kinds.
    options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
    options.timeout = Duration::from_secs(2);
    Ok(builder.build()?)
}

/// What a name led to, and until when that holds.
struct Found {
    servers: Vec<ServerSpec>,
    until: Instant,
}

async fn keep(
    pool: Pool,
    resolver: TokioResolver,
    mut names: watch::Receiver<Vec<NameSpec>>,
    settled: watch::Sender<u64>,
    longest: Duration,
) {
    let mut known: Vec<(NameSpec, Found)> = Vec::new();
    loop {
        let wanted = names.borrow_and_update().clone();
        known.retain(|(name, _)| wanted.contains(name));
        for name in &wanted {
            let at = known.iter().position(|(other, _)| other == name);
            if at.is_some_and(|at| known[at].1.until > Instant::now()) {
                continue;
            }
            let looking = tokio::time::timeout(PATIENCE, look_up(&resolver, name, longest)).await;
            let looked = looking
                .map_or_else(|_| Err("the name servers take too long".into()), |found| found.map_err(BoxError::from));
            let found = match looked {
                Ok(found) => {
                    let is_nowhere = found.servers.is_empty();
                    instruments::looked_up(if is_nowhere { LookUp::Nowhere } else { LookUp::Found });
                    found
                }
                Err(error) => {
                    instruments::looked_up(LookUp::Failed);
                    tracing::warn!(%name, %error, "a name cannot be looked up; who was there stays");
                    let before = at.map(|at| std::mem::take(&mut known[at].1.servers)).unwrap_or_default();
                    Found { servers: before, until: Instant::now() + longest.min(SHORTEST * 5) }
                }
            };
            match at {
                Some(at) => known[at].1 = found,
                None => known.push((name.clone(), found)),
            }
        }
        let mut servers: Vec<ServerSpec> = Vec::new();
        for server in known.iter().flat_map(|(_, found)| &found.servers) {
            if !servers.iter().any(|other| other.id == server.id || other.way == server.way) {
                servers.push(server.clone());
            }
        }
        pool.set(Source::Dns, &servers);
        if !wanted.is_empty() {
            settled.send_modify(|rounds| *rounds += 1);
        }
        let next = known.iter().map(|(_, found)| found.until).min();
        let pause = async {
            match next {
                Some(next) => {
                    // Proxies that began together do not ask together.
                    let jitter = SHORTEST.mul_f64(fastrand::f64() / 4.0);
                    tokio::time::sleep_until(next.max(Instant::now() + SHORTEST) + jitter).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pause => {}
            changed = names.changed() => if changed.is_err() { return },
        }
    }
}

fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

/// Whether an address can be that of one server that others reach by its name: one of a link is another for each of them.
fn is_of_one(spec: &NameSpec, ip: IpAddr) -> bool {
    let is_good = networks::is_of_one_server(ip) && !networks::is_link_local(ip.to_canonical());
    if !is_good {
        tracing::warn!(name = %spec, %ip, "a name leads to an address at which no server can be, which is left out");
    }
    is_good
}

/// Looks a name up. One that does not exist, or has no such records, leads nowhere, which is an answer.
async fn look_up(resolver: &TokioResolver, spec: &NameSpec, longest: Duration) -> Result<Found, NetError> {
    let nowhere = || Found { servers: Vec::new(), until: Instant::now() + longest.min(SHORTEST * 5) };
    let is_nowhere = |error: &NetError| error.is_nx_domain() || error.is_no_records_found();
    let mut servers = Vec::new();
    let mut until = Instant::now() + longest;
    if let Some(port) = spec.port {
        let found = match resolver.lookup_ip(&*spec.name).await {
            Err(error) if is_nowhere(&error) => return Ok(nowhere()),
            other => other?,
        };
        until = until.min(Instant::from_std(found.valid_until()));
        for ip in found.iter().filter(|ip| is_of_one(spec, *ip)) {
            let address = SocketAddr::new(ip, port);
            servers.extend(spec.server(&address.to_string(), address, spec.weight));
        }
    } else {
        let found = match resolver.lookup(&*spec.name, RecordType::SRV).await {
            Err(error) if is_nowhere(&error) => return Ok(nowhere()),
            other => other?,
        };
        until = until.min(Instant::from_std(found.valid_until()));
        let services = found.answers().iter().filter_map(|record| match &record.data {
            RData::SRV(service) => Some(service),
            _ => None,
        });
        // One more than there may be, so that it is seen that there are more.
        for service in services.take(MOST + 1) {
            let target = service.target.to_utf8();
            let ips = match resolver.lookup_ip(&*target).await {
                Err(error) if is_nowhere(&error) => continue,
                other => other?,
            };
            until = until.min(Instant::from_std(ips.valid_until()));
            let Some(ip) = ips.iter().find(|ip| is_of_one(spec, *ip)) else { continue };
            let own = NonZeroU32::new(service.weight.clamp(1, HEAVIEST).into()).unwrap_or(NonZeroU32::MIN);
            let weight = own.saturating_mul(spec.weight).min(NonZeroU32::MIN.saturating_add(u32::from(HEAVIEST) - 1));
            let (target, address) = (target.trim_end_matches('.'), SocketAddr::new(ip, service.port));
            // What is no name of a host is not what a server is called here, in logs and on pages.
            let id = if target.split('.').all(is_label) {
                format!("{target}:{}", service.port)
            } else {
                address.to_string()
            };
            servers.extend(spec.server(&id, address, weight));
        }
    }
    if servers.len() > MOST {
        tracing::warn!(name = %spec, servers = servers.len(), "a name leads to more than {MOST} servers: the first are taken");
    }
    // The order of records changes from answer to answer.
    servers.sort_by(|one, other| one.id.as_str().cmp(other.id.as_str()));
    servers.truncate(MOST);
    Ok(Found { servers, until })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_what_is_wrong_with_them_is_said() {
        for (text, shown) in [
            ("dns://gpus.lab", "dns://gpus.lab:50051"),
            ("dns+http://ollamas.lab:80/", "dns+http://ollamas.lab:80"),
            ("srv://_olol._tcp.lab=3", "srv://_olol._tcp.lab"),
            ("srv+http://_ollama._tcp.lab.", "srv+http://_ollama._tcp.lab."),
        ] {
            assert_eq!(NameSpec::parse(text).unwrap().unwrap().to_string(), shown);
        }
        for text in ["gpu1:50051", "http://gpus.lab", "x@http://gpus.lab=2"] {
            assert_eq!(NameSpec::parse(text), Ok(None), "{text}");
        }
        for (text, why) in [
            ("srv://_olol._tcp.lab:1", "SRV records tell themselves"),
            ("dns://gpus.lab:x", "no port from 1"),
            ("dns://gpus..lab", "no name of DNS"),
            ("dns://gpus.lab=0", "the weight in"),
            ("dns://", "no name of DNS"),
        ] {
            let error = NameSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_name_leads_to_no_address_that_is_not_of_one_server() {
        let spec = NameSpec::parse("dns://gpus.lab").unwrap().unwrap();
        for ip in ["10.0.0.1", "127.0.0.1", "192.0.2.7", "fd00::1", "2001:db8::1"] {
            assert!(is_of_one(&spec, ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "169.254.169.254",
            "0.0.0.0",
            "224.0.0.251",
            "255.255.255.255",
            "fe80::1",
            "::",
            "ff02::fb",
            "::ffff:169.254.169.254",
        ] {
            assert!(!is_of_one(&spec, ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn addresses_of_name_servers_are_read() {
        let read = |text: &str| NameServer::try_from(text.to_owned()).map(String::from);
        assert_eq!(read("10.0.0.2").unwrap(), "10.0.0.2:53");
        assert_eq!(read("[::1]:8600").unwrap(), "[::1]:8600");
        assert!(read("ns.lab").unwrap_err().contains("no address of a name server"));
    }
}
