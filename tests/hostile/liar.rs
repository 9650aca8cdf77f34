//! An agent that has the token, and tells what no agent would.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use olol::security::proof::{Purpose, Side, Transcript};
use olol_proto::v1::membership_server::{Membership, MembershipServer};
use olol_proto::v1::server_server::{Server, ServerServer};
use olol_proto::v1::*;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status, Streaming};
use tower::Service;

use super::harness::cluster::token;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Starts one.
pub(super) async fn start() -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
                let (mut proofs, mut lies) = (MembershipServer::new(Knows), ServerServer::new(Lies));
                async move {
                    let is_proof = request.uri().path().starts_with("/olol.v1.Membership/");
                    let answer = if is_proof { proofs.call(request).await } else { lies.call(request).await };
                    Ok::<_, Infallible>(answer.unwrap())
                }
            });
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            connections.spawn(async move { drop(http.serve_connection(TokioIo::new(stream), service).await) });
        }
    });
    (address, task)
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
        gpus: vec![Gpu { name: long(), memory_free_bytes: u64::MAX, utilization: f32::NAN, ..Gpu::default() }; 3],
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
pub(super) struct Lies;

fn no<T>() -> Result<T, Status> {
    Err(Status::unknown(long().chars().take(1000).collect::<String>()))
}

#[tonic::async_trait]
impl Server for Lies {
    type RelayStream = Answers<RelayResponse>;
    type WatchStream = Answers<ServerState>;
    type GenerateStream = Answers<GenerateResponse>;
    type ChatStream = Answers<ChatResponse>;
    type PullModelStream = Answers<PullModelResponse>;
    type ChatMessageStream = Answers<ChatResponse>;
    type ReadBlobStream = Answers<ReadBlobResponse>;
    type CopyModelStream = Answers<CopyModelResponse>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let states = stream::iter([Ok(lie())]).chain(stream::pending());
        Ok(Response::new(Box::pin(states)))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let long = long();
        Ok(Response::new(DescribeResponse {
            name: long.clone(),
            instance_id: long.clone(),
            os: long.clone(),
            arch: long.clone(),
            olol_version: long,
            cpu_count: u32::MAX,
            ..DescribeResponse::default()
        }))
    }

    async fn relay(&self, _: Request<Streaming<RelayRequest>>) -> Result<Response<Self::RelayStream>, Status> {
        no()
    }

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        no()
    }

    async fn chat(&self, _: Request<ChatRequest>) -> Result<Response<Self::ChatStream>, Status> {
        no()
    }

    async fn embed(&self, _: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        no()
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        no()
    }

    async fn show_model(&self, _: Request<ShowModelRequest>) -> Result<Response<ShowModelResponse>, Status> {
        no()
    }

    async fn pull_model(&self, _: Request<PullModelRequest>) -> Result<Response<Self::PullModelStream>, Status> {
        no()
    }

    async fn create_session(&self, _: Request<CreateSessionRequest>) -> Result<Response<Session>, Status> {
        no()
    }

    async fn chat_message(&self, _: Request<ChatMessageRequest>) -> Result<Response<Self::ChatMessageStream>, Status> {
        no()
    }

    async fn end_session(&self, _: Request<EndSessionRequest>) -> Result<Response<EndSessionResponse>, Status> {
        no()
    }

    async fn get_session(&self, _: Request<GetSessionRequest>) -> Result<Response<Session>, Status> {
        no()
    }

    async fn read_model(&self, _: Request<ReadModelRequest>) -> Result<Response<ReadModelResponse>, Status> {
        no()
    }

    async fn read_blob(&self, _: Request<ReadBlobRequest>) -> Result<Response<Self::ReadBlobStream>, Status> {
        no()
    }

    async fn copy_model(
        &self,
        _: Request<Streaming<CopyModelRequest>>,
    ) -> Result<Response<Self::CopyModelStream>, Status> {
        no()
    }
}
