//! Answers of the built-in engine: the members of Ollama's, in its order, written as Go writes JSON.

use std::time::Duration;

use serde::Serialize;

/// Whether an answer is that of `/api/generate` or of `/api/chat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Text in `response`.
    Generate,
    /// Text in `message`.
    Chat,
}

/// What was counted and measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    /// "stop", "length", "load" or "unload".
    pub(super) reason: &'static str,
    /// Tokens of prompt and answer, to go on from.
    pub(super) context: Vec<i32>,
    /// From the request's arrival to its end.
    pub(super) total: Duration,
    /// For getting the model ready.
    pub(super) load: Duration,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: usize,
    /// For the prompt.
    pub(super) prompt: Duration,
    /// Tokens made.
    pub(super) tokens: usize,
    /// For making them.
    pub(super) eval: Duration,
}

impl Summary {
    /// A request that only loads or unloads.
    pub(super) fn of(reason: &'static str) -> Self {
        Self { reason, ..Self::default() }
    }

    /// Whether something was generated.
    fn has_counts(&self) -> bool {
        matches!(self.reason, "stop" | "length")
    }
}

#[derive(Serialize)]
struct Line<'a> {
    model: &'a str,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    done: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    done_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "<[i32]>::is_empty")]
    context: &'a [i32],
    #[serde(flatten)]
    counts: Option<Counts>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct Counts {
    total_duration: u64,
    load_duration: u64,
    prompt_eval_count: usize,
    prompt_eval_duration: u64,
    eval_count: usize,
    eval_duration: u64,
}

/// One object of an answer: a piece of its text or, with a summary, its end.
pub(super) fn object(form: Form, model: &str, text: &str, end: Option<&Summary>) -> String {
    let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let counts = end.filter(|summary| summary.has_counts()).map(|summary| Counts {
        total_duration: nanos(summary.total),
        load_duration: nanos(summary.load),
        prompt_eval_count: summary.prompt_tokens,
        prompt_eval_duration: nanos(summary.prompt),
        eval_count: summary.tokens,
        eval_duration: nanos(summary.eval),
    });
    let line = Line {
        model,
        created_at: jiff::Timestamp::now().to_string(),
        response: (form == Form::Generate).then_some(text),
        message: (form == Form::Chat).then_some(Message { role: "assistant", content: text }),
        done: end.is_some(),
        done_reason: end.map(|summary| summary.reason),
        context: end.filter(|_| form == Form::Generate).map_or(&[], |summary| &summary.context),
        counts,
    };
    go_json(&line)
}

/// JSON with the characters escaped that Go escapes for the sake of HTML.
pub(super) fn go_json(value: &impl Serialize) -> String {
    // What is serialised here are our own types: texts, numbers and lists, which cannot fail.
    let text = serde_json::to_string(value).unwrap_or_default();
    if !text.contains(['<', '>', '&', '\u{2028}', '\u{2029}']) {
        return text;
    }
    // These cannot stand outside a JSON string.
    text.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// The members of an object in their order.
    fn members(text: &str) -> Vec<String> {
        let value: serde_json::Map<String, Value> = serde_json::from_str(text).unwrap();
        let mut keys: Vec<String> = value.keys().cloned().collect();
        keys.sort_by_key(|key| text.find(&format!("\"{key}\":")));
        keys
    }

    /// The same of a recorded answer.
    fn recorded(name: &str, line: usize) -> Vec<String> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.json"));
        let exchange: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let response = &exchange["response"];
        let chunks = response["chunks"].as_array();
        members(chunks.map_or(&response["body"], |chunks| &chunks[line.min(chunks.len() - 1)]).as_str().unwrap())
    }

    fn summary() -> Summary {
        Summary { context: vec![1, 2], ..Summary::of("stop") }
    }

    #[test]
    fn answers_have_the_members_of_recorded_ones_in_their_order() {
        let end = summary();
        for (name, line, ours) in [
            ("generate-stream", 0, object(Form::Generate, "m", "a", None)),
            ("generate-stream", usize::MAX, object(Form::Generate, "m", "", Some(&end))),
            ("generate-nonstream", 0, object(Form::Generate, "m", "a", Some(&end))),
            ("generate-raw", usize::MAX, object(Form::Generate, "m", "", Some(&Summary::of("stop")))),
            ("generate-load", 0, object(Form::Generate, "m", "", Some(&Summary::of("load")))),
            ("chat-stream", 0, object(Form::Chat, "m", "a", None)),
            ("chat-stream", usize::MAX, object(Form::Chat, "m", "", Some(&end))),
            ("chat-nonstream", 0, object(Form::Chat, "m", "a", Some(&end))),
            ("chat-unload", 0, object(Form::Chat, "m", "", Some(&Summary::of("unload")))),
        ] {
            assert_eq!(members(&ours), recorded(name, line), "{name}");
        }
    }

    #[test]
    fn characters_of_html_are_escaped_as_in_go() {
        let text = object(Form::Generate, "m", "<a & b>", None);
        assert!(text.contains(r"\u003ca \u0026 b\u003e"), "{text}");
    }
}
