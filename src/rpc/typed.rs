//! The typed calls: messages to Ollama's JSON, and its answers to messages.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use olol_middleware::{ModelName, Reply};
use olol_proto::v1::{
    ChatRequest, ChatResponse, EmbedRequest, EmbedResponse, Embedding, GenerateRequest, GenerateResponse,
    ListModelsResponse, LoadedModel, Message, Model, PullModelRequest, PullModelResponse, ShowModelRequest,
    ShowModelResponse, Usage,
};
use serde_json::{Map, Value, json};
use tonic::{Code, Status};

use super::Answers;
use crate::ollama::{Ask, parameters};

/// The longest answer in one object, bytes.
const LONGEST: usize = 64 << 20;

/// Puts a member into an object unless it says nothing.
pub(super) fn put(object: &mut Map<String, Value>, key: &str, value: Value) {
    let says_nothing = match &value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    if !says_nothing {
        object.insert(key.to_owned(), value);
    }
}

/// JSON in a text field of a message.
pub(super) fn nested(field: &'static str, text: &str) -> Result<Value, Status> {
    if text.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(text).map_err(|error| Status::invalid_argument(format!("{field} is no JSON: {error}")))
}

/// `json` as a word, else a schema.
fn format(text: &str) -> Result<Value, Status> {
    if text == "json" { Ok(json!("json")) } else { nested("format", text) }
}

/// A number of seconds or a duration.
fn keep_alive(text: &str) -> Value {
    text.parse::<f64>().map_or_else(|_| json!(text), |seconds| json!(seconds))
}

/// An explicit "no" is said: it is not the default of a model that thinks.
fn put_think(object: &mut Map<String, Value>, text: &str) {
    if !text.is_empty() {
        let value = text.parse::<bool>().map_or_else(|_| json!(text), |yes| json!(yes));
        object.insert("think".to_owned(), value);
    }
}

fn post(path: &'static str, object: Map<String, Value>) -> Ask {
    Ask::post(path, Value::Object(object).to_string())
}

pub(super) fn generate(request: GenerateRequest) -> Result<Ask, Status> {
    let mut body = Map::new();
    body.insert("model".to_owned(), request.model.into());
    body.insert("prompt".to_owned(), request.prompt.into());
    put(&mut body, "suffix", request.suffix.into());
    put(&mut body, "system", request.system.into());
    put(&mut body, "template", request.template.into());
    put(&mut body, "raw", request.raw.into());
    put(&mut body, "context", request.context.into());
    put(&mut body, "images", request.images.iter().map(|image| json!(STANDARD.encode(image))).collect());
    put(&mut body, "options", nested("options_json", &request.options_json)?);
    put(&mut body, "format", format(&request.format)?);
    put(&mut body, "keep_alive", keep_alive(&request.keep_alive));
    put_think(&mut body, &request.think);
    Ok(post("/api/generate", body))
}

pub(super) fn chat(request: ChatRequest) -> Result<Ask, Status> {
    let mut body = Map::new();
    body.insert("model".to_owned(), request.model.into());
    let messages: Result<Vec<Value>, Status> = request.messages.into_iter().map(message).collect();
    body.insert("messages".to_owned(), Value::Array(messages?));
    put(&mut body, "tools", nested("tools_json", &request.tools_json)?);
    put(&mut body, "options", nested("options_json", &request.options_json)?);
    put_manner(&mut body, &request.format, &request.keep_alive, &request.think)?;
    Ok(post("/api/chat", body))
}

/// How an answer is to be, and how long its model stays.
pub(super) fn put_manner(body: &mut Map<String, Value>, wanted: &str, stays: &str, think: &str) -> Result<(), Status> {
    put(body, "format", format(wanted)?);
    put(body, "keep_alive", keep_alive(stays));
    put_think(body, think);
    Ok(())
}

/// A picture in the JSON of a message.
pub(super) fn image(value: &Value) -> Option<Bytes> {
    STANDARD.decode(value.as_str()?).ok().map(Bytes::from)
}

pub(super) fn message(message: Message) -> Result<Value, Status> {
    let mut object = Map::new();
    object.insert("role".to_owned(), message.role.into());
    object.insert("content".to_owned(), message.content.into());
    put(&mut object, "thinking", message.thinking.into());
    put(&mut object, "images", message.images.iter().map(|image| json!(STANDARD.encode(image))).collect());
    put(&mut object, "tool_calls", nested("tool_calls_json", &message.tool_calls_json)?);
    put(&mut object, "tool_name", message.tool_name.into());
    Ok(Value::Object(object))
}

pub(super) fn embed(request: EmbedRequest) -> Result<Ask, Status> {
    let mut body = Map::new();
    body.insert("model".to_owned(), request.model.into());
    body.insert("input".to_owned(), request.input.into());
    if let Some(truncate) = request.truncate {
        body.insert("truncate".to_owned(), truncate.into());
    }
    if request.dimensions != 0 {
        body.insert("dimensions".to_owned(), request.dimensions.into());
    }
    put(&mut body, "options", nested("options_json", &request.options_json)?);
    put(&mut body, "keep_alive", keep_alive(&request.keep_alive));
    Ok(post("/api/embed", body))
}

pub(super) fn show(request: &ShowModelRequest) -> Ask {
    Ask::post("/api/show", json!({"model": request.model, "verbose": request.verbose}).to_string())
}

pub(super) fn pull(request: &PullModelRequest) -> Ask {
    Ask::post("/api/pull", json!({"model": request.model, "insecure": request.insecure}).to_string())
}

/// The answer as one object.
pub(super) async fn object(reply: Reply) -> Result<Value, Status> {
    let body = reply.body.collect(LONGEST).await.map_err(|error| super::failure(&error))?;
    serde_json::from_slice(&body).map_err(|error| Status::internal(format!("the answer is no JSON: {error}")))
}

/// The answer line by line, as messages.
pub(super) fn lines<T: Send + 'static>(reply: Reply, read: fn(&Value) -> T) -> Answers<T> {
    Box::pin(reply.body.flat_map(move |chunk| {
        let messages: Vec<Result<T, Status>> = match chunk {
            Err(error) => vec![Err(super::failure(&error))],
            Ok(chunk) => chunk
                .bytes
                .split(|byte| *byte == b'\n')
                .filter(|line| !line.is_empty())
                .map(|line| one(line, read))
                .collect(),
        };
        futures_util::stream::iter(messages)
    }))
}

fn one<T>(line: &[u8], read: fn(&Value) -> T) -> Result<T, Status> {
    let value: Value =
        serde_json::from_slice(line).map_err(|error| Status::internal(format!("a line is no JSON: {error}")))?;
    match value.get("error").and_then(Value::as_str) {
        Some(error) => Err(Status::internal(error)),
        None => Ok(read(&value)),
    }
}

/// A refusal of Ollama as a status.
pub(super) async fn refusal(reply: Reply) -> Status {
    let code = match reply.status.as_u16() {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::NotFound,
        429 => Code::ResourceExhausted,
        501 => Code::Unimplemented,
        502..=504 => Code::Unavailable,
        _ => Code::Internal,
    };
    let body = reply.body.collect(LONGEST).await.unwrap_or_default();
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    Status::new(
        code,
        parsed["error"].as_str().map_or_else(|| String::from_utf8_lossy(&body).into_owned(), str::to_owned),
    )
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

fn small(value: &Value, key: &str) -> u32 {
    u32::try_from(number(value, key)).unwrap_or(u32::MAX)
}

fn usage(value: &Value) -> Option<Usage> {
    (value["done"] == true).then(|| Usage {
        total_duration_ns: number(value, "total_duration"),
        load_duration_ns: number(value, "load_duration"),
        prompt_eval_count: small(value, "prompt_eval_count"),
        prompt_eval_duration_ns: number(value, "prompt_eval_duration"),
        eval_count: small(value, "eval_count"),
        eval_duration_ns: number(value, "eval_duration"),
    })
}

pub(super) fn generated(value: &Value) -> GenerateResponse {
    let tokens = value["context"].as_array().into_iter().flatten();
    GenerateResponse {
        model: text(value, "model"),
        created_at: text(value, "created_at"),
        response: text(value, "response"),
        thinking: text(value, "thinking"),
        done: value["done"] == true,
        done_reason: text(value, "done_reason"),
        context: tokens.filter_map(|token| i32::try_from(token.as_i64()?).ok()).collect(),
        usage: usage(value),
    }
}

pub(super) fn chatted(value: &Value) -> ChatResponse {
    let message = &value["message"];
    let calls = &message["tool_calls"];
    ChatResponse {
        model: text(value, "model"),
        created_at: text(value, "created_at"),
        message: Some(Message {
            role: text(message, "role"),
            content: text(message, "content"),
            thinking: text(message, "thinking"),
            images: Vec::new(),
            tool_calls_json: if calls.is_null() { String::new() } else { calls.to_string() },
            tool_name: text(message, "tool_name"),
        }),
        done: value["done"] == true,
        done_reason: text(value, "done_reason"),
        usage: usage(value),
    }
}

pub(super) fn embedded(value: &Value) -> EmbedResponse {
    let vector = |vector: &Value| {
        let numbers = vector.as_array().into_iter().flatten().filter_map(Value::as_f64);
        #[expect(clippy::cast_possible_truncation, reason = "they were written from 32 bits")]
        let values = numbers.map(|number| number as f32).collect();
        Embedding { values }
    };
    EmbedResponse {
        model: text(value, "model"),
        embeddings: value["embeddings"].as_array().into_iter().flatten().map(vector).collect(),
        total_duration_ns: number(value, "total_duration"),
        load_duration_ns: number(value, "load_duration"),
        prompt_eval_count: small(value, "prompt_eval_count"),
    }
}

fn model(value: &Value) -> Model {
    let name = text(value, "name");
    let details = &value["details"];
    let words = value["capabilities"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Model {
        tag: name.rsplit_once(':').map(|(_, tag)| tag.to_owned()).unwrap_or_default(),
        digest: text(value, "digest"),
        size_bytes: number(value, "size"),
        family: text(details, "family"),
        parameter_size: text(details, "parameter_size"),
        quantization: text(details, "quantization_level"),
        context_length: small(details, "context_length"),
        capabilities: words.map(str::to_owned).collect(),
        modified_at: text(value, "modified_at"),
        name,
        ..Model::default()
    }
}

pub(super) fn listed(tags: &Value, ps: &Value) -> ListModelsResponse {
    let loaded = |value: &Value| LoadedModel {
        name: text(value, "name"),
        digest: text(value, "digest"),
        size_bytes: number(value, "size"),
        size_vram_bytes: number(value, "size_vram"),
        expires_at: text(value, "expires_at"),
        context_length: small(value, "context_length"),
        slots: 0,
    };
    ListModelsResponse {
        models: tags["models"].as_array().into_iter().flatten().map(model).collect(),
        loaded: ps["models"].as_array().into_iter().flatten().map(loaded).collect(),
    }
}

pub(super) fn shown(name: &str, value: &Value) -> ShowModelResponse {
    let mut details = model(value);
    if let Some(canonical) = ModelName::parse(name) {
        canonical.as_str().clone_into(&mut details.name);
        canonical.tag().clone_into(&mut details.tag);
    } else {
        name.clone_into(&mut details.name);
    }
    details.architecture = text(&value["model_info"], "general.architecture");
    details.parameters_json = value["parameters"].as_str().map(parameters).unwrap_or_default();
    ShowModelResponse {
        details: Some(details),
        license: text(value, "license"),
        modelfile: text(value, "modelfile"),
        parameters: text(value, "parameters"),
        template: text(value, "template"),
        system: text(value, "system"),
        model_info_json: value["model_info"].to_string(),
    }
}

pub(super) fn pulled(value: &Value) -> PullModelResponse {
    PullModelResponse {
        status: text(value, "status"),
        digest: text(value, "digest"),
        total: number(value, "total"),
        completed: number(value, "completed"),
    }
}
