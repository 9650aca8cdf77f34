//! Asks servers for another model than the client named, and lets the answer keep the client's own name.
//!
//! For layers that put one model in the place of another: `alias` and `quant-fallback`. On the way down [`request`] replaces
//! the name in the body, by its span. On the way up [`answer`] replaces the one member of an answer that names the model,
//! and the header [`SERVED`] tells the truth. Where that member stands depends on the route; it is found by the structure
//! of the JSON, never inside a text or the arguments of a tool, and what is around it stays as the server made it.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use memchr::memmem::Finder;
use smallvec::SmallVec;

use crate::call::{Call, Chunk, Chunks, Head, Outcome, Payload, Reply, Source};
use crate::error::Error;
use crate::json;
use crate::names::ModelName;
use crate::route::Route;

/// The header that tells which model was asked for, where that is not the one that the client named.
pub const SERVED: HeaderName = HeaderName::from_static("x-olol-model");

/// The longest answer of known length whose new length is found out, bytes; a longer one is sent without saying its length.
const LONGEST_COUNTED: u64 = 64 << 10;

/// Lets servers be asked for this model. False, and nothing changed, if the call says its model where nobody can replace
/// it: in a body that is still coming.
pub fn request(call: &mut Call, model: &str) -> bool {
    let Some(name) = ModelName::parse(model) else { return false };
    if call.route == Route::V1Model {
        let Some(path) = path_of(model, &call.path) else { return false };
        call.edits_mut().path = Some(path);
    } else {
        let (Some(span), Payload::Whole(_)) = (call.peek.model_span, &call.payload) else { return false };
        let text = if call.peek.model_is_bare { model.to_owned() } else { json::quoted(model) };
        let edits = &mut call.edits_mut().body;
        match edits.iter_mut().find(|(other, _)| *other == span) {
            // Another layer has replaced it already.
            Some((_, before)) => *before = text.into(),
            None => edits.push((span, text.into())),
        }
    }
    call.place.model = Some(name);
    true
}

/// The path that asks for a model in the manner of OpenAI.
fn path_of(model: &str, asked: &PathAndQuery) -> Option<PathAndQuery> {
    let query = asked.query().map_or_else(String::new, |query| format!("?{query}"));
    format!("/v1/models/{}{query}", model.replace('%', "%25").replace('/', "%2F")).parse().ok()
}

/// Lets an answer name the model as its client did, and tells in a header what was `served`. An inner layer that has done
/// so has the last word on that.
///
/// A short answer of known length is read to its end first, for its new length.
pub async fn answer(mut reply: Reply, head: &Head, served: &str) -> Reply {
    if reply.headers.contains_key(SERVED) {
        return reply;
    }
    if let Ok(value) = HeaderValue::from_str(served) {
        reply.headers.insert(SERVED, value);
    }
    let (Some(member), Some(name)) = (Member::of(head.route), &head.peek.model) else { return reply };
    let length = reply.body.length();
    if !reply.status.is_success() || reply.headers.contains_key(header::CONTENT_ENCODING) || length == Some(0) {
        return reply;
    }
    let renamer = Renamer::new(member, Framing::of(&reply.headers), &json::quoted(name).into());
    if length.is_some_and(|length| length <= LONGEST_COUNTED) {
        return counted(reply, renamer).await;
    }
    reply.headers.remove(header::CONTENT_LENGTH);
    reply.body = reply.body.through(|chunks| Renamed { chunks, renamer }).with_length(None);
    reply
}

/// The answer with another name in it, and with its length.
async fn counted(mut reply: Reply, renamer: Renamer) -> Reply {
    let mut source = Renamed { chunks: reply.body.take_chunks(), renamer };
    let mut chunks: Vec<Result<Chunk, Error>> = Vec::new();
    while let Some(chunk) = poll_fn(|cx| Pin::new(&mut source).poll_chunk(cx)).await {
        let is_over = chunk.is_err();
        chunks.push(chunk);
        if is_over {
            break;
        }
    }
    source.tell(reply.body.outcome_mut());
    let length: Result<u64, ()> =
        chunks.iter().map(|chunk| chunk.as_ref().map(|chunk| chunk.bytes.len() as u64).map_err(drop)).sum();
    match length {
        Ok(length) if reply.headers.contains_key(header::CONTENT_LENGTH) => {
            reply.headers.insert(header::CONTENT_LENGTH, length.into());
        }
        _ => drop(reply.headers.remove(header::CONTENT_LENGTH)),
    }
    reply.body = reply.body.through(|_| futures_util::stream::iter(chunks)).with_length(length.ok());
    reply
}

/// Chunks that come through a renamer.
struct Renamed {
    chunks: Chunks,
    renamer: Renamer,
}

impl Source for Renamed {
    fn tell(&self, outcome: &mut Outcome) {
        self.chunks.tell(outcome);
    }

    fn poll_chunk(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Error>>> {
        let this = self.get_mut();
        loop {
            let chunk = match ready!(Pin::new(&mut this.chunks).poll_next(cx)) {
                Some(Ok(chunk)) => chunk,
                other => return Poll::Ready(other),
            };
            let bytes = this.renamer.rename(chunk.bytes);
            // All of it may have been the name.
            if !bytes.is_empty() || chunk.end.is_some() {
                return Poll::Ready(Some(Ok(Chunk { bytes, end: chunk.end })));
            }
        }
    }
}

/// The member of an answer that names the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    key: &'static [u8],
    /// The member of the outermost object in which it stands, in some pieces of a stream.
    parent: Option<&'static [u8]>,
}

impl Member {
    fn of(route: Route) -> Option<Self> {
        let (key, parent): (&'static [u8], Option<&'static [u8]>) = match route {
            Route::V1Model => (b"id", None),
            Route::V1Messages => (b"model", Some(b"message")),
            Route::V1Responses => (b"model", Some(b"response")),
            // Their answers name no model.
            Route::Embeddings | Route::V1Audio => return None,
            route if route.infers() => (b"model", None),
            _ => return None,
        };
        Some(Self { key, parent })
    }
}

/// How an answer is made of JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// One value.
    Whole,
    /// A value a line: NDJSON.
    Lines,
    /// A value in each event: server-sent events.
    Events,
}

impl Framing {
    fn of(headers: &HeaderMap) -> Self {
        match headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes) {
            Some(kind) if kind.starts_with(b"application/x-ndjson") => Self::Lines,
            Some(kind) if kind.starts_with(b"text/event-stream") => Self::Events,
            _ => Self::Whole,
        }
    }
}

/// What stands before the value in a line of an event.
const FIELD: &[u8] = b"data:";
/// One byte more than the longest key that somebody looks for.
const LONGEST_KEY: usize = 9;

/// Replaces the name in an answer, which may come in pieces of any size.
///
/// It knows of JSON only what it needs: where strings begin and end, and how deep in objects they stand. A string before a
/// colon is a key; lists need not be told apart, since no string in one stands before a colon.
#[derive(Debug)]
struct Renamer {
    member: Member,
    framing: Framing,
    /// What replaces the name, behind its first quote: the second one is included.
    name: Bytes,
    at: At,
    /// Objects around what comes next.
    depth: usize,
    /// Whether the outer one of two is the parent.
    in_parent: bool,
    /// The string that is being read, if it may be a key; `LONGEST_KEY` bytes of one that is too long.
    key: SmallVec<[u8; LONGEST_KEY]>,
    /// Whether the last byte of a string was a backslash.
    is_escaped: bool,
}

/// Where a renamer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In what stands before the value, behind so many bytes of it.
    Field(usize),
    /// Before the value.
    Before,
    /// Between strings.
    Between,
    /// In a string.
    Text,
    /// Behind a string that may be a key.
    AfterText,
    /// Behind the colon of the key of the name.
    AfterKey,
    /// Behind the colon of the key of the parent.
    AfterParent,
    /// Behind the first quote of the name. Where nothing follows it, Ollama means none, and there is none to replace.
    NameBegins,
    /// In the name.
    Name,
    /// Behind the name, or where none can come.
    Over,
}

/// What a look at a whole line shows.
enum Glance {
    /// The name, its second quote included.
    Name(Range<usize>),
    /// There is none to replace.
    None,
    /// Not enough.
    Unsure,
}

/// The key of the name, in every answer that comes in lines.
const MODEL: &[u8] = b"\"model\"";

/// Finds it.
static QUOTED: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(MODEL));

/// A part of a piece that is left out, and whether the new name stands there instead.
type Cut = (Range<usize>, bool);

impl Renamer {
    /// `name` comes with its quotes.
    fn new(member: Member, framing: Framing, name: &Bytes) -> Self {
        let mut renamer = Self {
            member,
            framing,
            name: name.slice(1..),
            at: At::Before,
            depth: 0,
            in_parent: false,
            key: SmallVec::new(),
            is_escaped: false,
        };
        renamer.begin();
        renamer
    }

    /// Begins a value, or a line in which one may stand.
    fn begin(&mut self) {
        self.at = if self.framing == Framing::Events { At::Field(0) } else { At::Before };
        self.depth = 0;
        self.in_parent = false;
        self.is_escaped = false;
    }

    /// The next piece of the answer, with the new name. A piece without the name is not copied.
    fn rename(&mut self, piece: Bytes) -> Bytes {
        if self.framing == Framing::Whole && self.at == At::Over {
            return piece;
        }
        let mut cuts: SmallVec<[Cut; 2]> = SmallVec::new();
        if self.framing == Framing::Whole {
            self.read(&piece, 0, &mut cuts);
        } else {
            let mut start = 0;
            for end in memchr::memchr_iter(b'\n', &piece) {
                match self.glance(&piece[start..end]) {
                    Glance::Name(range) => cuts.push((start + range.start..start + range.end, true)),
                    Glance::None => {}
                    Glance::Unsure => {
                        self.read(&piece[..end], start, &mut cuts);
                        self.begin();
                    }
                }
                start = end + 1;
            }
            self.read(&piece, start, &mut cuts);
        }
        if cuts.is_empty() { piece } else { self.spliced(&piece, &cuts) }
    }

    /// A look at a whole line, which nearly always shows where the name is, or that there is none.
    fn glance(&self, line: &[u8]) -> Glance {
        let is_fresh = self.at == if self.framing == Framing::Events { At::Field(0) } else { At::Before };
        if !is_fresh || MODEL[1..MODEL.len() - 1] != *self.member.key {
            return Glance::Unsure;
        }
        let Some(key) = QUOTED.find(line) else { return Glance::None };
        let before = if self.framing == Framing::Events { line[..key].strip_prefix(FIELD) } else { Some(&line[..key]) };
        // In an event, what is no data.
        let Some(before) = before.map(<[u8]>::trim_ascii_start) else { return Glance::None };
        let Some(before) = before.strip_prefix(b"{") else { return Glance::Unsure };
        let value = &line[key + MODEL.len()..];
        // Without an escape every quote is the border of a string, and without a brace all is in the outermost object.
        let is_plain = !before.iter().any(|byte| matches!(byte, b'{' | b'}' | b'\\'));
        let is_outside = memchr::memchr_iter(b'"', before).count().is_multiple_of(2);
        let (true, true, Some(name)) = (is_plain, is_outside, value.strip_prefix(b":\"")) else {
            return Glance::Unsure;
        };
        let start = line.len() - name.len();
        match memchr::memchr2(b'"', b'\\', name) {
            Some(0) if name[0] == b'"' => Glance::None,
            Some(end) if name[end] == b'"' => Glance::Name(start..start + end + 1),
            _ => Glance::Unsure,
        }
    }

    fn spliced(&self, piece: &[u8], cuts: &[Cut]) -> Bytes {
        let mut made = BytesMut::with_capacity(piece.len() + cuts.len() * self.name.len());
        let mut done = 0;
        for (range, is_begin) in cuts {
            made.extend_from_slice(&piece[done..range.start]);
            if *is_begin {
                made.extend_from_slice(&self.name);
            }
            done = range.end;
        }
        made.extend_from_slice(&piece[done..]);
        made.freeze()
    }

    /// Reads on, from a place in a piece to its end.
    fn read(&mut self, bytes: &[u8], from: usize, cuts: &mut SmallVec<[Cut; 2]>) {
        let mut at = from;
        while at < bytes.len() {
            let rest = &bytes[at..];
            at += match self.at {
                At::Over => return,
                At::Field(seen) => self.field(seen, rest),
                At::Before | At::AfterText | At::AfterKey | At::AfterParent => {
                    let blanks = rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
                    let is_taken = rest.get(blanks).is_some_and(|byte| self.mark(*byte));
                    blanks + usize::from(is_taken)
                }
                At::Between => self.between(rest),
                At::Text => self.text(rest),
                At::NameBegins if rest[0] == b'"' => {
                    self.at = At::Over;
                    1
                }
                At::NameBegins => {
                    self.at = At::Name;
                    cuts.push((at..at, true));
                    0
                }
                At::Name => {
                    let length = self.name(rest);
                    match cuts.last_mut().filter(|(range, _)| range.end == at) {
                        Some((range, _)) => range.end = at + length,
                        None => cuts.push((at..at + length, false)),
                    }
                    length
                }
            };
        }
    }

    /// In what stands before a value: only a line of data has one.
    fn field(&mut self, seen: usize, rest: &[u8]) -> usize {
        let wanted = &FIELD[seen..];
        let length = wanted.len().min(rest.len());
        self.at = match (rest[..length] == wanted[..length], length == wanted.len()) {
            (false, _) => At::Over,
            (true, false) => At::Field(seen + length),
            (true, true) => At::Before,
        };
        length
    }

    /// A byte that is not blank, where one decides. True if it has been taken, and is not the next one once more.
    fn mark(&mut self, byte: u8) -> bool {
        let (next, is_taken) = match (self.at, byte) {
            (At::Before, b'{') => {
                self.depth = 1;
                (At::Between, true)
            }
            (At::Before, _) => (At::Over, true),
            (At::AfterText, b':') => (self.key_is(), true),
            (At::AfterKey, b'"') => (At::NameBegins, true),
            (At::AfterParent, b'{') => {
                self.depth += 1;
                self.in_parent = true;
                (At::Between, true)
            }
            _ => (At::Between, false),
        };
        self.at = next;
        is_taken
    }

    /// Whose key has been read.
    fn key_is(&self) -> At {
        match self.key.as_slice() {
            key if key == self.member.key => At::AfterKey,
            key if self.depth == 1 && Some(key) == self.member.parent => At::AfterParent,
            _ => At::Between,
        }
    }

    /// Whether keys here may be those that are looked for.
    fn is_near(&self) -> bool {
        self.depth == 1 || (self.depth == 2 && self.in_parent)
    }

    fn between(&mut self, rest: &[u8]) -> usize {
        let Some(found) = memchr::memchr3(b'"', b'{', b'}', rest) else { return rest.len() };
        match rest[found] {
            b'"' => {
                self.key.clear();
                self.at = At::Text;
            }
            b'{' => self.depth += 1,
            _ => {
                self.depth -= 1;
                self.in_parent &= self.depth > 1;
                if self.depth == 0 {
                    self.at = At::Over;
                }
            }
        }
        found + 1
    }

    fn text(&mut self, rest: &[u8]) -> usize {
        let (length, is_end) = self.string(rest);
        if self.is_near() && self.key.len() < LONGEST_KEY {
            let room = LONGEST_KEY - self.key.len();
            let said = &rest[..length - usize::from(is_end)];
            self.key.extend_from_slice(&said[..said.len().min(room)]);
        }
        if is_end {
            self.at = if self.is_near() { At::AfterText } else { At::Between };
        }
        length
    }

    fn name(&mut self, rest: &[u8]) -> usize {
        let (length, is_end) = self.string(rest);
        if is_end {
            self.at = At::Over;
        }
        length
    }

    /// How much of this is of the string that has begun, its closing quote included, and whether that is there.
    fn string(&mut self, rest: &[u8]) -> (usize, bool) {
        let mut at = 0;
        if std::mem::take(&mut self.is_escaped) {
            at = 1;
        }
        while let Some(found) = rest.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
            at += found + 1;
            if rest[at - 1] == b'"' {
                return (at, true);
            }
            self.is_escaped = at == rest.len();
            at += 1;
        }
        (rest.len(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{Body, Counters};
    use crate::peek::Peek;
    use crate::{Candidates, Snapshot};
    use http::{Method, StatusCode};
    use proptest::prelude::*;
    use serde_json::Value;
    use std::sync::Arc;

    const OWN: &str = "my <own>";

    fn renamed(route: Route, framing: Framing, pieces: &[&[u8]]) -> String {
        let mut renamer = Renamer::new(Member::of(route).unwrap(), framing, &json::quoted(OWN).into());
        let made: Vec<Bytes> = pieces.iter().map(|piece| renamer.rename(Bytes::copy_from_slice(piece))).collect();
        String::from_utf8(made.concat()).unwrap()
    }

    /// The answer, cut at every place and into single bytes, has the name in these places and nothing else changed.
    fn check(route: Route, framing: Framing, text: &str) {
        let wanted = text.replace('@', r#""my \u003cown\u003e""#);
        let sent = text.replace('@', r#""llama\"3:70b""#);
        for cut in 0..=sent.len() {
            let (one, two) = sent.as_bytes().split_at(cut);
            assert_eq!(renamed(route, framing, &[one, two]), wanted, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = sent.as_bytes().chunks(1).collect();
        assert_eq!(renamed(route, framing, &bytes), wanted, "byte by byte");
    }

    #[test]
    fn ollamas_own_lines_keep_the_name() {
        let lines = concat!(
            r#"{"model":@,"created_at":"x","message":{"role":"assistant","content":"\"model\":\"no\"","tool_calls":[{"function":{"arguments":{"model":"no"}}}]},"done":false}"#,
            "\n",
            r#"{ "model" : @ , "response":"","done":true,"context":[1,2]}"#,
            "\n"
        );
        check(Route::Chat, Framing::Lines, lines);
        check(Route::Generate, Framing::Lines, "{\"response\":\"{\"}\n\n{\"error\":\"model\"}\n{\"model\":@}\n");
    }

    #[test]
    fn an_answer_in_one_piece_keeps_the_name_wherever_it_stands() {
        check(
            Route::V1Embeddings,
            Framing::Whole,
            r#"{"object":"list","data":[{"model":"no","embedding":[0.1]}],"model":@,"usage":{"model":"no"}}"#,
        );
        check(Route::Embed, Framing::Whole, r#"{"embeddings":[[1],["model"]],"model" : @}"#);
        check(Route::V1Model, Framing::Whole, r#"{"id":@,"object":"model","owned_by":"library"}"#);
        check(
            Route::V1Messages,
            Framing::Whole,
            r#"{"id":"m","content":[{"type":"tool_use","input":{"message":{"model":"no"}}}],"model":@}"#,
        );
        check(Route::Chat, Framing::Whole, "{\n  \"message\": {\"model\": \"no\"},\n  \"model\": @\n}\n");
    }

    #[test]
    fn events_keep_the_name() {
        let openai = "data: {\"id\":\"c\",\"model\":@,\"choices\":[{\"delta\":{\"content\":\"data: {\\\"model\\\":\\\"no\\\"}\"}}]}\n\ndata:{\"model\":@}\n\ndata: [DONE]\n\n";
        check(Route::V1Chat, Framing::Events, openai);
        let anthropic = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"usage\":{\"model\":\"no\"},\"model\":@,\"content\":[]}}\n\nevent: x\ndata: {\"delta\":{\"model\":\"no\"}}\n\n";
        check(Route::V1Messages, Framing::Events, anthropic);
        let responses = "event: response.created\r\ndata: {\"response\":{\"error\":null,\"model\":@,\"output\":[{\"model\":\"no\"}]},\"type\":\"response.created\"}\r\n\r\ndata: {\"item\":{\"model\":\"no\"}}\r\n\r\n";
        check(Route::V1Responses, Framing::Events, responses);
    }

    #[test]
    fn what_is_no_answer_of_that_kind_passes() {
        for text in [
            "",
            "[]",
            "[{\"model\":\"no\"}]",
            "null",
            "{\"model\":\"\",\"error\":1}",
            "model",
            "{\"model\":null}",
            "{\"model\":{\"model\":\"no\"}}",
            "}",
            "{}}{",
        ] {
            assert_eq!(renamed(Route::Chat, Framing::Whole, &[text.as_bytes()]), text);
        }
        // What breaks off in one line is no trouble in the next.
        let text = "{\"model\":\"a\\\n{\"x\":\"\n{\"model\":\"b\"}\n";
        let wanted = "{\"model\":\"my \\u003cown\\u003e\"\n{\"x\":\"\n{\"model\":\"my \\u003cown\\u003e\"}\n";
        assert_eq!(renamed(Route::Chat, Framing::Lines, &[text.as_bytes()]), wanted);
    }

    #[test]
    fn a_piece_without_the_name_is_not_copied() {
        let piece = Bytes::from_static(b"data: {\"type\":\"ping\"}\n\n");
        let mut renamer =
            Renamer::new(Member::of(Route::V1Messages).unwrap(), Framing::Events, &Bytes::from_static(b"\"x\""));
        assert_eq!(renamer.rename(piece.clone()).as_ptr(), piece.as_ptr());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "(model|message|[\"\\\\{}:a-zé]{0,6})".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("(model|message|[\"\\\\a-z]{0,8})", inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn nothing_but_the_name_changes(
            before in prop::collection::vec(("[a-l\"\\\\]{0,9}", any_json()), 0..3),
            after in prop::collection::vec((".{0,9}", any_json()), 0..3),
            served in "\\PC{1,8}",
            sizes in prop::collection::vec(1_usize..9, 1..20),
            lines in any::<bool>(),
        ) {
            let member = |(key, value): &(String, Value)| format!("{}:{value}", Value::from(key.as_str()));
            let made = |name: &str| {
                let named = [format!("\"model\":{name}")];
                let members: Vec<String> = before.iter().map(member).chain(named).chain(after.iter().map(member)).collect();
                format!("{{{}}}\n", members.join(",")).repeat(if lines { 3 } else { 1 })
            };
            let (sent, wanted) = (made(&json::quoted(&served)), made(&json::quoted(OWN)));
            let framing = if lines { Framing::Lines } else { Framing::Whole };
            let mut pieces = Vec::new();
            let mut rest = sent.as_bytes();
            for size in sizes.iter().cycle() {
                let (piece, more) = rest.split_at(rest.len().min(*size));
                pieces.push(piece);
                rest = more;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(&renamed(Route::Chat, framing, &pieces), &wanted);
            prop_assert_eq!(renamed(Route::Chat, framing, &[sent.as_bytes()]), wanted);
        }

        #[test]
        fn a_look_at_a_line_sees_what_reading_it_sees(
            words in prop::collection::vec(
                prop::sample::select(vec![
                    "\"model\"", ":", "\"", "\"x\"", "{", "}", "[", ",", "\\", "data:", " ", "\n", "message", "\"message\":", "é",
                ]),
                0..24,
            ),
        ) {
            let text = words.concat();
            let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
            for (route, framing) in [(Route::Chat, Framing::Lines), (Route::V1Messages, Framing::Events)] {
                let (whole, read) = (renamed(route, framing, &[text.as_bytes()]), renamed(route, framing, &bytes));
                prop_assert_eq!(whole, read, "{}", text);
            }
        }

        #[test]
        fn no_bytes_make_it_fail(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'"'), Just(b'{'), Just(b'}'), Just(b'\n'), Just(b'\\')], 0..99)) {
            for framing in [Framing::Whole, Framing::Lines, Framing::Events] {
                let mut renamer = Renamer::new(Member::of(Route::V1Responses).unwrap(), framing, &Bytes::from_static(b"\"x\""));
                bytes.chunks(7).for_each(|piece| drop(renamer.rename(Bytes::copy_from_slice(piece))));
            }
        }
    }

    fn call(route: Route, path: &'static str, body: &'static str) -> Call {
        let payload = Payload::from_bytes(body);
        let Payload::Whole(pieces) = &payload else { unreachable!() };
        let peek = match route {
            Route::V1Audio => Peek::multipart(pieces),
            Route::V1Model => Peek { model: Some(OWN.to_owned()), ..Peek::default() },
            _ => Peek::json(pieces),
        };
        let head = Head { peek, ..Head::new(route, Method::POST, PathAndQuery::from_static(path)) };
        let candidates: Candidates = Arc::<Snapshot>::default().all();
        Call::new(head, payload, candidates)
    }

    fn sent(mut call: Call, model: &str) -> Option<(String, String)> {
        request(&mut call, "first").then_some(())?;
        request(&mut call, model).then_some(())?;
        assert_eq!(call.place.model, ModelName::parse(model));
        let edits = *call.edits.unwrap();
        let Payload::Whole(pieces) = call.payload.edited(&edits.body) else { unreachable!() };
        let path = edits.path.map(|path| path.to_string()).unwrap_or_default();
        Some((path, String::from_utf8(pieces.concat()).unwrap()))
    }

    #[test]
    fn a_request_asks_for_the_model_that_was_put_last() {
        let body = r#"{"messages":[{"model":"a"}],"model":"a","stream":true}"#;
        let (_, body) = sent(call(Route::Chat, "/api/chat", body), "b:1").unwrap();
        assert_eq!(body, r#"{"messages":[{"model":"a"}],"model":"b:1","stream":true}"#);
        let form = "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\na\r\n--x--\r\n";
        let (_, body) = sent(call(Route::V1Audio, "/v1/audio/transcriptions", form), "b:1").unwrap();
        assert_eq!(body, form.replace("\r\na\r\n", "\r\nb:1\r\n"));
        let (path, _) = sent(call(Route::V1Model, "/v1/models/a?b=c", ""), "hf.co/b/c:1").unwrap();
        assert_eq!(path, "/v1/models/hf.co%2Fb%2Fc:1?b=c");
        assert_eq!(sent(call(Route::Chat, "/api/chat", "{}"), "b"), None);
        assert_eq!(sent(call(Route::Chat, "/api/chat", r#"{"model":"a"}"#), "no name"), None);
    }

    fn reply(kind: &'static str, chunks: &[&'static str], length: Option<u64>) -> Reply {
        let chunks: Vec<_> = chunks.iter().map(|text| Ok(Chunk::from(Bytes::from_static(text.as_bytes())))).collect();
        let mut headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
        if let Some(length) = length {
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        Reply {
            status: StatusCode::OK,
            headers,
            body: Body::new(futures_util::stream::iter(chunks)).with_length(length),
        }
    }

    #[tokio::test]
    async fn an_answer_tells_its_new_length_if_it_told_the_old_one() {
        let call = call(Route::Chat, "/api/chat", r#"{"model":"mine"}"#);
        let old = reply("application/json", &[r#"{"model":"x","#, r#""done":true}"#], Some(25));
        let new = answer(old, &call.head, "x:1").await;
        assert_eq!(new.headers[SERVED], "x:1");
        assert_eq!((new.headers["content-length"].to_str().unwrap(), new.body.length()), ("28", Some(28)));
        assert_eq!(new.body.collect(99).await.unwrap(), r#"{"model":"mine","done":true}"#);
        let stream = reply("application/x-ndjson", &["{\"model\":\"x\"}\n"], None);
        let new = answer(stream, &call.head, "x:1").await;
        assert!(new.body.length().is_none() && !new.headers.contains_key("content-length"));
        assert_eq!(new.body.collect(99).await.unwrap(), "{\"model\":\"mine\"}\n");
    }

    #[tokio::test]
    async fn a_broken_answer_stays_broken() {
        let call = call(Route::Chat, "/api/chat", r#"{"model":"mine"}"#);
        let chunks = [Ok(Chunk::from(Bytes::from_static(b"{\"model\":\"x"))), Err(Error::busy())];
        let body = Body::new(futures_util::stream::iter(chunks)).with_length(Some(99));
        let mut new = answer(Reply { status: StatusCode::OK, headers: HeaderMap::new(), body }, &call.head, "x").await;
        assert_eq!(new.body.next().await.unwrap().unwrap().bytes, "{\"model\":\"mine\"");
        assert!(new.body.next().await.unwrap().is_err() && new.body.length().is_none());
    }

    #[tokio::test]
    async fn an_inner_layer_has_the_last_word() {
        let call = call(Route::Chat, "/api/chat", r#"{"model":"mine"}"#);
        let inner = answer(reply("application/json", &["{\"model\":\"x\"}"], None), &call.head, "x:q8").await;
        let outer = answer(inner, &call.head, "x:q4").await;
        assert_eq!(outer.headers[SERVED], "x:q8");
        assert_eq!(outer.body.collect(99).await.unwrap(), "{\"model\":\"mine\"}");
    }

    #[tokio::test]
    async fn counts_pass() {
        let call = call(Route::Chat, "/api/chat", r#"{"model":"mine"}"#);
        let end = Some(Counters { output_tokens: 7, ..Counters::default() });
        let chunk = Chunk { bytes: Bytes::from_static(b"{\"model\":\"x\"}\n"), end };
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))]);
        let body = Body::new(futures_util::stream::iter([Ok(chunk)]));
        let mut new = answer(Reply { status: StatusCode::OK, headers, body }, &call.head, "x").await;
        assert_eq!(new.body.next().await.unwrap().unwrap().end, end);
    }
}
