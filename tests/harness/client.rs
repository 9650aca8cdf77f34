//! A client that sees every byte.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::patiently;
use super::wire::{self, Head, Headers};

/// A request, sent as it is written here.
#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    path: String,
    version: &'static str,
    headers: Headers,
    body: Vec<u8>,
    is_chunked: bool,
}

impl Request {
    /// A request without a body.
    pub fn new(method: &str, path: &str) -> Self {
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            version: "HTTP/1.1",
            headers: Headers::default(),
            body: Vec::new(),
            is_chunked: false,
        }
    }

    /// A GET.
    pub fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    /// A POST of this body.
    pub fn post(path: &str, body: impl ToString) -> Self {
        Self::new("POST", path).with_body(body)
    }

    /// Sends this as its body.
    #[expect(clippy::needless_pass_by_value, reason = "reads better where it is called")]
    pub fn with_body(self, body: impl ToString) -> Self {
        Self { body: body.to_string().into_bytes(), ..self }
    }

    /// Adds a header, its name as it is.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.0.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sends the body in two chunks, without stating its length.
    pub fn chunked(self) -> Self {
        Self { is_chunked: true, ..self }.header("Transfer-Encoding", "chunked")
    }

    /// Speaks HTTP/1.0.
    pub fn in_http_1_0(self) -> Self {
        Self { version: "HTTP/1.0", ..self }
    }

    /// The request as bytes: with a host, and with the length of its body, unless it says something of them itself.
    pub fn to_bytes(&self) -> Vec<u8> {
        let length = self.body.len().to_string();
        let has_body = !self.body.is_empty() || matches!(self.method.as_str(), "POST" | "DELETE");
        let host = self.headers.get("host").is_none().then_some(("Host", "127.0.0.1"));
        let states_length = has_body && !self.is_chunked && self.headers.length().is_none();
        let length = states_length.then_some(("Content-Length", length.as_str()));
        let line = format!("{} {} {}", self.method, self.path, self.version);
        let body = if self.is_chunked { self.body_in_chunks() } else { self.body.clone() };
        [wire::head(&line, self.headers.iter().chain(host).chain(length)), body].concat()
    }

    fn body_in_chunks(&self) -> Vec<u8> {
        let (one, two) = self.body.split_at(self.body.len() / 2);
        let chunks = [one, two].into_iter().filter(|part| !part.is_empty()).map(wire::chunk);
        chunks.chain([wire::LAST_CHUNK.to_vec()]).collect::<Vec<_>>().concat()
    }
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// There was none.
    NoBody,
    /// With the length that was stated.
    Length,
    /// With the last chunk.
    LastChunk,
    /// With the connection, which is how it had to end.
    Close,
    /// Too early.
    Cut,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// The status line.
    pub line: String,
    /// The headers as they came.
    pub headers: Headers,
    /// The body, chunk by chunk; a body without chunks is one.
    pub chunks: Vec<Vec<u8>>,
    /// How the body ended.
    pub ending: Ending,
}

impl Answer {
    /// The value of a header; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_default()
    }

    /// The server that answered, by its name: "0", "1", …
    pub fn server(&self) -> &str {
        self.header("x-olol-server")
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.chunks.concat()).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text()).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The lines of the body, each as JSON; those of events without their prefix.
    pub fn lines(&self) -> Vec<Value> {
        let text = self.text();
        let lines = text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
        lines.filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What the model said, joined.
    pub fn said(&self) -> String {
        let part = |line: &Value| {
            let places = [
                &line["message"]["content"],
                &line["response"],
                &line["choices"][0]["delta"]["content"],
                &line["choices"][0]["message"]["content"],
            ];
            places.into_iter().find_map(Value::as_str).unwrap_or_default().to_owned()
        };
        self.lines().iter().map(part).collect()
    }

    /// The error that the body, or its last line, tells; empty if none.
    pub fn error(&self) -> String {
        let lines = self.lines();
        lines.last().and_then(|line| line["error"].as_str()).unwrap_or_default().to_owned()
    }

    /// The names of the models in a list, in its order.
    pub fn names(&self) -> Vec<String> {
        let list = self.json();
        let entries = list["models"].as_array().or(list["data"].as_array()).cloned().unwrap_or_default();
        entries.iter().filter_map(|entry| entry["name"].as_str().or(entry["id"].as_str()).map(str::to_owned)).collect()
    }
}

/// One connection of a client. Dropping it is leaving.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// Of each request that is still to be answered: whether it is a HEAD.
    heads_asked: VecDeque<bool>,
    framing: Framing,
    ending: Ending,
}

/// What is left of the body that is being read.
#[derive(Clone, Copy, Debug)]
enum Framing {
    Over,
    Left(u64),
    Chunks,
    UntilClose,
}

impl Connection {
    /// Connects.
    pub async fn open(address: SocketAddr) -> Self {
        let stream = patiently("a connection", TcpStream::connect(address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (reader, writer) = stream.into_split();
        Self {
            reader: BufReader::new(reader),
            writer,
            heads_asked: VecDeque::new(),
            framing: Framing::Over,
            ending: Ending::NoBody,
        }
    }

    /// Connects, unless nobody listens.
    pub async fn try_open(address: SocketAddr) -> Option<Self> {
        let stream = patiently("a connection", TcpStream::connect(address)).await.ok()?;
        let (reader, writer) = stream.into_split();
        let (heads_asked, framing, ending) = (VecDeque::new(), Framing::Over, Ending::NoBody);
        Some(Self { reader: BufReader::new(reader), writer, heads_asked, framing, ending })
    }

    /// Sends a request and reads all of its answer; `None` if the connection ends before it begins.
    pub async fn try_ask(&mut self, request: &Request) -> Option<Answer> {
        self.heads_asked.push_back(request.method == "HEAD");
        patiently("writing", self.writer.write_all(&request.to_bytes())).await.ok()?;
        let head = self.try_head().await?;
        let (chunks, ending) = self.rest().await;
        Some(Answer { status: status(&head), line: head.line, headers: head.headers, chunks, ending })
    }

    /// Writes bytes.
    pub async fn write(&mut self, bytes: &[u8]) {
        patiently("writing", self.writer.write_all(bytes)).await.unwrap();
    }

    /// Writes until nobody takes any more, and leaves it at that.
    pub async fn write_until_stuck(&mut self, bytes: &[u8]) {
        let pause = Duration::from_millis(200);
        while let Ok(Ok(1..)) = tokio::time::timeout(pause, self.writer.write(bytes)).await {}
    }

    /// Closes the sending side, and goes on reading.
    pub async fn half_close(&mut self) {
        self.writer.shutdown().await.unwrap();
    }

    /// Sends a request.
    pub async fn send(&mut self, request: &Request) {
        self.heads_asked.push_back(request.method == "HEAD");
        self.write(&request.to_bytes()).await;
    }

    /// Sends a request and reads all of its answer.
    pub async fn ask(&mut self, request: &Request) -> Answer {
        self.send(request).await;
        self.answer().await
    }

    /// Reads the head of the next answer, which may be a `100 Continue`.
    pub async fn head(&mut self) -> Head {
        self.try_head().await.expect("an answer, not the end of the connection")
    }

    /// The same; `None` if the connection ended instead.
    pub async fn try_head(&mut self) -> Option<Head> {
        let head = patiently("the head of an answer", wire::read_head(&mut self.reader)).await.ok().flatten()?;
        let status = status(&head);
        if status >= 200 {
            let is_bare = self.heads_asked.pop_front().unwrap_or(false) || matches!(status, 204 | 304);
            self.framing = match head.headers.length() {
                _ if is_bare => Framing::Over,
                Some(length) => Framing::Left(length),
                None if head.headers.are_chunked() => Framing::Chunks,
                None => Framing::UntilClose,
            };
            self.ending = Ending::NoBody;
        }
        Some(head)
    }

    /// Reads the next chunk of the body, or the next bytes of one without chunks; `None` when it has ended.
    pub async fn piece(&mut self) -> Option<Vec<u8>> {
        patiently("the next piece of an answer", self.next_piece()).await
    }

    /// Reads the next line of a stream.
    pub async fn line(&mut self) -> Value {
        let piece = self.piece().await.expect("another line");
        serde_json::from_slice(&piece).unwrap_or_else(|_| panic!("no line: {}", String::from_utf8_lossy(&piece)))
    }

    async fn next_piece(&mut self) -> Option<Vec<u8>> {
        match self.framing {
            Framing::Over => None,
            Framing::Chunks => match wire::read_chunk(&mut self.reader).await {
                Ok(Some(data)) => Some(data),
                Ok(None) => self.end(Ending::LastChunk),
                Err(_) => self.end(Ending::Cut),
            },
            Framing::Left(0) => self.end(Ending::Length),
            Framing::Left(left) => match self.some_bytes(left).await {
                Some(bytes) => {
                    self.framing = Framing::Left(left - bytes.len() as u64);
                    Some(bytes)
                }
                None => self.end(Ending::Cut),
            },
            Framing::UntilClose => match self.some_bytes(u64::MAX).await {
                Some(bytes) => Some(bytes),
                None => self.end(Ending::Close),
            },
        }
    }

    fn end(&mut self, ending: Ending) -> Option<Vec<u8>> {
        self.framing = Framing::Over;
        self.ending = ending;
        None
    }

    async fn some_bytes(&mut self, most: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(most.min(64 << 10)).unwrap()];
        let read = self.reader.read(&mut bytes).await.ok().filter(|read| *read > 0)?;
        bytes.truncate(read);
        Some(bytes)
    }

    /// Reads the rest of the body.
    pub async fn rest(&mut self) -> (Vec<Vec<u8>>, Ending) {
        let is_chunked = matches!(self.framing, Framing::Chunks);
        let mut pieces = Vec::new();
        while let Some(piece) = self.piece().await {
            pieces.push(piece);
        }
        if !is_chunked && !pieces.is_empty() {
            pieces = vec![pieces.concat()];
        }
        (pieces, self.ending)
    }

    /// Reads the next answer as a whole, interim ones left out.
    pub async fn answer(&mut self) -> Answer {
        let head = loop {
            let head = self.head().await;
            if status(&head) >= 200 {
                break head;
            }
        };
        let (chunks, ending) = self.rest().await;
        Answer { status: status(&head), line: head.line, headers: head.headers, chunks, ending }
    }

    /// Whether nothing comes for a while. Only to show that something does not happen, which no event can tell.
    pub async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(100), self.reader.fill_buf()).await.is_err()
    }

    /// Waits until the other side has closed, with nothing more to read.
    pub async fn is_closed(&mut self) -> bool {
        patiently("the end of a connection", self.reader.fill_buf()).await.map_or(true, <[u8]>::is_empty)
    }
}

/// The code in a status line.
pub fn status(head: &Head) -> u16 {
    head.line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status: {}", head.line))
}
