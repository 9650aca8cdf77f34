//! The engine's process: a small Ollama on a socket that its parent has opened.
//!
//! llama.cpp ends its process when something goes badly wrong, so it never runs in the process that serves clients. The
//! parent keeps the socket: calls that come while a new child starts wait in it, and are answered.

use std::future::IntoFuture;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use futures_util::StreamExt;
use http::header::CONTENT_TYPE;
use http::{StatusCode, Uri};
use llama_cpp_4::llama_backend::LlamaBackend;
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

use super::answer::{Form, Summary, go_json, object};
use super::model::ModelFile;
use super::request::{self, Chat, Common, Generate, Message, Options, Refusal, Show};
use super::runner::{Event, Job, Memory, Runner, Wish};
use super::{READY, log};

/// The API that the engine speaks, and whose engine it is.
const VERSION: &str = concat!("0.33.0-olol.", env!("CARGO_PKG_VERSION"));
/// Requests that may wait, as Ollama's `OLLAMA_MAX_QUEUE`.
const QUEUE: usize = 512;
/// Time between two looks whether the parent is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Serves a model on the socket that is our standard input, until the parent goes. Tells the parent on standard output
/// that it is ready, or why it will never be.
pub(crate) fn run(model: &Path, folder: &Path) -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    log::start();
    let backend = LlamaBackend::init()?;
    let file = match ModelFile::open(&backend, model) {
        Ok(file) => file,
        Err(why) => {
            tell(&why)?;
            // The parent says it; twice would be once too often.
            std::process::exit(1);
        }
    };
    let memory = Memory::default();
    let (jobs, queue) = sync_channel(QUEUE);
    let runner = Runner { backend, file: file.clone(), jobs: queue, memory: memory.clone() };
    std::thread::Builder::new().name("llama".to_owned()).spawn(move || runner.run())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = std::os::unix::net::UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        socket.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(socket)?;
        tell(READY)?;
        tokio::select! {
            served = axum::serve(listener, router(Face { file: Arc::new(file), memory, jobs })).into_future() => served?,
            // A parent that was killed could not tidy up.
            () = orphaned(parent) => std::fs::remove_dir_all(folder)?,
        }
        Ok(())
    })
}

/// A line for the parent.
fn tell(line: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", line.replace('\n', " "))?;
    out.flush()
}

/// Waits until the parent has gone: an engine that nobody can ask must not stay.
async fn orphaned(parent: Option<rustix::process::Pid>) {
    while rustix::process::getppid() == parent {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What the routes need.
#[derive(Clone)]
struct Face {
    file: Arc<ModelFile>,
    memory: Memory,
    jobs: SyncSender<Job>,
}

fn router(face: Face) -> Router {
    Router::new()
        .route("/", get(|| async { "Ollama is running" }))
        .route("/api/version", get(|| async { json(&json!({"version": VERSION})) }))
        .route("/api/status", get(|| async { json(&json!({"cloud": {"disabled": true, "source": "config"}})) }))
        .route("/api/tags", get(tags))
        .route("/api/ps", get(ps))
        .route("/api/show", post(show))
        .route("/api/generate", post(generate))
        .route("/api/chat", post(chat))
        .fallback(any(refuse))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .with_state(face)
}

fn json(value: &impl Serialize) -> Response {
    ([(CONTENT_TYPE, "application/json; charset=utf-8")], go_json(value)).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, json(&json!({"error": self.1}))).into_response()
    }
}

/// What this engine cannot do, said in the form that the route's clients read.
async fn refuse(uri: Uri) -> Response {
    let path = uri.path();
    let text = format!(
        "the built-in engine of OLOL cannot answer {path} yet: it serves one model with /api/generate and /api/chat; put an \
         Ollama behind OLOL for the rest (start one, and `olol up` without --embedded finds it)"
    );
    match olol_middleware::Route::find(path).map(olol_middleware::Route::dialect) {
        None => (StatusCode::NOT_FOUND, [(CONTENT_TYPE, "text/plain")], "404 page not found").into_response(),
        Some(dialect) => {
            let error = olol_middleware::Error::Unsupported(text);
            let headers = [(CONTENT_TYPE, "application/json; charset=utf-8")];
            (error.status(), headers, crate::api::error_body(dialect, &error)).into_response()
        }
    }
}

async fn tags(State(face): State<Face>) -> Response {
    #[derive(Serialize)]
    struct Tags<'a> {
        models: [super::model::Listed<'a>; 1],
    }
    json(&Tags { models: [face.file.listed()] })
}

async fn ps(State(face): State<Face>) -> Response {
    #[derive(Serialize)]
    struct Ps<'a> {
        models: Vec<super::model::Loaded<'a>>,
    }
    let memory = face.memory.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let loaded = memory.map(|memory| {
        // What stays for ever is shown as Ollama shows it: far in the future.
        let expires_at = memory.expires_at.map_or_else(|| "2319-01-01T00:00:00Z".to_owned(), |at| at.to_string());
        face.file.loaded(expires_at, memory.context)
    });
    json(&Ps { models: loaded.into_iter().collect() })
}

async fn show(State(face): State<Face>, body: Bytes) -> Result<Response, Refusal> {
    let asked: Show = request::read(&body)?;
    let name = if asked.model.is_empty() { asked.name } else { asked.model };
    if name.is_empty() {
        return Err(Refusal::bad("model is required"));
    }
    if !face.file.is_called(&name) {
        let tagged = olol_middleware::ModelName::parse(&name).map_or(name, |name| name.to_string());
        return Err(Refusal::no_model(format!("model '{tagged}' not found")));
    }
    Ok(json(&face.file.shown()))
}

async fn generate(State(face): State<Face>, body: Bytes) -> Result<Response, Refusal> {
    let asked: Generate = request::read(&body)?;
    face.knows(&asked.model)?;
    asked.check()?;
    let wish = if asked.prompt.is_empty() {
        None
    } else if asked.raw {
        Some(Wish::Raw(asked.prompt))
    } else {
        let message = |role: &str, content| Message { role: role.to_owned(), content, ..Message::default() };
        let system = Some(asked.system).filter(|system| !system.is_empty()).map(|system| message("system", system));
        let messages = system.into_iter().chain([message("user", asked.prompt)]).collect();
        Some(Wish::Answer { context: asked.context, messages })
    };
    face.answer(Form::Generate, asked.model, wish, &asked.common).await
}

async fn chat(State(face): State<Face>, body: Bytes) -> Result<Response, Refusal> {
    let asked: Chat = request::read(&body)?;
    if asked.model.is_empty() {
        return Err(Refusal::bad("model is required"));
    }
    face.knows(&asked.model)?;
    asked.check()?;
    let wish = (!asked.messages.is_empty()).then_some(Wish::Chat(asked.messages));
    face.answer(Form::Chat, asked.model, wish, &asked.common).await
}

impl Face {
    fn knows(&self, model: &str) -> Result<(), Refusal> {
        if self.file.is_called(model) { Ok(()) } else { Err(Refusal::no_model(format!("model '{model}' not found"))) }
    }

    /// Has a wish done, and writes the answer as the client wants it: in lines, or as one object.
    async fn answer(
        &self,
        form: Form,
        model: String,
        wish: Option<Wish>,
        common: &Common,
    ) -> Result<Response, Refusal> {
        let keep_alive = common.keep_alive()?;
        let options = Options::read(&common.options)?;
        let streams = common.stream.unwrap_or(true);
        let wish = wish.unwrap_or(if keep_alive.is_zero() { Wish::Unload } else { Wish::Load });
        let (sender, mut events) = unbounded_channel();
        let may_cut = common.truncate.unwrap_or(true);
        let job = Job { wish, options, keep_alive, may_cut, arrived: Instant::now(), events: sender };
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => Refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                "server busy, please try again.  maximum pending requests exceeded".to_owned(),
            ),
            TrySendError::Disconnected(_) => Refusal::failed("the engine has stopped"),
        })?;
        if streams {
            match next(&mut events).await? {
                Event::Done(summary) if matches!(summary.reason, "load" | "unload") => {
                    Ok(whole(form, &model, "", &summary))
                }
                first => Ok(lines(form, model, first, events)),
            }
        } else {
            let mut text = String::new();
            loop {
                match next(&mut events).await? {
                    Event::Piece(piece) => text.push_str(&piece),
                    Event::Done(summary) => return Ok(whole(form, &model, &text, &summary)),
                    Event::Failed(refusal) => return Err(refusal),
                }
            }
        }
    }
}

/// The next event; a failure is the answer.
async fn next(events: &mut UnboundedReceiver<Event>) -> Result<Event, Refusal> {
    match events.recv().await {
        Some(Event::Failed(refusal)) => Err(refusal),
        Some(event) => Ok(event),
        None => Err(Refusal::failed("the engine has stopped")),
    }
}

fn whole(form: Form, model: &str, text: &str, summary: &Summary) -> Response {
    ([(CONTENT_TYPE, "application/json; charset=utf-8")], object(form, model, text, Some(summary))).into_response()
}

/// One line for each piece, as it comes, up to the end or a failure.
fn lines(form: Form, model: String, first: Event, events: UnboundedReceiver<Event>) -> Response {
    let all = futures_util::stream::unfold((Some(first), Some(events)), |(first, events)| async move {
        let mut events = events?;
        let event = match first {
            Some(event) => event,
            None => events.recv().await?,
        };
        let goes_on = matches!(event, Event::Piece(_)).then_some(events);
        Some((event, (None, goes_on)))
    });
    let lines = all.map(move |event| {
        let mut line = match event {
            Event::Piece(text) => object(form, &model, &text, None),
            Event::Done(summary) => object(form, &model, "", Some(&summary)),
            Event::Failed(Refusal(_, text)) => go_json(&json!({"error": text})),
        };
        line.push('\n');
        Ok::<_, std::convert::Infallible>(Bytes::from(line))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}
