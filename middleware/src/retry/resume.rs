//! A stream survives its server: when it breaks off, another server goes on from the text already sent.
//!
//! The other server has the same model by digest, finishes the client's prompt with its own template without generating, and
//! is then asked, raw, for what follows that prompt and the text delivered so far. What it says is written in the form that
//! the client reads, up to the last line with the counts of the whole. As a stream whose last line is not its own a resumed
//! answer of `/api/generate` has no `context`: raw answers have none, and nobody else tells tokens.
//!
//! Where the text would not be what an unbroken answer had been, nobody goes on, and the stream ends as it broke: with tools,
//! thinking, formats, images, probabilities (their parsers do not run on raw prompts, or what they need is gone). While
//! nothing at all has been delivered any call is simply sent again.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::BoxFuture;
use smallvec::SmallVec;
use tokio::time::Instant;
use tower::{Service, ServiceExt};

use super::ask::{self, Asking, No};
use super::delivered::{Delivered, Form};
use super::mould::{Account, Made, Mould};
use super::request::Request;
use super::{Resume, Rules};
use crate::call::{Body, Call, Chunk, Outcome, Reply, Source};
use crate::cluster::{Bits, Candidates, Server, Snapshot};
use crate::error::{Error, Phase};
use crate::instruments::RunnerMeters;
use crate::names::{ModelName, ServerId};
use crate::trail::Fact;

/// The most times that one stream goes on elsewhere.
const MOST: u32 = 16;
/// How long a stream first waits for somebody who goes on with it, and the longest between two looks.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long the end of an answer that is whole may wait for the length of its prompt.
const COUNTS_WITHIN: Duration = Duration::from_secs(2);

/// Lets the body of a good answer survive its server, where that is possible at all.
pub(super) fn follow<S>(rules: Arc<Rules>, service: S, spare: Call, reply: Reply) -> Reply
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let has_others = spare.candidates.snapshot().servers.len() > 1;
    let wanted = rules.config.resume == Resume::Auto && has_others;
    if !wanted || !spare.route.infers() || !reply.status.is_success() || !reply.is_stream() {
        return reply;
    }
    let Some(server) = reply.body.outcome().servers.last().cloned() else { return reply };
    let outcome = reply.body.outcome().clone();
    let flow = Flow {
        body: reply.body,
        delivered: Delivered::new(spare.route),
        mould: None,
        rest: Box::new(Rest {
            rules,
            service,
            spare,
            server,
            digest: None,
            failed: SmallVec::new(),
            tries: 0,
            barren: 0,
            asked: 0,
            resumes: 0,
            pieces: 0,
            eval: Duration::ZERO,
        }),
    };
    let mut body =
        Body::new(Following { course: Course::Flowing(flow), moved: SmallVec::new(), asked: 0, meters: None });
    *body.outcome_mut() = outcome;
    Reply { body, ..reply }
}

/// A stream that survives its server.
struct Following<S> {
    course: Course<S>,
    /// The servers that went on with it.
    moved: SmallVec<[ServerId; 2]>,
    /// Attempts for that.
    asked: u32,
    /// The metrics of the last of them.
    meters: Option<Arc<RunnerMeters>>,
}

enum Course<S> {
    Flowing(Flow<S>),
    /// It broke off, and somebody is asked to go on.
    Broken(Search<S>),
    /// This, and no more.
    Last(Cut),
    Over,
}

/// Looks for somebody who goes on, and returns the stream with what came of that.
type Search<S> = BoxFuture<'static, (Flow<S>, Result<Step, Cut>)>;

/// How a stream broke off: what its client gets if nobody goes on.
type Cut = Result<Chunk, Error>;

/// How a stream goes on.
enum Step {
    /// With the body of another server.
    Flows,
    /// With its last chunk.
    Ends(Chunk),
}

/// What came of a stream.
enum Took {
    Give(Chunk),
    /// Nothing that the client may have yet.
    Nothing,
    /// It broke off behind this.
    Broken(Option<Chunk>, Cut),
    Last(Cut),
    Over,
}

/// A stream and all that is needed to go on with it. What every piece touches lies together.
struct Flow<S> {
    body: Body,
    delivered: Delivered,
    /// How what comes is written for the client; the first server's words go on as they are.
    mould: Option<Box<Mould>>,
    rest: Box<Rest<S>>,
}

/// What nobody asks for while all is well.
struct Rest<S> {
    rules: Arc<Rules>,
    service: S,
    spare: Call,
    /// Who answers now.
    server: ServerId,
    /// The model, by the digest that the first server had of it.
    digest: Option<String>,
    /// Servers that failed since the text last grew.
    failed: SmallVec<[ServerId; 2]>,
    /// Attempts since then.
    tries: u32,
    /// How often it broke off in a row without a word more: what is asked may be what breaks it.
    barren: u32,
    /// All attempts.
    asked: u32,
    /// How often somebody went on.
    resumes: u32,
    /// Pieces that there were when the stream last broke off.
    pieces: u64,
    /// Time for the tokens of the parts that are over.
    eval: Duration,
}

/// Why nobody goes on.
enum Halt {
    /// It would not be right.
    Refused(&'static str),
    /// It was tried.
    Failed(&'static str),
    /// Nobody is there who could; somebody may be a little later.
    Nobody(&'static str),
}

impl<S> Source for Following<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    fn poll_chunk(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Chunk, Error>>> {
        let this = self.get_mut();
        loop {
            match &mut this.course {
                Course::Flowing(flow) => {
                    let next = ready!(Pin::new(&mut flow.body).poll_next(cx));
                    match flow.take(next) {
                        Took::Give(chunk) => return Poll::Ready(Some(Ok(chunk))),
                        Took::Nothing => {}
                        Took::Broken(before, cut) => {
                            this.search(cut);
                            if let Some(before) = before {
                                return Poll::Ready(Some(Ok(before)));
                            }
                        }
                        Took::Last(last) => this.course = Course::Last(last),
                        Took::Over => this.course = Course::Over,
                    }
                }
                Course::Broken(search) => {
                    let (flow, step) = ready!(search.as_mut().poll(cx));
                    this.asked = flow.rest.asked;
                    this.course = match step {
                        Ok(Step::Flows) => {
                            this.moved.push(flow.rest.server.clone());
                            this.meters.clone_from(&flow.body.outcome().meters);
                            Course::Flowing(flow)
                        }
                        Ok(Step::Ends(chunk)) => Course::Last(Ok(chunk)),
                        Err(cut) => Course::Last(cut),
                    };
                }
                Course::Last(_) => {
                    let Course::Last(last) = std::mem::replace(&mut this.course, Course::Over) else { continue };
                    return Poll::Ready(Some(last));
                }
                Course::Over => return Poll::Ready(None),
            }
        }
    }

    fn tell(&self, outcome: &mut Outcome) {
        outcome.servers.extend(self.moved.iter().cloned());
        outcome.attempts += self.asked;
        if self.meters.is_some() {
            outcome.meters.clone_from(&self.meters);
        }
    }
}

impl<S> Following<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    /// Looks for somebody who goes on, from now on.
    fn search(&mut self, cut: Cut) {
        if let Course::Flowing(mut flow) = std::mem::replace(&mut self.course, Course::Over) {
            // The broken body ends here, and with it the place at its server.
            flow.body = Body::empty();
            self.course = Course::Broken(Box::pin(async move {
                let step = flow.persist().await;
                let step = flow.told(step, cut);
                (flow, step)
            }));
        }
    }
}

impl<S> Flow<S> {
    /// Takes what has come of the body.
    fn take(&mut self, next: Option<Result<Chunk, Error>>) -> Took {
        let mut chunk = match next {
            Some(Ok(chunk)) => chunk,
            None => return Took::Over,
            // The client has all there is.
            Some(Err(_)) if self.delivered.is_done() => return Took::Over,
            Some(Err(error @ Error::Server { phase: Phase::Streaming, .. })) => return Took::Broken(None, Err(error)),
            Some(Err(error)) => return Took::Last(Err(error)),
        };
        let Some(mould) = &mut self.mould else {
            let Some(at) = self.delivered.see(&chunk.bytes) else { return Took::Give(chunk) };
            let before = chunk.bytes.split_to(at);
            self.rest.rules.note_trouble(&self.rest.spare, Some(&self.rest.server));
            return Took::Broken((at > 0).then(|| Chunk::from(before)), Ok(chunk));
        };
        match mould.take(chunk, &mut self.delivered) {
            Made::Pieces(None) => Took::Nothing,
            Made::Pieces(Some(chunk)) => Took::Give(chunk),
            Made::Stopped(chunk) => Took::Last(Ok(chunk)),
            Made::Trouble(before) => {
                self.rest.rules.note_trouble(&self.rest.spare, Some(&self.rest.server));
                let source = "it ended in an error".into();
                let server = self.rest.server.clone();
                Took::Broken(before, Err(Error::Server { server, phase: Phase::Streaming, reused: false, source }))
            }
        }
    }

    /// Says what has come of it: to the metrics, the log and the trail.
    fn told(&self, step: Result<Step, Halt>, cut: Cut) -> Result<Step, Cut> {
        let (id, pieces) = (&self.rest.spare.id, self.delivered.pieces());
        let (result, why) = match step {
            Ok(step) => {
                self.rest.rules.instruments.resumed("ok");
                self.rest.rules.instruments.failed_over();
                tracing::info!(%id, server = %self.rest.server, pieces, "a stream goes on at another server");
                return Ok(step);
            }
            Err(Halt::Refused(why)) => ("refused", why),
            Err(Halt::Failed(why)) => ("failed", why),
            Err(Halt::Nobody(why)) => ("nobody", why),
        };
        self.rest.rules.instruments.resumed(result);
        self.rest.spare.note(
            "retry",
            "nobody goes on with the stream",
            [("why", Fact::Word(why)), ("pieces", pieces.into())],
        );
        tracing::info!(%id, why, pieces, "a stream broke off, and nobody goes on");
        Err(cut)
    }
}

impl<S> Flow<S>
where
    S: Service<Call, Response = Reply, Error = Error> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    /// Goes on with the stream elsewhere; while nobody is there who could, waits for somebody: whoever died may come back.
    async fn persist(&mut self) -> Result<Step, Halt> {
        self.rest.eval += self.delivered.since_first();
        if self.delivered.pieces() > self.rest.pieces {
            self.rest.failed.clear();
            (self.rest.tries, self.rest.barren) = (0, 0);
        } else if self.rest.resumes > 0 {
            self.rest.barren += 1;
        }
        self.rest.pieces = self.delivered.pieces();
        self.rest.failed.push(self.rest.server.clone());
        if self.rest.resumes >= MOST {
            return Err(Halt::Refused("the stream has moved too often"));
        }
        if self.rest.barren >= self.rest.rules.config.attempts.get() {
            return Err(Halt::Failed("it breaks off wherever it goes on"));
        }
        let patience = Instant::now() + self.rest.rules.config.resume_wait_s.time();
        let until = self.rest.spare.deadline.map_or(patience, |deadline| patience.min(deadline));
        let mut pause = FIRST_PAUSE;
        loop {
            match self.go_on().await {
                Err(Halt::Nobody(why)) if Instant::now() + pause < until => {
                    self.rest.spare.note("retry", "waits for somebody who goes on", [("why", Fact::Word(why))]);
                    // Not all at the same moment, who broke off at the same moment.
                    tokio::time::sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())).await;
                    pause = LONGEST_PAUSE.min(pause * 2);
                    self.rest.failed.clear();
                    self.rest.tries = 0;
                }
                other => return other,
            }
        }
    }

    /// Goes on with the stream elsewhere.
    async fn go_on(&mut self) -> Result<Step, Halt> {
        if self.delivered.is_nothing() {
            return self.begin_again().await;
        }
        let form = self.delivered.form().map_err(Halt::Refused)?;
        let request = Request::read(&self.rest.spare, form).map_err(Halt::Refused)?;
        let made = i64::try_from(self.rest.pieces).unwrap_or(i64::MAX);
        if request.bounds().num_predict.is_some_and(|most| most > 0 && made >= most) {
            // Another server is asked only how long the prompt was; the answer is whole without that, too.
            let counted = tokio::time::timeout(COUNTS_WITHIN, self.continued(form, &request, true)).await;
            return match counted {
                Ok(Ok(step)) => Ok(step),
                _ => self.finish(form, &request, self.rest.pieces, None),
            };
        }
        self.continued(form, &request, false).await
    }

    /// Has another server go on from the text already sent, if one can. `only_counts`: nothing but counts is left to ask
    /// for, which is worth no load.
    async fn continued(&mut self, form: Form, request: &Request, only_counts: bool) -> Result<Step, Halt> {
        if self.rest.digest.is_none() {
            let of = |snapshot: &Snapshot| digest(snapshot, &self.rest.server, self.rest.spare.place.model.as_ref());
            // When the stream began its server may not have told yet what it has.
            self.rest.digest =
                of(self.rest.spare.candidates.snapshot()).or_else(|| of(&self.rest.rules.cluster.snapshot()));
        }
        let digest = self.rest.digest.clone().ok_or(Halt::Refused("the digest of the model is not known"))?;
        loop {
            let model = self.rest.spare.place.model.clone();
            let candidates = self.others(|server| {
                ask::can_render(&server.report.version, form)
                    && digest_of(server, model.as_ref()) == Some(&digest)
                    && (!only_counts || has_loaded(server, model.as_ref()))
            })?;
            match self.go_on_at(candidates, form, request).await {
                Ok(step) => return Ok(step),
                Err(No::Nobody(why)) => return Err(Halt::Refused(why)),
                Err(No::Server(Some(server), why)) => self.cannot(server, why),
                Err(No::Server(None, why)) => return Err(Halt::Nobody(why)),
            }
        }
    }

    /// Sends the call again: nothing of its answer has been delivered.
    async fn begin_again(&mut self) -> Result<Step, Halt> {
        loop {
            let candidates = self.others(|_| true)?;
            let mut call = self.rest.spare.again().ok_or(Halt::Refused("the body of the request is not at hand"))?;
            call.candidates = candidates;
            call.attempts = self.rest.spare.attempts + self.rest.asked;
            call.fresh = false;
            // Its client has waited for a slot already.
            call.ticket = None;
            let service = self.rest.service.ready().await;
            let answer = match service {
                Ok(service) => service.call(call).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(reply) if reply.status.is_success() && reply.is_stream() => {
                    let server = reply.body.outcome().servers.last().cloned();
                    let server = server.ok_or(Halt::Failed("nobody knows who answered"))?;
                    self.goes_on(server, reply.body, None);
                    return Ok(Step::Flows);
                }
                Ok(reply) => match reply.body.outcome().servers.last().cloned() {
                    Some(server) => self.cannot(server, "it did not answer well"),
                    None => return Err(Halt::Failed("nobody knows who answered")),
                },
                Err(error) => match error.server().cloned() {
                    Some(server) => self.cannot(server, error.kind()),
                    None => return Err(Halt::Nobody(error.kind())),
                },
            }
        }
    }

    /// Has one server go on.
    async fn go_on_at(&mut self, candidates: Candidates, form: Form, request: &Request) -> Result<Step, No> {
        let attempts = self.rest.spare.attempts + self.rest.asked;
        let mut asking = Asking {
            rules: &self.rest.rules,
            service: &mut self.rest.service,
            spare: &mut self.rest.spare,
            request,
            candidates,
            attempts,
        };
        let rendered = asking.render().await?;
        let shown = asking.show().await?;
        let bounds = request.bounds();
        let most = bounds.num_predict.or(shown.bounds.num_predict).filter(|most| *most > 0);
        let stops = bounds.stops.or_else(|| shown.bounds.stops.clone()).unwrap_or_default();
        let before = asking.raw_prompt(&rendered, &shown);
        let prompt = [before.as_str(), &self.delivered.text()].concat();
        // The last line of whoever goes on counts prompt and text together, and the text by tokens that need not be those
        // that were made of it.
        let of_prompt = asking.count(&before, shown.thinks).await?;
        let mut made = self.delivered.pieces();
        let is_exact = self.delivered.are_tokens(&stops);
        if most.is_some() && !is_exact {
            made = asking.count(&prompt, shown.thinks).await?.saturating_sub(of_prompt).max(made);
        }
        let left = most.map(|most| most - i64::try_from(made).unwrap_or(i64::MAX));
        if left.is_some_and(|left| left <= 0) {
            let finished = self.finish(form, request, made, Some(of_prompt));
            return finished.map_err(|_| No::Nobody("its pieces cannot be written"));
        }
        let reply = asking.follow(&prompt, left, shown.thinks).await?;
        let account =
            Account { arrived: self.rest.spare.arrived, made, is_exact, prompt: Some(of_prompt), eval: self.rest.eval };
        let mould = Mould::new(form, &self.delivered, stops, request.tells_usage, account);
        let mould = mould.ok_or(No::Nobody("its pieces cannot be written"))?;
        if form == Form::Generate && !request.is_raw {
            self.rest.spare.note("retry", "the answer will have no context", []);
        }
        self.goes_on(rendered.server, reply.body, Some(mould));
        Ok(Step::Flows)
    }

    /// Ends the stream: it had all the tokens it may have.
    fn finish(&mut self, form: Form, request: &Request, made: u64, prompt: Option<u64>) -> Result<Step, Halt> {
        let account = Account { arrived: self.rest.spare.arrived, made, is_exact: true, prompt, eval: self.rest.eval };
        let mould = Mould::new(form, &self.delivered, Vec::new(), request.tells_usage, account);
        let mould = mould.ok_or(Halt::Refused("its pieces cannot be written"))?;
        self.rest.spare.note("retry", "the stream had its last token already", [("pieces", self.rest.pieces.into())]);
        Ok(Step::Ends(mould.finish(&mut self.delivered)))
    }

    fn goes_on(&mut self, server: ServerId, body: Body, mould: Option<Mould>) {
        let facts = [
            ("from", Fact::from(&self.rest.server)),
            ("to", Fact::from(&server)),
            ("pieces", self.rest.pieces.into()),
            ("tries", self.rest.tries.into()),
        ];
        self.rest.spare.note("retry", "another server goes on with the stream", facts);
        self.delivered.begin_part();
        (self.rest.server, self.body, self.mould) = (server, body, mould.map(Box::new));
        self.rest.resumes += 1;
    }

    fn cannot(&mut self, server: ServerId, why: &'static str) {
        self.rest.spare.note(
            "retry",
            "a server cannot go on",
            [("server", Fact::from(&server)), ("why", Fact::Word(why))],
        );
        self.rest.failed.push(server);
    }

    /// Those who may be asked to go on, of those that fit; an attempt has begun then.
    fn others(&mut self, fits: impl Fn(&Server) -> bool) -> Result<Candidates, Halt> {
        if self.rest.tries >= self.rest.rules.config.attempts.get() {
            return Err(Halt::Nobody("all attempts were in vain"));
        }
        let snapshot = self.rest.rules.cluster.snapshot();
        let mut bits = Bits::default();
        for server in &snapshot.servers {
            if self.rest.spare.candidates.contains(&server.id) && !self.rest.failed.contains(&server.id) && fits(server)
            {
                bits.insert(server.index);
            }
        }
        if bits.is_empty() {
            return Err(Halt::Nobody("no other server can go on"));
        }
        if !self.rest.rules.budget.withdraw(&self.rest.rules.allowance) {
            return Err(Halt::Nobody("the budget is spent"));
        }
        self.rest.tries += 1;
        self.rest.asked += 1;
        let mut candidates = snapshot.all();
        candidates.keep(&bits);
        Ok(candidates)
    }
}

/// The digest of a model on a server.
fn digest(snapshot: &Snapshot, server: &ServerId, model: Option<&ModelName>) -> Option<String> {
    let server = snapshot.server(server)?;
    digest_of(server, model).cloned()
}

fn digest_of<'a>(server: &'a Server, model: Option<&ModelName>) -> Option<&'a String> {
    let found = server.report.models.iter().find(|held| held.canonical() == model)?;
    Some(&found.digest).filter(|digest| !digest.is_empty())
}

fn has_loaded(server: &Server, model: Option<&ModelName>) -> bool {
    server.report.loaded.iter().any(|loaded| ModelName::parse(&loaded.name).as_ref() == model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cluster;
    use crate::call::{End, Payload, Watcher};
    use crate::cluster::{Model, Report};
    use crate::retry::{Config, RetryLayer};
    use crate::testing::{self, ask};
    use crate::units::Seconds;
    use std::sync::Mutex;

    const HELLO: &str = "{\"model\":\"tiny\",\"created_at\":\"t\",\"response\":\"Hello\",\"done\":false}\n";
    const WORLD: &str = "{\"model\":\"tiny\",\"created_at\":\"t\",\"response\":\" world\",\"done\":false}\n";
    const DONE: &str = "{\"model\":\"tiny\",\"created_at\":\"t\",\"response\":\"\",\"done\":true,\"done_reason\":\"stop\",\"total_duration\":9,\"prompt_eval_count\":6,\"eval_count\":2,\"eval_duration\":4}\n";

    /// Servers with the same model, but for the last, which has another under its name.
    async fn cluster(count: usize) -> Arc<Cluster> {
        let cluster = testing::cluster(&vec![&["tiny"][..]; count]).await;
        for index in 0..count {
            let digest = if index + 1 == count { "other" } else { "same" };
            let model = Model { name: "tiny".into(), digest: digest.into(), ..Model::default() };
            cluster.report(index, Report { version: "0.33.0".into(), models: vec![model], ..Report::default() });
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        cluster
    }

    fn generate(cluster: &Arc<Cluster>) -> Call {
        let call = testing::call_in(cluster, "tiny");
        let mut head = crate::Head::new(
            crate::Route::Generate,
            http::Method::POST,
            http::uri::PathAndQuery::from_static("/api/generate"),
        );
        head.model.clone_from(&call.model);
        Call::new(head, Payload::from_bytes(r#"{"model":"tiny","prompt":"hi"}"#), call.candidates)
    }

    fn layer(cluster: &Arc<Cluster>) -> RetryLayer {
        waiting(cluster, 0)
    }

    /// A layer whose streams wait so many seconds for somebody who goes on.
    fn waiting(cluster: &Arc<Cluster>, seconds: u64) -> RetryLayer {
        let config = Config { resume_wait_s: Seconds::new(seconds), ..Config::default() };
        RetryLayer::new(config, Arc::default(), cluster.clone(), Arc::default())
    }

    /// Answers the questions that come before a stream goes on; returns whom the first may go to.
    async fn prepares(inner: &mut tower_test::mock::Handle<Call, Reply>, server: &str) -> Vec<String> {
        let (call, respond) = inner.next_request().await.unwrap();
        respond.send_response(testing::json(server, r#"{"_debug_info":{"rendered_template":"<hi>"}}"#));
        inner.next_request().await.unwrap().1.send_response(testing::json(server, "{}"));
        call.candidates.iter().map(|server| server.id.to_string()).collect()
    }

    /// The same, and how many tokens the prompt has.
    async fn counts(inner: &mut tower_test::mock::Handle<Call, Reply>, server: &str) -> Vec<String> {
        let asked = prepares(inner, server).await;
        let counted = testing::json(server, r#"{"prompt_eval_count":5}"#);
        inner.next_request().await.unwrap().1.send_response(counted);
        asked
    }

    struct Ends(Arc<Mutex<Vec<(End, Outcome)>>>);

    impl Watcher for Ends {
        fn end(&mut self, end: End, outcome: &Outcome) {
            self.0.lock().unwrap().push((end, outcome.clone()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_on_has_the_same_model_and_the_whole_is_told() {
        let cluster = cluster(3).await;
        let (mut service, mut inner) = testing::spawn(&layer(&cluster));
        let call = generate(&cluster);
        let head = call.head.clone();
        let answer = ask(&mut service, call);
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO], true));
        let ends: Arc<Mutex<Vec<_>>> = Arc::default();
        let reply = answer.await.unwrap().watch(Ends(ends.clone()));
        let reading = tokio::spawn(reply.body.collect(9999));
        assert_eq!(counts(&mut inner, "1").await, ["1"], "the third has another model");
        let (call, respond) = inner.next_request().await.unwrap();
        assert_eq!(call.edits.unwrap().path.unwrap(), "/api/generate");
        let Payload::Whole(pieces) = call.payload else { panic!("a stream") };
        assert_eq!(pieces.concat(), br#"{"model":"tiny","prompt":"<hi>Hello","raw":true,"stream":true}"#);
        respond.send_response(testing::stream("1", &[WORLD, DONE], false));
        let text = reading.await.unwrap().unwrap();
        let text = std::str::from_utf8(&text).unwrap();
        assert!(text.starts_with(&[HELLO, WORLD].concat()), "{text}");
        let (end, outcome) = ends.lock().unwrap().pop().unwrap();
        let servers: Vec<_> = outcome.servers.iter().map(ToString::to_string).collect();
        assert_eq!((end, servers, outcome.attempts), (End::Whole, vec!["0".to_owned(), "1".to_owned()], 2));
        let counters = outcome.counters.unwrap();
        assert_eq!((counters.prompt_tokens, counters.output_tokens), (5, 3));
        let said: Vec<_> = head.trail.take().iter().map(|note| note.decision).collect();
        assert_eq!(said, ["the answer will have no context", "another server goes on with the stream"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_nobody_can_go_on_with_ends_as_it_broke() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&layer(&cluster));
        let call = generate(&cluster);
        let head = call.head.clone();
        let answer = ask(&mut service, call);
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO], true));
        let mut body = answer.await.unwrap().body;
        assert_eq!(body.next().await.unwrap().unwrap().bytes, HELLO);
        assert!(matches!(body.next().await, Some(Err(Error::Server { phase: Phase::Streaming, .. }))));
        assert!(body.next().await.is_none());
        let note = serde_json::to_value(head.trail.take()).unwrap();
        assert_eq!(note[0]["facts"]["why"], "no other server can go on");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_whole_does_not_wait_long_for_its_counts() {
        let cluster = cluster(3).await;
        cluster.note_loaded(&ServerId::new("1"), &ModelName::parse("tiny").unwrap(), true);
        cluster.catch_up().await;
        let (mut service, mut inner) = testing::spawn(&layer(&cluster));
        let mut call = generate(&cluster);
        call.payload = Payload::from_bytes(r#"{"model":"tiny","prompt":"hi","options":{"num_predict":1}}"#);
        let answer = ask(&mut service, call);
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO], true));
        let reading = tokio::spawn(answer.await.unwrap().body.collect(9999));
        assert_eq!(prepares(&mut inner, "1").await, ["1"]);
        let _silent = inner.next_request().await.unwrap();
        let text = reading.await.unwrap().unwrap();
        let text = std::str::from_utf8(&text).unwrap();
        assert!(text.contains("\"done_reason\":\"length\"") && text.contains("\"eval_count\":1"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_waits_for_its_server_to_come_back() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&waiting(&cluster, 15));
        let begun = Instant::now();
        let answer = ask(&mut service, generate(&cluster));
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO], true));
        let reading = tokio::spawn(answer.await.unwrap().body.collect(9999));
        for _ in 0..3 {
            inner.next_request().await.unwrap().1.send_error(testing::failure("0", Phase::Connecting, false));
        }
        assert_eq!(counts(&mut inner, "0").await, ["0"], "the other has another model");
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[WORLD, DONE], false));
        let text = reading.await.unwrap().unwrap();
        assert!(text.starts_with([HELLO, WORLD].concat().as_bytes()), "{text:?}");
        assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn no_stream_waits_longer_than_it_may() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&waiting(&cluster, 15));
        let answer = ask(&mut service, generate(&cluster));
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO], true));
        let broken = Instant::now();
        let reading = tokio::spawn(answer.await.unwrap().body.collect(9999));
        tokio::spawn(async move {
            while let Some((_, respond)) = inner.next_request().await {
                respond.send_error(testing::failure("0", Phase::Connecting, false));
            }
        });
        assert!(reading.await.unwrap().is_err());
        let waited = broken.elapsed().as_secs();
        assert!((12..=15).contains(&waited), "{waited} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_breaks_off_wherever_it_goes_on_is_given_up() {
        let cluster = cluster(2).await;
        let (mut service, mut inner) = testing::spawn(&waiting(&cluster, 3600));
        let answer = ask(&mut service, generate(&cluster));
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO], true));
        let reading = tokio::spawn(answer.await.unwrap().body.collect(9999));
        for _ in 0..3 {
            counts(&mut inner, "0").await;
            inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[], true));
        }
        assert!(reading.await.unwrap().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_breaks_behind_the_end_breaks_nothing() {
        let cluster = cluster(3).await;
        let (mut service, mut inner) = testing::spawn(&layer(&cluster));
        let answer = ask(&mut service, generate(&cluster));
        inner.next_request().await.unwrap().1.send_response(testing::stream("0", &[HELLO, DONE], true));
        let text = answer.await.unwrap().body.collect(9999).await.unwrap();
        assert_eq!(text, [HELLO, DONE].concat());
    }
}
