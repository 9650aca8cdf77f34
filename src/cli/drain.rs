//! `olol drain` and `olol undrain`: a server finishes what it has and gets nothing new, until it is let in again.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use http::header::{self, HeaderValue};
use serde_json::Value;

use crate::ollama::{Ask, Ollama};

/// The longest answer, bytes.
const LONGEST: usize = 1 << 20;
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
    /// Key to ask with, if the proxy wants one
    #[arg(long, env = "OLOL_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Host of the proxy
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Its port
    #[arg(long, default_value_t = 8000)]
    port: u16,
}

impl Arguments {
    /// Tells the proxy, and the person what came of it.
    pub(super) fn run(self, drains: bool) -> anyhow::Result<()> {
        super::runtime(1)?.block_on(async {
            let proxy = super::ollama_at(&self.host, self.port)?;
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
        let mut ask = Ask { path: path.parse()?, infers: false, ..Ask::post("/", Vec::new()) };
        if let Some(key) = &self.key {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            ask.headers.insert(header::AUTHORIZATION, value.context("the key has characters that no key has")?);
        }
        let reply = super::send(proxy, ask).await?;
        let status = reply.status;
        let told: Value = serde_json::from_slice(&reply.body.collect(LONGEST).await?).unwrap_or_default();
        if !status.is_success() {
            let error = told["error"].as_str().or(told["error"]["message"].as_str());
            bail!("{} (status {})", error.unwrap_or("this is no OLOL proxy, or an older one"), status.as_u16());
        }
        Ok(told["in_flight"].as_u64().unwrap_or_default())
    }
}
