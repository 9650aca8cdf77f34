//! HTTP/1.1 as bytes: read and written without a library, so that nothing is hidden or mended on the way.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// Header lines in their order, names as they were written.
#[derive(Clone, Debug, Default)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The first value of a header, whatever the case of its name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Name and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The names as they were written.
    pub fn names(&self) -> Vec<&str> {
        self.iter().map(|(name, _)| name).collect()
    }

    /// The length that is stated.
    pub fn length(&self) -> Option<u64> {
        self.get("content-length").and_then(|length| length.parse().ok())
    }

    /// Whether the body comes in chunks.
    pub fn are_chunked(&self) -> bool {
        self.get("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
    }
}

/// The first line of a message, and its headers.
#[derive(Clone, Debug)]
pub struct Head {
    /// The request line or the status line.
    pub line: String,
    /// The headers.
    pub headers: Headers,
}

/// Reads a head; `None` if the peer has closed before it.
pub async fn read_head(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Head>> {
    let Some(line) = read_line(from).await? else {
        return Ok(None);
    };
    let mut headers = Vec::new();
    loop {
        let header = read_line(from).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if header.is_empty() {
            return Ok(Some(Head { line, headers: Headers(headers) }));
        }
        let (name, value) = header.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
}

/// Reads the data of one chunk; `None` for the last one, which has none.
pub async fn read_chunk(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let size = read_line(from).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let size = usize::from_str_radix(&size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut data = vec![0; size];
    from.read_exact(&mut data).await?;
    read_line(from).await?;
    Ok((size != 0).then_some(data))
}

/// A head as it is written, with the empty line behind it.
pub fn head<'a>(line: &str, headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let headers = headers.into_iter().map(|(name, value)| format!("{name}: {value}\r\n"));
    let lines = [format!("{line}\r\n")].into_iter().chain(headers).chain(["\r\n".to_owned()]);
    lines.collect::<Vec<_>>().concat().into_bytes()
}

/// A chunk as it is written.
pub fn chunk(data: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}

/// What ends a body in chunks.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

async fn read_line(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    line.pop_if(|last| *last == b'\r');
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}
