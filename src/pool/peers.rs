//! Agents as those who have models, and as those who are to have some: the three calls by which models are copied.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use http::HeaderValue;
use olol_middleware::{BoxError, Error, Reply, Server, ServerId};
use olol_proto::v1::{CopyModelRequest, CopyModelResponse, ReadBlobRequest, ReadBlobResponse, ReadModelRequest};
use tonic::{Status, Streaming};

use super::{Backend, Context as Told, Pool, ServerSpec, Way, grpc};
use crate::ollama::{Ask, HOP};
use crate::security::{Trust, Wire};

/// The longest that a peer may take for its first word.
const FIRST_WORD: Duration = Duration::from_secs(30);

/// An agent that has models, or is to have some.
#[derive(Clone, Debug)]
pub struct Peer(Arc<grpc::Agent>);

/// Requests under a name: the compiler cannot prove of a bare box that tonic may send it.
struct Orders(Pin<Box<dyn Stream<Item = CopyModelRequest> + Send>>);

impl Stream for Orders {
    type Item = CopyModelRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<CopyModelRequest>> {
        self.0.as_mut().poll_next(cx)
    }
}

impl Peer {
    /// The agent at an address; it is shown this. `None` if an Ollama without an agent is there.
    pub fn at(spec: &ServerSpec, connect: Duration, trust: &Trust) -> Option<Self> {
        let Way::Agent(endpoint) = &spec.way else { return None };
        let hop = HeaderValue::from_static("peer");
        let reach = grpc::Reach { to: grpc::To::Dial(endpoint.clone()), timeout: connect, bound: false };
        Some(Self(Arc::new(grpc::Agent::new(spec.id.clone(), &reach, &trust.over(spec.wire), &hop))))
    }

    /// The manifest of a model there, as it is on the disk; with this digest, if one is given.
    pub async fn read_model(&self, model: &str, digest: &str) -> Result<Bytes, BoxError> {
        let request = ReadModelRequest { model: model.to_owned(), digest: digest.to_owned() };
        let reading = async { Ok(self.0.bulk().await?.read_model(request).await.map_err(said)?.into_inner().manifest) };
        within(reading).await
    }

    /// So many bytes of a blob there, from an offset on.
    pub async fn read_blob(
        &self,
        digest: &str,
        offset: u64,
        length: u64,
    ) -> Result<Streaming<ReadBlobResponse>, BoxError> {
        let request = ReadBlobRequest { digest: digest.to_owned(), offset, length };
        let reading = async { Ok(self.0.bulk().await?.read_blob(request).await.map_err(said)?.into_inner()) };
        within(reading).await
    }

    /// Has it copy a model.
    pub async fn copy_model(
        &self,
        requests: impl Stream<Item = CopyModelRequest> + Send + 'static,
    ) -> Result<Streaming<CopyModelResponse>, BoxError> {
        let orders = Orders(Box::pin(requests));
        let copying = async { Ok(self.0.bulk().await?.copy_model(orders).await.map_err(said)?.into_inner()) };
        within(copying).await
    }
}

async fn within<T>(asking: impl Future<Output = Result<T, BoxError>>) -> Result<T, BoxError> {
    tokio::time::timeout(FIRST_WORD, asking).await.map_err(|_| format!("no answer after {} s", FIRST_WORD.as_secs()))?
}

/// What a refusal says.
#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn said(status: Status) -> BoxError {
    match status.code() {
        tonic::Code::Unimplemented => "its agent is of a version that copies no models".into(),
        _ => grpc::told(&status).into(),
    }
}

impl Pool {
    /// A server's agent, if it has one.
    pub fn peer(&self, server: &Server) -> Option<Peer> {
        match &*self.0.backend(server.index)? {
            Backend::Agent(agent) => Some(Peer(agent.clone())),
            Backend::Ollama(_) | Backend::Stranger(_) => None,
        }
    }

    /// Where a server's agent is, as in `--servers` without its name and weight; `None` if it has none.
    pub fn address_of(&self, server: &ServerId) -> Option<String> {
        let members = self.members();
        let member = members.list.iter().find(|member| member.spec.id == *server)?;
        let Way::Agent(endpoint) = &member.spec.way else { return None };
        let scheme = match member.spec.wire {
            Wire::Usual => "",
            Wire::Tls => "tls://",
            Wire::Plain => "grpc://",
        };
        Some(format!("{scheme}{endpoint}"))
    }

    /// Asks one server something of our own.
    pub async fn ask(&self, server: &Server, mut ask: Ask) -> Result<Reply, Error> {
        let gone = || Error::NoServer(format!("server {} has left", server.id));
        let backend = self.0.backend(server.index).ok_or_else(gone)?;
        ask.headers.insert(HOP, self.0.hop.clone());
        let spare = ask.again();
        match (backend.ask(ask, Told::default()).await, spare) {
            (Err(Error::Server { reused: true, .. }), Some(spare)) => {
                backend.ask(Ask { fresh: true, ..spare }, Told::default()).await
            }
            (answer, _) => answer,
        }
    }
}
