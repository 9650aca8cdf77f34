//! Names of the operator's own for models, and rules that say which servers a model goes to.
//!
//! A client asks for `gpt-4o`; servers are asked for what that stands for, the answer names `gpt-4o` again, and the header
//! `X-Olol-Model` tells the truth. An exact name goes before a pattern, and a longer pattern before a shorter one. An exact
//! name goes before a model that is really called so; a pattern is for names that no server has. What a name stands for is
//! not looked up again. That holds where a model is asked or shown, not where models are changed: pull, push, create, copy
//! and delete mean what they say.
//!
//! The first rule that fits a call says which servers come first, or are the only ones, and how much each of them gets.
//!
//! Belongs outside `queue` and whatever chooses by the model: they must know which one is really asked for. And inside
//! `auth` and `timeout`: what a client may ask, and how long, is said of the names that it uses.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{self, HeaderMap};
use http::{HeaderName, Method};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use tower::{Layer, Service};

use crate::call::{Answer, Call, Chunk, Head, Reply};
use crate::cluster::Snapshot;
use crate::error::Error;
use crate::instruments::UseMeter;
use crate::listing;
use crate::names::ModelName;
use crate::pattern::{Pattern, spellings};
use crate::rename;
use crate::route::Route;
use crate::tiers::Tiers;
use crate::trail::Fact;

/// The longest list of models that names are added to, bytes.
const LONGEST_LIST: usize = 64 << 20;

/// The `[alias]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Whether lists of models show the exact names, too.
    pub list: bool,
    /// Names, and what they stand for.
    pub models: Names,
    /// Which servers a call goes to; the first that fits counts.
    pub rules: Vec<Rule>,
}

impl Default for Config {
    fn default() -> Self {
        Self { list: true, models: Names::default(), rules: Vec::new() }
    }
}

impl Config {
    /// Whether nothing is configured.
    pub fn is_empty(&self) -> bool {
        self.models.0.is_empty() && self.rules.is_empty()
    }

    /// Finds what no type can hold: names that cannot stand for what they should, rules that say nothing.
    pub fn check(&self) -> Result<(), Fault> {
        let mut keys = HashMap::new();
        for (name, targets) in &self.models.0 {
            let fault = |what| Fault { at: At::Name(name.as_str().to_owned()), what };
            if let Some(twin) = keys.insert(key_of(name), name) {
                return Err(fault(format!("'{twin}' is the same name")));
            }
            for target in &targets.0 {
                check_target(name, target).map_err(fault)?;
            }
        }
        for (at, rule) in self.rules.iter().enumerate() {
            rule.check().map_err(|what| Fault { at: At::Rule(at), what })?;
        }
        Ok(())
    }
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub at: At,
    /// What.
    pub what: String,
}

/// A part of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// A name in the table of names.
    Name(String),
    /// A rule, by its place.
    Rule(usize),
}

/// Names and patterns, and what each stands for: the `[alias.models]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(transparent)]
pub struct Names(BTreeMap<Pattern, Targets>);

/// What a name is looked up by: as a canonical name, or in lower case where Ollama would not take it.
fn key_of(name: &Pattern) -> Box<str> {
    let text = name.as_str();
    ModelName::parse(text).map_or_else(|| text.to_ascii_lowercase().into(), |name| name.as_str().into())
}

/// Whether a name can stand for a target.
fn check_target(name: &Pattern, target: &str) -> Result<(), String> {
    let stars = name.stars();
    let mut rest = target;
    while let Some((_, after)) = rest.split_once('$') {
        let number = after.bytes().next().map_or(0, |digit| usize::from(digit.wrapping_sub(b'0')));
        if !(1..=9).contains(&number) {
            return Err(format!("it cannot stand for '{target}': behind '$' comes the number of a '*', 1 to 9"));
        }
        if number > stars {
            return Err(format!("it cannot stand for '{target}': it has {stars} '*', so there is no '${number}'"));
        }
        rest = after;
    }
    if ModelName::parse(&expanded(target, &["x"; 9])).is_none() {
        return Err(format!("it cannot stand for '{target}', which is no name of a model"));
    }
    Ok(())
}

/// The models that a name stands for: the first that some server has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Targets(Vec<Arc<str>>);

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OneOrMore;
        impl<'de> Visitor<'de> for OneOrMore {
            type Value = Targets;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a model, or a list of such names")
            }

            fn visit_str<E: de::Error>(self, one: &str) -> Result<Targets, E> {
                Ok(Targets(vec![one.into()]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Targets, A::Error> {
                let mut targets = Vec::new();
                while let Some(target) = list.next_element::<String>()? {
                    targets.push(target.into());
                }
                if targets.is_empty() { Err(de::Error::invalid_length(0, &self)) } else { Ok(Targets(targets)) }
            }
        }
        from.deserialize_any(OneOrMore)
    }
}

/// Which servers the calls go to that it fits. What is left out of the first three keys fits every call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// Models, as clients name them or as servers are asked for them.
    pub models: Vec<Pattern>,
    /// Names of keys.
    pub keys: Vec<Pattern>,
    /// Headers that must be there, and their values.
    pub headers: BTreeMap<String, Pattern>,
    /// What the rule is called in messages; empty: by its number.
    pub name: String,
    /// The servers.
    pub servers: Vec<Pattern>,
    /// Servers in groups, instead: one of a group is asked when no server of the groups before has room.
    pub tiers: Vec<Vec<Pattern>>,
    /// Whether others are asked when none of those has room.
    pub mode: Mode,
    /// How much more servers get than one of weight one; those that are left out keep their weights.
    pub weights: BTreeMap<Pattern, NonZeroU32>,
}

/// How strictly a rule means its servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// They come first.
    #[default]
    Prefer,
    /// Nobody else is asked.
    Demand,
}

impl Rule {
    /// What messages call it.
    pub fn title(&self, at: usize) -> String {
        if self.name.is_empty() { (at + 1).to_string() } else { self.name.clone() }
    }

    fn check(&self) -> Result<(), String> {
        if !self.servers.is_empty() && !self.tiers.is_empty() {
            return Err("it must have 'servers' or 'tiers', not both: 'servers' is the same as one tier".to_owned());
        }
        let names_servers = !self.servers.is_empty() || !self.tiers.is_empty();
        if !names_servers && self.mode == Mode::Demand {
            return Err("who demands must say which 'servers' or 'tiers'".to_owned());
        }
        if !names_servers && self.weights.is_empty() {
            return Err("it must say something of servers: 'servers', 'tiers' or 'weights'".to_owned());
        }
        if self.tiers.iter().any(Vec::is_empty) {
            return Err("there is a tier without servers".to_owned());
        }
        match self.headers.keys().find(|name| HeaderName::from_bytes(name.as_bytes()).is_err()) {
            Some(name) => Err(format!("'{name}' is no name of a header")),
            None => Ok(()),
        }
    }
}

/// Puts [`Alias`] around a service.
#[derive(Clone, Debug)]
pub struct AliasLayer {
    book: Arc<Book>,
}

impl AliasLayer {
    /// Names and rules as configured.
    pub fn new(config: &Config) -> Self {
        Self { book: Arc::new(Book::new(config)) }
    }
}

impl<S> Layer<S> for AliasLayer {
    type Service = Alias<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Alias { inner, book: self.book.clone() }
    }
}

/// Puts models in the place of names, and follows the rules.
#[derive(Clone, Debug)]
pub struct Alias<S> {
    inner: S,
    book: Arc<Book>,
}

impl<S> Service<Call> for Alias<S>
where
    S: Service<Call, Response = Reply, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        let (head, snapshot) = (call.head.clone(), call.candidates.snapshot().clone());
        if self.book.extends(&head) {
            return Box::pin(listed(self.book.clone(), snapshot, head, self.inner.call(call)));
        }
        match self.book.apply(&mut call) {
            Ok(Some(served)) if !call.dry => Box::pin(renamed(head, served, self.inner.call(call))),
            Ok(_) => Box::pin(self.inner.call(call)),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

async fn renamed(
    head: Arc<Head>,
    served: Arc<str>,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error> {
    Ok(rename::answer(answer.await?, &head, &served).await)
}

/// Shows the exact names in a list of models.
async fn listed(
    book: Arc<Book>,
    snapshot: Arc<Snapshot>,
    head: Arc<Head>,
    answer: impl Future<Output = Result<Reply, Error>>,
) -> Result<Reply, Error> {
    let mut reply = answer.await?;
    let names = book.names(&snapshot);
    if names.is_empty() || !reply.status.is_success() || reply.headers.contains_key(header::CONTENT_ENCODING) {
        return Ok(reply);
    }
    if head.method == Method::HEAD {
        // Nobody knows how long the list would be.
        reply.headers.remove(header::CONTENT_LENGTH);
        return Ok(reply);
    }
    let mut chunks = reply.body.take_chunks();
    let (mut read, mut length) = (Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        length += chunk.as_ref().map_or(LONGEST_LIST + 1, |chunk| chunk.bytes.len());
        read.push(chunk);
        if length > LONGEST_LIST {
            reply.body = reply.body.through(|_| futures_util::stream::iter(read).chain(chunks));
            return Ok(reply);
        }
    }
    let parts: Vec<Bytes> = read.into_iter().flatten().map(|chunk| chunk.bytes).collect();
    let list = match <[Bytes; 1]>::try_from(parts) {
        Ok([list]) => list,
        Err(parts) => parts.concat().into(),
    };
    let further: Vec<listing::Further<'_>> = names.iter().map(|(name, model)| (&**name, model)).collect();
    let made = listing::with_names(head.route, &list, &further).unwrap_or(list);
    if reply.headers.contains_key(header::CONTENT_LENGTH) {
        reply.headers.insert(header::CONTENT_LENGTH, made.len().into());
    }
    let length = reply.body.length().map(|_| made.len() as u64);
    reply.body = reply.body.through(|_| futures_util::stream::iter([Ok(Chunk::from(made))])).with_length(length);
    Ok(reply)
}

/// Names and rules, ready to be looked up.
#[derive(Debug)]
struct Book {
    list: bool,
    /// By canonical name; by the name in lower case, where that is no name that Ollama would take.
    exact: HashMap<Box<str>, Entry>,
    /// The longest first.
    patterns: Vec<Entry>,
    rules: Vec<Fit>,
}

/// A name, and what it stands for.
#[derive(Debug)]
struct Entry {
    name: Pattern,
    targets: Vec<Target>,
    meter: UseMeter,
}

#[derive(Debug)]
struct Target {
    text: Arc<str>,
    /// The model; `None` if it depends on what a `*` stands for.
    model: Option<ModelName>,
}

/// A rule, and the calls that it fits.
#[derive(Debug)]
struct Fit {
    models: Vec<Pattern>,
    keys: Vec<Pattern>,
    headers: Vec<(HeaderName, Pattern)>,
    tiers: Arc<Tiers>,
    meter: UseMeter,
}

/// What servers are asked for.
type Wanted = (Arc<str>, ModelName);

impl Book {
    fn new(config: &Config) -> Self {
        let (exact, mut patterns): (Vec<Entry>, Vec<Entry>) =
            config.models.0.iter().map(|(name, targets)| Entry::new(name, targets)).partition(|it| it.name.is_plain());
        patterns.sort_by_key(|entry| std::cmp::Reverse(entry.name.weight()));
        Self {
            list: config.list,
            exact: exact.into_iter().map(|entry| (key_of(&entry.name), entry)).collect(),
            patterns,
            rules: config.rules.iter().enumerate().map(|(at, rule)| Fit::new(at, rule)).collect(),
        }
    }

    /// Whether the answer is a list that shows more names.
    fn extends(&self, head: &Head) -> bool {
        matches!(head.route, Route::Tags | Route::V1Models) && self.list && !self.exact.is_empty() && !head.dry
    }

    /// The exact names that lead to a model that some server has.
    fn names(&self, snapshot: &Snapshot) -> Vec<(Arc<str>, ModelName)> {
        let mut names: Vec<_> = self
            .exact
            .values()
            .filter_map(|entry| Some((entry.name.shared(), entry.wanted(snapshot, &[])?.1)))
            .filter(|(_, model)| snapshot.known(model).is_some())
            .collect();
        names.sort_unstable();
        names
    }

    /// Changes a call as the names and rules say. Returns what servers are asked for, if that is something else.
    fn apply(&self, call: &mut Call) -> Result<Option<Arc<str>>, Error> {
        if !(call.route.infers() || matches!(call.route, Route::Show | Route::V1Model)) {
            return Ok(None);
        }
        let mut served = None;
        if let Some((entry, (text, model))) = self.find(call)
            && call.model.as_ref() != Some(&model)
        {
            let facts = [("name", Fact::Text(entry.name.shared())), ("model", Fact::Text(text.clone()))];
            if rename::request(call, &text) {
                call.note("alias", "asks for another model", facts);
                if !call.dry {
                    entry.meter.used();
                }
                served = Some(text);
            } else {
                call.note("alias", "the body is too long to name another model", facts);
            }
        }
        // An unload is for every server that has the model in memory.
        if let Some(fit) = self.rules.iter().find(|fit| fit.fits(call)).filter(|_| !call.peek.unloads()) {
            if !call.dry {
                fit.meter.used();
            }
            follow(&fit.tiers, call)?;
        }
        Ok(served)
    }

    /// What a call's model stands for.
    fn find(&self, call: &Call) -> Option<(&Entry, Wanted)> {
        let named = call.peek.model.as_deref().filter(|named| !named.is_empty())?;
        let snapshot = call.candidates.snapshot();
        let exact = match &call.model {
            Some(model) => self.exact.get(model.as_str()),
            None => self.exact.get(named.to_ascii_lowercase().as_str()),
        };
        if let Some(entry) = exact {
            return Some((entry, entry.wanted(snapshot, &[])?));
        }
        let canonical = call.model.as_ref().map_or(named, ModelName::as_str);
        let mut matching = self.patterns.iter().filter_map(|entry| {
            let captures = spellings(canonical).find_map(|text| entry.name.captures(text))?;
            Some((entry, entry.wanted(snapshot, &captures)?))
        });
        let found = matching.next()?;
        // A pattern is for names that nobody has.
        let is_real = call.model.as_ref().is_some_and(|model| snapshot.known(model).is_some());
        (!is_real).then_some(found)
    }
}

impl Entry {
    fn new(name: &Pattern, targets: &Targets) -> Self {
        let target = |text: &Arc<str>| Target {
            model: if text.contains('$') { None } else { ModelName::parse(text) },
            text: text.clone(),
        };
        let meter = UseMeter::alias(name.shared());
        Self { name: name.clone(), targets: targets.0.iter().map(target).collect(), meter }
    }

    /// The first target that a server has which takes calls; else the first that any has; else the first.
    fn wanted(&self, snapshot: &Snapshot, captures: &[&str]) -> Option<Wanted> {
        if let [only] = self.targets.as_slice() {
            return only.wanted(captures);
        }
        let targets = self.targets.iter().filter_map(|target| target.wanted(captures));
        let is_usable = |at: usize| snapshot.servers.get(at).is_some_and(|server| server.is_usable());
        targets.min_by_key(|(_, model)| match snapshot.known(model) {
            Some(known) if known.installed.iter().any(is_usable) => 0,
            Some(_) => 1,
            None => 2,
        })
    }
}

impl Target {
    fn wanted(&self, captures: &[&str]) -> Option<Wanted> {
        if let Some(model) = &self.model {
            return Some((self.text.clone(), model.clone()));
        }
        let text = expanded(&self.text, captures);
        let model = ModelName::parse(&text)?;
        Some((text.into(), model))
    }
}

/// A text with what its `$1` to `$9` stand for.
fn expanded(text: &str, captures: &[&str]) -> String {
    let mut parts = text.split('$');
    let mut made = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let number = part.bytes().next().map_or(0, |digit| usize::from(digit.wrapping_sub(b'0')));
        made.push_str(captures.get(number.wrapping_sub(1)).copied().unwrap_or_default());
        made.push_str(part.get(1..).unwrap_or_default());
    }
    made
}

impl Fit {
    fn new(at: usize, rule: &Rule) -> Self {
        let header =
            |(name, value): (&String, &Pattern)| Some((HeaderName::from_bytes(name.as_bytes()).ok()?, value.clone()));
        let tiers = if rule.servers.is_empty() { rule.tiers.clone() } else { vec![rule.servers.clone()] };
        let weights = rule.weights.iter().map(|(pattern, weight)| (pattern.clone(), *weight)).collect();
        let is_demand = rule.mode == Mode::Demand;
        let title: Arc<str> = rule.title(at).into();
        Self {
            meter: UseMeter::rule(title.clone()),
            models: rule.models.clone(),
            keys: rule.keys.clone(),
            headers: rule.headers.iter().filter_map(header).collect(),
            tiers: Arc::new(Tiers::new(title, tiers, weights, is_demand)),
        }
    }

    fn fits(&self, call: &Call) -> bool {
        self.fits_model(call) && self.fits_key(call) && self.fits_headers(&call.headers)
    }

    fn fits_model(&self, call: &Call) -> bool {
        let (named, asked) = (&call.model, &call.place.model);
        let models = [named, if named == asked { &None } else { asked }];
        let is_meant = |pattern: &Pattern| models.into_iter().flatten().any(|model| pattern.matches_model(model));
        self.models.is_empty() || self.models.iter().any(is_meant)
    }

    fn fits_key(&self, call: &Call) -> bool {
        let key = call.key.get();
        self.keys.is_empty() || key.is_some_and(|key| self.keys.iter().any(|pattern| pattern.matches(&key.name)))
    }

    fn fits_headers(&self, headers: &HeaderMap) -> bool {
        let has = |(name, pattern): &(HeaderName, Pattern)| {
            headers.get_all(name).iter().any(|value| value.to_str().is_ok_and(|value| pattern.matches(value)))
        };
        self.headers.iter().all(has)
    }
}

/// Lets a call go where a rule says.
fn follow(tiers: &Arc<Tiers>, call: &mut Call) -> Result<(), Error> {
    let found = tiers.of(call.candidates.snapshot());
    if tiers.is_demand() {
        call.candidates.keep(found.every());
    }
    let decision = match (tiers.is_demand(), tiers.is_ordered()) {
        (true, _) => "a rule demands servers",
        (false, true) => "a rule prefers servers",
        (false, false) => "a rule weighs servers",
    };
    let facts = [("rule", Fact::Text(tiers.rule().clone())), ("candidates", call.candidates.count().into())];
    call.note("alias", decision, facts);
    if call.candidates.is_empty() && !call.candidates.snapshot().servers.is_empty() {
        let (rule, wanted) = (tiers.rule(), tiers.wanted());
        return Err(Error::NoServer(format!("rule '{rule}' demands {wanted}, and there is no such server")));
    }
    call.tiers = Some(tiers.clone());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Payload;
    use crate::keys::Key;
    use crate::peek::Peek;
    use crate::rename::SERVED;
    use crate::testing::{self, ask};
    use crate::{Cluster, ServerId};
    use http::uri::PathAndQuery;
    use http::{HeaderValue, StatusCode};

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap_or_else(|error| panic!("{error}"))
    }

    fn error(text: &str) -> String {
        toml::from_str::<Config>(text).unwrap_err().to_string()
    }

    fn call_of(cluster: &Cluster, route: Route, body: &str) -> Call {
        let payload = Payload::from_bytes(body.to_owned());
        let Payload::Whole(pieces) = &payload else { unreachable!() };
        let peek = Peek::json(pieces);
        let model = peek.model.as_deref().and_then(ModelName::parse);
        let path = PathAndQuery::from_static("/api/x");
        let head = Head { peek, model, ..Head::new(route, Method::POST, path) };
        Call::new(head, payload, cluster.snapshot().all())
    }

    fn chat(cluster: &Cluster, model: &str) -> Call {
        let body = serde_json::json!({"messages": [{"content": "hi"}], "model": model});
        call_of(cluster, Route::Chat, &body.to_string())
    }

    /// What servers would be asked for: the model, and the body.
    fn asked(call: Call) -> (String, String) {
        let edits = call.edits.map(|edits| edits.body).unwrap_or_default();
        let Payload::Whole(pieces) = call.payload.edited(&edits) else { unreachable!() };
        let model = call.place.model.map(|model| model.to_string()).unwrap_or_default();
        (model, String::from_utf8(pieces.concat()).unwrap())
    }

    /// The model that a name leads to.
    async fn leads(config: &Config, models: &[&[&str]], name: &str) -> String {
        let cluster = testing::cluster(models).await;
        let mut call = chat(&cluster, name);
        let served = Book::new(config).apply(&mut call).unwrap();
        let (place, body) = asked(call);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let sent = body["model"].as_str().unwrap().to_owned();
        assert_eq!(served.as_deref().unwrap_or(name), sent);
        assert!(ModelName::parse(&sent).is_none_or(|sent| sent.as_str() == place));
        sent
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_stands_for_a_model_and_the_answer_keeps_it() {
        let cluster = testing::cluster(&[&["llama3.3:70b"]]).await;
        let layer = AliasLayer::new(&config("[models]\n\"gpt-4o\" = \"llama3.3:70b\""));
        let (mut service, mut inner) = testing::spawn(&layer);
        let answer = ask(&mut service, chat(&cluster, "GPT-4o"));
        let (call, respond) = inner.next_request().await.unwrap();
        let trail = serde_json::to_value(call.trail.take()).unwrap();
        assert_eq!(trail[0]["facts"], serde_json::json!({"name": "gpt-4o", "model": "llama3.3:70b"}));
        assert_eq!(
            asked(call),
            ("llama3.3:70b".to_owned(), r#"{"messages":[{"content":"hi"}],"model":"llama3.3:70b"}"#.to_owned())
        );
        respond.send_response(testing::reply("{\"model\":\"llama3.3:70b\",\"done\":true}"));
        let reply = answer.await.unwrap();
        assert_eq!(reply.headers[SERVED], "llama3.3:70b");
        assert_eq!(reply.body.collect(99).await.unwrap(), "{\"model\":\"GPT-4o\",\"done\":true}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_name_that_says_most_counts() {
        let config = config(
            r#"
            [models]
            "gpt-4o" = "exact"
            "gpt-*" = "short"
            "gpt-4*" = "long"
            "mine-*" = "$1"
            "*-of-*" = "$2:$1"
            "a@b" = "odd"
            "#,
        );
        let models: &[&[&str]] = &[&["gpt-oss:20b", "exact", "gpt-4o"]];
        for (name, wanted) in [
            ("gpt-4o", "exact"),
            ("GPT-4o:latest", "exact"),
            ("gpt-4o-mini", "long"),
            ("gpt-5:pro", "short"),
            ("mine-llama3.2", "llama3.2"),
            ("mine-llama3.2:1b", "llama3.2:1b"),
            ("q4_0-of-llama", "llama:q4_0"),
            ("A@b", "odd"),
            ("other", "other"),
            // A pattern is for names that nobody has.
            ("gpt-oss:20b", "gpt-oss:20b"),
            ("gpt-oss:120b", "short"),
        ] {
            assert_eq!(leads(&config, models, name).await, wanted, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_several_models_the_first_that_somebody_has_is_asked_for() {
        let config = config("[models]\nbest = [\"qwen3:32b\", \"llama3.2\", \"tiny\"]");
        assert_eq!(leads(&config, &[&["tiny", "llama3.2"]], "best").await, "llama3.2");
        assert_eq!(leads(&config, &[&["tiny"], &["qwen3:32b"]], "best").await, "qwen3:32b");
        assert_eq!(leads(&config, &[&["other"]], "best").await, "qwen3:32b", "the refusal is Ollama's own");
        let cluster = testing::cluster(&[&["qwen3:32b"], &["tiny"]]).await;
        cluster.check_failed(0, "gone".to_owned(), 1);
        cluster.catch_up().await;
        let mut call = chat(&cluster, "best");
        assert_eq!(Book::new(&config).apply(&mut call).unwrap().as_deref(), Some("tiny"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_models_means_what_it_says() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let book =
            Book::new(&config("[models]\nmine = \"tiny\"\n[[rules]]\nservers = [\"nobody\"]\nmode = \"demand\""));
        for route in Route::ALL {
            let mut call = call_of(&cluster, route, "{\"name\":\"mine\"}");
            let concerns = route.infers() || matches!(route, Route::Show | Route::V1Model);
            assert_eq!(book.apply(&mut call).is_err(), concerns, "{route:?}");
            assert_eq!(call.edits.is_some(), concerns, "{route:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_still_coming_passes() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let mut call = chat(&cluster, "mine");
        call.payload = Payload::Stream { length: None, pieces: Box::pin(futures_util::stream::empty()) };
        assert_eq!(Book::new(&config("[models]\nmine = \"tiny\"")).apply(&mut call).unwrap(), None);
        assert!(call.edits.is_none());
    }

    async fn followed(
        rules: &str,
        call: impl FnOnce(&Cluster) -> Call,
    ) -> Result<(Vec<String>, Option<Arc<Tiers>>), Error> {
        let cluster = testing::cluster(&[&["tiny"], &["tiny", "big:70b"], &["tiny", "big:70b"]]).await;
        let mut call = call(&cluster);
        Book::new(&config(rules)).apply(&mut call)?;
        Ok((call.candidates.iter().map(|server| server.id.to_string()).collect(), call.tiers))
    }

    #[tokio::test(start_paused = true)]
    async fn a_rule_demands_or_prefers_servers() {
        let demand = "[models]\nmine = \"big:70b\"\n[[rules]]\nname = \"r\"\nmodels = [\"*:70b\"]\nservers = [\"1\", \"x*\"]\nmode = \"demand\"";
        let (left, tiers) = followed(demand, |cluster| chat(cluster, "mine")).await.unwrap();
        assert_eq!((left, &**tiers.unwrap().rule()), (vec!["1".to_owned()], "r"));
        let (left, tiers) = followed(demand, |cluster| chat(cluster, "tiny")).await.unwrap();
        assert!(left.len() == 3 && tiers.is_none());
        let prefer = demand.replace("demand", "prefer").replace("*:70b", "mine");
        let (left, tiers) = followed(&prefer, |cluster| chat(cluster, "mine")).await.unwrap();
        assert!(left.len() == 3 && tiers.is_some(), "a rule may name what clients say");
        let unload = r#"{"model":"mine","keep_alive":0}"#;
        let (left, _) = followed(demand, |cluster| call_of(cluster, Route::Generate, unload)).await.unwrap();
        assert_eq!(left.len(), 3, "an unload is for all");
    }

    #[tokio::test(start_paused = true)]
    async fn a_demand_that_nobody_meets_is_told() {
        let rules = "[[rules]]\nservers = [\"gone-*\", \"x\"]\nmode = \"demand\"";
        let error = followed(rules, |cluster| chat(cluster, "tiny")).await.unwrap_err();
        assert_eq!((error.status(), error.kind()), (StatusCode::SERVICE_UNAVAILABLE, "no-server"));
        let text = "no server can answer now: rule '1' demands gone-*, x, and there is no such server";
        assert_eq!(error.to_string(), text);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rule_may_be_about_keys_and_headers_and_the_first_that_fits_counts() {
        let rules = r#"
            [[rules]]
            name = "interns"
            keys = ["intern-*"]
            servers = ["0"]
            [[rules]]
            name = "blue"
            headers = { x-team = "blue*" }
            weights = { "1" = 3 }
            [[rules]]
            name = "all"
            tiers = [["2"], ["1"]]
        "#;
        let rule = |key: Option<&'static str>, team: &'static str| async move {
            let call = |cluster: &Cluster| {
                let mut call = chat(cluster, "tiny");
                let head = Arc::get_mut(&mut call.head).unwrap();
                head.headers.insert("x-team", HeaderValue::from_static(team));
                if let Some(key) = key {
                    head.key.set(Arc::new(Key { name: key.into(), ..Key::default() })).unwrap();
                }
                call
            };
            followed(rules, call).await.unwrap().1.unwrap().rule().to_string()
        };
        assert_eq!(rule(Some("intern-7"), "blue").await, "interns");
        assert_eq!(rule(Some("ada"), "blue team").await, "blue");
        assert_eq!(rule(None, "red").await, "all");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dry_call_is_decided_and_its_answer_left_alone() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let (mut service, mut inner) = testing::spawn(&AliasLayer::new(&config("[models]\nmine = \"tiny\"")));
        let mut call = chat(&cluster, "mine");
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        let answer = ask(&mut service, call);
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!((call.trail.take().len(), asked(call).0), (1, "tiny:latest".to_owned()));
        respond.send_response(testing::reply("{\"model\":\"tiny\"}"));
        assert_eq!(answer.await.unwrap().body.collect(99).await.unwrap(), "{\"model\":\"tiny\"}");
    }

    #[tokio::test(start_paused = true)]
    async fn lists_show_the_names_that_lead_somewhere() {
        let cluster = testing::cluster(&[&["tiny"]]).await;
        let names = "[models]\nmine = \"tiny\"\nbest = [\"gone\", \"tiny\"]\nlost = \"gone\"\n\"x*\" = \"tiny\"";
        let list = r#"{"models":[{"name":"tiny:latest"}]}"#;
        for (names, wanted) in [
            (names.to_owned(), r#"{"models":[{"name":"tiny:latest"},{"name":"best"},{"name":"mine"}]}"#),
            (format!("list = false\n{names}"), list),
        ] {
            let (mut service, mut inner) = testing::spawn(&AliasLayer::new(&config(&names)));
            let answer = ask(&mut service, call_of(&cluster, Route::Tags, ""));
            let mut reply = testing::reply(list);
            reply.headers.insert("content-length", list.len().into());
            reply.body.outcome_mut().absent.push(ServerId::new("1"));
            inner.next_request().await.unwrap().1.send_response(reply);
            let reply = answer.await.unwrap();
            assert_eq!(reply.headers["content-length"], *wanted.len().to_string());
            assert_eq!((reply.body.length(), reply.body.outcome().absent.len()), (Some(wanted.len() as u64), 1));
            assert_eq!(reply.body.collect(999).await.unwrap(), wanted);
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, why) in [
            ("[models]\n\"a b\" = \"c\"", "'a b' is no name"),
            ("[models]\na = []", "expected the name of a model, or a list of such names"),
            ("[models]\na = 7", "expected the name of a model, or a list of such names"),
            ("[[rules]]\nmode = \"must\"", "`prefer` or `demand`"),
            ("[[rules]]\nweights = { a = 0 }", "nonzero"),
            ("[[rules]]\nserver = [\"a\"]", "unknown field `server`"),
        ] {
            let error = error(text);
            assert!(error.contains(why) && error.contains("line"), "{text}\n{error}");
        }
        let name = |name: &str| At::Name(name.to_owned());
        for (text, at, why) in [
            ("[models]\na = \"b c\"", name("a"), "it cannot stand for 'b c', which is no name of a model"),
            ("[models]\n\"a-*\" = \"$2\"", name("a-*"), "it has 1 '*', so there is no '$2'"),
            ("[models]\n\"a-*\" = \"$x\"", name("a-*"), "behind '$' comes the number of a '*', 1 to 9"),
            ("[models]\na = \"x\"\n\"A:latest\" = \"y\"", name("a"), "'A:latest' is the same name"),
            ("[[rules]]\nservers = [\"a\"]\ntiers = [[\"b\"]]", At::Rule(0), "'servers' or 'tiers', not both"),
            ("[[rules]]\nservers = [\"a\"]\n[[rules]]\nmode = \"demand\"", At::Rule(1), "who demands must say which"),
            ("[[rules]]\nmodels = [\"a\"]", At::Rule(0), "it must say something of servers"),
            ("[[rules]]\ntiers = [[]]", At::Rule(0), "there is a tier without servers"),
            ("[[rules]]\nservers = [\"a\"]\nheaders = { \"a b\" = \"c\" }", At::Rule(0), "no name of a header"),
        ] {
            let fault = config(text).check().unwrap_err();
            assert!(fault.at == at && fault.what.contains(why), "{text}\n{fault:?}");
        }
    }

    #[test]
    fn a_configuration_reads_back_as_it_was() {
        let config = config("[models]\nmine = \"tiny\"\n\"a-*\" = [\"$1\"]\n[[rules]]\nweights = { a = 3 }");
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
}
