//! Who asks: a bounded table of the clients of late, for the page that lists them.
//!
//! A client is whoever shows a key, or an address (one of IPv4, a /64 of IPv6) where none is shown. Of a key its name is
//! told, never the key; of an address a hash with a secret of this process, so that two requests can be told to be of one
//! client and nobody can tell from where. `metrics` feeds the table. When a part of it is full, whoever has been idle longest
//! leaves.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::header;
use smallvec::SmallVec;

use crate::call::{Counters, Head};
use crate::route::Dialect;
use crate::time::unix_ms_now;

/// Parts of the table, each with a lock of its own.
const SHARDS: usize = 16;
/// Clients that a part holds.
const ROOM: usize = 256;
/// Applications that are remembered of one client, the last ones.
const APPLICATIONS: usize = 8;
/// How much of the name of an application is remembered, characters.
const LONGEST: usize = 64;

/// The clients of late.
#[derive(Debug, Default)]
pub struct Clients {
    shards: [Mutex<HashMap<Who, Arc<Client>>>; SHARDS],
    secret: RandomState,
}

/// Whom requests are from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// The name of a key.
    Key(Arc<str>),
    /// The hash of an address.
    Address(u64),
    /// Nobody said where it came from.
    Nowhere,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(name) => f.write_str(name),
            Self::Address(hash) => write!(f, "ip-{hash:016x}"),
            Self::Nowhere => f.write_str("unknown"),
        }
    }
}

/// The words in which a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Ollama's own.
    Ollama,
    /// OpenAI's.
    OpenAi,
    /// Anthropic's.
    Anthropic,
    /// gRPC.
    Grpc,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ollama, Self::OpenAi, Self::Anthropic, Self::Grpc];

    /// That of a request.
    pub fn of(head: &Head) -> Self {
        match head.route.dialect() {
            _ if head.is_grpc => Self::Grpc,
            Dialect::Ollama => Self::Ollama,
            Dialect::OpenAi => Self::OpenAi,
            Dialect::Anthropic => Self::Anthropic,
        }
    }

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ollama => "ollama",
            Self::OpenAi => "openai",
            Self::Anthropic => "anthropic",
            Self::Grpc => "grpc",
        }
    }
}

/// One client. All of it is live.
#[derive(Debug)]
pub struct Client {
    who: Who,
    /// Milliseconds since 1970.
    first_seen: u64,
    last_seen: AtomicU64,
    requests: AtomicU64,
    in_flight: AtomicU32,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    /// The last family.
    family: AtomicU8,
    /// A bit for each family that it has used.
    families: AtomicU8,
    /// The hash of the last User-Agent, so that the names are looked at only when it changes.
    agent: AtomicU64,
    /// The last one stands at the end.
    applications: Mutex<SmallVec<[Arc<str>; 1]>>,
}

impl Client {
    fn new(who: Who, now: u64) -> Self {
        Self {
            who,
            first_seen: now,
            last_seen: AtomicU64::new(now),
            requests: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            prompt_tokens: AtomicU64::new(0),
            output_tokens: AtomicU64::new(0),
            family: AtomicU8::new(0),
            families: AtomicU8::new(0),
            agent: AtomicU64::new(0),
            applications: Mutex::default(),
        }
    }

    /// Who it is.
    pub fn who(&self) -> &Who {
        &self.who
    }

    /// When its first request came, as long as it is remembered.
    pub fn first_seen(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.first_seen)
    }

    /// When something of it was last seen: a request that came, or an answer that ended.
    pub fn last_seen(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.last_seen.load(Ordering::Relaxed))
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Requests that are not answered to the end.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Tokens of its prompts, and of the answers to them.
    pub fn tokens(&self) -> (u64, u64) {
        (self.prompt_tokens.load(Ordering::Relaxed), self.output_tokens.load(Ordering::Relaxed))
    }

    /// The family of its last request.
    pub fn family(&self) -> Family {
        let last = usize::from(self.family.load(Ordering::Relaxed));
        Family::ALL.get(last).copied().unwrap_or(Family::Ollama)
    }

    /// The families that it has used.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let bits = self.families.load(Ordering::Relaxed);
        Family::ALL.into_iter().filter(move |family| bits & (1 << *family as u8) != 0)
    }

    /// The programs that have asked in its name, the last one first: what they say of themselves.
    pub fn applications(&self) -> SmallVec<[Arc<str>; 1]> {
        let mut names = lock(&self.applications).clone();
        names.reverse();
        names
    }

    fn came(&self, head: &Head, agent: Option<(u64, &str)>, now: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.last_seen.fetch_max(now, Ordering::Relaxed);
        let family = Family::of(head) as u8;
        self.family.store(family, Ordering::Relaxed);
        if self.families.load(Ordering::Relaxed) & (1 << family) == 0 {
            self.families.fetch_or(1 << family, Ordering::Relaxed);
        }
        let Some((hash, text)) = agent else { return };
        if self.agent.swap(hash, Ordering::Relaxed) != hash {
            let name = application(text);
            let mut names = lock(&self.applications);
            let known = names.iter().position(|other| **other == *name);
            let name = known.map_or_else(|| name.into(), |at| names.remove(at));
            if names.len() == APPLICATIONS {
                names.remove(0);
            }
            names.push(name);
        }
    }
}

/// The name that a program gives itself: the first word of its `User-Agent`, without its version.
fn application(agent: &str) -> String {
    let end = agent.find(['/', ' ', '(', ';']).unwrap_or(agent.len());
    agent[..end].chars().take(LONGEST).collect()
}

/// A request of a client that is being answered; it is over when this is dropped.
#[derive(Debug)]
pub struct Visit(Arc<Client>);

impl Visit {
    /// A server told how many tokens it was.
    pub fn used(&self, counters: &Counters) {
        self.0.prompt_tokens.fetch_add(counters.prompt_tokens, Ordering::Relaxed);
        self.0.output_tokens.fetch_add(counters.output_tokens, Ordering::Relaxed);
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.0.last_seen.fetch_max(unix_ms_now(), Ordering::Relaxed);
    }
}

impl Clients {
    /// A request has come, and its key has been looked at.
    pub fn enter(&self, head: &Head) -> Visit {
        let who = head.key.get().map_or_else(|| self.at(head.client), |key| Who::Key(key.name.clone()));
        let agent = head.headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
        let agent = agent.filter(|text| !text.is_empty());
        let agent = agent.map(|text| (rapidhash::v3::rapidhash_v3(text.as_bytes()), text));
        let now = unix_ms_now();
        let shard = usize::try_from(self.secret.hash_one(&who) % SHARDS as u64).unwrap_or(0);
        let mut shard = lock(&self.shards[shard]);
        let client = if let Some(client) = shard.get(&who) {
            client
        } else {
            if shard.len() >= ROOM {
                make_room(&mut shard);
            }
            shard.entry(who.clone()).or_insert_with(|| Arc::new(Client::new(who, now)))
        };
        // Before the lock is given back, so that nobody takes it for idle.
        client.came(head, agent, now);
        Visit(client.clone())
    }

    fn at(&self, client: Option<SocketAddr>) -> Who {
        let Some(client) = client else { return Who::Nowhere };
        Who::Address(match client.ip().to_canonical() {
            IpAddr::V4(address) => self.secret.hash_one(address),
            // Of which one machine has all addresses.
            IpAddr::V6(address) => self.secret.hash_one(address.to_bits() >> 64),
        })
    }

    /// All that are remembered, in no order.
    pub fn all(&self) -> Vec<Arc<Client>> {
        self.shards.iter().flat_map(|shard| lock(shard).values().cloned().collect::<Vec<_>>()).collect()
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether nobody has asked yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most that are remembered.
    pub const fn room() -> usize {
        SHARDS * ROOM
    }
}

/// Forgets whoever has been idle longest; if nobody is idle, whoever was seen last the longest ago.
fn make_room(shard: &mut HashMap<Who, Arc<Client>>) {
    let oldest = shard.values().min_by_key(|client| (client.in_flight() > 0, client.last_seen.load(Ordering::Relaxed)));
    if let Some(who) = oldest.map(|client| client.who.clone()) {
        shard.remove(&who);
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use http::uri::PathAndQuery;
    use http::{HeaderValue, Method};

    use super::*;
    use crate::keys::Key;
    use crate::route::Route;

    fn head(route: Route, client: &str, agent: &'static str) -> Head {
        let mut head = Head::new(route, Method::POST, PathAndQuery::from_static("/"));
        head.client = Some(client.parse().unwrap());
        if !agent.is_empty() {
            head.headers.insert(header::USER_AGENT, HeaderValue::from_static(agent));
        }
        head
    }

    fn from(number: u32) -> Head {
        head(Route::Chat, &SocketAddr::new(IpAddr::V4(number.into()), 9).to_string(), "")
    }

    #[test]
    fn a_client_is_known_by_its_address_and_told_by_a_hash_of_it() {
        let clients = Clients::default();
        drop(clients.enter(&head(Route::Chat, "10.0.0.1:5", "ollama-python/0.4.7 (x86_64 linux) Python/3.12")));
        let visit = clients.enter(&head(Route::V1Chat, "10.0.0.1:6", "OpenAI/Python 1.9"));
        visit.used(&Counters { prompt_tokens: 3, output_tokens: 5, ..Counters::default() });
        let [client] = &clients.all()[..] else { panic!("one client") };
        assert_eq!((client.requests(), client.in_flight(), client.tokens()), (2, 1, (3, 5)));
        assert_eq!(client.families().collect::<Vec<_>>(), [Family::Ollama, Family::OpenAi]);
        assert_eq!(client.family(), Family::OpenAi);
        assert_eq!(client.applications().iter().map(|name| &**name).collect::<Vec<_>>(), ["OpenAI", "ollama-python"]);
        let told = client.who().to_string();
        assert!(told.starts_with("ip-") && !told.contains("10.0"), "{told}");
        drop(visit);
        assert_eq!(client.in_flight(), 0);
    }

    #[test]
    fn a_client_with_a_key_is_one_wherever_it_is() {
        let clients = Clients::default();
        let key = Arc::new(Key { name: "ada".into(), ..Key::default() });
        for place in ["10.0.0.1:5", "[2001:db8::1]:5"] {
            let head = head(Route::Chat, place, "");
            head.key.set(key.clone()).unwrap();
            drop(clients.enter(&head));
        }
        let [client] = &clients.all()[..] else { panic!("one client") };
        assert_eq!((client.who().to_string().as_str(), client.requests()), ("ada", 2));
    }

    #[test]
    fn all_addresses_of_a_machine_are_one_client() {
        let clients = Clients::default();
        for place in ["[2001:db8::1]:5", "[2001:db8::2:3]:5", "[2001:db8:0:1::1]:5"] {
            drop(clients.enter(&head(Route::Chat, place, "")));
        }
        assert_eq!(clients.len(), 2);
    }

    #[test]
    fn the_table_is_bounded_and_who_is_being_answered_stays() {
        let clients = Clients::default();
        let busy: Vec<Visit> = (0..8).map(|number| clients.enter(&from(number))).collect();
        for number in 8..20_000 {
            drop(clients.enter(&from(number)));
        }
        assert!(clients.len() <= Clients::room(), "{}", clients.len());
        assert_eq!(clients.all().iter().filter(|client| client.in_flight() > 0).count(), busy.len());
    }

    #[test]
    fn who_left_the_table_while_it_was_answered_is_counted_right_when_it_is_back() {
        let clients = Clients::default();
        // Nobody is idle: somebody who is being answered must leave.
        let mut visits: Vec<Visit> = (0..6000).map(|number| clients.enter(&from(number))).collect();
        visits.extend((0..6000).map(|number| clients.enter(&from(number))));
        drop(visits);
        assert!(clients.len() <= Clients::room());
        assert!(clients.all().iter().all(|client| client.in_flight() == 0), "never less than nothing");
    }

    #[test]
    fn names_of_programs_are_bounded() {
        assert_eq!(application("curl/8.5.0"), "curl");
        assert_eq!(application(&"x".repeat(500)).len(), LONGEST);
        let clients = Clients::default();
        for agent in ["a/1", "b/1", "c/1", "d/1", "e/1", "f/1", "g/1", "h/1", "i/1", "c/2"] {
            drop(clients.enter(&head(Route::Chat, "10.0.0.1:5", agent)));
        }
        let names = clients.all()[0].applications();
        assert_eq!(names.iter().map(|name| &**name).collect::<String>(), "cihgfedb");
    }
}
