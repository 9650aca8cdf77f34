//! A registry of one model, for one Ollama, for as long as it takes to copy it.
//!
//! An Ollama takes models from registries alone. So an agent that copies a model to the Ollama beside it opens one on
//! loopback: on a port of the system's choice, under a namespace that nobody can guess. It speaks the part of the protocol
//! that Ollama's own client uses (`server/download.go`), and has the bytes from wherever its [`Source`] has them.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt};
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use olol_middleware::{BoxError, ModelName};
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::store::{Digest, Manifest, hex};

/// Connections at a time: Ollama takes a blob in up to 16 parts.
const CONNECTIONS: usize = 64;
/// The longest that a client may take for the head of a request.
const HEAD: Duration = Duration::from_secs(10);

/// Where the bytes of blobs come from.
pub trait Source: Send + Sync + 'static {
    /// So many bytes of a blob from an offset on. An error ends it: whoever can be asked has been asked.
    fn read(&self, digest: &Digest, offset: u64, length: u64) -> BoxStream<'static, Result<Bytes, BoxError>>;
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

/// A registry that is open until it is dropped.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    secret: String,
    failure: watch::Receiver<Option<String>>,
    _serving: AbortOnDropHandle<()>,
}

struct Shop {
    manifest: Manifest,
    source: Arc<dyn Source>,
    pace: Option<Pace>,
    secret: String,
    port: u16,
    failure: watch::Sender<Option<String>>,
}

impl Registry {
    /// Opens one for a model. `rate`: the most bytes a second.
    pub async fn open(manifest: Manifest, source: Arc<dyn Source>, rate: Option<NonZeroU64>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let secret = secret()?;
        let failure = watch::Sender::new(None);
        let told = failure.subscribe();
        let pace = rate.map(Pace::new);
        let shop = Arc::new(Shop { manifest, source, pace, secret: secret.clone(), port: address.port(), failure });
        let serving = AbortOnDropHandle::new(tokio::spawn(serve(listener, shop)));
        Ok(Self { address, secret, failure: told, _serving: serving })
    }

    /// A name under which its Ollama gets the model from it.
    pub fn name(&self, model: &str) -> String {
        let [_, _, model, tag] = ModelName::parts(model).unwrap_or(["", "", "model", "latest"]);
        format!("{}/{}/{model}:{tag}", self.address, self.secret)
    }

    /// Waits until the source has failed, and says why.
    pub async fn fails(&self) -> String {
        let mut failure = self.failure.clone();
        let told = failure.wait_for(Option::is_some).await.map(|told| told.clone());
        told.ok().flatten().unwrap_or_else(|| "the registry for the copy has ended".to_owned())
    }
}

/// 128 bits that nobody can guess, as a namespace.
fn secret() -> io::Result<String> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(format!("{}{}", ModelName::COPYING, hex(&bytes)))
}

async fn serve(listener: TcpListener, shop: Arc<Shop>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let shop = shop.clone();
        connections.spawn(async move {
            let service = service_fn(|request| {
                let shop = shop.clone();
                async move { Ok::<_, Infallible>(shop.answer(&request)) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD);
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
            drop(place);
        });
        while connections.try_join_next().is_some() {}
    }
}

impl Shop {
    fn answer(self: &Arc<Self>, request: &Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        let is_head = request.method() == Method::HEAD;
        if !is_head && request.method() != Method::GET {
            return short(StatusCode::METHOD_NOT_ALLOWED, "");
        }
        match self.wanted(path) {
            Some(Wanted::Manifest) => {
                let kind = "application/vnd.docker.distribution.manifest.v2+json";
                let mut answer = full(StatusCode::OK, if is_head { Bytes::new() } else { self.manifest.bytes.clone() });
                answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
                answer.headers_mut().insert(header::CONTENT_LENGTH, self.manifest.bytes.len().into());
                answer
            }
            Some(Wanted::Blob(digest, size)) if is_head => {
                let _ = digest;
                let mut answer = short(StatusCode::OK, "");
                answer.headers_mut().insert(header::CONTENT_LENGTH, size.into());
                answer
            }
            Some(Wanted::Blob(digest, size)) => self.blob(request, &digest, size),
            None => short(StatusCode::NOT_FOUND, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"not here"}]}"#),
        }
    }

    /// What a path names, if it is something of this model.
    fn wanted(&self, path: &str) -> Option<Wanted> {
        let mut parts = path.strip_prefix("/v2/")?.split('/');
        let (secret, _model, kind, last) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_known: bool = secret.as_bytes().ct_eq(self.secret.as_bytes()).into();
        if !is_known || parts.next().is_some() {
            return None;
        }
        match kind {
            "manifests" => Some(Wanted::Manifest),
            "blobs" => {
                let digest = Digest::parse(last).ok()?;
                let size = self.manifest.layer(&digest)?.size;
                Some(Wanted::Blob(digest, size))
            }
            _ => None,
        }
    }

    fn blob(self: &Arc<Self>, request: &Request<Incoming>, digest: &Digest, size: u64) -> Response<Body> {
        let text = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let Some(range) = text(header::RANGE) else {
            // Ollama first asks where a blob lies, and wants to be sent to another host; then it asks there for parts.
            let is_sent = text(header::HOST).is_some_and(|host| host.starts_with("localhost"));
            if is_sent {
                return self.part(StatusCode::OK, digest, 0, size);
            }
            let place = format!("http://localhost:{}{}", self.port, request.uri().path());
            let mut answer = short(StatusCode::TEMPORARY_REDIRECT, "");
            if let Ok(place) = HeaderValue::from_str(&place) {
                answer.headers_mut().insert(header::LOCATION, place);
            }
            return answer;
        };
        let Some((first, last)) = range_of(range, size) else {
            return short(StatusCode::RANGE_NOT_SATISFIABLE, "");
        };
        let mut answer = self.part(StatusCode::PARTIAL_CONTENT, digest, first, last + 1 - first);
        if let Ok(told) = HeaderValue::from_str(&format!("bytes {first}-{last}/{size}")) {
            answer.headers_mut().insert(header::CONTENT_RANGE, told);
        }
        answer
    }

    fn part(self: &Arc<Self>, status: StatusCode, digest: &Digest, offset: u64, length: u64) -> Response<Body> {
        let bytes = self.source.read(digest, offset, length);
        let frames = futures_util::stream::unfold((bytes, self.clone()), |(mut bytes, shop)| async move {
            match bytes.next().await? {
                Ok(piece) => {
                    if let Some(pace) = &shop.pace {
                        pace.pass(piece.len()).await;
                    }
                    Some((Ok(Frame::data(piece)), (bytes, shop)))
                }
                Err(error) => {
                    shop.failure.send_if_modified(|told| {
                        let is_first = told.is_none();
                        told.get_or_insert_with(|| error.to_string());
                        is_first
                    });
                    // Whoever opened the registry ends the pull. An answer that broke off would have Ollama ask again and
                    // again, for a minute.
                    std::future::pending().await
                }
            }
        });
        let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(header::CONTENT_LENGTH, length.into());
        answer
    }
}

/// What is asked for.
enum Wanted {
    Manifest,
    Blob(Digest, u64),
}

/// The first and the last byte of a range in a blob of this size.
fn range_of(text: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.trim().parse().ok()?;
    let end = size.checked_sub(1)?;
    let last = if last.trim().is_empty() { end } else { last.trim().parse::<u64>().ok()?.min(end) };
    (first <= last).then_some((first, last))
}

fn short(status: StatusCode, text: &'static str) -> Response<Body> {
    full(status, Bytes::from_static(text.as_bytes()))
}

fn full(status: StatusCode, bytes: Bytes) -> Response<Body> {
    let mut answer = Response::new(Full::new(bytes).boxed_unsync());
    *answer.status_mut() = status;
    answer
}

/// Lets no more than so many bytes a second pass.
#[derive(Debug)]
struct Pace {
    rate: NonZeroU64,
    free: Mutex<Instant>,
}

impl Pace {
    fn new(rate: NonZeroU64) -> Self {
        Self { rate, free: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may pass.
    async fn pass(&self, bytes: usize) {
        let micros = (bytes as u64).saturating_mul(1_000_000) / self.rate;
        let until = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            *free = (*free).max(Instant::now()) + Duration::from_micros(micros);
            *free
        };
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::client::conn::http1 as client;
    use tokio::net::TcpStream;

    struct Text(&'static str);

    impl Source for Text {
        fn read(&self, _: &Digest, offset: u64, length: u64) -> BoxStream<'static, Result<Bytes, BoxError>> {
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
            let bytes = Bytes::from_static(&self.0.as_bytes()[range]);
            Box::pin(futures_util::stream::iter([Ok(bytes)]))
        }
    }

    struct Fails;

    impl Source for Fails {
        fn read(&self, _: &Digest, _: u64, _: u64) -> BoxStream<'static, Result<Bytes, BoxError>> {
            Box::pin(futures_util::stream::iter([Err("all are gone".into())]))
        }
    }

    fn manifest() -> Manifest {
        let blob = Digest::of(b"weights");
        Manifest::parse(format!(r#"{{"layers":[{{"digest":"{blob}","size":7}}]}}"#).into()).unwrap()
    }

    async fn ask(registry: &Registry, method: &str, path: &str, more: &[(&str, &str)]) -> (u16, Response<()>, String) {
        let stream = TcpStream::connect(registry.address).await.unwrap();
        let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path);
        if !more.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", registry.address.to_string());
        }
        for (name, value) in more {
            request = request.header(*name, *value);
        }
        let answer = sender.send_request(request.body(http_body_util::Empty::<Bytes>::new()).unwrap()).await.unwrap();
        let (head, body) = answer.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), Response::from_parts(head, ()), String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn it_gives_one_model_as_ollamas_client_asks_for_it() {
        let registry = Registry::open(manifest(), Arc::new(Text("weights")), None).await.unwrap();
        let name = registry.name("ada/Tiny:q4");
        assert!(ModelName::is_unfinished(&name) && name.ends_with("/Tiny:q4"), "{name}");
        let base = format!("/v2/{}/tiny", registry.secret);
        let (status, _, body) = ask(&registry, "GET", &format!("{base}/manifests/q4"), &[]).await;
        assert_eq!((status, body.as_bytes()), (200, &*manifest().bytes));
        let blob = format!("{base}/blobs/{}", Digest::of(b"weights"));
        let (status, head, _) = ask(&registry, "HEAD", &blob, &[]).await;
        assert_eq!((status, head.headers()["content-length"].to_str().unwrap()), (200, "7"));
        let (status, head, _) = ask(&registry, "GET", &blob, &[]).await;
        let place = format!("http://localhost:{}{blob}", registry.address.port());
        assert_eq!((status, head.headers()["location"].to_str().unwrap()), (307, &*place));
        let localhost = ("host", "localhost:1");
        assert_eq!(ask(&registry, "GET", &blob, &[localhost]).await.2, "weights");
        let (status, head, body) = ask(&registry, "GET", &blob, &[localhost, ("range", "bytes=2-4")]).await;
        assert_eq!((status, &*body, head.headers()["content-range"].to_str().unwrap()), (206, "igh", "bytes 2-4/7"));
        assert_eq!(ask(&registry, "GET", &blob, &[localhost, ("range", "bytes=7-")]).await.0, 416);
    }

    #[tokio::test]
    async fn who_does_not_know_its_secret_gets_nothing() {
        let registry = Registry::open(manifest(), Arc::new(Text("weights")), None).await.unwrap();
        for path in ["/", "/v2/", "/v2/library/tiny/manifests/latest", "/v2/olol-copy-0/tiny/manifests/latest"] {
            assert_eq!(ask(&registry, "GET", path, &[]).await.0, 404, "{path}");
        }
        let stranger = format!("/v2/{}/tiny/blobs/{}", registry.secret, Digest::of(b"another"));
        assert_eq!(ask(&registry, "GET", &stranger, &[]).await.0, 404, "only files of its model");
    }

    #[tokio::test]
    async fn a_source_that_fails_is_told_of_and_the_answer_waits() {
        let registry = Registry::open(manifest(), Arc::new(Fails), None).await.unwrap();
        let blob = format!("/v2/{}/tiny/blobs/{}", registry.secret, Digest::of(b"weights"));
        tokio::select! {
            answer = ask(&registry, "GET", &blob, &[("range", "bytes=0-6")]) => panic!("{answer:?}"),
            why = registry.fails() => assert_eq!(why, "all are gone"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pace_is_kept_by_all_together() {
        let pace = Pace::new(NonZeroU64::new(1000).unwrap());
        let begun = Instant::now();
        futures_util::future::join_all((0..4).map(|_| pace.pass(500))).await;
        assert_eq!(begun.elapsed().as_millis(), 2000);
    }
}
