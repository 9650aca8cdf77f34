//! `olol check`: reads a configuration as the proxy would, and prints what would run and where each value comes from.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::bail;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args};
use olol_middleware::stack::Concern;
use serde_json::{Value, json};

use super::flags::Flags;
use crate::config::{Effective, Origin, Setting};
use crate::pool::credentials::Credentials;

/// The longest value that has the column of origins moved to the right for it, characters.
const WIDEST: usize = 40;

/// Check a configuration.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Configuration file; without one, what holds without a file is printed
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn run(mut self, matches: &ArgMatches) -> anyhow::Result<()> {
        if self.file.is_some() && matches.value_source("config") == Some(ValueSource::CommandLine) {
            bail!("name the file once: as FILE, or with --config");
        }
        self.flags.config = self.file.or(self.flags.config);
        let source = self.flags.source(matches)?;
        let effective = source.read()?;
        effective.config.tls.read()?;
        Credentials::check(&effective.config.pool.credentials).map_err(anyhow::Error::msg)?;
        let settings = effective.settings()?;
        super::print(&if self.json {
            format!("{:#}\n", as_json(source.file.as_ref(), &effective, &settings))
        } else {
            as_text(source.file.as_ref(), &effective, &settings)?
        })
    }
}

/// The layers that are on, outermost first, and those that are not.
fn layers(effective: &Effective) -> (Vec<Concern>, Vec<Concern>) {
    let on = effective.config.stack.order.layers().to_vec();
    let off = Concern::ALL.into_iter().filter(|layer| !on.contains(layer)).collect();
    (on, off)
}

fn as_text(file: Option<&PathBuf>, effective: &Effective, settings: &[Setting]) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    match file {
        Some(file) => writeln!(text, "{} is good.\n", file.display())?,
        None => writeln!(text, "No file: defaults, environment and flags.\n")?,
    }
    for strange in effective.config.oddities() {
        writeln!(text, "Strange, if it is not meant so: {strange}\n")?;
    }
    let (on, off) = layers(effective);
    let width = |layers: &[Concern]| layers.iter().map(|layer| layer.as_str().len()).max().unwrap_or(0);
    let wide = width(&on).max(width(&off));
    writeln!(text, "Layers, outermost first:\n")?;
    for (at, layer) in on.iter().enumerate() {
        writeln!(text, "{:4}  {:wide$}  {}", at + 1, layer.as_str(), layer.does())?;
    }
    for layer in off {
        writeln!(text, "   -  {:wide$}  (off: not in stack.order)", layer.as_str())?;
    }
    writeln!(text, "\nValues, and where they come from:\n")?;
    let rows: Vec<[String; 3]> = settings.iter().map(row).collect();
    let wide = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.filter(|width| *width <= WIDEST).max().unwrap_or(0)
    };
    let (keys, values) = (wide(0), wide(1));
    for [key, value, origin] in &rows {
        writeln!(text, "  {key:keys$} = {value:values$}  {origin}")?;
    }
    Ok(text)
}

fn row(setting: &Setting) -> [String; 3] {
    let origins: Vec<String> = setting.origins.iter().map(ToString::to_string).collect();
    [setting.key.to_string(), setting.value.to_string(), origins.join(" and ")]
}

fn as_json(file: Option<&PathBuf>, effective: &Effective, settings: &[Setting]) -> Value {
    let (on, off) = layers(effective);
    let setting = |setting: &Setting| {
        json!({
            "key": setting.key.to_string(),
            "value": setting.value,
            "origins": setting.origins.iter().map(origin).collect::<Vec<_>>(),
        })
    };
    json!({
        "file": file,
        "layers": on.iter().map(|layer| json!({"layer": layer, "does": layer.does()})).collect::<Vec<_>>(),
        "off": off,
        "values": settings.iter().map(setting).collect::<Vec<_>>(),
    })
}

fn origin(origin: &Origin) -> Value {
    match origin {
        Origin::Default => json!({"from": "default"}),
        Origin::File(file, line) => json!({"from": "file", "file": file, "line": line}),
        Origin::Environment(name) => json!({"from": "environment", "name": name}),
        Origin::Flag(name) => json!({"from": "flag", "name": name}),
        Origin::Program => json!({"from": "program"}),
    }
}
