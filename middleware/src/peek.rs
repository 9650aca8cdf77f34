//! What routing needs to know of a body, found in one pass and remembered as spans.
//!
//! Go's rules hold, since Ollama is written in Go: keys match in any case, the last duplicate wins, `null` leaves a member
//! as it was, and what follows the first value is ignored. The bytes themselves are never changed here.

use bytes::Bytes;

use crate::json::{self, Kind, Malformed, Reader, Span};

/// What was seen of a request's body. Everything is optional: a body that cannot be read is the server's to refuse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are facts of one body, not states of something")]
pub struct Peek {
    /// The text that names the model: `model`, or `name` where that is empty; `source` of a copy.
    pub model: Option<String>,
    /// The base of a `create`.
    pub from: Option<String>,
    /// What a `copy` is made of, also where `model` says something else.
    pub source: Option<String>,
    /// The new name of a `copy`.
    pub destination: Option<String>,
    /// The digests in `files` and `adapters` of a `create`; the one in the path of a blob.
    pub digests: Vec<String>,
    /// Where the name of the model stands, whether `model` or `name` tells it: in JSON with its quotes.
    pub model_span: Option<Span>,
    /// Whether that name stands there without quotes: in a form.
    pub model_is_bare: bool,
    /// Where the value of `options` stands.
    pub options: Option<Span>,
    /// Where the value of `keep_alive` stands.
    pub keep_alive: Option<Span>,
    /// `stream`, if it was said.
    pub stream: Option<bool>,
    /// The most tokens that the answer may have, in the words of OpenAI and Anthropic.
    pub max_tokens: Option<u64>,
    /// Whether there is something to answer: a prompt or a message.
    pub asks: bool,
    /// Whether `keep_alive` is zero.
    pub keeps_not: bool,
    /// Whether `truncate` or `shift` is false: the context is a bound then, and more of it another answer.
    pub is_bound: bool,
    /// What is said.
    pub talk: Talk,
}

/// Where what is said stands, and by whom: what tells one conversation from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Talk {
    /// The messages of a chat.
    pub messages: Option<Span>,
    /// The prompt of a generate or completion.
    pub prompt: Option<Span>,
    /// The tokens before that prompt.
    pub context: Option<Span>,
    /// The pictures beside that prompt.
    pub images: Option<Span>,
    /// The messages of a `/v1/responses`.
    pub input: Option<Span>,
    /// What the system says before all: `system`, `instructions`.
    pub system: Option<Span>,
    /// OpenAI's name for a conversation.
    pub session: Option<Span>,
    /// OpenAI's name for a person.
    pub user: Option<Span>,
    /// Anthropic's notes, with their name for a person.
    pub metadata: Option<Span>,
}

impl Peek {
    /// Looks at a JSON body in one pass.
    pub fn json(pieces: &[Bytes]) -> Self {
        let mut found = Members::default();
        // A body that ends early still told what came before.
        let _ = found.read(pieces);
        found.finish()
    }

    /// Looks for the `model` field of a multipart form.
    pub fn multipart(pieces: &[Bytes]) -> Self {
        let found = field(pieces, b"name=\"model\"");
        let model = found.map(|span| String::from_utf8_lossy(&json::cut(pieces, span)).into_owned());
        Self { model, model_span: found, model_is_bare: true, asks: true, ..Self::default() }
    }

    /// The most tokens that the answer may have, in whichever words; `None` if that is not said.
    pub fn most_tokens(&self, pieces: &[Bytes]) -> Option<u64> {
        self.max_tokens.or_else(|| num_predict(&json::cut(pieces, self.options?)))
    }

    /// Whether a generate or chat call only unloads its model.
    pub fn unloads(&self) -> bool {
        !self.asks && self.keeps_not
    }
}

/// The value of the field of a form in whose head this stands.
fn field(pieces: &[Bytes], named: &[u8]) -> Option<Span> {
    let head = find(pieces, named, 0)? + named.len();
    let start = find(pieces, b"\r\n\r\n", head)? + 4;
    Some(Span { start, end: find(pieces, b"\r\n", start)? })
}

/// Where some bytes stand for the first time from an offset on, in one piece or across several.
fn find(pieces: &[Bytes], wanted: &[u8], from: usize) -> Option<usize> {
    let mut start = 0;
    // The last bytes before a piece: what is sought may begin there.
    let mut before = Vec::new();
    for piece in pieces {
        let skipped = from.saturating_sub(start).min(piece.len());
        let (rest, at) = (&piece[skipped..], start + skipped);
        before.extend_from_slice(&rest[..rest.len().min(wanted.len() - 1)]);
        if let Some(found) = memchr::memmem::find(&before, wanted) {
            return Some(at + rest.len().min(wanted.len() - 1) - before.len() + found);
        }
        if let Some(found) = memchr::memmem::find(rest, wanted) {
            return Some(at + found);
        }
        if rest.len() >= wanted.len() {
            before.clear();
            before.extend_from_slice(&rest[rest.len() + 1 - wanted.len()..]);
        }
        before.drain(..before.len().saturating_sub(wanted.len() - 1));
        start += piece.len();
    }
    None
}

/// The members on the way, before the rules that span several of them are applied.
#[derive(Default)]
struct Members {
    peek: Peek,
    name: Option<(String, Span)>,
}

impl Members {
    fn read(&mut self, pieces: &[Bytes]) -> Result<(), Malformed> {
        let mut reader = Reader::new(pieces);
        if !reader.take(b'{')? || reader.take(b'}')? {
            return Ok(());
        }
        loop {
            let key = reader.string()?;
            if !reader.take(b':')? {
                return Err(Malformed);
            }
            match Key::of(&json::cut(pieces, key)) {
                Some(key) => self.member(key, &mut reader, pieces)?,
                None => {
                    reader.value()?;
                }
            }
            if !reader.take(b',')? {
                return Ok(());
            }
        }
    }

    fn member(&mut self, key: Key, reader: &mut Reader<'_>, pieces: &[Bytes]) -> Result<(), Malformed> {
        let (kind, span) = reader.value()?;
        if kind == Kind::Null {
            return Ok(());
        }
        let text = || match kind {
            Kind::String { .. } => {
                Some(json::unescape(&json::cut(pieces, Span { start: span.start + 1, end: span.end - 1 })))
            }
            _ => None,
        };
        match key {
            Key::Model => {
                self.peek.model = text();
                self.peek.model_span = self.peek.model.is_some().then_some(span);
            }
            Key::Name => self.name = text().map(|text| (text, span)),
            Key::Source => self.peek.source = text(),
            Key::From => self.peek.from = text(),
            Key::Destination => self.peek.destination = text(),
            Key::Files | Key::Adapters => self.digests(&json::cut(pieces, span)),
            Key::Options => self.peek.options = Some(span),
            Key::KeepAlive => {
                self.peek.keep_alive = Some(span);
                self.peek.keeps_not = is_zero(&json::cut(pieces, span));
            }
            Key::Stream => {
                if let Kind::Bool(stream) = kind {
                    self.peek.stream = Some(stream);
                }
            }
            Key::Truncate => self.peek.is_bound |= kind == Kind::Bool(false),
            Key::MaxTokens => {
                if kind == Kind::Number {
                    self.peek.max_tokens = number(&json::cut(pieces, span));
                }
            }
            Key::Prompt | Key::Messages | Key::Input => {
                self.peek.asks |= !matches!(kind, Kind::String { empty: true } | Kind::Nested { empty: true });
                match key {
                    Key::Prompt => self.peek.talk.prompt = Some(span),
                    Key::Messages => self.peek.talk.messages = Some(span),
                    _ => self.peek.talk.input = Some(span),
                }
            }
            Key::Context => self.peek.talk.context = Some(span),
            Key::Images => self.peek.talk.images = Some(span),
            Key::System => self.peek.talk.system = Some(span),
            Key::Session => self.peek.talk.session = Some(span),
            Key::User => self.peek.talk.user = Some(span),
            Key::Metadata => self.peek.talk.metadata = Some(span),
        }
        Ok(())
    }

    /// The values of an object of texts.
    fn digests(&mut self, object: &[u8]) {
        let pieces = [Bytes::copy_from_slice(object)];
        let mut reader = Reader::new(&pieces);
        let mut read = || -> Result<(), Malformed> {
            if !reader.take(b'{')? || reader.take(b'}')? {
                return Ok(());
            }
            loop {
                reader.string()?;
                if !reader.take(b':')? {
                    return Err(Malformed);
                }
                let (kind, span) = reader.value()?;
                if matches!(kind, Kind::String { .. }) {
                    let inner = Span { start: span.start + 1, end: span.end - 1 };
                    self.peek.digests.push(json::unescape(&json::cut(&pieces, inner)));
                }
                if !reader.take(b',')? {
                    return Ok(());
                }
            }
        };
        let _ = read();
    }

    fn finish(self) -> Peek {
        let mut peek = self.peek;
        let is_said = peek.model.as_ref().is_some_and(|text| !text.is_empty());
        if let (false, Some((text, span))) = (is_said, self.name) {
            peek.model = Some(text);
            peek.model_span = Some(span);
        } else if let (false, Some(text)) = (is_said, &peek.source) {
            peek.model = Some(text.clone());
            peek.model_span = None;
        }
        peek
    }
}

/// A member that somebody looks at.
#[derive(Clone, Copy)]
enum Key {
    Model,
    Name,
    Source,
    From,
    Destination,
    Files,
    Adapters,
    Options,
    KeepAlive,
    Stream,
    Truncate,
    MaxTokens,
    Prompt,
    Messages,
    Input,
    Context,
    Images,
    System,
    Session,
    User,
    Metadata,
}

impl Key {
    const ALL: [(&'static str, Self); 25] = [
        ("model", Self::Model),
        ("name", Self::Name),
        ("source", Self::Source),
        ("from", Self::From),
        ("destination", Self::Destination),
        ("files", Self::Files),
        ("adapters", Self::Adapters),
        ("options", Self::Options),
        ("keep_alive", Self::KeepAlive),
        ("stream", Self::Stream),
        ("truncate", Self::Truncate),
        ("shift", Self::Truncate),
        ("max_tokens", Self::MaxTokens),
        ("max_completion_tokens", Self::MaxTokens),
        ("max_output_tokens", Self::MaxTokens),
        ("prompt", Self::Prompt),
        ("messages", Self::Messages),
        ("input", Self::Input),
        ("context", Self::Context),
        ("images", Self::Images),
        ("system", Self::System),
        ("instructions", Self::System),
        ("prompt_cache_key", Self::Session),
        ("user", Self::User),
        ("metadata", Self::Metadata),
    ];

    /// Finds a key as Go compares it: in any case, and with the two letters outside ASCII that fold into it.
    fn of(raw: &[u8]) -> Option<Self> {
        let plain = raw.iter().all(|byte| byte.is_ascii() && *byte != b'\\');
        if plain {
            return Self::ALL.iter().find(|(name, _)| name.as_bytes().eq_ignore_ascii_case(raw)).map(|(_, key)| *key);
        }
        let folded = fold(raw);
        Self::ALL.iter().find(|(name, _)| *name == folded).map(|(_, key)| *key)
    }
}

/// A key as Go compares it: unescaped, and in lower case.
pub(crate) fn fold(raw: &[u8]) -> String {
    let folded = json::unescape(raw);
    let folded = folded.chars().map(|c| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    });
    folded.collect()
}

/// Whether a `keep_alive` is no time at all: the number 0, or a Go duration of zeros.
fn is_zero(value: &[u8]) -> bool {
    let text = value.strip_prefix(b"\"").and_then(|text| text.strip_suffix(b"\"")).unwrap_or(value);
    !text.is_empty() && text.contains(&b'0') && !text.iter().any(|b| matches!(b, b'1'..=b'9'))
}

/// A whole number that is not negative.
fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The `num_predict` of some options; negative means without a bound. Options are a map to Ollama: their case counts.
fn num_predict(options: &[u8]) -> Option<u64> {
    let pieces = [Bytes::copy_from_slice(options)];
    let mut reader = Reader::new(&pieces);
    let mut found = None;
    let mut read = || -> Result<(), Malformed> {
        if !reader.take(b'{')? {
            return Ok(());
        }
        loop {
            let key = reader.string()?;
            if !reader.take(b':')? {
                return Err(Malformed);
            }
            let (_, value) = reader.value()?;
            if &options[key.start..key.end] == b"num_predict" {
                found = number(&options[value.start..value.end]);
            }
            if !reader.take(b',')? {
                return Ok(());
            }
        }
    };
    let _ = read();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peek(text: &str) -> Peek {
        let by_threes: Vec<Bytes> = text.as_bytes().chunks(3).map(Bytes::copy_from_slice).collect();
        let peek = Peek::json(&by_threes);
        assert_eq!(peek, Peek::json(&[Bytes::copy_from_slice(text.as_bytes())]));
        peek
    }

    fn model(text: &str) -> Option<String> {
        peek(text).model
    }

    #[test]
    fn go_finds_the_model_in_the_same_places() {
        for text in [
            r#"{"model":"tiny"}"#,
            r#" { "stream" : true , "MODEL" : "tiny" }"#,
            r#"{"model":"other","Model":"tiny"}"#,
            r#"{"model":"tiny","model":null} trailing"#,
            r#"{"mod\u0065l":"t\u0069ny"}"#,
            r#"{"model":"","name":"tiny"}"#,
            r#"{"messages":[{"content":"\"model\":\"x\"}"}],"model":"tiny"#.trim_end(),
            r#"{"source":"tiny","destination":"copy"}"#,
        ] {
            let closed = if text.ends_with("tiny") { format!("{text}\"}}") } else { text.to_owned() };
            assert_eq!(model(&closed).as_deref(), Some("tiny"), "{closed}");
        }
    }

    #[test]
    fn what_came_before_the_break_is_known() {
        assert_eq!(model(r#"{"model":"tiny","prompt":"wh"#).as_deref(), Some("tiny"));
        assert_eq!(model("[]"), None);
        assert_eq!(model("null"), None);
    }

    #[test]
    fn an_unload_is_told_from_a_question() {
        for zero in ["0", "\"0s\"", "\"0m0s\"", "0.0", "\"0\""] {
            assert!(peek(&format!(r#"{{"model":"m","prompt":"","keep_alive":{zero}}}"#)).unloads(), "{zero}");
        }
        assert!(!peek(r#"{"model":"m","prompt":"hi","keep_alive":0}"#).unloads());
        assert!(!peek(r#"{"model":"m","keep_alive":10}"#).unloads());
        assert!(!peek(r#"{"model":"m","keep_alive":"1m0s"}"#).unloads());
        assert!(!peek(r#"{"model":"m"}"#).unloads());
        assert!(peek(r#"{"model":"m","messages":[],"keep_alive":0}"#).unloads());
    }

    #[test]
    fn the_longest_answer_is_known_in_every_dialect() {
        for (text, wanted) in [
            (r#"{"max_tokens":7}"#, Some(7)),
            (r#"{"max_tokens":7,"Max_Completion_Tokens":9}"#, Some(9)),
            (r#"{"max_output_tokens":8,"options":{"num_predict":1}}"#, Some(8)),
            (r#"{"options":{"stop":["}"],"num_predict" : 12 ,"seed":1}}"#, Some(12)),
            (r#"{"options":{"num_predict":-1}}"#, None),
            (r#"{"options":{"Num_Predict":3,"nested":{"num_predict":4}}}"#, None),
            (r#"{"options":{}}"#, None),
            (r#"{"options":[1],"max_tokens":null}"#, None),
            (r#"{"max_tokens":"7"}"#, None),
            (r#"{"max_tokens":99999999999999999999}"#, None),
        ] {
            let pieces: Vec<Bytes> = text.as_bytes().chunks(3).map(Bytes::copy_from_slice).collect();
            assert_eq!(peek(text).most_tokens(&pieces), wanted, "{text}");
        }
    }

    #[test]
    fn the_parts_of_a_create_are_known() {
        let peek = peek(r#"{"model":"m","from":"base","files":{"a.gguf":"sha256:aa","b":"sha256:bb"}}"#);
        assert_eq!(peek.from.as_deref(), Some("base"));
        assert_eq!(peek.digests, ["sha256:aa", "sha256:bb"]);
    }

    #[test]
    fn the_place_of_the_name_is_that_of_the_member_that_tells_it() {
        for (text, wanted) in [
            (r#"{"name":"a","model":"tiny"}"#, r#""tiny""#),
            (r#"{"model":"","name":"tiny"}"#, r#""tiny""#),
            (r#"{"model":"a","MODEL":"t\u0069ny"}"#, r#""t\u0069ny""#),
            (r#"{"model":"tiny","model":null}"#, r#""tiny""#),
            (r#"{"model":7,"name":"tiny"}"#, r#""tiny""#),
        ] {
            let peek = peek(text);
            let span = peek.model_span.unwrap();
            assert_eq!((&text[span.start..span.end], peek.model_is_bare), (wanted, false), "{text}");
        }
        assert_eq!(peek(r#"{"model":7}"#).model_span, None);
        assert_eq!(peek(r#"{"model":"","source":"tiny"}"#).model_span, None, "a copy means what it says");
    }

    #[test]
    fn a_form_names_its_model_however_it_is_cut() {
        let form = "--x\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nRIFF\r\n--x\r\n\
            Content-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--x--\r\n";
        for size in 1..=form.len() {
            let pieces: Vec<Bytes> = form.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect();
            let peek = Peek::multipart(&pieces);
            assert_eq!(peek.model.as_deref(), Some("whisper"), "in pieces of {size}");
            let span = peek.model_span.unwrap();
            assert_eq!((&form[span.start..span.end], peek.model_is_bare), ("whisper", true));
        }
        assert_eq!(Peek::multipart(&[Bytes::from_static(b"--x\r\n")]).model, None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_fail(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Peek::json(&[Bytes::from(bytes)]);
        }

        #[test]
        fn serde_agrees(name in "\\PC{0,12}", prompt in "\\PC{0,40}", size in 1_usize..9) {
            let body = serde_json::json!({"prompt": prompt, "nested": [{"model": "no"}], "model": name, "stream": false}).to_string();
            let pieces: Vec<Bytes> = body.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect();
            let peek = Peek::json(&pieces);
            proptest::prop_assert_eq!(peek.model, Some(name));
            proptest::prop_assert_eq!(peek.stream, Some(false));
            proptest::prop_assert_eq!(peek.asks, !prompt.is_empty());
        }
    }
}
