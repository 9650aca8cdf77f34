//! Agents tell on the local network that they are there, and proxies hear it: mDNS with DNS-SD (RFC 6762 and 6763), service
//! `_olol._tcp`.
//!
//! An agent announces the addresses where it listens and no others, each on the network that it belongs to. It takes its word
//! back when it stops; where it cannot, its records expire. A proxy takes an address only from the network that it is on.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use if_addrs::Interface;
use mdns_sd::{
    IfKind, IfPredicate, Receiver, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo, TxtProperty,
    UnregisterStatus,
};
use tokio_util::task::AbortOnDropHandle;

use super::badge::{self, Badge, Tells};
use super::networks::{self, Networks};

/// The service that agents announce.
const SERVICE: &str = "_olol._tcp.local.";
/// The port of mDNS.
pub const PORT: u16 = 5353;
/// An agent says that it is there twice, a second apart; where packets are lost, both may be. If no proxy has come so long after
/// that, it says it once more.
const UNHEARD: [Duration; 2] = [Duration::from_millis(2500), Duration::from_secs(5)];
/// How often it is looked whether an agent has something else to say of itself.
const RENEW: Duration = Duration::from_secs(30);
/// How long we wait until a last word is said.
const GOODBYE: Duration = Duration::from_millis(500);
/// The longest until a server that is silent must have answered, or its records count no more.
const CONFIRM: Duration = Duration::from_secs(3);

/// An agent's word on the network, which is taken back when this is dropped.
pub struct Announcement {
    daemon: ServiceDaemon,
    name: String,
    _keeping: AbortOnDropHandle<()>,
}

impl Announcement {
    /// Says that an agent is there, from now on.
    pub(super) fn start(tells: Tells, listens: SocketAddr, networks: &Networks, port: u16) -> anyhow::Result<Self> {
        let networks = networks.clone();
        let daemon = daemon(port, move |interface| networks.allow(interface) && reaches(interface, listens.ip()))?;
        let badge = tells.now();
        let service = service(&badge, listens)?;
        let name = service.get_fullname().to_owned();
        daemon.register(service)?;
        let keeping = AbortOnDropHandle::new(tokio::spawn(keep(daemon.clone(), tells, badge, listens)));
        Ok(Self { daemon, name, _keeping: keeping })
    }

    /// Takes it back, so that nobody waits for what has gone.
    pub async fn end(self) {
        let Ok(said) = self.daemon.unregister(&self.name) else { return };
        let said = tokio::time::timeout(GOODBYE, said.recv_async()).await;
        if !matches!(said, Ok(Ok(UnregisterStatus::OK))) {
            tracing::debug!("the network was not told that this agent stops");
        }
        if let Ok(ended) = self.daemon.shutdown() {
            let _ = tokio::time::timeout(GOODBYE, ended.recv_async()).await;
        }
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        let _ = self.daemon.shutdown();
    }
}

impl std::fmt::Debug for Announcement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Announcement").field("name", &self.name).finish_non_exhaustive()
    }
}

fn service(badge: &Badge, listens: SocketAddr) -> mdns_sd::Result<ServiceInfo> {
    // A name of its own: the machine's belongs to its own responder.
    let host = format!("olol-{}.local.", badge.instance);
    let label: String = badge::word(&badge.name).chars().take(40).collect();
    let name = format!("{label} {}", badge.instance.get(..8).unwrap_or(&badge.instance));
    let pairs = badge.pairs();
    let mut service = ServiceInfo::new(SERVICE, &name, &host, "", listens.port(), &pairs[..])?.enable_addr_auto();
    // Nobody else has such a name.
    service.set_requires_probe(false);
    service.set_interfaces(vec![only(move |interface| reaches(interface, listens.ip()))]);
    Ok(service)
}

/// Says it anew when nobody seems to have heard it, and when it has changed.
async fn keep(daemon: ServiceDaemon, tells: Tells, mut said: Badge, listens: SocketAddr) {
    for pause in UNHEARD {
        tokio::time::sleep(pause).await;
        if tells.is_unheard()
            && let Ok(service) = service(&said, listens)
        {
            let _ = daemon.register(service);
        }
    }
    loop {
        tokio::time::sleep(RENEW).await;
        let now = tells.now();
        if now != said && service(&now, listens).and_then(|service| daemon.register(service)).is_ok() {
            said = now;
        }
    }
}

/// What was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// An agent is there, or says something else than before.
    Here(Seen),
    /// The one of this name has gone, or is not heard any more.
    Gone(String),
}

/// A server as it tells of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// What tells it from others of its source: its name on the network, or its address.
    pub(super) key: String,
    /// Whether it is an agent, and not an Ollama.
    pub(super) is_agent: bool,
    pub(super) badge: Badge,
    /// The hosts by which it is reached, the best first; those on our networks alone.
    pub(super) hosts: Vec<String>,
    pub(super) port: u16,
}

impl Default for Seen {
    fn default() -> Self {
        Self { key: String::new(), is_agent: true, badge: Badge::default(), hosts: Vec::new(), port: 0 }
    }
}

/// Listens for agents.
pub(super) struct Ear {
    daemon: ServiceDaemon,
    events: Receiver<ServiceEvent>,
    networks: Networks,
}

impl Ear {
    /// Listens from now on.
    pub(super) fn open(networks: &Networks, port: u16) -> anyhow::Result<Self> {
        let allowed = networks.clone();
        let daemon = daemon(port, move |interface| allowed.allow(interface))?;
        let events = daemon.browse(SERVICE)?;
        Ok(Self { daemon, events, networks: networks.clone() })
    }

    /// The next that is heard; nothing when there is nothing to hear any more.
    pub(super) async fn hear(&self) -> Option<Heard> {
        loop {
            match self.events.recv_async().await.ok()? {
                ServiceEvent::ServiceResolved(service) => {
                    return Some(Heard::Here(seen(&service, &self.networks.now())));
                }
                ServiceEvent::ServiceRemoved(_, name) => return Some(Heard::Gone(name)),
                ServiceEvent::SearchStopped(_) => return None,
                _ => {}
            }
        }
    }

    /// Asks the network once more; all that answers is heard again.
    pub(super) fn ask_anew(&mut self) -> anyhow::Result<()> {
        self.events = self.daemon.browse(SERVICE)?;
        Ok(())
    }

    /// Asks whether the one of this name is there still; it has gone unless it says so.
    pub(super) fn confirm(&self, name: &str) {
        let _ = self.daemon.verify(name.to_owned(), CONFIRM);
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = self.daemon.shutdown();
    }
}

fn seen(service: &ResolvedService, interfaces: &[Interface]) -> Seen {
    let pairs = service.txt_properties.iter().map(|pair: &TxtProperty| (pair.key(), pair.val_str()));
    let mut hosts: Vec<(u8, String)> = Vec::new();
    for address in &service.addresses {
        let ip = address.to_ip_addr();
        let told_on: Vec<u32> = match address {
            ScopedIp::V4(v4) => v4.interface_ids().iter().map(|id| id.index).collect(),
            ScopedIp::V6(v6) => vec![v6.scope_id().index],
            _ => Vec::new(),
        };
        let host = told_on.iter().find_map(|index| networks::host_on(interfaces, *index, ip));
        hosts.extend(host.map(|host| (rank(ip), host)));
    }
    hosts.sort();
    hosts.dedup();
    let hosts = hosts.into_iter().map(|(_, host)| host).collect();
    Seen { key: service.fullname.clone(), is_agent: true, badge: Badge::of(pairs), hosts, port: service.port }
}

/// The nearest first, and those that need no interface before those that do.
fn rank(ip: IpAddr) -> u8 {
    match ip {
        ip if ip.is_loopback() => 0,
        IpAddr::V4(_) => 1,
        ip if !networks::is_link_local(ip) => 2,
        IpAddr::V6(_) => 3,
    }
}

/// Whether who listens at an address is reached at that of an interface.
fn reaches(interface: &Interface, listens: IpAddr) -> bool {
    match listens {
        IpAddr::V4(v4) if v4.is_unspecified() => interface.ip().is_ipv4(),
        IpAddr::V6(v6) if v6.is_unspecified() => true,
        one => interface.ip() == one,
    }
}

/// Speaks and hears on some interfaces alone.
fn daemon(port: u16, on: impl Fn(&Interface) -> bool + Send + Sync + 'static) -> anyhow::Result<ServiceDaemon> {
    let daemon = ServiceDaemon::new_with_port(port)?;
    daemon.disable_interface(IfKind::All)?;
    daemon.enable_interface(only(on))?;
    Ok(daemon)
}

fn only(on: impl Fn(&Interface) -> bool + Send + Sync + 'static) -> IfKind {
    IfKind::Predicate(IfPredicate::new(on))
}

#[cfg(test)]
mod tests {
    use super::super::networks::tests::interface;
    use super::*;

    #[test]
    fn an_agent_tells_of_the_addresses_where_it_listens() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let there = [
            interface("lo", 1, ip("127.0.0.1"), 8),
            interface("eth0", 2, ip("192.168.1.7"), 24),
            interface("eth0", 2, ip("fe80::7"), 64),
        ];
        for (listens, told) in [
            ("127.0.0.1", &["127.0.0.1"][..]),
            ("192.168.1.7", &["192.168.1.7"]),
            ("0.0.0.0", &["127.0.0.1", "192.168.1.7"]),
            ("::", &["127.0.0.1", "192.168.1.7", "fe80::7"]),
        ] {
            let found: Vec<String> =
                there.iter().filter(|one| reaches(one, ip(listens))).map(|one| one.ip().to_string()).collect();
            assert_eq!(found, told, "{listens}");
        }
    }
}
