//! What a client asked for, read once its stream has broken: whether one can go on with it, and the parts of the body that
//! the requests for that are made of. Parts are copied as they are written; nothing is written anew but what must differ.

use bytes::Bytes;
use smallvec::SmallVec;

use super::delivered::Form;
use super::openai;
use crate::call::{Call, Payload};
use crate::json::{self, Kind, Span};
use crate::peek;

/// A body, and what was found in it.
#[derive(Debug)]
pub(super) struct Request {
    /// The body as its server got it.
    body: SmallVec<[Bytes; 1]>,
    /// Where its closing brace is.
    end: usize,
    /// Whether the prompt is taken as it is.
    pub(super) is_raw: bool,
    /// Whether the client wants no thinking.
    pub(super) thinks_not: bool,
    /// Whether the answer tells its counts in an event of its own: OpenAI's `include_usage`.
    pub(super) tells_usage: bool,
    parts: Parts,
}

/// Members that go into other requests, as they are written.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) model: Option<Bytes>,
    pub(super) options: Option<Bytes>,
    keep_alive: Option<Bytes>,
    shift: Option<Bytes>,
    truncate: Option<Bytes>,
}

/// What a request says of how long its answer may be, and where it ends.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Bounds {
    /// `num_predict`.
    pub(super) num_predict: Option<i64>,
    /// `stop`.
    pub(super) stops: Option<Vec<String>>,
}

/// Why one cannot go on.
pub(super) type Refusal = &'static str;

impl Request {
    /// Reads the body of a call; or says why one cannot go on with it.
    pub(super) fn read(call: &Call, form: Form) -> Result<Self, Refusal> {
        let body = sent(call).ok_or("the body of the request is not at hand")?;
        match form {
            Form::Generate | Form::Chat => Self::native(body),
            Form::OpenAi => {
                let wish = openai::Wish::read(&body)?;
                let parts = Parts { model: wish.model, options: Some(wish.options), ..Parts::default() };
                let (thinks_not, tells_usage) = (wish.thinks_not, wish.tells_usage);
                Ok(Self { body, end: wish.end, is_raw: false, thinks_not, tells_usage, parts })
            }
        }
    }

    fn native(body: SmallVec<[Bytes; 1]>) -> Result<Self, Refusal> {
        let mut parts = Parts::default();
        let (mut is_raw, mut thinks, mut why) = (false, None, None);
        let end = json::members(&body, |key, kind, span| {
            // Go leaves a member as it was where the value is null.
            if kind == Kind::Null {
                return;
            }
            let value = || Bytes::copy_from_slice(&json::cut(&body, span));
            let empty = matches!(kind, Kind::String { empty: true } | Kind::Nested { empty: true });
            match peek::fold(key).as_str() {
                "model" => parts.model = Some(value()),
                "keep_alive" => parts.keep_alive = Some(value()),
                "shift" => parts.shift = Some(value()),
                "truncate" => parts.truncate = Some(value()),
                // Go would put the members of both together.
                "options" if parts.options.is_some() => why = Some("the request has its options twice"),
                "options" => parts.options = Some(value()),
                "raw" => is_raw = kind == Kind::Bool(true),
                "think" => thinks = Some(kind != Kind::Bool(false)),
                "tools" if !empty => why = Some("the request has tools"),
                "format" if !empty => why = Some("the request wants a format"),
                "images" if !empty => why = Some("the request has images"),
                "suffix" if !empty => why = Some("the request has a suffix"),
                "logprobs" if kind == Kind::Bool(true) => why = Some("the request wants probabilities"),
                _ => {}
            }
        });
        let end = end.map_err(|_| "the request cannot be read")?;
        if thinks == Some(true) {
            why = Some("the request wants thinking");
        }
        match why {
            Some(why) => Err(why),
            None => Ok(Self { body, end, is_raw, thinks_not: thinks == Some(false), tells_usage: false, parts }),
        }
    }

    /// What the request itself says of its answer's bounds.
    pub(super) fn bounds(&self) -> Bounds {
        let mut bounds = Bounds::default();
        let Some(options) = &self.parts.options else { return bounds };
        let pieces = std::slice::from_ref(options);
        let _ = json::members(pieces, |key, kind, span| {
            let value = json::cut(pieces, span);
            match (&*json::unescape(key), kind) {
                ("num_predict", Kind::Number) => bounds.num_predict = number(&value),
                ("stop", Kind::Nested { .. }) => bounds.stops = serde_json::from_slice(&value).ok(),
                _ => {}
            }
        });
        bounds
    }

    /// The question for the finished prompt: the body, and that nothing is to be generated. The last of two members counts.
    pub(super) fn render(&self) -> Payload {
        let at = Span { start: self.end, end: self.end };
        let said = Bytes::from_static(b",\"_debug_render_only\":true,\"stream\":false");
        Payload::Whole(self.body.clone()).edited(&[(at, said)])
    }

    /// The question about the model.
    pub(super) fn show(&self) -> Bytes {
        let model = self.parts.model.as_deref().unwrap_or(b"\"\"");
        [b"{\"model\":", model, b"}"].concat().into()
    }

    /// The request for what follows a prompt, with the same options, those that make a runner load anew among them.
    pub(super) fn raw(&self, prompt: &str, most: Option<i64>, thinks_not: bool, streams: bool) -> Bytes {
        let mut body = Vec::with_capacity(prompt.len() + 256);
        body.extend_from_slice(b"{\"model\":");
        body.extend_from_slice(self.parts.model.as_deref().unwrap_or(b"\"\""));
        body.extend_from_slice(b",\"prompt\":");
        body.extend_from_slice(text(prompt).as_bytes());
        body.extend_from_slice(b",\"raw\":true,\"stream\":");
        body.extend_from_slice(if streams { b"true" } else { b"false" });
        if thinks_not {
            // A model that can think does so unless it is told not to, and its answer is then parsed for it.
            body.extend_from_slice(b",\"think\":false");
        }
        let options = self.options(most);
        let parts = [
            (&b",\"options\":"[..], options.as_deref()),
            // What only prepares must not end in the model's removal.
            (b",\"keep_alive\":", self.parts.keep_alive.as_deref().filter(|_| streams)),
            (b",\"shift\":", self.parts.shift.as_deref()),
            (b",\"truncate\":", self.parts.truncate.as_deref()),
        ];
        for (key, value) in parts {
            if let Some(value) = value {
                body.extend_from_slice(key);
                body.extend_from_slice(value);
            }
        }
        body.push(b'}');
        body.into()
    }

    /// The options, with this `num_predict` if one is given.
    fn options(&self, most: Option<i64>) -> Option<Bytes> {
        let Some(most) = most else { return self.parts.options.clone() };
        let most = Bytes::from(most.to_string());
        let Some(options) = &self.parts.options else {
            return Some([b"{\"num_predict\":", &most[..], b"}"].concat().into());
        };
        let pieces = std::slice::from_ref(options);
        let mut edits = Vec::new();
        let mut is_empty = true;
        let end = json::members(pieces, |key, _, span| {
            is_empty = false;
            if json::unescape(key) == "num_predict" {
                edits.push((span, most.clone()));
            }
        });
        let Ok(end) = end else { return Some(options.clone()) };
        if edits.is_empty() {
            let comma: &[u8] = if is_empty { b"" } else { b"," };
            let member = [comma, b"\"num_predict\":", &most].concat();
            edits.push((Span { start: end, end }, member.into()));
        }
        match Payload::from_bytes(options.clone()).edited(&edits) {
            Payload::Whole(pieces) => Some(pieces.concat().into()),
            Payload::Stream { .. } => None,
        }
    }
}

/// The body of a call as its server gets it.
pub(super) fn sent(call: &Call) -> Option<SmallVec<[Bytes; 1]>> {
    let payload = call.payload.again()?;
    let edits = call.edits.as_ref().map(|edits| &edits.body[..]).unwrap_or_default();
    match payload.edited(edits) {
        Payload::Whole(pieces) => Some(pieces),
        Payload::Stream { .. } => None,
    }
}

/// A number of an option: Go takes whole numbers in any notation.
#[expect(clippy::cast_possible_truncation, reason = "what is larger bounds nothing")]
pub(super) fn number(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    text.parse().ok().or_else(|| Some(text.parse::<f64>().ok()? as i64))
}

/// A text as JSON.
pub(super) fn text(text: &str) -> String {
    // A text can always be written.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(body: &str) -> Result<Request, Refusal> {
        Request::native(body.as_bytes().chunks(5).map(Bytes::copy_from_slice).collect())
    }

    fn raw(body: &str, most: Option<i64>) -> Value {
        serde_json::from_slice(&read(body).unwrap().raw("p\"\n", most, false, true)).unwrap()
    }

    #[test]
    fn the_prompt_is_asked_for_with_the_body_itself() {
        let request = read(r#"{"model":"m","stream":true} trailing"#).unwrap();
        let Payload::Whole(pieces) = request.render() else { panic!("a stream") };
        let wanted = r#"{"model":"m","stream":true,"_debug_render_only":true,"stream":false} trailing"#;
        assert_eq!(String::from_utf8(pieces.concat()).unwrap(), wanted);
    }

    #[test]
    fn options_go_on_as_they_are_but_for_the_length() {
        let body = r#"{"MODEL":"m\u00fc","Options":{"seed" : 7, "num_predict":64,"stop":["x"]},"keep_alive":"5m","shift":false}"#;
        let wanted = json!({"model": "mü", "prompt": "p\"\n", "raw": true, "stream": true, "keep_alive": "5m", "shift": false,
            "options": {"seed": 7, "num_predict": 9, "stop": ["x"]}});
        assert_eq!(raw(body, Some(9)), wanted);
        assert_eq!(raw(body, None)["options"]["num_predict"], 64);
        assert_eq!(raw(r#"{"model":"m"}"#, Some(9))["options"], json!({"num_predict": 9}));
        assert_eq!(raw(r#"{"model":"m","options":{}}"#, Some(9))["options"], json!({"num_predict": 9}));
        assert_eq!(raw(r#"{"model":"m","options":{"a":1}}"#, Some(9))["options"], json!({"a": 1, "num_predict": 9}));
        assert!(raw(r#"{"model":"m","options":null}"#, None).get("options").is_none());
    }

    #[test]
    fn bounds_are_read() {
        let bounds = |options: &str| read(&format!(r#"{{"model":"m","options":{options}}}"#)).unwrap().bounds();
        assert_eq!(
            bounds(r#"{"num_predict":12,"stop":["a","b"]}"#),
            Bounds { num_predict: Some(12), stops: Some(vec!["a".into(), "b".into()]) }
        );
        assert_eq!(bounds(r#"{"num_predict":1e2}"#).num_predict, Some(100));
        assert_eq!(bounds(r#"{"num_predict":null}"#), Bounds::default());
    }

    #[test]
    fn what_cannot_be_gone_on_with_is_refused() {
        for (member, why) in [
            (r#""tools":[{}]"#, "the request has tools"),
            (r#""FORMAT":"json""#, "the request wants a format"),
            (r#""format":{"type":"object"}"#, "the request wants a format"),
            (r#""images":["aGk="]"#, "the request has images"),
            (r#""suffix":"x""#, "the request has a suffix"),
            (r#""logprobs":true"#, "the request wants probabilities"),
            (r#""think":true"#, "the request wants thinking"),
            (r#""think":"high""#, "the request wants thinking"),
            (r#""options":{},"options":{}"#, "the request has its options twice"),
        ] {
            assert_eq!(read(&format!(r#"{{"model":"m",{member}}}"#)).unwrap_err(), why, "{member}");
        }
        let harmless = r#"{"model":"m","tools":[],"format":"","images":null,"suffix":"","logprobs":false,"think":false,"raw":true}"#;
        let request = read(harmless).unwrap();
        assert!(request.is_raw && request.thinks_not);
        assert_eq!(read(r#"{"model":"m""#).unwrap_err(), "the request cannot be read");
    }
}
