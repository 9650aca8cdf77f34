//! `olol token`: prints the token of the cluster, for the next machine.

use anyhow::{Context, bail};
use clap::Args;

use super::{print, say};
use crate::security::token;

/// Print the token that the machines of a cluster share.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Make a new one: every machine of the cluster needs it then
    #[arg(long)]
    rotate: bool,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let given = token::of_environment()?;
        if !self.rotate {
            let token = given.into_iter().next().map_or_else(token::of_folder, Ok)?;
            return print(&format!("{}\n", token.reveal()));
        }
        if !given.is_empty() {
            bail!("OLOL_TOKEN gives the token here: change it there, or unset it to make one in the file");
        }
        let file = token::file().context("there is no home folder to keep the token of the cluster in")?;
        let token = token::rotate(&file)?;
        say(&format!(
            "A new token stands in {}. What runs on this machine takes it up by itself, and the one before counts for another \
             hour: give the new one to every other machine of the cluster until then.\n",
            file.display()
        ));
        print(&format!("{}\n", token.reveal()))
    }
}
