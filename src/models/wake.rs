//! Wakes servers that sleep: with a command, or with the packet that network cards wait for (Wake-on-LAN).
//!
//! Off where no server has a way to be woken. A call wakes one when nobody who answers could take it: those that have its model
//! are down, and one of them can be woken. It then waits until somebody answers, as while a model loads. Each server is
//! woken once in a while at most, however many calls want it; so many calls wait, and no more.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use olol_middleware::cluster::State;
use olol_middleware::units::SomeSeconds;
use olol_middleware::{Call, Cluster, Error, Reply, Scope, Server, ServerId, instruments};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower::Service;

use crate::reload::Running;

/// Calls that may wait for servers to wake up.
const WAITING: usize = 256;
/// How long a server is left alone that was woken in vain.
const VAIN: Duration = Duration::from_secs(600);
/// The longest that a command may take.
const LONGEST: Duration = Duration::from_secs(60);
/// Time between two looks whether a server is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Time between two questions to it.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The port that everybody sends the packet to, though no card looks at it.
const PORT: u16 = 9;

/// The `[wake]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Seconds that a call waits for a server that was woken.
    pub wait_s: SomeSeconds,
    /// Seconds in which a server is woken once at most.
    pub pause_s: SomeSeconds,
    /// How servers are woken, by name.
    pub servers: BTreeMap<String, Way>,
}

impl Default for Config {
    fn default() -> Self {
        Self { wait_s: SomeSeconds::new(120), pause_s: SomeSeconds::new(60), servers: BTreeMap::new() }
    }
}

/// How a server is woken: by one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Way {
    /// A program with its arguments; no shell.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// The address of its network card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Where the packet is sent; the broadcast address of all networks if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no address of a network card, as in aa:bb:cc:dd:ee:ff");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl From<Mac> for String {
    fn from(Mac(bytes): Mac) -> Self {
        bytes.map(|byte| format!("{byte:02x}")).join(":")
    }
}

impl Mac {
    /// Six bytes of ones, and the address sixteen times.
    fn packet(self) -> [u8; 102] {
        let mut packet = [0xff; 102];
        for place in packet[6..].chunks_exact_mut(6) {
            place.copy_from_slice(&self.0);
        }
        packet
    }
}

impl Config {
    /// The first server that has no way, or two; and what is wrong with it.
    pub(crate) fn fault(&self) -> Option<(&str, &'static str)> {
        let what = |way: &Way| match (way.command.first(), way.mac) {
            (None, None) => Some("say `command` or `mac`: without one it cannot be woken"),
            (Some(_), Some(_)) => Some("say `command` or `mac`, not both"),
            (Some(_), None) if way.address.is_some() => Some("`address` is where the packet for `mac` is sent"),
            (Some(program), None) if program.trim().is_empty() => Some("the first word of `command` is the program"),
            _ => None,
        };
        self.servers.iter().find_map(|(server, way)| Some((server.as_str(), what(way)?)))
    }
}

/// Wakes servers, each once in a while.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    running: Arc<Running>,
    cluster: Arc<Cluster>,
    /// When each server was woken last, and since when it had been down.
    woken: Mutex<HashMap<ServerId, Woken>>,
    waiting: Semaphore,
}

#[derive(Clone, Debug)]
struct Woken {
    at: Instant,
    /// When it was woken for the first time since it went down, or since it was left alone for a while.
    first: Instant,
    down_since: SystemTime,
    /// Why what wakes it could not be sent.
    failed: Option<String>,
}

impl Waker {
    /// Wakes the servers of a cluster as the configuration that runs says.
    pub fn new(running: Arc<Running>, cluster: Arc<Cluster>) -> Self {
        Self(Arc::new(Inner { running, cluster, woken: Mutex::default(), waiting: Semaphore::new(WAITING) }))
    }

    /// Whether a server is down and can be woken.
    fn can_wake(&self, server: &Server) -> bool {
        server.state == State::Down
            && !server.draining
            && self.0.running.state().config.wake.servers.contains_key(server.id.as_str())
    }

    /// Whether a server only sleeps, as far as is known: it can be woken, and was not in vain a while ago.
    pub(crate) fn sleeps(&self, server: &Server) -> bool {
        let running = self.0.running.state();
        let (wait, pause) = (running.config.wake.wait_s.time(), running.config.wake.pause_s.time());
        let is_vain = |woken: &Woken| {
            // Who is woken again and again and does not come must not hide others that would.
            let since = woken.first.elapsed();
            let is_over = woken.down_since == server.since && since > wait && since < wait + VAIN;
            is_over || (woken.failed.is_some() && woken.at.elapsed() < pause)
        };
        self.can_wake(server) && !self.woken().get(&server.id).is_some_and(is_vain)
    }

    /// Wakes a server, unless that was done a moment ago.
    pub(crate) async fn wake(&self, server: &Server) -> Result<(), String> {
        let running = self.0.running.state();
        let config = &running.config.wake;
        let Some(way) = config.servers.get(server.id.as_str()) else {
            return Err(format!("[wake] does not say how server {} is woken", server.id));
        };
        {
            let mut woken = self.woken();
            woken.retain(|id, _| config.servers.contains_key(id.as_str()));
            if let Some(woken) = woken.get(&server.id).filter(|woken| woken.at.elapsed() < config.pause_s.time()) {
                return woken.failed.clone().map_or(Ok(()), Err);
            }
            let (at, down_since) = (Instant::now(), server.since);
            let goes_on =
                |woken: &&Woken| woken.down_since == down_since && woken.first.elapsed() < config.wait_s.time() + VAIN;
            let first = woken.get(&server.id).filter(goes_on).map_or(at, |woken| woken.first);
            woken.insert(server.id.clone(), Woken { at, first, down_since, failed: None });
        }
        tracing::info!(server = %server.id, "a server is woken");
        // It goes on when whoever wanted it leaves: others believe that it was done.
        let waking = tokio::spawn(self.clone().wakes(server.id.clone(), way.clone()));
        waking.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    async fn wakes(self, server: ServerId, way: Way) -> Result<(), String> {
        let result = match way.mac {
            Some(mac) => send(mac, way.address).await,
            None => run(&way.command).await,
        };
        instruments::woken(result.is_ok());
        if let Err(why) = &result {
            tracing::warn!(%server, why, "a server could not be woken");
            if let Some(woken) = self.woken().get_mut(&server) {
                woken.failed = Some(why.clone());
            }
        }
        result
    }

    fn woken(&self) -> MutexGuard<'_, HashMap<ServerId, Woken>> {
        self.0.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The servers that could take a call and sleep, if nobody who answers could.
    fn sleepers(&self, call: &Call) -> Vec<Arc<Server>> {
        if self.0.running.state().config.wake.servers.is_empty() || call.dry || call.route.scope() != Scope::One {
            return Vec::new();
        }
        let Some(model) = &call.place.model else { return Vec::new() };
        let answers = |server: &Arc<Server>| server.state != State::Down && !server.draining;
        let mut sleepers: Vec<Arc<Server>> = if call.candidates.snapshot().known(model).is_none() {
            // Who has never told what it has may have it.
            let is_strange =
                |server: &&Arc<Server>| server.report.version.is_empty() && server.report.models.is_empty();
            call.candidates.iter().filter(is_strange).cloned().collect()
        } else if call.candidates.iter().any(answers) {
            return Vec::new();
        } else {
            call.candidates.iter().cloned().collect()
        };
        sleepers.retain(|server| self.sleeps(server));
        let suits = |server: &Server| olol_middleware::affinity::suits(model.as_str(), &server.id, server.weight);
        sleepers.sort_by(|one, other| suits(other).total_cmp(&suits(one)));
        sleepers
    }

    /// Wakes those that sleep until somebody answers, and puts into a call what is known then.
    async fn until_somebody_answers(&self, mut call: Call, sleepers: Vec<Arc<Server>>) -> Call {
        let Ok(_place) = self.0.waiting.try_acquire() else { return call };
        let wait = self.0.running.state().config.wake.wait_s.time();
        let end = call.deadline.map_or(Instant::now() + wait, |deadline| deadline.min(Instant::now() + wait));
        for server in sleepers {
            // One after the other: the first mostly does.
            call.note("wake", "nobody who answers could take it: a server is woken", [("server", (&server.id).into())]);
            if self.wake(&server).await.is_err() {
                continue;
            }
            let mut asked = Instant::now();
            while Instant::now() < end {
                let snapshot = self.0.cluster.snapshot();
                if snapshot.server(&server.id).is_none_or(|server| server.state == State::Up) {
                    break;
                }
                if asked.elapsed() >= ASK_EVERY {
                    self.0.cluster.want_news_of(&server.id);
                    asked = Instant::now();
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            break;
        }
        call.candidates.renew(self.0.cluster.snapshot());
        let known = call.place.model.as_ref().and_then(|model| call.candidates.snapshot().known(model)).cloned();
        if let Some(known) = known {
            call.candidates.keep(&known.installed);
            call.known = Some(known);
        }
        call
    }
}

async fn send(mac: Mac, address: Option<IpAddr>) -> Result<(), String> {
    let to = SocketAddr::new(address.unwrap_or(Ipv4Addr::BROADCAST.into()), PORT);
    let from: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let sending = async {
        let socket = tokio::net::UdpSocket::bind(from).await?;
        socket.set_broadcast(true)?;
        socket.send_to(&mac.packet(), to).await
    };
    sending.await.map(drop).map_err(|error| format!("the packet to {to} could not be sent: {error}"))
}

async fn run(command: &[String]) -> Result<(), String> {
    let [program, arguments @ ..] = command else { return Err("there is no command".to_owned()) };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(LONGEST, command.status()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("'{program}' ended with {status}")),
        Ok(Err(error)) => Err(format!("'{program}' cannot be run: {error}")),
        Err(_) => Err(format!("'{program}' did not end within {} s", LONGEST.as_secs())),
    }
}

/// Wakes servers for the calls that need them, and passes on all calls.
#[derive(Clone, Debug)]
pub struct Waking<S> {
    inner: S,
    waker: Waker,
}

impl<S> Waking<S> {
    /// In front of a leaf.
    pub fn new(inner: S, waker: Waker) -> Self {
        Self { inner, waker }
    }
}

impl<S> Service<Call> for Waking<S>
where
    S: Service<Call, Response = Reply, Error = Error, Future = BoxFuture<'static, Result<Reply, Error>>>
        + Clone
        + Send
        + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let sleepers = self.waker.sleepers(&call);
        if sleepers.is_empty() {
            return self.inner.call(call);
        }
        let next = self.inner.clone();
        let mut ready = std::mem::replace(&mut self.inner, next);
        let waker = self.waker.clone();
        Box::pin(async move {
            let call = waker.until_somebody_answers(call, sleepers).await;
            ready.call(call).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use olol_middleware::cluster::{Member, Report, Source};

    use super::*;

    #[test]
    fn a_card_has_an_address_of_six_bytes() {
        let mac = Mac::try_from("AA-bb:00:11:22:ff".to_owned()).unwrap();
        assert_eq!(String::from(mac), "aa:bb:00:11:22:ff");
        let packet = mac.packet();
        assert!(packet[..6].iter().all(|byte| *byte == 0xff));
        assert_eq!((&packet[6..12], &packet[96..]), (&mac.0[..], &mac.0[..]));
        for wrong in
            ["", "aa:bb:cc:dd:ee", "aa:bb:cc:dd:ee:ff:00", "a:b:c:d:e:f", "gg:bb:cc:dd:ee:ff", "+1:bb:cc:dd:ee:ff"]
        {
            assert!(
                Mac::try_from(wrong.to_owned()).unwrap_err().contains("is no address of a network card"),
                "{wrong}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_woken_again_and_again_in_vain_is_left_alone_for_a_while() {
        let id = ServerId::new("a");
        let cluster = Cluster::new(vec![Member { id: id.clone(), weight: NonZeroU32::MIN, source: Source::Static }]);
        cluster.report(0, Report::default());
        cluster.check_failed(0, "no answer".into(), 1);
        cluster.refresh(Duration::ZERO).await;
        let mut config = crate::config::Config::default();
        let way = Way { mac: Some(Mac([0; 6])), address: Some(Ipv4Addr::LOCALHOST.into()), ..Way::default() };
        config.wake.servers.insert("a".to_owned(), way);
        let (wait, pause) = (config.wake.wait_s.time(), config.wake.pause_s.time());
        let waker = Waker::new(Running::new(config), cluster.clone());
        let server = || cluster.snapshot().server(&id).cloned().unwrap();
        let begun = Instant::now();
        while begun.elapsed() <= wait {
            assert!(waker.sleeps(&server()), "it may take its time");
            waker.wake(&server()).await.unwrap();
            tokio::time::advance(pause).await;
        }
        assert!(!waker.sleeps(&server()), "it does not come, however often it is woken");
        tokio::time::advance(VAIN).await;
        assert!(waker.sleeps(&server()), "it is tried again some day");
        waker.wake(&server()).await.unwrap();
        tokio::time::advance(pause).await;
        assert!(waker.sleeps(&server()), "and waited for as at first");
    }

    #[test]
    fn a_server_has_one_way_to_be_woken() {
        let fault = |text: &str| {
            let config: Config = toml::from_str(text).unwrap_or_else(|error| panic!("{error}"));
            config.fault().map(|(server, what)| format!("{server}: {what}")).unwrap_or_default()
        };
        assert_eq!(fault("servers = { a = { mac = \"aa:bb:cc:dd:ee:ff\", address = \"10.0.0.255\" } }"), "");
        assert_eq!(fault("servers = { a = { command = [\"wake\", \"a\"] } }"), "");
        assert!(fault("servers = { a = {} }").starts_with("a: say `command` or `mac`"));
        assert!(fault("servers = { a = { mac = \"aa:bb:cc:dd:ee:ff\", command = [\"x\"] } }").contains("not both"));
        assert!(
            fault("servers = { a = { command = [\"x\"], address = \"10.0.0.255\" } }").contains("`address` is where")
        );
    }
}
