//! Who belongs to the cluster: whoever has its token, or a certificate of its CA.
//!
//! | module | what it does |
//! |---|---|
//! | [`token`] | the secret that machines of one cluster share |
//! | [`tls`] | TLS, with certificates that may change |
//! | [`certs`] | makes certificates |

pub mod certs;
pub mod tls;
pub mod token;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use token::{Token, TokenError};

/// The `[security]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// File with the token of the cluster; empty: `token` in the user's configuration folder.
    pub token_file: PathBuf,
    /// The token itself, where the environment gives it. It is in no file of configuration and on no page.
    #[serde(skip)]
    pub token: Option<Token>,
}

/// What a proxy shows to servers.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// How agents are reached over TLS, where the CA of the cluster is known.
    pub tls: Option<tls::Connector>,
    /// Whether an agent is reached over TLS or not at all.
    pub insists: bool,
    /// The token; `None` where no server asks for one.
    pub token: Option<Token>,
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
    /// The key of what proxies tell each other of conversations, by way of the agents: it comes from the token, so that nobody
    /// else can try guesses. Machines that know each other by certificates may have a token each, and talk over TLS alone.
    pub fn turn_key(&self) -> Option<u64> {
        let token = self.token.as_ref().filter(|_| self.tls.is_none())?;
        Some(token.number(b"olol turns"))
    }

    /// What is shown to a server that is reached so.
    #[must_use]
    pub fn over(&self, wire: Wire) -> Self {
        let tls = self.tls.clone().filter(|_| wire != Wire::Plain);
        Self { tls, insists: wire == Wire::Tls, ..self.clone() }
    }
}

impl Config {
    /// The token that the environment gives, else that of the file that is named, else that of the user's folder, which is
    /// made if it is not there.
    pub fn token(&self) -> Result<Token, TokenError> {
        match &self.token {
            Some(token) => Ok(token.clone()),
            None if self.token_file.as_os_str().is_empty() => token::of_folder(),
            None => token::read(&self.token_file),
        }
    }
}
