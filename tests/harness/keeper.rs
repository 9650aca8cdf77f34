//! An Ollama whose models are files in a folder, as a real one keeps them: it pulls from registries, copies and deletes.
//! And a registry, which counts what it gives.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use olol::agent::Agent;
use olol::models::store::{Digest, Manifest};
use olol::ollama::Endpoint;
use olol_middleware::ModelName;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::cluster;
use super::script::Gate;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A server that listens until it dies.
#[derive(Debug)]
struct Listening {
    address: SocketAddr,
    tasks: Mutex<JoinSet<()>>,
}

impl Listening {
    fn start<F, A>(at: SocketAddr, answer: F) -> Self
    where
        F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
        A: Future<Output = Response<Body>> + Send + 'static,
    {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(at).unwrap();
        let listener: TcpListener = socket.listen(64).unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let answer = answer.clone();
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                connections.spawn(async move {
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, tasks: Mutex::new(tasks) }
    }

    /// Ends, with all its connections.
    fn dies(&self) {
        self.tasks.lock().unwrap().abort_all();
    }
}

/// Any port of loopback.
fn anywhere() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn full(status: u16, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut answer = Response::new(Full::new(bytes.into()).boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}

fn object(status: u16, value: &Value) -> Response<Body> {
    full(status, value.to_string())
}

/// The folder of a store.
#[derive(Clone, Debug)]
struct Files(PathBuf);

impl Files {
    fn manifest(&self, name: &str) -> PathBuf {
        let parts = ModelName::parts(name).unwrap_or_else(|| panic!("a name: {name}"));
        parts.iter().fold(self.0.join("manifests"), |path, part| path.join(part))
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.0.join("blobs").join(digest.replace(':', "-"))
    }

    /// Puts a model there that is made of these blobs, and returns its digest.
    fn put(&self, name: &str, blobs: &[&[u8]]) -> String {
        let kinds = ["model", "template"].into_iter().cycle();
        let layers: Vec<Value> = blobs
            .iter()
            .zip(kinds)
            .map(|(bytes, kind)| {
                let digest = Digest::of(bytes).to_string();
                std::fs::create_dir_all(self.0.join("blobs")).unwrap();
                std::fs::write(self.blob(&digest), bytes).unwrap();
                json!({"mediaType": format!("application/vnd.ollama.image.{kind}"), "digest": digest, "size": bytes.len()})
            })
            .collect();
        let manifest = json!({"schemaVersion": 2, "layers": layers}).to_string();
        std::fs::create_dir_all(self.manifest(name).parent().unwrap()).unwrap();
        std::fs::write(self.manifest(name), &manifest).unwrap();
        Digest::of(manifest.as_bytes()).hex().to_owned()
    }

    fn read(&self, name: &str) -> Option<Manifest> {
        Manifest::parse(std::fs::read(self.manifest(name)).ok()?.into()).ok()
    }

    /// Names as an Ollama shows them, with their manifests.
    fn all(&self) -> Vec<(String, Manifest)> {
        let mut found = Vec::new();
        let dirs = |path: &Path| -> Vec<PathBuf> {
            std::fs::read_dir(path).map(|all| all.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
        };
        let word = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        for host in dirs(&self.0.join("manifests")) {
            for namespace in dirs(&host) {
                for model in dirs(&namespace) {
                    for tag in dirs(&model) {
                        let [host, namespace, model, tag_word] =
                            [&host, &namespace, &model, &tag].map(|path| word(path));
                        let name = match (host.as_str(), namespace.as_str()) {
                            ("registry.ollama.ai", "library") => format!("{model}:{tag_word}"),
                            ("registry.ollama.ai", _) => format!("{namespace}/{model}:{tag_word}"),
                            _ => format!("{host}/{namespace}/{model}:{tag_word}"),
                        };
                        if let Some(manifest) =
                            std::fs::read(&tag).ok().and_then(|bytes| Manifest::parse(bytes.into()).ok())
                        {
                            found.push((name, manifest));
                        }
                    }
                }
            }
        }
        found
    }
}

/// A registry of models.
#[derive(Debug)]
pub struct Hub {
    folder: TempDir,
    listening: Listening,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Counts {
    bytes: AtomicU64,
    manifests: AtomicU64,
    gate: Mutex<Option<Gate>>,
}

impl Hub {
    /// A registry without models.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let counts =
            Arc::new(Counts { bytes: AtomicU64::new(0), manifests: AtomicU64::new(0), gate: Mutex::new(None) });
        let (files, given) = (Files(folder.path().to_owned()), counts.clone());
        let answer = move |request| std::future::ready(give(&files, &given, &request));
        Self { listening: Listening::start(anywhere(), answer), folder, counts }
    }

    /// Has a model of these blobs; returns its digest.
    pub fn has(&self, name: &str, blobs: &[&[u8]]) -> String {
        Files(self.folder.path().to_owned()).put(name, blobs)
    }

    /// The name under which Ollamas get a model from here.
    pub fn name(&self, model: &str) -> String {
        format!("{}/library/{model}:latest", self.listening.address)
    }

    /// Bytes of blobs that it gave.
    pub fn gave(&self) -> u64 {
        self.counts.bytes.load(Ordering::Relaxed)
    }

    /// How often it was asked for a manifest.
    pub fn was_asked(&self) -> u64 {
        self.counts.manifests.load(Ordering::Relaxed)
    }

    /// Gives half of each blob, and the rest when the gate lets it.
    pub fn gives_half_until(&self, gate: &Gate) {
        *self.counts.gate.lock().unwrap() = Some(gate.clone());
    }
}

fn give(files: &Files, counts: &Arc<Counts>, request: &Request<Incoming>) -> Response<Body> {
    let parts: Vec<&str> = request.uri().path().split('/').collect();
    let ["", "v2", "library", model, kind, last] = parts[..] else { return full(404, "") };
    if kind == "manifests" {
        counts.manifests.fetch_add(1, Ordering::Relaxed);
        return match files.read(&format!("{model}:{last}")) {
            Some(manifest) => full(200, manifest.bytes),
            None => full(404, ""),
        };
    }
    let Ok(bytes) = std::fs::read(files.blob(last)) else { return full(404, "") };
    let text = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut answer = full(200, "");
    if request.method() == Method::HEAD {
        answer.headers_mut().insert("content-length", bytes.len().into());
        return answer;
    }
    let host = text("host");
    if !host.starts_with("localhost") {
        let port = host.rsplit(':').next().unwrap();
        let place = format!("http://localhost:{port}{}", request.uri().path());
        *answer.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        answer.headers_mut().insert("location", place.parse().unwrap());
        return answer;
    }
    let first: usize = text("range").trim_start_matches("bytes=").split('-').next().unwrap().parse().unwrap();
    let rest = Bytes::from(bytes).slice(first..);
    let half = rest.slice(..rest.len() / 2);
    let other = rest.slice(half.len()..);
    let gate = counts.gate.lock().unwrap().clone();
    let counts = counts.clone();
    let pieces = futures_util::stream::unfold(vec![other, half], move |mut left| {
        let (counts, gate) = (counts.clone(), gate.clone());
        async move {
            let piece = left.pop()?;
            if let (true, Some(gate)) = (left.is_empty(), gate) {
                gate.pass().await;
            }
            counts.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Some((Ok(Frame::data(piece)), left))
        }
    });
    let mut answer = Response::new(StreamBody::new(pieces).boxed_unsync());
    *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    answer.headers_mut().insert("content-length", rest.len().into());
    answer
}

/// An Ollama that keeps its models in a folder.
#[derive(Debug)]
pub struct Keeper {
    folder: TempDir,
    listening: Mutex<Listening>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Copies of names wait there.
    gate: Mutex<Option<Gate>>,
    pulls: AtomicU64,
    /// Counted by those that go on.
    pulling: Arc<()>,
    /// Whether its disk has no room for names.
    is_full: AtomicBool,
}

impl Keeper {
    /// An Ollama without models.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("blobs")).unwrap();
        std::fs::create_dir_all(folder.path().join("manifests")).unwrap();
        let state = Arc::<State>::default();
        let listening = Mutex::new(Self::listen(&folder, &state, anywhere()));
        Self { folder, listening, state }
    }

    fn listen(folder: &TempDir, state: &Arc<State>, at: SocketAddr) -> Listening {
        let (files, state) = (Files(folder.path().to_owned()), state.clone());
        Listening::start(at, move |request| keep(files.clone(), state.clone(), request))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listening.lock().unwrap().address
    }

    /// An agent beside it.
    pub async fn agent(&self) -> Agent {
        cluster::agent(Endpoint::parse(&self.address().to_string(), 0).unwrap()).await
    }

    /// Ends. What it has, it has.
    pub fn dies(&self) {
        self.listening.lock().unwrap().dies();
    }

    /// Is there again, at the same address, with what it had.
    pub fn comes_back(&self) {
        let listening = Self::listen(&self.folder, &self.state, self.address());
        *self.listening.lock().unwrap() = listening;
    }

    /// Has a model of these blobs; returns its digest.
    pub fn has(&self, name: &str, blobs: &[&[u8]]) -> String {
        self.files().put(name, blobs)
    }

    /// Its models and their digests, all of them, sorted.
    pub fn holds(&self) -> Vec<(String, String)> {
        let of = |(name, manifest): (String, Manifest)| (name, manifest.digest().hex().to_owned());
        let mut all: Vec<_> = self.files().all().into_iter().map(of).collect();
        all.sort();
        all
    }

    /// The digest of one of its models.
    pub fn digest(&self, name: &str) -> Option<String> {
        let name = ModelName::parse(name);
        self.holds().into_iter().find(|(held, _)| ModelName::parse(held) == name).map(|(_, digest)| digest)
    }

    /// Blobs that it has a part of.
    pub fn parts(&self) -> usize {
        self.blobs().iter().filter(|name| name.ends_with("-partial")).count()
    }

    /// The files of its blobs.
    pub fn blobs(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.folder.path().join("blobs")).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Copies no name before the gate lets it.
    pub fn copies_behind(&self, gate: &Gate) {
        *self.state.gate.lock().unwrap() = Some(gate.clone());
    }

    /// Has no room for names any more: what it copies stays empty.
    pub fn is_full(&self) {
        self.state.is_full.store(true, Ordering::Relaxed);
    }

    /// Whether it has anything under a name, and be it nothing whole.
    pub fn has_file(&self, name: &str) -> bool {
        self.files().manifest(name).exists()
    }

    /// Whether it pulls.
    pub fn is_pulling(&self) -> bool {
        Arc::strong_count(&self.state.pulling) > 1
    }

    /// How many pulls it was asked for.
    pub fn pulls(&self) -> u64 {
        self.state.pulls.load(Ordering::Relaxed)
    }

    fn files(&self) -> Files {
        Files(self.folder.path().to_owned())
    }
}

async fn keep(files: Files, state: Arc<State>, request: Request<Incoming>) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let text = |key: &str| asked[key].as_str().unwrap_or_default().to_owned();
    match (method.as_str(), path.as_str()) {
        ("GET", "/api/version") => object(200, &json!({"version": "0.33.0"})),
        ("GET", "/api/ps") => object(200, &json!({"models": []})),
        ("GET", "/api/tags") => {
            let listed = |(name, manifest): (String, Manifest)| {
                json!({"name": name, "model": name, "size": manifest.size(), "digest": manifest.digest().hex(),
                    "modified_at": "2026-01-01T00:00:00Z", "capabilities": ["completion"]})
            };
            object(200, &json!({"models": files.all().into_iter().map(listed).collect::<Vec<_>>()}))
        }
        ("GET", "/v1/models") => {
            let listed = |(name, _): (String, Manifest)| json!({"id": name, "object": "model", "created": 1});
            object(200, &json!({"object": "list", "data": files.all().into_iter().map(listed).collect::<Vec<_>>()}))
        }
        ("POST", "/api/show") => match files.read(&text("model")) {
            Some(manifest) => {
                let blob = files.blob(&manifest.layers[0].digest.to_string());
                object(
                    200,
                    &json!({"modelfile": format!("FROM {}\n", blob.display()), "parameters": "", "model_info": {}}),
                )
            }
            None => object(404, &json!({"error": "model not found"})),
        },
        ("POST", "/api/copy") => {
            let gate = state.gate.lock().unwrap().clone();
            if let Some(gate) = gate {
                gate.pass().await;
            }
            let Ok(bytes) = std::fs::read(files.manifest(&text("source"))) else {
                return object(404, &json!({"error": "model not found"}));
            };
            let path = files.manifest(&text("destination"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            if state.is_full.load(Ordering::Relaxed) {
                std::fs::write(path, "").unwrap();
                return object(500, &json!({"error": "copy_file_range: no space left on device"}));
            }
            std::fs::write(path, bytes).unwrap();
            full(200, "")
        }
        ("DELETE", "/api/delete") => delete(&files, &text("model")),
        ("POST", "/api/pull") => pull(files, &state, &text("model")),
        _ => full(404, "404 page not found"),
    }
}

/// Removes a name, and what nobody else needs.
fn delete(files: &Files, name: &str) -> Response<Body> {
    let Some(manifest) = files.read(name) else { return object(404, &json!({"error": "model not found"})) };
    std::fs::remove_file(files.manifest(name)).unwrap();
    let others = files.all();
    for layer in manifest.layers {
        if !others.iter().any(|(_, other)| other.layer(&layer.digest).is_some()) {
            let _ = std::fs::remove_file(files.blob(&layer.digest.to_string()));
        }
    }
    full(200, "")
}

fn pull(files: Files, state: &State, name: &str) -> Response<Body> {
    state.pulls.fetch_add(1, Ordering::Relaxed);
    let (tell, lines) = mpsc::channel::<Value>(1);
    let (name, counted) = (name.to_owned(), state.pulling.clone());
    let pulling = async move {
        // Gone clients end it.
        let gone = tell.clone();
        tokio::select! {
            () = gone.closed() => {}
            done = pull_all(&files, &name, &tell) => {
                let last = done.map_or_else(|error| json!({ "error": error }), |()| json!({"status": "success"}));
                let _ = tell.send(last).await;
            }
        }
        drop(counted);
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(pulling);
    let lines = futures_util::stream::unfold((lines, tasks), |(mut lines, tasks)| async move {
        let line = lines.recv().await?;
        Some((Ok(Frame::data(Bytes::from(format!("{line}\n")))), (lines, tasks)))
    });
    let mut answer = Response::new(StreamBody::new(lines).boxed_unsync());
    answer.headers_mut().insert("content-type", "application/x-ndjson".parse().unwrap());
    answer
}

/// Pulls as Ollama does: what is there stays, what was begun goes on.
async fn pull_all(files: &Files, name: &str, tell: &mpsc::Sender<Value>) -> Result<(), String> {
    let say = async |line: Value| drop(tell.send(line).await);
    say(json!({"status": "pulling manifest"})).await;
    let (address, rest) = name.split_once('/').ok_or("pull model manifest: file does not exist")?;
    let (model, tag) = rest.rsplit_once(':').unwrap_or((rest, "latest"));
    let (status, _, bytes) = ask(address, "GET", &format!("/v2/{model}/manifests/{tag}"), None).await?;
    if status != 200 {
        return Err("pull model manifest: file does not exist".to_owned());
    }
    let bytes = bytes.collect().await.map_err(|error| error.to_string())?.to_bytes();
    let manifest = Manifest::parse(bytes).map_err(|error| error.to_string())?;
    for layer in &manifest.layers {
        let digest = layer.digest.to_string();
        let (path, part) = (files.blob(&digest), files.blob(&format!("{digest}-partial")));
        let short = &layer.digest.hex()[..12];
        let line = |done: usize| json!({"status": format!("pulling {short}"), "digest": digest, "total": layer.size, "completed": done});
        if path.exists() {
            say(line(usize::try_from(layer.size).unwrap())).await;
            continue;
        }
        let place = format!("/v2/{model}/blobs/{digest}");
        let (_, headers, _) = ask(address, "HEAD", &place, None).await?;
        assert_eq!(headers["content-length"], layer.size.to_string());
        let (status, headers, _) = ask(address, "GET", &place, None).await?;
        assert_eq!(status, 307, "Ollama needs to be sent elsewhere");
        let sent_to: http::Uri = headers["location"].parse().unwrap();
        let mut have = std::fs::read(&part).unwrap_or_default();
        say(line(have.len())).await;
        let range = format!("bytes={}-{}", have.len(), layer.size - 1);
        let at = sent_to.authority().unwrap().to_string();
        let (status, _, mut body) = ask(&at, "GET", sent_to.path(), Some(&range)).await?;
        assert_eq!(status, 206);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| error.to_string())?;
            if let Ok(data) = frame.into_data() {
                have.extend_from_slice(&data);
                std::fs::write(&part, &have).unwrap();
                say(line(have.len())).await;
            }
        }
        if Digest::of(&have) != layer.digest {
            return Err("digest mismatch".to_owned());
        }
        std::fs::rename(&part, &path).unwrap();
    }
    say(json!({"status": "verifying sha256 digest"})).await;
    say(json!({"status": "writing manifest"})).await;
    let path = files.manifest(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, &manifest.bytes).unwrap();
    Ok(())
}

async fn ask(
    address: &str,
    method: &str,
    path: &str,
    range: Option<&str>,
) -> Result<(u16, HashMap<String, String>, Incoming), String> {
    let stream = TcpStream::connect(address.to_owned()).await.map_err(|error| error.to_string())?;
    let connecting = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = connecting.await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header("host", address);
    if let Some(range) = range {
        request = request.header("range", range);
    }
    let request = request.body(http_body_util::Empty::<Bytes>::new()).unwrap();
    let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let (head, body) = answer.into_parts();
    let headers =
        head.headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
    Ok((head.status.as_u16(), headers, body))
}
