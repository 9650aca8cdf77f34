//! Tables of what the proxy says, for people.

use std::io::IsTerminal;

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table};
use serde_json::Value;

/// How a table looks: as wide as the terminal and in colour, or plain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    width: Option<u16>,
    is_coloured: bool,
}

impl Look {
    /// As fits where the output goes.
    pub(super) fn of_stdout() -> Self {
        if !std::io::stdout().is_terminal() {
            return Self { width: None, is_coloured: false };
        }
        let wants_none = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let width = terminal_size::terminal_size().map(|(width, _)| width.0);
        Self { width, is_coloured: !wants_none }
    }

    /// A table with these columns; those whose name begins with `#` are numbers.
    fn table(self, columns: &[&str]) -> Table {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        if self.is_coloured {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        if let Some(width) = self.width {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        }
        table.set_header(
            columns.iter().map(|name| Cell::new(name.trim_start_matches('#')).add_attribute(Attribute::Bold)),
        );
        for (at, name) in columns.iter().enumerate() {
            if let Some(column) = table.column_mut(at) {
                column.set_padding((0, 2));
                if name.starts_with('#') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        table
    }
}

/// A line about the proxy as a whole.
pub(super) fn headline(summary: &Value) -> String {
    let olol = &summary["olol"];
    let count = |name: &str| text(&olol[name]);
    let mut line = format!(
        "olol {} at {}: {} of {} servers up, {} models, {} in flight, {} waiting, {} clients",
        count("version"),
        count("address"),
        text(&olol["servers"]["up"]),
        text(&olol["servers"]["total"]),
        count("models"),
        count("in_flight"),
        count("queued"),
        count("clients"),
    );
    if let Some(error) = olol["config"]["last_reload"]["error"].as_str() {
        line.push_str(&format!("\nthe configuration was not reloaded: {}", clean(error)));
    }
    line.push('\n');
    line
}

/// The servers.
pub(super) fn servers(page: &Value, look: Look) -> String {
    let mut table = look.table(&[
        "SERVER",
        "STATE",
        "#LOAD",
        "#MODELS",
        "LOADED",
        "#CPU",
        "#MEMORY",
        "#GPU MEMORY",
        "#REQ/S",
        "#ERRORS",
        "#FIRST TOKEN",
        "#TOKENS",
    ]);
    let entries = entries(page, "servers");
    for entry in entries {
        let metrics = &entry["metrics"];
        let usage = &metrics["resource_usage"];
        let loaded = entry["loaded_models"].as_array().map(Vec::as_slice).unwrap_or_default();
        let loaded: Vec<String> = loaded.iter().map(|model| text(&model["name"])).collect();
        table.add_row(vec![
            Cell::new(text(&entry["server"])),
            state(entry),
            Cell::new(text(&entry["current_load"])),
            Cell::new(entry["models"].as_array().map_or(0, Vec::len)),
            Cell::new(few(&loaded)),
            Cell::new(percent(&usage["cpu"])),
            Cell::new(percent(&usage["memory"])),
            Cell::new(filled(&entry["gpu_memory"], &usage["gpu_memory"])),
            Cell::new(rate(&metrics["requests_per_second"])),
            Cell::new(percent(&metrics["error_rate"])),
            Cell::new(seconds(&metrics["first_token_time"])),
            Cell::new(short(sum(&[&metrics["prompt_tokens"], &metrics["output_tokens"]]))),
        ]);
    }
    let total = |path: fn(&Value) -> &Value| entries.iter().filter_map(|entry| path(entry).as_f64()).sum::<f64>();
    let up = entries.iter().filter(|entry| entry["online"] == true).count();
    let loaded: usize = entries.iter().map(|entry| entry["loaded_models"].as_array().map_or(0, Vec::len)).sum();
    let memory = total(|entry| &entry["gpu_memory"]);
    table.add_row(totals([
        format!("{} in all", entries.len()),
        format!("{up} up"),
        format!("{:.0}", total(|entry| &entry["current_load"])),
        entries.iter().map(|entry| entry["models"].as_array().map_or(0, Vec::len)).sum::<usize>().to_string(),
        format!("{loaded} in memory"),
        String::new(),
        String::new(),
        if memory > 0.0 { bytes(memory) } else { String::new() },
        format!("{:.1}", total(|entry| &entry["metrics"]["requests_per_second"])),
        String::new(),
        String::new(),
        short(total(|entry| &entry["metrics"]["prompt_tokens"]) + total(|entry| &entry["metrics"]["output_tokens"])),
    ]));
    let mut out = written(&table);
    for entry in entries.iter().filter(|entry| entry["health"]["status"] != "pass") {
        let problem = entry["health"]["error_details"]["message"].as_str();
        let why = problem.or(entry["reason"].as_str()).filter(|why| !why.is_empty());
        if let Some(why) = why {
            out.push_str(&format!("\n{}: {}", text(&entry["server"]), clean(why)));
        }
    }
    out.trim_end().to_owned() + "\n"
}

/// The models.
pub(super) fn models(page: &Value, look: Look) -> String {
    let mut table = look.table(&[
        "MODEL",
        "#SIZE",
        "PARAMETERS",
        "QUANT",
        "#BITS",
        "DIGEST",
        "INSTALLED",
        "LOADED",
        "#REQUESTS",
        "#TOKENS",
        "#FIRST TOKEN",
        "#WAITING",
    ]);
    let entries = entries(page, "models");
    for entry in entries {
        let (stats, places) = (&entry["stats"], &entry["compatible_servers"]);
        let digest = match entry["agrees"] == false {
            true => {
                let count = entry["digests"].as_array().map_or(0, Vec::len);
                Cell::new(format!("{count} differ")).fg(Color::Yellow)
            }
            false => {
                Cell::new(text(&entry["digest"]).trim_start_matches("sha256:").chars().take(12).collect::<String>())
            }
        };
        table.add_row(vec![
            Cell::new(text(&entry["name"])),
            Cell::new(entry["size"].as_f64().map_or_else(dash, bytes)),
            Cell::new(text(&entry["parameters"]["parameter_size"])),
            Cell::new(text(&entry["quantization"]["level"])),
            Cell::new(text(&entry["quantization"]["bits_per_weight"])),
            digest,
            Cell::new(few(&names(&places["installed"]))),
            Cell::new(few(&names(&places["loaded"]))),
            Cell::new(short(sum(&[&stats["requests"]]))),
            Cell::new(short(sum(&[&stats["prompt_tokens"], &stats["output_tokens"]]))),
            Cell::new(seconds(&stats["first_token_time"])),
            Cell::new(text(&entry["waiting"])),
        ]);
    }
    let total = |of: &dyn Fn(&Value) -> f64| entries.iter().map(of).sum::<f64>();
    let differ = entries.iter().filter(|entry| entry["agrees"] == false).count();
    let loaded = entries.iter().filter(|entry| !names(&entry["compatible_servers"]["loaded"]).is_empty()).count();
    table.add_row(totals([
        format!("{} in all", entries.len()),
        bytes(total(&|entry| entry["size"].as_f64().unwrap_or(0.0))),
        String::new(),
        String::new(),
        String::new(),
        if differ > 0 { format!("{differ} differ") } else { String::new() },
        String::new(),
        format!("{loaded} in memory"),
        short(total(&|entry| sum(&[&entry["stats"]["requests"]]))),
        short(total(&|entry| sum(&[&entry["stats"]["prompt_tokens"], &entry["stats"]["output_tokens"]]))),
        String::new(),
        format!("{:.0}", total(&|entry| entry["waiting"].as_f64().unwrap_or(0.0))),
    ]));
    written(&table)
}

/// The clients.
pub(super) fn clients(page: &Value, look: Look) -> String {
    let mut table = look.table(&[
        "CLIENT",
        "PROGRAM",
        "API",
        "#REQUESTS",
        "#IN FLIGHT",
        "#TOKENS",
        "LAST SEEN",
        "SINCE",
        "PRIORITY",
        "MODELS",
    ]);
    let entries = entries(page, "clients");
    for entry in entries {
        let policy = &entry["preferences"];
        let models = if policy["models"].is_array() { few(&names(&policy["models"])) } else { "all".to_owned() };
        table.add_row(vec![
            Cell::new(text(&entry["client_id"])),
            Cell::new(text(&entry["application_type"])),
            Cell::new(few(&names(&entry["api_versions"]))),
            Cell::new(short(sum(&[&entry["requests"]]))),
            Cell::new(text(&entry["in_flight"])),
            Cell::new(short(sum(&[&entry["prompt_tokens"], &entry["output_tokens"]]))),
            Cell::new(moment(&entry["last_seen"])),
            Cell::new(moment(&entry["connected_at"])),
            Cell::new(text(&policy["priority"])),
            Cell::new(if policy.is_null() { dash() } else { models }),
        ]);
    }
    let total = |names: &[&str]| {
        let of = |entry: &Value| names.iter().filter_map(|name| entry[*name].as_f64()).sum::<f64>();
        entries.iter().map(of).sum::<f64>()
    };
    table.add_row(totals([
        format!("{} in all", entries.len()),
        String::new(),
        String::new(),
        short(total(&["requests"])),
        format!("{:.0}", total(&["in_flight"])),
        short(total(&["prompt_tokens", "output_tokens"])),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
    ]));
    written(&table)
}

/// The sessions.
pub(super) fn sessions(page: &Value, look: Look) -> String {
    let mut table = look.table(&["SESSION", "MODEL", "SERVER", "STATUS", "#MESSAGES", "LAST ACTIVE", "SINCE"]);
    let entries = entries(page, "sessions");
    for entry in entries {
        let messages = entry["messages"].as_array().map(|all| all.len().into()).unwrap_or(entry["messages"].clone());
        table.add_row(vec![
            Cell::new(text(&entry["session_id"])),
            Cell::new(text(&entry["model_name"])),
            Cell::new(text(&entry["server_host"])),
            Cell::new(text(&entry["status"])),
            Cell::new(text(&messages)),
            Cell::new(moment(&entry["last_active"])),
            Cell::new(moment(&entry["created_at"])),
        ]);
    }
    table.add_row(totals([&format!("{} in all", entries.len()), "", "", "", "", "", ""].map(str::to_owned)));
    written(&table)
}

/// A table as text, without blanks at the ends of lines.
fn written(table: &Table) -> String {
    let mut out = String::new();
    for line in table.lines() {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn entries<'a>(page: &'a Value, list: &str) -> &'a [Value] {
    page[list].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn totals<const N: usize>(cells: [String; N]) -> Vec<Cell> {
    cells.into_iter().map(|cell| Cell::new(cell).add_attribute(Attribute::Bold)).collect()
}

/// The state of a server, as one word that says most.
fn state(entry: &Value) -> Cell {
    let state = text(&entry["state"]);
    if entry["online"] == true && entry["usable"] == false {
        return Cell::new("left alone").fg(Color::Yellow);
    }
    let colour = match state.as_str() {
        "up" => Color::Green,
        "down" => Color::Red,
        _ => Color::Yellow,
    };
    Cell::new(state).fg(colour)
}

/// A value without quotes, with nothing in it that a terminal would obey.
fn text(value: &Value) -> String {
    match value {
        Value::Null => dash(),
        Value::String(text) => clean(text),
        other => other.to_string(),
    }
}

fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn dash() -> String {
    "-".to_owned()
}

fn names(list: &Value) -> Vec<String> {
    list.as_array().map(|list| list.iter().map(text).collect()).unwrap_or_default()
}

/// The first of many, and how many more there are.
fn few(names: &[String]) -> String {
    match names {
        [] => dash(),
        [first, second, third, rest @ ..] if !rest.is_empty() => format!("{first}, {second}, {third} +{}", rest.len()),
        all => all.join(", "),
    }
}

fn sum(values: &[&Value]) -> f64 {
    values.iter().filter_map(|value| value.as_f64()).sum()
}

/// A count: 999, 1.2k, 3.4M.
fn short(count: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(unit, _)| count >= *unit) {
        Some((unit, name)) => format!("{:.1}{name}", count / unit),
        None => format!("{count:.0}"),
    }
}

fn bytes(count: f64) -> String {
    let units = [(1024.0_f64.powi(4), "TiB"), (1024.0_f64.powi(3), "GiB"), (1024.0 * 1024.0, "MiB"), (1024.0, "KiB")];
    match units.iter().find(|(unit, _)| count >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", count / unit),
        None => format!("{count:.0} B"),
    }
}

fn percent(share: &Value) -> String {
    share.as_f64().map_or_else(dash, |share| format!("{:.0}%", share * 100.0))
}

fn filled(total: &Value, share: &Value) -> String {
    match (total.as_f64().filter(|total| *total > 0.0), share.as_f64()) {
        (Some(total), Some(share)) => format!("{:.0}% of {}", share * 100.0, bytes(total)),
        (Some(total), None) => bytes(total),
        (None, _) => dash(),
    }
}

fn rate(value: &Value) -> String {
    value.as_f64().map_or_else(dash, |value| format!("{value:.1}"))
}

fn seconds(value: &Value) -> String {
    value.as_f64().map_or_else(dash, |value| match value {
        short if short < 1.0 => format!("{:.0} ms", short * 1000.0),
        long => format!("{long:.1} s"),
    })
}

/// A time to the second.
fn moment(value: &Value) -> String {
    let text = text(value);
    match text.get(..19) {
        Some(second) => second.replace('T', " ") + "Z",
        None => text,
    }
}
