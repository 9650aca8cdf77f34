//! `olol drain` and `olol undrain`: a server finishes what it has and gets nothing new, until it is let in again.

use std::time::Duration;

use clap::Args;

use super::at::At;
use crate::ollama::{Ask, Ollama};

/// Time between two looks whether a server has finished.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Which server, and where the proxy is.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Name of the server, as /api/status/servers shows it
    server: String,
    /// Wait until the server has finished what it has
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    at: At,
}

impl Arguments {
    /// Tells the proxy, and the person what came of it.
    pub(super) fn run(self, drains: bool) -> anyhow::Result<()> {
        super::runtime(1)?.block_on(async {
            let proxy = self.at.proxy()?;
            let mut left = self.tell(&proxy, drains).await?;
            if !drains {
                return super::print(&format!("{} takes calls again\n", self.server));
            }
            while self.wait && left > 0 {
                tokio::time::sleep(LOOK_EVERY).await;
                left = self.tell(&proxy, drains).await?;
            }
            let more = match left {
                0 => "has nothing left to do".to_owned(),
                1 => "finishes 1 call".to_owned(),
                left => format!("finishes {left} calls"),
            };
            super::print(&format!("{} gets nothing new, and {more}\n", self.server))
        })
    }

    /// Returns how many calls the server is answering. To say the same twice changes nothing.
    async fn tell(&self, proxy: &Ollama, drains: bool) -> anyhow::Result<u64> {
        let what = if drains { "drain" } else { "undrain" };
        let path = format!("/api/status/servers/{}/{what}", super::explain::escaped(&self.server).replace('/', "%2F"));
        let ask = Ask { path: path.parse()?, infers: false, ..Ask::post("/", Vec::new()) };
        let told = self.at.told(proxy, ask).await?;
        Ok(told["in_flight"].as_u64().unwrap_or_default())
    }
}
