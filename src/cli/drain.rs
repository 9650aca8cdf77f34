//! `olol drain` and `olol undrain`: a server finishes what it has and gets nothing new, until it is let in again.

use std::time::Duration;

use clap::Args;

use super::at::{Place, Proxy};
use crate::ollama::Ask;

/// Time between two looks whether a server has finished.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Which server is drained, and where the proxy is.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    at: At,
    /// Wait until the server has finished what it has
    #[arg(long)]
    wait: bool,
}

/// Which server, and where the proxy is.
#[derive(Debug, Args)]
pub(super) struct At {
    /// Name of the server, as `olol status` shows it
    server: String,
    #[command(flatten)]
    place: Place,
}

impl Arguments {
    /// Tells the proxy, and the person what came of it.
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::runtime(1)?.block_on(async {
            let proxy = self.at.place.proxy()?;
            let mut left = self.at.tell(&proxy, "drain").await?;
            while self.wait && left > 0 {
                tokio::time::sleep(LOOK_EVERY).await;
                left = self.at.tell(&proxy, "drain").await?;
            }
            let more = match left {
                0 => "has nothing left to do".to_owned(),
                1 => "finishes 1 call".to_owned(),
                left => format!("finishes {left} calls"),
            };
            super::print(&format!("{} gets nothing new, and {more}\n", self.at.server))
        })
    }
}

impl At {
    /// Lets the server in again.
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::runtime(1)?.block_on(async {
            self.tell(&self.place.proxy()?, "undrain").await?;
            super::print(&format!("{} takes calls again\n", self.server))
        })
    }

    /// Returns how many calls the server is answering. To say the same twice changes nothing.
    async fn tell(&self, proxy: &Proxy, what: &str) -> anyhow::Result<u64> {
        let path = format!("/api/status/servers/{}/{what}", super::explain::escaped(&self.server).replace('/', "%2F"));
        let ask = Ask { path: path.parse()?, infers: false, ..Ask::post("/", Vec::new()) };
        Ok(proxy.told(ask).await?["in_flight"].as_u64().unwrap_or_default())
    }
}
