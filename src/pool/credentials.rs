//! What Ollamas without an agent are shown as `Authorization`, by calls and by the proxy's own questions: what stands before
//! them may ask for it. Each has it in a file, which is read again when it changes.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::HeaderValue;
use olol_middleware::{Pattern, ServerId};
use tokio_util::task::AbortOnDropHandle;

use crate::security::meant_for;
use crate::watch::watch;

/// The credentials of all servers that have some. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Credentials(Arc<Vec<(Pattern, Shown)>>);

/// What one server is shown.
#[derive(Clone)]
pub struct Shown {
    now: Arc<ArcSwap<HeaderValue>>,
    // Ends with the last clone.
    _following: Arc<AbortOnDropHandle<()>>,
}

impl Credentials {
    /// Reads the files of a configuration, and follows them.
    pub fn start(files: &BTreeMap<Pattern, PathBuf>) -> Result<Self, String> {
        let shown = |(server, file): (&Pattern, &PathBuf)| Ok((server.clone(), Shown::start(file)?));
        Ok(Self(Arc::new(files.iter().map(shown).collect::<Result<_, String>>()?)))
    }

    /// Reads them, and uses none.
    pub fn check(files: &BTreeMap<Pattern, PathBuf>) -> Result<(), String> {
        files.values().try_for_each(|file| read(file).map(drop))
    }

    /// Those of the server of this name.
    pub fn of(&self, server: &ServerId) -> Option<Shown> {
        meant_for(&self.0, server).cloned()
    }
}

impl Shown {
    fn start(file: &Path) -> Result<Self, String> {
        // Watched before it is read: no change is missed.
        let mut changes = watch(file);
        let now = Arc::new(ArcSwap::from_pointee(read(file)?));
        let (current, path) = (now.clone(), file.to_owned());
        let following = tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                let path = path.clone();
                match tokio::task::spawn_blocking(move || read(&path)).await {
                    Ok(Ok(new)) => current.store(Arc::new(new)),
                    Ok(Err(error)) => tracing::warn!(error, "the credentials of a server stay as they were"),
                    Err(_) => return,
                }
            }
        });
        Ok(Self { now, _following: Arc::new(AbortOnDropHandle::new(following)) })
    }

    /// The header.
    pub fn header(&self) -> HeaderValue {
        HeaderValue::clone(&self.now.load())
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

fn read(file: &Path) -> Result<HeaderValue, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{} cannot be read: {error}", file.display()))?;
    let good = HeaderValue::from_str(text.trim()).ok().filter(|header| !header.is_empty());
    let mut header = good.ok_or_else(|| {
        format!("{} must have one line of printable characters in it, such as \"Bearer …\"", file.display())
    })?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_very_name_goes_before_a_pattern_and_nothing_is_shown_in_debug() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            file
        };
        let files = [("*", put("all", "Bearer all\n")), ("gpu1", put("one", "Basic b25l"))];
        let files = files.map(|(name, file)| (Pattern::parse(name).unwrap(), file)).into();
        let credentials = Credentials::start(&files).unwrap();
        let of = |name: &str| credentials.of(&ServerId::new(name)).map(|shown| shown.header());
        assert_eq!(
            (of("gpu1").unwrap(), of("gpu2").unwrap()),
            ("Basic b25l".parse().unwrap(), "Bearer all".parse().unwrap())
        );
        assert!(!format!("{credentials:?} {:?}", of("gpu1")).contains("b25l"));
        put("all", " \n");
        let error = Credentials::check(&files).unwrap_err();
        assert!(error.contains("all must have one line"), "{error}");
    }
}
