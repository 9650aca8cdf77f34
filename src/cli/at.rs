//! A running proxy that a command asks, and the key that it shows there.

use std::net::Ipv6Addr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use http::header::{self, HeaderValue, InvalidHeaderValue};
use olol_middleware::Reply;
use serde_json::Value;

use super::Whom;
use super::flags::TlsFlags;
use crate::ollama::{Ask, Endpoint, Ollama};

/// The longest answer, bytes.
const LONGEST: usize = 256 << 20;
/// Where a proxy is if nobody says it.
const HOST: &str = "127.0.0.1";
const PORT: u16 = 8000;

/// Where the proxy is, and what it is shown.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// Where the proxy is [default: http://127.0.0.1:8000]
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"], global = true)]
    url: Option<String>,
    /// Its host; --url says the same
    #[arg(long, hide = true, global = true)]
    host: Option<String>,
    /// Its port
    #[arg(long, hide = true, global = true)]
    port: Option<u16>,
    /// Key to ask with, if one is needed; the proxy's own pages want an admin's
    #[arg(long, env = "OLOL_KEY", hide_env_values = true, global = true)]
    key: Option<String>,
    /// File whose first line is that key
    #[arg(long, value_name = "FILE", conflicts_with = "key", global = true)]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsFlags,
}

impl Place {
    /// The proxy there.
    pub(super) fn proxy(&self) -> anyhow::Result<Proxy> {
        self.asked(Whom::Proxy)
    }

    /// The proxy there, or any Ollama.
    pub(super) fn ollama(&self) -> anyhow::Result<Proxy> {
        self.asked(Whom::Ollama)
    }

    fn asked(&self, whom: Whom) -> anyhow::Result<Proxy> {
        let url = self.url()?;
        let endpoint = Endpoint::parse(&url, PORT)
            .with_context(|| format!("--url must say where {whom} is: http://HOST:PORT or https://HOST:PORT"))?;
        Ok(Proxy { at: super::reach(&url, endpoint, &self.tls)?, key: self.shown_key()?, url, whom })
    }

    fn url(&self) -> anyhow::Result<String> {
        match (&self.url, &self.host, self.port) {
            (Some(url), ..) => Ok(url.clone()),
            (None, host, port) => joined(host.as_deref().unwrap_or(HOST), port.unwrap_or(PORT)),
        }
    }

    fn shown_key(&self) -> anyhow::Result<Option<HeaderValue>> {
        let key = match (&self.key, &self.key_file) {
            (Some(key), _) => key.clone(),
            (None, Some(file)) => {
                let text = std::fs::read_to_string(file);
                let text = text.with_context(|| format!("cannot read the key in {}", file.display()))?;
                text.lines().next().unwrap_or_default().to_owned()
            }
            (None, None) => return Ok(None),
        };
        Ok(Some(bearer(&key).context("the key has characters that no key has")?))
    }
}

/// The URL of a host, before which `https://` may stand, and a port.
fn joined(host: &str, port: u16) -> anyhow::Result<String> {
    let (scheme, bare) = host.trim_end_matches('/').split_once("://").unwrap_or(("http", host));
    let is_v6 = bare.split('%').next().is_some_and(|bare| bare.parse::<Ipv6Addr>().is_ok());
    if is_v6 {
        return Ok(format!("{scheme}://[{bare}]:{port}"));
    }
    if bare.contains('/') || (bare.contains(':') && !bare.ends_with(']')) {
        bail!("--host '{host}' is more than a host: say --url {scheme}://{bare} in place of --host and --port");
    }
    Ok(format!("{scheme}://{bare}:{port}"))
}

/// A running proxy; or an Ollama, where any will do.
pub(super) struct Proxy {
    at: Ollama,
    url: String,
    key: Option<HeaderValue>,
    whom: Whom,
}

impl Proxy {
    /// Where it is, as it was said.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Where it is.
    pub(super) fn endpoint(&self) -> &Endpoint {
        self.at.endpoint()
    }

    /// One of its pages.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let told = self.told(Ask { path: path.parse()?, ..Ask::get("/") }).await?;
        if told.is_object() { Ok(told) } else { bail!("{}: what answers there is no OLOL proxy", self.url) }
    }

    /// The answer to something, whatever it is.
    pub(super) async fn answer(&self, mut ask: Ask) -> anyhow::Result<Reply> {
        ask.headers.extend(self.key.clone().map(|key| (header::AUTHORIZATION, key)));
        super::send(&self.at, ask, self.whom).await
    }

    /// What it tells; that it refuses is an error.
    pub(super) async fn told(&self, ask: Ask) -> anyhow::Result<Value> {
        let reply = self.answer(ask).await?;
        if reply.status.is_success() {
            return Ok(serde_json::from_slice(&reply.body.collect(LONGEST).await?).unwrap_or_default());
        }
        Err(self.refusal(reply).await)
    }

    /// Why it refuses.
    pub(super) async fn refusal(&self, reply: Reply) -> anyhow::Error {
        let status = reply.status.as_u16();
        match reply.body.collect(LONGEST).await {
            Ok(body) => anyhow::anyhow!("{}: {} (status {status}){}", self.url, refusal(&body), hint(status)),
            Err(error) => error.into(),
        }
    }
}

/// What to do about a refusal.
pub(super) fn hint(status: u16) -> &'static str {
    match status {
        401 | 403 => "; give the key as --key, --key-file or OLOL_KEY",
        _ => "",
    }
}

/// The header that shows a key.
fn bearer(key: &str) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {}", key.trim()))?;
    header.set_sensitive(true);
    Ok(header)
}

/// Why a proxy refuses, or what answers in its place.
fn refusal(body: &[u8]) -> String {
    let told: Value = serde_json::from_slice(body).unwrap_or_default();
    let other = || {
        let speaks_tls = memchr::memmem::find(body, b"HTTPS").is_some();
        if speaks_tls {
            "what answers there speaks TLS: say https://"
        } else if body.trim_ascii() == b"404 page not found" {
            // The words of an Ollama, and so of a proxy, for what they do not know.
            "what answers there is an Ollama and no OLOL proxy, or an older one"
        } else {
            "what answers there is no OLOL proxy, or an older one"
        }
    };
    told["error"].as_str().or(told["error"]["message"].as_str()).unwrap_or_else(other).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_a_port_are_a_url() {
        for (host, url) in [
            ("gpu1", "http://gpu1:8001"),
            ("https://gpu1/", "https://gpu1:8001"),
            ("::1", "http://[::1]:8001"),
            ("[::1]", "http://[::1]:8001"),
            ("fe80::1%eth0", "http://[fe80::1%eth0]:8001"),
        ] {
            assert_eq!(joined(host, 8001).unwrap(), url);
        }
        for (host, url) in [
            ("gpu1:80", "say --url http://gpu1:80 in place"),
            ("http://gpu1:80/", "say --url http://gpu1:80 in place"),
            ("https://gpu1/x", "say --url https://gpu1/x in place"),
            ("[::1]:80", "say --url http://[::1]:80 in place"),
        ] {
            let error = joined(host, 8001).unwrap_err().to_string();
            assert!(error.contains(url), "{host}: {error}");
        }
    }

    #[test]
    fn what_answers_in_the_place_of_a_proxy_is_told() {
        for (body, told) in [
            (&br#"{"error":"no"}"#[..], "no"),
            (br#"{"error":{"message":"no"}}"#, "no"),
            (b"404 page not found", "is an Ollama"),
            (b"Client sent an HTTP request to an HTTPS server", "say https://"),
            (b"<html>", "is no OLOL proxy"),
        ] {
            assert!(refusal(body).contains(told), "{}", refusal(body));
        }
    }
}
