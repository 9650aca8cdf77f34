//! The tokens that count now: those of the cluster's file, and, after its first was changed, for a while those before.
//!
//! Machines get a new token one after the other. Until the last has it, they prove themselves to each other with whichever
//! both know. Whoever wants to say himself how long that is has both in the file, a line each: the first is the one that is
//! shown, all are taken, and what is taken out of the file then counts no longer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use http::HeaderMap;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::token::{self, Token, TokenError};
/// How long the tokens before still count.
pub const OVERLAP: Duration = Duration::from_secs(60 * 60);

/// The tokens that count, the present one first. Clones share them.
#[derive(Clone, Debug)]
pub struct Tokens {
    all: Arc<ArcSwap<Vec<Token>>>,
    changes: Option<watch::Receiver<()>>,
    // Ends with the last clone.
    _following: Option<Arc<AbortOnDropHandle<()>>>,
}

impl From<Token> for Tokens {
    /// One that stays as it is.
    fn from(token: Token) -> Self {
        Self::fixed(vec![token])
    }
}

impl Tokens {
    /// Some that stay as they are; at least one, and the one that is shown first.
    pub(super) fn fixed(all: Vec<Token>) -> Self {
        Self { all: Arc::new(ArcSwap::from_pointee(all)), changes: None, _following: None }
    }

    /// Those of a file, which is read again when it changes.
    pub fn follow(path: &Path) -> Result<Self, TokenError> {
        // Watched before it is read: no change is missed.
        let changes = crate::watch::watch(path);
        let all = Arc::new(ArcSwap::from_pointee(read(path)?));
        let (tell, told) = watch::channel(());
        let task = tokio::spawn(follow(path.to_owned(), changes, all.clone(), tell));
        Ok(Self { all, changes: Some(told), _following: Some(Arc::new(AbortOnDropHandle::new(task))) })
    }

    /// Returns when others have come to count since it was asked for.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut changes = self.changes.clone();
        changes.iter_mut().for_each(watch::Receiver::mark_unchanged);
        async move {
            if let Some(mut changes) = changes
                && changes.changed().await.is_ok()
            {
                return;
            }
            std::future::pending::<()>().await;
        }
    }

    /// All of them; never none.
    pub fn all(&self) -> Guard<Arc<Vec<Token>>> {
        self.all.load()
    }

    /// Whether a call shows one of them.
    pub fn is_shown(&self, headers: &HeaderMap) -> bool {
        self.all().iter().any(|token| token.is_shown(headers))
    }
}

fn read(path: &Path) -> Result<Vec<Token>, TokenError> {
    let (first, mut others) = token::read(path)?;
    others.insert(0, first);
    Ok(others)
}

async fn follow(
    path: PathBuf,
    mut changes: watch::Receiver<()>,
    all: Arc<ArcSwap<Vec<Token>>>,
    tell: watch::Sender<()>,
) {
    let mut of_file = all.load_full();
    let mut forget_at = None;
    loop {
        let forgetting = async {
            match forget_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = forgetting => {
                all.store(of_file.clone());
                forget_at = None;
                tracing::info!("the token before the present one counts no longer");
                continue;
            }
            told = changes.changed() => if told.is_err() { return },
        }
        let target = path.clone();
        match tokio::task::spawn_blocking(move || read(&target)).await {
            Ok(Ok(new)) if new == *of_file => {}
            Ok(Ok(new)) => {
                // Who has brought the present one in before has said himself what counts until when.
                let is_sudden = !of_file.contains(&new[0]);
                let before = of_file.iter().filter(|token| is_sudden && !new.contains(token));
                let both: Vec<Token> = new.iter().chain(before).cloned().collect();
                forget_at = (both.len() > new.len()).then(|| Instant::now() + OVERLAP);
                let (count, minutes) = (new.len(), forget_at.map_or(0, |_| OVERLAP.as_secs() / 60));
                tracing::info!(
                    file = %path.display(),
                    count,
                    minutes,
                    "the token has changed; the one before counts for so many minutes"
                );
                all.store(Arc::new(both));
                of_file = Arc::new(new);
                tell.send_replace(());
            }
            Ok(Err(error)) => tracing::warn!(%error, "the token stays as it was"),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn until(is_so: impl Fn() -> bool) {
        let looking = async {
            while !is_so() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), looking).await.unwrap();
    }

    #[tokio::test]
    async fn a_new_token_counts_at_once_and_the_one_before_for_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let first = token::rotate(&path).unwrap();
        let tokens = Tokens::follow(&path).unwrap();
        assert!(tokens.all()[0] == first && tokens.all().len() == 1);
        let second = token::rotate(&path).unwrap();
        until(|| tokens.all()[0] == second).await;
        assert_eq!(**tokens.all(), [second.clone(), first]);
        // What is no token changes nothing.
        std::fs::write(&path, "short").unwrap();
        let third = token::rotate(&path).unwrap();
        until(|| tokens.all()[0] == third).await;
        assert_eq!(**tokens.all(), [third.clone(), second]);
        tokio::time::pause();
        tokio::time::sleep(OVERLAP + Duration::from_secs(1)).await;
        assert_eq!(**tokens.all(), [third]);
    }

    #[tokio::test]
    async fn a_file_with_several_says_itself_how_long_each_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let (old, new) = (token::rotate(&path).unwrap(), Token::make().unwrap());
        let tokens = Tokens::follow(&path).unwrap();
        // Known everywhere, then shown everywhere, then alone.
        for step in [vec![&old, &new], vec![&new, &old], vec![&new]] {
            let changed = tokens.changed();
            let lines: Vec<&str> = step.iter().map(|token| token.reveal()).collect();
            std::fs::write(&path, lines.join("\n")).unwrap();
            tokio::time::timeout(Duration::from_secs(20), changed).await.unwrap();
            assert_eq!(tokens.all().iter().collect::<Vec<_>>(), step);
        }
    }
}
