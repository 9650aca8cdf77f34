//! Several servers look like one: their lists are one list, and what changes models is told to all that it concerns.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use harness::olol::{chat, keep_alive};
use harness::store::hex;
use harness::{Answer, Cluster, Ending, Gate, Olol, Request, Server, Step, Way, answers, until};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::{Duration, Instant};

#[tokio::test]
async fn models_of_all_servers_are_one_list_newest_first() {
    for way in Way::BOTH {
        let (_cluster, olol) = three_servers(way).await;
        assert_eq!(olol.get("/api/tags").await.names(), ["new:q4", "both:latest", "old:latest"], "{way:?}");
        assert_eq!(olol.get("/v1/models").await.names(), ["new:q4", "both:latest", "old:latest"]);
    }
}

#[tokio::test]
async fn models_in_memory_are_one_list() {
    for way in Way::BOTH {
        let (_cluster, olol) = three_servers(way).await;
        let mut names = olol.get("/api/ps").await.names();
        names.sort();
        assert_eq!(names, ["both:latest", "new:q4"], "{way:?}");
    }
}

#[tokio::test]
async fn the_lowest_version_is_what_the_cluster_can_do() {
    let (cluster, olol) = three_servers(Way::Http).await;
    cluster.server(0).is_version("0.33.0");
    cluster.server(1).is_version("0.9.10");
    cluster.server(2).is_version("0.33.0-rc2");
    assert_eq!(olol.get("/api/version").await.text(), r#"{"version":"0.9.10"}"#);
}

#[tokio::test]
async fn a_list_has_the_headers_of_a_single_server() {
    let (_cluster, olol) = three_servers(Way::Http).await;
    let tags = olol.get("/api/tags").await;
    assert_eq!((tags.status, tags.header("content-type")), (200, "application/json; charset=utf-8"));
    let models = olol.get("/v1/models").await;
    assert_eq!((models.header("content-type"), models.text().ends_with("]}\n")), ("application/json", true));
    let head = olol.ask(&Request::new("HEAD", "/api/tags")).await;
    assert_eq!((head.status, head.ending), (200, Ending::NoBody));
}

#[tokio::test]
async fn a_silent_server_is_left_out_after_a_second_and_named() {
    for way in Way::BOTH {
        let (cluster, olol) = three_servers(way).await;
        cluster.server(2).is_silent();
        let before = Instant::now();
        let tags = olol.get("/api/tags").await;
        assert_eq!(
            (tags.names().as_slice(), tags.header("x-olol-partial")),
            (&names(["both", "old"])[..], "2"),
            "{way:?}"
        );
        assert!(before.elapsed() < Duration::from_millis(2500), "{:?}", before.elapsed());
    }
}

#[tokio::test]
async fn a_dead_server_is_left_out_at_once_and_named() {
    let (cluster, olol) = three_servers(Way::Http).await;
    cluster.server(2).dies();
    let tags = olol.get("/api/tags").await;
    assert_eq!((tags.names().as_slice(), tags.header("x-olol-partial")), (&names(["both", "old"])[..], "2"));
}

#[tokio::test]
async fn when_every_server_is_silent_the_list_is_an_error() {
    let (cluster, olol) = three_servers(Way::Http).await;
    for server in cluster.servers() {
        server.is_silent();
    }
    let tags = olol.get("/api/tags").await;
    assert_eq!((tags.status, tags.header("x-olol-reason")), (503, "no-server"));
}

#[tokio::test]
async fn a_list_of_many_servers_is_whole_without_all_being_asked() {
    let cluster = Cluster::of(66).await.all_have("tiny");
    cluster.server(42).has("rare");
    let olol = Olol::start(&cluster, "").await;
    let tags = olol.get("/api/tags").await;
    assert_eq!((sorted(tags.names()), tags.header("x-olol-partial")), (names(["rare", "tiny"]), ""));
    let is_of_a_list = |seen: &harness::Seen| seen.headers.get("x-olol-hop").is_some();
    let asked = cluster.servers().iter().filter(|server| server.seen("/api/tags").iter().any(is_of_a_list)).count();
    assert!(asked <= 2, "{asked}");
    // Who was needed is silent, or gone: another is asked, and what nobody else has is missing.
    cluster.server(42).dies();
    let tags = olol.get("/api/tags").await;
    assert_eq!((sorted(tags.names()), tags.header("x-olol-partial")), (names(["tiny"]), "42"));
    // What comes to a bare server is found by those who ask for lists.
    cluster.server(7).has("new");
    while !olol.get("/api/tags").await.names().contains(&"new:latest".to_owned()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_bytes_of_a_single_server_pass_unchanged() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way);
        let body = "{ \"models\" : [ {\"name\":\"a\",\"future\":1} ] }\n";
        cluster.server(0).on("GET", "/api/tags", answers::whole(200, "application/json; charset=utf-8", body));
        let olol = Olol::launch(&cluster, "").await;
        olol.is_up().await;
        assert_eq!(olol.get("/api/tags").await.text(), body, "{way:?}");
    }
}

#[tokio::test]
async fn fields_of_tomorrow_come_through_a_merged_list() {
    let (cluster, olol) = three_servers(Way::Http).await;
    let body = r#"{"models":[{"name":"z","modified_at":"2030-01-01T00:00:00Z","future":{"n":1e400}}]}"#;
    cluster.server(0).on("GET", "/api/tags", answers::whole(200, "application/json", body));
    assert!(olol.get("/api/tags").await.text().contains(r#""future":{"n":1e400}"#));
}

#[tokio::test]
async fn status_keeps_ollamas_keys_and_adds_ours() {
    let (_cluster, olol) = three_servers(Way::Http).await;
    let status = olol.get("/api/status").await.json();
    assert_eq!(status["cloud"]["disabled"], true);
    assert_eq!((&status["olol"]["servers"]["total"], &status["olol"]["servers"]["up"]), (&json!(3), &json!(3)));
}

#[tokio::test]
async fn a_pull_at_all_servers_is_one_valid_stream() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way);
        let olol = Olol::start(&cluster, "").await;
        let pulled = olol.ask(&pull("tiny")).await;
        assert_eq!(
            (pulled.status, pulled.header("content-type"), pulled.ending),
            (200, "application/x-ndjson", Ending::LastChunk)
        );
        let statuses = statuses(&pulled);
        assert_eq!(
            (statuses.first(), statuses.last()),
            (Some(&"pulling manifest".into()), Some(&"success".into())),
            "{way:?}"
        );
        assert_eq!(statuses.iter().filter(|status| *status == "success").count(), 1);
        let done: Vec<u64> = pulled.lines().iter().filter_map(|line| line["completed"].as_u64()).collect();
        assert!(done.is_sorted(), "progress never goes back: {done:?}");
        assert!(cluster.servers().iter().all(|server| server.still_has("tiny")));
    }
}

#[tokio::test]
async fn a_pull_is_over_when_its_slowest_server_is_and_as_far_as_the_mean() {
    let cluster = Cluster::of(2).await;
    let gate = Gate::closed();
    cluster.server(1).on("POST", "/api/pull", pulls_behind(&gate));
    let olol = Olol::start(&cluster, "").await;
    let mut pulling = olol.begin(&pull("tiny")).await;
    pulling.head().await;
    assert_eq!(pulling.line().await["status"], "pulling manifest");
    until("the quick server is done", || cluster.server(0).still_has("tiny")).await;
    loop {
        let line = pulling.line().await;
        assert!(line["completed"].as_u64() <= Some(50), "half of it is at one of two: {line}");
        if line["completed"] == 50 {
            break;
        }
    }
    assert!(pulling.is_quiet().await, "the other has not moved");
    gate.open();
    let (lines, ending) = pulling.rest().await;
    let last: Value = serde_json::from_slice(lines.last().unwrap()).unwrap();
    assert_eq!((&last["status"], ending), (&json!("success"), Ending::LastChunk));
}

#[tokio::test]
async fn a_pull_that_fails_somewhere_says_where() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        let full = [json!({"status": "pulling manifest"}), json!({"error": "no space left on device"})];
        cluster.server(1).on("POST", "/api/pull", lines(&full));
        let olol = Olol::start(&cluster, "").await;
        let pulled = olol.ask(&pull("tiny")).await;
        assert_eq!((pulled.status, pulled.error().as_str()), (200, "server 1: no space left on device"), "{way:?}");
        assert!(!statuses(&pulled).contains(&"success".into()));
        assert!(cluster.server(0).still_has("tiny"), "the others have it all the same");
    }
}

#[tokio::test]
async fn a_disk_that_is_full_is_left_out_where_it_need_not_fit_and_another_takes_its_place() {
    for way in Way::BOTH {
        for replicas in ["fits", "1"] {
            let cluster = Cluster::of(3).await.over(way);
            let full =
                [json!({"status": "pulling manifest"}), json!({"error": "write /m/blobs/x: no space left on device"})];
            for server in [0, 1] {
                cluster.server(server).on("POST", "/api/pull", lines(&full));
            }
            let olol = Olol::start(&cluster, "").await;
            let pulled = olol.ask(&pull("tiny").header("X-Olol-Replicas", replicas)).await;
            assert_eq!(statuses(&pulled).last(), Some(&"success".into()), "{way:?} {replicas}: {}", pulled.text());
            assert_eq!(having(&cluster, "tiny"), [false, false, true], "{way:?} {replicas}");
        }
    }
}

#[tokio::test]
async fn a_pull_that_a_server_refuses_says_which() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        cluster.server(1).fails("POST", "/api/pull", 500, "mkdir /models: read-only file system");
        let olol = Olol::start(&cluster, "").await;
        let pulled = olol.ask(&pull("tiny")).await;
        assert_eq!(
            (pulled.status, pulled.error().as_str()),
            (200, "server 1: mkdir /models: read-only file system"),
            "{way:?}"
        );
        // Who copies is heard of when the head is out.
        let absent = if way == Way::Http { "1" } else { "" };
        assert_eq!((pulled.header("x-olol-partial"), having(&cluster, "tiny")), (absent, vec![true, false]));
    }
}

#[tokio::test]
async fn a_pull_that_fails_everywhere_alike_has_ollamas_words() {
    let cluster = Cluster::of(2).await;
    for server in cluster.servers() {
        server.on("POST", "/api/pull", lines(&[json!({"error": "pull model manifest: file does not exist"})]));
    }
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(olol.ask(&pull("nosuch")).await.error(), "pull model manifest: file does not exist");
}

#[tokio::test]
async fn a_server_that_dies_in_a_pull_is_named() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        let mut steps = pulls_behind(&Gate::closed());
        steps.truncate(2);
        steps.push(Step::HangUp);
        cluster.server(1).on("POST", "/api/pull", steps);
        let olol = Olol::start(&cluster, "").await;
        let pulled = olol.ask(&pull("tiny")).await;
        assert!(pulled.error().starts_with("server 1 failed while"), "{way:?}: {}", pulled.text());
        assert_eq!(pulled.ending, Ending::LastChunk);
    }
}

#[tokio::test]
async fn a_server_that_is_down_takes_no_part_in_a_pull_and_is_named() {
    let cluster = Cluster::of(2).await;
    let olol = Olol::start(&cluster, "pool.check-interval-ms = 50").await;
    cluster.server(1).dies();
    until("the proxy knows", || !olol.is_server_up(1)).await;
    let pulled = olol.ask(&pull("tiny")).await;
    assert_eq!((pulled.status, statuses(&pulled).last()), (200, Some(&"success".into())));
    assert_eq!(pulled.header("x-olol-partial"), "1");
}

#[tokio::test]
async fn a_pull_without_stream_is_one_object() {
    let cluster = Cluster::of(2).await;
    let olol = Olol::start(&cluster, "").await;
    let pulled = olol.ask(&Request::post("/api/pull", r#"{"model":"tiny","stream":false}"#)).await;
    assert_eq!((pulled.status, pulled.text().as_str()), (200, r#"{"status":"success"}"#));
    assert!(cluster.servers().iter().all(|server| server.still_has("tiny")));
}

#[tokio::test]
async fn a_pulled_model_can_be_used_at_once() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        let olol = Olol::start(&cluster, "").await;
        olol.ask(&pull("tiny")).await;
        assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world", "{way:?}");
    }
}

#[tokio::test]
async fn a_delete_reaches_everybody_who_has_the_model() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("other");
        cluster.server(0).has("tiny");
        cluster.server(2).has("tiny");
        let olol = Olol::start(&cluster, "").await;
        let deleted = olol.ask(&delete("tiny")).await;
        assert_eq!((deleted.status, deleted.text().as_str(), deleted.header("content-type")), (200, "", ""), "{way:?}");
        assert!(cluster.servers().iter().all(|server| !server.still_has("tiny")));
        assert_eq!(cluster.server(1).seen("/api/delete").len(), 1, "what is known may be old: everybody is told");
    }
}

#[tokio::test]
async fn a_delete_of_what_nobody_has_is_refused_in_ollamas_words() {
    let cluster = Cluster::of(2).await.all_have("other");
    let olol = Olol::start(&cluster, "").await;
    let deleted = olol.ask(&delete("nosuch")).await;
    assert_eq!((deleted.status, deleted.error().as_str()), (404, "model 'nosuch' not found"));
}

#[tokio::test]
async fn a_delete_that_fails_somewhere_says_where() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have("tiny");
        cluster.server(1).fails("DELETE", "/api/delete", 500, "read-only file system");
        let olol = Olol::start(&cluster, "").await;
        let deleted = olol.ask(&delete("tiny")).await;
        assert_eq!((deleted.status, deleted.error().as_str()), (500, "read-only file system"), "{way:?}");
        assert_eq!(deleted.header("x-olol-partial"), "1");
    }
}

#[tokio::test]
async fn a_copy_is_made_where_the_model_is() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("tiny");
        cluster.server(1).lost("tiny");
        let olol = Olol::start(&cluster, "").await;
        let copied = olol.ask(&Request::post("/api/copy", r#"{"source":"tiny","destination":"twin"}"#)).await;
        assert_eq!((copied.status, copied.text().as_str()), (200, ""), "{way:?}");
        assert_eq!(having(&cluster, "twin"), [true, false, true]);
    }
}

#[tokio::test]
async fn an_unload_reaches_every_server_that_has_the_model_in_memory() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        let unloaded = olol.ask(&keep_alive("tiny", 0)).await;
        assert_eq!((unloaded.status, &unloaded.json()["done_reason"]), (200, &json!("unload")), "{way:?}");
        assert!(cluster.servers().iter().all(|server| server.holds().1.is_empty()));
    }
}

#[tokio::test]
async fn a_create_runs_where_its_base_is() {
    let cluster = Cluster::of(3).await.all_have("base");
    cluster.server(1).lost("base");
    let olol = Olol::start(&cluster, "").await;
    let created = olol.ask(&Request::post("/api/create", r#"{"model":"mine","from":"base","system":"x"}"#)).await;
    assert_eq!((created.status, statuses(&created).last().cloned()), (200, Some("success".into())));
    assert_eq!(having(&cluster, "mine"), [true, false, true]);
}

#[tokio::test]
async fn a_blob_is_uploaded_once_and_given_to_every_server_that_creates() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        let olol = Olol::start(&cluster, "").await;
        let (digest, path, bytes) = blob(3 << 20);
        assert_eq!(olol.ask(&Request::new("HEAD", &path)).await.status, 404);
        assert_eq!(olol.ask(&Request::post(&path, &bytes).chunked()).await.status, 201);
        assert_eq!(olol.ask(&Request::new("HEAD", &path)).await.status, 200);
        assert_eq!(olol.ask(&Request::post(&path, &bytes)).await.status, 200, "it is there already");
        let create = json!({"model": "mine", "files": {"a.gguf": digest}});
        let created = olol.ask(&Request::post("/api/create", create)).await;
        assert_eq!(statuses(&created).last(), Some(&"success".into()), "{way:?}: {}", created.text());
        for server in cluster.servers() {
            let given = server.seen(&path).into_iter().find(|seen| seen.method == "POST").expect("the blob");
            assert!(server.still_has("mine") && given.body == bytes.as_bytes(), "{way:?}");
        }
    }
}

#[tokio::test]
async fn a_create_goes_on_where_its_blobs_could_be_given() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        let olol = Olol::start(&cluster, "").await;
        let (digest, path, bytes) = blob(100);
        cluster.server(1).fails("POST", &path, 500, "no space left on device");
        olol.ask(&Request::post(&path, &bytes)).await;
        let created =
            olol.ask(&Request::post("/api/create", json!({"model": "mine", "files": {"a.gguf": digest}}))).await;
        assert!(
            created.status == 200 && created.error().starts_with("server 1 did not take"),
            "{way:?}: {}",
            created.text()
        );
        assert_eq!((created.header("x-olol-partial"), having(&cluster, "mine")), ("1", vec![true, false]));
    }
}

#[tokio::test]
async fn a_blob_that_is_not_what_it_says_is_refused_in_ollamas_words() {
    let cluster = Cluster::of(2).await;
    let olol = Olol::start(&cluster, "").await;
    let (digest, path, _) = blob(10);
    let refused = olol.ask(&Request::post(&path, "something else")).await;
    let got = hex(&Sha256::digest("something else"));
    assert_eq!(
        (refused.status, refused.error()),
        (400, format!("digest mismatch, expected \"{digest}\", got \"sha256:{got}\""))
    );
    let refused = olol.ask(&Request::post("/api/blobs/sha256:12", "x")).await;
    assert_eq!((refused.status, refused.error().as_str()), (400, "invalid digest format"));
    assert!(olol.spooled().is_empty());
}

#[tokio::test]
async fn a_blob_beyond_the_spool_is_refused_and_leaves_nothing() {
    let cluster = Cluster::of(2).await;
    let olol = Olol::start(&cluster, "spool.max-bytes = 100000").await;
    let (_, path, bytes) = blob(200_000);
    let refused = olol.ask(&Request::post(&path, bytes)).await;
    assert_eq!((refused.status, refused.header("x-olol-reason")), (507, "storage"), "{}", refused.text());
    until("the part is removed", || olol.spooled().is_empty()).await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let cluster = Cluster::of(2).await;
    let olol = Olol::start(&cluster, "").await;
    let (_, path, _) = blob(10);
    let mut client = olol.connect().await;
    client.write(format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf").as_bytes()).await;
    until("the spool has a part", || !olol.spooled().is_empty()).await;
    drop(client);
    until("the part is removed", || olol.spooled().is_empty()).await;
}

#[tokio::test]
async fn a_change_is_known_at_once() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        olol.ask(&delete("tiny")).await;
        assert_eq!(olol.ask(&chat("tiny", "hi")).await.status, 404, "{way:?}");
        assert_eq!(olol.get("/api/tags").await.names(), Vec::<String>::new());
    }
}

/// Servers with the models `old`; `both`; `both` and `new:q4`, the last two in memory at the last one.
async fn three_servers(way: Way) -> (Cluster, Olol) {
    let cluster = Cluster::of(3).await.over(way);
    cluster.server(0).has_since("old", "2026-01-01T00:00:01Z");
    cluster.server(1).has_since("both", "2026-01-01T00:00:02Z").has_since("old", "2026-01-01T00:00:01Z");
    cluster.server(2).has_since("both", "2026-01-01T00:00:02Z").has_since("new:q4", "2026-01-01T00:00:03Z");
    cluster.server(1).keeps_loaded("both");
    cluster.server(2).keeps_loaded("both").keeps_loaded("new:q4");
    let olol = Olol::start(&cluster, "").await;
    (cluster, olol)
}

fn names<const N: usize>(short: [&str; N]) -> Vec<String> {
    short.map(harness::store::full).to_vec()
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

fn pull(model: &str) -> Request {
    Request::post("/api/pull", json!({"model": model}))
}

fn delete(model: &str) -> Request {
    Request::new("DELETE", "/api/delete").with_body(json!({"model": model}))
}

fn statuses(answer: &Answer) -> Vec<String> {
    answer.lines().iter().filter_map(|line| line["status"].as_str().map(str::to_owned)).collect()
}

fn having(cluster: &Cluster, model: &str) -> Vec<bool> {
    cluster.servers().iter().map(|server: &Server| server.still_has(model)).collect()
}

/// A stream of these lines.
fn lines(values: &[Value]) -> Vec<Step> {
    answers::chunked("application/x-ndjson", values.iter().map(|value| format!("{value}\n").into_bytes()))
}

/// A pull that goes on after its first line when the gate lets it.
fn pulls_behind(gate: &Gate) -> Vec<Step> {
    let mut steps = lines(&[
        json!({"status": "pulling manifest"}),
        json!({"status": "verifying sha256 digest"}),
        json!({"status": "success"}),
    ]);
    steps.insert(2, Step::Wait(gate.clone()));
    steps
}

/// A blob of so many bytes: its digest, its path, and itself.
fn blob(length: usize) -> (String, String, String) {
    let bytes = "olol ".repeat(length / 5);
    let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
    let path = format!("/api/blobs/{digest}");
    (digest, path, bytes)
}
