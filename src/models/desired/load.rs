//! How models are brought to servers and loaded there.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, header};
use olol_middleware::{Call, Cluster, Error, Head, Payload, Peek, Reply, Route, Server, Snapshot};
use serde_json::{Value, json};
use tokio::time::timeout;
use tower::{Service, ServiceExt};

use super::Name;
use crate::models::{Line, Models};

/// The longest that a load may take.
const LOADING: Duration = Duration::from_secs(1800);
/// The longest answer that is read, bytes.
const LONGEST: usize = 64 << 10;

/// Brings a model to a server; dropping the future ends it.
pub type Bring = Arc<dyn Fn(Name, Arc<Server>) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Brings models as `models` does: by copies from other servers where it can, else from the registry.
pub fn by(models: Models) -> Bring {
    Arc::new(move |name, server| {
        let models = models.clone();
        Box::pin(async move {
            let brought = models.bring(name.text(), &server.id, &mut |_| {}).await;
            brought.map(drop).map_err(|error| error.to_string())
        })
    })
}

/// Has a model loaded, to stay so long.
pub(super) fn load<S>(
    service: S,
    cluster: Arc<Cluster>,
    snapshot: &Arc<Snapshot>,
    name: Name,
    server: Arc<Server>,
    embeds: bool,
    keep_alive: &Value,
) -> impl Future<Output = Result<(), String>> + Send + 'static + use<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Send + 'static,
    S::Future: Send + 'static,
{
    // Without anything to answer, both only load.
    let (route, path, body) = if embeds {
        (Route::Embed, "/api/embed", json!({"model": name.text(), "input": "", "keep_alive": keep_alive}))
    } else {
        (Route::Generate, "/api/generate", json!({"model": name.text(), "keep_alive": keep_alive, "stream": false}))
    };
    let call = call(snapshot, &server, route, path, &name, &body);
    async move {
        let asking = async {
            let reply = service.oneshot(call).await.map_err(|error| match error {
                Error::Busy { .. } => "all its slots are taken".to_owned(),
                error => error.to_string(),
            })?;
            if !reply.status.is_success() {
                return Err(refusal(reply).await);
            }
            reply.body.collect(LONGEST).await.map(drop).map_err(|error| error.to_string())
        };
        let too_long = || Err(format!("it did not load within {} s", LOADING.as_secs()));
        timeout(LOADING, asking).await.unwrap_or_else(|_| too_long())?;
        cluster.note_loaded(&server.id, name.model(), true);
        cluster.want_news_of(&server.id);
        Ok(())
    }
}

/// What a refusal says.
async fn refusal(reply: Reply) -> String {
    let status = reply.status.as_u16();
    let body = reply.body.collect(LONGEST).await.unwrap_or_default();
    let line = Line::all(&body).next().unwrap_or_default();
    line.error.unwrap_or_else(|| format!("status {status}"))
}

/// A call of ours to one server.
fn call(
    snapshot: &Arc<Snapshot>,
    server: &Server,
    route: Route,
    path: &'static str,
    name: &Name,
    body: &Value,
) -> Call {
    let body = Bytes::from(body.to_string());
    let mut head = Head::new(route, Method::POST, PathAndQuery::from_static(path));
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    head.peek = Peek::json(std::slice::from_ref(&body));
    head.model = Some(name.model().clone());
    let mut candidates = snapshot.all();
    candidates.only(server.index);
    Call::new(head, Payload::from_bytes(body), candidates)
}
