//! Routes of our own: `/metrics`, `/healthz`, `/readyz`, and what is below `/api/status/` and `/olol/`.

use axum::Router;
use axum::extract::State;
use axum::http::{Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::body::Incoming;
use metrics_exporter_prometheus::PrometheusHandle;
use olol_middleware::{Shared, instruments};
use tower::ServiceExt;

use super::body::HttpBody;
use crate::status::{self, About};

/// The router of our own routes.
#[derive(Clone, Debug)]
pub struct Own {
    router: Router,
}

#[derive(Clone)]
struct Known {
    shared: Shared,
    about: About,
    metrics: PrometheusHandle,
}

impl Own {
    /// Routes over the state of this proxy.
    pub fn new(shared: Shared, about: About, metrics: PrometheusHandle) -> Self {
        let router = Router::new()
            .route("/metrics", get(scrape))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/api/status/servers", get(servers))
            .with_state(Known { shared, about, metrics });
        Self { router }
    }

    /// Whether a path is ours.
    pub(super) fn takes(path: &str) -> bool {
        // The status with a slash at its end is Ollama's to redirect.
        let is_below_status = path.strip_prefix("/api/status/").is_some_and(|below| !below.is_empty());
        matches!(path, "/metrics" | "/healthz" | "/readyz") || is_below_status || path.starts_with("/olol/")
    }

    /// Answers a request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<HttpBody> {
        match self.router.clone().oneshot(request).await {
            Ok(answer) => answer.map(HttpBody::Axum),
            Err(never) => match never {},
        }
    }
}

async fn scrape(State(known): State<Known>) -> impl IntoResponse {
    instruments::observe(&known.shared.cluster.snapshot());
    instruments::remembered(known.shared.affinity.len());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], known.metrics.render())
}

/// Ready is who has a server that takes calls.
async fn ready(State(known): State<Known>) -> impl IntoResponse {
    let snapshot = known.shared.cluster.snapshot();
    let up = snapshot.servers.iter().filter(|server| server.state == olol_middleware::cluster::State::Up).count();
    let code = if up > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, format!("{up} of {} servers up\n", snapshot.servers.len()))
}

async fn servers(State(known): State<Known>) -> impl IntoResponse {
    axum::Json(status::servers(&known.shared.cluster.snapshot(), &known.about))
}
