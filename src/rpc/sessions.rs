//! Sessions over gRPC: their calls become Ollama's, with the history that is kept before what is asked.

use http::HeaderValue;
use olol_middleware::Reply;
use olol_middleware::time::unix_ms_now;
use olol_proto::v1::{
    ChatHistory, ChatMessageRequest, CreateSessionRequest, EndSessionResponse, GetSessionRequest, Message, Session,
    ShowModelRequest, session,
};
use serde_json::{Map, Value, json};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::typed::{self, nested, put};
use super::{Face, failure};
use crate::ollama::Ask;
use crate::sessions::{self, Entry, Visitor, Wanted};

impl Face {
    fn visitor(&self, metadata: &MetadataMap) -> Result<Visitor, Status> {
        match &self.keys {
            None => Ok(Visitor::anybody()),
            Some(keys) => Visitor::of(keys, metadata.as_ref()).map_err(|error| failure(&error)),
        }
    }

    pub(super) async fn created(
        &self,
        metadata: &MetadataMap,
        request: CreateSessionRequest,
    ) -> Result<Session, Status> {
        let visitor = self.visitor(metadata)?;
        let messages: Result<Vec<Value>, Status> = request.messages.into_iter().map(typed::message).collect();
        let mut wanted = Wanted {
            id: request.session_id,
            model: request.model,
            messages: messages?,
            parameters: object("model_parameters_json", &request.model_parameters_json)?,
            timeout: request.timeout_seconds,
            server: String::new(),
        };
        self.sessions.check(&visitor, &wanted).map_err(|error| refusal(&error))?;
        if request.preload {
            let mut ask = sessions::preload(&wanted);
            name(&mut ask, &wanted.id);
            let reply = self.good(self.showing(metadata, ask)).await?;
            let server = reply.body.outcome().servers.last();
            wanted.server = server.map(ToString::to_string).unwrap_or_default();
            // The model is there when the answer is over.
            typed::object(reply).await?;
        } else if wanted.id.is_empty() || self.sessions.find(&visitor, &wanted.id).await.is_err() {
            // One that there is already is found, whatever has become of its model.
            self.is_there(metadata, &wanted.model).await?;
        }
        let (session, _) = self.sessions.create(&visitor, wanted).await.map_err(|error| refusal(&error))?;
        Ok(shown(&session, false, Vec::new()))
    }

    /// A model that nobody has is said at once, not at the first turn. Who cannot be asked now may be later.
    async fn is_there(&self, metadata: &MetadataMap, model: &str) -> Result<(), Status> {
        let ask = typed::show(&ShowModelRequest { model: model.to_owned(), verbose: false });
        match self.good(self.showing(metadata, ask)).await {
            Err(status) if status.code() == Code::NotFound => Err(status),
            _ => Ok(()),
        }
    }

    pub(super) async fn turn(&self, metadata: &MetadataMap, request: ChatMessageRequest) -> Result<Reply, Status> {
        let visitor = self.visitor(metadata)?;
        let message = request.message.ok_or_else(|| Status::invalid_argument("message is missing"))?;
        let sent = vec![typed::message(message)?];
        sessions::turn::check(&sent).map_err(|error| refusal(&error))?;
        let asked = object("options_json", &request.options_json)?;
        let turn = self.sessions.turn(&visitor, &request.session_id, sent).await;
        let mut turn = turn.map_err(|error| refusal(&error))?;
        let mut body = Map::new();
        body.insert("model".to_owned(), turn.session().model_name.clone().into());
        let messages: Vec<Value> = turn.history().chain(turn.sent().iter().cloned()).collect();
        body.insert("messages".to_owned(), messages.into());
        let options = turn.options(asked);
        if !options.is_empty() {
            body.insert("options".to_owned(), options.into());
        }
        put(&mut body, "tools", nested("tools_json", &request.tools_json)?);
        typed::put_manner(&mut body, &request.format, &request.keep_alive, &request.think)?;
        let mut ask = Ask::post("/api/chat", Value::Object(body).to_string());
        name(&mut ask, &turn.session().session_id);
        let reply = self.good(self.showing(metadata, ask)).await?;
        Ok(turn.follow(reply))
    }

    pub(super) async fn ended(&self, metadata: &MetadataMap, id: &str) -> Result<EndSessionResponse, Status> {
        let visitor = self.visitor(metadata)?;
        let turns = self.sessions.end(&visitor, id).await.map_err(|error| refusal(&error))?;
        Ok(EndSessionResponse { turns: small(turns) })
    }

    pub(super) async fn exported(&self, metadata: &MetadataMap, request: GetSessionRequest) -> Result<Session, Status> {
        let visitor = self.visitor(metadata)?;
        let exported = self.sessions.export(&visitor, &request.session_id).await;
        let (session, is_busy, entries) = exported.map_err(|error| refusal(&error))?;
        let messages = sessions::last(&entries, request.last as usize).iter().map(history).collect();
        Ok(shown(&session, is_busy, messages))
    }
}

/// Says which conversation a call belongs to: it goes where its history is cached.
fn name(ask: &mut Ask, id: &str) {
    if let Ok(id) = HeaderValue::from_str(id)
        && !id.is_empty()
    {
        ask.headers.insert(sessions::HEADER, id);
    }
}

fn object(field: &'static str, text: &str) -> Result<Map<String, Value>, Status> {
    match nested(field, text)? {
        Value::Null => Ok(Map::new()),
        Value::Object(object) => Ok(object),
        _ => Err(Status::invalid_argument(format!("{field} is no JSON object"))),
    }
}

fn refusal(error: &sessions::Error) -> Status {
    let code = match error {
        sessions::Error::Bad(_) => Code::InvalidArgument,
        sessions::Error::NotFound(_) => Code::NotFound,
        sessions::Error::Conflict(_) => Code::AlreadyExists,
        sessions::Error::Forbidden(_) => Code::PermissionDenied,
        sessions::Error::TooLarge(_) => Code::ResourceExhausted,
        sessions::Error::Storage(_) => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

fn small(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn shown(of: &sessions::Session, is_busy: bool, messages: Vec<ChatHistory>) -> Session {
    let status = match of.status(is_busy, unix_ms_now()) {
        sessions::Status::Active => session::Status::Active,
        sessions::Status::Idle => session::Status::Idle,
        sessions::Status::Expired => session::Status::Expired,
        sessions::Status::Moved => session::Status::Moved,
    };
    Session {
        session_id: of.session_id.clone(),
        model: of.model_name.clone(),
        messages,
        created_at_ms: of.created_at,
        last_active_ms: of.last_active,
        server: of.server_host.clone(),
        model_parameters_json: json!(of.model_parameters).to_string(),
        timeout_seconds: of.timeout,
        status: status.into(),
        turns: of.turns,
        message_count: of.messages,
        bytes: of.bytes,
        moved_from: of.moved_from.clone(),
    }
}

fn history(entry: &Entry) -> ChatHistory {
    #[expect(clippy::cast_possible_truncation, reason = "nobody says a temperature in more digits")]
    let temperature = entry.temperature.unwrap_or_default() as f32;
    ChatHistory {
        message: Some(message(&entry.message)),
        timestamp_ms: entry.timestamp,
        temperature,
        tokens_used: small(entry.tokens_used),
        completion_time_seconds: entry.completion_time,
        metadata: entry.metadata.clone().into_iter().collect(),
    }
}

fn message(value: &Value) -> Message {
    let read = typed::chatted(&json!({"message": value})).message.unwrap_or_default();
    let images = value["images"].as_array().into_iter().flatten();
    Message { images: images.filter_map(typed::image).collect(), ..read }
}
