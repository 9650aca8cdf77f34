//! A forward-only look at JSON that lies in several pieces: finds members and their spans, and builds nothing.
//!
//! It follows what Go's decoder accepts only as far as finding members needs: what is malformed inside a member is the
//! server's to refuse, in its own words. Strings, which are nearly all of a body, are passed at the speed of `memchr`.

use std::borrow::Cow;

use bytes::Bytes;

/// A half-open range of bytes, counted from the start of the body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The first byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// What a value is, as far as one can tell without building it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number.
    Number,
    /// A string.
    String {
        /// Whether nothing stands between its quotes.
        empty: bool,
    },
    /// An object or a list.
    Nested {
        /// Whether it has no members.
        empty: bool,
    },
}

/// The text ended too early, or is no JSON.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// Reads on through the pieces of a body. A copy reads on from the same place.
#[derive(Clone)]
pub struct Reader<'a> {
    /// What is left of the piece we are in.
    rest: &'a [u8],
    /// Where that piece ends in the body.
    end: usize,
    /// The pieces after it.
    pieces: std::slice::Iter<'a, Bytes>,
}

impl<'a> Reader<'a> {
    /// Begins at the start of a body.
    pub fn new(pieces: &'a [Bytes]) -> Self {
        Self { rest: &[], end: 0, pieces: pieces.iter() }
    }

    /// Begins in the midst of a body.
    pub fn at(pieces: &'a [Bytes], offset: usize) -> Self {
        let mut reader = Self::new(pieces);
        while reader.end <= offset {
            let Some(piece) = reader.pieces.next() else { break };
            reader.rest = piece;
            reader.end += piece.len();
        }
        reader.rest = &reader.rest[reader.rest.len() - reader.end.saturating_sub(offset).min(reader.rest.len())..];
        reader
    }

    /// The next bytes, if they lie in one piece, as they nearly always do.
    #[inline]
    pub fn slice(&self, length: usize) -> Option<&'a [u8]> {
        self.rest.get(..length)
    }

    /// The next bytes, in the parts in which they lie.
    pub fn parts(&self, length: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut left = length;
        std::iter::once(self.rest).chain(self.pieces.clone().map(|piece| &piece[..])).map_while(move |part| {
            let taken = &part[..left.min(part.len())];
            left -= taken.len();
            (!taken.is_empty() || left > 0).then_some(taken)
        })
    }

    /// The offset of the next byte.
    pub fn offset(&self) -> usize {
        self.end - self.rest.len()
    }

    /// What is left of the piece we are in, going on to the next one when this is used up; empty at the end.
    #[inline]
    fn rest(&mut self) -> &'a [u8] {
        if self.rest.is_empty() {
            self.turn();
        }
        self.rest
    }

    fn turn(&mut self) {
        while self.rest.is_empty()
            && let Some(piece) = self.pieces.next()
        {
            self.rest = piece;
            self.end += piece.len();
        }
    }

    #[inline]
    fn pass(&mut self, count: usize) {
        self.rest = &self.rest[count..];
    }

    fn next(&mut self) -> Result<u8, Malformed> {
        let byte = *self.rest().first().ok_or(Malformed)?;
        self.pass(1);
        Ok(byte)
    }

    /// The next byte that is not white space, left in place.
    pub fn peek(&mut self) -> Result<u8, Malformed> {
        loop {
            match self.rest().first() {
                Some(b' ' | b'\t' | b'\n' | b'\r') => self.pass(1),
                Some(byte) => return Ok(*byte),
                None => return Err(Malformed),
            }
        }
    }

    /// Takes the next byte that is not white space, if it is this one.
    pub fn take(&mut self, wanted: u8) -> Result<bool, Malformed> {
        let found = self.peek()? == wanted;
        if found {
            self.pass(1);
        }
        Ok(found)
    }

    /// Passes a string whose opening quote is next. The span is that of what lies between the quotes.
    pub fn string(&mut self) -> Result<Span, Malformed> {
        if !self.take(b'"')? {
            return Err(Malformed);
        }
        let start = self.offset();
        loop {
            let rest = self.rest();
            if rest.is_empty() {
                return Err(Malformed);
            }
            match memchr::memchr2(b'"', b'\\', rest) {
                Some(found) => {
                    self.pass(found + 1);
                    if rest[found] == b'"' {
                        return Ok(Span { start, end: self.offset() - 1 });
                    }
                    self.next()?;
                }
                None => self.pass(rest.len()),
            }
        }
    }

    /// Passes any value and says what it was. The span of a string includes its quotes.
    pub fn value(&mut self) -> Result<(Kind, Span), Malformed> {
        let first = self.peek()?;
        let start = self.offset();
        let kind = match first {
            b'"' => {
                let inner = self.string()?;
                Kind::String { empty: inner.start == inner.end }
            }
            b'{' | b'[' => Kind::Nested { empty: self.nested()? },
            b'-' | b'0'..=b'9' => {
                self.word();
                Kind::Number
            }
            b't' | b'f' | b'n' => {
                let length = self.word();
                match (first, length) {
                    (b't', 4) => Kind::Bool(true),
                    (b'f', 5) => Kind::Bool(false),
                    (b'n', 4) => Kind::Null,
                    _ => return Err(Malformed),
                }
            }
            _ => return Err(Malformed),
        };
        Ok((kind, Span { start, end: self.offset() }))
    }

    /// Passes letters, digits and what a number may hold; returns how many.
    fn word(&mut self) -> usize {
        let start = self.offset();
        loop {
            let rest = self.rest();
            let length =
                rest.iter().take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.')).count();
            self.pass(length);
            if length < rest.len() || rest.is_empty() {
                return self.offset() - start;
            }
        }
    }

    /// Passes an object or a list, however deep, and says whether it was empty.
    fn nested(&mut self) -> Result<bool, Malformed> {
        self.next()?;
        let mut depth = 1_usize;
        let mut empty = true;
        loop {
            let rest = self.rest();
            if rest.is_empty() {
                return Err(Malformed);
            }
            let plain = rest.iter().take_while(|byte| !matches!(byte, b'"' | b'{' | b'}' | b'[' | b']')).count();
            empty &= depth > 1 || rest[..plain].iter().all(u8::is_ascii_whitespace);
            self.pass(plain);
            let Some(byte) = rest.get(plain) else { continue };
            match byte {
                b'"' => {
                    empty = false;
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => {
                    empty = false;
                    depth += 1;
                }
                _ => depth -= 1,
            }
            self.pass(1);
            if depth == 0 {
                return Ok(empty);
            }
        }
    }
}

/// Tells of each member of the object at the start of a body: its key as it is written, what its value is, and where that
/// stands. Returns where the closing brace of the object is.
pub fn members(pieces: &[Bytes], mut each: impl FnMut(&[u8], Kind, Span)) -> Result<usize, Malformed> {
    let mut reader = Reader::new(pieces);
    if !reader.take(b'{')? {
        return Err(Malformed);
    }
    if reader.take(b'}')? {
        return Ok(reader.offset() - 1);
    }
    loop {
        let key = reader.string()?;
        if !reader.take(b':')? {
            return Err(Malformed);
        }
        let (kind, span) = reader.value()?;
        each(&cut(pieces, key), kind, span);
        if !reader.take(b',')? {
            return if reader.take(b'}')? { Ok(reader.offset() - 1) } else { Err(Malformed) };
        }
    }
}

/// The bytes of a span: borrowed where they lie in one piece, as they nearly always do.
pub fn cut(pieces: &[Bytes], span: Span) -> Cow<'_, [u8]> {
    let mut bytes = Vec::new();
    let mut base = 0;
    for piece in pieces {
        if span.start >= base && span.end <= base + piece.len() {
            return Cow::Borrowed(&piece[span.start - base..span.end - base]);
        }
        let from = span.start.clamp(base, base + piece.len()) - base;
        let to = span.end.clamp(base, base + piece.len()) - base;
        bytes.extend_from_slice(&piece[from..to]);
        base += piece.len();
    }
    Cow::Owned(bytes)
}

/// The text of a JSON string, given what lies between its quotes. What is not UTF-8 becomes U+FFFD, as in Go.
pub fn unescape(inner: &[u8]) -> String {
    let text = String::from_utf8_lossy(inner);
    if !text.contains('\\') {
        return text.into_owned();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let mut chars = rest[at + 1..].chars();
        let escape = chars.next().unwrap_or('\\');
        rest = chars.as_str();
        match escape {
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'u' => {
                let (first, after) = hex(rest);
                rest = after;
                let paired = (0xd800..0xdc00).contains(&first).then(|| rest.strip_prefix("\\u").map(hex)).flatten();
                match paired {
                    Some((second, after)) if (0xdc00..0xe000).contains(&second) => {
                        rest = after;
                        out.push(
                            char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00))
                                .unwrap_or('\u{fffd}'),
                        );
                    }
                    _ => out.push(char::from_u32(first).unwrap_or('\u{fffd}')),
                }
            }
            other => out.push(other),
        }
    }
    out.push_str(rest);
    out
}

/// A text as Go writes it in JSON, quotes included.
pub fn quoted(text: &str) -> String {
    let is_plain = |byte: u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\' | b'<' | b'>' | b'&');
    if text.bytes().all(is_plain) {
        return ["\"", text, "\""].concat();
    }
    let quoted = serde_json::Value::from(text).to_string();
    if !quoted.contains(['<', '>', '&', '\u{2028}', '\u{2029}']) {
        return quoted;
    }
    let escapes =
        [('<', "\\u003c"), ('>', "\\u003e"), ('&', "\\u0026"), ('\u{2028}', "\\u2028"), ('\u{2029}', "\\u2029")];
    escapes.into_iter().fold(quoted, |text, (char, escape)| text.replace(char, escape))
}

/// Four hexadecimal digits and what follows them; U+FFFD if there are none.
fn hex(text: &str) -> (u32, &str) {
    match text.get(..4).and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
        Some(value) => (value, &text[4..]),
        None => (0xfffd, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str, size: usize) -> Vec<Bytes> {
        text.as_bytes().chunks(size).map(Bytes::copy_from_slice).collect()
    }

    #[test]
    fn a_value_is_the_same_however_it_is_cut() {
        for text in [r#""a\"b""#, "[]", "[ ]", "{\"a\":[1,{\"b\":\"]}\"}]}", "-1.5e3", "true", "false", "null", "[[]]"]
        {
            let whole = Reader::new(&pieces(text, text.len())).value();
            for size in 1..text.len() {
                assert_eq!(Reader::new(&pieces(text, size)).value(), whole, "{text} in pieces of {size}");
            }
            assert_eq!(whole.unwrap().1, Span { start: 0, end: text.len() });
        }
    }

    #[test]
    fn emptiness_is_seen() {
        for (text, empty) in [("[]", true), ("[ \n]", true), ("[1]", false), ("[[]]", false), ("{\"\":1}", false)] {
            assert_eq!(Reader::new(&pieces(text, 9)).value().unwrap().0, Kind::Nested { empty }, "{text}");
        }
    }

    #[test]
    fn what_ends_early_is_malformed() {
        for text in ["", " ", "\"a", "[1", "{\"a\":\"}", "\"a\\", "tru", "nul"] {
            assert_eq!(Reader::new(&pieces(text, 3)).value(), Err(Malformed), "{text:?}");
        }
    }

    #[test]
    fn members_are_told_with_their_places() {
        let text = r#" {"a" : "x", "b":{"c":1} , "d":null } rest"#;
        for size in 1..text.len() {
            let pieces = pieces(text, size);
            let mut seen = Vec::new();
            let end =
                members(&pieces, |key, _, span| seen.push((key.to_vec(), cut(&pieces, span).into_owned()))).unwrap();
            let wanted = [("a", r#""x""#), ("b", r#"{"c":1}"#), ("d", "null")];
            assert_eq!(seen, wanted.map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec())));
            assert_eq!(&text[end..], "} rest");
        }
        assert_eq!(members(&pieces("{}", 1), |_, _, _| {}), Ok(1));
        for text in ["", "[]", "{\"a\"}", "{\"a\":1", "{\"a\":1 \"b\":2}"] {
            assert_eq!(members(&pieces(text, 2), |_, _, _| {}), Err(Malformed), "{text}");
        }
    }

    #[test]
    fn a_text_is_written_as_go_writes_it() {
        assert_eq!(quoted("a b"), r#""a b""#);
        assert_eq!(quoted("a\"b\\é\n"), r#""a\"b\\é\n""#);
        assert_eq!(quoted("<a>&\u{2028}"), r#""\u003ca\u003e\u0026\u2028""#);
    }

    #[test]
    fn escapes_are_read() {
        assert_eq!(unescape(br#"a\u0041\n\"\/\ud83d\ude00\ud800x"#), "aA\n\"/\u{1f600}\u{fffd}x");
    }
}
