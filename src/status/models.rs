//! The page of the models: who has them, whether those who do mean the same, and how they are used.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use olol_middleware::cluster::{Bits, Held, Known};
use olol_middleware::{ModelName, Snapshot};
use serde::Serialize;
use serde_json::value::RawValue;

use olol_middleware::instruments::ModelMeters;

use super::page::Wanted;
use super::pulls::Pulls;
use super::servers::{self, Running};
use super::time::{Figures, share, some};
use crate::models::desired::Standing;

/// One model.
#[derive(Debug, Serialize)]
pub(super) struct Entry<'a> {
    /// Canonical.
    pub(super) name: &'a str,
    tag: &'a str,
    family: Option<&'a str>,
    architecture: Option<&'a str>,
    /// That of the digest, bytes and begun millions of them.
    size: u64,
    size_mb: u64,
    /// The digest that most servers have; of as many the newest.
    digest: Option<&'a str>,
    /// Whether all servers that have it have the same.
    agrees: bool,
    digests: Vec<Variant<'a>>,
    modified_at: Option<&'a str>,
    parameters: Parameters<'a>,
    quantization: Quantization<'a>,
    compatible_servers: Places<'a>,
    waiting: usize,
    runners: Vec<Running<'a>>,
    pending_pulls: Vec<Pull<'a>>,
    /// Where it should be, and how far it is; null: nobody wants it anywhere.
    desired: Option<&'a Standing>,
    stats: Option<Figures>,
}

/// What some servers have under the name.
#[derive(Debug, Serialize)]
struct Variant<'a> {
    digest: &'a str,
    size: u64,
    quantization: Option<&'a str>,
    servers: Vec<&'a str>,
}

#[derive(Debug, Serialize)]
struct Parameters<'a> {
    parameter_size: Option<&'a str>,
    context_length: Option<u32>,
    capabilities: &'a [String],
    /// Those that it sets by itself.
    own: Option<&'a RawValue>,
}

#[derive(Debug, Serialize)]
struct Quantization<'a> {
    level: Option<&'a str>,
    bits_per_weight: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Places<'a> {
    installed: Vec<&'a str>,
    loaded: Vec<&'a str>,
    /// Those whose memory, as their agents tell it, has room for it at all; nothing is known of the others.
    fits: Vec<&'a str>,
}

#[derive(Debug, Serialize)]
struct Pull<'a> {
    server: &'a str,
    /// A share of 1.
    done: f64,
}

/// What servers say of one model.
#[derive(Default)]
struct Said<'a> {
    by_digest: BTreeMap<&'a str, (&'a Held, Vec<&'a str>)>,
}

/// Who has room for what.
struct Machine<'a> {
    name: &'a str,
    room: u64,
}

/// Models that are wanted, and that nobody has.
pub(super) fn absent(snapshot: &Snapshot, standings: &[Standing]) -> Vec<Known> {
    let names = standings.iter().map(|standing| &standing.name).filter(|name| snapshot.known(name).is_none());
    let known = |name: &ModelName| Known {
        name: name.clone(),
        installed: Bits::default(),
        loaded: Bits::default(),
        size: 0,
        makes: smallvec::SmallVec::new(),
        variants: smallvec::SmallVec::new(),
        runners: Arc::default(),
        defaults: None,
        meters: Arc::new(ModelMeters::new(name)),
    };
    names.map(known).collect()
}

/// The models of a page, by name, and whether there are more; or what is wrong with the cursor.
pub(super) fn page<'a>(
    snapshot: &'a Snapshot,
    wanted: &Wanted,
    standings: &'a [Standing],
    absent: &'a [Known],
    pulls: &Pulls,
) -> Result<(Vec<Entry<'a>>, bool), String> {
    let cursor = match &wanted.after {
        None => None,
        Some(text) => Some(ModelName::parse(text).ok_or_else(|| {
            format!("after must be the `next` of the page before, and '{text}' is no name of a model")
        })?),
    };
    let all: Vec<&Known> = snapshot.models.values().map(AsRef::as_ref).chain(absent).collect();
    let is_after = |known: &&Known, _: &str| cursor.as_ref().is_none_or(|cursor| known.name > *cursor);
    let (chosen, has_more) = wanted.cut(all, |one, other| one.name.cmp(&other.name), is_after);
    let mut said: HashMap<&ModelName, Said<'a>> = chosen.iter().map(|known| (&known.name, Said::default())).collect();
    for server in &snapshot.servers {
        for model in server.report.models.iter() {
            let Some(said) = model.canonical().and_then(|name| said.get_mut(name)) else { continue };
            said.by_digest.entry(&model.digest).or_insert((model, Vec::new())).1.push(server.id.as_str());
        }
    }
    let mut pending: HashMap<ModelName, Vec<Pull<'_>>> = HashMap::new();
    for server in &snapshot.servers {
        for (name, done) in pulls.at(server) {
            let Some(name) = ModelName::parse(&name) else { continue };
            pending.entry(name).or_default().push(Pull { server: server.id.as_str(), done: share(done) });
        }
    }
    let machines: Vec<Machine<'_>> = snapshot.servers.iter().filter_map(|server| machine(server)).collect();
    let standings: HashMap<&ModelName, &Standing> =
        standings.iter().map(|standing| (&standing.name, standing)).collect();
    let entries = chosen.into_iter().map(|known| {
        let said = said.remove(&known.name).unwrap_or_default();
        let pending_pulls = pending.remove(&known.name).unwrap_or_default();
        Entry { desired: standings.get(&known.name).copied(), pending_pulls, ..entry(known, said, snapshot, &machines) }
    });
    Ok((entries.collect(), has_more))
}

fn machine(server: &olol_middleware::Server) -> Option<Machine<'_>> {
    let vitals = server.vitals.load_full()?;
    let gpus: u64 = vitals.gpus.iter().map(|gpu| gpu.memory.total).sum();
    let room = gpus.max(vitals.memory.map_or(0, |memory| memory.total));
    Some(Machine { name: server.id.as_str(), room })
}

fn variant<'a>((digest, model, servers): (&'a str, &'a Held, Vec<&'a str>)) -> Variant<'a> {
    Variant { digest, size: model.size, quantization: some(&model.quantization), servers }
}

fn entry<'a>(known: &'a Known, said: Said<'a>, snapshot: &'a Snapshot, machines: &[Machine<'a>]) -> Entry<'a> {
    let mut variants: Vec<(&'a str, &'a Held, Vec<&'a str>)> =
        said.by_digest.into_iter().map(|(digest, (model, servers))| (digest, model, servers)).collect();
    // What is meant by the name stands first, then what most servers have.
    let usual = known.usual().map(olol_middleware::cluster::Variant::digest);
    variants.sort_by_key(|(digest, _, servers)| (Some(*digest) != usual, std::cmp::Reverse(servers.len())));
    let model = variants.first().map(|(_, model, _)| *model);
    let names = |bits: &Bits| -> Vec<&'a str> {
        bits.iter().filter_map(|index| Some(snapshot.servers.get(index)?.id.as_str())).collect()
    };
    let is_heard = |index: &usize| snapshot.servers.get(*index).is_some_and(|server| servers::is_heard(server));
    let mut loaded = Bits::default();
    known.loaded.iter().filter(is_heard).for_each(|index| loaded.insert(index));
    let size = model.map_or(known.size, |model| model.size);
    // Who has just got it has not told a digest yet.
    let told = variants.iter().filter(|(digest, ..)| !digest.is_empty()).count();
    let runners = known.runners.all();
    let place = |index: usize| snapshot.servers.get(index).map(|server| server.id.as_str());
    let text = |of: fn(&Held) -> &str| model.and_then(|model| some(of(model)));
    Entry {
        name: known.name.as_str(),
        tag: known.name.tag(),
        family: text(|model| &model.family),
        architecture: text(|model| model.architecture()),
        size,
        size_mb: size.div_ceil(1_000_000),
        digest: text(|model| &model.digest),
        agrees: told < 2,
        modified_at: text(|model| &model.modified_at),
        parameters: Parameters {
            parameter_size: text(|model| &model.parameter_size),
            context_length: model.map(|model| model.context_length).filter(|length| *length > 0),
            capabilities: model.map(|model| model.capabilities.as_slice()).unwrap_or_default(),
            own: text(|model| &model.parameters).and_then(|own| serde_json::from_str(own).ok()),
        },
        quantization: Quantization {
            level: text(|model| &model.quantization),
            bits_per_weight: model.and_then(|model| model.bits_per_weight()).map(share),
        },
        compatible_servers: Places {
            installed: names(&known.installed),
            loaded: names(&loaded),
            fits: machines.iter().filter(|machine| machine.room >= size).map(|machine| machine.name).collect(),
        },
        waiting: known.runners.line().len(),
        runners: runners.iter().map(|runner| Running::of(runner, None, place(runner.server))).collect(),
        pending_pulls: Vec::new(),
        desired: None,
        stats: known.meters.stats().map(|stats| Figures::of(stats)),
        digests: variants.into_iter().map(variant).collect(),
    }
}
