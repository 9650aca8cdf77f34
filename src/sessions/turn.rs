//! One turn of a session: what goes before the client's messages, and how the answer becomes a part of the history.
//!
//! The answer passes byte for byte. Its text is collected on the way; the piece that ends it is held back until the turn is
//! on the disk, so whoever has seen the end of an answer finds its turn again, whatever happens to us. An answer that does
//! not come to its end leaves nothing.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use http::HeaderValue;
use olol_middleware::call::{Chunks, Outcome, Source};
use olol_middleware::time::unix_ms_now;
use olol_middleware::{Chunk, Error, Reply, instruments};
use serde_json::{Map, Value};

use super::openai;
use super::record::{self, Entry, Session};
use super::shared::Shared;
use super::store::{Append, Busy, Store};
use super::{HEADER, MOVED};

/// The longest answer that is kept, bytes.
const LONGEST: usize = 16 << 20;
/// What is said of one that is longer.
const TOO_LONG: &str = "the answer is too long to be kept";

/// Where sessions are kept, and with whom they are shared.
type Kept = (Arc<Store>, Option<Arc<Shared>>);

/// In which form a client says its messages and gets its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// As `/api/chat` does.
    #[default]
    Ollama,
    /// As `/v1/chat/completions` does.
    OpenAi,
}

/// A turn that has begun.
#[derive(Debug)]
pub struct Turn {
    form: Form,
    store: Arc<Store>,
    shared: Option<Arc<Shared>>,
    session: Arc<Session>,
    history: Vec<Entry>,
    sent: Vec<Value>,
    temperature: Option<f64>,
    request: String,
    /// When it began, milliseconds since 1970.
    begun: u64,
    // The session does not leave meanwhile.
    busy: Busy,
}

impl Turn {
    pub(super) fn new(
        (store, shared): Kept,
        session: Arc<Session>,
        busy: Busy,
        history: Vec<Entry>,
        sent: Vec<Value>,
    ) -> Self {
        Self {
            form: Form::Ollama,
            store,
            shared,
            session,
            history,
            sent,
            temperature: None,
            request: String::new(),
            begun: unix_ms_now(),
            busy,
        }
    }

    /// Its session as it was when the turn began.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The same turn in another form: so its messages were sent, and so its answer comes.
    #[must_use]
    pub fn in_form(mut self, form: Form) -> Self {
        self.form = form;
        if form == Form::OpenAi {
            self.sent = self.sent.iter().map(openai::kept).collect();
        }
        self
    }

    /// The messages that were said before, in the form of the turn.
    pub fn history(&self) -> impl Iterator<Item = Value> {
        self.history.iter().map(|entry| match self.form {
            Form::Ollama => entry.message.clone(),
            Form::OpenAi => openai::told(&entry.message),
        })
    }

    /// The messages of this turn, in Ollama's form.
    pub fn sent(&self) -> &[Value] {
        &self.sent
    }

    /// What a session of this turn says of its options, as members of the body of a call to `/v1/chat/completions`.
    pub fn parameters(&self) -> Map<String, Value> {
        openai::options(&self.session.model_parameters)
    }

    /// The options of the turn: those of the session, and before them what the client asks for.
    pub fn options(&mut self, asked: Map<String, Value>) -> Map<String, Value> {
        let mut options = self.session.model_parameters.clone();
        options.extend(asked);
        self.temperature = options.get("temperature").and_then(Value::as_f64);
        options
    }

    /// Says which request it is.
    #[must_use]
    pub fn asked_by(self, request: &str) -> Self {
        Self { request: request.to_owned(), ..self }
    }

    /// Follows the answer and stores the turn when it is whole. A refusal is no answer.
    pub fn follow(self, mut reply: Reply) -> Reply {
        if let Ok(id) = HeaderValue::from_str(&self.session.session_id) {
            reply.headers.insert(HEADER, id);
        }
        if !reply.status.is_success() {
            return reply;
        }
        let outcome = reply.body.outcome().clone();
        let before = &self.session.server_host;
        if let (Some(server), Ok(value)) = (outcome.servers.last(), HeaderValue::from_str(before))
            && !before.is_empty()
            && server.as_str() != before
        {
            reply.headers.insert(MOVED, value);
        }
        let recorder = |chunks| Recorder {
            chunks,
            outcome,
            said: Said { form: self.form, ..Said::default() },
            turn: Some(self),
            held: VecDeque::new(),
            saving: None,
            is_over: false,
        };
        Reply { body: reply.body.through(recorder), ..reply }
    }

    /// What is stored of it.
    fn stored(self, said: Said, outcome: &Outcome) -> (Kept, Append, Busy) {
        let Said { message, end, .. } = said;
        let server = outcome.servers.last().map(ToString::to_string).unwrap_or_default();
        let number = |key: &str| end.get(key).and_then(Value::as_u64).unwrap_or(0);
        let nanos = match number("total_duration") {
            // The other form does not say it.
            0 => unix_ms_now().saturating_sub(self.begun) * 1_000_000,
            nanos => nanos,
        };
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of some hours")]
        let seconds = nanos as f64 / 1e9;
        let tokens = match number("prompt_eval_count") + number("eval_count") {
            0 => outcome.counters.map_or(0, |counters| counters.prompt_tokens.saturating_add(counters.output_tokens)),
            tokens => tokens,
        };
        let text = |key: &str| end.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let known = [
            ("server", server.clone()),
            ("model", text("model")),
            ("done_reason", text("done_reason")),
            ("request", self.request),
        ];
        let metadata: BTreeMap<String, String> = known
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let answer = Entry {
            temperature: self.temperature,
            tokens_used: tokens,
            completion_time: seconds,
            metadata,
            ..Entry::sent(message)
        };
        let (timestamp, temperature) = (self.begun, self.temperature);
        let sent = self.sent.into_iter().map(|message| Entry { timestamp, temperature, ..Entry::sent(message) });
        let entries = sent.chain([answer]).collect();
        ((self.store, self.shared), Append { key: self.session.key(), entries, server }, self.busy)
    }
}

/// Checks messages that a client sends: objects with a role.
pub(crate) fn check(messages: &[Value]) -> Result<(), super::Error> {
    record::check_messages(messages)
}

/// What the model has said so far.
#[derive(Debug, Default)]
struct Said {
    form: Form,
    /// A line that is not there as a whole.
    rest: Vec<u8>,
    content: String,
    thinking: String,
    calls: Vec<Value>,
    /// Bytes of the lines with calls.
    called: usize,
    /// The last line, or what stands for it.
    end: Map<String, Value>,
    /// Whether the model has said all, and only the end of the answer is to come.
    is_ending: bool,
    /// The whole message, when it is.
    message: Value,
}

/// What has come of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Come {
    /// Some of it.
    Some,
    /// All of it.
    All,
    /// What is no answer, or none that can be kept.
    Unfit(&'static str),
}

impl Said {
    /// Takes note of bytes that pass.
    fn see(&mut self, bytes: &[u8]) -> Come {
        let mut bytes = bytes;
        while let Some(at) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at(at);
            bytes = &rest[1..];
            let come = if self.rest.is_empty() {
                self.line(line)
            } else {
                self.rest.extend_from_slice(line);
                let line = std::mem::take(&mut self.rest);
                self.line(&line)
            };
            if come != Come::Some {
                return come;
            }
        }
        self.rest.extend_from_slice(bytes);
        if self.rest.len() > LONGEST { Come::Unfit(TOO_LONG) } else { Come::Some }
    }

    /// Whether the end has begun, or a line that may be the last one.
    fn may_be_ending(&self) -> bool {
        self.is_ending || !self.rest.is_empty()
    }

    /// The bytes are over.
    fn over(&mut self) -> Come {
        let line = std::mem::take(&mut self.rest);
        self.line(&line)
    }

    fn line(&mut self, line: &[u8]) -> Come {
        if line.trim_ascii().is_empty() {
            return Come::Some;
        }
        if self.form == Form::OpenAi {
            return self.event(line);
        }
        let length = line.len();
        let Ok(Value::Object(mut line)) = serde_json::from_slice(line) else {
            return Come::Unfit("a line of the answer is no JSON");
        };
        if line.contains_key("error") {
            return Come::Unfit("the answer ends in an error");
        }
        let mut message = line.remove("message").unwrap_or_default();
        self.content.push_str(message["content"].as_str().unwrap_or_default());
        self.thinking.push_str(message["thinking"].as_str().unwrap_or_default());
        if let Some(Value::Array(calls)) = message.get_mut("tool_calls").map(Value::take) {
            self.calls.extend(calls);
            self.called += length;
        }
        if self.is_too_long() {
            return Come::Unfit(TOO_LONG);
        }
        if line.get("done") != Some(&Value::Bool(true)) {
            return Come::Some;
        }
        self.end = line;
        self.message = self.whole();
        Come::All
    }

    fn is_too_long(&self) -> bool {
        self.content.len() + self.thinking.len() + self.called > LONGEST
    }

    /// A line of OpenAI's form: an event of a stream, or the answer in one piece.
    fn event(&mut self, line: &[u8]) -> Come {
        let line = line.trim_ascii();
        let line = line.strip_prefix(b"data:").unwrap_or(line).trim_ascii();
        if line == b"[DONE]" {
            if !self.is_ending {
                return Come::Unfit("the answer says no reason for its end");
            }
            self.message = self.whole();
            return Come::All;
        }
        let Ok(mut event) = serde_json::from_slice::<Value>(line) else {
            return Come::Unfit("a line of the answer is no JSON");
        };
        if !event["error"].is_null() {
            return Come::Unfit("the answer ends in an error");
        }
        if let Some(model) = event["model"].as_str() {
            self.end.insert("model".to_owned(), model.into());
        }
        for (theirs, ours) in [("prompt_tokens", "prompt_eval_count"), ("completion_tokens", "eval_count")] {
            if let Some(count) = event["usage"][theirs].as_u64() {
                self.end.insert(ours.to_owned(), count.into());
            }
        }
        let Some(choice) = event.pointer_mut("/choices/0") else { return Come::Some };
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.end.insert("done_reason".to_owned(), reason.into());
            self.is_ending = true;
        }
        let is_whole = choice["message"].is_object();
        let Some(said) = choice.get_mut(if is_whole { "message" } else { "delta" }) else { return Come::Some };
        self.content.push_str(said["content"].as_str().unwrap_or_default());
        self.thinking.push_str(said["reasoning"].as_str().unwrap_or_default());
        if let Some(Value::Array(calls)) = said.get_mut("tool_calls").map(Value::take) {
            for call in calls {
                self.call(call);
            }
            self.called += line.len();
        }
        if self.is_too_long() {
            return Come::Unfit(TOO_LONG);
        }
        if !is_whole {
            return Come::Some;
        }
        self.message = self.whole();
        Come::All
    }

    /// A call of a tool, or the next part of one.
    fn call(&mut self, call: Value) {
        let at = call["index"].as_u64().and_then(|at| usize::try_from(at).ok()).unwrap_or(usize::MAX);
        let begun = self.calls.get_mut(at).and_then(|begun| begun.pointer_mut("/function/arguments"));
        if let (Some(Value::String(arguments)), Some(more)) = (begun, call["function"]["arguments"].as_str()) {
            arguments.push_str(more);
            return;
        }
        self.calls.push(call);
    }

    fn whole(&mut self) -> Value {
        let mut message = Map::new();
        message.insert("role".to_owned(), "assistant".into());
        message.insert("content".to_owned(), std::mem::take(&mut self.content).into());
        if !self.thinking.is_empty() {
            message.insert("thinking".to_owned(), std::mem::take(&mut self.thinking).into());
        }
        if !self.calls.is_empty() {
            message.insert("tool_calls".to_owned(), std::mem::take(&mut self.calls).into());
        }
        let message = Value::Object(message);
        match self.form {
            Form::Ollama => message,
            // But for its calls it is in Ollama's form.
            Form::OpenAi => {
                let mut kept = openai::kept(&message);
                if let Some(thinking) = message.get("thinking") {
                    kept["thinking"] = thinking.clone();
                }
                kept
            }
        }
    }
}

/// Passes an answer on, and its end when the turn is stored.
struct Recorder {
    chunks: Chunks,
    /// What was known of the answer at its head.
    outcome: Outcome,
    /// What is to be stored; `None`: it is, or will not be.
    turn: Option<Turn>,
    said: Said,
    /// Pieces that may contain the end.
    held: VecDeque<Chunk>,
    saving: Option<BoxFuture<'static, Result<(), Error>>>,
    is_over: bool,
}

impl Recorder {
    /// Stores the turn.
    fn save(&mut self) {
        let Some(turn) = self.turn.take() else { return };
        self.chunks.tell(&mut self.outcome);
        let ((store, shared), append, busy) = turn.stored(std::mem::take(&mut self.said), &self.outcome);
        // A task of its own: a client that leaves now does not undo it.
        let saving = tokio::spawn(async move {
            let stored = match shared {
                Some(shared) => shared.append(&store, append).await,
                None => store.append(append).await,
            };
            drop(busy);
            stored
        });
        self.saving = Some(Box::pin(async move {
            let stored = saving.await.map_err(|error| Error::Internal(error.to_string()))?;
            instruments::session_turn(match &stored {
                Ok(Some(_)) => "stored",
                Ok(None) => "ended",
                Err(_) => "failed",
            });
            stored.map(drop).map_err(Error::from)
        }));
    }

    /// Decides what becomes of what has come; an error ends the answer.
    fn judge(&mut self, come: Come) -> Result<(), Error> {
        match come {
            Come::Some => {}
            Come::All => self.save(),
            Come::Unfit(TOO_LONG) => {
                self.turn = None;
                instruments::session_turn("failed");
                return Err(Error::Storage(format!("{TOO_LONG}: a turn of a session has at most {LONGEST} bytes")));
            }
            Come::Unfit(_) => {
                self.turn = None;
                instruments::session_turn("broken");
            }
        }
        Ok(())
    }

    fn fail(&mut self, error: Error) -> Poll<Option<Result<Chunk, Error>>> {
        tracing::error!(%error, "a turn of a session is not kept: its answer is broken off");
        self.held.clear();
        self.is_over = true;
        Poll::Ready(Some(Err(error)))
    }
}

impl Source for Recorder {
    fn poll_chunk(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Error>>> {
        let this = &mut *self;
        loop {
            if let Some(saving) = &mut this.saving {
                let saved = ready!(saving.poll_unpin(cx));
                this.saving = None;
                if let Err(error) = saved {
                    return this.fail(error);
                }
            }
            let may_pass = this.turn.is_none() || !this.said.may_be_ending();
            if (may_pass || this.is_over)
                && let Some(chunk) = this.held.pop_front()
            {
                return Poll::Ready(Some(Ok(chunk)));
            }
            if this.is_over {
                return Poll::Ready(None);
            }
            match ready!(this.chunks.poll_next_unpin(cx)) {
                Some(Ok(chunk)) => {
                    let come = if this.turn.is_some() { this.said.see(&chunk.bytes) } else { Come::Some };
                    this.held.push_back(chunk);
                    if let Err(error) = this.judge(come) {
                        return this.fail(error);
                    }
                }
                Some(Err(error)) => {
                    this.turn = None;
                    this.is_over = true;
                    this.held.clear();
                    instruments::session_turn("broken");
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    this.is_over = true;
                    let come = if this.turn.is_some() { this.said.over() } else { Come::Some };
                    if let Err(error) = this.judge(come) {
                        return this.fail(error);
                    }
                    // What never came to its end is no turn.
                    if this.turn.take().is_some() {
                        instruments::session_turn("broken");
                    }
                }
            }
        }
    }

    fn tell(&self, outcome: &mut Outcome) {
        self.chunks.tell(outcome);
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};
    use olol_middleware::call::Body;
    use serde_json::json;

    use super::*;
    use crate::sessions::{Config, Sessions, Visitor, Wanted};

    struct Place {
        sessions: Sessions,
        _folder: tempfile::TempDir,
    }

    impl Place {
        async fn new(max_bytes: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let max_bytes = olol_middleware::units::Whole::new(max_bytes);
            let config = Config { dir: folder.path().to_owned(), max_bytes, ..Config::default() };
            let sessions = Sessions::new(config, "s.redb");
            let wanted = Wanted { id: "a".to_owned(), model: "m".to_owned(), ..Wanted::default() };
            sessions.create(&Visitor::anybody(), wanted).await.unwrap();
            Self { sessions, _folder: folder }
        }

        /// What comes of an answer that is sent in these pieces.
        async fn answer(&self, pieces: &[&str]) -> (Vec<String>, Option<String>) {
            self.answer_in(Form::Ollama, pieces).await
        }

        async fn answer_in(&self, form: Form, pieces: &[&str]) -> (Vec<String>, Option<String>) {
            let sent = vec![json!({"role": "user", "content": "hi"})];
            let turn = self.sessions.turn(&Visitor::anybody(), "a", sent).await.unwrap().in_form(form);
            let chunks: Vec<_> =
                pieces.iter().map(|piece| Ok(Chunk::from(bytes::Bytes::copy_from_slice(piece.as_bytes())))).collect();
            let body = Body::new(futures_util::stream::iter(chunks));
            let mut body = turn.follow(Reply { status: StatusCode::OK, headers: HeaderMap::new(), body }).body;
            let mut seen = Vec::new();
            while let Some(chunk) = body.next().await {
                match chunk {
                    Ok(chunk) => seen.push(String::from_utf8_lossy(&chunk.bytes).into_owned()),
                    Err(error) => return (seen, Some(error.to_string())),
                }
            }
            (seen, None)
        }

        async fn kept(&self) -> Vec<Value> {
            let (_, _, entries) = self.sessions.export(&Visitor::anybody(), "a").await.unwrap();
            entries.into_iter().map(|entry| entry.message).collect()
        }
    }

    fn delta(choice: &str) -> String {
        format!("data: {{\"id\":\"c\",\"model\":\"m\",\"choices\":[{choice}]}}\n\n")
    }

    fn text(text: &str) -> String {
        delta(&format!("{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}"))
    }

    const STOP: &str = "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}";
    const USAGE: &str =
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[tokio::test]
    async fn an_answer_in_the_other_form_is_kept_when_it_is_whole() {
        let calls = delta(
            "{\"delta\":{\"tool_calls\":[{\"index\":0,\"id\":\"x\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":\"}}]}}",
        );
        let more = delta("{\"delta\":{\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"1}\"}}]}}");
        let thinks = delta("{\"delta\":{\"reasoning\":\"hm\"}}");
        let whole = "{\"model\":\"m\",\"choices\":[{\"message\":{\"role\":\"assistant\",\"content\":\"Hello\"},\
                     \"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n";
        let hello = json!({"role": "assistant", "content": "Hello"});
        for (pieces, wanted, tokens) in [
            (vec![text("Hel"), text("lo"), delta(STOP), USAGE.to_owned(), DONE.to_owned()], hello.clone(), 5),
            (vec![[text("Hel"), text("lo"), delta(STOP), DONE.to_owned()].concat()], hello.clone(), 0),
            (vec![whole.to_owned()], hello, 5),
            (
                vec![thinks, calls, more, delta(STOP), DONE.to_owned()],
                json!({"role": "assistant", "content": "", "thinking": "hm",
                    "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}]}),
                0,
            ),
        ] {
            let place = Place::new(1 << 20).await;
            let (seen, error) =
                place.answer_in(Form::OpenAi, &pieces.iter().map(String::as_str).collect::<Vec<_>>()).await;
            assert_eq!((seen, error), (pieces, None));
            let (_, _, entries) = place.sessions.export(&Visitor::anybody(), "a").await.unwrap();
            assert_eq!((&entries[1].message, entries[1].tokens_used), (&wanted, tokens));
            assert!(entries[1].metadata["done_reason"] == "stop" && entries[1].metadata["model"] == "m");
        }
        let place = Place::new(1 << 20).await;
        let error = "data: {\"error\":{\"message\":\"no\"}}\n\n".to_owned();
        for pieces in [
            vec![text("Hel")],
            vec![text("Hel"), delta(STOP)],
            vec![text("Hel"), error, DONE.to_owned()],
            vec![DONE.to_owned()],
        ] {
            let (seen, error) =
                place.answer_in(Form::OpenAi, &pieces.iter().map(String::as_str).collect::<Vec<_>>()).await;
            assert_eq!((&seen, error), (&pieces, None));
            assert!(place.kept().await.is_empty(), "{pieces:?}");
        }
    }

    const PART: &str = "{\"message\":{\"role\":\"assistant\",\"content\":\"Hel\"},\"done\":false}\n";
    const LAST: &str = "{\"message\":{\"role\":\"assistant\",\"content\":\"lo\"},\"done\":true,\"eval_count\":2}";

    #[tokio::test]
    async fn pieces_pass_as_they_came_wherever_they_are_cut() {
        let end = format!("{LAST}\n");
        let (first, rest) = end.split_at(20);
        for pieces in [&[PART, &end][..], &[PART, first, rest], &[&[PART, &end].concat()], &[LAST], &[PART, LAST]] {
            let place = Place::new(1 << 20).await;
            let (seen, error) = place.answer(pieces).await;
            assert_eq!((seen, error), (pieces.iter().map(|&piece| piece.to_owned()).collect(), None));
            let said = if pieces == [LAST] { "lo" } else { "Hello" };
            assert_eq!(place.kept().await[1], json!({"role": "assistant", "content": said}), "{pieces:?}");
        }
    }

    #[tokio::test]
    async fn thoughts_and_calls_of_tools_are_kept() {
        let place = Place::new(1 << 20).await;
        let thinks = "{\"message\":{\"role\":\"assistant\",\"content\":\"\",\"thinking\":\"hm\"},\"done\":false}\n";
        let calls =
            "{\"message\":{\"content\":\"\",\"tool_calls\":[{\"function\":{\"name\":\"f\"}}]},\"done\":false}\n";
        place.answer(&[thinks, thinks, calls, LAST]).await;
        let wanted = json!({"role": "assistant", "content": "lo", "thinking": "hmhm", "tool_calls": [{"function": {"name": "f"}}]});
        assert_eq!(place.kept().await[1], wanted);
    }

    #[tokio::test]
    async fn what_is_no_whole_answer_passes_and_leaves_nothing() {
        let place = Place::new(1 << 20).await;
        for pieces in [&[PART][..], &[PART, "{\"error\":\"no\"}\n"], &["garbage\n", "more"], &["{\"done\":"], &[]] {
            let (seen, error) = place.answer(pieces).await;
            assert_eq!((seen, error), (pieces.iter().map(|&piece| piece.to_owned()).collect(), None));
            assert!(place.kept().await.is_empty(), "{pieces:?}");
        }
    }

    #[tokio::test]
    async fn the_end_is_not_told_of_what_cannot_be_kept() {
        let place = Place::new(300).await;
        let long = PART.replace("Hel", &"x".repeat(400));
        let (seen, error) = place.answer(&[&long, LAST]).await;
        assert_eq!(seen, [long]);
        assert!(error.unwrap().contains("max-bytes"));
        assert!(place.kept().await.is_empty());
        let endless = PART.replace("Hel", &"x".repeat(1 << 20));
        let (seen, error) = place.answer(&[endless.as_str(); 20]).await;
        assert!(seen.len() == 16 && error.unwrap().contains("too long"), "{}", seen.len());
    }
}
