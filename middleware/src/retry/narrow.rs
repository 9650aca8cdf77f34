//! Keeps calls away from servers whose circuit is open, and lets the one call through that finds out.

use std::sync::Arc;

use smallvec::SmallVec;

use super::Rules;
use super::failure::runner;
use crate::call::Call;
use crate::circuit::Admission;
use crate::cluster::{Server, State};
use crate::trail::Fact;

/// The most servers that a note names.
const MOST_NAMES: usize = 8;

impl Rules {
    /// Takes the servers out that are left alone now, unless nobody else is left. If it is time to find out about one of
    /// them, and the call may be sent again, it goes there; the server is returned then.
    pub(super) fn leave_alone(&self, call: &mut Call, may_probe: bool) -> Option<Arc<Server>> {
        let is_restless = |server: &&Arc<Server>| server.circuits.are_restless();
        if call.candidates.count() < 2 || !call.candidates.iter().any(|server| is_restless(&server)) {
            return None;
        }
        let may_probe = may_probe && call.route.infers();
        let (mut alone, mut probed) = (Servers::new(), None);
        for server in call.candidates.iter().filter(is_restless) {
            match server.circuits.admit(runner(call, server).as_deref(), &self.limits) {
                Admission::Yes => {}
                // Checks find out about a server that is down.
                Admission::Probe if may_probe && server.state != State::Down && self.begins_probe(call, server) => {
                    probed = Some(server.clone());
                    break;
                }
                Admission::Probe | Admission::No => alone.push(server.clone()),
            }
        }
        if let Some(server) = probed {
            call.candidates.only(server.index);
            call.note("retry", "finds out whether a server is well again", [("server", Fact::from(&server.id))]);
            return Some(server);
        }
        if alone.len() == call.candidates.count() {
            call.note("retry", "every circuit is open: asks all the same", []);
        } else if !alone.is_empty() {
            alone.iter().for_each(|server| call.candidates.drop_index(server.index));
            let names = alone.iter().take(MOST_NAMES).map(|server| Fact::from(&server.id)).collect();
            let facts = [("servers", Fact::List(names)), ("count", alone.len().into())];
            call.note("retry", "left alone: their circuits are open", facts);
        }
        None
    }

    /// Takes the turn of finding out, if nobody has it. Who only asks what would be done takes none.
    fn begins_probe(&self, call: &Call, server: &Server) -> bool {
        call.dry || server.circuits.begin_probe(runner(call, server).as_deref(), &self.limits)
    }
}

type Servers = SmallVec<[Arc<Server>; 4]>;
