//! How servers become known, prove themselves, and leave.

use metrics::{Unit, counter, describe_counter};

use super::observed::written;
use super::page::Gauge;
use super::{JOINS, LEASES, LOOK_UPS, MEMBERS, MEMBERSHIP, PROBES, PROOFS};
use crate::cluster::{Snapshot, Source};

/// The words of all sources; two of them have the same.
const SOURCES: [&str; 6] = ["static", "dns", "joined", "mdns", "scan", "local"];
/// Those by which agents are asked for proof.
const FOUND: [&str; 3] = ["mdns", "scan", "local"];
/// Those whose servers have a lease.
const LEASED: [&str; 3] = ["joined", "mdns", "scan"];

/// What came of a look-up of a name that stands for servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookUp {
    /// It led to servers.
    Found,
    /// It does not exist, or leads nowhere.
    Nowhere,
    /// There was no answer.
    Failed,
}

/// Who was at an address that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// An agent.
    Agent,
    /// An Ollama.
    Ollama,
    /// Nobody that we know.
    Nobody,
}

/// Tells the recorder what these metrics mean.
pub(super) fn describe() {
    describe_counter!(JOINS, Unit::Count, "Connections of agents that dial in: taken, refused, or full at that moment");
    describe_counter!(MEMBERSHIP, Unit::Count, "Servers that joined or left, by how they are known");
    describe_counter!(PROOFS, Unit::Count, "Agents that were found and asked for proof, by result (ok, refused)");
    describe_counter!(LEASES, Unit::Count, "Servers that were let go since they were not heard of for too long");
    describe_counter!(PROBES, Unit::Count, "Looks of a scan at a port of an address, by who was there");
    describe_counter!(LOOK_UPS, Unit::Count, "Look-ups of names that stand for servers, by result");
}

/// Lets them begin at zero.
pub(super) fn begin() {
    for source in SOURCES {
        for change in ["joined", "left"] {
            counter!(MEMBERSHIP, "source" => source, "change" => change).increment(0);
        }
    }
    for source in FOUND {
        for result in ["ok", "refused"] {
            counter!(PROOFS, "source" => source, "result" => result).increment(0);
        }
    }
    for source in LEASED {
        counter!(LEASES, "source" => source).increment(0);
    }
    for found in ["agent", "ollama", "nobody"] {
        counter!(PROBES, "found" => found).increment(0);
    }
    for result in ["found", "nowhere", "failed"] {
        counter!(LOOK_UPS, "result" => result).increment(0);
    }
}

/// A server of a source has joined, or left.
pub fn member_changed(source: Source, joined: bool) {
    let change = if joined { "joined" } else { "left" };
    counter!(MEMBERSHIP, "source" => source.as_str(), "change" => change).increment(1);
}

/// An agent that was found was asked for proof.
pub fn proved(source: Source, is_good: bool) {
    counter!(PROOFS, "source" => source.as_str(), "result" => if is_good { "ok" } else { "refused" }).increment(1);
}

/// A server was not heard of for too long, and is let go.
pub fn lease_ended(source: Source) {
    counter!(LEASES, "source" => source.as_str()).increment(1);
}

/// A port of an address was looked at.
pub fn probed(found: Probed) {
    let found = match found {
        Probed::Agent => "agent",
        Probed::Ollama => "ollama",
        Probed::Nobody => "nobody",
    };
    counter!(PROBES, "found" => found).increment(1);
}

/// A name that stands for servers was looked up.
pub fn looked_up(result: LookUp) {
    let result = match result {
        LookUp::Found => "found",
        LookUp::Nowhere => "nowhere",
        LookUp::Failed => "failed",
    };
    counter!(LOOK_UPS, "result" => result).increment(1);
}

/// Who is known now: those that are used, and those that are only shown, each by how they were found.
#[expect(clippy::cast_precision_loss, reason = "there are thousands at most")]
pub fn observe_members(snapshot: &Snapshot, strangers: impl Iterator<Item = Source>) -> String {
    let mut counts = [[0_usize; SOURCES.len()]; 2];
    let used = snapshot.servers.iter().map(|server| (0, server.source));
    for (trust, source) in used.chain(strangers.map(|source| (1, source))) {
        if let Some(at) = SOURCES.iter().position(|word| *word == source.as_str()) {
            counts[trust][at] += 1;
        }
    }
    let help = "Servers that are used, and those that were found and are only shown, by how they are known";
    let mut gauge = Gauge::new(MEMBERS, help, &["source", "trust"]);
    for (trust, counts) in ["used", "shown"].iter().zip(counts) {
        for (source, count) in SOURCES.iter().zip(counts) {
            gauge.add([*source, *trust], count as f64);
        }
    }
    written([gauge])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[tokio::test]
    async fn those_who_are_used_and_those_who_are_shown_are_counted_by_source() {
        let cluster = testing::cluster(&[&[], &[]]).await;
        let page = observe_members(&cluster.snapshot(), [Source::ScannedOllama, Source::Scan].into_iter());
        assert!(page.contains("olol_servers{source=\"static\",trust=\"used\"} 2\n"), "{page}");
        assert!(page.contains("olol_servers{source=\"scan\",trust=\"shown\"} 2\n"), "{page}");
        assert!(page.contains("olol_servers{source=\"mdns\",trust=\"shown\"} 0\n"), "{page}");
    }
}
