//! `olol status`: the servers, models or clients of a running proxy, as a table; once, or again and again in place.

pub(super) mod table;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use http::header::{self, HeaderValue};
use olol_middleware::Reply;
use serde_json::Value;

use super::Stop;
use super::at::{bearer, refusal};
use super::flags::TlsFlags;
use crate::ollama::{Ask, Endpoint, Ollama};
use table::Look;

/// The longest page, bytes.
const LONGEST: usize = 256 << 20;
/// Entries of a page.
const PAGE: usize = 1000;
/// The most entries that are shown or printed, so that a proxy that never ends does not fill the memory.
const MOST: usize = 1_000_000;
/// Seconds between two looks.
const USUAL: f64 = 2.0;

/// Show the servers, models or clients of a running proxy.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// What is listed [default: servers]
    list: Option<List>,
    #[command(flatten)]
    place: Place,
    /// Print JSON, as the proxy says it: the whole list, or the summary if no list is named
    #[arg(long)]
    json: bool,
    /// Look again and again, every so many seconds [default: 2], until Ctrl-C
    #[arg(long, num_args = 0..=1, default_missing_value = "2", value_name = "SECONDS")]
    watch: Option<Watch>,
}

/// Where the proxy is, and what it is shown.
#[derive(Debug, Args)]
pub(super) struct Place {
    /// Where the proxy is
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL", global = true)]
    url: String,
    /// Key to ask with, if the proxy wants an admin's
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
        Ok(Proxy { at: at(&self.url, &self.tls)?, key: self.shown_key()?, url: self.url.clone() })
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

/// What is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum List {
    /// The servers
    Servers,
    /// The models, and who has them
    Models,
    /// Who asks
    Clients,
    /// The sessions
    Sessions,
}

impl List {
    fn as_str(self) -> &'static str {
        match self {
            Self::Servers => "servers",
            Self::Models => "models",
            Self::Clients => "clients",
            Self::Sessions => "sessions",
        }
    }
}

/// How often it is looked; or, since the number may be left out, what stands behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Watch {
    Every(Duration),
    Of(List),
}

impl FromStr for Watch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(list) = List::from_str(text, false) {
            return Ok(Self::Of(list));
        }
        let seconds = text.parse().ok().filter(|seconds: &f64| (0.1..=86_400.0).contains(seconds));
        let seconds = seconds.ok_or("say how many seconds, from 0.1 to 86400")?;
        Ok(Self::Every(Duration::from_secs_f64(seconds)))
    }
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (list, every) = match (self.list, self.watch) {
            (Some(_), Some(Watch::Of(other))) => bail!("name one list: '{}' is a second one", other.as_str()),
            (None, Some(Watch::Of(list))) => (Some(list), Some(Duration::from_secs_f64(USUAL))),
            (list, Some(Watch::Every(every))) => (list, Some(every)),
            (list, None) => (list, None),
        };
        let proxy = self.place.proxy()?;
        super::runtime(1)?.block_on(async {
            match every {
                None => super::print(&proxy.text(list, self.json).await?),
                Some(every) => proxy.watch(list, self.json, every).await,
            }
        })
    }
}

/// The proxy at a URL.
fn at(url: &str, tls: &TlsFlags) -> anyhow::Result<Ollama> {
    let endpoint = Endpoint::parse(url, 8000)
        .context("--url must say where the proxy is: http://HOST:PORT or https://HOST:PORT")?;
    super::reach(url, endpoint, tls)
}

/// A running proxy.
pub(super) struct Proxy {
    at: Ollama,
    url: String,
    key: Option<HeaderValue>,
}

impl Proxy {
    /// What is printed.
    async fn text(&self, list: Option<List>, json: bool) -> anyhow::Result<String> {
        if json {
            let told = match list {
                Some(list) => self.list(list).await?,
                None => self.get("/api/status").await?,
            };
            return Ok(format!("{told:#}\n"));
        }
        let look = Look::of_stdout();
        match list.unwrap_or(List::Servers) {
            List::Servers => {
                let summary = self.get("/api/status").await?;
                Ok(format!("{}\n{}", table::headline(&summary), table::servers(&self.list(List::Servers).await?, look)))
            }
            List::Models => Ok(table::models(&self.list(List::Models).await?, look)),
            List::Clients => Ok(table::clients(&self.list(List::Clients).await?, look)),
            List::Sessions => Ok(table::sessions(&self.list(List::Sessions).await?, look)),
        }
    }

    /// Shows it again and again: in place on a terminal, else one below the other.
    async fn watch(&self, list: Option<List>, json: bool, every: Duration) -> anyhow::Result<()> {
        let mut stop = Stop::listen()?;
        let screen = (std::io::stdout().is_terminal() && !json).then(Screen::enter);
        loop {
            // Who watches wants to see a proxy come back.
            let Some(text) = stop.unless_asked(self.text(list, json)).await else { return Ok(()) };
            match (&screen, text) {
                (Some(_), Ok(text)) => Screen::show(&text)?,
                (Some(_), Err(error)) => Screen::show(&format!("olol: {error:#}\n"))?,
                (None, Ok(text)) => super::print(&format!("{text}\n"))?,
                (None, Err(error)) => super::say(&format!("olol: {error:#}\n")),
            }
            if stop.unless_asked(tokio::time::sleep(every)).await.is_none() {
                return Ok(());
            }
        }
    }

    /// A whole list, page after page, as one page.
    pub(super) async fn list(&self, list: List) -> anyhow::Result<Value> {
        let path = format!("/api/status?detail={}&limit={PAGE}", list.as_str());
        let mut whole = self.get(&path).await?;
        if !whole[list.as_str()].is_array() {
            bail!("the proxy at {} is an older one: it has no pages of {}", self.url, list.as_str());
        }
        while let Some(next) = whole["next"].as_str() {
            let page = self.get(&format!("{path}&after={}", super::explain::escaped(next))).await?;
            let entries = page[list.as_str()].as_array().cloned().unwrap_or_default();
            let all = whole[list.as_str()].as_array_mut();
            let is_over = entries.is_empty() || all.as_ref().is_some_and(|all| all.len() >= MOST);
            if let Some(all) = all {
                all.extend(entries);
            }
            whole["next"] = if is_over { Value::Null } else { page["next"].clone() };
        }
        Ok(whole)
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let told = self.told(Ask { path: path.parse()?, ..Ask::get("/") }).await?;
        if told.is_object() { Ok(told) } else { bail!("{}: what answers there is no OLOL proxy", self.url) }
    }

    /// The answer to something, whatever it is.
    pub(super) async fn answer(&self, mut ask: Ask) -> anyhow::Result<Reply> {
        ask.headers.extend(self.key.clone().map(|key| (header::AUTHORIZATION, key)));
        super::send(&self.at, ask).await
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
        let status = reply.status;
        let error = match reply.body.collect(LONGEST).await {
            Ok(body) => refusal(&body),
            Err(error) => return error.into(),
        };
        let hint = match status.as_u16() {
            401 | 403 => "; give the key as --key, --key-file or OLOL_KEY",
            _ => "",
        };
        anyhow::anyhow!("{}: {error} (status {}){hint}", self.url, status.as_u16())
    }
}

/// The screen of a terminal, as long as this exists; then it shows again what it showed before.
struct Screen;

impl Screen {
    fn enter() -> Self {
        // Another screen, and no cursor.
        write("\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J");
        Self
    }

    /// Shows a text in the place of the one before. Each line takes the place of one, so that nothing flickers; what the
    /// screen has no room for is left out.
    fn show(text: &str) -> anyhow::Result<()> {
        let room = terminal_size::terminal_size().map_or(usize::MAX, |(_, height)| usize::from(height.0));
        let lines: Vec<&str> = text.lines().collect();
        let mut shown = String::from("\x1b[H");
        let fits = if lines.len() < room { lines.len() } else { room.saturating_sub(2) };
        for line in &lines[..fits] {
            shown.push_str(line);
            shown.push_str("\x1b[K\r\n");
        }
        if fits < lines.len() {
            let left = lines.len() - fits;
            shown.extend(["… ", &left.to_string(), " more lines: make the window taller\x1b[K"]);
        }
        shown.push_str("\x1b[J");
        super::print(&shown)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        write("\x1b[?25h\x1b[?1049l");
    }
}

fn write(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_says_how_often_or_what_stands_behind_it() {
        assert_eq!("5".parse(), Ok(Watch::Every(Duration::from_secs(5))));
        assert_eq!("models".parse(), Ok(Watch::Of(List::Models)));
        for wrong in ["0", "x", "-1", "1e9", "NaN"] {
            assert!(wrong.parse::<Watch>().unwrap_err().contains("seconds"), "{wrong}");
        }
    }
}
