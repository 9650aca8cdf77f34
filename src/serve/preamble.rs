//! The first request of a connection: which protocol it speaks, what Go's server refuses in other words than hyper, and
//! what Go's server takes and hyper does not.

use std::borrow::Cow;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use super::Stream;
use super::heads::Heading;
use super::wire::{BAD_REQUEST, TOO_LARGE, Wire};

/// How HTTP/2 begins.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const VERSION: &[u8] = b"HTTP/1.1 505 HTTP Version Not Supported: unsupported protocol version\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n505 HTTP Version Not Supported: unsupported protocol version";
const ENCODING: &[u8] = b"HTTP/1.1 501 Not Implemented\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\nUnsupported transfer encoding";
/// Header lines that fit a map of headers.
const MOST_LINES: usize = 24_000;
/// Bytes of a target that fit a URI, with room for what a query adds.
const LONGEST_TARGET: usize = 65_000;

/// What a connection began with.
pub(super) enum Preamble {
    /// Nothing: the client has left.
    Gone,
    /// The head of a request, and how many lines it has.
    Http1(Wire<Stream>, usize),
    /// The preface of HTTP/2.
    Http2(Wire<Stream>),
    /// Something that is answered with these bytes.
    Refused(Wire<Stream>, &'static [u8]),
}

/// Reads the first head, for so long and no longer than this, and gives it back with the connection.
pub(super) async fn read(mut stream: Stream, limit: Duration, longest: usize) -> Preamble {
    match tokio::time::timeout(limit, first_head(&mut stream, longest)).await {
        Err(_) | Ok(First::Nothing) => Preamble::Gone,
        Ok(First::Refused(answer)) => Preamble::Refused(Wire::new(Bytes::new(), stream), answer),
        Ok(First::Http1(head, lines)) => Preamble::Http1(Wire::new(head, stream), lines),
        Ok(First::Http2(head)) => Preamble::Http2(Wire::raw(head, stream)),
    }
}

enum First {
    Nothing,
    Http1(Bytes, usize),
    Http2(Bytes),
    Refused(&'static [u8]),
}

async fn first_head(stream: &mut Stream, longest: usize) -> First {
    let mut first = BytesMut::with_capacity(4096);
    let mut head = Head::new(longest);
    let mut heading = Heading::default();
    loop {
        if !heading.may_grow() {
            return First::Refused(TOO_LARGE);
        }
        first.reserve(4096);
        match stream.read_buf(&mut first).await {
            Ok(0) if !first.is_empty() => return First::Refused(BAD_REQUEST),
            Ok(0) | Err(_) => return First::Nothing,
            Ok(read) => heading.grows(read),
        }
        if HTTP2.starts_with(&first[..first.len().min(HTTP2.len())]) {
            if first.len() >= HTTP2.len() {
                return First::Http2(first.freeze());
            }
            continue;
        }
        let is_whole = head.look(&first);
        if let Some(answer) = head.refusal(&first) {
            return First::Refused(answer);
        }
        if is_whole {
            return First::Http1(head.mended(first), head.lines);
        }
    }
}

/// How far a head was looked at.
struct Head {
    /// The longest that it may be, bytes.
    longest: usize,
    /// Where the first line that is not complete begins; after the head, if that is whole.
    at: usize,
    /// Complete lines, the first one included.
    lines: usize,
    whole: bool,
    /// Whether a header goes on in a second line.
    folds: bool,
}

impl Head {
    fn new(longest: usize) -> Self {
        Self { longest, at: 0, lines: 0, whole: false, folds: false }
    }

    /// Looks at what has come; true once the head is whole. An empty first line ends it too: no request begins so.
    fn look(&mut self, bytes: &[u8]) -> bool {
        while let Some(end) = (!self.whole).then(|| memchr::memchr(b'\n', &bytes[self.at..])).flatten() {
            self.whole = matches!(&bytes[self.at..self.at + end], b"" | b"\r");
            // The first header has no line to go on from: that is left to be refused.
            self.folds |= self.lines > 1 && matches!(bytes[self.at], b' ' | b'\t');
            self.lines += usize::from(!self.whole);
            self.at += end + 1;
        }
        self.whole
    }

    /// The answer to a head that Go's server refuses in words of its own.
    fn refusal(&self, bytes: &[u8]) -> Option<&'static [u8]> {
        if self.lines > MOST_LINES || self.at > self.longest || (!self.whole && bytes.len() > self.longest) {
            return Some(TOO_LARGE);
        }
        if self.lines == 0 {
            return self.whole.then_some(BAD_REQUEST);
        }
        let Some(line) = Line::of(bytes) else { return Some(BAD_REQUEST) };
        match (line.major, line.minor) {
            (b'1', b'0') => None,
            (b'1', _) => (self.whole && has_foreign_encoding(&bytes[line.end..self.at])).then_some(ENCODING),
            _ => Some(VERSION),
        }
    }

    /// The head as hyper takes it.
    fn mended(&self, mut bytes: BytesMut) -> Bytes {
        let Some(line) = Line::of(&bytes) else { return bytes.freeze() };
        let target = mended_target(line.target);
        // As Go does: HTTP/1.0 knows no encodings of a transfer.
        let drops = line.minor == b'0' && lines(&bytes[line.end..self.at]).any(is_transfer_encoding);
        let version: &[u8] = if line.minor > b'1' { b"HTTP/1.1" } else { line.version };
        if matches!(target, Cow::Borrowed(_)) && !drops && !self.folds && version == line.version {
            return bytes.freeze();
        }
        let mut mended = BytesMut::with_capacity(bytes.len() + target.len());
        mended.extend_from_slice(line.method);
        mended.extend_from_slice(b" ");
        mended.extend_from_slice(&target);
        mended.extend_from_slice(b" ");
        mended.extend_from_slice(version);
        mended.extend_from_slice(b"\r\n");
        for line in lines(&bytes[line.end..self.at]).filter(|line| !drops || !is_transfer_encoding(line)) {
            if self.folds && matches!(line, [b' ' | b'\t', ..]) {
                mended.truncate(mended.trim_ascii_end().len());
                mended.extend_from_slice(b" ");
                mended.extend_from_slice(line.trim_ascii());
                mended.extend_from_slice(b"\r\n");
            } else {
                mended.extend_from_slice(line);
            }
        }
        mended.unsplit(bytes.split_off(self.at));
        mended.freeze()
    }
}

/// The first line of a request, as Go takes it apart.
struct Line<'a> {
    method: &'a [u8],
    target: &'a [u8],
    version: &'a [u8],
    major: u8,
    minor: u8,
    /// Where the next line begins.
    end: usize,
}

impl<'a> Line<'a> {
    fn of(bytes: &'a [u8]) -> Option<Self> {
        let end = memchr::memchr(b'\n', bytes)?;
        let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
        let (method, rest) = line.split_at(memchr::memchr(b' ', line)?);
        let rest = &rest[1..];
        let (target, version) = rest.split_at(memchr::memchr(b' ', rest)?);
        let version = &version[1..];
        match version.strip_prefix(b"HTTP/")? {
            [major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
                Some(Self { method, target, version, major: *major, minor: *minor, end: end + 1 })
            }
            _ => None,
        }
    }
}

/// Lines with their ends.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split_inclusive(|byte| *byte == b'\n')
}

fn header(line: &[u8]) -> (&[u8], &[u8]) {
    let colon = memchr::memchr(b':', line).unwrap_or(line.len());
    (&line[..colon], line.get(colon + 1..).unwrap_or_default().trim_ascii())
}

fn is_transfer_encoding(line: &[u8]) -> bool {
    header(line).0.eq_ignore_ascii_case(b"transfer-encoding")
}

/// Whether a body comes in an encoding that Go does not know. A value with control characters is no value at all.
fn has_foreign_encoding(head: &[u8]) -> bool {
    let mut encodings = lines(head).filter(|line| is_transfer_encoding(line)).map(|line| header(line).1);
    let Some(first) = encodings.next() else { return false };
    let is_value = !first.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t');
    is_value && (encodings.next().is_some() || !first.eq_ignore_ascii_case(b"chunked"))
}

/// The target of a request as a URI of hyper's: bytes that Go takes as they are become escapes, a long query or path is
/// cut (Ollama reads no queries, and has no such paths), and an absolute URI without a path keeps the redirect that Go
/// answers it with.
fn mended_target(target: &[u8]) -> Cow<'_, [u8]> {
    let needs_escape = |byte: u8| matches!(byte, b'"' | b'#' | b'<' | b'>' | b'`' | b'{' | b'}') || !byte.is_ascii();
    let host = target.strip_prefix(b"http://");
    let path = host.map(|host| host.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(host.len()));
    let without_path = host.zip(path).is_some_and(|(host, path)| host.get(path) != Some(&b'/'));
    let without_host = path == Some(0) && !without_path;
    if !without_path
        && !without_host
        && target.len() <= LONGEST_TARGET
        && !target.iter().any(|byte| needs_escape(*byte))
    {
        return Cow::Borrowed(target);
    }
    let mut mended = Vec::with_capacity(target.len() + 16);
    let start = if without_host { b"http://".len() } else { 0 };
    let slashes = path.filter(|_| without_path).map(|path| b"http://".len() + path);
    for (at, byte) in target.iter().enumerate().skip(start) {
        if slashes == Some(at) {
            mended.extend_from_slice(b"//");
        }
        if needs_escape(*byte) {
            mended.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            mended.push(*byte);
        }
    }
    if slashes == Some(target.len()) {
        mended.extend_from_slice(b"//");
    }
    if mended.len() > LONGEST_TARGET {
        mended.truncate(LONGEST_TARGET);
        // Not in the middle of an escape.
        let escape = mended[LONGEST_TARGET - 2..].iter().position(|byte| *byte == b'%');
        mended.truncate(escape.map_or(LONGEST_TARGET, |at| LONGEST_TARGET - 2 + at));
    }
    Cow::Owned(mended)
}

#[cfg(test)]
mod tests {
    use super::super::LONGEST_HEAD;
    use super::*;

    #[test]
    fn a_head_is_read_alike_however_it_comes_and_mended_without_harm() {
        const PIECES: &[&str] = &[
            "GET ",
            "POST ",
            "/",
            "/a?b=%zz",
            "http://",
            "http://a",
            "*",
            " ",
            "\t",
            "HTTP/1.1",
            "HTTP/1.0",
            "HTTP/1.9",
            "HTTP/2.0",
            "\r\n",
            "\n",
            "\r",
            "Host: a",
            "Transfer-Encoding: chunked",
            "transfer-encoding:",
            "Content-Length: 3",
            ":",
            "\u{b}",
            "\0",
            "ä",
            "<",
            "#",
            "GET / HTTP/1.1\r\nA: b\r\n",
            "\r\n\r\n",
            " folded",
        ];
        for (seed, text) in (0..).zip(crate::noise::texts(PIECES, crate::noise::MANY)) {
            let bytes = text.as_bytes();
            let (mut whole, mut parts) = (Head::new(LONGEST_HEAD), Head::new(LONGEST_HEAD));
            let is_whole = whole.look(bytes);
            let mut so_far = Vec::new();
            for piece in crate::noise::cut(bytes, seed) {
                so_far.extend_from_slice(piece);
                parts.look(&so_far);
            }
            assert_eq!(
                (parts.at, parts.lines, parts.whole, parts.folds),
                (whole.at, whole.lines, is_whole, whole.folds)
            );
            if !is_whole || whole.refusal(bytes).is_some() {
                continue;
            }
            // What comes behind the head stays, and a second look finds nothing more to mend.
            let mended = whole.mended(BytesMut::from(bytes));
            assert!(mended.ends_with(&bytes[whole.at..]), "{text:?}");
            let mut again = Head::new(LONGEST_HEAD);
            assert!(again.look(&mended) && !again.folds, "{text:?}: {}", mended.escape_ascii());
            assert_eq!(&mended[again.at..], &bytes[whole.at..], "{text:?}");
        }
    }

    fn refusal(bytes: &[u8]) -> Option<&'static [u8]> {
        let mut head = Head::new(LONGEST_HEAD);
        head.look(bytes);
        head.refusal(bytes)
    }

    fn mended(bytes: &[u8]) -> Bytes {
        let mut head = Head::new(LONGEST_HEAD);
        assert!(head.look(bytes));
        head.mended(BytesMut::from(bytes))
    }

    #[test]
    fn what_go_refuses_in_other_words_is_seen() {
        assert_eq!(refusal(b"GET / HTTP/2.0\r\n\r\n"), Some(VERSION));
        assert_eq!(refusal(b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n"), Some(ENCODING));
        assert_eq!(
            refusal(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Some(ENCODING)
        );
        assert_eq!(refusal(b"POST / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n\r\n0\r\n\r\n"), None);
        assert_eq!(refusal(b"POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n"), None);
        assert_eq!(refusal(b"POST / HTTP/1.1\r\nHost: a\r\n\r\nTransfer-Encoding: gzip\r\n"), None);
        assert_eq!(refusal(b"GET / HTTP/1.1"), None);
    }

    #[test]
    fn what_is_no_request_is_refused_as_soon_as_it_is_seen() {
        for no_request in
            [&b"garbage\r\n"[..], b"\r\n", b"\n\n", b"GET /a b HTTP/1.1\r\n", b"GET / HTTP/11\r\n", b"GET /\r\n"]
        {
            assert_eq!(refusal(no_request), Some(BAD_REQUEST), "{}", no_request.escape_ascii());
        }
        let long = [b"GET / HTTP/1.1\r\nA: ".to_vec(), vec![b'a'; LONGEST_HEAD]].concat();
        assert_eq!(refusal(&long), Some(TOO_LARGE));
        assert_eq!(refusal(format!("GET / HTTP/1.1\r\n{}\r\n", "a:b\r\n".repeat(30_000)).as_bytes()), Some(TOO_LARGE));
    }

    #[test]
    fn a_head_is_whole_at_its_empty_line() {
        let bytes = b"GET / HTTP/1.1\r\nHost: a\n\r\nbody\n\n";
        let mut head = Head::new(LONGEST_HEAD);
        for length in 0..26 {
            assert!(!head.look(&bytes[..length]), "{length}");
        }
        assert!(head.look(bytes));
        assert_eq!((head.at, head.lines), (26, 2));
    }

    #[test]
    fn targets_that_go_takes_are_mended() {
        for (target, wanted) in [
            (&b"/api/tags?a=%zz"[..], "/api/tags?a=%zz"),
            (b"/\xe9<x>", "/%E9%3Cx%3E"),
            (b"/api/tags#x", "/api/tags%23x"),
            (b"http://a", "http://a//"),
            (b"http://a?x", "http://a//?x"),
            (b"http:///api/tags", "/api/tags"),
            (b"http://a/b", "http://a/b"),
        ] {
            assert_eq!(String::from_utf8_lossy(&mended_target(target)), wanted);
        }
        let long = [&b"/"[..], &vec![b'<'; 70_000]].concat();
        let cut = mended_target(&long);
        assert!(cut.len() <= LONGEST_TARGET && cut.ends_with(b"%3C"));
    }

    #[test]
    fn a_mended_head_keeps_the_rest() {
        assert_eq!(&mended(b"GET /< HTTP/1.1\r\nA: b\r\n\r\nbody")[..], b"GET /%3C HTTP/1.1\r\nA: b\r\n\r\nbody");
        assert_eq!(
            &mended(b"POST / HTTP/1.0\r\nTransfer-Encoding: gzip\r\nA: b\r\n\r\nx")[..],
            b"POST / HTTP/1.0\r\nA: b\r\n\r\nx"
        );
        assert_eq!(&mended(b"GET / HTTP/1.1\r\n\r\n")[..], b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(&mended(b"GET / HTTP/1.2\r\n\r\n")[..], b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(
            &mended(b"GET / HTTP/1.1\r\nA: b\r\n  c\r\nD: e\r\n\r\n")[..],
            b"GET / HTTP/1.1\r\nA: b c\r\nD: e\r\n\r\n"
        );
        assert_eq!(&mended(b"GET / HTTP/1.1\r\nA: b\r\n  \r\n\r\n")[..], b"GET / HTTP/1.1\r\nA: b \r\n\r\n");
    }
}
