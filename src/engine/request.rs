//! Requests of the built-in engine: what a client asks, read by Ollama's rules, and what cannot be done yet refused.

use http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::keep_alive::KeepAlive;

/// An answer that is an error: its status and its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) StatusCode, pub(super) String);

impl Refusal {
    /// The request is wrong.
    pub(super) fn bad(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }

    /// The engine failed.
    pub(super) fn failed(text: impl Into<String>) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, text.into())
    }

    /// Nobody has the model.
    pub(super) fn no_model(text: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, text.into())
    }
}

/// `POST /api/generate`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Generate {
    pub(super) model: String,
    pub(super) prompt: String,
    pub(super) system: String,
    pub(super) suffix: String,
    pub(super) template: String,
    pub(super) raw: bool,
    pub(super) context: Vec<i32>,
    pub(super) images: Vec<String>,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// `POST /api/chat`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Chat {
    pub(super) model: String,
    pub(super) messages: Vec<Message>,
    pub(super) tools: Value,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// What both may say.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Common {
    pub(super) stream: Option<bool>,
    pub(super) keep_alive: Value,
    pub(super) options: Map<String, Value>,
    pub(super) truncate: Option<bool>,
    format: Value,
    think: Value,
    logprobs: bool,
}

/// One message of a chat.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Message {
    pub(super) role: String,
    pub(super) content: String,
    pub(super) images: Vec<String>,
    pub(super) tool_calls: Value,
}

/// `POST /api/show`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Show {
    pub(super) model: String,
    pub(super) name: String,
}

/// Reads a body: keys in any case, the last of equal ones wins, `null` says nothing, what follows the value is ignored.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Refusal::bad("missing request body"));
    }
    let mut values = serde_json::Deserializer::from_slice(body).into_iter::<Value>();
    let value = match values.next() {
        Some(Ok(Value::Object(members))) => plain(members),
        Some(Ok(Value::Null)) => Value::Object(Map::new()),
        Some(Ok(_)) => return Err(Refusal::bad("the request body is no JSON object")),
        Some(Err(error)) if error.is_eof() => return Err(Refusal::bad("unexpected EOF")),
        Some(Err(error)) => return Err(Refusal::bad(format!("the request body is no JSON: {error}"))),
        None => return Err(Refusal::bad("missing request body")),
    };
    serde_json::from_value(value).map_err(|error| Refusal::bad(format!("the request body cannot be used: {error}")))
}

/// Keys in lower case, and no members that say `null`, at any depth.
fn plain(members: Map<String, Value>) -> Value {
    let kept = members.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(kept.map(|(key, value)| (key.to_lowercase(), plain_value(value))).collect())
}

fn plain_value(value: Value) -> Value {
    match value {
        Value::Object(members) => plain(members),
        Value::Array(values) => Value::Array(values.into_iter().map(plain_value).collect()),
        other => other,
    }
}

/// Refuses what the engine cannot do yet, with Ollama's own status and the beginning of its words.
pub(super) fn refuse(model: &str, common: &Common, more: &[(&str, bool)]) -> Result<(), Refusal> {
    let says = |value: &Value| !matches!(value, Value::Null | Value::Bool(false)) && value.as_str() != Some("");
    let asked = [
        ("structured outputs (format)", says(&common.format)),
        ("thinking", says(&common.think)),
        ("logprobs", common.logprobs),
    ];
    match asked.iter().chain(more).find(|(_, asked)| *asked) {
        None => Ok(()),
        Some((what, _)) => Err(Refusal::bad(format!(
            "{model:?} does not support {what}: the built-in engine of OLOL cannot do that yet; put an Ollama behind it \
             (start one, and `olol up` without --embedded finds it)"
        ))),
    }
}

impl Generate {
    /// What of it cannot be done.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        if self.raw && !(self.template.is_empty() && self.system.is_empty() && self.context.is_empty()) {
            return Err(Refusal::bad("raw mode does not support template, system, or context"));
        }
        let more = [
            ("insert", !self.suffix.is_empty()),
            ("images", !self.images.is_empty()),
            ("templates of a request", !self.template.is_empty()),
        ];
        refuse(&self.model, &self.common, &more)
    }
}

impl Chat {
    /// What of it cannot be done.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        let images = self.messages.iter().any(|message| !message.images.is_empty());
        let tools = self.tools.as_array().is_some_and(|tools| !tools.is_empty())
            || self.messages.iter().any(|message| message.tool_calls.as_array().is_some_and(|calls| !calls.is_empty()));
        refuse(&self.model, &self.common, &[("images", images), ("tools", tools)])
    }
}

/// Load and sampling options, with Ollama's defaults (`api.DefaultOptions`).
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Options {
    /// Tokens to make at most; negative: as many as the context holds.
    pub(super) num_predict: i64,
    /// Context that the request asks for, tokens; `None`: what is loaded, else the default.
    pub(super) num_ctx: Option<u32>,
    /// Threads; `None`: one a processor.
    pub(super) num_thread: Option<u32>,
    /// Zero picks the likeliest token always.
    pub(super) temperature: f32,
    /// Negative: another one each time.
    pub(super) seed: i64,
    pub(super) top_k: i32,
    pub(super) top_p: f32,
    pub(super) min_p: f32,
    pub(super) typical_p: f32,
    pub(super) repeat_last_n: i32,
    pub(super) repeat_penalty: f32,
    pub(super) presence_penalty: f32,
    pub(super) frequency_penalty: f32,
    /// Text that ends an answer, and is not part of it.
    pub(super) stop: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            num_predict: -1,
            num_ctx: None,
            num_thread: None,
            temperature: 0.8,
            seed: -1,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.0,
            typical_p: 1.0,
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            stop: Vec::new(),
        }
    }
}

impl Options {
    /// Reads the options of a request; those that nobody knows are ignored, as Ollama does.
    pub(super) fn read(given: &Map<String, Value>) -> Result<Self, Refusal> {
        let mut options = Self::default();
        for (key, value) in given {
            options
                .set(key, value)
                .map_err(|kind| Refusal::failed(format!("option {key:?} must be of type {kind}")))?;
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), &'static str> {
        #[expect(clippy::cast_possible_truncation, reason = "32 bits are what Ollama and llama.cpp keep")]
        let float = || value.as_f64().map(|number| number as f32).ok_or("float32");
        // Ollama takes 1.0 for an integer too: JSON has only numbers.
        #[expect(clippy::cast_possible_truncation, reason = "a fraction is cut off, as Ollama does")]
        let integer = || value.as_i64().or_else(|| value.as_f64().map(|number| number as i64)).ok_or("integer");
        let small =
            || integer().map(|number| i32::try_from(number).unwrap_or(if number < 0 { i32::MIN } else { i32::MAX }));
        let count = || integer().map(|number| u32::try_from(number).ok().filter(|number| *number > 0));
        match key {
            "num_predict" => self.num_predict = integer()?,
            "num_ctx" => self.num_ctx = count()?,
            "num_thread" => self.num_thread = count()?,
            "temperature" => self.temperature = float()?,
            "seed" => self.seed = integer()?,
            "top_k" => self.top_k = small()?,
            "top_p" => self.top_p = float()?,
            "min_p" => self.min_p = float()?,
            "typical_p" => self.typical_p = float()?,
            "repeat_last_n" => self.repeat_last_n = small()?,
            "repeat_penalty" => self.repeat_penalty = float()?,
            "presence_penalty" => self.presence_penalty = float()?,
            "frequency_penalty" => self.frequency_penalty = float()?,
            "stop" => {
                let list = value.as_array().ok_or("array")?;
                self.stop = list
                    .iter()
                    .map(|stop| stop.as_str().map(str::to_owned).ok_or("array of strings"))
                    .collect::<Result<_, _>>()?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl Common {
    /// How long the model stays.
    pub(super) fn keep_alive(&self) -> Result<KeepAlive, Refusal> {
        KeepAlive::read(Some(&self.keep_alive)).map_err(Refusal::bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn generate(body: &str) -> Result<Generate, Refusal> {
        read(body.as_bytes())
    }

    #[test]
    fn bodies_are_read_by_gos_rules() {
        let read = generate(
            r#"{"MODEL":"a","model":"m","Prompt":"p","raw":null,"unknown":1,"Options":{"NUM_PREDICT":2}} trailing"#,
        )
        .unwrap();
        assert_eq!((read.model.as_str(), read.prompt.as_str(), read.raw), ("m", "p", false));
        assert_eq!(Options::read(&read.common.options).unwrap().num_predict, 2);
        assert_eq!(generate("null").unwrap().model, "");
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for (body, wanted) in [
            ("", "missing request body"),
            (" \n", "missing request body"),
            ("{\"model\":\"tiny\", \"prompt\":", "unexpected EOF"),
        ] {
            assert_eq!(generate(body).unwrap_err(), Refusal::bad(wanted));
        }
        assert!(generate("[1]").unwrap_err().1.contains("no JSON object"));
        assert!(generate("{x").unwrap_err().1.contains("no JSON"));
        assert!(generate(r#"{"prompt":5}"#).unwrap_err().1.contains("integer `5`"));
    }

    #[test]
    fn options_have_ollamas_defaults_and_errors() {
        let options = |value: Value| Options::read(value.as_object().unwrap());
        assert_eq!(options(json!({"mirostat": 1, "no_such_option": "x"})).unwrap(), Options::default());
        assert_eq!(
            options(json!({"num_ctx": 8.0, "seed": -3})).unwrap(),
            Options { num_ctx: Some(8), seed: -3, ..Options::default() }
        );
        for (value, wanted) in [
            (json!({"num_predict": "many"}), "option \"num_predict\" must be of type integer"),
            (json!({"stop": "a"}), "option \"stop\" must be of type array"),
            (json!({"temperature": true}), "option \"temperature\" must be of type float32"),
        ] {
            assert_eq!(options(value).unwrap_err(), Refusal::failed(wanted));
        }
    }

    #[test]
    fn what_cannot_be_done_yet_is_refused_by_name() {
        for (body, what) in [
            (r#"{"model":"m","prompt":"x","format":"json"}"#, "format"),
            (r#"{"model":"m","prompt":"x","think":true}"#, "thinking"),
            (r#"{"model":"m","prompt":"x","suffix":"y"}"#, "insert"),
            (r#"{"model":"m","prompt":"x","images":["aa"]}"#, "images"),
        ] {
            let Refusal(status, text) = generate(body).unwrap().check().unwrap_err();
            assert!(
                status == StatusCode::BAD_REQUEST && text.starts_with("\"m\" does not support") && text.contains(what),
                "{text}"
            );
        }
        assert_eq!(generate(r#"{"model":"m","prompt":"x","think":false,"format":""}"#).unwrap().check(), Ok(()));
        let chat: Chat = read(br#"{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[{}]}"#).unwrap();
        assert!(chat.check().unwrap_err().1.contains("tools"));
    }
}
