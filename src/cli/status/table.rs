//! Tables of what the proxy says, for people.

use std::fmt::Write;
use std::io::IsTerminal;

use comfy_table::{Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table};
use serde_json::Value;

/// A terminal with fewer columns is narrow.
const NARROW: u16 = 110;

/// How a table looks: as wide as the terminal and in colour, or plain.
#[derive(Clone, Copy, Debug)]
pub(in crate::cli) struct Look {
    width: Option<u16>,
    is_coloured: bool,
}

impl Look {
    /// As fits where the output goes.
    pub(in crate::cli) fn of_stdout() -> Self {
        if !std::io::stdout().is_terminal() {
            return Self { width: None, is_coloured: false };
        }
        let wants_none = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let width = terminal_size::terminal_size().map(|(width, _)| width.0);
        Self { width, is_coloured: !wants_none }
    }

    /// A table with these columns: `#` before a name says that they are numbers, `~` that they are left out where the terminal
    /// is narrow.
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
        let bare = |name: &str| name.trim_start_matches(['#', '~']).to_owned();
        table.set_header(columns.iter().map(|name| Cell::new(bare(name)).add_attribute(Attribute::Bold)));
        let is_narrow = self.width.is_some_and(|width| width < NARROW);
        for (at, name) in columns.iter().enumerate() {
            let Some(column) = table.column_mut(at) else { continue };
            column.set_padding((0, 2));
            if name.contains('#') {
                column.set_cell_alignment(CellAlignment::Right);
            }
            if is_narrow && name.starts_with('~') {
                column.set_constraint(ColumnConstraint::Hidden);
            }
        }
        table
    }
}

/// A line about the proxy as a whole.
pub(super) fn headline(summary: &Value) -> String {
    let olol = &summary["olol"];
    let (count, servers) = (|name: &str| text(&olol[name]), &olol["servers"]);
    let draining = servers["draining"].as_u64().unwrap_or_default();
    let mut line = format!(
        "olol {} at {}: {} of {} up{}, {}, {} in flight, {} waiting, {}",
        count("version"),
        count("address"),
        text(&servers["up"]),
        counted(&servers["total"], "server"),
        if draining > 0 { format!(", {draining} draining") } else { String::new() },
        counted(&olol["models"], "model"),
        count("in_flight"),
        count("queued"),
        counted(&olol["clients"], "client"),
    );
    if let Some(error) = olol["config"]["last_reload"]["error"].as_str() {
        let _ = write!(line, "\nthe configuration was not reloaded: {}", clean(error));
    }
    for fault in olol["tls"]["faults"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let _ = write!(line, "\nthe certificates are those from before: {}", clean(fault));
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
        "~#MEMORY",
        "#GPU MEMORY",
        "#REQ/S",
        "~#ERRORS",
        "~#FIRST TOKEN",
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
    let total = |path: fn(&Value) -> &Value| added(entries.iter().filter_map(|entry| path(entry).as_f64()));
    let up = entries.iter().filter(|entry| entry["online"] == true && entry["state"] != "draining").count();
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
            let _ = write!(out, "\n{}: {}", text(&entry["server"]), clean(why));
        }
    }
    let found = self::entries(page, "found");
    if !found.is_empty() {
        out.truncate(out.trim_end().len());
        out.push_str("\n\nFound on the network, and not used:");
    }
    for one in found {
        let [name, address, source, reason] = ["name", "address", "source", "reason"].map(|key| text(&one[key]));
        let _ = write!(out, "\n{name} at {address} ({source}): {reason}");
    }
    out.trim_end().to_owned() + "\n"
}

/// The models.
pub(super) fn models(page: &Value, look: Look) -> String {
    let mut table = look.table(&[
        "MODEL",
        "#SIZE",
        "~PARAMETERS",
        "QUANT",
        "~#BITS",
        "DIGEST",
        "INSTALLED",
        "LOADED",
        "#REQUESTS",
        "#TOKENS",
        "~#FIRST TOKEN",
        "~#WAITING",
    ]);
    let entries = entries(page, "models");
    for entry in entries {
        let (stats, places) = (&entry["stats"], &entry["compatible_servers"]);
        let digest = if entry["agrees"] == false {
            let count = entry["digests"].as_array().map_or(0, Vec::len);
            Cell::new(format!("{count} differ")).fg(Color::Yellow)
        } else {
            Cell::new(text(&entry["digest"]).trim_start_matches("sha256:").chars().take(12).collect::<String>())
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
    let total = |of: &dyn Fn(&Value) -> f64| added(entries.iter().map(of));
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

/// The models as an operator sees them: who has what, and who should.
pub(in crate::cli) fn inventory(page: &Value, look: Look) -> String {
    let mut table = look.table(&["MODEL", "#SIZE", "QUANT", "DIGEST", "SERVERS", "LOADED", "WANTED"]);
    let entries = entries(page, "models");
    let mut notes = String::new();
    for entry in entries {
        let (name, places) = (text(&entry["name"]), &entry["compatible_servers"]);
        let differ = entry["agrees"] == false;
        table.add_row(vec![
            Cell::new(&name),
            Cell::new(entry["size"].as_f64().filter(|size| *size > 0.0).map_or_else(dash, bytes)),
            Cell::new(text(&entry["quantization"]["level"])),
            if differ { Cell::new("differs").fg(Color::Yellow) } else { Cell::new(digest(&entry["digest"])) },
            Cell::new(few(&names(&places["installed"]))),
            Cell::new(few(&names(&places["loaded"]))),
            wish(&entry["desired"]),
        ]);
        if differ {
            let variants = entry["digests"].as_array().map(Vec::as_slice).unwrap_or_default();
            let shown = variants.iter().map(|v| format!("{} on {}", digest(&v["digest"]), few(&names(&v["servers"]))));
            let _ = write!(notes, "\n{name}: {}", shown.collect::<Vec<_>>().join(", "));
        }
        let pulls = entry["pending_pulls"].as_array().map(Vec::as_slice).unwrap_or_default();
        let shown: Vec<String> =
            pulls.iter().map(|pull| format!("{} ({})", text(&pull["server"]), percent(&pull["done"]))).collect();
        if !shown.is_empty() {
            let _ = write!(notes, "\n{name}: on its way to {}", few(&shown));
        }
        if let Some(why) = entry["desired"]["why"].as_str() {
            let _ = write!(notes, "\n{name}: {}", clean(why));
        }
    }
    let sizes = added(entries.iter().filter_map(|entry| entry["size"].as_f64()));
    let is_wanted = |entry: &&Value| entry["desired"].is_object() && entry["desired"]["replicas"] != 0;
    let wanted = entries.iter().filter(is_wanted).count();
    let wanted = if wanted > 0 { format!("{wanted} wanted") } else { String::new() };
    let all = format!("{} in all", entries.len());
    table.add_row(totals([all, bytes(sizes), String::new(), String::new(), String::new(), String::new(), wanted]));
    written(&table) + &notes + if notes.is_empty() { "" } else { "\n" }
}

/// How far a model is where it is wanted.
fn wish(desired: &Value) -> Cell {
    if !desired.is_object() {
        return Cell::new(dash());
    }
    if desired["replicas"] == 0 {
        return Cell::new("no");
    }
    let count = |name: &str| desired[name].as_array().map_or(0, Vec::len);
    let (held, making) = (count("held"), count("making"));
    let mut shown = format!("{held} of {}", text(&desired["wanted"]));
    if desired["replicas"] == "all" {
        shown.push_str(" (all)");
    }
    if making > 0 {
        let _ = write!(shown, ", {making} coming");
    }
    if count("away") > 0 {
        let _ = write!(shown, ", {} away", count("away"));
    }
    if desired["keep_loaded"] != false && !desired["keep_loaded"].is_null() {
        let _ = write!(shown, ", {} kept loaded", count("loaded"));
    }
    let is_there = desired["why"].is_null() && desired["wanted"].as_u64().is_some_and(|all| held as u64 >= all);
    Cell::new(shown).fg(if is_there { Color::Green } else { Color::Yellow })
}

/// The beginning of a digest.
fn digest(value: &Value) -> String {
    text(value).trim_start_matches("sha256:").chars().take(12).collect()
}

/// The clients.
pub(super) fn clients(page: &Value, look: Look) -> String {
    let mut table = look.table(&[
        "CLIENT",
        "PROGRAM",
        "~API",
        "#REQUESTS",
        "#IN FLIGHT",
        "#TOKENS",
        "LAST SEEN",
        "~SINCE",
        "~PRIORITY",
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
    let total =
        |names: &[&str]| added(entries.iter().flat_map(|entry| names.iter().filter_map(|name| entry[*name].as_f64())));
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
    let mut table = look.table(&["SESSION", "MODEL", "SERVER", "STATUS", "#MESSAGES", "LAST ACTIVE", "~SINCE"]);
    let entries = entries(page, "sessions");
    for entry in entries {
        table.add_row(vec![
            Cell::new(text(&entry["session_id"])),
            Cell::new(text(&entry["model_name"])),
            Cell::new(text(&entry["server_host"])),
            Cell::new(text(&entry["status"])),
            Cell::new(text(&entry["message_count"])),
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
    // One that is drained is not used either, but by an operator's wish.
    if entry["online"] == true && entry["usable"] == false && state != "draining" {
        return Cell::new("left alone").fg(Color::Yellow);
    }
    let colour = match state.as_str() {
        "up" => Color::Green,
        "down" => Color::Red,
        _ => Color::Yellow,
    };
    Cell::new(state).fg(colour)
}

/// So many of something.
fn counted(count: &Value, what: &str) -> String {
    format!("{} {what}{}", text(count), if *count == 1 { "" } else { "s" })
}

/// A value without quotes, with nothing in it that a terminal would obey.
fn text(value: &Value) -> String {
    match value {
        Value::Null => dash(),
        Value::String(text) if text.is_empty() => dash(),
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
    added(values.iter().filter_map(|value| value.as_f64()))
}

/// The sum; of nothing it is zero, and not minus zero, which std has for that.
fn added(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, value| sum + value)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PLAIN: Look = Look { width: None, is_coloured: false };

    fn server(name: &str, state: &str, metrics: &Value) -> Value {
        json!({
            "server": name, "state": state, "online": state == "up", "usable": state == "up", "current_load": 2,
            "models": ["tiny:latest", "llama3.2:3b"], "loaded_models": [{"name": "tiny:latest"}],
            "gpu_memory": 25_769_803_776_u64, "reason": "", "metrics": metrics,
            "health": {"status": if state == "up" { "pass" } else { "fail" },
                "error_details": {"message": "connection refused\u{1b}[2J"}},
        })
    }

    fn page() -> Value {
        let busy = json!({
            "requests_per_second": 3.25, "error_rate": 0.01, "first_token_time": 0.082, "prompt_tokens": 1200,
            "output_tokens": 300, "resource_usage": {"cpu": 0.125, "memory": 0.5, "gpu_memory": 0.75},
        });
        json!({"servers": [server("gpu1", "up", &busy), server("attic", "down", &json!({"first_token_time": 2.5}))]})
    }

    #[test]
    fn servers_read_as_a_table() {
        insta::assert_snapshot!(servers(&page(), PLAIN), @r"
        SERVER    STATE  LOAD  MODELS  LOADED       CPU  MEMORY       GPU MEMORY  REQ/S  ERRORS  FIRST TOKEN  TOKENS
        gpu1      up        2       2  tiny:latest  12%     50%  75% of 24.0 GiB    3.2      1%        82 ms    1.5k
        attic     down      2       2  tiny:latest    -       -         24.0 GiB      -       -        2.5 s       0
        2 in all  1 up      4       4  2 in memory                      48.0 GiB    3.2                         1.5k

        attic: connection refused?[2J
        ");
    }

    #[test]
    fn a_server_that_is_drained_is_told_as_draining_and_not_as_up() {
        let with = |state: &str| {
            let mut entry = server("gpu1", "up", &json!(null));
            entry["state"] = json!(state);
            entry["usable"] = json!(false);
            servers(&json!({"servers": [entry]}), PLAIN)
        };
        let drained = with("draining");
        assert!(
            drained.contains("draining") && drained.contains("0 up") && !drained.contains("left alone"),
            "{drained}"
        );
        assert!(with("degraded").contains("left alone"));
        let summary = json!({"olol": {
            "version": "0.1.0", "address": "127.0.0.1:8000", "servers": {"total": 1, "up": 0, "draining": 1}, "models": 1,
            "in_flight": 0, "queued": 0, "clients": 1,
        }});
        let told =
            "olol 0.1.0 at 127.0.0.1:8000: 0 of 1 server up, 1 draining, 1 model, 0 in flight, 0 waiting, 1 client\n";
        assert_eq!(headline(&summary), told);
    }

    #[test]
    fn a_session_without_a_server_has_a_dash_in_its_place() {
        let session = json!({"session_id": "s1", "model_name": "tiny", "server_host": "", "status": "idle",
            "message_count": 1, "last_active": "2026-11-25T12:00:00.000Z", "created_at": "2026-11-25T12:00:00.000Z"});
        insta::assert_snapshot!(sessions(&json!({"sessions": [session]}), PLAIN), @r"
        SESSION   MODEL  SERVER  STATUS  MESSAGES  LAST ACTIVE           SINCE
        s1        tiny   -       idle           1  2026-11-25 12:00:00Z  2026-11-25 12:00:00Z
        1 in all
        ");
    }

    #[test]
    fn models_read_as_a_table() {
        let page = json!({"models": [
            {"name": "llama3.2:3b", "size": 2_019_393_189_u64, "parameters": {"parameter_size": "3.2B"}, "agrees": true,
             "quantization": {"level": "Q4_K_M", "bits_per_weight": 4.89}, "digest": "sha256:a80c4f17acd55265feec",
             "digests": [{}], "compatible_servers": {"installed": ["a", "b", "c", "d", "e"], "loaded": ["a"]}, "waiting": 0,
             "stats": {"requests": 12_345, "prompt_tokens": 1_000_000, "output_tokens": 500_000, "first_token_time": 0.4}},
            {"name": "tiny:latest", "size": 1000, "parameters": {}, "agrees": false, "digests": [{}, {}],
             "quantization": {}, "compatible_servers": {"installed": ["a", "b"], "loaded": []}, "waiting": 2, "stats": null},
        ]});
        insta::assert_snapshot!(models(&page, PLAIN), @r"
        MODEL           SIZE  PARAMETERS  QUANT   BITS  DIGEST        INSTALLED   LOADED       REQUESTS  TOKENS  FIRST TOKEN  WAITING
        llama3.2:3b  1.9 GiB  3.2B        Q4_K_M  4.89  a80c4f17acd5  a, b, c +2  a               12.3k    1.5M       400 ms        0
        tiny:latest   1000 B  -           -          -  2 differ      a, b        -                   0       0            -        2
        2 in all     1.9 GiB                            1 differ                  1 in memory     12.3k    1.5M                     2
        ");
    }

    #[test]
    fn models_read_as_an_inventory() {
        let page = json!({"models": [
            {"name": "llama3.2:3b", "size": 2_019_393_189_u64, "agrees": true, "quantization": {"level": "Q4_K_M"},
             "digest": "sha256:a80c4f17acd55265feec", "digests": [{}],
             "compatible_servers": {"installed": ["a", "b", "c", "d", "e"], "loaded": ["a"]}, "pending_pulls": [],
             "desired": {"replicas": "all", "wanted": 5, "held": ["a", "b", "c", "d", "e"], "making": [], "away": [],
                "keep_loaded": 1, "loaded": ["a"], "why": null}},
            {"name": "mistral:7b", "size": 0, "agrees": true, "quantization": {"level": null}, "digest": null, "digests": [],
             "compatible_servers": {"installed": [], "loaded": []}, "pending_pulls": [{"server": "b", "done": 0.45}],
             "desired": {"replicas": 2, "wanted": 2, "held": [], "making": ["b"], "away": ["c"], "keep_loaded": false,
                "loaded": [], "why": "one more is wanted, and no other server is there that could take it"}},
            {"name": "old:latest", "size": 5000, "agrees": true, "quantization": {}, "digest": "sha256:1", "digests": [{}],
             "compatible_servers": {"installed": ["a"], "loaded": []}, "pending_pulls": [],
             "desired": {"replicas": 0, "wanted": 0, "held": ["a"], "making": [], "away": [], "keep_loaded": false, "why": null}},
            {"name": "tiny:latest", "size": 1000, "agrees": false, "quantization": {"level": "Q4_0"}, "digest": "sha256:11",
             "digests": [{"digest": "sha256:1111111111111111", "servers": ["a"]}, {"digest": "sha256:2222222222222222", "servers": ["b"]}],
             "compatible_servers": {"installed": ["a", "b"], "loaded": []}, "pending_pulls": [], "desired": null},
        ]});
        insta::assert_snapshot!(inventory(&page, PLAIN), @r"
        MODEL           SIZE  QUANT   DIGEST        SERVERS     LOADED  WANTED
        llama3.2:3b  1.9 GiB  Q4_K_M  a80c4f17acd5  a, b, c +2  a       5 of 5 (all), 1 kept loaded
        mistral:7b         -  -       -             -           -       0 of 2, 1 coming, 1 away
        old:latest   4.9 KiB  -       1             a           -       no
        tiny:latest   1000 B  Q4_0    differs       a, b        -       -
        4 in all     1.9 GiB                                            2 wanted

        mistral:7b: on its way to b (45%)
        mistral:7b: one more is wanted, and no other server is there that could take it
        tiny:latest: 111111111111 on a, 222222222222 on b
        ");
    }

    #[test]
    fn clients_read_as_a_table() {
        let page = json!({"clients": [
            {"client_id": "ada", "application_type": "ollama-python", "api_versions": ["ollama", "openai"],
             "requests": 12, "in_flight": 1, "prompt_tokens": 100, "output_tokens": 23,
             "connected_at": "2026-11-25T12:00:00.000Z", "last_seen": "2026-11-25T12:30:00.000Z",
             "preferences": {"priority": "high", "models": ["tiny:latest"]}},
            {"client_id": "ip-0123456789abcdef", "application_type": null, "api_versions": [], "requests": 1, "in_flight": 0,
             "connected_at": "2026-11-25T12:00:00.000Z", "last_seen": "2026-11-25T12:00:00.000Z", "preferences": null},
        ]});
        insta::assert_snapshot!(clients(&page, PLAIN), @r"
        CLIENT               PROGRAM        API             REQUESTS  IN FLIGHT  TOKENS  LAST SEEN             SINCE                 PRIORITY  MODELS
        ada                  ollama-python  ollama, openai        12          1     123  2026-11-25 12:30:00Z  2026-11-25 12:00:00Z  high      tiny:latest
        ip-0123456789abcdef  -              -                      1          0       0  2026-11-25 12:00:00Z  2026-11-25 12:00:00Z  -         -
        2 in all                                                  13          1     123
        ");
    }

    #[test]
    fn a_table_is_as_wide_as_its_terminal_and_coloured_only_there() {
        let narrow = servers(&page(), Look { width: Some(80), is_coloured: false });
        assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
        let coloured = servers(&page(), Look { width: Some(200), is_coloured: true });
        assert!(coloured.contains("\x1b[") && !servers(&page(), PLAIN).contains('\x1b'));
    }

    #[test]
    fn the_headline_tells_the_whole_in_a_line() {
        let summary = json!({"olol": {
            "version": "0.1.0", "address": "127.0.0.1:8000", "servers": {"total": 3, "up": 2}, "models": 12, "in_flight": 3,
            "queued": 1, "clients": 4, "config": {"last_reload": {"error": "line 3: unknown key"}},
            "tls": {"faults": ["a.pem: is no PEM file"]},
        }});
        insta::assert_snapshot!(headline(&summary), @r"
        olol 0.1.0 at 127.0.0.1:8000: 2 of 3 servers up, 12 models, 3 in flight, 1 waiting, 4 clients
        the configuration was not reloaded: line 3: unknown key
        the certificates are those from before: a.pem: is no PEM file
        ");
    }
}
