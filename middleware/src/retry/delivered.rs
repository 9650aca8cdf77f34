//! What a client has been given of a stream: enough to go on from there at another server.
//!
//! The texts of the lines are kept as they are written, escapes and all, and nothing else of them is. This is the only work
//! that a stream costs while all is well: a search and a copy of a few bytes a line.

use std::ops::Range;
use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use memchr::memmem::Finder;
use tokio::time::Instant;

use super::failure;
use crate::json::{self, Kind, Span};
use crate::route::Route;

/// The longest text that a stream may go on from, bytes.
pub(super) const LONGEST: usize = 1 << 20;

/// Ends the text of a piece. No text of JSON has this byte in it.
const MARK: u8 = 0xff;

/// How the pieces of an answer are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Lines with `response`: `/api/generate`.
    Generate,
    /// Lines with `message`: `/api/chat`.
    Chat,
    /// Events with `choices`: `/v1/chat/completions`.
    OpenAi,
}

impl Form {
    /// The form of a route's streams, if it is one that can be gone on with.
    pub(super) fn of(route: Route) -> Option<Self> {
        match route {
            Route::Generate => Some(Self::Generate),
            Route::Chat => Some(Self::Chat),
            Route::V1Chat => Some(Self::OpenAi),
            _ => None,
        }
    }

    /// What stands before the text of a piece, and what behind it, as Ollama writes them.
    fn frame(self) -> (&'static Finder<'static>, &'static [u8]) {
        match self {
            Self::Generate => (&FRAMES.response, b"\",\"done\":false}\n"),
            Self::Chat => (&FRAMES.content, b"\"},\"done\":false}\n"),
            Self::OpenAi => (&FRAMES.content, b"\"},\"finish_reason\":null}]}\n\n"),
        }
    }

    /// How long the piece at the start of these bytes is.
    fn piece(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Generate | Self::Chat => memchr::memchr(b'\n', bytes).map(|at| at + 1),
            Self::OpenAi => memchr::memmem::find(bytes, b"\n\n").map(|at| at + 2),
        }
    }
}

struct Frames {
    response: Finder<'static>,
    content: Finder<'static>,
}

static FRAMES: LazyLock<Frames> =
    LazyLock::new(|| Frames { response: Finder::new(b"\"response\":\""), content: Finder::new(b"\"content\":\"") });

/// What has been delivered.
#[derive(Debug)]
pub(super) struct Delivered {
    form: Option<Form>,
    /// The texts of the pieces, each with [`MARK`] behind it.
    text: Vec<u8>,
    pieces: u32,
    /// The first piece: what does not change from piece to piece is taken from it.
    first: Vec<u8>,
    begun: Option<Instant>,
    is_done: bool,
    unfit: Option<&'static str>,
}

/// What a piece of an answer is.
enum Piece {
    /// A part of the text, and where it stands.
    Text(Range<usize>),
    /// The end.
    Done,
    /// Nothing that matters.
    Other,
    /// The server is in trouble.
    Trouble,
    /// Something after which one cannot go on.
    Unfit(&'static str),
}

impl Delivered {
    /// Nothing yet.
    pub(super) fn new(route: Route) -> Self {
        Self {
            form: Form::of(route),
            text: Vec::new(),
            pieces: 0,
            first: Vec::new(),
            begun: None,
            is_done: false,
            unfit: None,
        }
    }

    /// Takes note of a chunk that goes to the client. Where a server tells of its own trouble in it, that is returned: what
    /// follows is to be kept back.
    pub(super) fn see(&mut self, chunk: &Bytes) -> Option<usize> {
        if self.begun.is_none() && !chunk.is_empty() {
            self.begun = Some(Instant::now());
        }
        let (Some(form), None, false) = (self.form, self.unfit, self.is_done) else { return None };
        let mut at = 0;
        while at < chunk.len() {
            let Some(length) = form.piece(&chunk[at..]) else {
                self.give_up("a piece of the answer has no end");
                break;
            };
            let piece = &chunk[at..at + length];
            match fast(form, piece).map_or_else(|| slow(form, piece), Piece::Text) {
                Piece::Text(text) => {
                    if self.first.is_empty() {
                        self.first.extend_from_slice(piece);
                    }
                    self.add(&piece[text]);
                }
                Piece::Done => self.is_done = true,
                Piece::Other => {}
                Piece::Trouble => return Some(at),
                Piece::Unfit(why) => self.give_up(why),
            }
            if self.unfit.is_some() {
                break;
            }
            at += length;
        }
        None
    }

    /// Adds a part of the text, as it is written in JSON.
    pub(super) fn add(&mut self, text: &[u8]) {
        if text.is_empty() {
            return;
        }
        if self.text.len() + text.len() >= LONGEST {
            return self.give_up("the answer is too long to be kept");
        }
        self.text.extend_from_slice(text);
        self.text.push(MARK);
        self.pieces += 1;
    }

    /// The end has been delivered.
    pub(super) fn done(&mut self) {
        self.is_done = true;
    }

    fn give_up(&mut self, why: &'static str) {
        self.unfit = Some(why);
        (self.text, self.pieces) = (Vec::new(), 0);
    }

    /// Whether the end has been delivered.
    pub(super) fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether nothing at all has been delivered.
    pub(super) fn is_nothing(&self) -> bool {
        self.begun.is_none()
    }

    /// The form to go on in; or why one cannot.
    pub(super) fn form(&self) -> Result<Form, &'static str> {
        match (self.form, self.unfit) {
            (Some(form), None) => Ok(form),
            (_, Some(why)) => Err(why),
            (None, None) => Err("streams of this route cannot be gone on with"),
        }
    }

    /// The first piece.
    pub(super) fn first(&self) -> &[u8] {
        &self.first
    }

    /// The text.
    pub(super) fn text(&self) -> String {
        let text: Vec<u8> = self.text.iter().copied().filter(|byte| *byte != MARK).collect();
        json::unescape(&text)
    }

    /// Pieces that have a text: the fewest tokens that the text can be.
    pub(super) fn pieces(&self) -> u64 {
        self.pieces.into()
    }

    /// Whether each piece is surely one token: a character may take several, and so may what was kept back because a stop
    /// word might have begun with it.
    pub(super) fn are_tokens(&self, stops: &[String]) -> bool {
        self.text.split_inclusive(|byte| *byte == MARK).all(|piece| {
            // Every escape is one character, if not an ASCII one.
            let text = json::unescape(&piece[..piece.len() - 1]);
            let begins = |stop: &String| {
                let first = stop.chars().next();
                first.is_some_and(|first| text.chars().rev().skip(1).any(|c| c == first))
            };
            text.is_ascii() && !stops.iter().any(begins)
        })
    }

    /// Time since the first piece.
    pub(super) fn since_first(&self) -> Duration {
        self.begun.map(|begun| begun.elapsed()).unwrap_or_default()
    }

    /// Begins to measure anew: another server goes on.
    pub(super) fn begin_part(&mut self) {
        self.begun = Some(Instant::now());
    }
}

/// Where the text of a piece stands that is written exactly as Ollama writes those that are not the last.
fn fast(form: Form, piece: &[u8]) -> Option<Range<usize>> {
    let (before, behind) = form.frame();
    let start = before.find(piece)? + before.needle().len();
    let end = start + string_end(&piece[start..])?;
    // Without a text it is worth a second look.
    (piece[end..] == *behind && start < end).then_some(start..end)
}

/// Where a JSON string ends whose opening quote is just before.
pub(super) fn string_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let found = at + memchr::memchr2(b'"', b'\\', &bytes[at..])?;
        if bytes[found] == b'"' {
            return Some(found);
        }
        at = found + 2;
        if at > bytes.len() {
            return None;
        }
    }
}

/// What any other piece is.
fn slow(form: Form, piece: &[u8]) -> Piece {
    let piece_bytes = Bytes::copy_from_slice(piece);
    if failure::is_error_line(&piece_bytes) {
        return Piece::Trouble;
    }
    match form {
        Form::Generate | Form::Chat => line(form, piece_bytes),
        Form::OpenAi => event(&piece_bytes),
    }
}

/// Whether a member of an answer says something that going on would lose.
fn says_more(key: &[u8], kind: Kind) -> Option<&'static str> {
    let empty = matches!(kind, Kind::Null | Kind::String { empty: true } | Kind::Nested { empty: true });
    match key {
        _ if empty => None,
        b"thinking" | b"reasoning" => Some("the answer thinks"),
        b"tool_calls" => Some("the answer calls tools"),
        b"logprobs" => Some("the answer tells probabilities"),
        b"images" => Some("the answer has images"),
        _ => None,
    }
}

/// A line of a native stream.
fn line(form: Form, piece: Bytes) -> Piece {
    let pieces = [piece];
    let (mut text, mut done, mut unfit) = (None, false, None);
    let mut message = None;
    let read = json::members(&pieces, |key, kind, span| match (key, kind) {
        (b"response", Kind::String { .. }) if form == Form::Generate => text = Some(inner(span)),
        (b"message", Kind::Nested { .. }) if form == Form::Chat => message = Some(span),
        (b"done", Kind::Bool(is_done)) => done = is_done,
        (b"error", _) => unfit = unfit.or(Some("the answer ends in an error")),
        _ => unfit = unfit.or(says_more(key, kind)),
    });
    if let Some(outer) = message {
        let nested = [pieces[0].slice(outer.start..outer.end)];
        let _ = json::members(&nested, |key, kind, span| match (key, kind) {
            (b"content", Kind::String { .. }) => {
                let inner = inner(span);
                text = Some(inner.start + outer.start..inner.end + outer.start);
            }
            _ => unfit = unfit.or(says_more(key, kind)),
        });
    }
    match (read, unfit, text) {
        (Err(_), ..) => Piece::Unfit("a line of the answer cannot be read"),
        (_, Some(why), _) => Piece::Unfit(why),
        _ if done => Piece::Done,
        (_, _, Some(text)) => Piece::Text(text),
        _ => Piece::Other,
    }
}

/// An event of OpenAI's chat.
fn event(piece: &Bytes) -> Piece {
    let Some(data) = piece.strip_prefix(b"data: ") else {
        return Piece::Unfit("an event of the answer cannot be read");
    };
    if data.trim_ascii() == b"[DONE]" {
        return Piece::Done;
    }
    let base = piece.len() - data.len();
    let pieces = [piece.slice(base..)];
    let mut choices = None;
    let mut unfit = None;
    // A runner that dies leaves an event without a model (seen), and then nothing.
    let mut is_orphan = false;
    let read = json::members(&pieces, |key, kind, span| match (key, kind) {
        (b"choices", Kind::Nested { .. }) => choices = Some(span),
        (b"model", Kind::String { empty }) => is_orphan = empty,
        (b"error", _) => unfit = Some("the answer ends in an error"),
        _ => {}
    });
    let Some(choices) = choices.filter(|_| read.is_ok()) else {
        return Piece::Unfit("an event of the answer cannot be read");
    };
    if is_orphan {
        return Piece::Trouble;
    }
    let mut text = None;
    let mut at = base + choices.start + 1;
    // Ollama sends one choice.
    if piece.get(at) == Some(&b'{') {
        let choice = [piece.slice(at..)];
        let mut delta = None;
        let _ = json::members(&choice, |key, kind, span| match key {
            b"delta" => delta = Some(span),
            _ => unfit = unfit.or(says_more(key, kind)),
        });
        if let Some(delta) = delta {
            at += delta.start;
            let delta = [piece.slice(at..)];
            let _ = json::members(&delta, |key, kind, span| match (key, kind) {
                (b"content", Kind::String { .. }) => text = Some(inner(span).start + at..inner(span).end + at),
                _ => unfit = unfit.or(says_more(key, kind)),
            });
        }
    }
    match (unfit, text) {
        (Some(why), _) => Piece::Unfit(why),
        (None, Some(text)) => Piece::Text(text),
        (None, None) => Piece::Other,
    }
}

/// What lies between the quotes of a string.
fn inner(span: Span) -> Range<usize> {
    span.start + 1..span.end - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(route: Route, chunks: &[&str]) -> Delivered {
        let mut delivered = Delivered::new(route);
        for chunk in chunks {
            assert_eq!(delivered.see(&Bytes::copy_from_slice(chunk.as_bytes())), None, "{chunk}");
        }
        delivered
    }

    const CHAT: &str = "{\"model\":\"m\",\"created_at\":\"t\",\"message\":{\"role\":\"assistant\",\"content\":\"a\\\"\\u003cb\"},\"done\":false}\n";

    #[test]
    fn the_text_is_kept_however_a_line_is_written() {
        let sorted = "{\"created_at\":\"t\",\"done\":false,\"message\":{\"content\":\"a\\\"\\u003cb\",\"role\":\"assistant\"},\"model\":\"m\"}\n";
        let spaced = "{ \"message\" : { \"content\" : \"a\\\"\\u003cb\" } , \"done\" : false }\n";
        for line in [CHAT, sorted, spaced] {
            let delivered = seen(Route::Chat, &[line, &[line, line].concat()]);
            assert_eq!((delivered.text().as_str(), delivered.pieces()), ("a\"<ba\"<ba\"<b", 3), "{line}");
            assert_eq!((delivered.form(), delivered.first()), (Ok(Form::Chat), line.as_bytes()));
        }
        let delivered = seen(Route::Generate, &["{\"model\":\"m\",\"response\":\" x\",\"done\":false}\n"]);
        assert_eq!(delivered.text(), " x");
    }

    #[test]
    fn events_are_read_too() {
        let head = "data: {\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"The\"},\"finish_reason\":null}]}\n\n";
        let end = "data: {\"id\":\"c\",\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
        let delivered = seen(Route::V1Chat, &[head]);
        assert_eq!((delivered.text().as_str(), delivered.is_done()), ("The", false));
        assert!(seen(Route::V1Chat, &[head, end]).is_done());
    }

    #[test]
    fn what_going_on_would_lose_is_seen() {
        let chat = |message: &str| {
            format!("{{\"model\":\"m\",\"message\":{{\"role\":\"assistant\",{message}}},\"done\":false}}\n")
        };
        for (line, why) in [
            (chat("\"content\":\"\",\"thinking\":\"hm\""), "the answer thinks"),
            (chat("\"content\":\"\",\"tool_calls\":[{}]"), "the answer calls tools"),
            (
                "{\"message\":{\"content\":\"a\"},\"done\":false,\"logprobs\":[1]}\n".to_owned(),
                "the answer tells probabilities",
            ),
            ("{\"error\":\"template\"}\n".to_owned(), "the answer ends in an error"),
            ("{\"message\":".to_owned(), "a piece of the answer has no end"),
            ("garbage\n".to_owned(), "a line of the answer cannot be read"),
        ] {
            let delivered = seen(Route::Chat, &[CHAT, &line, CHAT]);
            assert_eq!((delivered.form(), delivered.text().as_str()), (Err(why), ""), "{line}");
        }
        assert!(seen(Route::V1Messages, &["x"]).form().is_err());
    }

    #[test]
    fn a_dying_runner_is_seen_where_it_speaks() {
        let died = "{\"error\":\"an error was encountered while running the model: unexpected EOF\"}\n";
        let mut delivered = Delivered::new(Route::Chat);
        let chunk = Bytes::from([CHAT, died].concat());
        assert_eq!(delivered.see(&chunk), Some(CHAT.len()));
        assert_eq!(delivered.pieces(), 1);
        let orphan = "data: {\"id\":\"chatcmpl-93\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"\",\"system_fingerprint\":\"fp_ollama\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},\"finish_reason\":null}]}\n\n";
        assert_eq!(Delivered::new(Route::V1Chat).see(&Bytes::from_static(orphan.as_bytes())), Some(0));
    }

    #[test]
    fn the_end_is_seen() {
        let delivered = seen(Route::Generate, &["{\"model\":\"m\",\"response\":\"\",\"done\":true,\"context\":[1]}\n"]);
        assert!(delivered.is_done() && !delivered.is_nothing());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let line = format!("{{\"response\":\"{}\",\"done\":false}}\n", "x".repeat(100_000));
        let delivered = seen(Route::Generate, &[line.as_str(); 11]);
        assert_eq!(delivered.form(), Err("the answer is too long to be kept"));
        assert_eq!(delivered.text.capacity(), 0);
    }

    #[test]
    fn pieces_that_may_be_several_tokens_are_known() {
        let generate = |text: &str| format!("{{\"response\":\"{text}\",\"done\":false}}\n");
        let of = |text: &str| seen(Route::Generate, &[&generate(" the"), &generate(text)]);
        let stops = ["<|end|>".to_owned()];
        assert!(of(" river").are_tokens(&stops));
        assert!(of("x\\u003c").are_tokens(&stops), "kept back at the end of a piece is what has not come");
        assert!(!of("\\u003cb").are_tokens(&stops));
        assert!(of("\\u003cb").are_tokens(&[]));
        assert!(!of("\u{1f600}").are_tokens(&[]));
    }
}
