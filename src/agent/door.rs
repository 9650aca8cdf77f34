//! Who is let in: a machine of the cluster, known by its certificate or by its proof, and programs that show the token.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderMap;
use olol_proto::v1::membership_server::{Membership, MembershipServer};
use olol_proto::v1::{HelloRequest, HelloResponse, ProveRequest, ProveResponse};
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

use crate::security::proof::{self, Nonce, Purpose, Side, Transcript};
use crate::security::{Seldom, Tokens, token};
use crate::serve::Peer;

/// The largest message that a stranger may send, bytes.
const LARGEST_HELLO: usize = 1024;
/// Proofs that may be made at the same time on one connection: whoever begins one has a stream open until it is over.
const MOST_PROVING: u32 = 4;
/// Where proofs are made.
const PROOFS: &str = "/olol.v1.Membership/";

/// Knows who belongs to the cluster.
#[derive(Debug)]
pub struct Doorkeeper {
    tokens: Tokens,
    /// The id of this process.
    instance: String,
    warned: Seldom,
}

impl Doorkeeper {
    /// Lets in who knows one of these tokens. `instance`: the id of this process.
    pub fn new(tokens: Tokens, instance: String) -> Self {
        Self { tokens, instance, warned: Seldom::default() }
    }

    /// Says in the log that somebody was refused, if nothing was said for a while.
    fn warn(&self, client: SocketAddr, reason: &str) {
        if self.warned.may_speak() {
            tracing::warn!(%client, reason, "a call was refused");
        }
    }
}

/// The door of one connection.
#[derive(Debug)]
pub struct Door {
    keeper: Arc<Doorkeeper>,
    peer: Peer,
    purpose: Purpose,
    /// Whether who is at the other end belongs to the cluster, whatever a call shows.
    is_open: AtomicBool,
    /// What a caller that has said Hello is about to prove.
    begun: Mutex<Option<Transcript>>,
    /// Proofs that are being made.
    proving: AtomicU32,
    /// Whether a caller has proved nothing, or has not believed us.
    is_refused: AtomicBool,
    /// The first call has come in.
    entered: AtomicBool,
    /// Told of the first call.
    pub enters: Notify,
}

impl Door {
    /// The door of a connection that was made for this purpose.
    pub fn new(keeper: Arc<Doorkeeper>, peer: Peer, purpose: Purpose) -> Self {
        Self {
            keeper,
            purpose,
            is_open: AtomicBool::new(peer.is_machine),
            peer,
            begun: Mutex::default(),
            proving: AtomicU32::new(0),
            is_refused: AtomicBool::new(false),
            entered: AtomicBool::new(false),
            enters: Notify::new(),
        }
    }

    /// Whether a call goes to where proofs are made.
    pub fn leads_to_proofs(path: &str) -> bool {
        path.starts_with(PROOFS)
    }

    /// Where proofs are made, unless too many are being made already.
    pub fn proofs(self: &Arc<Self>) -> Option<MembershipServer<Proofs>> {
        let more = |count: u32| (count < MOST_PROVING).then_some(count + 1);
        self.proving.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        let proofs = Proofs(Arc::new(Place(self.clone())));
        Some(MembershipServer::new(proofs).max_decoding_message_size(LARGEST_HELLO))
    }

    /// Whether a caller has proved nothing, or has not believed us.
    pub fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Relaxed)
    }

    /// Why a call is refused, if it is.
    pub fn refuses(&self, headers: &HeaderMap) -> Option<&'static str> {
        if self.is_open.load(Ordering::Acquire) || self.keeper.tokens.is_shown(headers) {
            if !self.entered.load(Ordering::Relaxed) {
                self.lets_in();
            }
            return None;
        }
        let reason = if headers.contains_key(token::HEADER) {
            "the token is not that of this agent's cluster; give both the same: `olol token` prints it where the agent runs, and \
             OLOL_TOKEN or --token-file give it to the proxy"
        } else {
            "this agent serves its cluster alone, and the call shows no token; `olol token` prints it where the agent runs, a \
             proxy takes it from OLOL_TOKEN or --token-file, and other programs send it as olol-token"
        };
        self.keeper.warn(self.peer.address, reason);
        Some(reason)
    }

    fn lets_in(&self) {
        self.peer.is_known.store(true, Ordering::Relaxed);
        self.entered.store(true, Ordering::Relaxed);
        self.enters.notify_one();
    }

    fn hello(&self, hello: HelloRequest) -> Result<HelloResponse, Status> {
        let caller =
            Nonce::try_from(hello.nonce.as_ref()).map_err(|_| Status::invalid_argument("a nonce is of 32 bytes"))?;
        if hello.bound && !self.is_reached_at(&hello.address) {
            self.keeper.warn(self.peer.address, proof::ELSEWHERE);
            return Err(Status::permission_denied(proof::ELSEWHERE));
        }
        let agent = proof::nonce().map_err(|error| Status::internal(error.to_string()))?;
        let transcript =
            Transcript { purpose: self.purpose, address: hello.address, bound: hello.bound, caller, agent };
        let tokens = self.keeper.tokens.all();
        let proofs = tokens.iter().map(|token| transcript.proof(token, Side::Agent).into()).collect();
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = Some(transcript);
        Ok(HelloResponse { nonce: agent.to_vec().into(), proofs })
    }

    fn is_reached_at(&self, dialled: &str) -> bool {
        let here = self.peer.here.map(proof::plain);
        here.is_some() && here == dialled.parse().ok()
    }

    fn prove(&self, shown: &[u8]) -> Result<ProveResponse, Status> {
        // Each Hello is good for one attempt.
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner).take();
        let is_proved = |transcript: &Transcript| {
            self.keeper.tokens.all().iter().any(|token| transcript.is_proved(token, Side::Caller, shown))
        };
        if begun.as_ref().is_some_and(is_proved) {
            self.peer.is_known.store(true, Ordering::Relaxed);
            self.is_open.store(true, Ordering::Release);
        }
        if self.is_open.load(Ordering::Relaxed) {
            return Ok(ProveResponse { instance_id: self.keeper.instance.clone() });
        }
        self.is_refused.store(true, Ordering::Relaxed);
        let reason = "the caller has no proof of the cluster token; give both the same: `olol token` prints it where the agent \
                      runs, and OLOL_TOKEN or --token-file give it to the proxy";
        self.keeper.warn(self.peer.address, reason);
        Err(Status::unauthenticated(reason))
    }
}

/// Where a proof is made. Clones are the same.
#[derive(Clone, Debug)]
pub struct Proofs(Arc<Place>);

/// One of the places for those who prove something, until it is dropped.
#[derive(Debug)]
struct Place(Arc<Door>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.proving.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tonic::async_trait]
impl Membership for Proofs {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        self.0.0.hello(request.into_inner()).map(Response::new)
    }

    async fn prove(&self, request: Request<ProveRequest>) -> Result<Response<ProveResponse>, Status> {
        self.0.0.prove(&request.into_inner().proof).map(Response::new)
    }
}
