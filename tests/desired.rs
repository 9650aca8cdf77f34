//! Models are where they are wanted, and servers that sleep are woken.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::time::Duration;

use harness::{Cluster, Olol, Process, Request, Server, Way, patiently, until};
use olol_middleware::vitals::Vitals;
use serde_json::{Value, json};

/// Looks often, and waits for nothing long.
const QUICK: &str = "pool = { check-interval-ms = 200, check-timeout-ms = 500, check-failures = 1 }\n\
    desired = { grace-s = 2, retry-s = 1 }\n";

async fn pin(olol: &Olol, model: &str, pin: &Value) {
    let request = Request::new("PUT", &format!("/api/status/models/{model}")).with_body(pin);
    let answer = olol.ask(&request).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Waits until what is told of a model is as it should be.
async fn told(olol: &Olol, model: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let looking = async {
        loop {
            let told = olol.model(model).await;
            if is_so(&told) {
                return told;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    patiently(what, looking).await
}

fn pulls(server: &Server) -> usize {
    server.seen("/api/pull").len()
}

#[tokio::test]
async fn a_lost_replica_is_made_again_elsewhere() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way);
        cluster.server(0).has("tiny");
        cluster.server(1).has("tiny");
        let wanted = format!("{QUICK}[[models]]\nname = \"tiny\"\nreplicas = 2\n");
        let olol = Olol::start(&cluster, &wanted).await;
        let are_there = |told: &Value| told["desired"]["held"] == json!(["0", "1"]);
        told(&olol, "tiny:latest", "it is known who has it", are_there).await;
        cluster.server(1).dies();
        until("it is brought to another server", || cluster.server(2).still_has("tiny")).await;
        let mended =
            told(&olol, "tiny:latest", "both are there", |told| told["desired"]["held"] == json!(["0", "2"])).await;
        assert_eq!((&mended["desired"]["why"], &mended["desired"]["source"]), (&Value::Null, &json!("file")));
        let counts: Vec<usize> = cluster.servers().iter().map(pulls).collect();
        assert_eq!(counts, [0, 0, 1], "{way:?}");
        let page = olol.get("/metrics").await.text();
        assert!(page.contains("olol_desired_replicas_held{model=\"tiny:latest\"} 2"), "{page}");
    }
}

#[tokio::test]
async fn what_was_on_its_way_to_a_server_that_went_is_brought_to_another() {
    let cluster = Cluster::of(3).await;
    cluster.server(0).has("tiny");
    let olol = Olol::start(&cluster, QUICK).await;
    olol.believes(1, Vitals { pending_pulls: vec![("tiny:latest".to_owned(), 0.5)], ..Vitals::default() });
    pin(&olol, "tiny", &json!({"replicas": 2})).await;
    told(&olol, "tiny:latest", "it is on its way", |told| told["desired"]["making"] == json!(["1"])).await;
    cluster.server(1).dies();
    until("it is brought to another server", || cluster.server(2).still_has("tiny")).await;
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_refused_with_the_reason() {
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny");
    let olol = Olol::start(&cluster, QUICK).await;
    olol.believes(1, Vitals { disk_free: Some(1 << 20), ..Vitals::default() });
    pin(&olol, "tiny", &json!({"replicas": "all"})).await;
    let refused = told(&olol, "tiny:latest", "it is refused", |told| told["desired"]["why"].is_string()).await;
    let why = refused["desired"]["refused"][0]["why"].as_str().unwrap();
    assert!(why.contains("the disk is too small: 1 MiB are free"), "{why}");
    assert_eq!((&refused["desired"]["refused"][0]["server"], pulls(cluster.server(1))), (&json!("1"), 0));
    olol.believes(1, Vitals { disk_free: Some(8 << 30), ..Vitals::default() });
    until("there is room now", || cluster.server(1).still_has("tiny")).await;
}

#[tokio::test]
async fn what_is_kept_loaded_is_loaded_and_again_after_a_restart() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let wanted = format!("{QUICK}[[models]]\nname = \"tiny\"\nreplicas = 2\nkeep-loaded = true\n");
    let olol = Olol::start(&cluster, &wanted).await;
    for server in cluster.servers() {
        server.has_in_memory("tiny").await;
    }
    let asked = cluster.server(0).seen("/api/generate");
    assert_eq!((&asked[0].json()["keep_alive"], &asked[0].json()["prompt"]), (&json!(-1), &Value::Null));
    cluster.server(0).forgets_its_memory();
    cluster.server(0).has_in_memory("tiny").await;
    told(&olol, "tiny:latest", "both are loaded", |told| told["desired"]["loaded"] == json!(["0", "1"])).await;
}

#[tokio::test]
async fn what_is_not_kept_loaded_any_more_may_leave() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, QUICK).await;
    pin(&olol, "tiny", &json!({"keep_loaded": true})).await;
    cluster.server(0).has_in_memory("tiny").await;
    told(&olol, "tiny:latest", "it is loaded", |told| told["desired"]["loaded"] == json!(["0"])).await;
    pin(&olol, "tiny", &json!({"keep_loaded": false})).await;
    let said = || cluster.server(0).seen("/api/generate").iter().any(|seen| seen.json()["keep_alive"] == "5m");
    until("it is told that it may", said).await;
}

#[tokio::test]
async fn what_was_in_memory_before_it_was_pinned_may_leave_when_it_is_not_any_more() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, QUICK).await;
    pin(&olol, "tiny", &json!({"keep_loaded": true})).await;
    let said =
        |what: Value| cluster.server(0).seen("/api/generate").iter().any(|seen| seen.json()["keep_alive"] == what);
    until("it is told to stay", || said(json!(-1))).await;
    assert_eq!(olol.ask(&Request::new("DELETE", "/api/status/models/tiny")).await.status, 200);
    until("it is told that it may leave", || said(json!("5m"))).await;
}

#[tokio::test]
async fn what_need_not_stay_in_memory_is_told_so_when_its_server_is_back() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, QUICK).await;
    pin(&olol, "tiny", &json!({"keep_loaded": true})).await;
    told(&olol, "tiny:latest", "it is in memory", |told| told["desired"]["loaded"] == json!(["0"])).await;
    cluster.server(0).is_silent();
    until("it is away", || !olol.is_server_up(0)).await;
    pin(&olol, "tiny", &json!({"keep_loaded": false})).await;
    cluster.server(0).speaks();
    let said = || cluster.server(0).seen("/api/generate").iter().any(|seen| seen.json()["keep_alive"] == "5m");
    until("it is told that it may", said).await;
}

#[tokio::test]
async fn two_proxies_over_the_same_servers_do_not_fight() {
    let cluster = Cluster::of(5).await;
    cluster.server(0).has("tiny");
    let wanted = format!("{QUICK}[[models]]\nname = \"tiny\"\nreplicas = 3\n");
    let (one, other) = tokio::join!(Olol::start(&cluster, &wanted), Olol::start(&cluster, &wanted));
    for olol in [&one, &other] {
        let are_there = |told: &Value| told["desired"]["held"].as_array().is_some_and(|held| held.len() >= 3);
        told(olol, "tiny:latest", "it is where it is wanted", are_there).await;
    }
    assert_eq!(cluster.servers().iter().filter(|server| server.still_has("tiny")).count(), 3);
}

#[tokio::test]
async fn a_create_leaves_out_who_has_the_base_and_does_not_answer() {
    let cluster = Cluster::of(2).await.all_have("base");
    let olol = Olol::start(&cluster, QUICK).await;
    cluster.server(1).dies();
    until("it is down", || !olol.is_server_up(1)).await;
    let answer = olol.ask(&Request::post("/api/create", json!({"model": "new", "from": "base"}))).await;
    assert_eq!((answer.status, answer.header("x-olol-partial")), (200, "1"), "{}", answer.text());
    assert_eq!(answer.lines().last().unwrap()["status"], "success");
    assert!(cluster.server(0).still_has("new"));
}

#[tokio::test]
async fn a_pin_survives_a_restart_and_goes_before_the_file() {
    let state = tempfile::tempdir().unwrap();
    let with = |more: &str| format!("{QUICK}sessions.dir = {:?}\n{more}", state.path());
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny");
    let olol = Olol::start(&cluster, &with("")).await;
    pin(&olol, "tiny", &json!({"replicas": 2, "servers": ["0", "none"]})).await;
    assert!(olol.stop().await);
    let more = Cluster::of(2).await;
    more.server(0).has("tiny");
    let olol = Olol::start(&more, &with("[[models]]\nname = \"tiny\"\nreplicas = \"all\"\n")).await;
    let is_pinned = |told: &Value| told["desired"]["source"] == "pin";
    let pinned = told(&olol, "tiny:latest", "it is still pinned", is_pinned).await;
    assert_eq!(
        (&pinned["desired"]["replicas"], &pinned["desired"]["servers"]),
        (&json!(2), &json!(["0", "none"])),
        "{pinned:#}"
    );
    let unpin = Request::new("DELETE", "/api/status/models/tiny");
    let answer = olol.ask(&unpin).await;
    assert_eq!((answer.status, &answer.json()["replicas"]), (200, &json!("all")));
    until("the file counts again", || more.server(1).still_has("tiny")).await;
    let answer = olol.ask(&unpin).await;
    assert_eq!(answer.status, 404);
    assert!(answer.error().contains("it stands in [[models]]"), "{}", answer.error());
}

#[tokio::test]
async fn what_a_client_deletes_does_not_come_back() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let olol = Olol::start(&cluster, &format!("{QUICK}[[models]]\nname = \"tiny\"\nreplicas = 2\n")).await;
    told(&olol, "tiny:latest", "it is wanted", |told| told["desired"]["held"] == json!(["0", "1"])).await;
    let delete = Request::new("DELETE", "/api/delete").with_body(json!({"model": "tiny"}));
    assert_eq!(olol.ask(&delete).await.status, 200);
    let deleted = told(&olol, "tiny:latest", "it is not wanted", |told| told["desired"]["replicas"] == 0).await;
    assert_eq!((&deleted["desired"]["source"], &deleted["desired"]["held"]), (&json!("pin"), &json!([])));
    assert_eq!(cluster.servers().iter().map(pulls).sum::<usize>(), 0);
    pin(&olol, "tiny", &json!({"replicas": 1})).await;
    until("it is wanted again", || cluster.servers().iter().any(|server| server.still_has("tiny"))).await;
}

#[tokio::test]
async fn what_went_everywhere_at_once_was_deleted_elsewhere() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let olol = Olol::start(&cluster, &format!("{QUICK}[[models]]\nname = \"tiny\"\nreplicas = 2\n")).await;
    told(&olol, "tiny:latest", "it is wanted", |told| told["desired"]["held"] == json!(["0", "1"])).await;
    // As another proxy does it.
    for server in cluster.servers() {
        server.lost("tiny");
    }
    let says_so = |told: &Value| told["desired"]["why"].as_str().is_some_and(|why| why.contains("it was deleted"));
    told(&olol, "tiny:latest", "that is noticed", says_so).await;
    assert_eq!(cluster.servers().iter().map(pulls).sum::<usize>(), 0);
}

#[tokio::test]
async fn what_fails_is_left_alone_for_a_while_and_said() {
    let cluster = Cluster::of(1).await;
    cluster.server(0).fails("POST", "/api/pull", 500, "pull model manifest: file does not exist");
    let olol = Olol::start(&cluster, &format!("{QUICK}[[models]]\nname = \"nobodys\"\n")).await;
    let has_failed = |told: &Value| told["desired"]["why"].as_str().is_some_and(|why| why.contains("failed"));
    let failed = told(&olol, "nobodys:latest", "it has failed", has_failed).await;
    let why = failed["desired"]["why"].as_str().unwrap();
    assert!(why.contains("file does not exist; it is tried again in"), "{why}");
    until("it is tried again", || pulls(cluster.server(0)) > 1).await;
}

#[tokio::test]
async fn a_reload_changes_what_is_wanted() {
    let cluster = Cluster::of(2).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("olol.toml");
    let servers = "proxy.servers = [\"a@http://127.0.0.1:1\", \"b@http://127.0.0.1:2\"]\n";
    let write = |more: &str| {
        let new = folder.path().join("new");
        std::fs::write(&new, format!("{servers}{QUICK}{more}")).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    write("");
    let olol = Olol::from_file(&cluster, &file).await;
    write("[[models]]\nname = \"tiny\"\nreplicas = \"all\"\nservers = [\"b\"]\n");
    until("it is brought", || cluster.server(1).still_has("tiny")).await;
    assert!(!cluster.server(0).still_has("tiny"));
    drop(olol);
}

#[cfg(unix)]
#[tokio::test]
async fn a_server_that_sleeps_is_woken_for_the_call_that_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let bell = folder.path().join("bell");
    let cluster = Cluster::of(2).await;
    cluster.server(0).has("tiny");
    cluster.server(1).has("big");
    let wake = format!("wake = {{ servers = {{ 1 = {{ command = [\"touch\", {bell:?}] }} }} }}\n");
    let olol = Olol::start(&cluster, &format!("{QUICK}{wake}")).await;
    cluster.server(1).is_silent();
    until("it sleeps", || !olol.is_server_up(1)).await;
    assert_eq!(olol.chat("tiny", "hi").await.said(), "Hello world");
    assert!(!bell.exists(), "it is let sleep for what others can do");
    let mut call = olol.begin(&harness::olol::chat("big", "hi")).await;
    until("it is woken", || bell.exists()).await;
    cluster.server(1).speaks();
    let answer = call.answer().await;
    assert_eq!((answer.status, answer.said().as_str()), (200, "Hello world"));
    assert!(olol.get("/metrics").await.text().contains("olol_wakes_total{result=\"sent\"}"));
}

#[cfg(unix)]
#[tokio::test]
async fn a_server_is_woken_also_when_the_client_that_needed_it_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let (hand, bell) = (folder.path().join("hand"), folder.path().join("bell"));
    let cluster = Cluster::of(1).await;
    cluster.server(0).has("big");
    let command = format!("touch {}; sleep 1; touch {}", hand.display(), bell.display());
    let wake = format!("wake = {{ servers = {{ 0 = {{ command = [\"sh\", \"-c\", {command:?}] }} }} }}\n");
    let olol = Olol::start(&cluster, &format!("{QUICK}{wake}")).await;
    cluster.server(0).is_silent();
    until("it sleeps", || !olol.is_server_up(0)).await;
    let call = olol.begin(&harness::olol::chat("big", "hi")).await;
    until("it is about to be woken", || hand.exists()).await;
    drop(call);
    until("it is woken", || bell.exists()).await;
}

#[cfg(unix)]
#[tokio::test]
async fn a_server_that_cannot_be_woken_is_not_waited_for() {
    let cluster = Cluster::of(2).await;
    cluster.server(1).has("big");
    let wake = "wake = { servers = { 1 = { command = [\"/nowhere/wake\"] } } }\n";
    let olol = Olol::start(&cluster, &format!("{QUICK}{wake}")).await;
    cluster.server(1).dies();
    until("it is down", || !olol.is_server_up(1)).await;
    assert_eq!(olol.chat("big", "hi").await.status, 502);
}

#[tokio::test]
async fn a_pull_names_the_servers_that_it_is_for() {
    let cluster = Cluster::of(3).await;
    let olol = Olol::start(&cluster, QUICK).await;
    let pull = |servers: &str| Request::post("/api/pull", json!({"model": "new"})).header("X-Olol-Servers", servers);
    let answer = olol.ask(&pull("0, 1, 0*")).await;
    assert_eq!(answer.lines().last().unwrap()["status"], "success", "{}", answer.text());
    assert_eq!(cluster.servers().iter().map(|server| server.still_has("new")).collect::<Vec<_>>(), [true, true, false]);
    for (servers, says) in [("0,9", "X-Olol-Servers: there is no server '9'"), ("gpu*", "no server fits 'gpu*'")] {
        let answer = olol.ask(&pull(servers)).await;
        assert!(answer.status == 400 && answer.error().contains(says), "{}", answer.text());
    }
}

#[tokio::test]
async fn the_command_shows_and_changes_what_is_where() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    cluster.server(1).has_another("tiny");
    let olol = Olol::start(&cluster, QUICK).await;
    let url = format!("http://{}", olol.address());
    let run = async |arguments: &[&str]| {
        let ended = Process::run(&[&["models", "--url", &url], arguments].concat()).await;
        let (out, error) = (String::from_utf8(ended.stdout).unwrap(), String::from_utf8(ended.stderr).unwrap());
        (ended.status.success(), out, error)
    };
    let good = async |arguments: &[&str]| {
        let (is_good, out, error) = run(arguments).await;
        assert!(is_good, "{arguments:?}: {error}");
        out
    };
    told(&olol, "tiny:latest", "the digests differ", |told| told["agrees"] == false).await;
    let listed = good(&[]).await;
    assert_eq!(listed, good(&["ls"]).await);
    assert!(listed.contains("tiny:latest") && listed.contains("differs") && listed.contains(" on 0"), "{listed}");
    assert_eq!(good(&["copy", "tiny", "mine"]).await, "mine is a copy of tiny on every server that has it\n");
    assert!(cluster.servers().iter().all(|server| server.still_has("mine")));
    let pulled = good(&["pull", "new", "--to", "1"]).await;
    assert!(pulled.is_empty() && cluster.server(1).still_has("new") && !cluster.server(0).still_has("new"));
    let (is_good, _, error) = run(&["pull", "new", "--to", "9"]).await;
    assert!(!is_good && error.contains("there is no server '9'"), "{error}");
    let pinned = good(&["pin", "new", "--replicas", "all", "--keep-loaded"]).await;
    assert!(pinned.starts_with("new:latest will be kept on all servers, and in memory there"), "{pinned}");
    until("it is there", || cluster.server(0).still_has("new")).await;
    let page: Value = serde_json::from_str(&good(&["--json"]).await).unwrap();
    let models = page["models"].as_array().unwrap();
    let new = models.iter().find(|model| model["name"] == "new:latest").unwrap();
    assert_eq!((&new["desired"]["replicas"], &new["desired"]["keep_loaded"]), (&json!("all"), &json!(true)));
    assert_eq!(good(&["unpin", "new"]).await, "new:latest is not pinned any more; what is there stays\n");
    assert_eq!(good(&["rm", "new", "mine"]).await, "new is deleted\nmine is deleted\n");
    assert!(!cluster.server(0).still_has("new"));
    let (is_good, out, error) = run(&["rm", "one", "tiny", "two"]).await;
    assert!(!is_good && out == "tiny is deleted\n" && !cluster.server(0).still_has("tiny"), "{out}");
    assert!(error.contains("2 of 3 models are not deleted: one, two") && error.contains("olol: one: "), "{error}");
    let (is_good, _, error) = run(&["pin", "nobodys", "--replicas", "3", "--to", "none*"]).await;
    assert!(
        is_good && error.contains("0 servers are there that nobodys:latest may be on, and 3 are wanted"),
        "{error}"
    );
    assert_eq!(good(&["rm", "nobodys"]).await, "nobodys was on no server, and is not wanted any more\n");
    assert!(!run(&["unpin", "nobodys"]).await.0);
    for (arguments, says) in [
        (&["rm", "new"][..], "not found"),
        (&["unpin", "new"], "is not pinned: nobody wants it"),
        (&["pin", "a b"], "'a b' is no name of a model"),
        (&["pin", "new", "--replicas", "many"], "say a number of servers, or all"),
    ] {
        let (is_good, _, error) = run(arguments).await;
        assert!(!is_good && error.contains(says), "{arguments:?}: {error}");
    }
}
