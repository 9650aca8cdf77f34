//! Everybody's accounts: what outlives a reload.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::account::Account;
use super::crowd::Crowd;
use super::table::Table;

/// What everybody has used, in the time since it began. One for a process: the layers of each stack look into the same.
#[derive(Debug)]
pub struct Ledger {
    began: Instant,
    pub(super) keys: Table<Arc<str>>,
    pub(super) clients: Table<Address>,
    pub(super) models: Table<Arc<str>>,
    /// Requests at the same time, here and at other proxies.
    pub(super) crowd: Crowd,
}

/// Whose account it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Who {
    Key(Arc<str>),
    Client(Address),
    Model(Arc<str>),
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            keys: Table::default(),
            clients: Table::default(),
            models: Table::default(),
            crowd: Crowd::default(),
        }
    }
}

impl Ledger {
    /// Nanoseconds since it began: the time of every account.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The account of somebody; a new one if there is none.
    pub(super) fn account(&self, who: &Who) -> Arc<Account> {
        let now = self.now();
        match who {
            Who::Key(key) => self.keys.account(key, now),
            Who::Client(address) => self.clients.account(address, now),
            Who::Model(name) => self.models.account(name, now),
        }
    }

    /// How many accounts there are, of each kind.
    pub fn accounts(&self) -> [(&'static str, usize); 3] {
        [("key", self.keys.len()), ("client", self.clients.len()), ("model", self.models.len())]
    }
}

/// Where a client comes from: an address of IPv4, or a network of IPv6 (/64), of which one machine has all addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Address(u128);

/// JSON has no numbers of this size.
impl From<Address> for String {
    fn from(address: Address) -> Self {
        format!("{:x}", address.0)
    }
}

impl TryFrom<String> for Address {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u128::from_str_radix(&text, 16).map(Self)
    }
}

impl Address {
    /// The address of a client. All of whom it is not known share one.
    pub(super) fn of(client: Option<SocketAddr>) -> Self {
        Self(match client.map(|client| client.ip().to_canonical()) {
            Some(IpAddr::V4(address)) => address.to_ipv6_mapped().to_bits(),
            Some(IpAddr::V6(address)) => address.to_bits() >> 64 << 64,
            None => u128::MAX,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_that_of_one_machine() {
        let of = |text: &str| Address::of(Some(SocketAddr::new(text.parse().unwrap(), 1)));
        for (one, other, are_same) in [
            ("10.0.0.1", "10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
            ("10.0.0.1", "::ffff:10.0.0.1", true),
            ("2001:db8::1", "2001:db8::ffff:1", true),
            ("2001:db8:0:1::1", "2001:db8:0:2::1", false),
            ("::1", "0.0.0.0", false),
        ] {
            assert_eq!(of(one) == of(other), are_same, "{one} {other}");
        }
        assert_ne!(Address::of(None), of("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
    }
}
