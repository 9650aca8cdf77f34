//! `olol models`: which models the servers of a running proxy have, and which they should have.

mod bars;

use anyhow::bail;
use clap::{Args, Subcommand};
use http::header::HeaderValue;
use http::{Method, StatusCode};
use olol_middleware::Pattern;
use serde_json::{Value, json};

use super::at::{Place, Proxy};
use super::explain::escaped;
use super::status::List;
use super::status::table::{Look, inventory};
use crate::models::desired::{KeepLoaded, Name, Replicas, SERVERS};
use crate::ollama::Ask;
use bars::Bars;

/// The longest answer to a wish, bytes.
const LONGEST: usize = 64 << 10;

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
                Command::Rm { models } => remove(&proxy, &models, self.json).await,
                Command::Pin { model, replicas, to, keep_loaded } => {
                    let keep_loaded = keep_loaded.unwrap_or_default();
                    let body = json!({"replicas": replicas, "servers": to, "keep_loaded": keep_loaded}).to_string();
                    let ask = Ask { method: Method::PUT, path: path(&model)?, ..Ask::post("/", body) };
                    let told = proxy.told(ask).await?;
                    said(self.json, &told, || pinned(&told, replicas))?;
                    super::say(&missing(&proxy, &told, replicas, &to).await);
                    Ok(())
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
    format!("{name} will be kept on {count}{among}{loaded}; `olol models` shows how far that is\n")
}

/// What stands in the way of a pin now, if anything does. Who may not look is told nothing.
async fn missing(proxy: &Proxy, told: &Value, replicas: Replicas, to: &[String]) -> String {
    let name = told["model"].as_str().unwrap_or_default();
    if replicas == Replicas::Count(0) {
        return String::new();
    }
    let (Ok(servers), Ok(models)) = (proxy.list(List::Servers).await, proxy.list(List::Models).await) else {
        return String::new();
    };
    let patterns: Vec<Pattern> = to.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
    let names = servers["servers"].as_array().into_iter().flatten().filter_map(|server| server["server"].as_str());
    let meant = names.filter(|name| patterns.is_empty() || patterns.iter().any(|pattern| pattern.matches(name)));
    lacks(name, replicas, meant.count(), holders(&models, name))
}

/// On how many servers a model is.
fn holders(models: &Value, name: &str) -> usize {
    let holders = entry(models, name).and_then(|entry| entry["compatible_servers"]["installed"].as_array());
    holders.map_or(0, Vec::len)
}

/// What a page says of a model.
fn entry<'a>(models: &'a Value, name: &str) -> Option<&'a Value> {
    models["models"].as_array()?.iter().find(|entry| entry["name"] == name)
}

/// What a pin lacks, where so many servers are meant, and so many have the model.
fn lacks(name: &str, replicas: Replicas, meant: usize, holders: usize) -> String {
    let are = if meant == 1 { "server is" } else { "servers are" };
    let few = match replicas {
        Replicas::Count(count) if (meant as u64) < u64::from(count) => {
            format!("olol: {meant} {are} there that {name} may be on, and {count} are wanted\n")
        }
        Replicas::All if meant == 0 => format!("olol: no server is there that {name} may be on\n"),
        _ => String::new(),
    };
    let none = if holders == 0 && meant > 0 {
        format!("olol: no server has {name} yet: it is asked of its registry\n")
    } else {
        String::new()
    };
    few + &none
}

/// Deletes models, and goes on where one cannot be deleted.
async fn remove(proxy: &Proxy, models: &[String], json: bool) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for model in models {
        match delete(proxy, model).await {
            Ok(true) => said(json, &json!({"model": model, "deleted": true}), || format!("{model} is deleted\n"))?,
            Ok(false) => said(json, &json!({"model": model, "deleted": false, "pinned": false}), || {
                format!("{model} was on no server, and is not wanted any more\n")
            })?,
            Err(error) if models.len() == 1 => return Err(error),
            Err(error) => {
                super::say(&format!("olol: {model}: {error:#}\n"));
                failed.push(model.as_str());
            }
        }
    }
    match failed.as_slice() {
        [] => Ok(()),
        [one] => bail!("{one} is not deleted"),
        all => bail!("{} of {} models are not deleted: {}", all.len(), models.len(), all.join(", ")),
    }
}

/// Deletes a model wherever it is, or, if it is nowhere, takes away the wish for it; whether it was anywhere.
async fn delete(proxy: &Proxy, model: &str) -> anyhow::Result<bool> {
    let body = json!({"model": model}).to_string();
    let ask = Ask { method: Method::DELETE, infers: false, ..Ask::post("/api/delete", body) };
    let reply = proxy.answer(ask).await?;
    if reply.status.is_success() {
        return Ok(true);
    }
    let is_nowhere = reply.status == StatusCode::NOT_FOUND;
    let refusal = proxy.refusal(reply).await;
    // Who may not unpin, or asks an Ollama, learns what the deletion came to.
    if is_nowhere && unwish(proxy, model).await.unwrap_or(false) { Ok(false) } else { Err(refusal) }
}

/// Has a model wanted no more; whether it was.
async fn unwish(proxy: &Proxy, model: &str) -> anyhow::Result<bool> {
    let path = path(model)?;
    let models = proxy.list(List::Models).await?;
    let canonical = Name::parse(model).map(|name| name.model().as_str().to_owned()).unwrap_or_default();
    let desired = entry(&models, &canonical).map_or(&Value::Null, |entry| &entry["desired"]);
    // A wish for none is the memory of a deletion: it stays.
    if desired["replicas"] == 0 {
        return Ok(false);
    }
    // Also one of a moment ago, which no page tells of yet.
    let unpin = Ask { method: Method::DELETE, path: path.clone(), ..Ask::get("/") };
    let reply = proxy.answer(unpin).await?;
    let in_file = if reply.status.is_success() {
        let told: Value = serde_json::from_slice(&reply.body.collect(LONGEST).await?).unwrap_or_default();
        if told["replicas"].is_null() {
            return Ok(true);
        }
        told["replicas"] != 0
    } else {
        desired["source"] == "file"
    };
    if in_file {
        // As the proxy itself does when a wanted model is deleted.
        let body = json!({"replicas": 0}).to_string();
        proxy.told(Ask { method: Method::PUT, path, infers: false, ..Ask::post("/", body) }).await?;
    }
    Ok(in_file)
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
                super::print(&String::from_utf8_lossy(&line))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_says_what_will_be_and_what_it_lacks() {
        let told = json!({"model": "nope:latest", "servers": [], "keep_loaded": false});
        let said = pinned(&told, Replicas::Count(1));
        assert_eq!(said, "nope:latest will be kept on 1 server; `olol models` shows how far that is\n");
        for (replicas, meant, holders, says) in [
            (Replicas::Count(1), 1, 1, &[][..]),
            (Replicas::All, 3, 3, &[]),
            (Replicas::Count(1), 2, 0, &["no server has nope yet: it is asked of its registry"]),
            (Replicas::Count(3), 1, 1, &["1 server is there that nope may be on, and 3 are wanted"]),
            (Replicas::Count(3), 2, 0, &["2 servers are there", "no server has nope"]),
            (Replicas::All, 0, 1, &["no server is there that nope may be on"]),
        ] {
            let said = lacks("nope", replicas, meant, holders);
            assert_eq!(said.lines().count(), says.len(), "{said}");
            assert!(says.iter().all(|part| said.contains(part)), "{said}");
        }
    }
}
