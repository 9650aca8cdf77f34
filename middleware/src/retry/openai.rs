//! OpenAI's chat: the same wish in the words of Ollama's own API, and how the events of its answers are written.
//!
//! Ollama makes of such a request one to its own `/api/chat` (`FromChatRequest` in its `openai/openai.go`), and since 0.12.0
//! it takes `_debug_render_only` there too: the prompt is asked for with the very body. Only the options of what follows have
//! to be put together here, in the same way.

use bytes::Bytes;

use super::mould::Numbers;
use super::request::{Refusal, text};
use crate::json::{self, Kind};
use crate::peek;

/// What a body wants.
#[derive(Debug)]
pub(super) struct Wish {
    /// Where the closing brace of the body is.
    pub(super) end: usize,
    pub(super) model: Option<Bytes>,
    /// Ollama's options for it.
    pub(super) options: Bytes,
    pub(super) thinks_not: bool,
    pub(super) tells_usage: bool,
}

impl Wish {
    /// Reads a body; or says why one cannot go on with its answer.
    pub(super) fn read(body: &[Bytes]) -> Result<Self, Refusal> {
        let (mut model, mut why, mut effort, mut tells_usage) = (None, None, None, false);
        let mut stop = None;
        let (mut temperature, mut top_p) = (Bytes::from_static(b"1.0"), Bytes::from_static(b"1.0"));
        let mut options: Vec<(&str, Bytes)> = Vec::new();
        let end = json::members(body, |key, kind, span| {
            // Go leaves a member as it was where the value is null.
            if kind == Kind::Null {
                return;
            }
            let value = || Bytes::copy_from_slice(&json::cut(body, span));
            let empty = matches!(kind, Kind::String { empty: true } | Kind::Nested { empty: true });
            match peek::fold(key).as_str() {
                "model" => model = Some(value()),
                "temperature" => temperature = value(),
                "top_p" => top_p = value(),
                "max_tokens" => options.push(("num_predict", value())),
                "seed" => options.push(("seed", value())),
                "frequency_penalty" => options.push(("frequency_penalty", value())),
                "presence_penalty" => options.push(("presence_penalty", value())),
                "stop" => stop = stops(&value(), kind),
                "stream_options" => tells_usage = member(&value(), "include_usage").as_deref() == Some(b"true"),
                "reasoning_effort" => effort = effort.take().or(Some(value())),
                "reasoning" => effort = member(&value(), "effort"),
                "response_format" => why = why.or(formats(&value())),
                "tools" if !empty => why = Some("the request has tools"),
                "logprobs" if kind == Kind::Bool(true) => why = Some("the request wants probabilities"),
                _ => {}
            }
        });
        let end = end.map_err(|_| "the request cannot be read")?;
        let thinks_not = match effort.as_deref() {
            None | Some(b"\"\"") => false,
            Some(b"\"none\"") => true,
            Some(_) => return Err("the request wants thinking"),
        };
        if let Some(why) = why {
            return Err(why);
        }
        options.extend([("temperature", temperature), ("top_p", top_p)]);
        options.extend(stop.map(|stop| ("stop", stop)));
        Ok(Self { end, model, options: object(&options), thinks_not, tells_usage })
    }
}

/// A member of an object, by Go's rules.
fn member(object: &Bytes, wanted: &str) -> Option<Bytes> {
    let mut found = None;
    let _ = json::members(std::slice::from_ref(object), |key, kind, span| {
        if peek::fold(key) == wanted && kind != Kind::Null {
            found = Some(object.slice(span.start..span.end));
        }
    });
    found
}

/// The stop words as a list; what is no text in it is left out.
fn stops(value: &Bytes, kind: Kind) -> Option<Bytes> {
    match kind {
        Kind::String { .. } => Some([b"[", &value[..], b"]"].concat().into()),
        Kind::Nested { .. } => {
            let list: Vec<serde_json::Value> = serde_json::from_slice(value).ok()?;
            let words: Vec<String> = list.iter().filter_map(|word| Some(text(word.as_str()?))).collect();
            Some(format!("[{}]", words.join(",")).into())
        }
        _ => None,
    }
}

/// Why one cannot go on with an answer in this format.
fn formats(value: &Bytes) -> Option<Refusal> {
    let kind = member(value, "type")?;
    let kind = String::from_utf8_lossy(&kind).to_lowercase();
    kind.contains("json").then_some("the request wants a format")
}

fn object(members: &[(&str, Bytes)]) -> Bytes {
    let mut out = Vec::from(*b"{");
    for (at, (key, value)) in members.iter().enumerate() {
        out.extend_from_slice(if at == 0 { b"\"" } else { b",\"" });
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\":");
        out.extend_from_slice(value);
    }
    out.push(b'}');
    out.into()
}

/// What every event of an answer says, taken from its first: all but the choices, up to where they begin.
pub(super) fn head(first: &[u8]) -> Option<Vec<u8>> {
    let data = [Bytes::copy_from_slice(first.strip_prefix(b"data: ")?)];
    let mut out = Vec::from(*b"data: {");
    let read = json::members(&data, |key, _, span| {
        if !matches!(key, b"choices" | b"usage") {
            out.push(b'"');
            out.extend_from_slice(key);
            out.extend_from_slice(b"\":");
            out.extend_from_slice(&data[0][span.start..span.end]);
            out.push(b',');
        }
    });
    out.extend_from_slice(b"\"choices\":[");
    read.ok().map(|_| out)
}

/// Writes an event with a part of the text, as it is written in JSON.
pub(super) fn piece(out: &mut Vec<u8>, head: &[u8], text: &[u8]) {
    out.extend_from_slice(head);
    out.extend_from_slice(b"{\"index\":0,\"delta\":{\"content\":\"");
    out.extend_from_slice(text);
    out.extend_from_slice(b"\"},\"finish_reason\":null}]}\n\n");
}

/// Writes the end.
pub(super) fn last(out: &mut Vec<u8>, head: &[u8], reason: &[u8], usage: Option<&Numbers>) {
    out.extend_from_slice(head);
    out.extend_from_slice(b"{\"index\":0,\"delta\":{},\"finish_reason\":");
    out.extend_from_slice(reason);
    out.extend_from_slice(b"}]}\n\n");
    if let Some(numbers) = usage {
        out.extend_from_slice(head);
        let (prompt, made) = (numbers.prompt_eval_count, numbers.eval_count);
        let total = prompt + made;
        out.extend_from_slice(
            format!(
                "],\"usage\":{{\"prompt_tokens\":{prompt},\"completion_tokens\":{made},\"total_tokens\":{total}}}}}\n\n"
            )
            .as_bytes(),
        );
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(body: &str) -> Result<Wish, Refusal> {
        let pieces: Vec<Bytes> = body.as_bytes().chunks(7).map(Bytes::copy_from_slice).collect();
        Wish::read(&pieces)
    }

    fn options(body: &str) -> Value {
        serde_json::from_slice(&read(body).unwrap().options).unwrap()
    }

    #[test]
    fn options_are_those_that_ollama_would_make() {
        assert_eq!(options(r#"{"model":"m","messages":[]}"#), json!({"temperature": 1.0, "top_p": 1.0}));
        let all = r#"{"model":"m","max_tokens":5,"seed":7,"temperature":0,"top_p":0.5,"frequency_penalty":1,"presence_penalty":2,"stop":"x"}"#;
        let wanted = json!({"num_predict": 5, "seed": 7, "temperature": 0, "top_p": 0.5, "frequency_penalty": 1,
            "presence_penalty": 2, "stop": ["x"]});
        assert_eq!(options(all), wanted);
        assert_eq!(options(r#"{"stop":["a",1,"b"],"seed":null}"#)["stop"], json!(["a", "b"]));
    }

    #[test]
    fn what_cannot_be_gone_on_with_is_refused() {
        for (member, why) in [
            (r#""tools":[{}]"#, "the request has tools"),
            (r#""response_format":{"type":"json_object"}"#, "the request wants a format"),
            (r#""reasoning_effort":"low""#, "the request wants thinking"),
            (r#""reasoning":{"effort":"high"}"#, "the request wants thinking"),
            (r#""logprobs":true"#, "the request wants probabilities"),
        ] {
            assert_eq!(read(&format!(r#"{{"model":"m",{member}}}"#)).unwrap_err(), why, "{member}");
        }
        let wish = read(r#"{"model":"m","reasoning_effort":"none","response_format":{"type":"text"},"stream_options":{"include_usage":true}}"#).unwrap();
        assert!(wish.thinks_not && wish.tells_usage);
    }

    #[test]
    fn events_are_written_as_ollama_writes_them() {
        let first = b"data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":9,\"model\":\"m\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"The\"},\"finish_reason\":null}]}\n\n";
        let head = head(first).unwrap();
        let mut out = Vec::new();
        piece(&mut out, &head, b" river");
        let wanted = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":9,\"model\":\"m\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" river\"},\"finish_reason\":null}]}\n\n";
        assert_eq!(String::from_utf8(out).unwrap(), wanted);
        let mut out = Vec::new();
        let numbers = Numbers { prompt_eval_count: 15, eval_count: 5, ..Numbers::default() };
        last(&mut out, &head, b"\"length\"", Some(&numbers));
        let wanted = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":9,\"model\":\"m\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\ndata: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":9,\"model\":\"m\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[],\"usage\":{\"prompt_tokens\":15,\"completion_tokens\":5,\"total_tokens\":20}}\n\ndata: [DONE]\n\n";
        assert_eq!(String::from_utf8(out).unwrap(), wanted);
    }
}
