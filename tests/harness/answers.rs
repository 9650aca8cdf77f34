//! What a fake Ollama answers to which request, as steps that its connection then takes.

use serde_json::{Value, json};

use super::script::{Seen, Step};
use super::server::{Behaviour, State};
use super::wire;

const NATIVE: &str = "application/json; charset=utf-8";
const LINES: &str = "application/x-ndjson";
const EVENTS: &str = "text/event-stream";
const WHEN: &str = "2026-01-01T00:00:00Z";

/// Whether a path runs a model: what a server's behaviour is about, and what counts as its work.
pub fn is_work(path: &str) -> bool {
    matches!(
        path,
        "/api/generate"
            | "/api/chat"
            | "/api/embed"
            | "/api/embeddings"
            | "/v1/chat/completions"
            | "/v1/completions"
            | "/v1/embeddings"
            | "/v1/responses"
            | "/v1/messages"
    )
}

/// The steps of an answer.
pub(super) fn steps(state: &mut State, request: &Seen) -> Vec<Step> {
    if request.method == "HEAD" && !request.path.starts_with("/api/blobs/") {
        let get = Seen { method: "GET".to_owned(), ..request.clone() };
        return steps(state, &get).into_iter().map(without_body).collect();
    }
    if matches!(state.behaviour, Behaviour::DiesOnReuse) && request.is_reused && request.method != "GET" {
        return vec![Step::HangUp];
    }
    let store = &mut state.store;
    let name = request.model();
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/") => whole(200, "text/plain; charset=utf-8", "Ollama is running"),
        ("GET", "/api/version") => json_answer(200, &json!({"version": store.version})),
        ("GET", "/api/status") => json_answer(200, &json!({"cloud": {"disabled": true, "source": "env"}})),
        ("GET", "/api/tags") => json_answer(200, &store.tags()),
        ("GET", "/api/ps") => json_answer(200, &store.ps()),
        ("GET", "/v1/models") => whole(200, "application/json", format!("{}\n", store.v1_models())),
        ("POST", "/api/show") => match store.show(&name, &parameters(state.num_predict)) {
            Some(shown) => json_answer(200, &shown),
            None => missing(&super::store::full(&name)),
        },
        ("DELETE", "/api/delete") if store.remove(&name) => empty(200),
        ("DELETE", "/api/delete") => missing(&name),
        ("POST", "/api/copy") => copy(state, request),
        ("POST", "/api/create") => create(state, request),
        ("POST", "/api/pull") => pull(&name, request.streams()),
        ("HEAD", path) if path.starts_with("/api/blobs/") => empty(if store.has_blob(blob(path)) { 200 } else { 404 }),
        ("POST", path) if path.starts_with("/api/blobs/") => empty(if store.keep_blob(blob(path)) { 201 } else { 200 }),
        ("POST", path) if is_work(path) => work(state, request),
        _ => whole(404, "text/plain", "404 page not found"),
    }
}

/// An answer of known length.
pub fn whole(status: u16, kind: &str, body: impl Into<Vec<u8>>) -> Vec<Step> {
    let body = body.into();
    let head = head(status, kind, &[("Content-Length", &body.len().to_string())]);
    vec![Step::Write([head, body].concat())]
}

/// An answer in chunks, each written by itself.
pub fn chunked(kind: &str, chunks: impl IntoIterator<Item = Vec<u8>>) -> Vec<Step> {
    let chunks = chunks.into_iter().map(|chunk| Step::Write(wire::chunk(&chunk)));
    [begun(kind)].into_iter().chain(chunks).chain([Step::Write(wire::LAST_CHUNK.to_vec())]).collect()
}

fn begun(kind: &str) -> Step {
    Step::Write(head(200, kind, &[("Transfer-Encoding", "chunked")]))
}

fn head(status: u16, kind: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let line = format!("HTTP/1.1 {status} {}", if status < 300 { "OK" } else { "No" });
    let usual = [("Content-Type", kind), ("Date", "Thu, 01 Jan 2026 00:00:00 GMT")];
    wire::head(&line, usual.iter().chain(headers).copied().filter(|(_, value)| !value.is_empty()))
}

fn without_body(step: Step) -> Step {
    let Step::Write(mut bytes) = step else { return step };
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    bytes.truncate(end.map_or(bytes.len(), |end| end + 4));
    Step::Write(bytes)
}

fn json_answer(status: u16, body: &Value) -> Vec<Step> {
    whole(status, NATIVE, body.to_string())
}

fn error(status: u16, text: &str) -> Vec<Step> {
    json_answer(status, &json!({"error": text}))
}

fn empty(status: u16) -> Vec<Step> {
    whole(status, "", "")
}

fn missing(name: &str) -> Vec<Step> {
    error(404, &format!("model '{name}' not found"))
}

fn blob(path: &str) -> &str {
    path.trim_start_matches("/api/blobs/")
}

fn copy(state: &mut State, request: &Seen) -> Vec<Step> {
    let source = request.text("source");
    if !state.store.has(&source) {
        return error(404, &format!("model \"{source}\" not found"));
    }
    state.store.add(&request.text("destination"), None);
    empty(200)
}

fn create(state: &State, request: &Seen) -> Vec<Step> {
    let files = request.json()["files"].as_object().cloned().unwrap_or_default();
    if let Some(lacking) = files.values().filter_map(Value::as_str).find(|digest| !state.store.has_blob(digest)) {
        return error(400, &format!("blob {lacking} not found"));
    }
    let base = request.text("from");
    if !base.is_empty() && !state.store.has(&base) {
        return error(400, &format!("base {base} not found"));
    }
    let mut steps = progress(&["using existing layer", "writing manifest", "success"], request.streams());
    steps.insert(steps.len() - 1, Step::Add(request.model()));
    steps
}

fn pull(name: &str, streams: bool) -> Vec<Step> {
    if !streams {
        let mut steps = progress(&["success"], false);
        steps.insert(0, Step::Add(name.to_owned()));
        return steps;
    }
    let layer = |done: u64| json!({"status": "pulling 0123456789ab", "digest": "sha256:0123456789ab", "total": 100, "completed": done});
    let status = |text: &str| json!({"status": text});
    let lines = [
        status("pulling manifest"),
        layer(10),
        layer(60),
        layer(100),
        status("verifying sha256 digest"),
        status("writing manifest"),
        status("success"),
    ];
    let mut steps = chunked(LINES, lines.iter().map(line));
    steps.insert(steps.len() - 2, Step::Add(name.to_owned()));
    steps
}

fn progress(statuses: &[&str], streams: bool) -> Vec<Step> {
    if streams {
        chunked(LINES, statuses.iter().map(|status| line(&json!({"status": status}))))
    } else {
        whole(200, "application/json", json!({"status": statuses.last()}).to_string())
    }
}

fn line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

/// The answer of a model.
fn work(state: &mut State, request: &Seen) -> Vec<Step> {
    let name = request.model();
    let behaviour = state.behaviour.clone();
    match &behaviour {
        Behaviour::StallsBeforeHead => return vec![Step::Stall],
        Behaviour::DiesBeforeHead => return vec![Step::HangUp],
        Behaviour::Refuses(status, text) => return error(*status, text),
        _ if !state.store.has(&name) => return missing(&name),
        _ => {}
    }
    if request.unloads() {
        state.store.unload(&name);
        return json_answer(
            200,
            &json!({"model": name, "created_at": WHEN, "response": "", "done": true, "done_reason": "unload"}),
        );
    }
    if request.json()["_debug_render_only"] == true && state.renders {
        return rendered(request, &name);
    }
    if let Err(why) = speech(state, request) {
        return error(400, &why);
    }
    let mut steps = match &behaviour {
        Behaviour::LoadsUntil(gate) if !state.store.loaded().contains(&super::store::full(&name)) => {
            vec![Step::Wait(gate.clone())]
        }
        _ => Vec::new(),
    };
    steps.push(Step::Load(name.clone()));
    if request.path.contains("embed") {
        steps.extend(json_answer(200, &json!({"model": name, "embeddings": [[0.6, 0.8]], "prompt_eval_count": 2})));
        return steps;
    }
    steps.extend(if request.streams() { streamed(state, request, &name) } else { unstreamed(state, request, &name) });
    steps
}

/// The parameters of a model, as `show` writes them.
fn parameters(num_predict: Option<i64>) -> String {
    let most = num_predict.map(|most| format!("\nnum_predict                    {most}"));
    format!("temperature                    0{}", most.unwrap_or_default())
}

/// What the prompt of a fake model ends in: what follows is the answer.
const ASSISTANT: &str = "<|start|>assistant\n";

/// The finished prompt, instead of an answer.
fn rendered(request: &Seen, name: &str) -> Vec<Step> {
    let body = request.json();
    let said = |role: &str, text: &Value| format!("<|start|>{role}\n{}<|end|>", text.as_str().unwrap_or_default());
    let messages = body["messages"].as_array().cloned().unwrap_or_default();
    let turns: Vec<String> = messages
        .iter()
        .map(|message| said(message["role"].as_str().unwrap_or_default(), &message["content"]))
        .collect();
    let prompt = match request.path.as_str() {
        _ if body["raw"] == true => request.text("prompt"),
        "/api/generate" => [said("user", &body["prompt"]), ASSISTANT.to_owned()].concat(),
        _ => [turns.concat(), ASSISTANT.to_owned()].concat(),
    };
    let images = messages.iter().filter(|message| message["images"].is_array()).count();
    let info = json!({"rendered_template": prompt, "image_count": images});
    json_answer(200, &json!({"model": name, "created_at": WHEN, "response": "", "done": false, "_debug_info": info}))
}

/// What a model says to a request.
struct Speech {
    /// A token each.
    pieces: Vec<String>,
    /// Why it ends.
    reason: &'static str,
    /// Tokens of the prompt, what was said before among them.
    prompt: usize,
}

/// The words of an answer. To a raw prompt: what follows what the prompt says already.
fn speech(state: &State, request: &Seen) -> Result<Speech, String> {
    let body = request.json();
    let asked =
        body["messages"].as_array().and_then(|messages| messages.last()?["content"].as_str()).unwrap_or_default();
    let words =
        if state.echoes { asked.split_inclusive(' ').map(str::to_owned).collect() } else { state.words.clone() };
    let prompt = request.text("prompt");
    let before = if body["raw"] == true { prompt.rsplit(ASSISTANT).next().unwrap_or_default() } else { "" };
    let (mut pieces, mut spoken) = (Vec::new(), 0);
    let mut rest = before;
    for word in words {
        if rest.is_empty() {
            pieces.push(word);
            continue;
        }
        spoken += 1;
        if let Some(after) = rest.strip_prefix(word.as_str()) {
            rest = after;
        } else if let Some(unsaid) = word.strip_prefix(rest) {
            pieces.push(unsaid.to_owned());
            rest = "";
        } else {
            return Err(format!("the prompt says {before:?}, which the model would not say"));
        }
    }
    let options = &body["options"];
    let mut reason = "stop";
    for stop in [&options["stop"], &body["stop"]].into_iter().filter_map(Value::as_array).flatten() {
        let stop = stop.as_str().unwrap_or_default();
        if let Some(at) = pieces.concat().find(stop) {
            cut(&mut pieces, at);
        }
    }
    let most = options["num_predict"].as_i64().or(body["max_tokens"].as_i64()).or(state.num_predict);
    if let Some(most) = most.and_then(|most| usize::try_from(most).ok()).filter(|most| *most <= pieces.len()) {
        pieces.truncate(most);
        reason = "length";
    }
    Ok(Speech { pieces, reason, prompt: 5 + spoken })
}

/// Cuts words so that this many bytes are left.
fn cut(pieces: &mut Vec<String>, mut left: usize) {
    pieces.retain_mut(|piece| {
        piece.truncate(left);
        left -= piece.len();
        !piece.is_empty()
    });
}

fn unstreamed(state: &State, request: &Seen, name: &str) -> Vec<Step> {
    let Ok(speech) = speech(state, request) else { return error(400, "no such prompt") };
    let text = speech.pieces.concat();
    let body = match request.path.as_str() {
        "/api/generate" => {
            with_counts(json!({"model": name, "created_at": WHEN, "response": text, "done": true}), &speech)
        }
        "/api/chat" => with_counts(
            json!({"model": name, "created_at": WHEN, "message": {"role": "assistant", "content": text}, "done": true}),
            &speech,
        ),
        _ => json!({"model": name, "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}),
    };
    match state.behaviour {
        // A single token is not after what it says.
        Behaviour::StallsAfter if speech.reason != "length" => vec![Step::Stall],
        Behaviour::DiesAfter => vec![Step::Write(head(200, NATIVE, &[("Content-Length", "9999")])), Step::HangUp],
        _ => json_answer(200, &body),
    }
}

fn streamed(state: &State, request: &Seen, name: &str) -> Vec<Step> {
    let form = Form::of(&request.path);
    let Ok(speech) = speech(state, request) else { return error(400, "no such prompt") };
    let pace = || match &state.behaviour {
        Behaviour::Paced(gate) => Some(Step::Wait(gate.clone())),
        _ => None,
    };
    let mut steps = vec![begun(if form.is_native() { LINES } else { EVENTS })];
    for (at, word) in speech.pieces.iter().enumerate() {
        steps.extend(pace());
        steps.push(Step::Write(wire::chunk(&form.piece(name, word, at == 0))));
    }
    match &state.behaviour {
        Behaviour::DiesAfter => steps.push(Step::HangUp),
        Behaviour::Breaks(text) => {
            let line = line(&json!({"error": text}));
            steps.push(Step::Write([wire::chunk(&line), wire::LAST_CHUNK.to_vec()].concat()));
        }
        Behaviour::StallsAfter => steps.push(Step::Stall),
        Behaviour::Floods => {
            steps.push(Step::Repeat(wire::chunk(&form.piece(name, &"flood ".repeat(10_000), false))));
        }
        behaviour => {
            steps.extend(pace());
            let usage = request.json()["stream_options"]["include_usage"] == true;
            let last = form.last(name, &speech, request.json()["raw"] == true, usage);
            steps.push(Step::Write([wire::chunk(&last), wire::LAST_CHUNK.to_vec()].concat()));
            if let Behaviour::DiesAfterBytes(bytes) = behaviour {
                steps = cut_off(steps, *bytes);
            }
        }
    }
    steps
}

/// The head of an answer, so many bytes behind it, and the end of the connection.
fn cut_off(steps: Vec<Step>, mut left: usize) -> Vec<Step> {
    let mut steps = steps.into_iter();
    let mut cut: Vec<Step> = steps.next().into_iter().collect();
    for step in steps {
        let Step::Write(mut bytes) = step else { continue };
        bytes.truncate(left);
        left -= bytes.len();
        cut.push(Step::Write(bytes));
    }
    cut.push(Step::HangUp);
    cut
}

/// How a stream is written.
#[derive(Clone, Copy)]
enum Form {
    Generate,
    Chat,
    OpenAi,
    Anthropic,
}

impl Form {
    fn of(path: &str) -> Self {
        match path {
            "/api/generate" => Self::Generate,
            "/api/chat" => Self::Chat,
            "/v1/messages" => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }

    fn is_native(self) -> bool {
        matches!(self, Self::Generate | Self::Chat)
    }

    /// A piece as Ollama writes it.
    fn piece(self, model: &str, word: &str, is_first: bool) -> Vec<u8> {
        let (model, word) = (json!(model), json!(word));
        match self {
            Self::Generate => {
                format!("{{\"model\":{model},\"created_at\":\"{WHEN}\",\"response\":{word},\"done\":false}}\n").into_bytes()
            }
            Self::Chat => format!(
                "{{\"model\":{model},\"created_at\":\"{WHEN}\",\"message\":{{\"role\":\"assistant\",\"content\":{word}}},\"done\":false}}\n"
            )
            .into_bytes(),
            Self::OpenAi => {
                let role = if is_first { "\"role\":\"assistant\"," } else { "" };
                openai(&model, &format!("{{\"index\":0,\"delta\":{{{role}\"content\":{word}}},\"finish_reason\":null}}"), "")
            }
            Self::Anthropic => event(
                "content_block_delta",
                &json!({"type": "content_block_delta", "delta": {"type": "text_delta", "text": word}}),
            ),
        }
    }

    /// The end as Ollama writes it.
    fn last(self, model: &str, speech: &Speech, is_raw: bool, usage: bool) -> Vec<u8> {
        let (model, reason) = (json!(model), speech.reason);
        let (prompt, made) = (speech.prompt, speech.pieces.len());
        let counts = format!(
            "\"total_duration\":9,\"load_duration\":1,\"prompt_eval_count\":{prompt},\"prompt_eval_duration\":3,\"eval_count\":{made},\"eval_duration\":4"
        );
        match self {
            Self::Generate => {
                let context = if is_raw { "" } else { "\"context\":[1,2],"};
                format!("{{\"model\":{model},\"created_at\":\"{WHEN}\",\"response\":\"\",\"done\":true,\"done_reason\":\"{reason}\",{context}{counts}}}\n").into_bytes()
            }
            Self::Chat => format!(
                "{{\"model\":{model},\"created_at\":\"{WHEN}\",\"message\":{{\"role\":\"assistant\",\"content\":\"\"}},\"done\":true,\"done_reason\":\"{reason}\",{counts}}}\n"
            )
            .into_bytes(),
            // As in Ollama, the last event shares its chunk with the end of the stream.
            Self::OpenAi => {
                let finish = openai(&model, &format!("{{\"index\":0,\"delta\":{{}},\"finish_reason\":\"{reason}\"}}"), "");
                let total = prompt + made;
                let usage = usage.then(|| openai(&model, "", &format!(",\"usage\":{{\"prompt_tokens\":{prompt},\"completion_tokens\":{made},\"total_tokens\":{total}}}")));
                [finish, usage.unwrap_or_default(), b"data: [DONE]\n\n".to_vec()].concat()
            }
            Self::Anthropic => event("message_stop", &json!({"type": "message_stop"})),
        }
    }
}

/// An event of OpenAI's chat.
fn openai(model: &Value, choice: &str, more: &str) -> Vec<u8> {
    format!("data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":{model},\"system_fingerprint\":\"fp_ollama\",\"choices\":[{choice}]{more}}}\n\n").into_bytes()
}

fn event(name: &str, data: &Value) -> Vec<u8> {
    let name = if name.is_empty() { String::new() } else { format!("event: {name}\n") };
    format!("{name}data: {data}\n\n").into_bytes()
}

fn with_counts(mut last: Value, speech: &Speech) -> Value {
    let counts = [
        ("total_duration", 9),
        ("load_duration", 1),
        ("prompt_eval_count", speech.prompt),
        ("prompt_eval_duration", 3),
        ("eval_count", speech.pieces.len()),
        ("eval_duration", 4),
    ];
    last["done_reason"] = json!(speech.reason);
    for (name, count) in counts {
        last[name] = json!(count);
    }
    last
}
