//! The layer as its neighbours see it. Time is paused.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use tokio::time::advance;

use super::*;
use crate::call::{Body, Chunk, Counters, Head};
use crate::keys::Key;
use crate::testing::{self, ask};
use crate::trail::Note;
use crate::{Cluster, ModelName, Peek, Stack};

/// Limits in front of a server of which the test says what it answers.
struct Limited {
    ledger: Arc<Ledger>,
    stack: Stack,
}

type Server = fn() -> Reply;

impl Limited {
    fn new(toml: &str, server: Server) -> Self {
        Self::over(Arc::default(), toml, server)
    }

    /// A stack over accounts that were there before: what a reload makes.
    fn over(ledger: Arc<Ledger>, toml: &str, server: Server) -> Self {
        let config: Config = toml::from_str(toml).unwrap_or_else(|error| panic!("{error}"));
        let inner = tower::service_fn(move |_call: Call| -> Answer { Box::pin(async move { Ok(server()) }) });
        let layer = RateLimitLayer::new(&config, ledger.clone(), Arc::default());
        Self { ledger, stack: Stack::new(layer.layer(Stack::new(inner))) }
    }

    fn reloaded(&self, toml: &str, server: Server) -> Self {
        Self::over(self.ledger.clone(), toml, server)
    }

    async fn ask(&self, call: Call) -> Result<Reply, Error> {
        self.stack.send(call).await
    }

    /// Asks and reads the answer to its end.
    async fn passes(&self, call: Call) -> bool {
        let Ok(reply) = self.ask(call).await else { return false };
        let _ = reply.body.collect(usize::MAX).await;
        true
    }

    /// When to ask again, and what is said.
    async fn refusal(&self, call: Call) -> (Duration, String) {
        let error = self.ask(call).await.unwrap_err();
        (error.retry_after().unwrap(), error.to_string())
    }

    fn accounts(&self) -> usize {
        self.ledger.keys.len() + self.ledger.clients.len()
    }
}

/// A call from an address, to which a test adds what it is about.
struct From(Head, Payload);

impl From {
    fn address(client: &str) -> Self {
        let peek = Peek { asks: true, ..Peek::default() };
        let client = Some(std::net::SocketAddr::new(client.parse().unwrap(), 7));
        let head = Head {
            client,
            peek,
            model: ModelName::parse("tiny"),
            ..Head::new(Route::Chat, Method::POST, PathAndQuery::from_static("/api/chat"))
        };
        Self(head, Payload::from_bytes("0123456789012345678901234567890123456789"))
    }

    fn key(name: &str, limits: Option<&str>) -> Self {
        let from = Self::address("10.0.0.1");
        let limits = limits.map(|text| toml::from_str(text).unwrap());
        let key = Key { id: name.to_uppercase().into(), name: name.into(), limits, ..Key::default() };
        from.0.key.set(Arc::new(key)).unwrap();
        from
    }

    fn to(mut self, model: &str) -> Self {
        self.0.model = ModelName::parse(model);
        self
    }

    fn on(self, route: Route) -> Self {
        Self(Head { route, ..self.0 }, self.1)
    }

    fn dry(self) -> Self {
        Self(Head { dry: true, ..self.0 }, self.1)
    }

    fn most(mut self, tokens: u64) -> Self {
        self.0.peek.max_tokens = Some(tokens);
        self
    }

    fn call(self) -> Call {
        Call::new(self.0, self.1, Cluster::new(Vec::new()).snapshot().all())
    }
}

fn anybody() -> Call {
    From::address("10.0.0.1").call()
}

/// A piece of an answer, as a stream has it.
#[expect(clippy::unnecessary_wraps, reason = "streams are made of results")]
fn chunk(end: Option<Counters>) -> Result<Chunk, Error> {
    Ok(Chunk { bytes: Bytes::from_static(b"{}\n"), end })
}

fn answer(chunks: impl futures_util::Stream<Item = Result<Chunk, Error>> + Send + 'static) -> Reply {
    Reply { status: StatusCode::OK, headers: HeaderMap::new(), body: Body::new(chunks) }
}

/// An answer of so many tokens, as its server counts them.
fn of_tokens(tokens: u64) -> Reply {
    let counters = Counters { prompt_tokens: 4, output_tokens: tokens - 4, ..Counters::default() };
    answer(futures_util::stream::iter([chunk(None), chunk(Some(counters))]))
}

/// An answer that never ends.
fn endless() -> Reply {
    answer(futures_util::stream::iter([chunk(None)]).chain(futures_util::stream::pending()))
}

fn hi() -> Reply {
    testing::reply("hi")
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn a_spent_client_is_told_when_to_come_back() {
    let limited = Limited::new("[client]\nrequests-per-minute = 6\nburst = 2", hi);
    let first = limited.ask(anybody()).await.unwrap();
    assert_eq!(first.headers["x-ratelimit-limit"], "2");
    assert_eq!(first.headers["x-ratelimit-remaining"], "1");
    assert_eq!(first.headers["x-ratelimit-reset"], "10");
    assert!(limited.passes(anybody()).await);
    let (wait, text) = limited.refusal(anybody()).await;
    assert_eq!(wait, seconds(10));
    assert_eq!(text, "rate limit reached: 6 requests a minute for this address; try again in 10 s");
    advance(Duration::from_millis(9_999)).await;
    assert!(!limited.passes(anybody()).await);
    advance(Duration::from_millis(1)).await;
    assert!(limited.passes(anybody()).await);
    assert!(!limited.passes(anybody()).await);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_limited_without_limits() {
    let limited = Limited::new("", hi);
    for _ in 0..100 {
        assert!(limited.ask(anybody()).await.unwrap().headers.is_empty());
    }
    assert_eq!(limited.accounts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_key_has_its_own_limits_or_those_of_all_keys() {
    let limited = Limited::new("[key]\nrequests-per-minute = 1\n[client]\nrequests-per-minute = 2", hi);
    let ada = || From::key("ada", Some("requests-per-minute = 3")).call();
    let bob = || From::key("bob", None).call();
    for (count, call) in [(3, &ada as &dyn Fn() -> Call), (1, &bob), (2, &anybody)] {
        for _ in 0..count {
            assert!(limited.passes(call()).await);
        }
        assert!(!limited.passes(call()).await);
    }
    assert!(limited.refusal(ada()).await.1.contains("3 requests a minute for key ada;"));
    // What a key is found by is told to nobody.
    assert!(!limited.refusal(ada()).await.1.contains("ADA"));
    assert!(limited.refusal(bob()).await.1.contains("1 request a minute for key bob;"));
    let free = || From::key("eve", Some("")).call();
    for _ in 0..10 {
        assert!(limited.passes(free()).await);
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_without_a_key_has_its_own_account() {
    let limited = Limited::new("[client]\nrequests-per-minute = 1", hi);
    for (address, passes) in [
        ("10.0.0.1", true),
        ("10.0.0.2", true),
        ("::ffff:10.0.0.1", false),
        ("2001:db8::1", true),
        ("2001:db8::2", false),
        ("2001:db8:0:1::1", true),
    ] {
        assert_eq!(limited.passes(From::address(address).call()).await, passes, "{address}");
    }
}

#[tokio::test(start_paused = true)]
async fn all_clients_share_the_limits_of_a_model() {
    let limited =
        Limited::new("[models.\"llama3*\"]\nrequests-per-minute = 2\n[models.\"*\"]\nrequests-per-minute = 3", hi);
    let ask = |client: &str, model: &str| limited.passes(From::address(client).to(model).call());
    assert!(ask("10.0.0.1", "llama3").await && ask("10.0.0.2", "llama3:70b").await);
    assert!(!ask("10.0.0.3", "llama3.2").await);
    // What one limit refused costs nothing at the other.
    assert!(ask("10.0.0.3", "tiny").await && !ask("10.0.0.3", "tiny").await);
    let (_, text) = limited.refusal(From::address("10.0.0.4").to("llama3").call()).await;
    assert!(text.contains("2 requests a minute for model llama3*"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn what_a_model_refuses_costs_a_key_nothing() {
    let limited = Limited::new("[key]\nrequests-per-minute = 3\n[models.tiny]\nrequests-per-minute = 1", hi);
    let ada = |model| From::key("ada", None).to(model).call();
    for passes in [true, false, false, false] {
        assert_eq!(limited.passes(ada("tiny")).await, passes);
    }
    for passes in [true, true, false] {
        assert_eq!(limited.passes(ada("big")).await, passes);
    }
}

#[tokio::test(start_paused = true)]
async fn what_runs_no_model_is_only_a_request() {
    let toml = "[client]\nrequests-per-minute = 5\nconcurrent = 1\ntokens-per-minute = 1\n[models.tiny]\nrequests-per-minute = 1";
    let limited = Limited::new(toml, endless);
    let running = limited.ask(anybody()).await.unwrap();
    let mut open = Vec::new();
    for route in [Route::Tags, Route::Show, Route::Pull, Route::Delete] {
        open.push(limited.ask(From::address("10.0.0.1").on(route).call()).await.unwrap());
    }
    assert!(!limited.passes(From::address("10.0.0.1").on(Route::Tags).call()).await);
    drop(running);
}

#[tokio::test(start_paused = true)]
async fn a_look_at_the_status_counts_nothing_and_is_never_refused() {
    let limited = Limited::new("[client]\nrequests-per-minute = 1", hi);
    let look = || From::address("10.0.0.1").on(Route::Status).call();
    for _ in 0..20 {
        assert!(limited.passes(look()).await);
    }
    assert_eq!(limited.accounts(), 0);
    assert!(limited.passes(From::address("10.0.0.1").call()).await);
    assert!(!limited.passes(From::address("10.0.0.1").call()).await && limited.passes(look()).await);
}

#[tokio::test(start_paused = true)]
async fn an_unload_counts_nothing() {
    let limited = Limited::new("[client]\nrequests-per-minute = 1\nconcurrent = 1", hi);
    for _ in 0..10 {
        let mut unload = From::address("10.0.0.1").on(Route::Generate);
        unload.0.peek = Peek { asks: false, keeps_not: true, ..Peek::default() };
        assert!(limited.passes(unload.call()).await);
    }
    assert_eq!(limited.accounts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_running_request_counts_until_its_body_ends() {
    let limited = Limited::new("[client]\nconcurrent = 2", || of_tokens(9));
    let (mut one, other) = (limited.ask(anybody()).await.unwrap(), limited.ask(anybody()).await.unwrap());
    let (wait, text) = limited.refusal(anybody()).await;
    assert_eq!(wait, seconds(1));
    assert!(text.contains("2 requests at the same time for this address"), "{text}");
    while one.body.next().await.is_some() {}
    let third = limited.ask(anybody()).await.unwrap();
    assert!(!limited.passes(anybody()).await);
    // A client that leaves.
    drop(other);
    assert!(limited.passes(anybody()).await);
    drop((one, third));
}

#[tokio::test(start_paused = true)]
async fn who_leaves_before_the_answer_makes_room() {
    let config = toml::from_str("[client]\nconcurrent = 1\ntokens-per-minute = 10").unwrap();
    let ledger: Arc<Ledger> = Arc::default();
    let (mut service, mut inner) = testing::spawn(&RateLimitLayer::new(&config, ledger.clone(), Arc::default()));
    let leaving = tokio::spawn(tower::ServiceExt::oneshot(service.clone(), anybody()));
    let held = inner.next_request().await.unwrap();
    assert!(ask(&mut service, anybody()).await.is_err());
    leaving.abort();
    assert!(leaving.await.unwrap_err().is_cancelled());
    let answer = ask(&mut service, anybody());
    inner.next_request().await.unwrap().1.send_error(Error::busy());
    // A call that failed makes room, too.
    assert!(matches!(answer.await, Err(Error::Busy { .. })));
    let answer = ask(&mut service, anybody());
    inner.next_request().await.unwrap().1.send_response(hi());
    assert!(answer.await.is_ok());
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_overshoots_its_budget_tenfold_is_the_last_for_a_while() {
    for scope in ["client", "models.tiny"] {
        let limited = Limited::new(&format!("[{scope}]\ntokens-per-minute = 100"), || of_tokens(1000));
        let reply = limited.ask(anybody()).await.unwrap();
        assert!(reply.headers["x-ratelimit-limit-tokens"] == "100" && !reply.headers.contains_key("x-ratelimit-limit"));
        reply.body.collect(99).await.unwrap();
        advance(seconds(7)).await;
        let (wait, text) = limited.refusal(anybody()).await;
        assert_eq!(wait, seconds(53));
        assert!(text.contains("100 tokens a minute for"), "{text}");
        advance(seconds(53)).await;
        assert!(limited.passes(anybody()).await);
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_are_charged_as_the_server_counts_them() {
    let limited = Limited::new("[client]\ntokens-per-minute = 20", || of_tokens(7));
    for _ in 0..3 {
        assert!(limited.passes(anybody()).await);
    }
    assert!(!limited.passes(anybody()).await);
    // One that is held is not freed as idle, with what it has learned, by whoever looks into its shard.
    let _held = limited.ledger.account(&Who::Client(Address::of(anybody().head.client)));
    advance(seconds(60)).await;
    let reply = limited.ask(anybody()).await.unwrap();
    // The estimate: a prompt of forty bytes, and three tokens as before.
    assert_eq!(reply.headers["x-ratelimit-remaining-tokens"], "7");
    drop(reply);
    // Nobody saw a token of it.
    let reply = limited.ask(anybody()).await.unwrap();
    assert_eq!(reply.headers["x-ratelimit-remaining-tokens"], "7");
    assert_eq!(reply.headers["x-ratelimit-reset-tokens"], "0s");
}

#[tokio::test(start_paused = true)]
async fn many_calls_at_once_are_no_way_around_a_budget() {
    let limited = Limited::new("[client]\ntokens-per-minute = 100", endless);
    let mut open = Vec::new();
    while let Ok(reply) = limited.ask(From::address("10.0.0.1").most(30).call()).await {
        open.push(reply);
    }
    // Forty each are reserved, and the third finds something left.
    assert_eq!(open.len(), 3);
    open.pop();
    assert!(limited.ask(From::address("10.0.0.1").most(30).call()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_dies_is_charged_for_what_was_seen() {
    fn dying() -> Reply {
        let broken = Err(testing::failure("0", crate::Phase::Streaming, false));
        answer(futures_util::stream::iter((0..50).map(|_| chunk(None)).chain([broken])))
    }
    let left = async |limited: &Limited| {
        let reply = limited.ask(anybody()).await.unwrap();
        let reset = reply.headers["x-ratelimit-reset-tokens"].to_str().unwrap().to_owned();
        let remaining: u64 = reply.headers["x-ratelimit-remaining-tokens"].to_str().unwrap().parse().unwrap();
        (remaining, reset)
    };
    let limited = Limited::new("[client]\ntokens-per-minute = 10000", dying);
    assert!(limited.passes(anybody()).await);
    // Fifty pieces and a prompt of ten tokens; and sixty are reserved for the call that asks.
    assert_eq!(left(&limited).await, (10_000 - 60 - 60, "60s".to_owned()));
    // A reader who goes early is charged for what he read.
    let limited = Limited::new("[client]\ntokens-per-minute = 10000", dying);
    let mut reply = limited.ask(anybody()).await.unwrap();
    for _ in 0..40 {
        reply.body.next().await;
    }
    drop(reply);
    assert_eq!(left(&limited).await.0, 10_000 - 50 - 50);
    // A refusal of the server costs no tokens.
    let limited = Limited::new("[client]\ntokens-per-minute = 10000", || testing::refusal("0"));
    assert!(limited.passes(anybody()).await);
    assert_eq!(left(&limited).await, (10_000 - 10 - 256, "0s".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn an_embedding_is_charged_for_its_prompt_alone() {
    fn numbers() -> Reply {
        answer(futures_util::stream::iter((0..100).map(|_| chunk(None))))
    }
    let limited = Limited::new("[client]\ntokens-per-minute = 30", numbers);
    let embed = || From::address("10.0.0.1").on(Route::Embeddings).call();
    for passes in [true, true, true, false] {
        assert_eq!(limited.passes(embed()).await, passes);
    }
}

#[tokio::test(start_paused = true)]
async fn a_long_stream_is_charged_while_it_runs() {
    fn slow() -> Reply {
        let pieces = futures_util::stream::unfold(0_u64, |count| async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let counters = Counters { prompt_tokens: 10, output_tokens: 3200, ..Counters::default() };
            (count < 3200).then(|| (chunk((count == 3199).then_some(counters)), count + 1))
        });
        answer(pieces)
    }
    let limited = Limited::new("[client]\ntokens-per-minute = 1000", slow);
    let mut reply = limited.ask(From::address("10.0.0.1").most(10).call()).await.unwrap();
    for _ in 0..1600 {
        reply.body.next().await.unwrap().unwrap();
    }
    // Six hundred in the last minute, of 1600: it is no overshooting, and others pass.
    let other = limited.ask(From::address("10.0.0.1").most(10).call()).await.unwrap();
    let left: u64 = other.headers["x-ratelimit-remaining-tokens"].to_str().unwrap().parse().unwrap();
    assert!((320..=420).contains(&left), "{left}");
    drop(other);
    while reply.body.next().await.is_some() {}
    let other = limited.ask(From::address("10.0.0.1").most(10).call()).await.unwrap();
    let left: u64 = other.headers["x-ratelimit-remaining-tokens"].to_str().unwrap().parse().unwrap();
    assert!((320..=420).contains(&left), "{left}");
}

#[tokio::test(start_paused = true)]
async fn a_day_has_its_own_budget() {
    let limited = Limited::new("[key]\ntokens-per-minute = 100\ntokens-per-day = 150", || of_tokens(80));
    let ada = || From::key("ada", None).call();
    assert!(limited.passes(ada()).await);
    advance(seconds(3600)).await;
    assert!(limited.passes(ada()).await);
    let (wait, text) = limited.refusal(ada()).await;
    assert_eq!(wait, seconds(23 * 3600));
    assert!(text.contains("150 tokens a day for key ada"), "{text}");
    advance(wait).await;
    assert!(limited.passes(ada()).await);
}

#[tokio::test(start_paused = true)]
async fn a_reload_gives_nobody_anything() {
    let limited =
        Limited::new("[client]\nrequests-per-minute = 4\nconcurrent = 2\n[models.tiny]\ntokens-per-day = 50", endless);
    let running = limited.ask(anybody()).await.unwrap();
    let reloaded = limited
        .reloaded("[client]\nrequests-per-minute = 6\nconcurrent = 1\n[models.tiny]\ntokens-per-day = 50", endless);
    assert!(reloaded.refusal(anybody()).await.1.contains("1 request at the same time"));
    drop(running);
    let left = reloaded.ask(anybody()).await.unwrap();
    assert_eq!(left.headers["x-ratelimit-remaining"], "4");
    drop((left, limited));
    let reloaded =
        reloaded.reloaded("[client]\nrequests-per-minute = 6\n[models.tiny]\ntokens-per-day = 50", || of_tokens(90));
    assert!(reloaded.passes(anybody()).await);
    // The model's budget is spent, and stays so without the layer that knew of it.
    let without = reloaded.reloaded("", hi);
    drop(reloaded);
    let raised = without.reloaded("[models.tiny]\ntokens-per-day = 70", hi);
    assert!(raised.refusal(anybody()).await.1.contains("70 tokens a day for model tiny:latest"));
}

#[tokio::test(start_paused = true)]
async fn who_only_asks_what_would_be_done_changes_nothing() {
    let toml = "[client]\nrequests-per-minute = 2\ntokens-per-day = 100\nconcurrent = 1";
    let limited = Limited::new(toml, || of_tokens(60));
    let explain = async || {
        let call = From::address("10.0.0.1").dry().call();
        let head = call.head.clone();
        let reply = limited.ask(call).await.unwrap();
        assert!(reply.headers.is_empty());
        head.trail.take().pop().unwrap()
    };
    let told = |note: Note| serde_json::to_value(note).unwrap();
    for _ in 0..1000 {
        let note = told(explain().await);
        assert_eq!(note["decision"], "within the limits");
        assert_eq!(note["facts"], serde_json::json!({"requests-left": 2, "tokens-left": 100}));
    }
    assert_eq!(limited.accounts(), 0);
    assert!(limited.passes(anybody()).await && limited.passes(anybody()).await);
    for _ in 0..1000 {
        let note = told(explain().await);
        assert_eq!(note["decision"], "would be refused");
        let wanted =
            serde_json::json!({"scope": "client", "of": "this address", "limit": "tokens-day", "wait": 86_400_000.0});
        assert_eq!(note["facts"], wanted);
    }
    advance(seconds(86_400)).await;
    assert!(limited.passes(anybody()).await);
}

#[tokio::test(start_paused = true)]
async fn a_trail_tells_what_was_left_or_what_was_met() {
    let limited = Limited::new("[key]\nrequests-per-minute = 1", hi);
    let mut notes = Vec::new();
    for _ in 0..2 {
        let call = From::key("ada", None).call();
        let head = call.head.clone();
        drop(limited.ask(call).await);
        notes.push(serde_json::to_value(head.trail.take()).unwrap());
    }
    assert_eq!(notes[0][0]["facts"], serde_json::json!({"requests-left": 0}));
    let wanted = serde_json::json!({"scope": "key", "of": "ada", "limit": "requests", "wait": 60_000.0});
    assert_eq!((&notes[1][0]["decision"], &notes[1][0]["facts"]), (&"refused".into(), &wanted));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_nobody_has_looked_into_is_counted_all_the_same() {
    let limited = Limited::new("[client]\ntokens-per-minute = 100", || of_tokens(200));
    let upload = || {
        let mut call = anybody();
        call.payload = Payload::Stream { length: None, pieces: Box::pin(futures_util::stream::empty()) };
        call
    };
    assert!(limited.passes(upload()).await && !limited.passes(upload()).await);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn refusals_are_counted_by_whose_limit_it_is() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let limited = Limited::new("[client]\nrequests-per-minute = 1\n[models.tiny]\nconcurrent = 1", endless);
    let running = limited.ask(anybody()).await;
    assert!(limited.ask(anybody()).await.is_err() && limited.ask(From::address("10.0.0.2").call()).await.is_err());
    drop(running);
    let mut counted: Vec<_> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .map(|(key, _, _, value)| {
            let labels: Vec<_> = key.key().labels().map(|label| label.value().to_owned()).collect();
            (key.key().name().to_owned(), labels.join(" "), value)
        })
        .collect();
    counted.sort_by(|one, other| one.1.cmp(&other.1));
    let name = "olol_rate_limited_total".to_owned();
    assert_eq!(
        counted,
        [
            (name.clone(), "client requests".to_owned(), DebugValue::Counter(1)),
            (name, "model concurrent".to_owned(), DebugValue::Counter(1)),
        ]
    );
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]

    /// Whatever clients do: no more run than may, and when all are gone everything is free.
    #[test]
    fn nothing_is_held_for_nobody(steps in proptest::collection::vec((0_u8..4, 0_usize..8), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let limited = Limited::new("[client]\nconcurrent = 3\ntokens-per-minute = 2000", || of_tokens(5));
            let mut open: Vec<Reply> = Vec::new();
            for (step, at) in steps {
                match step {
                    0 | 1 => open.extend(limited.ask(From::address("10.0.0.1").most(100).call()).await.ok()),
                    2 if at < open.len() => drop(open.swap_remove(at)),
                    _ => drop(open.pop().map(|reply| reply.body.collect(99))),
                }
                assert!(open.len() <= 3);
            }
            drop(open);
            let account = limited.ledger.clients.account(&Address::of(anybody().client), limited.ledger.now());
            advance(seconds(60)).await;
            assert!(account.idle_at() <= limited.ledger.now());
        });
    }
}
