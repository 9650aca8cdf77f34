//! The thread that owns llama.cpp: loads the model when it is asked for, answers one request after another, and lets the
//! model go when it was idle for long enough.

use std::num::NonZeroU32;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llama_cpp_4::chat::{ChatApplyParams, ChatTemplates};
use llama_cpp_4::common_sampler::{CommonSampler, CommonSamplerParams};
use llama_cpp_4::context::LlamaContext;
use llama_cpp_4::context::params::LlamaContextParams;
use llama_cpp_4::llama_backend::LlamaBackend;
use llama_cpp_4::llama_batch::LlamaBatch;
use llama_cpp_4::model::params::LlamaModelParams;
use llama_cpp_4::model::{AddBos, LlamaModel, Special};
use llama_cpp_4::token::LlamaToken;
use serde_json::json;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

use super::answer::Summary;
use super::keep_alive::KeepAlive;
use super::log;
use super::model::ModelFile;
use super::request::{Message, Options, Refusal};
use super::stops::Shown;

/// Context of a request that names none, tokens: Ollama's default.
const DEFAULT_CONTEXT: u32 = 4096;
/// Tokens that are given to the model at once, Ollama's `num_batch`.
const BATCH: u32 = 512;
/// Weights that are worth a thread of their own, bytes.
const BYTES_A_THREAD: u64 = 32 << 20;
/// Tokens at the beginning that are kept when a prompt is too long, Ollama's `num_keep`.
const KEEP: usize = 4;

/// What a request wants of the model.
#[derive(Debug)]
pub(super) enum Wish {
    /// To be in memory.
    Load,
    /// Not to be.
    Unload,
    /// To go on with a text, word for word.
    Raw(String),
    /// To answer a prompt, after what was said before in tokens.
    Answer {
        /// Tokens of earlier prompts and answers.
        context: Vec<i32>,
        /// System message, if there is one, and prompt.
        messages: Vec<Message>,
    },
    /// To take its turn in a chat.
    Chat(Vec<Message>),
}

/// A request on its way to the runner.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) wish: Wish,
    pub(super) options: Options,
    pub(super) keep_alive: KeepAlive,
    /// Whether a prompt that is too long is cut.
    pub(super) may_cut: bool,
    pub(super) arrived: Instant,
    /// Where the answer goes; closed when the client has gone. No more events come than the context has tokens.
    pub(super) events: UnboundedSender<Event>,
}

/// A part of an answer.
#[derive(Debug)]
pub(super) enum Event {
    /// Text.
    Piece(String),
    /// The end, with what was counted.
    Done(Summary),
    /// There is no answer, or no more of it.
    Failed(Refusal),
}

impl Job {
    fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    fn send(&self, event: Event) {
        // A client that has gone wants nothing.
        let _ = self.events.send(event);
    }
}

/// What is in memory.
#[derive(Clone, Debug)]
pub(super) struct InMemory {
    /// Context, tokens.
    pub(super) context: u32,
    /// When it goes if nobody asks; `None`: never.
    pub(super) expires_at: Option<jiff::Timestamp>,
}

/// What is in memory, for others to see.
pub(super) type Memory = Arc<Mutex<Option<InMemory>>>;

/// The owner of llama.cpp.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) backend: LlamaBackend,
    pub(super) file: ModelFile,
    pub(super) jobs: Receiver<Job>,
    pub(super) memory: Memory,
}

/// What comes after a model was let go or must have another size.
enum Next {
    Unloaded,
    Resized(Job),
}

impl Runner {
    /// Answers until nobody can ask any more.
    pub(super) fn run(self) {
        while let Ok(job) = self.jobs.recv() {
            if job.is_gone() {
                continue;
            }
            if matches!(job.wish, Wish::Unload) {
                job.send(Event::Done(Summary::of("unload")));
                continue;
            }
            self.with_model(job);
            *self.in_memory() = None;
        }
    }

    fn in_memory(&self) -> std::sync::MutexGuard<'_, Option<InMemory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the model for a job, and serves until it is to go.
    fn with_model(&self, mut job: Job) {
        let begun = Instant::now();
        let every_layer = LlamaModelParams::default().with_n_gpu_layers(u32::from(u16::MAX));
        let model = match LlamaModel::load_from_file(&self.backend, &self.file.path, &every_layer) {
            Ok(model) => model,
            Err(error) => return job.send(Event::Failed(Refusal::failed(log::take_complaints(&error.to_string())))),
        };
        let mut begun = Some(begun);
        loop {
            let begun = begun.take().unwrap_or_else(Instant::now);
            let mut session = match self.session(&model, &job.options) {
                Ok(session) => session,
                Err(refusal) => return job.send(Event::Failed(refusal)),
            };
            match self.serve(&mut session, job, begun) {
                Next::Unloaded => return,
                Next::Resized(other) => job = other,
            }
        }
    }

    fn session<'model>(&self, model: &'model LlamaModel, options: &Options) -> Result<Session<'model>, Refusal> {
        let context = self.context_for(options);
        let threads = options
            .num_thread
            .and_then(|threads| i32::try_from(threads).ok())
            .unwrap_or_else(|| threads(self.file.size));
        let parameters = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(context))
            .with_n_batch(BATCH)
            .with_n_threads(threads)
            .with_n_threads_batch(threads);
        let llama = model.new_context(&self.backend, parameters).map_err(|error| {
            Refusal::failed(format!(
                "cannot make room for {context} tokens of context: {}",
                log::take_complaints(&error.to_string())
            ))
        })?;
        Ok(Session {
            model,
            llama,
            context,
            templates: ChatTemplates::from_model(model, None).ok(),
            cached: Vec::new(),
            batch: LlamaBatch::new(BATCH as usize, 1),
        })
    }

    /// The context for a request: what it asks for, but no more than the model was trained for.
    fn context_for(&self, options: &Options) -> u32 {
        let wanted = options.num_ctx.unwrap_or(DEFAULT_CONTEXT);
        wanted.min(self.file.trained_context().unwrap_or(wanted)).max(8)
    }

    /// Answers jobs with one session until the model is to go or to have another size.
    fn serve(&self, session: &mut Session<'_>, mut job: Job, begun: Instant) -> Next {
        let mut load = begun.elapsed();
        loop {
            self.remember(session, KeepAlive::Forever);
            session.answer(&job, load);
            if job.keep_alive.is_zero() {
                return Next::Unloaded;
            }
            let idle_since = Instant::now();
            self.remember(session, job.keep_alive);
            let next = self.next_job(job.keep_alive, idle_since);
            let Some(next) = next else { return Next::Unloaded };
            if matches!(next.wish, Wish::Unload) {
                *self.in_memory() = None;
                next.send(Event::Done(Summary::of("unload")));
                return Next::Unloaded;
            }
            // Who asks for no size takes what there is.
            if next.options.num_ctx.is_some() && self.context_for(&next.options) != session.context {
                return Next::Resized(next);
            }
            job = next;
            load = Duration::ZERO;
        }
    }

    /// The next job of a client who is still there; `None` when the model was idle for long enough.
    fn next_job(&self, keep_alive: KeepAlive, idle_since: Instant) -> Option<Job> {
        loop {
            let job = match keep_alive {
                KeepAlive::Forever => self.jobs.recv().ok()?,
                KeepAlive::For(limit) => match self.jobs.recv_timeout(limit.saturating_sub(idle_since.elapsed())) {
                    Ok(job) => job,
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
                },
            };
            if !job.is_gone() {
                return Some(job);
            }
        }
    }

    fn remember(&self, session: &Session<'_>, keep_alive: KeepAlive) {
        let expires_at = match keep_alive {
            KeepAlive::Forever => None,
            KeepAlive::For(limit) => jiff::Timestamp::now().checked_add(limit).ok(),
        };
        *self.in_memory() = Some(InMemory { context: session.context, expires_at });
    }
}

/// Threads for a model of this many bytes: a small one is quicker on few, since they wait for each other at every step.
fn threads(size: u64) -> i32 {
    let useful = 1 + size / BYTES_A_THREAD;
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    i32::try_from(useful.min(processors as u64)).unwrap_or(1)
}

/// A model with a context of one size.
struct Session<'model> {
    model: &'model LlamaModel,
    llama: LlamaContext<'model>,
    /// Tokens that fit.
    context: u32,
    /// How messages become a prompt; `None` if the model's template cannot be used.
    templates: Option<ChatTemplates>,
    /// The tokens whose state is in the context, in order.
    cached: Vec<LlamaToken>,
    batch: LlamaBatch,
}

/// Why an answer goes no further.
enum Stop {
    /// Nobody listens any more.
    Gone,
    Refused(Refusal),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Session<'_> {
    /// Does what a job wishes.
    fn answer(&mut self, job: &Job, load: Duration) {
        match self.generate(job, load) {
            Ok(summary) => job.send(Event::Done(summary)),
            Err(Stop::Gone) => {}
            Err(Stop::Refused(refusal)) => job.send(Event::Failed(refusal)),
        }
    }

    fn generate(&mut self, job: &Job, load: Duration) -> Result<Summary, Stop> {
        if matches!(job.wish, Wish::Load | Wish::Unload) {
            return Ok(Summary::of("load"));
        }
        let ready = Instant::now();
        let prompt = self.prompt(job)?;
        let mut sampler = sampler(self.model, &job.options)?;
        for token in &prompt {
            sampler.accept(*token, false);
        }
        self.read(&prompt, job)?;
        let read = Instant::now();
        let mut made = Vec::new();
        let mut shown = Shown::new(&job.options.stop);
        let reason = self.write(job, &mut sampler, &mut shown, &mut made)?;
        let rest = shown.finish();
        if !rest.is_empty() {
            job.send(Event::Piece(rest));
        }
        let tokens = made.len();
        let ends = made.last().is_some_and(|last| self.model.is_eog_token(*last));
        made.truncate(tokens - usize::from(ends));
        let is_raw = matches!(job.wish, Wish::Raw(_));
        Ok(Summary {
            reason,
            context: if is_raw { Vec::new() } else { prompt.iter().chain(&made).map(|token| token.0).collect() },
            total: job.arrived.elapsed(),
            load,
            prompt_tokens: prompt.len(),
            prompt: read - ready,
            tokens,
            eval: read.elapsed(),
        })
    }

    /// The tokens of a prompt, cut to what fits.
    fn prompt(&self, job: &Job) -> Result<Vec<LlamaToken>, Stop> {
        let fits = |tokens: &[LlamaToken]| tokens.len() < self.context as usize;
        let mut tokens = match &job.wish {
            Wish::Load | Wish::Unload => Vec::new(),
            Wish::Raw(text) => self.tokens(text)?,
            Wish::Answer { context, messages } => {
                let mut tokens: Vec<LlamaToken> = context.iter().copied().map(LlamaToken).collect();
                let is_known = |token: &LlamaToken| (0..self.model.n_vocab()).contains(&token.0);
                if !tokens.iter().all(is_known) {
                    return Err(Refusal::bad(
                        "context has tokens that the model does not know; it belongs to another model",
                    )
                    .into());
                }
                let bos = if tokens.is_empty() { self.bos() } else { AddBos::Never };
                tokens.extend(self.render(messages, bos)?);
                tokens
            }
            Wish::Chat(messages) => {
                let mut messages = messages.clone();
                let mut tokens = self.render(&messages, self.bos())?;
                // The oldest turns go first; the system message and the last turn stay.
                while !fits(&tokens) && job.may_cut {
                    let last = messages.len().saturating_sub(1);
                    let Some(oldest) = messages[..last].iter().position(|message| message.role != "system") else {
                        break;
                    };
                    messages.remove(oldest);
                    tokens = self.render(&messages, self.bos())?;
                }
                tokens
            }
        };
        if tokens.is_empty() {
            return Err(Refusal::bad("the prompt has no tokens").into());
        }
        if !fits(&tokens) {
            if !job.may_cut {
                return Err(Refusal::bad(format!(
                    "the input length exceeds the context length: {} tokens, and {} fit; ask for a larger num_ctx, or let it be cut (truncate)",
                    tokens.len(),
                    self.context
                ))
                .into());
            }
            // As Ollama: the beginning, and the second half of what fits.
            let keep = KEEP.min(self.context as usize / 4);
            let rest = tokens.len() - self.context as usize / 2;
            tokens.drain(keep..rest + keep);
        }
        Ok(tokens)
    }

    fn bos(&self) -> AddBos {
        if self.model.add_bos_token() { AddBos::Always } else { AddBos::Never }
    }

    fn tokens(&self, text: &str) -> Result<Vec<LlamaToken>, Refusal> {
        self.model
            .str_to_token_with_special(text, self.bos(), Special::Tokenize)
            .map_err(|error| Refusal::bad(error.to_string()))
    }

    /// Messages in the model's own form. What users wrote cannot become control tokens.
    fn render(&self, messages: &[Message], bos: AddBos) -> Result<Vec<LlamaToken>, Refusal> {
        let Some(templates) = &self.templates else {
            return Err(Refusal::failed(format!(
                "the chat template of the model cannot be used: {}",
                log::take_complaints("it is no valid Jinja")
            )));
        };
        let list: Vec<_> =
            messages.iter().map(|message| json!({"role": message.role, "content": message.content})).collect();
        let request = ChatApplyParams::new(serde_json::Value::Array(list).to_string());
        let prompt = templates
            .apply(&request)
            .map_err(|error| Refusal::bad(format!("the chat template cannot render these messages: {error}")))?;
        prompt.tokenize_prompt(self.model, bos).map_err(|error| Refusal::bad(error.to_string()))
    }

    /// Makes the context hold the prompt, with what it has of it already.
    fn read(&mut self, prompt: &[LlamaToken], job: &Job) -> Result<(), Stop> {
        let common = self.cached.iter().zip(prompt).take_while(|(had, wanted)| had == wanted).count();
        // The last token is always read: it gives the first probabilities.
        let mut common = common.min(prompt.len() - 1);
        let kept = u32::try_from(common)
            .is_ok_and(|from| self.llama.clear_kv_cache_seq(Some(0), Some(from), None).unwrap_or(false));
        if !kept {
            self.llama.clear_kv_cache();
            common = 0;
        }
        self.cached.truncate(common);
        for piece in prompt[common..].chunks(BATCH as usize) {
            if job.is_gone() {
                return Err(Stop::Gone);
            }
            let is_last = self.cached.len() + piece.len() == prompt.len();
            self.decode(piece, is_last)?;
        }
        Ok(())
    }

    /// Gives tokens to the model; the last one's probabilities can be read afterwards if asked for.
    fn decode(&mut self, tokens: &[LlamaToken], wants_logits: bool) -> Result<(), Refusal> {
        self.batch.clear();
        for (at, token) in tokens.iter().enumerate() {
            let position = i32::try_from(self.cached.len() + at).unwrap_or(i32::MAX);
            let added = self.batch.add(*token, position, &[0], wants_logits && at + 1 == tokens.len());
            added.map_err(|error| Refusal::failed(error.to_string()))?;
        }
        if let Err(error) = self.llama.decode(&mut self.batch) {
            // What the context holds is not known any more.
            self.llama.clear_kv_cache();
            self.cached.clear();
            return Err(Refusal::failed(format!("llama.cpp failed: {}", log::take_complaints(&error.to_string()))));
        }
        self.cached.extend_from_slice(tokens);
        Ok(())
    }

    /// Makes tokens until it is enough, and says why it was.
    fn write(
        &mut self,
        job: &Job,
        sampler: &mut CommonSampler,
        shown: &mut Shown,
        made: &mut Vec<LlamaToken>,
    ) -> Result<&'static str, Stop> {
        let most = usize::try_from(job.options.num_predict).unwrap_or(usize::MAX);
        loop {
            if made.len() >= most || self.cached.len() >= self.context as usize {
                return Ok("length");
            }
            if job.is_gone() {
                return Err(Stop::Gone);
            }
            let token =
                sampler.sample(&mut self.llama, -1, false).map_err(|error| Refusal::failed(error.to_string()))?;
            sampler.accept(token, true);
            made.push(token);
            if self.model.is_eog_token(token) {
                return Ok("stop");
            }
            let bytes = self
                .model
                .token_to_raw_bytes(token, Special::Plaintext)
                .map_err(|error| Refusal::failed(error.to_string()))?;
            let text = shown.push(&bytes);
            if !text.is_empty() {
                job.send(Event::Piece(text));
            }
            if shown.has_stopped() {
                return Ok("stop");
            }
            if made.len() < most && self.cached.len() < self.context as usize {
                self.decode(&[token], true)?;
            }
        }
    }
}

/// llama.cpp's own chain of samplers, set as a request wants it.
fn sampler(model: &LlamaModel, options: &Options) -> Result<CommonSampler, Refusal> {
    let mut parameters = CommonSamplerParams::new();
    let mut scalars = parameters.scalars();
    // Outside 32 bits, as below zero, means another one each time.
    scalars.seed = u32::try_from(options.seed).unwrap_or_else(|_| fastrand::u32(..u32::MAX));
    scalars.temp = options.temperature;
    scalars.top_k = options.top_k;
    scalars.top_p = options.top_p;
    scalars.min_p = options.min_p;
    scalars.typ_p = options.typical_p;
    scalars.penalty_last_n = options.repeat_last_n;
    scalars.penalty_repeat = options.repeat_penalty;
    scalars.penalty_present = options.presence_penalty;
    scalars.penalty_freq = options.frequency_penalty;
    parameters.set_scalars(&scalars);
    CommonSampler::new(model, &mut parameters).map_err(|error| Refusal::failed(error.to_string()))
}
