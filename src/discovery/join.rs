//! Agents that dial in, from where no proxy could dial them: they are served over the connection that they have made.
//!
//! An agent asks for `POST /olol/join` on the proxy's port, and the connection is turned round: from then on the proxy calls
//! and the agent answers, as if the proxy had dialled. Both prove first that they know the token of the cluster. An agent
//! keeps one connection more than is in use, so that there is always one to take. It is known by its name; one that comes
//! back is the same server as before, and one that has gone is down at once and leaves some time later.
//!
//! Where a name is taken, whoever has it is asked first whether he is there: a machine that lost its power has said goodbye to
//! nobody, and is back before it is missed. If he answers, the other is told apart by a number; if he does not, the other has
//! the place. So no agent takes the name of one that lives, whatever it knows.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use olol_middleware::cluster::{MOST_SERVERS, Source, State};
use olol_middleware::instruments::{self, Joining};
use olol_middleware::{BoxError, ServerId, Snapshot};
use tokio::sync::Notify;
use tokio::task::{self, AbortHandle};
use tokio::time::Instant;

use super::Config;
use crate::pool::{Arrival, Lobby, Pool, ServerSpec, Way, meet};
use crate::security::proof::{Dialled, Purpose, Refused};
use crate::security::{Tokens, Wire};

/// Where agents dial in.
pub const PATH: &str = "/olol/join";
/// What the connection becomes.
pub const PROTOCOL: &str = "olol-join";
/// The header with the name of the agent.
pub const NAME: HeaderName = HeaderName::from_static("olol-name");
/// The header with the random id of its process.
pub const INSTANCE: HeaderName = HeaderName::from_static("olol-instance");

/// The longest that proofs may take.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// Agents whose proofs are being made: of all addresses, and of one.
const MOST_AT_ONCE: (usize, usize) = (256, 32);
/// Connections of one agent: for calls, for bodies, one ready, and some that are being exchanged.
const MOST_CONNECTIONS: usize = 6;
/// An agent whose name another gives must answer within this time, or has gone: there and back twice on the slowest network.
const ANSWERS: Duration = Duration::from_millis(1500);
/// Agents of one name that are told apart.
const MOST_NAMESAKES: u32 = 1000;
/// Agents that were refused, and are remembered.
const MOST_REFUSED: usize = 32;
/// The longest name of an agent, and of its process.
const LONGEST_NAME: usize = 128;
/// Agents that come within this time become members together.
const TOGETHER: Duration = Duration::from_millis(20);
/// Time between two looks whether an agent has come by another way, too.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// An agent that dialled in and was not let in.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The name that it gave.
    pub name: String,
    /// Where it came from.
    pub address: IpAddr,
    /// Why.
    pub reason: String,
    /// When, last.
    pub at: SystemTime,
    /// How often.
    pub times: u64,
}

/// Who dials in.
#[derive(Clone, Debug)]
pub struct Guests(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: Pool,
    tokens: Option<Tokens>,
    lease: Duration,
    probe: Duration,
    book: Mutex<Book>,
    /// Those whose proofs are being made, by address.
    introducing: Mutex<HashMap<IpAddr, usize>>,
    /// Told when the first connection of an agent comes, and when its last has gone.
    stirs: Notify,
}

#[derive(Debug, Default)]
struct Book {
    guests: HashMap<ServerId, Guest>,
    /// Those of them that are about to become members: together, since each time costs.
    coming: Vec<ServerSpec>,
    refused: VecDeque<Refusal>,
}

#[derive(Debug)]
struct Guest {
    instance: String,
    lobby: Lobby,
    /// What ends its connections.
    connections: HashMap<task::Id, AbortHandle>,
    /// Since when it has none.
    gone: Option<Instant>,
}

/// Who dials in now.
#[derive(Clone, Debug)]
struct Visitor {
    name: String,
    instance: String,
    address: SocketAddr,
    /// The address of ours that it has reached.
    here: SocketAddr,
    is_certified: bool,
}

impl Guests {
    /// Lets agents into a pool that know one of these tokens.
    pub fn new(pool: Pool, tokens: Option<Tokens>, config: &Config) -> Self {
        Self(Arc::new(Inner {
            pool,
            tokens,
            lease: config.join_lease_s.time(),
            probe: config.join_probe_s.time(),
            book: Mutex::default(),
            introducing: Mutex::default(),
            stirs: Notify::new(),
        }))
    }

    /// Looks after those who have dialled in, for ever.
    pub async fn keep(self) {
        loop {
            self.0.take_in();
            let is_left = self.0.look();
            let pause = async {
                if is_left {
                    let later = Instant::now() + LOOK_EVERY;
                    tokio::time::sleep_until(self.0.next().map_or(later, |next| next.min(later))).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = pause => {}
                () = self.0.stirs.notified() => tokio::time::sleep(TOGETHER).await,
            }
        }
    }

    /// Those that were refused lately, the last one last.
    pub fn refused(&self) -> Vec<Refusal> {
        self.0.book().refused.iter().cloned().collect()
    }

    /// Answers who asks to join; what is to be done on the connection then goes on by itself.
    pub fn answer(
        &self,
        mut request: Request<Incoming>,
        address: SocketAddr,
        here: Option<SocketAddr>,
        is_certified: bool,
    ) -> Response<String> {
        let headers = request.headers();
        if request.method() != Method::POST || !asks_for_upgrade(headers) {
            let mut answer = said(StatusCode::UPGRADE_REQUIRED, "agents join here: `olol server --join` does\n");
            answer.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
            return answer;
        }
        let (Some(name), Some(instance)) = (text(headers, &NAME), text(headers, &INSTANCE)) else {
            let what = "an agent that joins gives its name and an id, of letters, digits, '-', '_', '.' and ':'\n";
            return said(StatusCode::BAD_REQUEST, what);
        };
        let here = here.unwrap_or(address);
        let visitor = Visitor { name, instance, address, here, is_certified };
        if self.0.tokens.is_none() && !is_certified {
            return said(
                StatusCode::SERVICE_UNAVAILABLE,
                "this proxy has no token of the cluster: give it the agent's, which `olol token` prints there, with OLOL_TOKEN or \
                 --token-file\n",
            );
        }
        if let Some(known) = reached_otherwise(&self.0.pool.cluster().snapshot()).get(&visitor.instance) {
            return said(StatusCode::CONFLICT, &format!("this proxy reaches the agent already, as {known}\n"));
        }
        let Some(place) = Place::take(&self.0, address.ip()) else {
            instruments::dialled_in(Joining::Full);
            return said(StatusCode::TOO_MANY_REQUESTS, "too many agents join at this moment: come again\n");
        };
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(receive(Arc::downgrade(&self.0), upgrade, visitor, place));
        let mut answer = Response::new(String::new());
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        answer.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
        answer
    }
}

fn said(status: StatusCode, what: &str) -> Response<String> {
    let mut answer = Response::new(what.to_owned());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    headers.get(header::UPGRADE).is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()))
}

/// A header of an agent, if it is what it should be.
fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let text = headers.get(name)?.to_str().ok()?;
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    ((1..=LONGEST_NAME).contains(&text.len()) && text.bytes().all(is_good)).then(|| text.to_owned())
}

/// The agents that are reached in other ways than by their own dialling, by the ids of their processes.
fn reached_otherwise(snapshot: &Snapshot) -> HashMap<String, ServerId> {
    let up = snapshot.servers.iter().filter(|server| server.source != Source::Joined && server.state == State::Up);
    up.filter_map(|server| {
        let instance = server.vitals.load().as_ref().map(|vitals| vitals.instance.clone())?;
        (!instance.is_empty()).then(|| (instance, server.id.clone()))
    })
    .collect()
}

/// One of the places for those whose proofs are being made.
struct Place {
    inner: Weak<Inner>,
    address: IpAddr,
}

impl Place {
    fn take(inner: &Arc<Inner>, address: IpAddr) -> Option<Self> {
        let address = network(address);
        let mut introducing = inner.introducing.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = introducing.values().sum();
        let of_it = introducing.get(&address).copied().unwrap_or(0);
        if all >= MOST_AT_ONCE.0 || of_it >= MOST_AT_ONCE.1 {
            return None;
        }
        introducing.insert(address, of_it + 1);
        Some(Self { inner: Arc::downgrade(inner), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let mut introducing = inner.introducing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = introducing.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                introducing.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: of IPv6 a /64, whose addresses one machine may have all.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Receives who has dialled in, until the connection ends.
async fn receive(inner: Weak<Inner>, upgrade: OnUpgrade, visitor: Visitor, place: Place) {
    let meeting = async {
        let upgraded = upgrade.await?;
        let Some(inner) = inner.upgrade() else { return Err::<_, BoxError>("the proxy ends".into()) };
        let dialled =
            Dialled { purpose: Purpose::Join, address: visitor.here, bound: false, is_certified: visitor.is_certified };
        meet(TokioIo::new(upgraded), dialled, inner.tokens.as_ref(), inner.probe).await
    };
    let met = tokio::time::timeout(INTRODUCTION, meeting).await;
    drop(place);
    let met = met.unwrap_or_else(|_| Err(format!("no proof within {} s", INTRODUCTION.as_secs()).into()));
    let Some(strong) = inner.upgrade() else { return };
    match met {
        Err(error) if error.is::<Refused>() => strong.refuse(&visitor, error.to_string()),
        Err(error) => strong.refuse(&visitor, Refused::Unproved(error.to_string()).to_string()),
        Ok(arrival) => {
            strong.clear_the_way(&visitor, &arrival.known.instance).await;
            let Some((id, ends)) = strong.welcome(&visitor, arrival) else { return };
            drop(strong);
            let connection = ends.id();
            // An end is an end, whatever it came to.
            let _ = ends.await;
            if let Some(inner) = inner.upgrade() {
                inner.lose(&id, connection);
            }
        }
    }
}

impl Inner {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, visitor: &Visitor, reason: String) {
        instruments::dialled_in(Joining::Refused);
        let address = visitor.address.ip();
        let mut book = self.book();
        let at = book.refused.iter().position(|other| other.address == address && other.name == visitor.name);
        let before = at.and_then(|at| book.refused.remove(at));
        if before.as_ref().is_none_or(|before| before.reason != reason) {
            tracing::warn!(agent = visitor.name, %address, reason, "an agent that dialled in is not used");
        }
        if book.refused.len() >= MOST_REFUSED {
            book.refused.pop_front();
        }
        let times = before.map_or(0, |before| before.times) + 1;
        book.refused.push_back(Refusal { name: visitor.name.clone(), address, reason, at: SystemTime::now(), times });
    }

    /// Lets go of an agent that has the name of a visitor and does not answer any more: it is mostly the same one, started anew
    /// on a machine that had no time to close what was open.
    async fn clear_the_way(&self, visitor: &Visitor, instance: &str) {
        let id = ServerId::new(&visitor.name);
        let holder = {
            let book = self.book();
            if book.guests.values().any(|guest| guest.instance == instance) {
                return;
            }
            let holder = book.guests.get(&id).filter(|guest| !guest.connections.is_empty());
            let Some(holder) = holder else { return };
            holder.instance.clone()
        };
        // One that is no member yet has come a moment ago.
        if self.pool.is_there(&id, ANSWERS).await != Some(false) {
            return;
        }
        let mut book = self.book();
        let Some(guest) = book.guests.get_mut(&id).filter(|guest| guest.instance == holder) else { return };
        tracing::info!(server = %id, "an agent came back before it was missed, or another takes the place of one that does not answer");
        guest.lobby.close();
        for (_, connection) in guest.connections.drain() {
            connection.abort();
        }
        guest.gone = Some(Instant::now());
    }

    /// Takes in a connection of an agent that has proved itself.
    fn welcome(&self, visitor: &Visitor, arrival: Arrival) -> Option<(ServerId, tokio::task::JoinHandle<()>)> {
        let instance = arrival.known.instance.clone();
        let mut book = self.book();
        let id = self.place(&mut book, visitor, &instance)?;
        let guest = book.guests.get_mut(&id)?;
        if guest.connections.len() >= MOST_CONNECTIONS {
            instruments::dialled_in(Joining::Full);
            return None;
        }
        instruments::dialled_in(Joining::Taken);
        guest.instance = instance;
        let is_back = guest.gone.take().is_some();
        let ends = guest.lobby.put(arrival, visitor.address);
        guest.connections.insert(ends.id(), ends.abort_handle());
        let address = visitor.address.ip();
        book.refused.retain(|refusal| refusal.name != visitor.name || refusal.address != address);
        drop(book);
        if is_back {
            // Those who keep it true need not find it out by themselves.
            self.pool.cluster().want_news_of(&id);
        }
        Some((id, ends))
    }

    /// The name by which an agent is known: its own, with a number behind it if another has that now.
    fn place(&self, book: &mut Book, visitor: &Visitor, instance: &str) -> Option<ServerId> {
        if let Some((id, _)) = book.guests.iter().find(|(_, guest)| guest.instance == instance) {
            return Some(id.clone());
        }
        let snapshot = self.pool.cluster().snapshot();
        for number in 1..=MOST_NAMESAKES {
            let name = if number == 1 { visitor.name.clone() } else { format!("{}-{number}", visitor.name) };
            let id = ServerId::new(&name);
            match book.guests.get(&id) {
                Some(guest) if !guest.connections.is_empty() => continue,
                Some(_) => return Some(id),
                // That of a server that has not dialled in.
                None if snapshot.server(&id).is_some_and(|server| server.source != Source::Joined) => continue,
                None => {}
            }
            if book.guests.len() >= MOST_SERVERS {
                break;
            }
            if number > 1 {
                tracing::warn!(
                    agent = visitor.name,
                    server = %id,
                    "two agents have the same name: give one of them another with --name"
                );
            }
            let lobby = Lobby::new(visitor.address);
            let way = Way::Joined(lobby.clone());
            book.coming.push(ServerSpec { id: id.clone(), way, wire: Wire::Usual, weight: NonZeroU32::MIN });
            let guest = Guest { instance: instance.to_owned(), lobby, connections: HashMap::new(), gone: None };
            book.guests.insert(id.clone(), guest);
            self.stirs.notify_one();
            return Some(id);
        }
        tracing::error!(agent = visitor.name, "there is no place for another agent");
        None
    }

    /// A connection of an agent has ended.
    fn lose(&self, id: &ServerId, connection: task::Id) {
        let mut book = self.book();
        let Some(guest) = book.guests.get_mut(id) else { return };
        // Not if another has the place since.
        if guest.connections.remove(&connection).is_some() && guest.connections.is_empty() {
            guest.gone = Some(Instant::now());
            self.stirs.notify_one();
        }
    }

    /// Makes members of those who have come.
    fn take_in(&self) {
        let coming = std::mem::take(&mut self.book().coming);
        self.pool.join(Source::Joined, &coming);
    }

    /// Lets those leave who have been gone for long, those whom we reach by another way, and those who found no place. Returns
    /// whether anybody is left.
    fn look(&self) -> bool {
        let snapshot = self.pool.cluster().snapshot();
        let otherwise = reached_otherwise(&snapshot);
        let mut book = self.book();
        // After the book: whoever comes is in it before it is a member.
        let members = self.pool.of(Source::Joined);
        let coming: HashSet<ServerId> = book.coming.iter().map(|spec| spec.id.clone()).collect();
        let ends = |(id, guest): (&ServerId, &Guest)| {
            let is_gone = guest.gone.is_some_and(|gone| gone.elapsed() >= self.lease);
            if is_gone {
                instruments::lease_ended(Source::Joined);
            }
            let other = otherwise.get(guest.instance.as_str());
            if let Some(other) = other {
                tracing::info!(server = %id, %other, "an agent that dialled in is reached by another way, too");
            }
            (is_gone || other.is_some() || !(members.contains(id) || coming.contains(id))).then(|| id.clone())
        };
        let ended: Vec<ServerId> = book.guests.iter().filter_map(ends).collect();
        for id in &ended {
            if let Some(guest) = book.guests.remove(id) {
                guest.lobby.close();
            }
            book.coming.retain(|spec| spec.id != *id);
        }
        if !ended.is_empty() {
            self.pool.leave(Source::Joined, &ended);
        }
        !book.guests.is_empty()
    }

    /// When the next one leaves who has gone, at the earliest.
    fn next(&self) -> Option<Instant> {
        self.book().guests.values().filter_map(|guest| Some(guest.gone? + self.lease)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_agents_are_checked() {
        let shown = |value: &str| text(&HeaderMap::from_iter([(NAME, HeaderValue::from_str(value).unwrap())]), &NAME);
        assert_eq!(shown("gpu1.lab:50051").as_deref(), Some("gpu1.lab:50051"));
        for bad in ["", "a b", "a/b", &"a".repeat(129)] {
            assert_eq!(shown(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_network_counts_as_one_address() {
        let same = |one: &str, other: &str| network(one.parse().unwrap()) == network(other.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::2:3") && !same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("10.0.0.1", "::ffff:10.0.0.1") && !same("10.0.0.1", "10.0.0.2"));
    }
}
