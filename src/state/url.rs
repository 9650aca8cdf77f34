//! The address of a store: it may hold a password, which nothing ever shows.

use std::fmt;

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What stands for a password.
const HIDDEN: &str = "***";

/// Where a store is: `redis://[user:password@]host[:port][/db]`, with `rediss` over TLS, and `valkey` for `redis`; or nowhere.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Url(String);

impl Url {
    /// An address as it is written. What is wrong with it is told by [`Url::check`], since whoever reads a file repeats the
    /// line that is wrong.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How it is reached.
    pub(super) fn info(&self) -> Result<ConnectionInfo, String> {
        const HINT: &str = "it is redis://[user:password@]host[:port][/db], or rediss:// for TLS";
        let Some((scheme, _)) = self.0.split_once("://") else { return Err(format!("that is no address: {HINT}")) };
        if !matches!(scheme, "redis" | "rediss" | "valkey" | "valkeys") {
            return Err(format!("'{scheme}' is no kind of store that is known here: {HINT}"));
        }
        // What the library says may repeat what it was given.
        let info = self.0.as_str().into_connection_info().map_err(|_| format!("that cannot be read: {HINT}"))?;
        let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) = info.addr() else {
            return Err(format!("that is no host: {HINT}"));
        };
        if host.is_empty() { Err(format!("there is no host in it: {HINT}")) } else { Ok(info) }
    }

    /// What is wrong with it, if it is none.
    pub fn check(&self) -> Result<(), String> {
        if self.is_empty() { Ok(()) } else { self.info().map(drop) }
    }
}

/// The same text with stars for the passwords of all addresses in it; as long as it was, so that places in it stay.
pub fn masked(text: &str) -> String {
    let mut out = text.to_owned();
    let mut from = 0;
    while let Some(found) = out.get(from..).and_then(|rest| rest.find("://")) {
        let start = from + found + 3;
        let end = out[start..]
            .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\''))
            .map_or(out.len(), |at| start + at);
        if let Some(at) = out[start..end].rfind('@') {
            let secret = out[start..start + at].find(':').map_or(start, |colon| start + colon + 1);
            let hidden = "*".repeat(out[secret..start + at].chars().count());
            out.replace_range(secret..start + at, &hidden);
        }
        from = start;
    }
    out
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((scheme, rest)) = self.0.split_once("://") else {
            return f.write_str(if self.is_empty() { "" } else { HIDDEN });
        };
        match rest.rsplit_once('@') {
            None => write!(f, "{scheme}://{rest}"),
            Some((user, host)) => match user.split_once(':') {
                Some((user, _)) => write!(f, "{scheme}://{user}:{HIDDEN}@{host}"),
                None => write!(f, "{scheme}://{user}@{host}"),
            },
        }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from).map(Self)
    }
}

/// As it may be shown.
impl Serialize for Url {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        for (text, shown) in [
            ("redis://h", "redis://h"),
            ("redis://:secret@h:1/2", "redis://:***@h:1/2"),
            ("rediss://ada:se@cr:et@h", "rediss://ada:***@h"),
            ("redis://ada@h", "redis://ada@h"),
            ("secret", "***"),
            ("", ""),
        ] {
            let url = Url::new(text);
            assert_eq!(
                format!("{url} {url:?} {}", toml::Value::try_from(&url).unwrap()),
                format!("{shown} {shown} \"{shown}\"")
            );
        }
        let line = "url = \"redis://ada:secret@h\" # and redis://:other@h, but not http://h:1";
        assert_eq!(masked(line), "url = \"redis://ada:******@h\" # and redis://:*****@h, but not http://h:1");
    }

    #[test]
    fn what_is_no_store_is_refused_without_repeating_it() {
        for text in ["secret", "http://ada:secret@h", "redis://ada:secret@", "redis://ada:secret@h:x", "unix:///secret"]
        {
            let error = Url::new(text).check().unwrap_err();
            assert!(error.contains("redis://") && !error.contains("secret"), "{text}: {error}");
        }
        for text in ["", "redis://h", "rediss://u:p@h:6380/1", "valkey://[::1]:1", "valkeys://h"] {
            Url::new(text).check().unwrap();
        }
    }
}
