//! `olol status`: the servers, models or clients of a running proxy, as a table; once, or again and again in place.

pub(super) mod table;

use std::io::{IsTerminal, Write};
use std::str::FromStr;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::Stop;
use super::at::{Place, Proxy};
use table::Look;

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

impl Proxy {
    /// What is printed.
    async fn text(&self, list: Option<List>, json: bool) -> anyhow::Result<String> {
        if json {
            let told = match list {
                Some(list) => self.list(list).await?,
                None => self.summary().await?,
            };
            return Ok(format!("{told:#}\n"));
        }
        let look = Look::of_stdout();
        match list.unwrap_or(List::Servers) {
            List::Servers => {
                let summary = self.summary().await?;
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

    /// What it says of itself.
    async fn summary(&self) -> anyhow::Result<Value> {
        let told = self.get("/api/status").await?;
        self.is_proxy(&told)?;
        Ok(told)
    }

    /// Whether it is a proxy that tells this: the summary of an Ollama has nothing of ours.
    fn is_proxy(&self, told: &Value) -> anyhow::Result<()> {
        if told["olol"].is_object() {
            return Ok(());
        }
        bail!(
            "what answers at {} is an Ollama, and no OLOL proxy: `olol proxy --servers {}` puts one before it",
            self.url(),
            self.url()
        )
    }

    /// A whole list, page after page, as one page.
    pub(super) async fn list(&self, list: List) -> anyhow::Result<Value> {
        let path = format!("/api/status?detail={}&limit={PAGE}", list.as_str());
        let mut whole = self.get(&path).await?;
        if !whole[list.as_str()].is_array() {
            self.is_proxy(&whole)?;
            bail!("the proxy at {} is an older one: it has no pages of {}", self.url(), list.as_str());
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
