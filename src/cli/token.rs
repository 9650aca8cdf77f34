//! `olol token`: prints the token of the cluster, for the next machine.

use anyhow::bail;
use clap::Args;

use super::flags::TokenFlag;
use super::{print, say};
use crate::security::{TokenError, token};

/// Print the token that the machines of a cluster share.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Make a new one: every machine of the cluster needs it then
    #[arg(long)]
    rotate: bool,
    #[command(flatten)]
    token: TokenFlag,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.token.config()?;
        if !self.rotate {
            return print(&format!("{}\n", config.token()?.reveal()));
        }
        if !config.given.is_empty() {
            bail!("OLOL_TOKEN gives the token here: change it there, or unset it to make one in the file");
        }
        let named = Some(config.token_file).filter(|file| !file.as_os_str().is_empty());
        let file = named.or_else(token::file).ok_or(TokenError::NoFolder)?;
        let token = token::rotate(&file)?;
        say(&format!(
            "A new token stands in {}. What runs on this machine takes it up by itself, and the one before counts for another \
             hour: give the new one to every other machine of the cluster until then.\n",
            file.display()
        ));
        print(&format!("{}\n", token.reveal()))
    }
}
