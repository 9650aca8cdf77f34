//! What goes on with an answer, in the form in which its client reads it.
//!
//! What goes on is the answer of `/api/generate` to a raw prompt, line by line. The client reads on as if nothing had happened:
//! the same members in the same order, and at the end the counts of the whole.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::border::{Border, Verdict};
use super::delivered::{Delivered, Form, string_end};
use super::{failure, openai, request};
use crate::call::{Chunk, Counters};
use crate::json::{self, Kind};

/// How the lines of one server become pieces of an answer that another began.
#[derive(Debug)]
pub(super) struct Mould {
    form: Form,
    /// What every piece says that is not text: of OpenAI's events all up to the choices.
    head: Vec<u8>,
    border: Option<Border>,
    tells_usage: bool,
    account: Account,
    /// Tokens since the border.
    lines: u64,
}

/// What had been used when another server took over.
#[derive(Debug)]
pub(super) struct Account {
    /// When the client asked.
    pub(super) arrived: Instant,
    /// Tokens that had been delivered; if that is not exact, the fewest that can have been.
    pub(super) made: u64,
    pub(super) is_exact: bool,
    /// Tokens of the prompt, if they were counted.
    pub(super) prompt: Option<u64>,
    /// Time for the tokens delivered.
    pub(super) eval: Duration,
}

/// The counts and durations (nanoseconds) at the end of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) total_duration: u64,
    pub(super) load_duration: u64,
    pub(super) prompt_eval_count: u64,
    pub(super) prompt_eval_duration: u64,
    pub(super) eval_count: u64,
    pub(super) eval_duration: u64,
}

/// What became of a chunk.
#[derive(Debug)]
pub(super) enum Made {
    /// Pieces for the client; none if there is nothing to say yet.
    Pieces(Option<Chunk>),
    /// The end, although the server would go on.
    Stopped(Chunk),
    /// This server fails too. What had come before.
    Trouble(Option<Chunk>),
}

/// A line, read.
#[derive(Default)]
struct Line {
    model: Bytes,
    created_at: Bytes,
    /// What lies between the quotes.
    response: Bytes,
    done: bool,
    reason: Option<Bytes>,
    numbers: Numbers,
}

impl Mould {
    /// For a client that has been given this much.
    pub(super) fn new(
        form: Form,
        delivered: &Delivered,
        stops: Vec<String>,
        tells_usage: bool,
        account: Account,
    ) -> Option<Self> {
        let head = match form {
            Form::Generate | Form::Chat => Vec::new(),
            Form::OpenAi => openai::head(delivered.first())?,
        };
        let border = Border::behind(&delivered.text(), stops);
        Some(Self { form, head, border, tells_usage, account, lines: 0 })
    }

    /// Makes pieces of lines.
    pub(super) fn take(&mut self, chunk: Chunk, delivered: &mut Delivered) -> Made {
        if self.form == Form::Generate
            && self.border.is_none()
            && memchr::memchr(b'\n', &chunk.bytes) == chunk.bytes.len().checked_sub(1)
        {
            // A line as it has to be.
            if let Some(text) = plain(&chunk.bytes) {
                delivered.add(&chunk.bytes[text.start..text.end]);
                self.lines += 1;
                return Made::Pieces(Some(chunk));
            }
        }
        let mut out = Vec::with_capacity(chunk.bytes.len() + 64);
        for line in chunk.bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = chunk.bytes.slice_ref(line);
            let Some(line) = read(&line) else { return Made::Trouble(some(out)) };
            let is_done = line.done;
            if let Some(end) = self.add(line, &mut out, delivered) {
                let chunk = Chunk { bytes: out.into(), end: Some(end) };
                return if is_done { Made::Pieces(Some(chunk)) } else { Made::Stopped(chunk) };
            }
        }
        Made::Pieces(some(out))
    }

    /// Adds a line; returns the counts of the whole if the answer ends with it.
    fn add(&mut self, mut line: Line, out: &mut Vec<u8>, delivered: &mut Delivered) -> Option<Counters> {
        if !line.done {
            self.lines += 1;
        }
        if let Some(border) = &mut self.border {
            match border.follow(&json::unescape(&line.response)) {
                Verdict::Stop => {
                    let numbers = self.stopped();
                    line.response = Bytes::new();
                    line.reason = Some(Bytes::from_static(b"\"stop\""));
                    delivered.done();
                    return Some(self.end(&line, numbers, out));
                }
                Verdict::Wait if !line.done => return None,
                Verdict::Wait => {
                    let rest = border.rest();
                    line.response = escaped(&rest);
                }
                Verdict::Go(text) => line.response = escaped(&text),
            }
            self.border = None;
        }
        if !line.done {
            delivered.add(&line.response);
            self.piece(&line, out);
            return None;
        }
        delivered.done();
        let numbers = self.whole(&line.numbers);
        Some(self.end(&line, numbers, out))
    }

    /// Writes a piece that is not the last.
    fn piece(&self, line: &Line, out: &mut Vec<u8>) {
        match self.form {
            Form::OpenAi => openai::piece(out, &self.head, &line.response),
            form => {
                native(form, line, out);
                out.extend_from_slice(b",\"done\":false}\n");
            }
        }
    }

    /// Writes the end.
    fn end(&self, line: &Line, numbers: Numbers, out: &mut Vec<u8>) -> Counters {
        let reason = line.reason.as_deref().unwrap_or(b"\"stop\"");
        match self.form {
            Form::OpenAi => {
                if !line.response.is_empty() {
                    openai::piece(out, &self.head, &line.response);
                }
                openai::last(out, &self.head, reason, self.tells_usage.then_some(&numbers));
            }
            form => {
                native(form, line, out);
                out.extend_from_slice(b",\"done\":true,\"done_reason\":");
                out.extend_from_slice(reason);
                numbers.write(out);
                out.extend_from_slice(b"}\n");
            }
        }
        numbers.counters()
    }

    /// The counts of the whole, when a server has told those of its part.
    fn whole(&self, part: &Numbers) -> Numbers {
        let account = &self.account;
        // What went on had for a prompt all that came before.
        let prompt = account.prompt.unwrap_or(part.prompt_eval_count.saturating_sub(account.made));
        let retold = part.prompt_eval_count.saturating_sub(prompt);
        let made = if account.is_exact { account.made } else { retold.max(account.made) };
        Numbers {
            total_duration: nanos(account.arrived.elapsed()),
            prompt_eval_count: prompt,
            eval_count: made + part.eval_count,
            eval_duration: nanos(account.eval) + part.eval_duration,
            ..*part
        }
    }

    /// The counts of the whole, when no server tells those of the last part.
    fn stopped(&self) -> Numbers {
        let account = &self.account;
        Numbers {
            total_duration: nanos(account.arrived.elapsed()),
            prompt_eval_count: account.prompt.unwrap_or(0),
            eval_count: account.made + self.lines,
            eval_duration: nanos(account.eval),
            ..Numbers::default()
        }
    }

    /// The end of an answer that had its last token already when its server died: nobody has to be asked for more.
    pub(super) fn finish(&self, delivered: &mut Delivered) -> Chunk {
        delivered.done();
        let mut line = read(&Bytes::copy_from_slice(delivered.first())).unwrap_or_default();
        line.created_at = request::text(&jiff::Timestamp::now().to_string()).into();
        line.response = Bytes::new();
        line.reason = Some(Bytes::from_static(b"\"length\""));
        let mut out = Vec::new();
        let end = self.end(&line, self.stopped(), &mut out);
        Chunk { bytes: out.into(), end: Some(end) }
    }
}

/// Writes what a native line begins with: all up to the end of its text.
fn native(form: Form, line: &Line, out: &mut Vec<u8>) {
    let (before, behind): (&[u8], &[u8]) = match form {
        Form::Chat => (b",\"message\":{\"role\":\"assistant\",\"content\":\"", b"\"}"),
        Form::Generate | Form::OpenAi => (b",\"response\":\"", b"\""),
    };
    out.extend_from_slice(b"{\"model\":");
    out.extend_from_slice(&line.model);
    out.extend_from_slice(b",\"created_at\":");
    out.extend_from_slice(&line.created_at);
    out.extend_from_slice(before);
    out.extend_from_slice(&line.response);
    out.extend_from_slice(behind);
}

impl Numbers {
    /// Writes what is not zero, in Ollama's order.
    fn write(&self, out: &mut Vec<u8>) {
        let numbers = [
            ("total_duration", self.total_duration),
            ("load_duration", self.load_duration),
            ("prompt_eval_count", self.prompt_eval_count),
            ("prompt_eval_duration", self.prompt_eval_duration),
            ("eval_count", self.eval_count),
            ("eval_duration", self.eval_duration),
        ];
        let mut digits = itoa::Buffer::new();
        for (key, number) in numbers.into_iter().filter(|(_, number)| *number > 0) {
            out.extend_from_slice(b",\"");
            out.extend_from_slice(key.as_bytes());
            out.extend_from_slice(b"\":");
            out.extend_from_slice(digits.format(number).as_bytes());
        }
    }

    fn place(&mut self, key: &[u8]) -> Option<&mut u64> {
        Some(match key {
            b"total_duration" => &mut self.total_duration,
            b"load_duration" => &mut self.load_duration,
            b"prompt_eval_count" => &mut self.prompt_eval_count,
            b"prompt_eval_duration" => &mut self.prompt_eval_duration,
            b"eval_count" => &mut self.eval_count,
            b"eval_duration" => &mut self.eval_duration,
            _ => return None,
        })
    }

    fn counters(&self) -> Counters {
        Counters {
            prompt_tokens: self.prompt_eval_count,
            output_tokens: self.eval_count,
            prompt_duration: Duration::from_nanos(self.prompt_eval_duration),
            eval_duration: Duration::from_nanos(self.eval_duration),
            load_duration: Duration::from_nanos(self.load_duration),
        }
    }
}

/// Where the text of a line stands that is written exactly as Ollama writes those that are not the last.
fn plain(line: &[u8]) -> Option<std::ops::Range<usize>> {
    let start = memchr::memmem::find(line, b"\"response\":\"")? + 12;
    let end = start + string_end(&line[start..])?;
    (line[end..] == *b"\",\"done\":false}\n").then_some(start..end)
}

/// Reads a line; `None` if it tells of an error, or of something that is no text.
fn read(line: &Bytes) -> Option<Line> {
    let pieces = std::slice::from_ref(line);
    let mut read = Line::default();
    let mut is_strange = failure::is_error_line(line);
    let members = json::members(pieces, |key, kind, span| {
        let value = || line.slice(span.start..span.end);
        match (key, kind) {
            (b"model", Kind::String { .. }) => read.model = value(),
            (b"created_at", Kind::String { .. }) => read.created_at = value(),
            (b"response", Kind::String { .. }) => read.response = line.slice(span.start + 1..span.end - 1),
            (b"done", Kind::Bool(done)) => read.done = done,
            (b"done_reason", Kind::String { empty: false }) => read.reason = Some(value()),
            (b"error", _) => is_strange = true,
            (b"thinking", Kind::String { empty: false }) | (b"tool_calls", Kind::Nested { empty: false }) => {
                is_strange = true;
            }
            (_, Kind::Number) => {
                if let (Some(place), Some(number)) = (read.numbers.place(key), request::number(&value())) {
                    *place = u64::try_from(number).unwrap_or(0);
                }
            }
            _ => {}
        }
    });
    (members.is_ok() && !is_strange).then_some(read)
}

/// A text as Go writes it in JSON, without the quotes.
fn escaped(text: &str) -> Bytes {
    let text = request::text(text).replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026");
    let text = Bytes::from(text);
    text.slice(1..text.len() - 1)
}

fn some(out: Vec<u8>) -> Option<Chunk> {
    (!out.is_empty()).then(|| Chunk::from(Bytes::from(out)))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
