//! Who the servers are, where a list does not say it: names of DNS stand for as many as they lead to, and agents dial in.

mod dns;
pub mod join;

use serde::{Deserialize, Serialize};

use crate::ollama::EndpointError;
use crate::pool::{Pool, ServerSpec, Way};

pub use dns::{NameServer, NameSpec, Names};

/// The `[discovery]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
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
            dns: Vec::new(),
            dns_max_age_s: olol_middleware::units::SomeSeconds::new(30),
            join_lease_s: olol_middleware::units::SomeSeconds::new(60),
            join_probe_s: olol_middleware::units::SomeSeconds::new(2),
        }
    }
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
