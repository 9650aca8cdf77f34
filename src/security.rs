//! Who belongs to the cluster: whoever has its token.
//!
//! | module | what it does |
//! |---|---|
//! | [`token`] | the secret that machines of one cluster share |

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
    /// The token; `None` where no server asks for one.
    pub token: Option<Token>,
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
