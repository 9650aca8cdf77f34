//! `olol certs`: makes a CA for the cluster, and certificates of it.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};

use super::{print, say};
use crate::security::certs::{self, Made, Order};

/// Make a CA for the cluster, and certificates of it.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// Folder of the certificates [default: certs in ~/.config/olol]
    #[arg(long, global = true, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the CA: ca.pem, which every machine needs, and ca.key, which stays here
    Init {
        /// Days that it holds
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
    /// Make a certificate of the CA: NAME.pem and NAME.key
    Issue {
        /// Name of the machine, or of the client
        name: String,
        /// Name or address under which the machine is reached; may be given several times [default: NAME]
        #[arg(long, value_name = "HOST")]
        host: Vec<String>,
        /// For a client of the proxy: agents do not take it
        #[arg(long, conflicts_with = "host")]
        client: bool,
        /// Days that it holds
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = self.dir.or_else(certs::folder);
        let folder = folder.context("there is no home folder to keep certificates in; say --dir FOLDER")?;
        let Made { cert, key } = match self.action {
            Action::Init { days } => {
                let made = certs::init(&folder, days)?;
                say(
                    "A CA was made. Its certificate goes to every machine of the cluster; its key stays here, and signs what \
                     `olol certs issue NAME` makes.\n",
                );
                made
            }
            Action::Issue { name, host, client, days } => {
                let made = certs::issue(&folder, &Order { name, hosts: host, is_client: client, days })?;
                say(
                    "A certificate was made. Bring both files, and ca.pem, to where they are needed; the key is for its owner \
                     alone.\n",
                );
                made
            }
        };
        print(&format!("{}\n{}\n", cert.display(), key.display()))
    }
}
