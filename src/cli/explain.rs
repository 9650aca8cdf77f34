//! `olol explain`: what a running proxy would do with a request now, layer by layer, or what it did with one.

use std::fmt::{self, Write};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use http::Uri;
use serde_json::{Value, json};

use super::at::Place;
use crate::ollama::Ask;

/// Ask a running proxy what it would do with a request, or what it did with one.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Model that would be asked
    #[arg(long, required_unless_present_any = ["body", "request"])]
    model: Option<String>,
    /// What it would be asked
    #[arg(long, default_value = "hi", conflicts_with_all = ["body", "request"])]
    prompt: String,
    /// File with the body of the request in question; - reads standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "request"])]
    body: Option<PathBuf>,
    /// Path of the request in question
    #[arg(long, default_value = "/api/chat", value_name = "PATH", conflicts_with = "request")]
    route: String,
    /// Id of a request that is over: the X-Olol-Request of its answer
    #[arg(long, value_name = "ID", conflicts_with = "model")]
    request: Option<String>,
    #[command(flatten)]
    place: Place,
    /// Print JSON, as the proxy says it
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::runtime(1)?.block_on(async {
            let told = self.place.proxy()?.told(self.ask()?).await?;
            let text = if self.json { format!("{told:#}\n") } else { shown(&told)? };
            super::print(&text)
        })
    }

    fn ask(&self) -> anyhow::Result<Ask> {
        if let Some(id) = &self.request {
            return Ok(Ask { path: format!("/api/status/requests/{}", escaped(id)).parse()?, ..Ask::get("/") });
        }
        let path: Uri = format!("/api/status/explain?route={}", escaped(&self.route)).parse()?;
        Ok(Ask { path, infers: false, ..Ask::post("/", self.content()?) })
    }

    /// The body of the request in question.
    fn content(&self) -> anyhow::Result<Vec<u8>> {
        match self.body.as_deref() {
            Some(file) if file == Path::new("-") => {
                let mut bytes = Vec::new();
                std::io::stdin().read_to_end(&mut bytes).context("standard input cannot be read")?;
                Ok(bytes)
            }
            Some(file) => std::fs::read(file).with_context(|| format!("cannot read {}", file.display())),
            None => Ok(content(&self.route, self.model.as_deref().unwrap_or_default(), &self.prompt)),
        }
    }
}

/// A body that asks this of a model over a route.
fn content(route: &str, model: &str, prompt: &str) -> Vec<u8> {
    let body = match route {
        "/api/generate" | "/api/embeddings" | "/v1/completions" => json!({"model": model, "prompt": prompt}),
        "/api/embed" | "/v1/embeddings" | "/v1/responses" => json!({"model": model, "input": prompt}),
        _ => json!({"model": model, "messages": [{"role": "user", "content": prompt}]}),
    };
    body.to_string().into_bytes()
}

/// A text as a value of a query.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~:".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// What the proxy tells, for people.
fn shown(told: &Value) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let path = told["route"].as_str().or(told["path"].as_str()).unwrap_or_default();
    write!(out, "request {}: {} {path}", text(&told["id"]), text(&told["method"]))?;
    for name in ["model", "key", "client"] {
        if !told[name].is_null() {
            write!(out, ", {name} {}", text(&told[name]))?;
        }
    }
    out.push_str("\n\n");
    let trail = told["trail"].as_array().map(Vec::as_slice).unwrap_or_default();
    let wide = |name: &str| trail.iter().map(|note| text(&note[name]).chars().count()).max().unwrap_or(0);
    let (layers, decisions) = (wide("layer"), wide("decision"));
    for note in trail {
        let (layer, decision) = (text(&note["layer"]), text(&note["decision"]));
        let facts = note["facts"].as_object().cloned().unwrap_or_default();
        let (tables, facts): (Vec<_>, Vec<_>) = facts.into_iter().partition(|(_, fact)| is_table(fact));
        let facts: Vec<String> = facts.iter().map(|(name, fact)| format!("{name}={}", text(fact))).collect();
        let line = format!("  {layer:layers$}  {decision:decisions$}  {}", facts.join(" "));
        writeln!(out, "{}", line.trim_end())?;
        for (name, rows) in tables {
            writeln!(out, "\n    {name}:")?;
            out.push_str(&table(rows.as_array().map(Vec::as_slice).unwrap_or_default()));
            out.push('\n');
        }
    }
    if trail.is_empty() {
        writeln!(out, "  no layer had anything to decide")?;
    }
    Ok(format!("{}\n\n{}\n", out.trim_end(), end(told)))
}

/// What came, or would come, of it.
fn end(told: &Value) -> String {
    let status = text(&told["status"]);
    // A request that is over.
    if let Some(end) = told["end"].as_str() {
        let servers: Vec<String> = told["servers"].as_array().into_iter().flatten().map(text).collect();
        let by = if servers.is_empty() { String::new() } else { format!(" by {}", servers.join(", then ")) };
        let count = |name: &str| text(&told[name]);
        return format!(
            "answered with status {status}{by}: {end}, {} ms, attempts {}, tokens {} + {}",
            count("ms"),
            count("attempts"),
            count("prompt_tokens"),
            count("output_tokens"),
        );
    }
    match (&told["error"], &told["server"]) {
        (Value::Null, Value::Null) => "would be answered by no single server".to_owned(),
        (Value::Null, server) if is_nobodys(told) => {
            let server = text(server);
            format!("would be refused with status 404 by {server}: nobody is known to have the model")
        }
        (Value::Null, server) => format!("would go to {}", text(server)),
        (error, _) => {
            format!("would be refused with status {status} ({}): {}", text(&error["reason"]), text(&error["message"]))
        }
    }
}

/// Whether nobody has the model that would be asked in the end: then a server is asked all the same, so that the refusal is
/// Ollama's own.
fn is_nobodys(told: &Value) -> bool {
    let trail = told["trail"].as_array().map(Vec::as_slice).unwrap_or_default();
    let routed = trail.iter().rev().find(|note| note["layer"] == "model-route");
    routed.is_some_and(|note| note["decision"] == "nobody is known to have the model")
}

/// A value without quotes; several with commas.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => format!("{float:.1}"),
            _ => number.to_string(),
        },
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(","),
        Value::Object(members) => {
            let members: Vec<String> = members.iter().map(|(name, value)| format!("{name}={}", text(value))).collect();
            format!("({})", members.join(" "))
        }
        Value::Bool(flag) => flag.to_string(),
    }
}

fn is_table(value: &Value) -> bool {
    value.as_array().is_some_and(|rows| !rows.is_empty() && rows.iter().all(Value::is_object))
}

/// Rows with the same members as a table.
fn table(rows: &[Value]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in rows.iter().filter_map(Value::as_object).flat_map(serde_json::Map::keys) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut lines: Vec<Vec<String>> = vec![names.iter().map(|name| (*name).to_owned()).collect()];
    lines.extend(rows.iter().map(|row| names.iter().map(|name| text(&row[*name])).collect()));
    let is_number =
        |column: usize| rows.iter().all(|row| row[names[column]].is_number() || row[names[column]].is_null());
    let mut out = String::new();
    for line in &lines {
        let mut shown = String::from("     ");
        for (column, cell) in line.iter().enumerate() {
            let wide = lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
            let _ = if is_number(column) { write!(shown, " {cell:>wide$} ") } else { write!(shown, " {cell:wide$} ") };
        }
        out.push_str(shown.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_reads_as_a_table() {
        let told = json!({
            "id": "1f", "method": "POST", "route": "/api/chat", "model": "tiny", "key": null,
            "trail": [
                {"layer": "model-route", "decision": "those that have it", "facts": {"model": "tiny:latest", "candidates": 2}},
                {"layer": "pick", "decision": "the cheapest", "facts": {"server": "gpu1", "candidates": [
                    {"server": "gpu1", "ms": 12.25, "waiting": 0},
                    {"server": "attic", "ms": 1200.0, "waiting": 3},
                ]}},
            ],
            "server": "gpu1", "status": 200, "error": null,
        });
        insta::assert_snapshot!(shown(&told).unwrap(), @r"
        request 1f: POST /api/chat, model tiny

          model-route  those that have it  model=tiny:latest candidates=2
          pick         the cheapest        server=gpu1

            candidates:
              server      ms  waiting
              gpu1      12.2        0
              attic   1200.0        3

        would go to gpu1
        ");
    }

    #[test]
    fn a_request_that_is_over_reads_as_it_ended() {
        let told = json!({
            "id": "1f", "method": "POST", "path": "/api/chat", "model": "tiny", "client": "127.0.0.1:9",
            "trail": [{"layer": "retry", "decision": "again", "facts": {"cause": "server-failed"}}],
            "servers": ["gpu1", "attic"], "status": 200, "end": "whole", "ms": 31, "attempts": 2,
            "prompt_tokens": 5, "output_tokens": 9,
        });
        insta::assert_snapshot!(shown(&told).unwrap(), @r"
        request 1f: POST /api/chat, model tiny, client 127.0.0.1:9

          retry  again  cause=server-failed

        answered with status 200 by gpu1, then attic: whole, 31 ms, attempts 2, tokens 5 + 9
        ");
    }

    #[test]
    fn a_model_that_nobody_has_is_told_to_be_refused() {
        let nobody = json!({"layer": "model-route", "decision": "nobody is known to have the model", "facts": {}});
        let told = json!({"status": 200, "server": "gpu1", "error": null, "trail": [nobody]});
        assert_eq!(end(&told), "would be refused with status 404 by gpu1: nobody is known to have the model");
        let other = json!({"layer": "model-route", "decision": "those that have it", "facts": {}});
        let told = json!({"status": 200, "server": "gpu1", "error": null, "trail": [nobody, other]});
        assert_eq!(end(&told), "would go to gpu1");
    }

    #[test]
    fn a_refusal_is_told_with_its_reason() {
        let told = json!({"status": 503, "server": null,
            "error": {"reason": "no-server", "message": "no server can answer now: all are down"}});
        assert_eq!(end(&told), "would be refused with status 503 (no-server): no server can answer now: all are down");
    }
}
