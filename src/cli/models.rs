//! `olol models`: which models the servers of a running proxy have, and which they should have.

mod bars;

use std::io::Write as _;

use anyhow::bail;
use clap::{Args, Subcommand};
use http::Method;
use http::header::HeaderValue;
use serde_json::{Value, json};

use super::explain::escaped;
use super::status::table::{Look, inventory};
use super::status::{List, Place, Proxy};
use crate::models::desired::{KeepLoaded, Name, Replicas, SERVERS};
use crate::ollama::Ask;
use bars::Bars;

/// Which models the servers have, and which they should have.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    place: Place,
    /// Print JSON, as the proxy says it
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show who has which model, where it is loaded, which differ under one name, and which are wanted where
    Ls,
    /// Copy a model to another name, on every server that has it
    #[command(alias = "cp")]
    Copy {
        /// The model
        source: String,
        /// Its further name
        destination: String,
    },
    /// Pull a model to servers
    Pull {
        /// The model
        model: String,
        /// To how many servers: a number, "one", "all", or "fits" (all whose disks have room) [default: as the proxy is configured]
        #[arg(long, value_name = "HOW MANY")]
        replicas: Option<String>,
        /// To these servers alone, by name or pattern; may be given again, or with commas between
        #[arg(long, value_name = "SERVER", value_delimiter = ',')]
        to: Vec<String>,
        /// Also from a registry without TLS
        #[arg(long)]
        insecure: bool,
    },
    /// Delete models from every server that has them; one that is wanted is then wanted no more
    #[command(alias = "delete")]
    Rm {
        /// The models
        #[arg(required = true)]
        models: Vec<String>,
    },
    /// Have the proxy keep a model on some servers, whatever its configuration says of it
    Pin {
        /// The model
        model: String,
        /// On how many servers, or "all"; 0: it is not wanted, though the configuration says so
        #[arg(long, value_name = "HOW MANY", default_value = "1", value_parser = replicas)]
        replicas: Replicas,
        /// On these servers alone, by name or pattern; may be given again, or with commas between
        #[arg(long, value_name = "SERVER", value_delimiter = ',')]
        to: Vec<String>,
        /// Keep it in memory, on all of them or on so many
        #[arg(long, value_name = "HOW MANY", num_args = 0..=1, default_missing_value = "all", value_parser = kept)]
        keep_loaded: Option<KeepLoaded>,
    },
    /// Have the proxy keep a model no more than its configuration says; nothing is deleted
    Unpin {
        /// The model
        model: String,
    },
}

fn replicas(text: &str) -> Result<Replicas, String> {
    match text {
        "all" => Ok(Replicas::All),
        number => number.parse().map(Replicas::Count).map_err(|_| "say a number of servers, or all".to_owned()),
    }
}

fn kept(text: &str) -> Result<KeepLoaded, String> {
    match text {
        "all" => Ok(KeepLoaded::All),
        number => match number.parse() {
            Ok(0) => Ok(KeepLoaded::No),
            Ok(count) => Ok(KeepLoaded::Count(count)),
            Err(_) => Err("say a number of servers, or all".to_owned()),
        },
    }
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let proxy = self.place.proxy()?;
        super::runtime(1)?.block_on(async {
            match self.command.unwrap_or(Command::Ls) {
                Command::Ls => {
                    let page = proxy.list(List::Models).await?;
                    super::print(&if self.json { format!("{page:#}\n") } else { inventory(&page, Look::of_stdout()) })
                }
                Command::Copy { source, destination } => {
                    let body = json!({"source": source, "destination": destination});
                    change(&proxy, Ask::post("/api/copy", body.to_string())).await?;
                    said(self.json, &json!({"source": source, "destination": destination}), || {
                        format!("{destination} is a copy of {source} on every server that has it\n")
                    })
                }
                Command::Pull { model, replicas, to, insecure } => {
                    let body = json!({"model": model, "insecure": insecure});
                    pull(&proxy, &body, replicas.as_deref(), &to, self.json).await
                }
                Command::Rm { models } => {
                    for model in models {
                        let body = json!({"model": model}).to_string();
                        change(&proxy, Ask { method: Method::DELETE, ..Ask::post("/api/delete", body) }).await?;
                        said(self.json, &json!({"model": model, "deleted": true}), || format!("{model} is deleted\n"))?;
                    }
                    Ok(())
                }
                Command::Pin { model, replicas, to, keep_loaded } => {
                    let keep_loaded = keep_loaded.unwrap_or_default();
                    let body = json!({"replicas": replicas, "servers": to, "keep_loaded": keep_loaded}).to_string();
                    let ask = Ask { method: Method::PUT, path: path(&model)?, ..Ask::post("/", body) };
                    let told = proxy.told(ask).await?;
                    said(self.json, &told, || pinned(&told, replicas))
                }
                Command::Unpin { model } => {
                    let ask = Ask { method: Method::DELETE, path: path(&model)?, ..Ask::get("/") };
                    let told = proxy.told(ask).await?;
                    said(self.json, &told, || {
                        let name = told["model"].as_str().unwrap_or(&model);
                        match &told["replicas"] {
                            Value::Null => format!("{name} is not pinned any more; what is there stays\n"),
                            replicas => format!(
                                "{name} is not pinned any more; the configuration wants {} of it\n",
                                replicas.as_str().map_or_else(|| replicas.to_string(), str::to_owned)
                            ),
                        }
                    })
                }
            }
        })
    }
}

/// Prints what was done.
fn said(json: bool, told: &Value, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    super::print(&if json { format!("{told}\n") } else { text() })
}

/// What a pin comes to, in a sentence.
fn pinned(told: &Value, replicas: Replicas) -> String {
    let name = told["model"].as_str().unwrap_or_default();
    if replicas == Replicas::Count(0) {
        return format!("{name} is not wanted any more; what is there stays\n");
    }
    let servers: Vec<&str> = told["servers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let among = if servers.is_empty() { String::new() } else { format!(" of {}", servers.join(", ")) };
    let count = match replicas {
        Replicas::Count(1) => "1 server".to_owned(),
        Replicas::Count(count) => format!("{count} servers"),
        Replicas::All => "all servers".to_owned(),
    };
    let loaded = if told["keep_loaded"] == false { "" } else { ", and in memory there" };
    format!("{name} is kept on {count}{among}{loaded}; `olol models` shows how far that is\n")
}

/// The path of a pin.
fn path(model: &str) -> anyhow::Result<http::Uri> {
    let Some(name) = Name::parse(model) else { bail!("'{model}' is no name of a model") };
    Ok(format!("/api/status/models/{}", escaped(name.text())).parse()?)
}

/// Asks for a change that all who are concerned must make.
async fn change(proxy: &Proxy, ask: Ask) -> anyhow::Result<()> {
    let reply = proxy.answer(Ask { infers: false, ..ask }).await?;
    if reply.status.is_success() { Ok(()) } else { Err(proxy.refusal(reply).await) }
}

/// Pulls a model, and shows how far it is.
async fn pull(proxy: &Proxy, body: &Value, replicas: Option<&str>, to: &[String], is_json: bool) -> anyhow::Result<()> {
    let mut ask = Ask { infers: false, ..Ask::post("/api/pull", body.to_string()) };
    if let Some(replicas) = replicas {
        ask.headers.insert("x-olol-replicas", HeaderValue::from_str(replicas)?);
    }
    if !to.is_empty() {
        ask.headers.insert(SERVERS, HeaderValue::from_str(&to.join(","))?);
    }
    let reply = proxy.answer(ask).await?;
    if !reply.status.is_success() {
        return Err(proxy.refusal(reply).await);
    }
    let absent =
        reply.headers.get("x-olol-partial").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let mut bars = Bars::new(is_json);
    let mut body = reply.body;
    let mut rest = Vec::new();
    while let Some(chunk) = body.next().await {
        rest.extend_from_slice(&chunk?.bytes);
        while let Some(end) = memchr::memchr(b'\n', &rest) {
            let line: Vec<u8> = rest.drain(..=end).collect();
            if is_json {
                std::io::stdout().lock().write_all(&line)?;
            }
            bars.hear(&serde_json::from_slice(&line).unwrap_or_default())?;
        }
    }
    bars.end()?;
    if !absent.is_empty() {
        super::say(&format!("olol: without {absent}, which did not take part\n"));
    }
    Ok(())
}
