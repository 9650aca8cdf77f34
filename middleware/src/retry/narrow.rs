//! Keeps calls away from servers whose circuit is open, and lets the one call through that finds out.

use std::sync::Arc;

use smallvec::SmallVec;

use super::Rules;
use super::failure::model;
use crate::call::Call;
use crate::circuit::Admission;
use crate::cluster::{Server, State};
use crate::names::ServerId;
use crate::trail::Fact;

/// The most servers that a note names.
const MOST_NAMES: usize = 8;

impl Rules {
    /// Takes the servers out that are left alone now, unless nobody else is left. If it is time to find out about one of
    /// them, and the call may be sent again, it goes there; the server is returned then.
    pub(super) fn leave_alone(&self, call: &mut Call, may_probe: bool) -> Option<ServerId> {
        let others = call.candidates.count() > 1 || call.candidates.has_reserve();
        if !others || !call.candidates.iter().any(|server| server.circuits.are_restless()) {
            return None;
        }
        let asked = call.candidates.clone();
        let may_probe = may_probe && call.route.infers();
        loop {
            let (probes, closed) = self.sorted(call);
            if let Some(server) = probes.iter().filter(|_| may_probe).find(|server| self.begins_probe(call, server)) {
                call.candidates.only(server.index);
                call.note("retry", "finds out whether a server is well again", [("server", Fact::from(&server.id))]);
                return Some(server.id.clone());
            }
            if probes.is_empty() && closed.is_empty() {
                return None;
            }
            // What is left when these are gone may be the reserve: nobody has looked at that yet.
            probes.iter().chain(&closed).for_each(|server| call.candidates.drop_index(server.index));
            if call.candidates.is_empty() {
                call.candidates = asked;
                call.note("retry", "every circuit is open: asks all the same", []);
                return None;
            }
            let names = probes.iter().chain(&closed).take(MOST_NAMES).map(|server| Fact::from(&server.id)).collect();
            let facts = [("servers", Fact::List(names)), ("count", (probes.len() + closed.len()).into())];
            call.note("retry", "left alone: their circuits are open", facts);
        }
    }

    /// The candidates that somebody should find out about, and those that are left alone.
    fn sorted(&self, call: &Call) -> (Servers, Servers) {
        let model = model(call);
        let (mut probes, mut closed) = (Servers::new(), Servers::new());
        for server in call.candidates.iter().filter(|server| server.circuits.are_restless()) {
            match server.circuits.admit(model, &self.limits) {
                Admission::Yes => {}
                // Checks find out about a server that is down.
                Admission::Probe if server.state != State::Down => probes.push(server.clone()),
                Admission::Probe | Admission::No => closed.push(server.clone()),
            }
        }
        (probes, closed)
    }

    /// Takes the turn of finding out, if nobody has it. Who only asks what would be done takes none.
    fn begins_probe(&self, call: &Call, server: &Server) -> bool {
        call.dry || server.circuits.begin_probe(model(call), &self.limits)
    }
}

type Servers = SmallVec<[Arc<Server>; 4]>;
