//! The one owner of places at servers: who works on what is counted here and nowhere else.
//!
//! A lease is taken when a server is picked and lives in the reply's body, so a place is free when the last byte is out or
//! the client has gone, not when the head was sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What one server is doing for us. Lives beside the snapshots of the cluster, not in them.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
}

impl Load {
    /// Calls that this server is answering for us.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Takes a place, freed when the lease is dropped.
    pub fn lease(self: &Arc<Self>) -> Lease {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease { load: self.clone() }
    }
}

/// A place at a server.
#[derive(Debug)]
pub struct Lease {
    load: Arc<Load>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.load.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
