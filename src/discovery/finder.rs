//! Takes in servers that nobody has named: what was heard on the network (`mdns`), what answered a scan (`scan`), and, where the
//! operator has named no server at all, the agent of this machine.
//!
//! What is found is believed nothing. An agent becomes a server when it has proved at the address where it was found that it
//! knows the token of the cluster, or has a certificate of its CA; a bare Ollama where the operator has said so. All others
//! are shown with the reason why they are not used. Each agent counts once, however it was found and however many addresses it
//! has: it tells who it is when it proves itself. Who is named by the operator stays as he has it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use olol_middleware::cluster::{Source, State};
use olol_middleware::instruments;
use olol_middleware::vitals::Vitals;
use olol_middleware::{ServerId, Snapshot};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use super::badge::{self, Badge};
use super::mdns::{Ear, Heard, Seen};
use super::networks::Networks;
use super::scan;
use super::{Config, Scan};
use crate::ollama::Endpoint;
use crate::pool::{AGENT_PORT, Pool, Ready, ServerSpec, Way, prove};
use crate::security::{Trust, Wire};

/// The most that is remembered of what was found; nobody fills our memory by telling of ever more agents.
const MOST: usize = 2048;
/// The most that prove themselves at the same time.
const MOST_PROVING: usize = 64;
/// An agent that has told nothing for so long is not there: it speaks every second.
const SILENT: Duration = Duration::from_secs(5);
/// How often it is looked how those are who were found.
const LOOK: Duration = Duration::from_secs(1);
/// The time within which an agent must have proved itself at one of its addresses: that takes three times as long as it takes
/// to go there and back, and longer where packets are lost.
const PROOF: Duration = Duration::from_secs(5);
/// An address that does not answer within this time is waited for beside the next; and the most that are waited for.
const NEXT_HOST: Duration = Duration::from_millis(500);
const MOST_HOSTS: usize = 4;
/// The shortest and the longest time until one is asked again that was not reached, or did not prove itself.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// How long one that had proved itself, and is not heard any more, is still dialled now and then: networks fail and come back
/// without anybody being told.
const REMEMBERED: Duration = Duration::from_secs(600);
/// From so many on it is decided less often who is a server; and the pauses between.
const MANY: usize = 64;
const FEW_PAUSE: Duration = Duration::from_millis(10);
const MANY_PAUSE: Duration = Duration::from_millis(200);
/// How often the network is asked anew, however quiet it was.
const ASK_ANEW: Duration = Duration::from_secs(300);
/// The longest that the first clients wait for the agent of this machine.
const FIRST: Duration = Duration::from_millis(500);

/// A server that was found and is not used, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// What it calls itself.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// How it was found.
    pub source: Source,
    /// Whether it is an agent, and not an Ollama.
    pub is_agent: bool,
    /// When it was found.
    pub since: SystemTime,
    /// Why it is not used.
    pub reason: String,
}

/// Finds servers, until it is dropped.
#[derive(Debug)]
pub struct Finder {
    wanted: watch::Sender<Config>,
    settled: watch::Receiver<bool>,
    _task: AbortOnDropHandle<()>,
}

impl Finder {
    /// Begins to find servers for a pool. `is_usual`: nobody has named any, so that the agent of this machine is looked for.
    pub fn start(pool: Pool, trust: Trust, config: &Config, is_usual: bool) -> anyhow::Result<Self> {
        Networks::of(&config.interface).map_err(anyhow::Error::msg)?;
        let (wanted, changes) = watch::channel(config.clone());
        let (tell, settled) = watch::channel(!is_usual);
        let keeper = Keeper {
            cluster: cluster_of(&trust),
            pool,
            trust,
            config: config.clone(),
            networks: Networks::default(),
            book: is_usual.then(Sighting::usual).into_iter().collect(),
            proving: JoinSet::new(),
            used: HashMap::new(),
            told: HashMap::new(),
            settled: tell,
            is_full: false,
        };
        let task = AbortOnDropHandle::new(tokio::spawn(keeper.keep(changes)));
        Ok(Self { wanted, settled, _task: task })
    }

    /// From now on it is looked for servers so. What only a restart can change is no matter here.
    pub fn set(&self, config: &Config) {
        self.wanted.send_if_modified(|now| {
            let is_new = *now != *config;
            now.clone_from(config);
            is_new
        });
    }

    /// Returns when it is known whether there is an agent on this machine, if it is looked for one.
    pub fn settled(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut settled = self.settled.clone();
        async move {
            let _ = tokio::time::timeout(FIRST, settled.wait_for(|settled| *settled)).await;
        }
    }
}

/// What tells our cluster from others.
fn cluster_of(trust: &Trust) -> Vec<String> {
    trust.tokens.as_ref().map(|tokens| tokens.all().iter().map(badge::cluster).collect()).unwrap_or_default()
}

/// The host at which an agent has proved itself, and as which process.
type Proof = (String, String);
/// What became of asking for proof, and the connection over which it was given, if there is one.
type Proved = Result<(Proof, Option<Ready>), String>;

/// Something that was found.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they have nothing to do with each other")]
struct Sighting {
    seen: Seen,
    source: Source,
    since: SystemTime,
    /// When it was last found, for what must be found again and again.
    last: Instant,
    /// It has taken its word back, or was not heard any more.
    is_gone: bool,
    proof: Option<Proof>,
    /// The connection over which it has just proved itself.
    ready: Option<Ready>,
    /// It is being asked for proof.
    is_asked: bool,
    /// It has proved itself, and does not answer now.
    is_down: bool,
    /// When it may be asked again.
    again: Instant,
    /// Attempts that failed one after the other.
    failures: u32,
    /// Why it has proved nothing.
    why: String,
    /// What it is called as a server, or was.
    id: Option<ServerId>,
    /// It is a server now.
    is_used: bool,
}

impl Sighting {
    fn new(seen: Seen, source: Source) -> Self {
        let now = Instant::now();
        Self {
            seen,
            source,
            since: SystemTime::now(),
            last: now,
            is_gone: false,
            proof: None,
            ready: None,
            is_asked: false,
            is_down: false,
            again: now,
            failures: 0,
            why: String::new(),
            id: None,
            is_used: false,
        }
    }

    /// The agent of this machine, which may be there or not.
    fn usual() -> Self {
        let key = format!("localhost:{AGENT_PORT}");
        let seen = Seen { key, hosts: vec!["localhost".to_owned()], port: AGENT_PORT, ..Seen::default() };
        Self::new(seen, Source::Local)
    }

    fn is_agent(&self) -> bool {
        self.seen.is_agent
    }

    fn address(&self, host: &str) -> String {
        Endpoint::Tcp { host: host.to_owned(), port: self.seen.port }.to_string()
    }

    fn place(&self, host: &str) -> Place {
        (self.is_agent(), Endpoint::Tcp { host: host.to_owned(), port: self.seen.port })
    }

    fn wire(&self) -> Wire {
        match self.source {
            Source::Local => Wire::Usual,
            _ if self.seen.badge.is_tls => Wire::Tls,
            _ => Wire::Plain,
        }
    }

    fn shown_name(&self) -> &str {
        if self.seen.badge.name.is_empty() { &self.seen.key } else { &self.seen.badge.name }
    }
}

/// Keeps what was found.
struct Keeper {
    pool: Pool,
    trust: Trust,
    /// What tells our cluster from others, for each token that counts.
    cluster: Vec<String>,
    config: Config,
    networks: Networks,
    book: Vec<Sighting>,
    proving: JoinSet<(String, Source, Proved)>,
    /// The servers of each source, as the pool has them.
    used: HashMap<Source, Vec<ServerSpec>>,
    /// What servers that were not found here told last, and when that was noticed.
    told: HashMap<ServerId, (Arc<Vitals>, Instant)>,
    settled: watch::Sender<bool>,
    /// More was found than is remembered.
    is_full: bool,
}

/// Whether an agent is meant, and where.
type Place = (bool, Endpoint);

/// What has happened.
enum Event {
    Heard(Option<Heard>),
    Scanned(Option<Seen>),
    Proved(String, Source, Proved),
    Look,
    Anew,
    Due,
    Changed(bool),
}

impl Keeper {
    async fn keep(mut self, mut changes: watch::Receiver<Config>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut anew = tokio::time::interval(ASK_ANEW.mul_f64(0.8 + 0.4 * fastrand::f64()));
        // The first is now, and there is nobody yet who could ask.
        anew.reset();
        loop {
            let (mut ear, mut scans, mut scanning) = self.open();
            let (mut settled, mut is_due) = (Instant::now(), false);
            self.settle(ear.as_ref());
            loop {
                let next = settled + if self.book.len() < MANY { FEW_PAUSE } else { MANY_PAUSE };
                let is_idle = self.book.is_empty() && ear.is_some() == self.config.mdns;
                let event = tokio::select! {
                    heard = hear(ear.as_ref()), if ear.is_some() => Event::Heard(heard),
                    scanned = scans.recv(), if scanning.is_some() => Event::Scanned(scanned),
                    Some(proved) = self.proving.join_next(), if !self.proving.is_empty() => match proved {
                        Ok((key, source, result)) => Event::Proved(key, source, result),
                        Err(_) => Event::Look,
                    },
                    _ = look.tick(), if !is_idle => Event::Look,
                    _ = anew.tick(), if ear.is_some() => Event::Anew,
                    () = tokio::time::sleep_until(next), if is_due => Event::Due,
                    told = changes.changed() => Event::Changed(told.is_ok()),
                };
                match event {
                    Event::Heard(Some(Heard::Here(seen))) => self.sees(seen, Source::Mdns),
                    Event::Heard(Some(Heard::Gone(key))) => self.loses(&key),
                    // Too much at once, or a fault: it listens again in a moment.
                    Event::Heard(None) => ear = None,
                    Event::Scanned(Some(seen)) => {
                        let source = if seen.is_agent { Source::Scan } else { Source::ScannedOllama };
                        self.sees(seen, source);
                    }
                    Event::Scanned(None) => scanning = None,
                    Event::Proved(key, source, result) => self.proved(&key, source, result),
                    Event::Look => {
                        if ear.is_none() && self.config.mdns {
                            ear = listen(&self.config, &self.networks);
                        }
                    }
                    Event::Due => {}
                    Event::Anew => {
                        if ear.as_mut().is_some_and(|ear| ear.ask_anew().is_err()) {
                            ear = None;
                        }
                    }
                    Event::Changed(true) => {
                        self.config = changes.borrow_and_update().clone();
                        break;
                    }
                    Event::Changed(false) => return,
                }
                // However much is told at once, it is not decided more often than that.
                is_due = Instant::now() < next;
                if !is_due {
                    self.settle(ear.as_ref());
                    settled = Instant::now();
                }
            }
        }
    }

    /// Begins to look for servers as the configuration says, and forgets what would not be found so.
    fn open(&mut self) -> (Option<Ear>, mpsc::Receiver<Seen>, Option<AbortOnDropHandle<()>>) {
        // It was there when the configuration was taken; where it has gone meanwhile, nothing is found.
        match Networks::of(&self.config.interface) {
            Ok(networks) => self.networks = networks,
            Err(error) => {
                tracing::warn!("{error}; nothing is looked for");
                self.config = Config { mdns: false, scan: Scan::Off, ..self.config.clone() };
            }
        }
        let config = self.config.clone();
        self.book.retain(|one| match one.source {
            Source::Mdns => false,
            Source::Scan | Source::ScannedOllama => config.scan != Scan::Off,
            _ => true,
        });
        let ear = if config.mdns { listen(&config, &self.networks) } else { None };
        let (tell, scans) = mpsc::channel(64);
        let scanning = (config.scan != Scan::Off).then(|| {
            let tls = self.trust.tls.clone();
            AbortOnDropHandle::new(tokio::spawn(scan::scan(config, self.networks.clone(), tls, tell)))
        });
        (ear, scans, scanning)
    }

    fn sees(&mut self, seen: Seen, source: Source) {
        if let Some(known) = self.book.iter_mut().find(|one| one.source == source && one.seen.key == seen.key) {
            known.last = Instant::now();
            known.is_gone = false;
            if known.seen != seen {
                let is_there = known.proof.as_ref().is_some_and(|(host, _)| seen.hosts.contains(host));
                if !is_there || seen.port != known.seen.port || seen.badge != known.seen.badge {
                    (known.proof, known.ready) = (None, None);
                    (known.again, known.failures) = (Instant::now(), 0);
                }
                known.seen = seen;
            }
        } else if self.book.len() < MOST {
            tracing::debug!(key = seen.key, source = source.as_str(), "something was found");
            self.book.push(Sighting::new(seen, source));
        } else if !std::mem::replace(&mut self.is_full, true) {
            tracing::warn!("more than {MOST} servers were found: others are not looked at until some have gone");
        }
    }

    /// Anybody can say of another that he has gone: one that still answers stays.
    fn loses(&mut self, key: &str) {
        for one in self.book.iter_mut().filter(|one| one.source == Source::Mdns && one.seen.key == key) {
            one.is_gone = true;
        }
    }

    fn proved(&mut self, key: &str, source: Source, result: Proved) {
        let Some(one) = self.book.iter_mut().find(|one| one.source == source && one.seen.key == key) else { return };
        if source == Source::Local {
            self.settled.send_replace(true);
        }
        let (shortest, longest) = AGAIN;
        let pause = match (&result, source) {
            (Ok(_), _) => longest,
            (Err(_), Source::Local) => shortest,
            (Err(_), _) => shortest.saturating_mul(1 << one.failures.min(8)).min(longest),
        };
        if one.is_agent() {
            instruments::proved(source, result.is_ok());
        }
        one.is_asked = false;
        one.again = Instant::now() + pause.mul_f64(0.9 + 0.2 * fastrand::f64());
        match result {
            Ok((proof, ready)) => {
                (one.proof, one.ready) = (Some(proof), ready);
                (one.failures, one.last) = (0, Instant::now());
            }
            Err(why) => (one.why, one.failures) = (why, one.failures.saturating_add(1)),
        }
    }

    /// Decides who is a server, and who is shown with the reason why not.
    fn settle(&mut self, ear: Option<&Ear>) {
        let snapshot = self.pool.cluster().snapshot();
        self.cluster = cluster_of(&self.trust);
        self.forget(&snapshot, ear);
        self.ask();
        let named = self.named(&snapshot);
        let mut servers: HashMap<Source, Vec<ServerSpec>> = HashMap::new();
        let held = self.book.iter().enumerate().filter(|(_, one)| one.is_used);
        let held = held.filter_map(|(at, one)| Some((one.id.clone()?, at))).collect();
        let (mut strangers, mut chosen) = (Vec::new(), Chosen { held, ..Chosen::default() });
        // The agent of this machine first, then in the order in which they were found.
        for at in 0..self.book.len() {
            let judged = self.judge(at, &named, &mut chosen);
            let is_used = judged.is_ok();
            if std::mem::replace(&mut self.book[at].is_used, is_used) && !is_used {
                chosen.held.retain(|_, holder| *holder != at);
            }
            match judged {
                Ok(spec) => servers.entry(self.book[at].source).or_default().push(spec),
                Err(Refusal::Twin) => {}
                Err(Refusal::Because(reason)) => {
                    let one = &self.book[at];
                    let host = one.seen.hosts.first().map_or("?", String::as_str);
                    strangers.push(Stranger {
                        name: one.shown_name().to_owned(),
                        address: one.address(host),
                        source: one.source,
                        is_agent: one.is_agent(),
                        since: one.since,
                        reason,
                    });
                }
            }
        }
        for source in [Source::Mdns, Source::Scan, Source::ScannedOllama, Source::Local] {
            let now = servers.remove(&source).unwrap_or_default();
            let of_it = self.book.iter_mut().filter(|one| one.source == source && one.is_used);
            let ready = of_it.filter_map(|one| one.id.clone().zip(one.ready.take())).collect();
            let before = self.used.entry(source).or_default();
            if *before != now {
                self.pool.set_ready(source, &now, ready);
                *before = now;
            }
        }
        // Over those of all others nobody will call.
        self.book.iter_mut().for_each(|one| one.ready = None);
        self.pool.show(strangers);
    }

    /// Lets go of what has gone, and looks again at what does not answer.
    fn forget(&mut self, snapshot: &Snapshot, ear: Option<&Ear>) {
        let lease = self.config.lease_s.time();
        let state = |one: &Sighting| {
            // Another may have its name by now.
            let server = snapshot.server(one.id.as_ref().filter(|_| one.is_used)?)?;
            (server.source == one.source).then_some(server.state)
        };
        let now = Instant::now();
        let before = self.book.len();
        let followed = self.followed();
        self.book.retain_mut(|one| {
            if one.is_gone && one.seen.hosts.iter().any(|host| followed.contains(&one.place(host))) {
                instruments::lease_ended(one.source);
                return false;
            }
            let state = state(one);
            let is_down = state == Some(State::Down);
            if is_down && !std::mem::replace(&mut one.is_down, is_down) {
                // It may be elsewhere, or gone: that is asked at once.
                one.again = now;
            }
            one.is_down = is_down;
            if state == Some(State::Up) {
                one.last = now;
                return true;
            }
            let is_over = one.last.elapsed() > lease;
            match one.source {
                Source::Mdns if one.is_gone => {
                    if one.is_down {
                        one.proof = None;
                    }
                    if one.proof.is_none() && (one.id.is_none() || one.last.elapsed() > REMEMBERED) {
                        instruments::lease_ended(one.source);
                        return false;
                    }
                }
                Source::Scan | Source::ScannedOllama if is_over => {
                    instruments::lease_ended(one.source);
                    return false;
                }
                _ => {}
            }
            if one.is_down && is_over && one.proof.take().is_some() {
                instruments::lease_ended(one.source);
            }
            if one.is_down
                && one.again <= now
                && let Some(ear) = ear.filter(|_| one.source == Source::Mdns)
            {
                ear.confirm(&one.seen.key);
            }
            true
        });
        self.is_full &= self.book.len() == before;
    }

    /// Where those have proved themselves who are there, if anybody has gone: who has gone from such a place was the process
    /// before. Asked again it would be the new one that answers, and two would stand for one.
    fn followed(&self) -> HashSet<Place> {
        if !self.book.iter().any(|one| one.is_gone) {
            return HashSet::new();
        }
        let there = self.book.iter().filter(|one| !one.is_gone);
        there.filter_map(|one| Some(one.place(&one.proof.as_ref()?.0))).collect()
    }

    /// Asks those for proof who have given none, and those who do not answer any more: they may do so elsewhere.
    fn ask(&mut self) {
        let now = Instant::now();
        for at in 0..self.book.len() {
            if self.proving.len() >= MOST_PROVING {
                return;
            }
            let one = &self.book[at];
            let is_due = (one.proof.is_none() || one.is_down) && !one.is_asked && one.again <= now;
            if !is_due || self.objection(one).is_some() {
                continue;
            }
            let (key, source, wire) = (one.seen.key.clone(), one.source, one.wire());
            let (hosts, port, is_agent) = (one.seen.hosts.clone(), one.seen.port, one.is_agent());
            let trust = self.trust.over(wire);
            self.proving.spawn(async move {
                let result = if source == Source::Local {
                    // It is as good as named: one that proves nothing is a server all the same, and says why it is none.
                    match proof(&hosts, port, &trust).await {
                        Ok(proved) => Ok(proved),
                        Err(_) => reached("localhost", port).await.map(|proof| (proof, None)),
                    }
                } else if is_agent {
                    proof(&hosts, port, &trust).await
                } else {
                    // It has answered as an Ollama a moment ago, and there is nothing that it could prove.
                    let first = hosts.first().ok_or_else(String::new);
                    first.map(|host| ((host.clone(), String::new()), None))
                };
                (key, source, result)
            });
            self.book[at].is_asked = true;
        }
    }

    /// Why something is not even asked for proof.
    fn objection(&self, one: &Sighting) -> Option<String> {
        if one.source == Source::Local {
            return None;
        }
        if one.seen.hosts.is_empty() {
            return Some("none of its addresses is on a network that this proxy may use".to_owned());
        }
        if !one.is_agent() {
            return (!self.config.scan_ollama).then(|| {
                "an Ollama without an agent, which proves nothing: run `olol server` beside it, name it with --servers, or set \
                 scan-ollama in [discovery]"
                    .to_owned()
            });
        }
        let Badge { cluster, is_tls, .. } = &one.seen.badge;
        let is_same = |cluster: &str| cluster.split('+').any(|one| self.cluster.iter().any(|ours| ours == one));
        match (&self.trust.tls, is_tls) {
            (None, true) => Some(
                "it is reached over TLS, and this proxy knows no CA: name that of the cluster in `ca` of [tls]".to_owned(),
            ),
            (Some(_), false) => Some(
                "it has no TLS, and this proxy wants it: give it a certificate, or name it with --servers as grpc://HOST:PORT"
                    .to_owned(),
            ),
            // A certificate tells more than a token.
            (Some(_), true) => None,
            // One that has proved itself may tell of a token that was changed since.
            (None, false) if cluster.is_empty() || is_same(cluster) || one.proof.is_some() => None,
            (None, false) => Some(
                "its token is not ours, so it is of another cluster; if it should be of this one, give both the same: `olol token` \
                 prints it"
                    .to_owned(),
            ),
        }
    }

    /// Whether something is a server, under which name and at which address.
    fn judge(&mut self, at: usize, named: &Named, chosen: &mut Chosen) -> Result<ServerSpec, Refusal> {
        let one = &self.book[at];
        let because = |reason: &str| Err(Refusal::Because(reason.to_owned()));
        // Its addresses are those of a server that has been named or was found before: then it is that.
        let is_known =
            |host: &String| named.places.contains(&one.place(host)) || chosen.places.contains(&one.place(host));
        if one.seen.hosts.iter().any(is_known) {
            return Err(Refusal::Twin);
        }
        if let Some(objection) = self.objection(one) {
            return because(&objection);
        }
        let (host, instance) = match &one.proof {
            Some(proof) => proof.clone(),
            None if one.source == Source::Local || one.is_gone => return Err(Refusal::Twin),
            None if one.why.is_empty() => return because("it is being asked for proof"),
            None => return because(&one.why),
        };
        if !instance.is_empty() && (named.instances.contains(&instance) || !chosen.instances.insert(instance)) {
            return Err(Refusal::Twin);
        }
        // The Ollama of an agent is served through that.
        if !one.is_agent() && (named.agents.contains(&host) || chosen.agents.contains(&host)) {
            return because("there is an agent at this address, through which it is used");
        }
        if one.is_agent() {
            chosen.agents.extend(one.seen.hosts.iter().cloned());
        }
        let place = one.place(&host);
        chosen.places.insert(place.clone());
        let way = if place.0 { Way::Agent(place.1) } else { Way::Ollama(place.1) };
        let address = one.address(&host);
        let name = if one.seen.badge.name.is_empty() { address.clone() } else { one.seen.badge.name.clone() };
        let is_free = |id: &ServerId| {
            let is_held = chosen.held.get(id).is_some_and(|holder| *holder != at);
            !is_held && !named.ids.contains(id) && !chosen.ids.contains(id)
        };
        // Its own name as soon as nobody else has it: a machine that comes back elsewhere is found before the old one is missed.
        let ids = [Some(ServerId::new(&name)), one.id.clone(), Some(ServerId::new(&address))];
        let Some(id) = ids.into_iter().flatten().find(is_free) else { return Err(Refusal::Twin) };
        chosen.ids.insert(id.clone());
        let wire = one.wire();
        self.book[at].id = Some(id.clone());
        Ok(ServerSpec { id, way, wire, weight: std::num::NonZeroU32::MIN })
    }
}

/// Why something that was found is no server.
enum Refusal {
    /// It is one already, or is not there.
    Twin,
    /// There is a reason to show.
    Because(String),
}

/// The servers that the operator has named, or that have joined by themselves.
#[derive(Default)]
struct Named {
    ids: HashSet<ServerId>,
    places: HashSet<Place>,
    instances: HashSet<String>,
    /// The hosts of agents.
    agents: HashSet<String>,
}

/// Those among the found who are servers.
#[derive(Default)]
struct Chosen {
    /// Who had which name until now.
    held: HashMap<ServerId, usize>,
    ids: HashSet<ServerId>,
    places: HashSet<Place>,
    instances: HashSet<String>,
    agents: HashSet<String>,
}

impl Keeper {
    /// The servers that were not found here.
    fn named(&mut self, snapshot: &Snapshot) -> Named {
        let mut named = Named::default();
        let ways: HashMap<ServerId, Way> = self.pool.specs().into_iter().map(|spec| (spec.id, spec.way)).collect();
        self.told.retain(|id, _| snapshot.server(id).is_some());
        for server in &snapshot.servers {
            if is_ours(server.source) {
                continue;
            }
            named.ids.insert(server.id.clone());
            match ways.get(&server.id) {
                Some(Way::Agent(endpoint)) => {
                    named.places.insert((true, endpoint.clone()));
                    if let Endpoint::Tcp { host, .. } = endpoint {
                        named.agents.insert(host.clone());
                    }
                }
                Some(Way::Ollama(endpoint)) => drop(named.places.insert((false, endpoint.clone()))),
                Some(Way::Joined(_)) | None => {}
            }
            // Also of one whose Ollama does not answer; not of one that was there once.
            let Some(vitals) = server.vitals.load_full() else { continue };
            let told = self.told.entry(server.id.clone()).or_insert_with(|| (vitals.clone(), Instant::now()));
            if !Arc::ptr_eq(&told.0, &vitals) {
                *told = (vitals.clone(), Instant::now());
            }
            if server.state == State::Up || told.1.elapsed() < SILENT {
                named.instances.insert(vitals.instance.clone());
            }
        }
        named
    }
}

/// Whether servers of a source are those that were found here.
fn is_ours(source: Source) -> bool {
    matches!(source, Source::Mdns | Source::Scan | Source::ScannedOllama | Source::Local)
}

fn listen(config: &Config, networks: &Networks) -> Option<Ear> {
    match Ear::open(networks, config.mdns_port) {
        Ok(ear) => Some(ear),
        Err(error) => {
            tracing::warn!(%error, "agents that announce themselves are not heard; name them with --servers, or try --interface");
            None
        }
    }
}

async fn hear(ear: Option<&Ear>) -> Option<Heard> {
    match ear {
        Some(ear) => ear.hear().await,
        None => std::future::pending().await,
    }
}

/// The first of the hosts at which an agent proves itself, and who it is. One that does not answer soon is waited for beside
/// the next: it may have gone, or its network be slow.
async fn proof(hosts: &[String], port: u16, trust: &Trust) -> Proved {
    let mut errors: Vec<String> = Vec::new();
    let mut rest = hosts.iter();
    let mut asked = FuturesUnordered::new();
    loop {
        if let Some(host) = if asked.len() < MOST_HOSTS { rest.next() } else { None } {
            let endpoint = Endpoint::Tcp { host: host.clone(), port };
            asked.push(async move { (host, prove(endpoint.clone(), PROOF, trust).await, endpoint) });
        }
        let is_there_another = rest.len() > 0 && asked.len() < MOST_HOSTS;
        tokio::select! {
            answer = asked.next() => match answer {
                Some((host, Ok((instance, ready)), _)) => return Ok(((host.clone(), instance), Some(ready))),
                Some((_, Err(error), _)) if hosts.len() == 1 => errors.push(error.to_string()),
                Some((_, Err(error), endpoint)) => errors.push(format!("{endpoint}: {error}")),
                None => return Err(errors.join("; ")),
            },
            () = tokio::time::sleep(NEXT_HOST), if is_there_another => {}
        }
    }
}

/// Whether anybody takes connections there.
async fn reached(host: &str, port: u16) -> Result<Proof, String> {
    match tokio::time::timeout(PROOF, tokio::net::TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Ok((host.to_owned(), String::new())),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::Token;
    use http::HeaderValue;

    fn keeper(servers: &str, config: Config) -> (Keeper, Token) {
        let token = Token::make().unwrap();
        let trust = Trust { tokens: Some(token.clone().into()), ..Trust::default() };
        let servers = ServerSpec::parse_list(servers).unwrap();
        let pool = Pool::new(&servers, &crate::pool::Config::default(), &HeaderValue::from_static("hop"), &trust);
        let keeper = Keeper {
            cluster: cluster_of(&trust),
            pool,
            trust,
            config,
            networks: Networks::default(),
            book: Vec::new(),
            proving: JoinSet::new(),
            used: HashMap::new(),
            told: HashMap::new(),
            settled: watch::channel(true).0,
            is_full: false,
        };
        (keeper, token)
    }

    fn seen(name: &str, token: &Token, hosts: &[&str]) -> Seen {
        let badge = Badge { name: name.to_owned(), cluster: badge::cluster(token), ..Badge::default() };
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        Seen { key: format!("{name} 1"), badge, hosts, port: 50051, ..Seen::default() }
    }

    fn proves(keeper: &mut Keeper, key: &str, host: &str, instance: &str) {
        keeper.proved(key, Source::Mdns, Ok(((host.to_owned(), instance.to_owned()), None)));
        keeper.settle(None);
    }

    fn servers(keeper: &Keeper) -> Vec<String> {
        let specs = keeper.pool.specs();
        let shown = |spec: &ServerSpec| match &spec.way {
            Way::Agent(endpoint) | Way::Ollama(endpoint) => format!("{} {endpoint}", spec.id),
            Way::Joined(_) => spec.id.to_string(),
        };
        specs.iter().map(shown).collect()
    }

    #[tokio::test]
    async fn who_proves_itself_is_a_server_and_nobody_else() {
        let (mut keeper, token) = keeper("", Config::default());
        keeper.sees(seen("a", &token, &["127.0.0.1"]), Source::Mdns);
        keeper.sees(seen("b", &Token::make().unwrap(), &["127.0.0.2"]), Source::Mdns);
        keeper.sees(seen("c", &token, &[]), Source::Mdns);
        keeper.settle(None);
        assert!(servers(&keeper).is_empty());
        let reasons: Vec<String> = keeper.pool.strangers().iter().map(|one| one.reason.clone()).collect();
        assert_eq!(reasons[0], "it is being asked for proof");
        assert!(reasons[1].contains("another cluster") && reasons[2].contains("none of its addresses"), "{reasons:?}");
        // Only one was asked at all.
        assert_eq!(keeper.proving.len(), 1);
        proves(&mut keeper, "a 1", "127.0.0.1", "x");
        assert_eq!(servers(&keeper), ["a 127.0.0.1:50051"]);
        // A token that was changed since does not end what was proved.
        keeper.trust.tokens = Some(Token::make().unwrap().into());
        keeper.settle(None);
        assert_eq!(servers(&keeper).len(), 1);
    }

    #[tokio::test]
    async fn one_process_is_one_server_whatever_it_announces() {
        let (mut keeper, token) = keeper("mine@127.0.0.9:50051", Config::default());
        for (name, host) in [("a", "127.0.0.1"), ("b", "127.0.0.2"), ("mine", "127.0.0.3"), ("d", "127.0.0.9")] {
            keeper.sees(seen(name, &token, &[host]), Source::Mdns);
            proves(&mut keeper, &format!("{name} 1"), host, if name == "b" { "a" } else { name });
        }
        // b is a, d stands where the named one is, and a name that is taken is not taken again.
        assert_eq!(servers(&keeper), ["mine 127.0.0.9:50051", "a 127.0.0.1:50051", "127.0.0.3:50051 127.0.0.3:50051"]);
        assert!(keeper.pool.strangers().is_empty());
    }

    #[tokio::test]
    async fn who_starts_again_takes_the_place_of_the_process_before() {
        for name in ["a", "b"] {
            let (mut keeper, token) = keeper("", Config::default());
            keeper.sees(seen("a", &token, &["127.0.0.1"]), Source::Mdns);
            proves(&mut keeper, "a 1", "127.0.0.1", "before");
            keeper.loses("a 1");
            keeper.settle(None);
            let again = Seen { key: "a 2".to_owned(), ..seen(name, &token, &["127.0.0.1"]) };
            keeper.sees(again, Source::Mdns);
            keeper.settle(None);
            // Anybody can announce himself there.
            assert_eq!(servers(&keeper), ["a 127.0.0.1:50051"]);
            // The first is dialled again, too, and it is the second that answers.
            proves(&mut keeper, "a 2", "127.0.0.1", "after");
            proves(&mut keeper, "a 1", "127.0.0.1", "after");
            assert_eq!((keeper.book.len(), servers(&keeper)), (1, vec![format!("{name} 127.0.0.1:50051")]));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_failed_is_asked_again_ever_less_often() {
        let (mut keeper, token) = keeper("", Config::default());
        keeper.sees(seen("a", &token, &["127.0.0.1"]), Source::Mdns);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            keeper.proved("a 1", Source::Mdns, Err("no".to_owned()));
            pauses.push(keeper.book[0].again.duration_since(Instant::now()).as_secs_f64().round());
        }
        assert!(pauses[..5].is_sorted() && pauses[0] <= 1.0 && (9.0..=11.0).contains(&pauses[5]), "{pauses:?}");
        keeper.settle(None);
        assert_eq!(keeper.pool.strangers()[0].reason, "no");
    }

    #[tokio::test]
    async fn no_more_is_remembered_than_there_is_room_for() {
        let (mut keeper, token) = keeper("", Config::default());
        for at in 0..MOST + 10 {
            keeper.sees(seen(&format!("n{at}"), &token, &[]), Source::Mdns);
        }
        assert!(keeper.book.len() == MOST && keeper.is_full);
        keeper.loses("n0 1");
        keeper.settle(None);
        assert_eq!((keeper.book.len(), keeper.pool.strangers().len()), (MOST - 1, MOST - 1));
    }

    #[tokio::test]
    async fn tls_and_none_do_not_go_together() {
        let (mut keeper, token) = keeper("", Config::default());
        let mut secure = seen("a", &token, &["127.0.0.1"]);
        secure.badge.is_tls = true;
        keeper.sees(secure, Source::Mdns);
        keeper.settle(None);
        assert!(keeper.pool.strangers()[0].reason.contains("knows no CA"));
    }
}
