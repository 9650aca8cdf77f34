//! An agent that has the token, and tells what no agent would.

use std::convert::Infallible;
use std::future::Ready;
use std::net::SocketAddr;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use olol::security::proof::{Purpose, Side, Transcript};
use olol_proto::v1::membership_server::{Membership, MembershipServer};
use olol_proto::v1::{
    DescribeRequest, DescribeResponse, Gpu, HelloRequest, HelloResponse, LoadedModel, Model, ProveRequest,
    ProveResponse, RelayRequest, RelayResponse, ServerMetrics, ServerState, Turn, WatchRequest,
};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::server::{Grpc, ServerStreamingService, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;

use super::harness::cluster::token;

/// What it says to a call that is passed on.
pub(super) type Relayed = Vec<RelayResponse>;

/// Starts one.
pub(super) async fn start() -> (SocketAddr, JoinSet<()>) {
    start_with(lie(), Vec::new()).await
}

/// Starts one that has the model `tiny` and answers calls for it with this.
pub(super) async fn start_answering(relayed: Relayed) -> (SocketAddr, JoinSet<()>) {
    let tiny = Model { name: "tiny:latest".to_owned(), digest: "ab".repeat(32), size_bytes: 1000, ..Model::default() };
    let state = ServerState { online: true, models: vec![tiny], generation: 1, ..ServerState::default() };
    start_with(state, relayed).await
}

async fn start_with(state: ServerState, relayed: Relayed) -> (SocketAddr, JoinSet<()>) {
    let lies = Lies { state, relayed };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let lies = lies.clone();
            let service = hyper::service::service_fn(move |request| answer(lies.clone(), request));
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            connections.spawn(async move { drop(http.serve_connection(TokioIo::new(stream), service).await) });
        }
    });
    (address, task)
}

async fn answer(
    lies: Lies,
    request: hyper::Request<Incoming>,
) -> Result<hyper::Response<tonic::body::Body>, Infallible> {
    match request.uri().path() {
        "/olol.v1.Server/Watch" => Ok(Grpc::new(ProstCodec::default()).server_streaming(lies, request).await),
        "/olol.v1.Server/Describe" => Ok(Grpc::new(ProstCodec::default()).unary(lies, request).await),
        "/olol.v1.Server/Relay" if !lies.relayed.is_empty() => {
            Ok(Grpc::new(ProstCodec::default()).streaming(lies, request).await)
        }
        path if path.starts_with("/olol.v1.Membership/") => MembershipServer::new(Knows).call(request).await,
        _ => Ok(Status::unknown(long().chars().take(1000).collect::<String>()).into_http()),
    }
}

/// Proves that it knows the token.
#[derive(Clone)]
struct Knows;

#[tonic::async_trait]
impl Membership for Knows {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        let HelloRequest { nonce, address, bound } = request.into_inner();
        let (caller, agent) = (nonce.as_ref().try_into().unwrap(), [7; 32]);
        let transcript = Transcript { purpose: Purpose::Call, address, bound, caller, agent };
        // Among very many that are none.
        let mut proofs = vec![Bytes::from(transcript.proof(&token(), Side::Agent))];
        proofs.extend((0..1000).map(|_| Bytes::from_static(&[0; 32])));
        Ok(Response::new(HelloResponse { nonce: agent.to_vec().into(), proofs }))
    }

    async fn prove(&self, _: Request<ProveRequest>) -> Result<Response<ProveResponse>, Status> {
        Ok(Response::new(ProveResponse { instance_id: long() }))
    }
}

/// A text that no word is, and that does no good to a terminal or a log.
fn long() -> String {
    format!("\u{1b}[2J\n2026-01-01T00:00:00Z  INFO olol: all is well{}", "x".repeat(100 << 10))
}

fn lie() -> ServerState {
    let model = |number: u32| Model {
        name: if number == 0 { long() } else { format!("m{number}\n") },
        digest: "../../etc/passwd".to_owned(),
        size_bytes: u64::MAX,
        bits_per_weight: f32::NAN,
        context_length: u32::MAX,
        capabilities: vec!["x".to_owned(); 10_000],
        modified_at: "never".to_owned(),
        parameters_json: "{".repeat(10_000),
        ..Model::default()
    };
    let loaded = LoadedModel {
        name: long(),
        size_vram_bytes: u64::MAX,
        slots: u32::MAX,
        context_length: u32::MAX,
        ..LoadedModel::default()
    };
    let gpu = Gpu { name: long(), memory_free_bytes: u64::MAX, utilization: f32::NAN, ..Gpu::default() };
    ServerState {
        online: true,
        in_flight: u32::MAX,
        queued: u32::MAX,
        others: u32::MAX,
        models: (0..60).map(model).collect(),
        loaded: vec![loaded; 3],
        active_sessions: (0..5000).map(|number| format!("s{number}")).collect(),
        cpu_usage: f32::INFINITY,
        memory_usage: f32::NAN,
        memory_used_bytes: u64::MAX,
        memory_total_bytes: 1,
        gpus: vec![
            gpu,
            Gpu { memory_total_bytes: u64::MAX, ..Gpu::default() },
            Gpu { memory_total_bytes: u64::MAX, ..Gpu::default() },
        ],
        disk_free_bytes: u64::MAX,
        heartbeat_ms: u64::MAX,
        generation: u64::MAX,
        metrics: Some(ServerMetrics {
            response_time_seconds: f32::NAN,
            requests_per_second: f32::NEG_INFINITY,
            error_rate: f32::MAX,
            collected_at_ms: u64::MAX,
        }),
        pending_pulls: (0..5000).map(|number| (format!("p{number}"), f32::NAN)).collect(),
        turns: vec![Turn { known: u64::MAX, goes_on: true, news: vec![u64::MAX; 1000] }; 10],
        ollama_version: long(),
        ..ServerState::default()
    }
}

/// What it is as a server.
#[derive(Clone)]
struct Lies {
    state: ServerState,
    relayed: Relayed,
}

impl StreamingService<RelayRequest> for Lies {
    type Response = RelayResponse;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<RelayResponse, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, _: Request<Streaming<RelayRequest>>) -> Self::Future {
        let said = std::mem::take(&mut self.relayed);
        std::future::ready(Ok(Response::new(Box::pin(stream::iter(said.into_iter().map(Ok))))))
    }
}

impl ServerStreamingService<WatchRequest> for Lies {
    type Response = ServerState;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<ServerState, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, _: Request<WatchRequest>) -> Self::Future {
        let states = stream::iter([Ok(self.state.clone())]).chain(stream::pending());
        std::future::ready(Ok(Response::new(Box::pin(states))))
    }
}

impl UnaryService<DescribeRequest> for Lies {
    type Response = DescribeResponse;
    type Future = Ready<Result<Response<DescribeResponse>, Status>>;

    fn call(&mut self, _: Request<DescribeRequest>) -> Self::Future {
        let told = DescribeResponse {
            name: long(),
            instance_id: long(),
            os: long(),
            arch: long(),
            olol_version: long(),
            cpu_count: u32::MAX,
            ..DescribeResponse::default()
        };
        std::future::ready(Ok(Response::new(told)))
    }
}
