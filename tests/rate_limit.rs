//! Limits as clients meet them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::{chat, chat_at_once, keep_alive, v1_chat};
use harness::{Answer, Cluster, Gate, Olol, Request, Way};
use olol_proto::v1::server_client::ServerClient;
use tonic::transport::{Channel, Endpoint};

/// A proxy with these limits in front of a server that has the model `tiny`.
async fn limited(toml: &str) -> (Cluster, Olol) {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, toml).await;
    (cluster, olol)
}

async fn grpc(olol: &Olol) -> ServerClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", olol.address())).unwrap();
    ServerClient::new(harness::patiently("a gRPC connection", endpoint.connect()).await.unwrap())
}

fn number(answer: &Answer, header: &str) -> u64 {
    answer.header(header).parse().unwrap_or_else(|_| panic!("{header}: {:?}", answer.headers))
}

#[tokio::test]
async fn a_client_that_asks_too_often_is_told_when_to_come_back() {
    let (cluster, olol) = limited("[rate-limit.client]\nrequests-per-minute = 2").await;
    for left in [1, 0] {
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, number(&answer, "x-ratelimit-remaining")), (200, left));
        assert_eq!(number(&answer, "x-ratelimit-limit"), 2);
        assert!((1..=60).contains(&number(&answer, "x-ratelimit-reset")));
    }
    let asked = cluster.server(0).work();
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.header("x-olol-reason")), (429, "rate-limited"));
    assert!(
        answer.error().starts_with("rate limit reached: 2 requests a minute for this address"),
        "{}",
        answer.text()
    );
    assert!((1..=30).contains(&number(&answer, "retry-after")));
    assert_eq!((number(&answer, "x-ratelimit-limit"), number(&answer, "x-ratelimit-remaining")), (2, 0));
    assert_eq!(cluster.server(0).work(), asked);
}

#[tokio::test]
async fn a_dashboard_takes_nothing_from_who_asks_models() {
    let (_cluster, olol) = limited("[rate-limit.client]\nrequests-per-minute = 2").await;
    for _ in 0..10 {
        for path in ["/api/status", "/api/status?detail=servers", "/healthz"] {
            assert_eq!(olol.get(path).await.status, 200, "{path}");
        }
    }
    for left in [1, 0] {
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, number(&answer, "x-ratelimit-remaining")), (200, left));
    }
    assert_eq!((olol.chat("tiny", "hi").await.status, olol.get("/api/status").await.status), (429, 200));
}

#[tokio::test]
async fn a_refusal_has_the_form_of_its_route() {
    let (_cluster, olol) = limited("[rate-limit.client]\nrequests-per-minute = 1").await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let answer = olol.ask(&v1_chat("tiny", "hi")).await;
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (429, &"rate_limit_error".into()));
    let messages = Request::post("/v1/messages", r#"{"model":"tiny","max_tokens":9,"messages":[]}"#);
    let answer = olol.ask(&messages).await;
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (429, &"rate_limit_error".into()));
    assert_eq!(olol.get("/api/tags").await.status, 429);
}

#[tokio::test]
async fn a_stream_that_overshoots_its_budget_is_the_last_for_a_while() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "[rate-limit.client]\ntokens-per-minute = 5").await;
        // Seven, as the server counts them.
        let answer = olol.chat("tiny", "hi").await;
        assert_eq!((answer.status, number(&answer, "x-ratelimit-limit-tokens")), (200, 5));
        let answer = olol.ask(&chat_at_once("tiny", "hi")).await;
        assert_eq!(answer.status, 429, "{way:?}");
        assert!(answer.error().contains("5 tokens a minute for this address"), "{}", answer.text());
        assert!((50..=60).contains(&number(&answer, "retry-after")));
        // Nothing but tokens is limited, and these take none.
        assert_eq!(olol.get("/api/tags").await.status, 200);
        assert_eq!(olol.ask(&keep_alive("tiny", 0)).await.status, 200);
    }
}

#[tokio::test]
async fn a_running_answer_counts_until_its_last_byte_or_until_its_client_leaves() {
    let (cluster, olol) = limited("[rate-limit.models.\"ti*\"]\nconcurrent = 1").await;
    let gate = Gate::closed();
    cluster.server(0).is_paced_by(&gate);
    let mut first = olol.begin(&chat("tiny", "hi")).await;
    gate.let_through(1);
    first.head().await;
    first.line().await;
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!(answer.status, 429);
    assert!(answer.error().contains("1 request at the same time for model ti*"), "{}", answer.text());
    drop(first);
    cluster.server(0).saw_cancel().await;
    gate.open();
    harness::patiently("the place is free", async {
        while olol.chat("tiny", "hi").await.status != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
}

#[tokio::test]
async fn only_a_trusted_proxy_says_who_asks() {
    let limits = "[rate-limit.client]\nrequests-per-minute = 1\n";
    let from = |list: &str| Request::get("/api/version").header("X-Forwarded-For", list);
    let (_cluster, olol) = limited(&format!("{limits}[proxy]\ntrusted-proxies = [\"127.0.0.0/8\"]")).await;
    for (list, status) in [
        ("203.0.113.1", 200),
        ("203.0.113.2", 200),
        ("203.0.113.1", 429),
        // What a client makes up stands in front of what the proxy has seen.
        ("198.51.100.9, 203.0.113.1", 429),
        ("2001:db8::1, 127.0.0.2", 200),
        ("2001:db8::2", 429),
    ] {
        assert_eq!(olol.ask(&from(list)).await.status, status, "{list}");
    }
    let (_cluster, olol) = limited(limits).await;
    for (list, status) in [("203.0.113.1", 200), ("203.0.113.2", 429)] {
        assert_eq!(olol.ask(&from(list)).await.status, status, "{list}");
    }
}

#[tokio::test]
async fn a_client_that_speaks_grpc_is_the_same_client() {
    let (_cluster, olol) = limited("[rate-limit.client]\nrequests-per-minute = 2").await;
    let mut client = grpc(&olol).await;
    let show = || olol_proto::v1::ShowModelRequest { model: "tiny".to_owned(), ..Default::default() };
    assert!(client.show_model(show()).await.is_ok());
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let status = client.show_model(show()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    assert!(status.message().contains("2 requests a minute for this address"), "{}", status.message());
}

#[tokio::test]
async fn what_is_written_into_a_message_does_not_say_who_asks() {
    use olol_proto::v1::{Header, RelayHead, RelayRequest};
    let limits = "[rate-limit.client]\nrequests-per-minute = 1\n[proxy]\ntrusted-proxies = [\"127.0.0.0/8\"]";
    let (_cluster, olol) = limited(limits).await;
    let mut client = grpc(&olol).await;
    let mut relay = async |message: &str, outer: &str| {
        let header = Header { name: "x-forwarded-for".to_owned(), value: message.as_bytes().to_vec().into() };
        let head = RelayHead {
            method: "GET".to_owned(),
            path: "/api/version".to_owned(),
            headers: vec![header],
            ..RelayHead::default()
        };
        let first = RelayRequest { head: Some(head), last: true, ..RelayRequest::default() };
        let mut request = tonic::Request::new(futures_util::stream::iter([first]));
        request.metadata_mut().insert("x-forwarded-for", outer.parse().unwrap());
        client.relay(request).await.map_or_else(|status| status.code(), |_| tonic::Code::Ok)
    };
    assert_eq!(relay("198.51.100.1", "203.0.113.1").await, tonic::Code::Ok);
    assert_eq!(relay("198.51.100.2", "203.0.113.1").await, tonic::Code::ResourceExhausted);
    assert_eq!(relay("198.51.100.2", "203.0.113.2").await, tonic::Code::Ok);
}

#[tokio::test]
async fn refusals_and_accounts_are_told_to_prometheus() {
    let (_cluster, olol) = limited("[rate-limit.client]\nrequests-per-minute = 1").await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    assert_eq!(olol.chat("tiny", "hi").await.status, 429);
    let page = olol.get("/metrics").await.text();
    let has = |name: &str, labels: [&str; 2]| {
        page.lines().any(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
    };
    assert!(has("olol_rate_limited_total{", ["scope=\"client\"", "kind=\"requests\""]), "{page}");
    assert!(has("olol_rate_limit_entries{", ["scope=\"client\"", ""]), "{page}");
}
