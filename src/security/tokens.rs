//! The tokens that count now: that of the cluster, and, after it was changed, for a while the one before.
//!
//! Machines get a new token one after the other. Until the last has it, they prove themselves to each other with whichever
//! both know.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use http::HeaderMap;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::token::{self, Token, TokenError};
use crate::watch::watch;

/// How long the token before still counts.
pub const OVERLAP: Duration = Duration::from_secs(60 * 60);

/// The tokens that count, the present one first. Clones share them.
#[derive(Clone, Debug)]
pub struct Tokens {
    all: Arc<ArcSwap<Vec<Token>>>,
    // Ends with the last clone.
    _following: Option<Arc<AbortOnDropHandle<()>>>,
}

impl From<Token> for Tokens {
    /// One that stays as it is.
    fn from(token: Token) -> Self {
        Self { all: Arc::new(ArcSwap::from_pointee(vec![token])), _following: None }
    }
}

impl Tokens {
    /// That of a file, which is read again when it changes.
    pub fn follow(path: &Path) -> Result<Self, TokenError> {
        // Watched before it is read: no change is missed.
        let changes = watch(path);
        let all = Arc::new(ArcSwap::from_pointee(vec![token::read(path)?]));
        let task = tokio::spawn(follow(path.to_owned(), changes, all.clone()));
        Ok(Self { all, _following: Some(Arc::new(AbortOnDropHandle::new(task))) })
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

async fn follow(path: PathBuf, mut changes: tokio::sync::watch::Receiver<()>, all: Arc<ArcSwap<Vec<Token>>>) {
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
                all.rcu(|all| all[..1].to_vec());
                forget_at = None;
                tracing::info!("the token before the present one counts no longer");
                continue;
            }
            told = changes.changed() => if told.is_err() { return },
        }
        let target = path.clone();
        match tokio::task::spawn_blocking(move || token::read(&target)).await {
            Ok(Ok(token)) if token == all.load()[0] => {}
            Ok(Ok(token)) => {
                all.rcu(|all| vec![token.clone(), all[0].clone()]);
                forget_at = Some(Instant::now() + OVERLAP);
                let minutes = OVERLAP.as_secs() / 60;
                tracing::info!(file = %path.display(), minutes, "the token has changed; the one before counts for a while");
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
}
