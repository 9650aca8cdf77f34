//! Hands lines of the access log on in batches, as nginx does for `access_log … buffer= flush=`: a system call for each line
//! would be a sixth of what a short answer costs.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use olol_middleware::trace::ACCESS;
use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

/// Bytes that wait at most.
const MOST: usize = 64 << 10;
/// How long a line waits.
const WAIT: Duration = Duration::from_millis(100);

/// Writes events to `out`: lines of the access log a little later, all others at once and behind the lines that came before.
pub(super) struct Batches<W> {
    lines: Arc<Lines<W>>,
    /// Who writes what waits; none if nothing may.
    writer: Option<Thread>,
}

struct Lines<W> {
    waiting: Mutex<Vec<u8>>,
    /// Taken before `waiting` by who takes both.
    out: Mutex<Output<W>>,
}

struct Output<W> {
    to: W,
    /// What is being written: nothing, but its room is used again.
    batch: Vec<u8>,
}

/// Writes what waits when it is dropped.
pub(super) struct Flush<W: Write>(Arc<Lines<W>>);

impl<W: Write + Send + 'static> Batches<W> {
    /// Lines wait if `wait` says so: to somebody who looks on, they are shown at once.
    pub(super) fn new(out: W, wait: bool) -> io::Result<(Self, Flush<W>)> {
        let out = Mutex::new(Output { to: out, batch: Vec::new() });
        let lines = Arc::new(Lines { waiting: Mutex::default(), out });
        let writer = wait.then(|| {
            let lines = lines.clone();
            thread::Builder::new().name("log".to_owned()).spawn(move || {
                loop {
                    thread::park();
                    thread::sleep(WAIT);
                    lines.flush();
                }
            })
        });
        let writer = writer.transpose()?.map(|handle| handle.thread().clone());
        Ok((Self { lines: lines.clone(), writer }, Flush(lines)))
    }
}

impl<W: Write> Lines<W> {
    fn flush(&self) {
        // Nobody is left to be told of what cannot be written.
        let _ = self.write(&[]);
    }

    /// Writes what waits, and then this.
    fn write(&self, event: &[u8]) -> io::Result<()> {
        let Output { to, batch } = &mut *lock(&self.out);
        mem::swap(batch, &mut lock(&self.waiting));
        let written = to.write_all(batch);
        batch.clear();
        written?;
        to.write_all(event)
    }
}

impl<W: Write> Drop for Flush<W> {
    fn drop(&mut self) {
        self.0.flush();
    }
}

impl<'a, W: Write + 'a> MakeWriter<'a> for Batches<W> {
    type Writer = Out<'a, W>;

    fn make_writer(&'a self) -> Self::Writer {
        Out { lines: &self.lines, later: None }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        Out { lines: &self.lines, later: self.writer.as_ref().filter(|_| event.target() == ACCESS) }
    }
}

/// Where one event goes.
pub(super) struct Out<'a, W> {
    lines: &'a Lines<W>,
    /// Who writes it later.
    later: Option<&'a Thread>,
}

impl<W: Write> Write for Out<'_, W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let Some(writer) = self.later else {
            self.lines.write(event)?;
            return Ok(event.len());
        };
        let mut waiting = lock(&self.lines.waiting);
        let first = waiting.is_empty();
        waiting.extend_from_slice(event);
        let full = waiting.len() >= MOST;
        drop(waiting);
        if full {
            self.lines.write(&[])?;
        } else if first {
            writer.unpark();
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use tracing::{info, warn};

    use super::*;

    /// Tells each write.
    struct Told(Sender<String>);

    impl Write for Told {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.send(String::from_utf8_lossy(text).into_owned()).map_err(io::Error::other)?;
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(wait: bool, say: impl FnOnce()) -> (Flush<Told>, Receiver<String>) {
        let (tell, told) = channel();
        let (batches, flush) = Batches::new(Told(tell), wait).unwrap();
        let subscriber =
            tracing_subscriber::fmt().with_writer(batches).without_time().with_level(false).with_target(false).finish();
        tracing::subscriber::with_default(subscriber, say);
        (flush, told)
    }

    fn access(line: usize) {
        info!(target: ACCESS, "{line}");
    }

    #[test]
    fn lines_wait_for_each_other_but_not_long() {
        let (_flush, told) = log(true, || (1..=3).for_each(access));
        assert_eq!(told.recv_timeout(Duration::from_secs(10)).unwrap(), "1\n2\n3\n");
    }

    #[test]
    fn other_events_do_not_wait_and_keep_their_place() {
        let (_flush, told) = log(true, || {
            access(1);
            warn!("2");
            access(3);
            warn!("4");
        });
        assert_eq!(told.try_iter().collect::<String>(), "1\n2\n3\n4\n");
    }

    #[test]
    fn nothing_waits_when_it_is_over_or_somebody_looks_on() {
        let (flush, told) = log(true, || access(1));
        drop(flush);
        assert_eq!(told.try_recv().unwrap(), "1\n");
        let (_flush, told) = log(false, || access(1));
        assert_eq!(told.try_recv().unwrap(), "1\n");
    }

    #[test]
    fn what_waits_is_bounded() {
        let (_flush, told) = log(true, || (0..MOST).for_each(access));
        let longest = told.try_iter().map(|text| text.len()).max().unwrap();
        assert!((1..MOST + 8).contains(&longest), "{longest}");
    }
}
