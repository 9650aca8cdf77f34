//! Routes of our own: `/metrics`, `/healthz`, `/readyz`, and what is below `/api/status/` and `/olol/`.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{Request, Response, StatusCode, Uri, header};
use axum::response::IntoResponse;
use axum::routing::{get, post, put};
use hyper::body::Incoming;
use metrics_exporter_prometheus::PrometheusHandle;
use olol_middleware::{Pattern, Route, ServerId, Shared, instruments};
use serde_json::json;
use tower::ServiceExt;

use super::body::HttpBody;
use super::response;
use crate::models::desired::{KeepLoaded, Name, Replicas, Wanted as Wished};
use crate::reload::{Reloaded, Reloader, Trigger};
use crate::sessions::Sessions;
use crate::status::{self, About, Detail, Wanted};

/// The longest body of a request to one of these pages, bytes: it is held whole, and counted nowhere.
const LONGEST_BODY: usize = 64 << 10;

/// The router of our own routes.
#[derive(Clone, Debug)]
pub struct Own {
    router: Router,
    shared: Shared,
}

#[derive(Clone)]
struct Known {
    shared: Shared,
    about: About,
    metrics: PrometheusHandle,
    reloader: Arc<Reloader>,
    sessions: Sessions,
}

impl Own {
    /// Routes over the state of this proxy.
    pub fn new(
        shared: Shared,
        about: About,
        metrics: PrometheusHandle,
        reloader: Arc<Reloader>,
        sessions: Sessions,
    ) -> Self {
        let router = Router::new()
            .route("/metrics", get(scrape))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/api/status", get(details))
            .route("/api/status/servers", get(servers))
            .route("/api/status/servers/{server}", get(server))
            .route("/api/status/servers/{server}/{what}", post(drain))
            .route("/api/status/requests/{id}", get(request))
            .route("/api/status/models/{*model}", put(pin).delete(unpin))
            .route("/api/status/reload", post(reload))
            .fallback(nothing)
            .layer(DefaultBodyLimit::max(LONGEST_BODY))
            .with_state(Known { shared: shared.clone(), about, metrics, reloader, sessions });
        Self { router, shared }
    }

    /// Whether a path is ours. Ollama's own status is, where a page of it is asked for.
    pub(super) fn takes(path: &str, query: Option<&str>) -> bool {
        // The status with a slash at its end is Ollama's to redirect.
        let is_below_status = path.strip_prefix("/api/status/").is_some_and(|below| !below.is_empty());
        matches!(path, "/metrics" | "/healthz" | "/readyz")
            || is_below_status
            || path.starts_with("/olol/")
            || (path == "/api/status" && Wanted::is_in(query))
    }

    /// Answers a request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<HttpBody> {
        if !is_for_anybody(request.uri().path())
            && let Err(error) = self.shared.keys.admit_admin(request.headers())
        {
            return response::refused(Route::Status, &error);
        }
        match self.router.clone().oneshot(request).await {
            Ok(answer) => answer.map(HttpBody::Axum),
            Err(never) => match never {},
        }
    }
}

/// Whether a page needs no key: machines ask for these, and they tell nothing.
fn is_for_anybody(path: &str) -> bool {
    matches!(path, "/healthz" | "/readyz")
}

/// In a large cluster the page takes tens of milliseconds, for which no stream waits.
async fn scrape(State(known): State<Known>) -> Response<axum::body::Body> {
    match tokio::task::spawn_blocking(move || page(&known)).await {
        Ok(page) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// What Prometheus reads.
fn page(known: &Known) -> String {
    let state = known.reloader.running().state();
    let is_good = state.last.as_ref().is_none_or(|last| last.error.is_none());
    // First what is observed: that may begin to count something.
    let observed = instruments::observe(&known.shared);
    let (sessions, bytes) = known.sessions.counts();
    let sessions = instruments::observe_sessions(sessions, bytes);
    let parts = [
        known.metrics.render(),
        observed,
        sessions,
        instruments::observe_state(known.about.state.as_ref().map(crate::state::State::is_up)),
        instruments::observe_members(
            &known.shared.cluster.snapshot(),
            known.about.pool.strangers().iter().map(|one| one.source),
        ),
        instruments::observe_wishes(&known.about.desired.wishes()),
        instruments::observe_config(is_good, state.since),
        instruments::observe_process(&process()),
        instruments::observe_build(env!("CARGO_PKG_VERSION"), option_env!("OLOL_REVISION").unwrap_or("unknown")),
    ];
    parts.concat()
}

/// What the system says of this process.
fn process() -> instruments::Process {
    let metrics_process::collector::Metrics {
        cpu_seconds_total: cpu_seconds,
        resident_memory_bytes: memory,
        virtual_memory_bytes: addresses,
        open_fds: files,
        max_fds: most_files,
        threads,
        start_time_seconds: started,
        ..
    } = metrics_process::collector::collect();
    instruments::Process { cpu_seconds, memory, addresses, files, most_files, threads, started }
}

/// Ready is who has a server that takes calls. The first look at the servers is over: nobody is answered before.
async fn ready(State(known): State<Known>) -> impl IntoResponse {
    let (is_ready, told) = status::readiness(&known.shared.cluster.snapshot());
    (if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, told)
}

async fn servers(State(known): State<Known>, uri: Uri) -> Response<axum::body::Body> {
    listed(known, Wanted::read(&uri, Some(Detail::Servers))).await
}

/// One server, as it stands in the page of them.
async fn server(State(known): State<Known>, Path(name): Path<String>) -> Response<axum::body::Body> {
    match status::server(&known.shared, &known.about, &ServerId::new(&name)) {
        Some(Ok(server)) => ([(header::CONTENT_TYPE, "application/json")], server).into_response(),
        Some(Err(error)) => refused(StatusCode::INTERNAL_SERVER_ERROR, error),
        None => refused(StatusCode::NOT_FOUND, no_server(&known, &name)),
    }
}

/// Says of a name which servers there are.
fn no_server(known: &Known, name: &str) -> String {
    let snapshot = known.shared.cluster.snapshot();
    let names: Vec<&str> = snapshot.servers.iter().map(|server| server.id.as_str()).take(20).collect();
    format!("there is no server '{name}'; the servers are {}", names.join(", "))
}

/// There is no such page.
async fn nothing(uri: Uri) -> Response<axum::body::Body> {
    let path: String = uri.path().chars().take(60).collect();
    refused(StatusCode::NOT_FOUND, format!("there is no page '{path}'; GET /api/status names those that there are"))
}

async fn details(State(known): State<Known>, uri: Uri) -> Response<axum::body::Body> {
    listed(known, Wanted::read(&uri, None)).await
}

/// A page of everything that is known. A long one takes some milliseconds, for which no stream waits.
async fn listed(known: Known, wanted: Result<Wanted, String>) -> Response<axum::body::Body> {
    let page = match wanted {
        Ok(wanted) => {
            let runtime = tokio::runtime::Handle::current();
            let page = move || runtime.block_on(status::page(&known.shared, &known.about, &wanted));
            tokio::task::spawn_blocking(page).await
        }
        Err(why) => Ok(Err((StatusCode::BAD_REQUEST, why))),
    };
    match page {
        Ok(Ok(page)) => ([(header::CONTENT_TYPE, "application/json")], page).into_response(),
        Ok(Err((status, why))) => (status, axum::Json(json!({"error": why}))).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, axum::Json(json!({"error": error.to_string()}))).into_response()
        }
    }
}

/// Has a server finish what it has and gives it nothing new, or lets it take calls again.
async fn drain(State(known): State<Known>, Path((server, what)): Path<(String, String)>) -> Response<axum::body::Body> {
    let draining = match what.as_str() {
        "drain" => true,
        "undrain" => false,
        other => {
            let error = format!("a server can be told 'drain' or 'undrain', not '{other}'");
            return (StatusCode::NOT_FOUND, axum::Json(json!({"error": error}))).into_response();
        }
    };
    let cluster = &known.shared.cluster;
    let id = ServerId::new(&server);
    if !cluster.drain(&id, draining) {
        return refused(StatusCode::NOT_FOUND, no_server(&known, &server));
    }
    if let Some(state) = &known.about.state {
        state.drain(&id, draining);
    }
    let in_flight = cluster.snapshot().server(&id).map_or(0, |server| server.load.in_flight());
    axum::Json(json!({"server": server, "draining": draining, "in_flight": in_flight})).into_response()
}

/// Where a model should be, as it is said in passing.
#[derive(serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Pin {
    replicas: Replicas,
    servers: Vec<Pattern>,
    keep_loaded: KeepLoaded,
}

impl Default for Pin {
    fn default() -> Self {
        Self { replicas: Replicas::default(), servers: Vec::new(), keep_loaded: KeepLoaded::No }
    }
}

/// Wants a model on some servers, whatever the file says of it.
async fn pin(State(known): State<Known>, Path(model): Path<String>, body: Bytes) -> Response<axum::body::Body> {
    let Some(name) = Name::parse(&model) else {
        return refused(StatusCode::BAD_REQUEST, format!("'{model}' is no name of a model"));
    };
    let said = if body.trim_ascii().is_empty() { Ok(Pin::default()) } else { serde_json::from_slice(&body) };
    let Pin { replicas, servers, keep_loaded } = match said {
        Ok(pin) => pin,
        Err(error) => {
            let hint =
                "a pin is {\"replicas\": 2 or \"all\", \"servers\": [names], \"keep_loaded\": true, false or a number}";
            return refused(StatusCode::BAD_REQUEST, format!("{error}; {hint}"));
        }
    };
    let told = json!({"model": name.model().as_str(), "pinned": true, "replicas": replicas,
        "servers": servers.iter().map(Pattern::as_str).collect::<Vec<_>>(), "keep_loaded": keep_loaded});
    match known.about.desired.pin(Wished { name, replicas, servers, keep_loaded }).await {
        Ok(()) => axum::Json(told).into_response(),
        Err(error) => refused(StatusCode::INSUFFICIENT_STORAGE, error),
    }
}

/// Wants a model no more than the file says.
async fn unpin(State(known): State<Known>, Path(model): Path<String>) -> Response<axum::body::Body> {
    let Some(name) = Name::parse(&model) else {
        return refused(StatusCode::BAD_REQUEST, format!("'{model}' is no name of a model"));
    };
    let running = known.reloader.running().state();
    let in_file = running.config.models.iter().find(|wanted| wanted.name == name);
    match known.about.desired.unpin(name.model()).await {
        Ok(true) => {
            let replicas = in_file.map(|wanted| wanted.replicas);
            axum::Json(json!({"model": name.model().as_str(), "pinned": false, "replicas": replicas})).into_response()
        }
        Ok(false) => {
            let hint =
                if in_file.is_some() { "it stands in [[models]] of the configuration" } else { "nobody wants it" };
            refused(StatusCode::NOT_FOUND, format!("model '{}' is not pinned: {hint}", name.model()))
        }
        Err(error) => refused(StatusCode::INSUFFICIENT_STORAGE, error),
    }
}

fn refused(status: StatusCode, error: impl std::fmt::Display) -> Response<axum::body::Body> {
    (status, axum::Json(json!({"error": error.to_string()}))).into_response()
}

/// What was decided about a request that is over.
async fn request(State(known): State<Known>, Path(id): Path<String>) -> Response<axum::body::Body> {
    let Some(record) = known.shared.requests.find(&id) else {
        let error = format!("no request '{id}' is remembered: it is unknown, not over yet, or too long ago");
        return (StatusCode::NOT_FOUND, axum::Json(json!({"error": error}))).into_response();
    };
    axum::Json(record).into_response()
}

/// Reads the configuration again.
async fn reload(State(known): State<Known>) -> Response<axum::body::Body> {
    match known.reloader.reload(Trigger::Request).await {
        Ok(Reloaded { layers, changed, needs_restart }) => {
            let done = json!({
                "reloaded": true,
                "layers": layers,
                "changed": changed,
                "needs_restart": needs_restart,
            });
            axum::Json(done).into_response()
        }
        Err(error) => (StatusCode::UNPROCESSABLE_ENTITY, axum::Json(json!({"error": error.told()}))).into_response(),
    }
}
