//! `POST /api/status/explain`: what would be done with a request now, without doing it.
//!
//! The body is that of the request in question, and so are the headers; the query says which route it is for. It goes the way
//! of a real one, marked so that layers decide and count nothing, and nothing is sent.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::Query;
use http::header::{self, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use olol_middleware::{Error, Head, Payload, Reply, Route, Scope, ServerId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::body::HttpBody;
use super::{Api, body, request, response};

/// Where it is asked.
pub(super) const PATH: &str = "/api/status/explain";

/// What the query says.
#[derive(Debug, Deserialize)]
struct Asked {
    /// The path of the request in question.
    #[serde(default = "chat")]
    route: String,
    /// Its method, if the route takes several.
    method: Option<String>,
}

fn chat() -> String {
    "/api/chat".to_owned()
}

/// The request in question: where it goes.
struct Target {
    route: Route,
    method: Method,
    path: PathAndQuery,
}

impl Api {
    pub(super) async fn explain(&self, request: Request<Incoming>, client: Option<SocketAddr>) -> Response<HttpBody> {
        if request.method() != Method::POST {
            return response::not_allowed("POST");
        }
        let target = match target(&request) {
            Ok(target) => target,
            Err(why) => return answer(StatusCode::BAD_REQUEST, &json!({"error": why})),
        };
        let (mut parts, incoming) = request.into_parts();
        let (payload, _taken) = match body::whole(incoming, &parts.headers, &self.room).await {
            Ok(arrived) => arrived,
            Err(error) => return response::refused(target.route, &error),
        };
        if matches!(payload, Payload::Stream { .. }) {
            let error = json!({"error": "there is no room for the body now, see [limits] body-memory"});
            return answer(StatusCode::SERVICE_UNAVAILABLE, &error);
        }
        let subject = request::subject(target.route, target.path.path());
        parts.method = target.method;
        parts.uri = target.path.into();
        let mut head = Head { dry: true, ..request::head(target.route, subject, parts, client) };
        head.headers.remove(header::EXPECT);
        let mut head = Arc::new(head);
        request::look(&mut head, &payload);
        if target.route.scope() == Scope::Local {
            head.trail.note("api", "the proxy answers by itself", []);
            return answer(StatusCode::OK, &told(&head, None));
        }
        let outcome = self.send(head.clone(), payload).await;
        answer(StatusCode::OK, &told(&head, Some(&outcome)))
    }
}

/// Reads which request is in question, or says what is wrong.
fn target(request: &Request<Incoming>) -> Result<Target, String> {
    let Query(asked) = Query::<Asked>::try_from_uri(request.uri()).map_err(|error| error.to_string())?;
    let unknown = || format!("'{}' is no route of Ollama; one is /api/chat", asked.route);
    let path: PathAndQuery = asked.route.parse().map_err(|_| unknown())?;
    let route = Route::find(path.path()).ok_or_else(unknown)?;
    let method = match &asked.method {
        // The one that asks for most stands last.
        None => route.allow().rsplit(", ").next().unwrap_or_default(),
        Some(method) => method,
    };
    let method = method.parse().ok().filter(|method| route.takes(method));
    let method = method.ok_or_else(|| format!("{} takes {}", path.path(), route.allow()))?;
    Ok(Target { route, method, path })
}

/// All that was decided, and what came of it.
fn told(head: &Head, outcome: Option<&Result<Reply, Error>>) -> Value {
    let (server, status, error) = match outcome {
        None => (None, StatusCode::OK, None),
        Some(Ok(reply)) => (reply.body.outcome().servers.last().map(ServerId::as_str), reply.status, None),
        Some(Err(error)) => (error.server().map(ServerId::as_str), error.status(), Some(error)),
    };
    let error = error.map(|error| {
        let after = error.retry_after().map(|after| after.as_secs_f64());
        json!({"reason": error.kind(), "message": error.to_string(), "retry_after_s": after})
    });
    json!({
        "id": head.id.as_str(),
        "method": head.method.as_str(),
        "route": head.path.as_str(),
        "model": head.peek.model,
        "key": head.key.get().map(|key| key.name.clone()),
        "trail": head.trail.take(),
        "server": server,
        "status": status.as_u16(),
        "error": error,
    })
}

fn answer(status: StatusCode, body: &Value) -> Response<HttpBody> {
    let mut answer = response::full(status, body.to_string());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
