//! Keys of clients: who may ask, what each may do, and that nobody else ever sees them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::path::{Path, PathBuf};

use harness::olol::{chat, v1_chat};
use harness::{Answer, Cluster, Olol, Process, Request, Way, patiently};
use olol::keys::{self, Order};
use olol_middleware::Pattern;
use olol_proto::v1::server_client::ServerClient;
use olol_proto::v1::{ChatRequest, Header, ListModelsRequest, Message, RelayHead, RelayRequest};
use serde_json::json;
use tempfile::TempDir;
use tonic::Code;

/// A file of keys that is only a test's.
struct File(TempDir);

impl File {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("keys.toml")
    }

    /// The configuration that names it.
    fn toml(&self) -> String {
        format!("[auth]\nfile = \"{}\"\n", self.path().display())
    }

    /// Makes a key.
    fn add(&self, name: &str, order: &Order) -> String {
        keys::add(&self.path(), &name.parse().unwrap(), order).unwrap()
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.path()).unwrap()
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path(), text).unwrap();
    }
}

/// May do this and nothing else.
fn may(words: &[&str]) -> Order {
    Order { may: Some(words.iter().map(|word| (*word).to_owned()).collect()), ..Order::default() }
}

/// May use this and nothing else.
fn only(models: &[&str]) -> Order {
    Order { models: models.iter().map(|model| Pattern::parse(model).unwrap()).collect(), ..Order::default() }
}

fn admin() -> Order {
    Order { admin: true, ..Order::default() }
}

fn with(request: Request, key: &str) -> Request {
    request.header("Authorization", &format!("Bearer {key}"))
}

/// Asks until the answer has this status: a changed file is not read at once.
async fn until_status(olol: &Olol, request: &Request, status: u16) -> Answer {
    let asking = async {
        loop {
            let answer = olol.ask(request).await;
            if answer.status == status {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    };
    patiently(&format!("an answer with status {status}"), asking).await
}

#[tokio::test]
async fn anybody_may_ask_until_there_is_a_key_and_changes_are_taken_at_once() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::new();
    let olol = Olol::start(&cluster, &file.toml()).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    let ada = file.add("ada", &Order::default());
    let refused = until_status(&olol, &chat("tiny", "hi"), 401).await;
    assert_eq!((refused.header("www-authenticate"), refused.header("x-olol-reason")), ("Bearer", "unauthorized"));
    assert!(refused.error().starts_with("a key is needed"), "{}", refused.error());
    assert_eq!(olol.ask(&with(chat("tiny", "hi"), &ada)).await.said(), "Hello world");
    assert_eq!(olol.ask(&chat("tiny", "hi").header("x-api-key", &ada)).await.status, 200);
    let bob = file.add("bob", &Order::default());
    until_status(&olol, &with(chat("tiny", "hi"), &bob), 200).await;
    keys::remove(&file.path(), "ada").unwrap();
    until_status(&olol, &with(chat("tiny", "hi"), &ada), 401).await;
    keys::remove(&file.path(), "bob").unwrap();
    until_status(&olol, &chat("tiny", "hi"), 200).await;
    assert_eq!(olol.ask(&with(chat("tiny", "hi"), &ada)).await.status, 401, "a key that is not known is never good");
}

#[tokio::test]
async fn a_wrong_file_leaves_the_keys_as_they_were() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::new();
    let (ada, root) = (file.add("ada", &Order::default()), file.add("root", &admin()));
    let olol = Olol::start(&cluster, &file.toml()).await;
    let good = file.text();
    let is_current = async |wanted: &str| {
        let asking = async {
            loop {
                let page = olol.ask(&with(Request::get("/metrics"), &root)).await;
                assert_eq!(page.status, 200);
                if page.text().contains(&format!("olol_keys_last_read_successful {wanted}")) {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        patiently("the file is read", asking).await;
    };
    file.write(&format!("{good}[keys.eve]\nid = 7\n"));
    is_current("0").await;
    assert_eq!(olol.ask(&with(chat("tiny", "hi"), &ada)).await.status, 200);
    std::fs::remove_file(file.path()).unwrap();
    assert_eq!(olol.ask(&chat("tiny", "hi")).await.status, 401);
    file.write(&good);
    is_current("1").await;
    assert_eq!(olol.ask(&with(chat("tiny", "hi"), &ada)).await.status, 200);
}

#[tokio::test]
async fn who_may_ask_without_a_key_can_be_said() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::new();
    let root = file.add("root", &admin());
    let olol = Olol::start(&cluster, &format!("{}anonymous = \"allow\"\n", file.toml())).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    assert_eq!(olol.ask(&with(chat("tiny", "hi"), "olol_no_key")).await.status, 401);
    assert_eq!(olol.get("/metrics").await.status, 401, "own pages need a key all the same");
    assert_eq!(olol.ask(&with(Request::get("/metrics"), &root)).await.status, 200);
    let olol = Olol::start(&cluster, "auth.anonymous = \"deny\"").await;
    for path in ["/api/tags", "/v1/models", "/metrics", "/api/status"] {
        assert_eq!(olol.get(path).await.status, 401, "{path}");
    }
    for path in ["/", "/healthz", "/readyz"] {
        assert_eq!(olol.get(path).await.status, 200, "{path}");
    }
    let olol =
        Olol::start(&cluster, &format!("{}stack.order = [\"retry\"]\n", file.toml().replace("[auth]\n", "auth.")))
            .await;
    assert_eq!(
        (olol.chat("tiny", "hi").await.status, olol.get("/metrics").await.status),
        (200, 200),
        "the layer is off"
    );
}

#[tokio::test]
async fn a_refusal_has_the_form_of_its_route() {
    let cluster = Cluster::of(1).await.all_have("tiny").all_have("secret");
    let file = File::new();
    let ada = file.add("ada", &only(&["tiny*"]));
    let olol = Olol::start(&cluster, &file.toml()).await;
    let message = Request::post("/v1/messages", json!({"model": "secret", "max_tokens": 1, "messages": []}));
    let says = "key 'ada' may not use model 'secret'; it may use tiny*";
    for (request, place, kinds) in [
        (chat("secret", "hi"), "/error", ["", ""]),
        (v1_chat("secret", "hi"), "/error/message", ["authentication_error", "permission_error"]),
        (message, "/error/message", ["authentication_error", "permission_error"]),
    ] {
        let (unknown, refused) = (olol.ask(&request).await, olol.ask(&with(request, &ada)).await);
        assert_eq!((unknown.status, refused.status), (401, 403));
        assert_eq!(refused.json().pointer(place).unwrap(), says);
        let kind = |answer: &Answer| answer.json()["error"]["type"].as_str().unwrap_or_default().to_owned();
        assert_eq!([kind(&unknown), kind(&refused)], kinds);
        assert_eq!(refused.header("x-olol-reason"), "forbidden");
    }
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn a_key_may_ask_and_not_delete() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::new();
    let ada = file.add("ada", &may(&["infer", "list"]));
    let olol = Olol::start(&cluster, &file.toml()).await;
    assert_eq!(olol.ask(&with(chat("tiny", "hi"), &ada)).await.status, 200);
    assert_eq!(olol.ask(&with(Request::get("/api/tags"), &ada)).await.names(), ["tiny:latest"]);
    for (request, right) in [
        (Request::new("DELETE", "/api/delete").with_body(json!({"model": "tiny"})), "delete"),
        (Request::post("/api/pull", json!({"model": "tiny"})), "pull"),
        (Request::post("/api/copy", json!({"source": "tiny", "destination": "other"})), "copy"),
        (Request::post(&format!("/api/blobs/sha256:{}", "0".repeat(64)), "x"), "create"),
    ] {
        let refused = olol.ask(&with(request, &ada)).await;
        assert!(refused.status == 403 && refused.error().contains(&format!("needs '{right}'")), "{}", refused.text());
    }
    assert!(cluster.server(0).still_has("tiny"));
}

#[tokio::test]
async fn what_a_key_may_not_use_it_does_not_see() {
    for servers in [1, 2] {
        let cluster = Cluster::of(servers).await.all_have_loaded("tiny").all_have_loaded("secret").all_have("ada/mine");
        let file = File::new();
        let (ada, bob) = (file.add("ada", &only(&["tiny", "ada/*"])), file.add("bob", &Order::default()));
        let olol = Olol::start(&cluster, &file.toml()).await;
        let names = async |path: &str, key: &str| {
            let answer = olol.ask(&with(Request::get(path), key)).await;
            assert_eq!(answer.status, 200);
            let mut names = answer.names();
            names.sort();
            (names, answer)
        };
        for (path, seen) in [
            ("/api/tags", &["ada/mine:latest", "tiny:latest"][..]),
            ("/v1/models", &["ada/mine:latest", "tiny:latest"]),
            ("/api/ps", &["tiny:latest"]),
        ] {
            assert_eq!(names(path, &ada).await.0, seen, "{path} of {servers}");
            assert!(names(path, &bob).await.0.contains(&"secret:latest".to_owned()));
        }
        let length = names("/api/tags", &ada).await.1.text().len().to_string();
        let look = olol.ask(&with(Request::new("HEAD", "/api/tags"), &ada)).await;
        assert_eq!((look.status, look.header("content-length")), (200, length.as_str()), "{servers}");
        for request in [
            Request::post("/api/show", json!({"model": "secret"})),
            Request::get("/v1/models/secret"),
            chat("library/SECRET:latest", "hi"),
            Request::post("/api/copy", json!({"source": "secret", "destination": "tiny"})),
            Request::post("/api/create", json!({"model": "ada/other", "from": "secret"})),
        ] {
            assert_eq!(olol.ask(&with(request, &ada)).await.status, 403);
        }
    }
}

#[tokio::test]
async fn servers_get_their_credentials_and_no_key_of_ours() {
    for way in Way::BOTH {
        let cluster = Cluster::of(2).await.over(way);
        cluster.server(0).has("zero");
        cluster.server(1).has("one");
        let file = File::new();
        let ada = file.add("ada", &Order::default());
        file.write(&format!("{}outbound = {{ 1 = \"Bearer for-one\" }}\n", file.text()));
        let olol = Olol::start(&cluster, &format!("{}anonymous = \"allow\"\n", file.toml())).await;
        let asked = async |request: Request, server: usize| {
            assert_eq!(olol.ask(&request).await.status, 200, "{way:?}");
            let seen = cluster.server(server).seen("/api/chat").pop().unwrap();
            let get = |name: &str| seen.headers.get(name).map(str::to_owned);
            (get("authorization"), get("x-api-key"))
        };
        let both = with(chat("zero", "hi"), &ada).header("X-Api-Key", &ada);
        assert_eq!(asked(both, 0).await, (None, None));
        assert_eq!(asked(with(chat("one", "hi"), &ada), 1).await, (Some("Bearer for-one".to_owned()), None));
        let foreign = chat("one", "hi").header("Authorization", "Bearer ollama").header("X-Api-Key", "sk-1");
        assert_eq!(asked(foreign, 1).await, (Some("Bearer ollama".to_owned()), Some("sk-1".to_owned())));
        let mixed = chat("zero", "hi").header("Authorization", "Bearer ollama").header("X-Api-Key", &ada);
        assert_eq!(asked(mixed, 0).await, (Some("Bearer ollama".to_owned()), None));
    }
}

#[tokio::test]
async fn programs_that_speak_grpc_show_their_keys_in_the_metadata() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny").all_have("secret");
        let file = File::new();
        let ada = file.add("ada", &Order { may: Some(vec!["infer".into(), "list".into()]), ..only(&["tiny"]) });
        let olol = Olol::start(&cluster, &file.toml()).await;
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", olol.address())).unwrap();
        let mut client = ServerClient::new(endpoint.connect().await.unwrap());
        let request = |model: &str| ChatRequest {
            model: model.to_owned(),
            messages: vec![Message { role: "user".into(), content: "hi".into(), ..Default::default() }],
            ..Default::default()
        };
        let showing = |key: &str| format!("Bearer {key}").parse().unwrap();
        assert_eq!(client.chat(request("tiny")).await.unwrap_err().code(), Code::Unauthenticated);
        for (model, code) in [("tiny", None), ("secret", Some(Code::PermissionDenied))] {
            let mut request = tonic::Request::new(request(model));
            request.metadata_mut().insert("authorization", showing(&ada));
            assert_eq!(client.chat(request).await.err().map(|status| status.code()), code, "{model}");
        }
        let mut request = tonic::Request::new(ListModelsRequest {});
        request.metadata_mut().insert("x-api-key", ada.parse().unwrap());
        let listed = client.list_models(request).await.unwrap().into_inner();
        assert_eq!(listed.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["tiny:latest"]);
        let relayed = |headers: Vec<Header>| {
            let (method, path) = ("POST".to_owned(), "/api/chat".to_owned());
            let head = RelayHead { method, path, headers, ..Default::default() };
            let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).to_string().into();
            once(RelayRequest { head: Some(head), body, last: true })
        };
        let header = Header { name: "authorization".to_owned(), value: format!("Bearer {ada}").into() };
        assert!(client.relay(relayed(vec![header])).await.is_ok());
        let mut request = tonic::Request::new(relayed(Vec::new()));
        request.metadata_mut().insert("authorization", showing(&ada));
        assert!(client.relay(request).await.is_ok());
        assert_eq!(client.relay(relayed(Vec::new())).await.unwrap_err().code(), Code::Unauthenticated);
        for path in ["/api/chat", "/api/tags", "/api/ps"] {
            for seen in cluster.server(0).seen(path) {
                assert!(!format!("{:?}", seen.headers).contains("olol_"), "{way:?} {path}: {:?}", seen.headers);
            }
        }
        assert_eq!(cluster.server(0).work(), 3);
    }
}

fn once(message: RelayRequest) -> impl futures_util::Stream<Item = RelayRequest> + Send + 'static {
    futures_util::stream::iter([message])
}

#[tokio::test]
async fn own_pages_are_for_admins() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::new();
    let olol = Olol::start(&cluster, &file.toml()).await;
    let pages = ["/metrics", "/api/status/servers", "/api/status/anything", "/olol/anything", "/%6detrics"];
    for page in pages {
        assert!([200, 404].contains(&olol.get(page).await.status), "{page}");
    }
    let (ada, root) = (file.add("ada", &Order::default()), file.add("root", &admin()));
    until_status(&olol, &Request::get("/metrics"), 401).await;
    for page in pages {
        let statuses = [
            olol.get(page).await,
            olol.ask(&with(Request::get(page), &ada)).await,
            olol.ask(&with(Request::get(page), "olol_a_b")).await,
        ];
        assert_eq!(
            statuses.map(|answer| (answer.status, answer.json()["error"].is_string())),
            [(401, true), (403, true), (401, true)],
            "{page}"
        );
        assert!([200, 404].contains(&olol.ask(&with(Request::get(page), &root)).await.status), "{page}");
    }
    for page in ["/", "/healthz", "/readyz"] {
        assert_eq!(olol.get(page).await.status, 200, "{page}");
    }
}

#[tokio::test]
async fn a_secret_is_told_to_nobody() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have_loaded("tiny").all_have("other");
        let file = File::new();
        let (ada, root) = (file.add("ada", &only(&["tiny"])), file.add("root", &admin()));
        file.write(&format!("{}outbound = {{ zero = \"Bearer for-zero\" }}\n", file.text()));
        let config = file.0.path().join("olol.toml");
        std::fs::write(&config, file.toml()).unwrap();
        let agent = match way {
            Way::Http => None,
            Way::Agents => Some(Process::agent(cluster.server(0).address()).await),
        };
        let server = agent.as_ref().map_or_else(
            || format!("zero@http://{}", cluster.server(0).address()),
            |agent| format!("zero@{}", agent.address()),
        );
        let flags = ["--log-level", "trace", "--config", config.to_str().unwrap()];
        let mut proxy = Process::proxy(&server, &flags).await;
        let mut told = String::new();
        let mut ask = async |request: Request| {
            let answer = proxy.connect().await.ask(&request).await;
            told.extend([format!("{:?}\n", answer.headers), answer.text()]);
            answer.status
        };
        assert_eq!(ask(with(chat("tiny", "hi"), &ada)).await, 200);
        assert_eq!(ask(with(chat("other", "hi"), &ada)).await, 403);
        assert_eq!(ask(with(v1_chat("other", "hi"), &ada)).await, 403);
        assert_eq!(ask(with(Request::get("/api/tags"), &ada)).await, 200);
        assert_eq!(ask(with(chat("tiny", "hi"), &format!("{ada}0"))).await, 401);
        assert_eq!(ask(with(chat("tiny", "hi"), &root)).await, 200);
        assert_eq!(ask(with(Request::get("/api/status/servers"), &ada)).await, 403);
        for page in ["/metrics", "/api/status", "/api/status/servers"] {
            assert_eq!(ask(with(Request::get(page), &root)).await, 200, "{page}");
        }
        file.write(&file.text().replace("outbound =", "outbuond ="));
        patiently("the file is read", async {
            while !proxy.log().contains("the keys stay as they were") {
                tokio::task::yield_now().await;
            }
        })
        .await;
        proxy.terminate();
        proxy.ends().await;
        let mut seen = String::new();
        for path in ["/api/chat", "/api/tags", "/api/ps", "/api/version", "/api/status", "/v1/chat/completions"] {
            seen.extend(cluster.server(0).seen(path).iter().map(|seen| format!("{:?}\n", seen.headers)));
        }
        let log = [Some(proxy.log()), agent.map(|agent| agent.log())].into_iter().flatten().collect::<String>();
        assert!(log.contains("key=\"ada\""), "{log}");
        for (place, text) in [("log", &log), ("answers", &told), ("servers", &seen)] {
            for secret in [&ada, &root] {
                let (public, private) = secret.rsplit_once('_').unwrap();
                assert!(!text.contains(private) && !text.contains(public), "{place}: {text}");
            }
            let sha = file
                .text()
                .lines()
                .find_map(|line| line.strip_prefix("sha256 = ").map(|hex| hex.trim_matches('"').to_owned()));
            assert!(!text.contains(&sha.unwrap()), "{place}: {text}");
            assert!(place == "servers" || !text.contains("for-zero"), "{place}: {text}");
        }
        assert!(seen.contains("Bearer for-zero"));
    }
}

#[tokio::test]
async fn keys_are_made_listed_and_removed_on_the_command_line() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let file = File::new();
    let path = file.path();
    let path = path.to_str().unwrap();
    let olol = Olol::start(&cluster, &file.toml()).await;
    let add =
        ["keys", "add", "ada", "--models", "tiny*,ada/*", "--may", "infer,list", "--rpm", "60", "--priority", "high"];
    let (made, said) = run(&[&add[..], &["--file", path]].concat(), 0).await;
    assert!(made.starts_with("olol_") && made.lines().count() == 1 && !said.contains(made.trim()), "{made}{said}");
    until_status(&olol, &with(chat("tiny", "hi"), made.trim()), 200).await;
    assert_eq!(olol.ask(&with(Request::post("/api/pull", json!({"model": "tiny"})), made.trim())).await.status, 403);
    let config = file.0.path().join("olol.toml");
    std::fs::write(&config, file.toml()).unwrap();
    let (list, _) = run(&["keys", "list", "--config", config.to_str().unwrap()], 0).await;
    assert!(
        list.contains("ada ") && list.contains("infer, list") && list.contains("tiny*, ada/*") && list.contains("high"),
        "{list}"
    );
    assert!(!list.contains(made.trim()) && !list.contains(&made.trim()[14..]));
    let (_, error) = run(&["keys", "add", "ada", "--file", path], 1).await;
    assert!(error.contains("there is a key 'ada' already"), "{error}");
    let port = olol.address().port().to_string();
    let client = ["client", "--port", &port, "--model", "tiny", "--prompt", "hi"];
    let (_, error) = run(&client, 1).await;
    assert!(error.contains("a key is needed"), "{error}");
    let (said, _) = run(&[&client[..], &["--key", made.trim()]].concat(), 0).await;
    assert_eq!(said.trim_end(), "Hello world");
    run(&["keys", "remove", "ada", "--file", path], 0).await;
    until_status(&olol, &with(chat("tiny", "hi"), made.trim()), 401).await;
    let (_, error) = run(&["keys", "remove", "ada", "--file", path], 1).await;
    assert!(error.contains("there is no key 'ada'"), "{error}");
}

#[tokio::test]
async fn what_is_wrong_with_keys_is_said_with_its_place() {
    for (arguments, code, says) in [
        (&["keys", "add", "ada", "--may", "dance"][..], 2, "'dance' is nothing that a key may do; say some of: infer"),
        (&["keys", "add", "ada", "--models", ""], 2, "must not be empty"),
        (&["keys", "add", "ada", "--priority", "urgent"], 2, "say high, normal or low"),
        (&["keys", "add", "ada", "--expires", "soon"], 2, "--expires"),
        (&["keys", "add", " ada"], 2, "the name of a key must be"),
        (&["keys", "add", "ada", "--rpm", "0"], 2, "--rpm"),
        (&["keys", "add", "ada", "--expires", "12:00:00"], 2, "without a date"),
        (
            &["keys", "add", "ada", "--expires", "2020-01-31", "--file", "/tmp/olol-no-such-file.toml"],
            2,
            "nobody could use the key",
        ),
    ] {
        let (_, error) = run(arguments, code).await;
        assert!(error.contains(says), "{arguments:?}: {error}");
    }
    assert!(!Path::new("/tmp/olol-no-such-file.toml").exists());
    let file = File::new();
    file.add("ada", &Order::default());
    file.write(&format!("{}prioritty = \"high\"\n", file.text()));
    let config = file.0.path().join("olol.toml");
    std::fs::write(&config, file.toml()).unwrap();
    let (_, error) = run(&["proxy", "--port", "0", "--config", config.to_str().unwrap()], 1).await;
    let line = file.text().lines().count();
    assert!(error.contains(&format!("line {line}: unknown field `prioritty`, expected one of")), "{error}");
    std::fs::write(&config, "[auth]\nanonymous = \"sometimes\"\n").unwrap();
    let (_, error) = run(&["proxy", "--port", "0", "--config", config.to_str().unwrap()], 1).await;
    assert!(error.contains("line 2") && error.contains("until-keys"), "{error}");
}

/// Runs a command that must end with this code; what it printed and what it said.
async fn run(arguments: &[&str], code: i32) -> (String, String) {
    let output = Process::run(arguments).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (printed, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {printed}{said}");
    (printed, said)
}
