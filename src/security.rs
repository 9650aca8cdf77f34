//! Who belongs to the cluster: whoever has its token, or a certificate of its CA.
//!
//! | module | what it does |
//! |---|---|
//! | [`token`] | the secret that machines of one cluster share |
//! | [`tokens`] | those that count, while it is changed |
//! | [`proof`] | proves to both ends of a connection that they know it |
//! | [`tls`] | TLS, with certificates that may change |
//! | [`certs`] | makes certificates |
//! | `seldom` | keeps the log short that strangers could fill |

pub mod certs;
pub mod proof;
mod seldom;
pub mod tls;
pub mod token;
pub mod tokens;

use std::path::PathBuf;

use olol_middleware::{Pattern, ServerId};
use serde::{Deserialize, Serialize};

use crate::pool::credentials::Credentials;

pub use seldom::Seldom;
pub use token::{Token, TokenError};
pub use tokens::Tokens;

/// The `[security]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// File with the token of the cluster; empty: `token` in the user's configuration folder.
    pub token_file: PathBuf,
    /// The tokens themselves, where the environment gives them, the one that is shown first. They are in no file of
    /// configuration and on no page.
    #[serde(skip)]
    pub given: Vec<Token>,
}

/// How a proxy and its servers know each other.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// How agents are reached over TLS, where the CA of the cluster is known.
    pub tls: Option<tls::Connector>,
    /// Whether an agent is reached over TLS or not at all.
    pub insists: bool,
    /// What is proved to them, and they must prove; `None` where no server asks for one.
    pub tokens: Option<Tokens>,
    /// Whether somebody has given the token, so that it is one and the same at all of the cluster.
    pub is_token_given: bool,
    /// How Ollamas at `https://` are reached.
    pub web: tls::Web,
    /// What Ollamas are shown.
    pub credentials: Credentials,
}

/// Whether an agent is reached over TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// If the CA of the cluster is known.
    #[default]
    Usual,
    /// Yes.
    Tls,
    /// No.
    Plain,
}

impl Trust {
    /// The key of what proxies tell each other of conversations, by way of the agents or of a store: it comes from the token, so
    /// that nobody else can try guesses. Machines that know each other by certificates may have made a token each, which would
    /// keep them from understanding each other; there it counts only if somebody has given it. Without it nobody but machines
    /// of the cluster hears what is told, since they talk over TLS alone.
    pub fn turn_key(&self) -> Option<u64> {
        let tokens = self.tokens.as_ref().filter(|_| self.tls.is_none() || self.is_token_given)?;
        tokens.all().first().map(|token| token.number(b"olol turns"))
    }

    /// What is shown to a server that is reached so.
    #[must_use]
    pub fn over(&self, wire: Wire) -> Self {
        let tls = self.tls.clone().filter(|_| wire != Wire::Plain);
        Self { tls, insists: wire == Wire::Tls, ..self.clone() }
    }
}

/// What is meant for a server: under its very name, or else under a pattern that stands for several.
pub(crate) fn meant_for<'a, T>(all: &'a [(Pattern, T)], server: &ServerId) -> Option<&'a T> {
    let fits = |(pattern, _): &&(Pattern, T)| pattern.matches(server.as_str());
    let named = all.iter().filter(|(pattern, _)| pattern.is_plain()).find(fits);
    named.or_else(|| all.iter().find(fits)).map(|(_, meant)| meant)
}

impl Config {
    /// Whether somebody has given the token, or named its file.
    pub fn is_given(&self) -> bool {
        !self.given.is_empty() || !self.token_file.as_os_str().is_empty()
    }

    /// The token that the environment gives, else that of the file that is named, else that of the user's folder, which is
    /// made if it is not there. Where there are several it is the first.
    pub fn token(&self) -> Result<Token, TokenError> {
        match self.given.first() {
            Some(token) => Ok(token.clone()),
            None if self.token_file.as_os_str().is_empty() => token::of_folder(),
            None => token::read(&self.token_file).map(token::first),
        }
    }

    /// The same, and what comes of it when the file that holds it changes.
    pub fn tokens(&self) -> Result<Tokens, TokenError> {
        match self.given.first() {
            Some(_) => Ok(Tokens::fixed(self.given.clone())),
            None if self.token_file.as_os_str().is_empty() => {
                // Makes it if it is not there.
                let token = token::of_folder()?;
                token::file().map_or_else(|| Ok(token.into()), |file| Tokens::follow(&file))
            }
            None => Tokens::follow(&self.token_file),
        }
    }
}
