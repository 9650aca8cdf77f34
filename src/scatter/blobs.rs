//! Blobs of a `create` for several servers: written once to the disk of the proxy, and given to every server that the
//! create will run on.
//!
//! A client uploads a blob before it says what for. The bytes are never held in memory, their digest is checked on the way,
//! and what nobody used is removed after a while. Names come from digests only, never from a path of a client.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use olol_middleware::call::{Head, Pieces};
use olol_middleware::pick::Fleet;
use olol_middleware::{Call, Candidates, Error, Payload, Reply, Route, Server};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::{Config, NATIVE, Scatter, is_head, json_reply};
use crate::files::make_private;

/// Bytes read from the spool at a time.
const READ: usize = 256 << 10;
/// Bytes of a body that are read although nobody wants them.
const LEFT: u64 = 256 << 10;

/// The folder where blobs wait.
#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    max_bytes: u64,
    ttl: Duration,
    held: Mutex<Held>,
    used: Mutex<Used>,
    /// What the names of parts begin with that we are writing.
    parts: String,
}

/// When the files of the spool were used last: by the time of day that stands at each, and by a clock that nobody sets. Another
/// process with the same folder changes the former.
type Used = HashMap<String, (SystemTime, Instant)>;

/// What is in the spool, bytes.
#[derive(Debug, Default)]
struct Held {
    /// What was found there, and what we have put there since.
    there: u64,
    /// Parts that we are writing.
    writing: u64,
}

/// A blob in the spool.
#[derive(Clone, Debug)]
pub(super) struct Spooled {
    digest: String,
    path: PathBuf,
    length: u64,
}

impl Spool {
    pub(super) fn new(config: &Config) -> Self {
        let dir =
            if config.dir.as_os_str().is_empty() { std::env::temp_dir().join("olol") } else { config.dir.clone() };
        let parts = format!("partial-{:016x}-", fastrand::u64(..));
        Self {
            dir,
            max_bytes: config.max_bytes,
            ttl: config.ttl_s.time(),
            held: Mutex::default(),
            used: Mutex::default(),
            parts,
        }
    }

    /// A blob that is there; its time begins anew, since whoever asks for it is about to use it.
    pub(super) fn find(&self, digest: &str) -> Option<Spooled> {
        let hex = hex_of(digest)?;
        let name = format!("sha256-{hex}");
        let path = self.dir.join(&name);
        // Not where a link leads to: we make none.
        let length = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?.len();
        self.uses(name);
        Some(Spooled { digest: format!("sha256:{hex}"), path, length })
    }

    /// Removes what is too old, and returns the bytes that are left, without the parts that we are writing.
    ///
    /// The time of day tells how old a file is only when it is seen for the first time: one that is set must end no blob early.
    fn sweep(&self) -> u64 {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return 0 };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *used);
        let mut held = 0;
        for entry in entries.flatten() {
            // Nothing but what we have put there.
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if name.starts_with(&self.parts) || !(name.starts_with("sha256-") || name.starts_with("partial-")) {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            let written = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let age = match before.get(&name) {
                Some((same, at)) if *same == written => at.elapsed(),
                Some(_) => Duration::ZERO,
                None => SystemTime::now().duration_since(written).unwrap_or_default(),
            };
            if age > self.ttl {
                let _ = std::fs::remove_file(entry.path());
                continue;
            }
            held += meta.len();
            let now = Instant::now();
            used.insert(name, (written, now.checked_sub(age).unwrap_or(now)));
        }
        held
    }

    /// A file was used just now.
    fn uses(&self, name: String) {
        let path = self.dir.join(&name);
        let now = SystemTime::now();
        let marked = std::fs::File::open(&path).and_then(|file| file.set_modified(now));
        // As the disk keeps it.
        let written = std::fs::symlink_metadata(&path).and_then(|meta| meta.modified());
        if let (Ok(()), Ok(written)) = (marked, written) {
            self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(name, (written, Instant::now()));
        }
    }

    /// Writes a body, checking its digest.
    async fn write(&self, hex: &str, mut pieces: Pieces) -> Result<Written, Error> {
        let storage = |error: std::io::Error| {
            Error::Storage(format!("the spool {} cannot be written: {error}", self.dir.display()))
        };
        make_own(&self.dir).map_err(storage)?;
        {
            let mut held = self.held();
            held.there = self.sweep();
        }
        let mut partial = Partial::new(self);
        let mut file = tokio::fs::File::create_new(&partial.path).await.map_err(storage)?;
        let mut hash = Sha256::new();
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if !partial.grow(piece.len() as u64) {
                let why = format!("the spool is full ({} bytes, see [spool] max-bytes)", self.max_bytes);
                return Err(Error::Storage(why));
            }
            hash.update(&piece);
            file.write_all(&piece).await.map_err(storage)?;
        }
        file.flush().await.map_err(storage)?;
        let found = format!("{:x}", hash.finalize());
        if found != hex {
            return Ok(Written::Mismatch(found));
        }
        let name = format!("sha256-{hex}");
        tokio::fs::rename(&partial.path, self.dir.join(&name)).await.map_err(storage)?;
        partial.is_kept = true;
        self.uses(name);
        Ok(Written::New)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the folder for us alone, unless it is there. One that somebody else has put there is not written to.
fn make_own(folder: &Path) -> std::io::Result<()> {
    make_private(folder)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let own = rustix::process::geteuid().as_raw();
        // A link of somebody else could lead to a folder that is ours, and meant for other things.
        if std::fs::metadata(folder)?.uid() != own || std::fs::symlink_metadata(folder)?.uid() != own {
            return Err(std::io::Error::other("the folder is another user's; name one of your own in [spool] dir"));
        }
    }
    Ok(())
}

enum Written {
    New,
    Mismatch(String),
}

/// A file that is being written. It is removed unless it is kept, under another name.
struct Partial<'a> {
    spool: &'a Spool,
    path: PathBuf,
    bytes: u64,
    is_kept: bool,
}

impl<'a> Partial<'a> {
    fn new(spool: &'a Spool) -> Self {
        let path = spool.dir.join(format!("{}{:016x}", spool.parts, fastrand::u64(..)));
        Self { spool, path, bytes: 0, is_kept: false }
    }

    /// Takes room for more; false: the spool is full, with all that others are writing there.
    fn grow(&mut self, bytes: u64) -> bool {
        let mut held = self.spool.held();
        let fits = held.there.saturating_add(held.writing).saturating_add(bytes) <= self.spool.max_bytes;
        if fits {
            held.writing += bytes;
            self.bytes += bytes;
        }
        fits
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        let mut held = self.spool.held();
        held.writing -= self.bytes;
        if self.is_kept {
            held.there = held.there.saturating_add(self.bytes);
        } else {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Spooled {
    /// The blob as a body.
    async fn read(&self) -> Result<Payload, Error> {
        let error = |error: std::io::Error| Error::Storage(format!("{} cannot be read: {error}", self.path.display()));
        let file = tokio::fs::File::open(&self.path).await.map_err(error)?;
        let pieces = futures_util::stream::unfold(file, |mut file| async move {
            let mut piece = bytes::BytesMut::with_capacity(READ);
            match file.read_buf(&mut piece).await {
                Ok(0) => None,
                Ok(_) => Some((Ok(piece.freeze()), file)),
                Err(error) => Some((Err(Error::Body(error.into())), file)),
            }
        });
        Ok(Payload::Stream { length: Some(self.length), pieces: Box::pin(pieces) })
    }
}

/// The 64 hexadecimal digits of `sha256:…` or `sha256-…`, in lower case.
fn hex_of(digest: &str) -> Option<String> {
    let hex = digest.strip_prefix("sha256:").or_else(|| digest.strip_prefix("sha256-"))?;
    (hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| hex.to_lowercase())
}

impl<F: Fleet> Scatter<F> {
    /// Takes a blob into the spool, or tells whether it is there; in Ollama's words.
    pub(super) async fn blob(self, call: Call) -> Result<Reply, Error> {
        let digest = call.peek.digests.first().cloned().unwrap_or_default();
        let Some(hex) = hex_of(&digest) else {
            const INVALID: &str = r#"{"error":"invalid digest format"}"#;
            if is_head(&call) {
                return Ok(without_body(StatusCode::BAD_REQUEST, INVALID.len()));
            }
            leave(call).await;
            return Ok(json_reply(StatusCode::BAD_REQUEST, NATIVE, INVALID));
        };
        let known = self.shared.spool.find(&digest).is_some();
        let plain = |status| Reply::full(status, HeaderMap::new(), Bytes::new());
        if known {
            leave(call).await;
            return Ok(plain(StatusCode::OK));
        }
        if is_head(&call) {
            let body = format!(r#"{{"error":"blob \"sha256:{hex}\" not found"}}"#);
            return Ok(without_body(StatusCode::NOT_FOUND, body.len()));
        }
        let pieces = match call.payload {
            Payload::Stream { pieces, .. } => pieces,
            Payload::Whole(pieces) => Box::pin(futures_util::stream::iter(pieces.into_iter().map(Ok))) as Pieces,
        };
        Ok(match self.shared.spool.write(&hex, pieces).await? {
            Written::New => plain(StatusCode::CREATED),
            Written::Mismatch(found) => {
                let text = format!(r#"digest mismatch, expected "sha256:{hex}", got "sha256:{found}""#);
                json_reply(StatusCode::BAD_REQUEST, NATIVE, serde_json::json!({"error": text}).to_string())
            }
        })
    }

    /// Gives a blob to a server, unless it has it.
    pub(super) async fn give(
        &self,
        candidates: &Candidates,
        blob: &Spooled,
        server: &Arc<Server>,
    ) -> Result<(), Error> {
        let looks = self.to(upload(candidates, &blob.digest, Method::HEAD, Payload::empty())?, server).await?;
        if looks.status == StatusCode::OK {
            return Ok(());
        }
        let reply = self.to(upload(candidates, &blob.digest, Method::POST, blob.read().await?)?, server).await?;
        if reply.status.is_success() {
            return Ok(());
        }
        Err(Error::Storage(format!(
            "server {} did not take the blob {}: status {}",
            server.id,
            blob.digest,
            reply.status.as_u16()
        )))
    }
}

/// A refusal that is asked for by HEAD: its length, and nothing of it.
fn without_body(status: StatusCode, length: usize) -> Reply {
    let mut reply = json_reply(status, NATIVE, "");
    reply.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    reply
}

/// Reads a body that nobody wants as far as Go's server would, so that the connection of its client can be kept.
async fn leave(call: Call) {
    let waits = call.headers.contains_key(header::EXPECT);
    let Payload::Stream { length, mut pieces } = call.payload else { return };
    let mut left = LEFT;
    if waits || length.is_some_and(|length| length > LEFT) {
        return;
    }
    while let Some(Ok(piece)) = pieces.next().await {
        let Some(fewer) = left.checked_sub(piece.len() as u64) else { return };
        left = fewer;
    }
}

/// A call of ours about a blob.
fn upload(candidates: &Candidates, digest: &str, method: Method, payload: Payload) -> Result<Call, Error> {
    let path = format!("/api/blobs/{digest}").parse().ok();
    let path = path.ok_or_else(|| Error::Internal(format!("'{digest}' makes no path")))?;
    let head = Head::new(Route::Blob, method, path);
    Ok(Call::new(head, payload, candidates.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_make_names() {
        let hex = "ab".repeat(32);
        assert_eq!(hex_of(&format!("sha256:{}", hex.to_uppercase())), Some(hex.clone()));
        assert_eq!(hex_of(&format!("sha256-{hex}")), Some(hex));
        for bad in ["", "sha256:", "sha256:../../etc/passwd", "md5:00", &format!("sha256:{}", "z".repeat(64))] {
            assert_eq!(hex_of(bad), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_blob_grows_as_old_as_time_passes_and_not_as_the_time_of_day_is_set() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { dir: folder.path().to_owned(), ..Config::default() };
        let spool = Spool::new(&config);
        let put = async |text: &'static str| {
            let hex = format!("{:x}", Sha256::digest(text));
            let pieces = futures_util::stream::iter([Ok(Bytes::from_static(text.as_bytes()))]);
            assert!(matches!(spool.write(&hex, Box::pin(pieces)).await, Ok(Written::New)));
            folder.path().join(format!("sha256-{hex}"))
        };
        let (one, other) = (put("one").await, put("other").await);
        // As they stand there when the time of day was set forwards by a year: what another process writes has the new time.
        let set = |path: &Path, at| std::fs::File::open(path).unwrap().set_modified(at).unwrap();
        let year = Duration::from_secs(365 * 24 * 3600);
        let moved = |path: &Path| {
            let at = std::fs::metadata(path).unwrap().modified().unwrap() - year;
            set(path, at);
            spool.used.lock().unwrap().get_mut(path.file_name().unwrap().to_str().unwrap()).unwrap().0 = at;
        };
        moved(&one);
        moved(&other);
        assert_eq!((spool.sweep(), one.exists(), other.exists()), (8, true, true));
        tokio::time::advance(config.ttl_s.time() - Duration::from_secs(1)).await;
        // Somebody else has used one of them.
        set(&other, SystemTime::now() - year * 2);
        assert_eq!(spool.sweep(), 8);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!((spool.sweep(), one.exists(), other.exists()), (5, false, true));
        // One of a process before us is as old as its file.
        drop(spool);
        assert_eq!((Spool::new(&config).sweep(), other.exists()), (0, false));
    }

    #[tokio::test]
    async fn what_nobody_wants_is_read_unless_it_is_long() {
        for (length, wanted) in [(Some(10), 2), (None, 2), (Some(LEFT + 1), 0)] {
            let read = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            let counted = read.clone();
            let pieces =
                futures_util::stream::iter([Ok(Bytes::from_static(b"hello")), Ok(Bytes::from_static(b"hello"))]);
            let pieces = pieces.inspect(move |_| {
                counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            });
            let candidates = olol_middleware::Cluster::new(Vec::new()).snapshot().all();
            let payload = Payload::Stream { length, pieces: Box::pin(pieces) };
            leave(upload(&candidates, "sha256:ab", Method::POST, payload).unwrap()).await;
            assert_eq!(read.load(std::sync::atomic::Ordering::Relaxed), wanted);
        }
    }

    #[tokio::test]
    async fn what_does_not_match_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(&Config { dir: dir.path().to_owned(), ..Config::default() });
        let pieces: Pieces = Box::pin(futures_util::stream::iter([Ok(Bytes::from_static(b"hello"))]));
        assert!(matches!(spool.write(&"0".repeat(64), pieces).await, Ok(Written::Mismatch(_))));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn uploads_at_the_same_time_fill_the_spool_together() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(&Config { dir: dir.path().to_owned(), max_bytes: 10, ..Config::default() });
        // Two that never end, of six bytes each.
        let begins = || -> Pieces {
            let pieces = futures_util::stream::iter([Ok(Bytes::from_static(b"sixsix"))]);
            Box::pin(pieces.chain(futures_util::stream::pending()))
        };
        let no = "0".repeat(64);
        let (first, second) = (spool.write(&no, begins()), spool.write(&no, begins()));
        tokio::pin!(first, second);
        assert!(futures_util::poll!(first.as_mut()).is_pending());
        let both = futures_util::future::select(first, second).await;
        let (ended, _other) = both.factor_first();
        assert!(matches!(ended, Err(Error::Storage(_))));
        assert_eq!(spool.held().writing, 6);
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_link_in_the_spool_is_no_blob() {
        let dir = tempfile::tempdir().unwrap();
        let hex = "ab".repeat(32);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(format!("sha256-{hex}"))).unwrap();
        let spool = Spool::new(&Config { dir: dir.path().to_owned(), ..Config::default() });
        assert!(spool.find(&format!("sha256:{hex}")).is_none());
    }

    #[tokio::test]
    async fn a_full_spool_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(&Config { dir: dir.path().to_owned(), max_bytes: 3, ..Config::default() });
        let pieces: Pieces = Box::pin(futures_util::stream::iter([Ok(Bytes::from_static(b"hello"))]));
        assert!(matches!(spool.write(&"0".repeat(64), pieces).await, Err(Error::Storage(_))));
    }

    #[test]
    fn who_is_asked_for_stays() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { dir: dir.path().to_owned(), ..Config::default() };
        let spool = Spool::new(&config);
        let digest = "ab".repeat(32);
        let path = dir.path().join(format!("sha256-{digest}"));
        std::fs::write(&path, "hello").unwrap();
        let long_ago = SystemTime::now() - Duration::from_secs(1_000_000);
        std::fs::File::open(&path).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(spool.find(&format!("sha256:{digest}")).map(|blob| blob.length), Some(5));
        assert_eq!(spool.sweep(), 5);
        std::fs::File::open(&path).unwrap().set_modified(long_ago).unwrap();
        assert_eq!((Spool::new(&config).sweep(), path.exists()), (0, false), "whoever begins anew goes by that");
    }
}
