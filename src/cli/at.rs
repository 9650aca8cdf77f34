//! A running proxy that a command asks, and the key that it shows there.

use anyhow::{Context, bail};
use clap::Args;
use http::header::{self, HeaderValue, InvalidHeaderValue};
use serde_json::Value;

use super::flags::TlsFlags;
use crate::ollama::{Ask, Ollama};

/// The longest answer, bytes.
const LONGEST: usize = 16 << 20;

/// Where the proxy is.
#[derive(Debug, Args)]
pub(super) struct At {
    /// Key to ask with, if the proxy wants one
    #[arg(long, env = "OLOL_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Host of the proxy
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Its port
    #[arg(long, default_value_t = 8000)]
    port: u16,
    #[command(flatten)]
    tls: TlsFlags,
}

impl At {
    /// The proxy.
    pub(super) fn proxy(&self) -> anyhow::Result<Ollama> {
        super::ollama_at(&self.host, self.port, &self.tls)
    }

    /// Asks it, and returns what it tells; that it refuses is an error.
    pub(super) async fn told(&self, proxy: &Ollama, mut ask: Ask) -> anyhow::Result<Value> {
        if let Some(key) = &self.key {
            ask.headers.insert(header::AUTHORIZATION, bearer(key).context("the key has characters that no key has")?);
        }
        let reply = super::send(proxy, ask).await?;
        let status = reply.status;
        let told = reply.body.collect(LONGEST).await?;
        if !status.is_success() {
            bail!("{} (status {})", refusal(&told), status.as_u16());
        }
        Ok(serde_json::from_slice(&told).unwrap_or_default())
    }
}

/// The header that shows a key.
pub(super) fn bearer(key: &str) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {}", key.trim()))?;
    header.set_sensitive(true);
    Ok(header)
}

/// Why a proxy refuses, or what answers in its place.
pub(super) fn refusal(body: &[u8]) -> String {
    let told: Value = serde_json::from_slice(body).unwrap_or_default();
    let other = || {
        let speaks_tls = memchr::memmem::find(body, b"HTTPS").is_some();
        if speaks_tls {
            "what answers there speaks TLS: say https://"
        } else {
            "what answers there is no OLOL proxy, or an older one"
        }
    };
    error_in(&told).unwrap_or_else(other).to_owned()
}

/// What a refusal says, in whichever dialect.
pub(super) fn error_in(told: &Value) -> Option<&str> {
    told["error"].as_str().or(told["error"]["message"].as_str())
}
