//! `olol client`: asks a model and prints what it says, at any Ollama.

use std::io::{BufRead, IsTerminal, Read};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use olol_middleware::{Reply, ServerId};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::at::{Place, Proxy, hint};
use super::{print, say};
use crate::ollama::Ask;

/// The longest answer in one object, bytes.
const LONGEST: usize = 16 << 20;

/// Ask a model.
#[derive(Debug, Args)]
#[command(mut_arg("url", |url| url.help("Where the proxy is, or any Ollama [default: http://127.0.0.1:8000]")))]
pub(super) struct Arguments {
    /// Model to ask [default: the first that the server lists]
    #[arg(long)]
    model: Option<String>,
    /// What to ask; - reads standard input; without it a terminal gets a chat, and a pipe is read
    #[arg(long)]
    prompt: Option<String>,
    #[command(flatten)]
    place: Place,
    /// Print tokens per second, times, and which server answered
    #[arg(long)]
    stats: bool,
    /// Accepted for compatibility: the client is always asynchronous
    #[arg(long = "async", hide = true)]
    _async: bool,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::runtime(1)?.block_on(async {
            let ollama = self.place.ollama()?;
            let model = match self.model {
                Some(model) => model,
                None => first_model(&ollama).await?,
            };
            let client = Client { ollama, model, stats: self.stats };
            match self.prompt.as_deref() {
                None if std::io::stdin().is_terminal() => client.chat().await,
                None | Some("-") => {
                    let mut prompt = String::new();
                    std::io::stdin().read_to_string(&mut prompt).context("standard input cannot be read")?;
                    client.once(&prompt).await
                }
                Some(prompt) => client.once(prompt).await,
            }
        })
    }
}

/// The model that the server lists first.
async fn first_model(ollama: &Proxy) -> anyhow::Result<String> {
    let tags = object(send(ollama, Ask::get("/api/tags")).await?).await?;
    let first = tags["models"][0]["name"].as_str().map(str::to_owned);
    first.with_context(|| format!("the server at {} has no model; pull one: ollama pull llama3.2", ollama.endpoint()))
}

async fn object(reply: Reply) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&reply.body.collect(LONGEST).await?)?)
}

/// Sends a call; what is no good answer is an error in the server's words.
async fn send(ollama: &Proxy, ask: Ask) -> anyhow::Result<Reply> {
    let reply = ollama.answer(ask).await?;
    if reply.status.is_success() {
        return Ok(reply);
    }
    let status = reply.status;
    let body = reply.body.collect(LONGEST).await?;
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    let text = parsed["error"].as_str().map_or_else(|| String::from_utf8_lossy(&body).into_owned(), str::to_owned);
    bail!("{text} (status {}){}", status.as_u16(), hint(status.as_u16()))
}

struct Client {
    ollama: Proxy,
    model: String,
    stats: bool,
}

impl Client {
    /// One question.
    async fn once(&self, prompt: &str) -> anyhow::Result<()> {
        let body = json!({"model": self.model, "prompt": prompt});
        self.answer(Ask::post("/api/generate", body.to_string())).await.map(drop)
    }

    /// Questions and answers, with all that was said before.
    async fn chat(&self) -> anyhow::Result<()> {
        say(&format!("{} at {}; an empty line or Ctrl-D ends the chat\n", self.model, self.ollama.endpoint()));
        let mut messages = Vec::new();
        loop {
            say(">>> ");
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line).context("standard input cannot be read")?;
            if read == 0 || line.trim().is_empty() {
                return Ok(());
            }
            messages.push(json!({"role": "user", "content": line.trim_end_matches(['\n', '\r'])}));
            let body = json!({"model": self.model, "messages": messages});
            tokio::select! {
                answer = self.answer(Ask::post("/api/chat", body.to_string())) => match answer {
                    Ok(text) => messages.push(json!({"role": "assistant", "content": text})),
                    // The question is taken back, so that it can be asked again.
                    Err(error) => {
                        messages.pop();
                        say(&format!("olol: {error:#}\n"));
                    }
                },
                _ = tokio::signal::ctrl_c() => {
                    messages.pop();
                    say("\n(stopped)\n");
                }
            }
        }
    }

    /// Prints an answer as it comes, and returns its text.
    async fn answer(&self, ask: Ask) -> anyhow::Result<String> {
        let begun = Instant::now();
        let mut reply = send(&self.ollama, ask).await?;
        let server = reply.headers.get(ServerId::HEADER).and_then(|name| name.to_str().ok()).unwrap_or("").to_owned();
        let mut first = None;
        let mut text = String::new();
        let mut last = Value::Null;
        while let Some(chunk) = reply.body.next().await {
            for line in chunk?.bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let line: Value = serde_json::from_slice(line).context("the answer is no JSON")?;
                if let Some(error) = line["error"].as_str() {
                    bail!("{error}");
                }
                let message = &line["message"];
                if let Some(thought) = line["thinking"].as_str().or_else(|| message["thinking"].as_str()) {
                    say(thought);
                }
                let piece = line["response"].as_str().or_else(|| message["content"].as_str()).unwrap_or("");
                if !piece.is_empty() {
                    first.get_or_insert_with(|| begun.elapsed());
                    text.push_str(piece);
                    print(piece)?;
                }
                if line["done"] == true {
                    last = line;
                }
            }
        }
        if !text.ends_with('\n') {
            print("\n")?;
        }
        if last.is_null() {
            bail!("the answer broke off");
        }
        if self.stats {
            say(&stats(&last, &server, first.unwrap_or_default(), begun.elapsed()));
        }
        Ok(text)
    }
}

/// A line about how it went.
fn stats(last: &Value, server: &str, first: Duration, total: Duration) -> String {
    let count = |key: &str| last[key].as_u64().unwrap_or(0);
    let tokens = count("eval_count");
    // Nanoseconds; what took no measurable time has no rate.
    let seconds = Duration::from_nanos(count("eval_duration")).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "nobody waits for 2^52 tokens")]
    let rate = if seconds > 0.0 { format!("{:.1}", tokens as f64 / seconds) } else { "-".to_owned() };
    format!(
        "[{tokens} tokens, {rate} tokens/s, first after {} ms, total {} ms, prompt {} tokens, server {}]\n",
        first.as_millis(),
        total.as_millis(),
        count("prompt_eval_count"),
        if server.is_empty() { "not told (a plain Ollama)" } else { server },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_tell_the_rate_and_the_server() {
        let last = json!({"eval_count": 30, "eval_duration": 2_000_000_000_u64, "prompt_eval_count": 7});
        let text = stats(&last, "gpu1", Duration::from_millis(12), Duration::from_secs(3));
        assert_eq!(
            text,
            "[30 tokens, 15.0 tokens/s, first after 12 ms, total 3000 ms, prompt 7 tokens, server gpu1]\n"
        );
        assert!(stats(&json!({}), "", Duration::ZERO, Duration::ZERO).contains("- tokens/s"));
    }
}
