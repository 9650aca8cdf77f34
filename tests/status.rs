//! Everything that is known can be asked for: in short, page by page, and at once whatever the servers do.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::process::Stdio;

use harness::olol::{chat, v1_chat};
use harness::{Cluster, Olol, Process, Request, Way, patiently, until};
use olol::keys::{self, Order};
use olol_middleware::Pattern;
use olol_proto::v1::ListModelsRequest;
use olol_proto::v1::server_client::ServerClient;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The entries of a list, page after page to its end; and how many pages there were.
async fn all(olol: &Olol, list: &str, limit: usize) -> (Vec<Value>, usize) {
    let mut entries = Vec::new();
    let mut after = String::new();
    for pages in 1.. {
        let page = olol.get(&format!("/api/status?detail={list}&limit={limit}{after}")).await;
        assert_eq!((page.status, page.header("content-type")), (200, "application/json"), "{}", page.text());
        let page = page.json();
        let on_page = page[list].as_array().unwrap();
        assert!(on_page.len() <= limit, "{page}");
        entries.extend(on_page.clone());
        let Some(next) = page["next"].as_str() else {
            assert_eq!(page["total"], entries.len());
            return (entries, pages);
        };
        after = format!("&after={}", next.replace(':', "%3A"));
    }
    unreachable!("there are no pages without end")
}

/// The values of a member.
fn each<'a>(entries: &'a [Value], name: &str) -> Vec<&'a str> {
    entries.iter().map(|entry| entry[name].as_str().unwrap()).collect()
}

fn has_all(entry: &Value, names: &[&str]) {
    for name in names {
        assert!(entry.get(name).is_some(), "no {name} in {entry:#}");
    }
}

/// The status, once it was heard from a server.
async fn heard(olol: &Olol) -> Value {
    let hearing = async {
        loop {
            let status = olol.get("/api/status").await.json();
            if status["olol"]["ollama"]["source"] != "none" {
                return status;
            }
        }
    };
    patiently("a server tells its status", hearing).await
}

#[tokio::test]
async fn the_summary_is_there_before_any_silent_server_is_given_up() {
    for way in Way::BOTH {
        let cluster = Cluster::of(3).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        assert_eq!(heard(&olol).await["cloud"]["disabled"], true, "{way:?}");
        for server in cluster.servers() {
            server.is_silent();
        }
        // This one waits for the servers for as long as it may.
        let mut tags = olol.begin(&Request::get("/api/tags")).await;
        let status = olol.get("/api/status").await.json();
        assert!(tags.is_quiet().await, "the status comes before what waits for servers");
        let told = &status["olol"]["ollama"];
        assert_eq!((&status["cloud"]["disabled"], &told["source"]), (&json!(true), &json!("remembered")), "{way:?}");
        assert!(told["server"].is_string() && told["age_ms"].is_number(), "{told}");
        assert_eq!(status["olol"]["servers"]["total"], 3);
    }
}

#[tokio::test]
async fn what_the_proxy_looks_up_for_itself_is_no_call_of_a_client() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "pool.check-timeout-ms = 10000").await;
        heard(&olol).await;
        for _ in 0..20 {
            assert_eq!(olol.get("/api/status").await.json()["olol"]["in_flight"], 0, "{way:?}");
        }
        let asked = cluster.servers().iter().map(|server| server.seen("/api/status").len()).sum::<usize>();
        assert!(asked > 1, "the servers were asked: {asked}");
        for server in cluster.servers() {
            server.is_silent();
        }
        // These questions go on.
        for _ in 0..4 {
            assert_eq!(olol.get("/api/status").await.json()["olol"]["in_flight"], 0, "{way:?}");
        }
        let (servers, _) = all(&olol, "servers", 100).await;
        for server in &servers {
            let metrics = &server["metrics"];
            assert_eq!((&metrics["requests"], &metrics["requests_per_second"]), (&json!(0), &json!(0.0)), "{way:?}");
            assert_eq!((&metrics["errors"], &server["current_load"]), (&json!(0), &json!(0)), "{way:?}");
            let everybody = &metrics["from_everybody"];
            assert!(everybody.is_null() || everybody["requests_per_second"] == 0.0, "{everybody}");
        }
    }
}

#[tokio::test]
async fn the_summary_tells_of_everything_in_short() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "pick.policy = \"round_robin\"").await;
    let status = heard(&olol).await;
    let ours = &status["olol"];
    assert_eq!((&ours["host"], &ours["port"]), (&json!("127.0.0.1"), &json!(olol.address().port())));
    assert_eq!(
        ours["servers"],
        json!({"total": 2, "up": 2, "degraded": 0, "draining": 0, "down": 0, "unknown": 0, "taking_calls": 2})
    );
    assert_eq!((&ours["models"], &ours["loaded_models"]), (&json!(1), &json!(2)));
    assert_eq!(
        (&ours["load_balancer"]["algorithm"], &ours["load_balancer"]["max_retries"]),
        (&json!("round_robin"), &json!(2))
    );
    assert_eq!((&ours["load_balancer"]["sticky_sessions"], &ours["async_mode"]), (&json!(true), &json!(true)));
    assert!(ours["registry"]["version_info"]["lowest"].is_string() && ours["registry"]["last_updated"].is_string());
    has_all(
        ours,
        &["max_workers", "in_flight", "queued", "clients", "sessions", "health_check", "started_at", "details"],
    );
    for page in ours["details"].as_array().unwrap() {
        assert_eq!(olol.get(page.as_str().unwrap()).await.status, 200, "{page}");
    }
}

#[tokio::test]
async fn without_any_server_the_summary_says_so_and_nobody_is_ready() {
    let olol = Olol::at(vec!["http://127.0.0.1:1".to_owned()], "pool.check-failures = 1").await;
    let status = olol.get("/api/status").await.json();
    assert_eq!((&status["cloud"], &status["olol"]["ollama"]["source"]), (&Value::Null, &json!("none")));
    let ready = olol.get("/readyz").await;
    assert_eq!(ready.status, 503);
    let told = ready.text();
    assert!(told.starts_with("0 of 1 server up\nnot ready: 1 ") && told.contains("detail=servers"), "{told}");
    assert!(!told.contains("127.0.0.1"), "anybody may ask, and is told of nobody: {told}");
    assert_eq!(olol.get("/healthz").await.text(), "ok\n");
}

#[tokio::test]
async fn a_server_is_told_with_all_that_is_known_of_it() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "").await;
        assert_eq!(olol.chat("tiny", "hi").await.status, 200);
        let (servers, _) = all(&olol, "servers", 100).await;
        assert_eq!(each(&servers, "server"), ["0", "1"], "{way:?}");
        for server in &servers {
            has_all(
                server,
                &[
                    "host",
                    "port",
                    "source",
                    "state",
                    "online",
                    "usable",
                    "circuit",
                    "reason",
                    "weight",
                    "current_load",
                    "in_flight",
                    "queued",
                    "runners",
                    "version",
                    "models",
                    "loaded_models",
                    "active_sessions",
                    "pending_pulls",
                    "cpu_usage",
                    "memory_usage",
                    "gpu_memory",
                    "gpus",
                    "disk_free",
                    "last_heartbeat",
                ],
            );
            has_all(
                &server["metrics"],
                &["server_id", "response_time", "requests_per_second", "error_rate", "collected_at"],
            );
            has_all(&server["metrics"]["resource_usage"], &["cpu", "memory", "gpu"]);
            let health = &server["health"];
            has_all(health, &["check_id", "interval_seconds", "last_check", "error_details", "consecutive_failures"]);
            assert_eq!((&health["status"], &server["source"]), (&json!("pass"), &json!("static")), "{health}");
            assert_eq!((&server["host"], &server["models"]), (&json!("127.0.0.1"), &json!(["tiny:latest"])));
            assert!(server["last_heartbeat"].as_str().unwrap().ends_with('Z'), "{server}");
        }
        let is_busy = |server: &&Value| server["metrics"]["output_tokens"].as_u64() > Some(0);
        let busy = servers.iter().find(is_busy).expect("one was asked");
        let metrics = &busy["metrics"];
        assert!(metrics["response_time"].is_number() && metrics["first_token_time"].is_number(), "{metrics:#}");
        assert_eq!(busy["metrics"]["error_rate"], 0.0);
        assert_eq!(busy["runners"][0]["model"], "tiny:latest");
        let same = olol.get("/api/status/servers").await.json();
        assert_eq!(each(same["servers"].as_array().unwrap(), "server"), ["0", "1"]);
    }
}

#[tokio::test]
async fn a_server_that_is_down_says_why() {
    let olol = Olol::at(vec!["gone@http://127.0.0.1:1".to_owned()], "pool.check-failures = 1").await;
    let telling = async {
        loop {
            let (servers, _) = all(&olol, "servers", 1).await;
            if servers[0]["state"] == "down" {
                return servers[0].clone();
            }
        }
    };
    let server = patiently("the server is down", telling).await;
    let health = &server["health"];
    assert_eq!((&health["status"], &health["check_id"]), (&json!("fail"), &json!("gone/poll")));
    assert!(health["consecutive_failures"].as_u64() > Some(0), "{health}");
    assert!(health["error_details"]["message"].as_str().unwrap().contains("refused"), "{health}");
}

#[tokio::test]
async fn who_is_down_shows_nothing_of_before() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way).all_have_loaded("tiny");
        let olol = Olol::start(&cluster, "pool = { check-interval-ms = 100, check-failures = 1 }").await;
        until("both have it in memory", || (0..2).all(|at| olol.knows_of(at, "tiny").1)).await;
        cluster.server(1).dies();
        until("it is down", || !olol.is_server_up(1)).await;
        let (servers, _) = all(&olol, "servers", 100).await;
        let [here, gone] = &servers[..] else { panic!("{servers:?}") };
        for name in ["cpu_usage", "memory_usage", "memory", "gpu_memory", "active_sessions"] {
            assert!(gone[name].is_null(), "{way:?}: {name} in {gone:#}");
        }
        assert_eq!((&gone["loaded_models"], &gone["models"]), (&json!([]), &json!(["tiny:latest"])), "{way:?}");
        assert_eq!(here["loaded_models"][0]["name"], "tiny:latest");
        let places = olol.model("tiny:latest").await["compatible_servers"].clone();
        assert_eq!((&places["loaded"], &places["installed"]), (&json!(["0"]), &json!(["0", "1"])), "{way:?}");
        assert_eq!(olol.get("/api/status").await.json()["olol"]["loaded_models"], 1, "{way:?}");
    }
}

#[tokio::test]
async fn one_server_can_be_asked_for() {
    let cluster = Cluster::of(2).await;
    cluster.server(1).has("b").has("c").has("a");
    let olol = Olol::start(&cluster, "").await;
    let one = olol.get("/api/status/servers/1").await;
    assert_eq!((one.status, one.header("content-type")), (200, "application/json"));
    let one = one.json();
    assert_eq!((&one["server"], &one["models"]), (&json!("1"), &json!(["a:latest", "b:latest", "c:latest"])));
    let (servers, _) = all(&olol, "servers", 100).await;
    assert_eq!(one.as_object().unwrap().len(), servers[1].as_object().unwrap().len());
    let nobody = olol.get("/api/status/servers/nosuch").await;
    assert_eq!((nobody.status, nobody.error().as_str()), (404, "there is no server 'nosuch'; the servers are 0, 1"));
    let nothing = olol.get("/api/status/nosuch").await;
    assert!(nothing.status == 404 && nothing.error().contains("no page '/api/status/nosuch'"), "{}", nothing.text());
}

#[tokio::test]
async fn many_servers_come_page_by_page() {
    let servers: Vec<String> = (1..=57).rev().map(|port| format!("s{port:02}@http://127.0.0.1:{port}")).collect();
    let olol = Olol::at(servers, "").await;
    let (servers, pages) = all(&olol, "servers", 10).await;
    assert_eq!(pages, 6);
    assert_eq!(each(&servers, "server"), (1..=57).map(|port| format!("s{port:02}")).collect::<Vec<_>>());
    let page = olol.get("/api/status/servers?limit=3&after=s55").await.json();
    assert_eq!(
        (each(page["servers"].as_array().unwrap(), "server"), &page["next"]),
        (vec!["s56", "s57"], &Value::Null)
    );
}

#[tokio::test]
async fn models_come_page_by_page_with_who_has_them() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    for number in 0..30 {
        cluster.server(number % 2).has(&format!("m{number:02}:7b"));
    }
    cluster.server(0).describes("tiny", "llama", "1.2B", "Q4_K_M");
    cluster.server(1).describes("tiny", "llama", "1.2B", "Q4_K_M");
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let (models, pages) = all(&olol, "models", 7).await;
    assert_eq!((models.len(), pages), (31, 5));
    assert!(each(&models, "name").is_sorted());
    assert_eq!(models[1]["compatible_servers"]["installed"], json!(["1"]));
    assert_eq!((&models[1]["tag"], &models[1]["agrees"]), (&json!("7b"), &json!(true)));
    let tiny = models.last().unwrap();
    assert_eq!(
        (&tiny["name"], &tiny["family"], &tiny["architecture"]),
        (&json!("tiny:latest"), &json!("llama"), &json!("llama"))
    );
    assert_eq!(tiny["quantization"], json!({"level": "Q4_K_M", "bits_per_weight": 4.89}));
    assert_eq!(tiny["parameters"]["parameter_size"], "1.2B");
    assert_eq!(tiny["compatible_servers"]["loaded"], json!(["0", "1"]));
    assert_eq!((&tiny["stats"]["requests"], &tiny["stats"]["errors"]), (&json!(1), &json!(0)));
    assert!(tiny["stats"]["first_token_time"].is_number(), "{tiny}");
    has_all(tiny, &["size", "size_mb", "digest", "digests", "runners", "pending_pulls", "waiting"]);
}

#[tokio::test]
async fn two_digests_under_one_name_are_shown() {
    let cluster = Cluster::of(3).await.all_have("tiny");
    cluster.server(2).has("other").has_another("tiny").describes("tiny", "llama", "1.36M", "F16");
    let olol = Olol::start(&cluster, "").await;
    let differing = async {
        loop {
            let (models, _) = all(&olol, "models", 10).await;
            if models.last().is_some_and(|model| model["agrees"] == false) {
                return models[models.len() - 1].clone();
            }
        }
    };
    let model = patiently("the digests differ", differing).await;
    assert_eq!(model["digests"][0]["servers"], json!(["0", "1"]));
    assert_eq!(model["digests"][1]["servers"], json!(["2"]));
    assert_eq!(model["digest"], model["digests"][0]["digest"]);
    // What stands beside the digest is that of the digest.
    let [usual, other] = [&model["digests"][0], &model["digests"][1]];
    assert_eq!(
        (&model["size"], &model["size_mb"], &model["parameters"]["parameter_size"]),
        (&json!(1000), &json!(1), &json!("1.5M"))
    );
    assert_eq!((&usual["size"], &usual["quantization"]), (&json!(1000), &model["quantization"]["level"]));
    assert!(other["size"].as_u64() > Some(1000) && other["quantization"] == "F16", "{other}");
}

#[tokio::test]
async fn clients_are_told_with_what_they_use() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    let python = chat("tiny", "hi").header("user-agent", "ollama-python/0.4.7 (x86_64 linux) Python/3.12");
    assert_eq!(olol.ask(&python).await.status, 200);
    assert_eq!(olol.ask(&v1_chat("tiny", "hi").header("user-agent", "OpenAI/JS 5.1")).await.status, 200);
    let channel =
        tonic::transport::Endpoint::new(format!("http://{}", olol.address())).unwrap().connect().await.unwrap();
    let mut grpc = ServerClient::new(channel);
    grpc.list_models(ListModelsRequest::default()).await.unwrap();
    let (clients, _) = all(&olol, "clients", 10).await;
    let [client] = &clients[..] else { panic!("one address, one client: {clients:?}") };
    assert!(client["client_id"].as_str().unwrap().starts_with("ip-"), "{client}");
    assert_eq!(client["api_versions"], json!(["ollama", "openai", "grpc"]));
    let programs = client["applications"].as_array().unwrap();
    assert!(programs.contains(&json!("ollama-python")) && programs.contains(&json!("OpenAI")), "{client}");
    assert!(client["requests"].as_u64() >= Some(3), "{client}");
    assert_eq!((&client["in_flight"], &client["preferences"]), (&json!(0), &Value::Null));
    assert!(client["output_tokens"].as_u64() > Some(0), "{client}");
    has_all(client, &["application_type", "api_version", "connected_at", "last_seen", "prompt_tokens"]);
    let page = olol.get("/metrics").await.text();
    assert!(page.lines().any(|line| line == "olol_clients 1"), "{page}");
}

#[tokio::test]
async fn clients_with_keys_have_names_and_pages_are_for_admins() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "[rate-limit.key]\nrequests-per-minute = 60\n").await;
    let only_tiny = Order { models: vec![Pattern::parse("tiny").unwrap()], ..Order::default() };
    let ada = keys::add(&olol.keys(), &"ada".parse().unwrap(), &only_tiny).unwrap();
    let root = keys::add(&olol.keys(), &"root".parse().unwrap(), &Order { admin: true, ..Order::default() }).unwrap();
    let with = |request: Request, key: &str| request.header("authorization", &format!("Bearer {key}"));
    patiently("the keys are known", async {
        while olol.ask(&with(chat("tiny", "hi"), &ada)).await.status != 200
            || olol.get("/api/status?detail=clients").await.status != 401
            || olol.ask(&with(Request::get("/metrics"), &root)).await.status != 200
        {}
    })
    .await;
    for list in ["proxy", "servers", "models", "clients", "sessions"] {
        let page = format!("/api/status?detail={list}");
        assert_eq!(olol.get(&page).await.status, 401, "{list}");
        assert_eq!(olol.ask(&with(Request::get(&page), &ada)).await.status, 403, "{list}");
        assert_eq!(olol.ask(&with(Request::get(&page), &root)).await.status, 200, "{list}");
    }
    let page = olol.ask(&with(Request::get("/api/status?detail=clients"), &root)).await.json();
    let client =
        page["clients"].as_array().unwrap().iter().find(|client| client["client_id"] == "ada").unwrap().clone();
    let policy = &client["preferences"];
    assert_eq!(
        (&policy["models"], &policy["admin"], &policy["priority"]),
        (&json!(["tiny"]), &json!(false), &json!("normal"))
    );
    assert_eq!(policy["limits"]["requests-per-minute"], 60);
    assert!(!page.to_string().contains(&ada), "the key itself is told to nobody");
}

#[tokio::test]
async fn sessions_come_page_by_page() {
    let cluster = Cluster::of(1).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(all(&olol, "sessions", 10).await.0, Vec::<Value>::new());
    for number in 0..5 {
        let wanted = json!({"session_id": format!("s{number}"), "model_name": "tiny"});
        let made = olol.ask(&Request::post("/api/status/sessions", wanted)).await;
        assert!((200..300).contains(&made.status), "{}", made.text());
    }
    let (sessions, pages) = all(&olol, "sessions", 2).await;
    assert_eq!((each(&sessions, "session_id"), pages), (vec!["s0", "s1", "s2", "s3", "s4"], 3));
    has_all(&sessions[0], &["model_name", "created_at", "last_active", "server_host", "timeout", "status"]);
    assert_eq!(olol.get("/api/status").await.json()["olol"]["sessions"], 5);
}

#[tokio::test]
async fn the_proxy_tells_its_rules_without_what_they_keep_secret() {
    let cluster = Cluster::of(2).await.weighing([3, 1]).all_have("tiny");
    let rule = "[[alias.rules]]\nname = \"team\"\nheaders = { x-team = \"a-secret\" }\nservers = [\"0\"]\n";
    let olol = Olol::start(&cluster, rule).await;
    let (proxy, _) = all(&olol, "proxy", 1).await;
    let balancer = &proxy[0]["load_balancer"];
    assert_eq!(balancer["server_weights"], json!({"0": 3}));
    let rule = &balancer["routing_rules"][0];
    assert_eq!(
        (&rule["rule"], &rule["headers"], &rule["tiers"]),
        (&json!("team"), &json!(["x-team"]), &json!([["0"]]))
    );
    assert!(!proxy[0].to_string().contains("a-secret"));
    has_all(&balancer["timeout"], &["connect", "first_byte", "idle", "total"]);
}

#[tokio::test]
async fn what_cannot_be_asked_for_is_refused_with_what_can() {
    let cluster = Cluster::of(1).await;
    let olol = Olol::start(&cluster, "").await;
    for (query, says) in [
        ("detail=all", "there are: proxy, servers, models, clients, sessions"),
        ("detail=models&limit=1001", "from 1 to 1000"),
        ("detail=models&after=%2F%2F", "'//' is no name of a model"),
        ("detail=servers&after=a%00b", "`next` of the page before"),
        ("detail=servers&page=2", "the query may say detail, after and limit"),
    ] {
        let answer = olol.get(&format!("/api/status?{query}")).await;
        assert!(answer.status == 400 && answer.error().contains(says), "{query}: {}", answer.text());
    }
    assert_eq!(olol.ask(&Request::post("/api/status?detail=servers", "")).await.status, 405);
    assert_eq!(olol.get("/api/status?other=1").await.status, 200, "Ollama's own, as ever");
}

#[tokio::test]
async fn the_command_shows_tables_and_prints_pages() {
    let cluster = Cluster::of(2).await.all_have_loaded("tiny");
    let olol = Olol::start(&cluster, "").await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let url = format!("http://{}", olol.address());
    let run = async |more: &[&str]| {
        let ended = Process::run(&[&["status", "--url", &url], more].concat()).await;
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        String::from_utf8(ended.stdout).unwrap()
    };
    let servers = run(&[]).await;
    assert!(
        servers.contains("2 of 2 servers up") && servers.contains("SERVER") && servers.contains("2 in all"),
        "{servers}"
    );
    assert!(!servers.contains('\x1b'), "no colours in a pipe: {servers:?}");
    assert!(run(&["models"]).await.contains("tiny:latest"));
    assert!(run(&["clients"]).await.contains("ip-"));
    let page: Value = serde_json::from_str(&run(&["--json", "models"]).await).unwrap();
    assert_eq!((page["models"].as_array().unwrap().len(), &page["next"]), (1, &Value::Null));
    let summary: Value = serde_json::from_str(&run(&["--json"]).await).unwrap();
    assert_eq!(summary["olol"]["servers"]["total"], 2);
}

#[tokio::test]
async fn the_command_says_what_is_wrong_and_how_to_mend_it() {
    let cluster = Cluster::of(1).await;
    let olol = Olol::start(&cluster, "auth.anonymous = \"deny\"").await;
    let (url, ollama) = (format!("http://{}", olol.address()), format!("http://{}", cluster.server(0).address()));
    for (arguments, says) in [
        (["--url", &url], "--key-file or OLOL_KEY"),
        (["--url", "http://127.0.0.1:1"], "no proxy answers at 127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1"], "(is it running? `olol proxy` or `olol up` starts one)"),
        (["--url", &ollama], "is an Ollama, and no OLOL proxy"),
        (["--url", "http://a/b"], "--url must say where the proxy is"),
        (["--url", "ftp://a"], "in place of 'ftp://'"),
        (["--watch", "never"], "say how many seconds"),
    ] {
        let ended = Process::run(&[&["status"], &arguments[..]].concat()).await;
        let error = String::from_utf8(ended.stderr).unwrap();
        assert!(!ended.status.success() && error.contains(says), "{arguments:?}: {error}");
    }
}

#[tokio::test]
async fn every_command_that_asks_a_proxy_takes_its_url_and_a_key() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let olol = Olol::start(&cluster, "auth.anonymous = \"deny\"").await;
    let (url, nobody) = (format!("http://{}", olol.address()), "http://127.0.0.1:1");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "olol_no_key\n").unwrap();
    let no_key = file.path().to_str().unwrap();
    for command in [
        &["status"][..],
        &["models"],
        &["drain", "0"],
        &["undrain", "0"],
        &["explain", "--model", "tiny"],
        &["client", "--model", "tiny", "--prompt", "hi"],
    ] {
        for (flags, says) in [
            (&["--url", &url][..], "give the key as --key, --key-file or OLOL_KEY"),
            (&["--url", &url, "--key-file", no_key], "status 401"),
            (&["--url", nobody], "answers at 127.0.0.1:1"),
            (&["--host", &url], "say --url http://127.0.0.1:"),
            (&["--url", &url, "--port", "80"], "cannot be used with"),
        ] {
            let ended = Process::run(&[command, flags].concat()).await;
            let [out, error] = [ended.stdout, ended.stderr].map(|text| String::from_utf8(text).unwrap());
            // Anybody may ask what would become of his request.
            let is_told = out.contains("would be refused");
            let is_refused = !ended.status.success() && error.contains(says);
            assert!(is_told || is_refused, "{command:?} {flags:?}: {out}{error}");
        }
    }
    let help = Process::run(&["undrain", "--help"]).await;
    assert!(!String::from_utf8(help.stdout).unwrap().contains("--wait"));
}

#[tokio::test]
async fn a_server_that_is_drained_is_not_among_those_that_are_up() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let url = format!("http://{}", olol.address());
    assert!(Process::run(&["drain", &olol.names()[0], "--url", &url]).await.status.success());
    assert_eq!(olol.get("/readyz").await.text(), "1 of 2 servers up\n");
    let servers = &olol.get("/api/status").await.json()["olol"]["servers"];
    assert_eq!((&servers["up"], &servers["draining"], &servers["total"]), (&json!(1), &json!(1), &json!(2)));
    let shown = String::from_utf8(Process::run(&["status", "--url", &url]).await.stdout).unwrap();
    assert!(shown.contains("1 of 2 servers up, 1 draining, 1 model,") && shown.contains("1 up"), "{shown}");
    let metrics = olol.get("/metrics").await.text();
    assert!(metrics.contains("olol_server_up{server=\"0\"} 0") && metrics.contains("olol_server_up{server=\"1\"} 1"));
}

#[tokio::test]
async fn a_watch_shows_the_table_again_and_again_until_it_is_stopped() {
    let cluster = Cluster::of(1).await;
    let olol = Olol::start(&cluster, "").await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_olol"));
    command.args(["status", "--url", &format!("http://{}", olol.address()), "--watch", "0.1"]);
    let mut child = command.env_remove("OLOL_KEY").stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let table = async { while !lines.next_line().await.unwrap().unwrap().starts_with("SERVER") {} };
        patiently("the table is shown", table).await;
    }
    let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().unwrap())).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    assert!(patiently("the watch ends", child.wait()).await.unwrap().success());
}
