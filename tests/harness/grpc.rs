//! A program that speaks gRPC to an agent or to a proxy.

use std::net::SocketAddr;

use olol_proto::v1::server_client::ServerClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::cluster::token;
use super::patiently;

/// A client that shows the token of the tests.
pub type Client = ServerClient<InterceptedService<Channel, fn(Request<()>) -> Result<Request<()>, Status>>>;

/// A client that has a connection.
pub async fn client(address: SocketAddr) -> Client {
    let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = patiently("a gRPC connection", endpoint.connect()).await.unwrap();
    ServerClient::with_interceptor(channel, shows_token)
}

/// Agents serve nobody who does not show it.
#[expect(clippy::unnecessary_wraps, reason = "as tonic wants it")]
fn shows_token(mut request: Request<()>) -> Result<Request<()>, Status> {
    request.metadata_mut().insert("olol-token", token().reveal().parse().unwrap());
    Ok(request)
}
