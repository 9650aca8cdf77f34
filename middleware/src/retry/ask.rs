//! The questions to the server that goes on with an answer: what is the finished prompt, what is the model like, and what
//! follows. All three as the client's own call would be sent, through the layers below.
//!
//! Where the finished prompt begins with a BOS as a text, there must be one BOS in the end and not two. Both ways into
//! Ollama's runner let the tokenizer add one (llama.cpp's `/completion`, `add_special`), and both take a leading `<bos>`
//! away where it does (`completionPrompt` in `llm/llama_server.go`, since 0.30.0). But only the way of a chat takes the other BOS
//! texts of the built-in renderers away (`LeadingBOS` in `model/renderers/`): a raw prompt keeps them. So that is done here,
//! exactly where Ollama would: with a renderer whose BOS it is, and a tokenizer that adds one. Before 0.30.0 neither way took
//! anything away.

use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value};
use smallvec::SmallVec;
use tower::{Service, ServiceExt};

use super::delivered::Form;
use super::request::{Bounds, Refusal, Request};
use super::{Rules, failure};
use crate::call::{Call, Edits, Payload, Place, Reply};
use crate::cluster::Candidates;
use crate::error::Error;
use crate::modelfile;
use crate::names::ServerId;
use crate::peek::Peek;
use crate::place::LoadOptions;
use crate::route::Dialect;

/// The longest answer to a question about prompt or model, bytes.
const LONGEST: usize = 64 << 20;

/// The BOS texts of Ollama's built-in renderers, but for `<bos>`, which Ollama takes away itself.
const RENDERED_BOS: [&str; 5] = [
    "<|startoftext|>",
    "<|begin_of_text|>",
    "<BOS_TOKEN>",
    "<\u{ff5c}begin\u{2581}of\u{2581}sentence\u{ff5c}>",
    "\u{3008}|EOS|\u{3009}",
];

/// The version that first renders without generating, for Ollama's own API and for OpenAI's.
const RENDERS: [[u32; 3]; 2] = [[0, 11, 5], [0, 12, 0]];
/// The version since which a BOS text is taken away where the tokenizer adds one.
const STRIPS: [u32; 3] = [0, 30, 0];

/// Why a server does not go on.
#[derive(Debug)]
pub(super) enum No {
    /// It failed, or cannot: another may.
    Server(Option<ServerId>, &'static str),
    /// Nobody can.
    Nobody(Refusal),
}

/// Asks one server.
pub(super) struct Asking<'a, S> {
    pub(super) rules: &'a Arc<Rules>,
    pub(super) service: &'a mut S,
    /// For writing only since it may not be shared between threads.
    pub(super) spare: &'a mut Call,
    pub(super) request: &'a Request,
    /// Those who may be asked: several at first, then the one who answered.
    pub(super) candidates: Candidates,
    /// How often the call was tried.
    pub(super) attempts: u32,
}

/// A prompt that is finished, and who finished it.
#[derive(Debug)]
pub(super) struct Rendered {
    pub(super) server: ServerId,
    pub(super) prompt: String,
}

/// What matters of a model.
#[derive(Debug, Default)]
pub(super) struct Shown {
    pub(super) bounds: Bounds,
    pub(super) thinks: bool,
    /// Whether a built-in parser makes answers of what it says, whatever the request wants.
    is_parsed: bool,
    /// Whether a built-in renderer writes its prompts, and its tokenizer begins them with a BOS besides.
    strips_bos: bool,
}

#[derive(Deserialize)]
struct RenderedBody {
    #[serde(rename = "_debug_info")]
    debug: Option<Debug>,
}

#[derive(Deserialize)]
struct Debug {
    rendered_template: String,
    #[serde(default)]
    image_count: u64,
}

#[derive(Deserialize)]
struct ShownBody {
    #[serde(default)]
    parameters: String,
    #[serde(default)]
    modelfile: String,
    #[serde(default)]
    capabilities: Vec<String>,
    #[serde(default)]
    details: Details,
    #[serde(default)]
    model_info: Option<Map<String, Value>>,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    family: String,
}

#[derive(Deserialize)]
struct Counted {
    prompt_eval_count: u64,
}

impl<S> Asking<'_, S>
where
    S: Service<Call, Response = Reply, Error = Error> + Send,
    S::Future: Send,
{
    /// Has the prompt finished: first of all, since it says who goes on.
    pub(super) async fn render(&mut self) -> Result<Rendered, No> {
        let call = self.call(None, self.request.render());
        let (server, body) = self.read(call, "it could not finish the prompt").await?;
        if let Some(index) = self.candidates.index_of(&server) {
            self.candidates.only(index);
        }
        let rendered: Option<RenderedBody> = serde_json::from_slice(&body).ok();
        // An engine that does not know the question has answered another one.
        let Some(debug) = rendered.and_then(|rendered| rendered.debug) else {
            return Err(No::Server(Some(server), "it did not finish the prompt"));
        };
        if debug.image_count > 0 {
            return Err(No::Nobody("the request has images"));
        }
        Ok(Rendered { server, prompt: debug.rendered_template })
    }

    /// Asks what the model is like.
    pub(super) async fn show(&mut self) -> Result<Shown, No> {
        let mut call = self.call(Some("/api/show"), Payload::from_bytes(self.request.show()));
        // This loads nothing, and takes no slot.
        call.known = None;
        call.place = Place::default();
        let (server, body) = self.read(call, "it could not show the model").await?;
        let body: ShownBody = serde_json::from_slice(&body)
            .map_err(|_| No::Server(Some(server), "what it shows of the model cannot be read"))?;
        let shown = Shown::of(&body);
        if shown.thinks && !self.request.thinks_not {
            return Err(No::Nobody("the model thinks"));
        }
        if shown.is_parsed && !self.request.is_raw {
            return Err(No::Nobody("what the model says is not its answer"));
        }
        Ok(shown)
    }

    /// Counts the tokens of a prompt, which also prepares its server for what is to follow.
    pub(super) async fn count(&mut self, prompt: &str, thinks: bool) -> Result<u64, No> {
        let call = self.generate(self.request.raw(prompt, Some(1), thinks, false));
        let (server, body) = self.read(call, "it could not count tokens").await?;
        let counted: Result<Counted, _> = serde_json::from_slice(&body);
        counted
            .map(|counted| counted.prompt_eval_count)
            .map_err(|_| No::Server(Some(server), "it did not count tokens"))
    }

    /// Asks for what follows.
    pub(super) async fn follow(&mut self, prompt: &str, most: Option<i64>, thinks: bool) -> Result<Reply, No> {
        let call = self.generate(self.request.raw(prompt, most, thinks, true));
        let reply = self.send(call).await?;
        if reply.status == StatusCode::OK && reply.is_stream() {
            return Ok(reply);
        }
        Err(No::Server(reply.body.outcome().servers.last().cloned(), "it did not go on"))
    }

    /// The prompt as it has to be sent raw to become what it was.
    pub(super) fn raw_prompt(&self, rendered: &Rendered, shown: &Shown) -> String {
        let version = self.candidates.iter().next().map(|server| &*server.report.version).unwrap_or_default();
        let strips = shown.strips_bos && !self.request.is_raw && is_at_least(version, STRIPS);
        let prompt = rendered.prompt.as_str();
        let stripped = RENDERED_BOS.iter().filter(|_| strips).find_map(|bos| prompt.strip_prefix(bos));
        stripped.unwrap_or(prompt).to_owned()
    }

    async fn read(&mut self, call: Call, why: &'static str) -> Result<(ServerId, Bytes), No> {
        let reply = self.send(call).await?;
        let (status, server) = (reply.status, reply.body.outcome().servers.last().cloned());
        match (reply.body.collect(LONGEST).await, server) {
            (Ok(body), Some(server)) if status == StatusCode::OK => Ok((server, body)),
            (Ok(body), server) => {
                if failure::is_trouble(&body) {
                    self.rules.note_trouble(self.spare, server.as_ref());
                }
                Err(No::Server(server, why))
            }
            (Err(_), server) => Err(No::Server(server, why)),
        }
    }

    async fn send(&mut self, call: Call) -> Result<Reply, No> {
        let sent = async { self.service.ready().await?.call(call).await };
        sent.await.map_err(|error| No::Server(error.server().cloned(), error.kind()))
    }

    /// A request for tokens.
    fn generate(&self, body: Bytes) -> Call {
        self.call(Some("/api/generate"), Payload::from_bytes(body))
    }

    /// The client's call with another body, and perhaps on another path. It does not wait for a slot as others do: its client
    /// has waited, and has the beginning of its answer.
    fn call(&self, path: Option<&'static str>, payload: Payload) -> Call {
        let spare = &*self.spare;
        let mut call = Call::new(spare.head.clone(), payload, self.candidates.clone());
        let snapshot = self.candidates.snapshot();
        call.known = spare.place.model.as_ref().and_then(|model| snapshot.known(model)).cloned();
        call.place = spare.place.clone();
        let is_native = path.is_some() || spare.route.dialect() == Dialect::Ollama;
        if let (Some(_), true, Payload::Whole(pieces)) = (&spare.place.options, is_native, &call.payload) {
            let options = LoadOptions::in_body(pieces, &Peek::json(pieces));
            call.place.options = Some(Arc::new(options));
        }
        let client = spare.edits.as_deref().cloned().unwrap_or_default();
        call.edits = Some(Box::new(match path {
            Some(path) => Edits {
                method: Some(Method::POST),
                path: Some(PathAndQuery::from_static(path)),
                headers: client.headers,
                body: SmallVec::new(),
            },
            None => Edits { body: SmallVec::new(), ..client },
        }));
        call.deadline = spare.deadline;
        call.attempts = self.attempts;
        call.limits.clone_from(&spare.limits);
        call
    }
}

impl Shown {
    fn of(body: &ShownBody) -> Self {
        let info = body.model_info.clone().unwrap_or_default();
        let word = |key: &str| info.get(key).and_then(Value::as_str).unwrap_or_default();
        // As `tokenizerAddsBOS` in Ollama's llm/llama_server.go has it.
        let (pre, kind) = (word("tokenizer.ggml.pre"), word("tokenizer.ggml.model"));
        let adds_bos = pre == "lfm2"
            || pre == "gemma4"
            || kind == "gemma4"
            || info.get("tokenizer.ggml.add_bos_token").and_then(Value::as_bool).unwrap_or(false);
        let mut bounds = Bounds::default();
        for (key, value) in modelfile::parameters(&body.parameters) {
            match key {
                "num_predict" => bounds.num_predict = super::request::number(value.as_bytes()),
                "stop" => bounds.stops.get_or_insert_default().extend(serde_json::from_str::<String>(value)),
                _ => {}
            }
        }
        let command = |name: &str| body.modelfile.lines().filter_map(|line| line.strip_prefix(name)).next_back();
        let parser = command("PARSER ").unwrap_or_default();
        // Other parsers only take tools and thinking out, of which there are none here. OpenAI's open models always speak in
        // channels (`shouldUseHarmony` in Ollama's server/routes.go), and some others always think.
        let thinks_anyway = parser.contains("think") && !parser.contains("no-think");
        let is_harmony = parser == "harmony" || matches!(body.details.family.as_str(), "gptoss" | "gpt-oss");
        Self {
            bounds,
            is_parsed: is_harmony || thinks_anyway,
            thinks: body.capabilities.iter().any(|can| can == "thinking"),
            strips_bos: command("RENDERER ").is_some() && adds_bos,
        }
    }
}

/// Whether a server of this version finishes prompts on request. Our own engine does not.
pub(super) fn can_render(version: &str, form: Form) -> bool {
    !version.contains("olol") && is_at_least(version, RENDERS[usize::from(form == Form::OpenAi)])
}

/// Whether a version is at least another. One of a developer is 0.0.0, and as new as can be.
fn is_at_least(version: &str, least: [u32; 3]) -> bool {
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let mut parts = core.split('.').map(str::parse::<u32>);
    let version = [(); 3].map(|()| parts.next().and_then(Result::ok));
    match version {
        [Some(0), Some(0), Some(0)] => true,
        [Some(major), Some(minor), Some(patch)] => [major, minor, patch] >= least,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, can) in [
            ("0.11.5", true),
            ("0.33.0-rc2", true),
            ("1.0.0", true),
            ("0.0.0", true),
            ("0.11.4", false),
            ("0.9.12", false),
            ("", false),
            ("x", false),
            ("0.33.0-olol.0.1.0", false),
        ] {
            assert_eq!(can_render(version, Form::Chat), can, "{version}");
        }
        assert!(!can_render("0.11.9", Form::OpenAi) && can_render("0.12.0", Form::OpenAi));
    }

    #[test]
    fn what_matters_of_a_model_is_read() {
        let body = serde_json::json!({
            "parameters": "num_ctx                        2048\nstop                           \"<|end|>\"\nstop                           \"a\\nb\"\nnum_predict                    64",
            "modelfile": "# FROM x\nTEMPLATE {{ .Prompt }}\nRENDERER lfm2\nPARAMETER num_predict 64\n",
            "capabilities": ["completion", "thinking"],
            "model_info": {"tokenizer.ggml.add_bos_token": true, "tokenizer.ggml.tokens": null},
        });
        let shown = Shown::of(&serde_json::from_value(body).unwrap());
        assert_eq!(shown.bounds, Bounds { num_predict: Some(64), stops: Some(vec!["<|end|>".into(), "a\nb".into()]) });
        assert!(shown.thinks && shown.strips_bos);
        for (body, is_parsed) in [
            (r#"{"modelfile":"PARSER harmony\n"}"#, true),
            (r#"{"details":{"family":"gptoss"}}"#, true),
            (r#"{"modelfile":"PARSER olmo3-think\n"}"#, true),
            (r#"{"modelfile":"PARSER gemma4-no-thinking\n"}"#, false),
            (r#"{"modelfile":"PARSER qwen3-coder\n"}"#, false),
        ] {
            assert_eq!(Shown::of(&serde_json::from_str(body).unwrap()).is_parsed, is_parsed, "{body}");
        }
        let plain = Shown::of(&serde_json::from_str("{}").unwrap());
        assert!(!plain.thinks && !plain.strips_bos);
    }
}
