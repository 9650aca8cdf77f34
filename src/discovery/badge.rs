//! What an agent says of itself to whoever looks for one: on the network over mDNS, and to whoever knocks over HTTP.
//!
//! Anybody can read it and anybody can say the same, so it decides what is shown and who is asked for proof, never who is
//! trusted.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use http::HeaderValue;
use ring::hmac;
use tokio::sync::watch;

use crate::security::Token;

/// The header in which an agent says it to who asks in plain HTTP.
pub const HEADER: &str = "olol-agent";

/// The longest of its words.
const LONGEST: usize = 63;

/// What an agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Badge {
    /// Its name.
    pub name: String,
    /// What tells this process from all others.
    pub instance: String,
    /// What tells its cluster from others, for each of its tokens, with `+` between.
    pub cluster: String,
    /// Whether it is reached over TLS.
    pub is_tls: bool,
    /// Its version.
    pub version: String,
}

/// Tells what an agent says of itself now: its token may change.
#[derive(Clone)]
pub struct Tells {
    tell: Arc<dyn Fn() -> Badge + Send + Sync>,
    /// How many proxies watch the agent, if that is known.
    watchers: Option<watch::Receiver<usize>>,
}

impl Tells {
    /// Asks this whenever somebody wants to know.
    pub fn new(tell: impl Fn() -> Badge + Send + Sync + 'static) -> Self {
        Self { tell: Arc::new(tell), watchers: None }
    }

    /// The same of an agent that so many watch.
    #[must_use]
    pub fn watched_by(self, watchers: watch::Receiver<usize>) -> Self {
        Self { watchers: Some(watchers), ..self }
    }

    /// Whether it is known that no proxy watches the agent.
    pub(super) fn is_unheard(&self) -> bool {
        self.watchers.as_ref().is_some_and(|watchers| *watchers.borrow() == 0)
    }

    /// What it says now.
    pub fn now(&self) -> Badge {
        (self.tell)()
    }
}

impl fmt::Debug for Tells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tells").field(&self.now()).finish()
    }
}

/// What tells a cluster from others, as a badge says it.
pub(crate) fn clusters(tokens: &[Token]) -> String {
    let most = (LONGEST + 1) / 17;
    tokens.iter().take(most).map(cluster).collect::<Vec<_>>().join("+")
}

/// What tells a cluster from others. It is the same for all that have the token, and tells nothing of it.
pub fn cluster(token: &Token) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.reveal().as_bytes());
    let mac = hmac::sign(&key, b"olol cluster");
    let head = mac.as_ref().iter().take(8).fold(0, |number: u64, byte| (number << 8) | u64::from(*byte));
    format!("{head:016x}")
}

impl Badge {
    /// As pairs, for a record of DNS.
    pub(super) fn pairs(&self) -> Vec<(&'static str, String)> {
        vec![
            ("txtvers", "1".to_owned()),
            ("name", word(&self.name)),
            ("id", self.instance.clone()),
            ("cluster", self.cluster.clone()),
            ("tls", if self.is_tls { "yes" } else { "no" }.to_owned()),
            ("version", self.version.clone()),
        ]
    }

    /// What pairs say. What is not said is empty, and what nobody would say of himself is not taken.
    pub(super) fn of<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut said: HashMap<&str, String> = pairs.map(|(key, value)| (key, word(value))).collect();
        let mut take = |key| said.remove(key).unwrap_or_default();
        Self {
            name: take("name"),
            instance: take("id"),
            cluster: take("cluster"),
            is_tls: take("tls") == "yes",
            version: take("version"),
        }
    }

    /// As the value of [`HEADER`].
    pub fn header(&self) -> HeaderValue {
        let pairs: Vec<String> = self.pairs().iter().map(|(key, value)| format!("{key}={}", word(value))).collect();
        HeaderValue::try_from(pairs.join("; ")).unwrap_or(HeaderValue::from_static(""))
    }

    /// What a header says.
    pub(super) fn of_header(value: &HeaderValue) -> Self {
        let text = value.to_str().unwrap_or_default();
        Self::of(text.split(';').filter_map(|pair| pair.trim().split_once('=')))
    }
}

/// A word as it may stand in names, logs and pages, whoever said it.
pub(super) fn word(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.+".contains(*c)).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise;

    #[test]
    fn a_badge_says_nothing_that_a_page_could_not_show() {
        const PIECES: &[&str] = &[
            "name",
            "id",
            "cluster",
            "tls",
            "version",
            "=",
            ";",
            " ",
            "yes",
            "\t",
            "\u{1b}[2J",
            "\"",
            "<b>",
            "gpu1",
            "ä",
            "../",
            "a=b; ",
        ];
        for text in noise::texts(PIECES, noise::MANY) {
            let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) else { continue };
            let badge = Badge::of_header(&value);
            let is_word = |text: &String| text.len() <= LONGEST && word(text) == *text;
            assert!(
                [&badge.name, &badge.instance, &badge.cluster, &badge.version].into_iter().all(is_word),
                "{text:?}"
            );
            assert_eq!(Badge::of_header(&badge.header()), badge);
        }
    }

    #[test]
    fn a_cluster_is_known_by_its_token_and_does_not_tell_it() {
        let (one, other) = (Token::make().unwrap(), Token::make().unwrap());
        assert_eq!((cluster(&one), cluster(&one).len()), (cluster(&one.clone()), 16));
        assert_ne!(cluster(&one), cluster(&other));
        assert!(!one.reveal().contains(&cluster(&one)));
    }

    #[test]
    fn what_is_said_is_heard_and_no_more_than_that() {
        let badge = Badge {
            name: "gpu1".to_owned(),
            instance: "0123".to_owned(),
            cluster: "abcd".to_owned(),
            is_tls: true,
            version: "0.1.0".to_owned(),
        };
        assert_eq!(Badge::of_header(&badge.header()), badge);
        let odd = Badge::of([("name", "a\u{1b}[2J b\n\"c"), ("tls", "maybe"), ("more", "x")].into_iter());
        assert_eq!(odd, Badge { name: "a2Jbc".to_owned(), ..Badge::default() });
        let long = Badge::of([("name", &*"x".repeat(500))].into_iter());
        assert_eq!(long.name.len(), LONGEST);
    }
}
