//! Who the servers are, where a list does not say it.
//!
//! | module | what it does |
//! |---|---|
//! | `dns` | names of DNS stand for as many as they lead to |
//! | [`join`] | agents dial in |
//! | `mdns` | agents tell on the local network that they are there, and proxies hear it |
//! | `scan` | each address of a small network is looked at |
//! | `finder` | who was found becomes a server, or is shown with the reason why not |
//! | `badge` | what an agent says of itself to strangers |
//! | `networks` | the networks of this machine |

mod badge;
mod dns;
mod finder;
pub mod join;
mod mdns;
pub(crate) mod networks;
mod scan;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ollama::EndpointError;
use crate::pool::{Pool, ServerSpec, Way};

pub(crate) use badge::clusters;
pub use badge::{Badge, HEADER as BADGE, Tells, cluster};
pub use dns::{NameServer, NameSpec, Names};
pub use finder::{Finder, Stranger};
pub use mdns::{Announcement, PORT as MDNS_PORT};
pub use networks::Named as Interface;
pub use scan::{Range, Scan};

/// The `[discovery]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Whether agents that announce themselves on the local network are taken in.
    pub mdns: bool,
    /// The UDP port of mDNS.
    pub mdns_port: u16,
    /// The interfaces on which it is looked for servers, by name or address; none: all.
    pub interface: Vec<Interface>,
    /// Networks of which each address is looked at.
    pub scan: Scan,
    /// Whether Ollamas that a scan finds are used, which can prove nothing.
    pub scan_ollama: bool,
    /// Seconds between two rounds of it.
    pub scan_interval_s: olol_middleware::units::SomeSeconds,
    /// Seconds after which a server that was found and does not answer any more is let go.
    pub lease_s: olol_middleware::units::SomeSeconds,
    /// Name servers to ask; none: those of the system.
    pub dns: Vec<NameServer>,
    /// Seconds after which a name is looked up again at the latest, however long its records hold.
    pub dns_max_age_s: olol_middleware::units::SomeSeconds,
    /// Seconds after which an agent that had dialled in, and has gone, is no server any more.
    pub join_lease_s: olol_middleware::units::SomeSeconds,
    /// Seconds of silence after which an agent that has dialled in is probed, and after which a probe counts as lost.
    pub join_probe_s: olol_middleware::units::SomeSeconds,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mdns: true,
            mdns_port: MDNS_PORT,
            interface: Vec::new(),
            scan: Scan::Off,
            scan_ollama: false,
            scan_interval_s: olol_middleware::units::SomeSeconds::new(60),
            lease_s: olol_middleware::units::SomeSeconds::new(60),
            dns: Vec::new(),
            dns_max_age_s: olol_middleware::units::SomeSeconds::new(30),
            join_lease_s: olol_middleware::units::SomeSeconds::new(60),
            join_probe_s: olol_middleware::units::SomeSeconds::new(2),
        }
    }
}

impl Config {
    /// Whether it is looked for servers that nobody has named.
    pub fn looks(&self) -> bool {
        self.mdns || self.scan != Scan::Off
    }

    /// This one with the values of another where only a restart can change them.
    #[must_use]
    pub(crate) fn restarting_as(&self, other: &Self) -> Self {
        Self {
            dns: other.dns.clone(),
            dns_max_age_s: other.dns_max_age_s,
            join_lease_s: other.join_lease_s,
            join_probe_s: other.join_probe_s,
            ..self.clone()
        }
    }

    /// Checks that this machine has the interfaces that are named.
    pub fn check_interfaces(&self) -> Result<(), String> {
        networks::Networks::of(&self.interface).map(drop)
    }
}

/// Says on the local network that an agent is there, at the addresses where it listens, until what is returned is ended.
pub fn announce(tells: Tells, listens: SocketAddr, config: &Config) -> anyhow::Result<Announcement> {
    let networks = networks::Networks::of(&config.interface).map_err(anyhow::Error::msg)?;
    Announcement::start(tells, listens, &networks, config.mdns_port)
}

/// What stands in a list of servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Servers.
    pub servers: Vec<ServerSpec>,
    /// Names that stand for servers.
    pub names: Vec<NameSpec>,
}

impl Listed {
    /// Reads more of a list, with commas between.
    pub fn read(&mut self, text: &str) -> Result<(), EndpointError> {
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some(name) = NameSpec::parse(part)? else {
                ServerSpec::parse_onto(&mut self.servers, part)?;
                continue;
            };
            if self.names.iter().any(|other| other.is_twin(&name)) {
                return Err(EndpointError(format!("'{part}' stands twice in the list")));
            }
            self.names.push(name);
        }
        Ok(())
    }

    /// Whether any of them is an agent, or may lead to one.
    pub fn has_agents(&self) -> bool {
        self.servers.iter().any(|server| matches!(server.way, Way::Agent(_)))
            || self.names.iter().any(NameSpec::is_agent)
    }

    /// Makes these the servers of a pool. Those behind the names follow.
    pub fn put(&self, pool: &Pool, names: &Names) {
        pool.set(olol_middleware::cluster::Source::Static, &self.servers);
        names.set(self.names.clone());
    }
}
