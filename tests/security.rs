//! Who belongs to the cluster: the token, where it comes from, and that nobody else is served, or ever reads it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use harness::cluster::{agent, token};
use harness::olol::chat;
use harness::{Cluster, Connection, Olol, Process, Request, Way, patiently, until};
use olol::ollama::Endpoint;
use olol::security::certs::{self, Order};
use olol_proto::v1::server_client::ServerClient;
use olol_proto::v1::{
    ChatMessageRequest, ChatRequest, CreateSessionRequest, DescribeRequest, EmbedRequest, EndSessionRequest,
    GenerateRequest, ListModelsRequest, PullModelRequest, RelayHead, RelayRequest, ShowModelRequest, WatchRequest,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};

/// A token that is good, and not that of the cluster.
const ANOTHER: &str = "another-token-of-some-other-cluster-0123";

fn status<T>(answer: Result<T, Status>) -> Status {
    answer.err().unwrap_or_else(|| Status::ok(""))
}

/// How an agent answers each of its methods when a call shows this.
async fn ask_everything(agent: SocketAddr, shown: Option<&str>) -> Vec<Status> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{agent}")).unwrap();
    let channel = patiently("a gRPC connection", endpoint.connect()).await.unwrap();
    let shown = shown.map(str::to_owned);
    let mut client = ServerClient::with_interceptor(channel, move |mut request: tonic::Request<()>| {
        if let Some(shown) = &shown {
            request.metadata_mut().insert("olol-token", shown.parse().unwrap());
        }
        Ok(request)
    });
    vec![
        status(client.relay(futures_util::stream::iter([RelayRequest::default()])).await),
        status(client.describe(DescribeRequest {}).await),
        status(client.watch(WatchRequest::default()).await),
        status(client.generate(GenerateRequest::default()).await),
        status(client.chat(ChatRequest::default()).await),
        status(client.embed(EmbedRequest::default()).await),
        status(client.list_models(ListModelsRequest {}).await),
        status(client.show_model(ShowModelRequest::default()).await),
        status(client.pull_model(PullModelRequest::default()).await),
        status(client.create_session(CreateSessionRequest::default()).await),
        status(client.chat_message(ChatMessageRequest::default()).await),
        status(client.end_session(EndSessionRequest::default()).await),
    ]
}

#[tokio::test]
async fn an_agent_answers_nothing_without_the_token_of_its_cluster() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let agent = agent(Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap()).await;
    for (shown, says) in
        [(None, "shows no token"), (Some(ANOTHER), "not that of this agent's cluster"), (Some(""), "not that")]
    {
        for status in ask_everything(agent.address(), shown).await {
            assert_eq!(status.code(), Code::Unauthenticated, "{status}");
            assert!(status.message().contains(says) && status.message().contains("olol token"), "{status}");
        }
    }
    assert_eq!(cluster.server(0).work(), 0);
    let with_it = ask_everything(agent.address(), Some(token().reveal())).await;
    assert!(with_it.iter().all(|status| status.code() != Code::Unauthenticated), "{with_it:?}");
    assert_eq!(with_it[1].code(), Code::Ok);
}

#[tokio::test]
async fn a_proxy_with_another_token_says_so_and_uses_other_servers() {
    let cluster = Cluster::of(2).await.all_have("tiny");
    let address = |at: usize| cluster.server(at).address();
    let agent = agent(Endpoint::parse(&address(0).to_string(), 0).unwrap()).await;
    let file = File::with(ANOTHER);
    let servers = vec![format!("0@{}", agent.address()), format!("1@http://{}", address(1))];
    let olol = Olol::at(servers, &format!("[security]\ntoken-file = {:?}\n", file.path())).await;
    until("the other server is up", || olol.is_server_up(1)).await;
    let answer = olol.chat("tiny", "hi").await;
    assert_eq!((answer.status, answer.server()), (200, "1"));
    let page = olol.get("/api/status/servers").await;
    let refused = &page.json()["servers"][0];
    assert_eq!(refused["state"], "down");
    assert!(
        refused["reason"]
            .as_str()
            .unwrap()
            .starts_with("refused: no proof of the cluster token: its token is not ours"),
        "{refused}"
    );
    for page in ["/api/status", "/api/status/servers", "/metrics"] {
        let text = olol.get(page).await.text();
        assert!(!text.contains(ANOTHER) && !text.contains(token().reveal()), "{page}");
    }
    assert_eq!(cluster.server(0).work(), 0);
}

#[tokio::test]
async fn a_server_sees_no_token() {
    for way in Way::BOTH {
        let cluster = Cluster::of(1).await.over(way).all_have("tiny");
        let olol = Olol::start(&cluster, "").await;
        let answer = olol.ask(&chat("tiny", "hi").header("Olol-Token", token().reveal())).await;
        assert_eq!(answer.status, 200);
        let seen = cluster.server(0).seen("/api/chat");
        assert!(!format!("{seen:?}").contains(token().reveal()), "{seen:?}");
    }
}

/// A file with a token.
struct File(TempDir);

impl File {
    fn with(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), text).unwrap();
        let file = Self(folder);
        file.mode(0o600);
        file
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("token")
    }

    fn mode(&self, mode: u32) {
        std::fs::set_permissions(self.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    }
}

/// The folder of a user, in which there is nothing yet.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// What the environment of this user says.
    fn environment(&self) -> [(&str, &str); 2] {
        [("XDG_CONFIG_HOME", self.0.path().to_str().unwrap()), ("OLOL_TOKEN", "")]
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("olol/token")
    }

    async fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        ended(&Process::run_with(&self.environment(), arguments).await)
    }
}

fn ended(output: &std::process::Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn commands_of_one_user_share_a_token_with_nothing_configured() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let home = Home::new();
    let ollama = format!("http://{}", cluster.server(0).address());
    let agent = ["server", "--port", "0", "--ollama-host", &ollama];
    let log_all = ["--log-level", "trace"];
    let agent = Process::start_with(&home.environment(), &[&agent[..], &log_all].concat()).await;
    let servers = agent.address().to_string();
    let proxy = ["proxy", "--port", "0", "--servers", &servers];
    let proxy = Process::start_with(&home.environment(), &[&proxy[..], &log_all].concat()).await;
    proxy.has_up(1).await;
    let mut client = proxy.connect().await;
    assert_eq!(client.ask(&chat("tiny", "hi")).await.status, 200);
    let (code, made, _) = home.run(&["token"]).await;
    assert_eq!((code, made.trim().len(), mode(&home.file())), (Some(0), 64, 0o600));
    assert_eq!(mode(home.file().parent().unwrap()), 0o700);
    for log in [agent.log(), proxy.log()] {
        assert!(!log.contains(made.trim()) && !log.contains(&made[..16]), "{log}");
    }
    assert!(agent.log().contains("`olol token` prints it"), "{}", agent.log());
}

#[tokio::test]
async fn commands_that_start_at_the_same_time_have_the_same_token() {
    let home = Home::new();
    let printing = (0..6).map(|_| home.run(&["token"]));
    let printed: Vec<String> =
        futures_util::future::join_all(printing).await.into_iter().map(|ended| ended.1).collect();
    assert!(printed.iter().all(|token| *token == printed[0] && token.trim().len() == 64), "{printed:?}");
    let (_, rotated, said) = home.run(&["token", "--rotate"]).await;
    assert!(rotated != printed[0] && said.contains("every other machine"), "{said}");
    assert_eq!(home.run(&["token"]).await.1, rotated);
    assert_eq!(mode(&home.file()), 0o600);
}

#[tokio::test]
async fn a_token_is_taken_from_a_flag_then_the_environment_then_the_folder() {
    let cluster = Cluster::of(1).await;
    let home = Home::new();
    let [folder, _] = home.environment();
    let environment = [folder, ("OLOL_TOKEN", ANOTHER)];
    assert_eq!(ended(&Process::run_with(&environment, &["token"]).await).1.trim(), ANOTHER);
    assert!(!home.file().exists());
    let (code, _, error) = ended(&Process::run_with(&environment, &["token", "--rotate"]).await);
    assert!(code == Some(1) && error.contains("OLOL_TOKEN"), "{error}");
    let file = File::with(token().reveal());
    let (path, ollama) = (file.path(), format!("http://{}", cluster.server(0).address()));
    let flag = ["token", "--token-file", path.to_str().unwrap()];
    assert_eq!(ended(&Process::run_with(&environment, &flag).await).1.trim(), token().reveal());
    let other_file = File::with(ANOTHER);
    let other = other_file.path();
    let turn = ["token", "--rotate", "--token-file", other.to_str().unwrap()];
    let (code, made, _) = ended(&Process::run_with(&environment, &turn).await);
    assert!(code == Some(0) && std::fs::read_to_string(&other).unwrap() == made && made.trim() != ANOTHER);
    let (code, _, error) = ended(&Process::run_with(&environment, &["token", "--token-file", "/nowhere/token"]).await);
    assert!(code == Some(1) && error.matches("No such file").count() == 1, "{error}");
    let arguments = ["server", "--port", "0", "--ollama-host", &ollama];
    let by_environment = Process::start_with(&environment, &arguments).await;
    let named = [&arguments[..], &["--token-file", path.to_str().unwrap()]].concat();
    let by_flag = Process::start_with(&environment, &named).await;
    for (agent, its, other) in [(by_environment, ANOTHER, token().reveal()), (by_flag, token().reveal(), ANOTHER)] {
        assert_eq!(ask_everything(agent.address(), Some(its)).await[1].code(), Code::Ok);
        assert_eq!(ask_everything(agent.address(), Some(other)).await[1].code(), Code::Unauthenticated);
    }
    assert!(!home.file().exists());
}

#[tokio::test]
async fn the_environment_may_give_several_tokens_and_the_first_is_shown() {
    let cluster = Cluster::of(1).await;
    let ollama = format!("http://{}", cluster.server(0).address());
    let both = format!("{ANOTHER}, {}", token().reveal());
    let variables = [("OLOL_TOKEN", both.as_str())];
    assert_eq!(ended(&Process::run_with(&variables, &["token"]).await).1.trim(), ANOTHER);
    let agent = Process::start_with(&variables, &["server", "--port", "0", "--ollama-host", &ollama]).await;
    for shown in [ANOTHER, token().reveal()] {
        assert_eq!(ask_everything(agent.address(), Some(shown)).await[1].code(), Code::Ok);
    }
    // A proxy that knows only the second, and one that shows the other and has it too.
    for tokens in [token().reveal(), &both] {
        let servers = agent.address().to_string();
        let arguments = ["proxy", "--port", "0", "--servers", &servers];
        Process::start_with(&[("OLOL_TOKEN", tokens)], &arguments).await.has_up(1).await;
    }
    let many = [ANOTHER; 5].join(" ");
    let (code, _, error) = ended(&Process::run_with(&[("OLOL_TOKEN", &many)], &["token"]).await);
    assert!(
        code == Some(1) && error.contains("it has 5 tokens, and may have 4") && !error.contains(ANOTHER),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_wrong_with_a_token_is_said_and_nothing_of_it() {
    const BAD: &str = "Geheimnis-mit-einem-Leerzeichen und-mehr";
    let home = Home::new();
    let file = File::with(BAD);
    let path = file.path();
    let path = path.to_str().unwrap();
    for command in [&["server", "--port", "0"][..], &["proxy", "--port", "0"], &["up", "--port", "0"]] {
        let named = [command, &["--token-file", path]].concat();
        let (code, out, error) = home.run(&named).await;
        assert!(code == Some(1) && error.contains("letters, digits"), "{command:?}: {error}");
        assert!(!(out + &error).contains("Geheimnis"), "{error}");
    }
    let [folder, _] = home.environment();
    let (code, _, error) =
        ended(&Process::run_with(&[folder, ("OLOL_TOKEN", "kurz")], &["proxy", "--port", "0"]).await);
    assert!(
        code == Some(1) && error.contains("OLOL_TOKEN: a token has 32 to 512 characters") && !error.contains("kurz")
    );
    file.mode(0o644);
    let (code, _, error) = home.run(&["server", "--port", "0", "--token-file", path]).await;
    assert!(code == Some(1) && error.contains("chmod 600"), "{error}");
    let (code, _, error) = home.run(&["server", "--port", "0", "--token-file", "/nowhere/token"]).await;
    assert!(code == Some(1) && error.contains("/nowhere/token"), "{error}");
    assert!(!home.file().exists());
}

#[tokio::test]
async fn a_proxy_without_agents_needs_no_token() {
    let cluster = Cluster::of(1).await.all_have("tiny");
    let servers = format!("http://{}", cluster.server(0).address());
    let nowhere = [("XDG_CONFIG_HOME", "/proc/nowhere"), ("OLOL_TOKEN", "")];
    let proxy = Process::start_with(&nowhere, &["proxy", "--port", "0", "--servers", &servers]).await;
    proxy.has_up(1).await;
    let (code, _, error) =
        ended(&Process::run_with(&nowhere, &["proxy", "--port", "0", "--servers", "localhost:1"]).await);
    assert!(code == Some(1) && error.contains("cannot be written to /proc/nowhere/olol/token"), "{error}");
}

#[tokio::test]
async fn an_agent_beyond_loopback_warns() {
    let cluster = Cluster::of(1).await;
    let ollama = format!("http://{}", cluster.server(0).address());
    for (host, warns) in [("127.0.0.1", false), ("0.0.0.0", true)] {
        let agent = Process::start(&["server", "--host", host, "--port", "0", "--ollama-host", &ollama]).await;
        assert_eq!(agent.log().contains("beyond this machine without TLS"), warns, "{}", agent.log());
    }
}

#[tokio::test]
async fn an_agent_does_not_keep_who_does_not_show_the_token() {
    let cluster = Cluster::of(1).await.over(Way::Agents).all_have("tiny");
    let olol = Olol::start(&cluster, "").await;
    let agent = olol.agents()[0].address();
    let mut silent = tokio::net::TcpStream::connect(agent).await.unwrap();
    let mut slow = tokio::net::TcpStream::connect(agent).await.unwrap();
    slow.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    let io = hyper_util::rt::TokioIo::new(tokio::net::TcpStream::connect(agent).await.unwrap());
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let refused = tokio::spawn(connection);
    let request = http::Request::post("http://olol/olol.v1.Server/Watch").header("olol-token", ANOTHER);
    let answer = sender.send_request(request.body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap());
    let answer = patiently("an answer", answer).await.unwrap();
    assert_eq!(answer.headers()["grpc-status"], "16");
    // Its own token, in a stream that never ends.
    assert!(olol.is_server_up(0));
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    for stream in [&mut silent, &mut slow] {
        assert!(matches!(patiently("it is closed", stream.read(&mut [0; 64])).await, Ok(0) | Err(_)));
    }
    let _ = patiently("the connection ends", refused).await.unwrap();
    assert!(begun.elapsed().as_secs() <= 11, "{:?}", begun.elapsed());
    tokio::time::resume();
    olol.knows(&cluster).await;
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    drop(sender);
}

#[tokio::test]
async fn a_call_goes_nowhere_but_to_the_server_beside_the_agent() {
    let [cluster, elsewhere] = [Cluster::of(1).await.all_have("tiny"), Cluster::of(1).await];
    let agent = agent(Endpoint::parse(&cluster.server(0).address().to_string(), 0).unwrap()).await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", agent.address())).unwrap();
    let channel = patiently("a gRPC connection", endpoint.connect()).await.unwrap();
    let mut client = ServerClient::with_interceptor(channel, |mut request: tonic::Request<()>| {
        request.metadata_mut().insert("olol-token", token().reveal().parse().unwrap());
        Ok(request)
    });
    let other = elsewhere.server(0).address();
    for (method, path, code) in [
        ("GET", format!("http://{other}/api/tags"), Code::Ok),
        ("CONNECT", other.to_string(), Code::InvalidArgument),
        ("GET", "*".to_owned(), Code::InvalidArgument),
        ("GET", String::new(), Code::InvalidArgument),
        ("G E T", "/api/tags".to_owned(), Code::InvalidArgument),
    ] {
        let head = RelayHead { method: method.to_owned(), path: path.clone(), ..Default::default() };
        let call = RelayRequest { head: Some(head), body: bytes::Bytes::new(), last: true };
        let answer = patiently("an answer", client.relay(futures_util::stream::iter([call]))).await;
        assert_eq!(status(answer).code(), code, "{method} {path}");
    }
    assert!(elsewhere.server(0).seen("").is_empty() && elsewhere.server(0).seen("/api/tags").is_empty());
}

#[tokio::test]
async fn hostile_bytes_do_no_harm_to_an_agent_or_a_proxy() {
    let cluster = Cluster::of(1).await.over(Way::Agents).all_have("tiny");
    let certs = tempfile::tempdir().unwrap();
    certs::init(certs.path(), 1).unwrap();
    let order = Order { name: "proxy".to_owned(), hosts: Vec::new(), is_client: false, days: 1 };
    let made = certs::issue(certs.path(), &order).unwrap();
    let olol = Olol::start(&cluster, "").await;
    let tls = format!("[tls]\ncert = '{}'\nkey = '{}'\n", made.cert.display(), made.key.display());
    let secure = Olol::at(vec![format!("0@http://{}", cluster.server(0).address())], &tls).await;
    let noise: Vec<u8> =
        (0..100_000_u32).map(|at| u8::try_from(at.wrapping_mul(2_654_435_761) >> 24).unwrap()).collect();
    let preface = &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..];
    // Headers whose list never ends: nine bytes of a frame, and what should be names and values.
    let endless = [&b"\0\x40\0\x09\0\0\0\0\x01"[..], &[b'a'; 0x4000]].concat().repeat(100);
    let begins_as_tls = [&b"\x16\x03\x01\x40\0"[..], &noise].concat();
    let hostile = [
        noise.clone(),
        [preface, &noise].concat(),
        [preface, &b"\0\0\0\x04\0\0\0\0\0"[..], &endless].concat(),
        [&b"GET / HTTP/1.1\r\nA: "[..], &vec![b'a'; 2 << 20]].concat(),
        [&b"GET /"[..], &vec![b'a'; 2 << 20], b" HTTP/1.1\r\n\r\n"].concat(),
        [&b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n"[..], &noise]
            .concat(),
        begins_as_tls,
    ];
    let agent = olol.agents()[0].address();
    for place in [agent, olol.address(), secure.address()] {
        for bytes in &hostile {
            let mut stream = tokio::net::TcpStream::connect(place).await.unwrap();
            // It may close before it has read all.
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = patiently("it closes", stream.read_to_end(&mut answer)).await;
        }
    }
    assert!(Connection::open(agent).await.ask(&Request::get("/api/tags")).await.text().contains("OLOL agent"));
    assert_eq!(olol.chat("tiny", "hi").await.status, 200);
    assert_eq!(cluster.server(0).work(), 1);
}
