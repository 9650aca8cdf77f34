//! Sessions over HTTP: the pages that make, show and end them, and the turns of those that a chat names in its header.
//!
//! `X-Olol-Session` names a conversation, and `affinity` goes by it. Only where there is a session of that name, and on
//! `/api/chat` and `/v1/chat/completions`, is a history kept: then what was said before goes before the client's messages, and what is said now is stored when it is whole.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::Query;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;
use olol_middleware::call::Body;
use olol_middleware::json::{self, Span};
use olol_middleware::{Error, Head, Payload, Reply, Route};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body::{HttpBody, Taken};
use super::{Api, body, request, response};
use crate::sessions::{self, Form, HEADER, Turn, Visitor, Wanted};

/// Where sessions are.
pub(super) const PATH: &str = "/api/status/sessions";
/// Sessions on a page, and the most that may be.
const LIMIT: usize = 100;
const MOST: usize = 1000;

/// The name of a session in a path that is one of these pages; empty: the list.
pub(super) fn named(path: &str) -> Option<&str> {
    let rest = path.strip_prefix(PATH)?;
    if rest.is_empty() { Some("") } else { rest.strip_prefix('/').filter(|name| !name.is_empty()) }
}

/// What the query of the list says.
#[derive(Debug, Deserialize)]
struct Asked {
    #[serde(default)]
    after: String,
    #[serde(default = "usual")]
    limit: usize,
}

/// What the query of a session says.
#[derive(Debug, Deserialize)]
struct Part {
    /// Only so many of the last messages; 0: all of them.
    #[serde(default)]
    last: usize,
}

fn usual() -> usize {
    LIMIT
}

/// What is said of a session that is to be made.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Made {
    session_id: String,
    #[serde(alias = "model")]
    model_name: String,
    messages: Vec<Value>,
    model_parameters: Map<String, Value>,
    timeout: f64,
    preload: bool,
}

impl Api {
    /// Answers one of the pages.
    pub(super) async fn sessions_page(
        &self,
        request: Request<Incoming>,
        client: Option<SocketAddr>,
    ) -> Response<HttpBody> {
        let visitor = match Visitor::of(&self.shared.keys, request.headers()) {
            Ok(visitor) => visitor,
            Err(error) => return response::refused(Route::Status, &error),
        };
        // The only character of a name that clients write otherwise.
        let path = request.uri().path().replace("%40", "@");
        let id = named(&path).unwrap_or_default();
        let answer = match (request.method(), id) {
            (&Method::GET | &Method::HEAD, "") => self.list(&visitor, &request).await,
            (&Method::POST, "") => self.make(&visitor, request, client).await,
            (&Method::GET | &Method::HEAD, id) => self.show(&visitor, id, request.uri()).await,
            (_, "") => return response::not_allowed("GET, HEAD, POST"),
            (&Method::DELETE, id) => {
                let ended = self.sessions.end(&visitor, id).await;
                ended.map(|turns| told(StatusCode::OK, &json!({"ended": true, "turns": turns})))
            }
            _ => return response::not_allowed("DELETE, GET, HEAD"),
        };
        answer.unwrap_or_else(|error| told(error.status(), &json!({"error": error.to_string()})))
    }

    async fn list(
        &self,
        visitor: &Visitor,
        request: &Request<Incoming>,
    ) -> Result<Response<HttpBody>, sessions::Error> {
        let asked = Query::<Asked>::try_from_uri(request.uri());
        let Query(asked) = asked.map_err(|error| sessions::Error::Bad(error.to_string()))?;
        if !(1..=MOST).contains(&asked.limit) {
            return Err(sessions::Error::Bad(format!("limit must be from 1 to {MOST}")));
        }
        let page = self.sessions.list(visitor, &asked.after, asked.limit).await?;
        let shown: Vec<Value> = page.sessions.iter().map(|(session, is_busy)| session.shown(*is_busy)).collect();
        Ok(told(StatusCode::OK, &json!({"sessions": shown, "next": page.next})))
    }

    async fn show(&self, visitor: &Visitor, id: &str, uri: &Uri) -> Result<Response<HttpBody>, sessions::Error> {
        let part = Query::<Part>::try_from_uri(uri).map_err(|error| sessions::Error::Bad(error.to_string()))?;
        let (session, is_busy, entries) = self.sessions.export(visitor, id).await?;
        let mut shown = session.shown(is_busy);
        shown["messages"] = sessions::last(&entries, part.last).iter().map(sessions::Entry::shown).collect();
        Ok(told(StatusCode::OK, &shown))
    }

    async fn make(
        &self,
        visitor: &Visitor,
        request: Request<Incoming>,
        client: Option<SocketAddr>,
    ) -> Result<Response<HttpBody>, sessions::Error> {
        let (parts, incoming) = request.into_parts();
        let (payload, _taken) = match body::whole(incoming, &parts.headers, &self.room).await {
            Ok(arrived) => arrived,
            Err(error) => return Ok(response::refused(Route::Status, &error)),
        };
        let Payload::Whole(pieces) = payload else { return Err(no_room()) };
        let made: Made = serde_json::from_slice(&pieces.concat())
            .map_err(|error| sessions::Error::Bad(format!("the body is no session: {error}")))?;
        let mut wanted = Wanted {
            id: made.session_id,
            model: made.model_name,
            messages: made.messages,
            parameters: made.model_parameters,
            timeout: made.timeout,
            server: String::new(),
        };
        self.sessions.check(visitor, &wanted)?;
        if made.preload {
            match self.preload(&wanted, &parts.headers, client).await {
                Ok(server) => wanted.server = server,
                Err(refused) => return Ok(*refused),
            }
        }
        let (session, is_new) = self.sessions.create(visitor, wanted).await?;
        let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
        Ok(told(status, &session.shown(false)))
    }

    /// Loads the model of a session; the server that did, or the answer that says why none did.
    async fn preload(
        &self,
        wanted: &Wanted,
        headers: &HeaderMap,
        client: Option<SocketAddr>,
    ) -> Result<String, Box<Response<HttpBody>>> {
        let mut ask = sessions::preload(wanted);
        for name in &olol_middleware::keys::HEADERS {
            for value in headers.get_all(name) {
                ask.headers.append(name, value.clone());
            }
        }
        let refused = |error: &Error| Box::new(response::refused(Route::Generate, error));
        let reply = self.ask(ask, client).await.map_err(|error| refused(&error))?;
        if !reply.status.is_success() {
            return Err(Box::new(response::written(reply, false)));
        }
        let server = server(&reply.body);
        // The model is there when the answer is over.
        reply.body.collect(1 << 20).await.map_err(|error| refused(&error))?;
        Ok(server)
    }

    /// Whether a request may be a turn of a session.
    pub(super) fn may_be_a_turn(&self, head: &Head) -> bool {
        matches!(head.route, Route::Chat | Route::V1Chat)
            && head.peek.asks
            && head.peek.talk.messages.is_some()
            && self.sessions.may_know()
            && head.headers.contains_key(HEADER)
    }

    /// Sends a request with what was said before it, if it belongs to a session; else as it is.
    pub(super) async fn take_turn(
        &self,
        head: &mut Arc<Head>,
        payload: Payload,
        taken: &mut Taken,
    ) -> Result<Reply, Error> {
        let (Some(messages), Some(Payload::Whole(pieces))) = (head.peek.talk.messages, payload.again()) else {
            return self.send(head.clone(), payload).await;
        };
        let Some(mut turn) = self.turn(head, json::cut(&pieces, messages).into_owned()).await? else {
            return self.send(head.clone(), payload).await;
        };
        let edits = match head.route {
            Route::V1Chat => {
                turn = turn.in_form(Form::OpenAi);
                edits_of_v1(&mut turn, messages, &pieces)
            }
            _ => edits(&mut turn, messages, head.peek.options, &pieces),
        };
        let added: usize = edits.iter().map(|(_, text)| text.len()).sum();
        if !taken.grow(added) {
            return Err(no_room().into());
        }
        let payload = payload.edited(&edits);
        if let Some(head) = Arc::get_mut(head) {
            // What is to be read must come as it is.
            head.headers.remove(header::ACCEPT_ENCODING);
            head.headers.remove(header::TRANSFER_ENCODING);
            if let Some(length) = payload.length() {
                head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            }
        }
        request::look(head, &payload);
        let number = turn.session().turns + 1;
        let mut reply = self.send(head.clone(), payload).await?;
        reply.headers.insert(sessions::TURN, HeaderValue::from(number));
        Ok(turn.asked_by(head.id.as_str()).follow(reply))
    }

    /// The turn that a request with these messages is; none: its header only names a conversation.
    async fn turn(&self, head: &Head, messages: Vec<u8>) -> Result<Option<Turn>, Error> {
        let Some(id) = head.headers.get(HEADER).and_then(|id| id.to_str().ok()) else { return Ok(None) };
        // Who may not ask is told so by the layers.
        let Ok(visitor) = Visitor::of(&self.shared.keys, &head.headers) else { return Ok(None) };
        if self.sessions.find(&visitor, id).await.is_err() {
            return Ok(None);
        }
        let Ok(sent) = serde_json::from_slice::<Vec<Value>>(&messages) else { return Ok(None) };
        if sent.is_empty() || sessions::turn::check(&sent).is_err() {
            return Ok(None);
        }
        match self.sessions.turn(&visitor, id, sent).await {
            Ok(turn) => Ok(Some(turn)),
            Err(sessions::Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Who keeps sessions.
    pub fn sessions(&self) -> &sessions::Sessions {
        &self.sessions
    }

    /// The keys of clients.
    pub fn keys(&self) -> &Arc<olol_middleware::keys::Keys> {
        &self.shared.keys
    }

    /// What is known of the servers.
    pub fn cluster(&self) -> &Arc<olol_middleware::Cluster> {
        &self.shared.cluster
    }
}

/// What a body gets: what was said before, and the options of its session.
fn edits(turn: &mut Turn, messages: Span, options: Option<Span>, pieces: &[Bytes]) -> Vec<(Span, Bytes)> {
    let mut edits: Vec<_> = before(turn, messages).into_iter().collect();
    let asked = options.map(|span| serde_json::from_slice::<Value>(&json::cut(pieces, span)));
    let is_readable = !matches!(asked, Some(Err(_) | Ok(Value::Array(_) | Value::String(_) | Value::Number(_))));
    let asked = match asked {
        Some(Ok(Value::Object(asked))) => asked,
        _ => Map::new(),
    };
    let has_own = !turn.session().model_parameters.is_empty();
    let options_text = Value::Object(turn.options(asked)).to_string();
    match options {
        // What is no object is the server's to refuse.
        _ if !has_own || !is_readable => {}
        Some(span) => edits.push((span, options_text.into())),
        // At the end: an `options` that is null comes before, and the last one counts.
        None => {
            if let Ok(start) = json::members(pieces, |_, _, _| {}) {
                edits.push((Span { start, end: start }, format!(",\"options\":{options_text}").into()));
            }
        }
    }
    edits
}

/// The same for a body of OpenAI's form, which has its options beside the messages.
fn edits_of_v1(turn: &mut Turn, messages: Span, pieces: &[Bytes]) -> Vec<(Span, Bytes)> {
    let mut asked = Map::new();
    let _ = json::members(pieces, |key, _, span| {
        if key == b"temperature"
            && let Ok(temperature) = serde_json::from_slice(&json::cut(pieces, span))
        {
            asked.insert("temperature".to_owned(), temperature);
        }
    });
    // What is said twice counts as it was said last: what the client says comes behind.
    let own = turn.parameters();
    turn.options(asked);
    let mut edits: Vec<_> = before(turn, messages).into_iter().collect();
    if !own.is_empty()
        && let Some(brace) = pieces.iter().flatten().position(|byte| *byte == b'{')
    {
        let text = Value::Object(own).to_string();
        let (start, members) = (brace + 1, &text[1..text.len() - 1]);
        edits.push((Span { start, end: start }, format!("{members},").into()));
    }
    edits
}

/// What was said before, before what is said now.
fn before(turn: &Turn, messages: Span) -> Option<(Span, Bytes)> {
    let before: Vec<String> = turn.history().map(|message| message.to_string()).collect();
    let start = messages.start + 1;
    (!before.is_empty()).then(|| (Span { start, end: start }, format!("{},", before.join(",")).into()))
}

fn server(body: &Body) -> String {
    body.outcome().servers.last().map(ToString::to_string).unwrap_or_default()
}

fn no_room() -> sessions::Error {
    sessions::Error::Storage("there is no room for the messages now, see [limits] body-memory".to_owned())
}

fn told(status: StatusCode, page: &Value) -> Response<HttpBody> {
    let mut answer = response::full(status, page.to_string());
    let kind = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}
