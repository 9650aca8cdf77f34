//! Asks who is there: finds the client's key, and refuses what it may not do.
//!
//! Belongs outside whatever goes by the client: limits, queues. What a key may not use it does not see either: lists of
//! models are filtered, and what is left of them stays as the server wrote it. No server ever sees a key of ours, whether
//! this layer is on or not (the pool takes them out).

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use smallvec::SmallVec;
use tower::{Layer, Service};

use crate::call::{Answer, Body, Call, Payload, Reply};
use crate::error::Error;
use crate::form;
use crate::instruments::{Instruments, Knock};
use crate::keys::{Guard, Key, Keys, Rights, Shown};
use crate::route::Route;
use crate::trail::Fact;

/// The longest list of models that is filtered, bytes.
const LONGEST: usize = 64 << 20;
/// A list that is shorter has its length stated, as Go's server does it.
const SHORT: u64 = 2048;
/// How much of a name that a client typed is said back, characters.
const SAID: usize = 120;

/// The `[auth]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Whether a client may ask without a key.
    pub anonymous: Anonymous,
    /// The file of keys; empty: `keys.toml` in the user's configuration folder.
    pub file: PathBuf,
}

/// Whether a client may ask without a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Anonymous {
    /// As long as there are no keys.
    #[default]
    UntilKeys,
    /// Always, and everything.
    Allow,
    /// Never.
    Deny,
}

impl Config {
    /// When the proxy's own routes ask for a key, if this layer is on.
    pub fn guard(&self) -> Guard {
        if self.anonymous == Anonymous::Deny { Guard::Always } else { Guard::OnceKeysExist }
    }
}

/// Puts [`Auth`] around a service.
#[derive(Clone, Debug)]
pub struct AuthLayer {
    door: Arc<Door>,
}

impl AuthLayer {
    /// Knows these keys: they outlive this stack, and change while it runs.
    pub fn new(config: &Config, keys: Arc<Keys>, instruments: Arc<Instruments>) -> Self {
        Self { door: Arc::new(Door { anonymous: config.anonymous, keys, instruments }) }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Auth { inner, door: self.door.clone() }
    }
}

/// Lets in who may ask.
#[derive(Clone, Debug)]
pub struct Auth<S> {
    inner: S,
    door: Arc<Door>,
}

impl<S> Service<Call> for Auth<S>
where
    S: Service<Call, Response = Reply, Error = Error, Future = Answer>,
{
    type Response = Reply;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        if let Err(error) = self.door.admit(&call) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let chosen = call.key.get().filter(|key| key.models.is_some() && is_list(call.route)).cloned();
        let Some(key) = chosen.filter(|_| !call.dry) else { return self.inner.call(call) };
        let list = List { route: call.route, is_head: call.method == Method::HEAD, key };
        let edits = call.edits_mut();
        // What is to be read must come, and come as it is.
        edits.method = Some(Method::GET);
        edits.headers.push((header::ACCEPT_ENCODING, None));
        let answer = self.inner.call(call);
        Box::pin(list.filter(answer))
    }
}

/// Who is let in.
#[derive(Debug)]
struct Door {
    anonymous: Anonymous,
    keys: Arc<Keys>,
    instruments: Arc<Instruments>,
}

impl Door {
    /// Finds the client's key and writes it into the call's head; or says why the call goes no further.
    fn admit(&self, call: &Call) -> Result<(), Error> {
        let knock = |knock: Knock| {
            if !call.dry {
                self.instruments.knocked(knock);
            }
        };
        // Whoever asks for another, `olol explain` for one, has said already who that is.
        let shown = call.key.get().cloned().map_or_else(|| self.keys.find(&call.headers), Shown::Known);
        match shown {
            Shown::Known(key) => {
                let key = call.head.key.get_or_init(|| key);
                let name = ("key", Fact::Text(key.name.clone()));
                if let Err(error) = may(key, call) {
                    knock(Knock::Forbidden);
                    call.note("auth", "the key does not allow it", [name]);
                    return Err(error);
                }
                knock(Knock::Known);
                call.note("auth", "the key allows it", [name]);
            }
            Shown::Nothing | Shown::Foreign if self.admits_anybody() => knock(Knock::Anonymous),
            Shown::Nothing if call.dry => call.note("auth", "without a key it would be refused", []),
            Shown::Nothing | Shown::Foreign => {
                knock(Knock::Missing);
                call.note("auth", "no key", []);
                return Err(shown.refusal());
            }
            Shown::Unknown | Shown::Expired(_) => {
                knock(if matches!(shown, Shown::Unknown) { Knock::Unknown } else { Knock::Expired });
                call.note("auth", "the key is not known, or has expired", []);
                return Err(shown.refusal());
            }
        }
        Ok(())
    }

    fn admits_anybody(&self) -> bool {
        match self.anonymous {
            Anonymous::UntilKeys => !self.keys.exist(),
            Anonymous::Allow => true,
            Anonymous::Deny => false,
        }
    }
}

/// Whether a key allows a call.
fn may(key: &Key, call: &Call) -> Result<(), Error> {
    if let Some(wanted) = Rights::of(call.route).filter(|wanted| !key.may.cover(*wanted)) {
        let (name, may) = (&key.name, key.may);
        return Err(Error::Forbidden(format!(
            "key '{name}' may not do this: {} needs '{wanted}', and the key has '{may}'; whoever runs this proxy can allow it \
             (`may` in the file of keys)",
            call.route.as_str()
        )));
    }
    let Some(models) = key.models.as_deref().filter(|_| names_a_model(call.route)) else { return Ok(()) };
    let named = named(call);
    let refused = named.iter().find(|model| !key.may_use(model));
    let which = match refused {
        None if !named.is_empty() => return Ok(()),
        // What could not be read could be anything.
        None => "a model that this request does not name where it can be read".to_owned(),
        Some(model) => format!("model '{}'", model.chars().take(SAID).collect::<String>()),
    };
    let allowed: Vec<String> = models.iter().map(ToString::to_string).collect();
    Err(Error::Forbidden(format!("key '{}' may not use {which}; it may use {}", key.name, allowed.join(", "))))
}

/// All models that a call names; none if it is not certain which these are.
fn named(call: &Call) -> SmallVec<[Cow<'_, str>; 4]> {
    let peek = &call.peek;
    let read = [&peek.model, &peek.source, &peek.from, &peek.destination];
    let mut named: SmallVec<[Cow<'_, str>; 4]> =
        read.into_iter().flatten().filter(|model| !model.is_empty()).map(|model| model.as_str().into()).collect();
    if call.route == Route::V1Audio {
        match (&call.payload, call.headers.get(header::CONTENT_TYPE)) {
            (Payload::Whole(pieces), Some(kind)) => match form::model(kind.as_bytes(), &pieces.concat()) {
                Some(model) => named.push(model.to_owned().into()),
                None => named.clear(),
            },
            _ => named.clear(),
        }
    }
    named
}

/// Whether a call of this route is about a model that it names.
fn names_a_model(route: Route) -> bool {
    match route {
        Route::WebSearch | Route::WebFetch => false,
        Route::Show | Route::V1Model | Route::Pull | Route::Push | Route::Create | Route::Copy | Route::Delete => true,
        other => other.infers(),
    }
}

/// Whether the answer is a list of models.
fn is_list(route: Route) -> bool {
    matches!(route, Route::Tags | Route::Ps | Route::V1Models)
}

/// A list of models on its way to somebody who may see only some of them.
struct List {
    route: Route,
    is_head: bool,
    key: Arc<Key>,
}

impl List {
    async fn filter(self, answer: Answer) -> Result<Reply, Error> {
        let Reply { status, mut headers, body } = answer.await?;
        let outcome = body.outcome().clone();
        let whole = body.collect(LONGEST).await?;
        let kept = match status {
            StatusCode::OK => self.kept(&whole),
            _ => Some(whole),
        };
        // What cannot be read may name anything.
        let kept =
            kept.ok_or_else(|| Error::Internal("the list of models that a server gave is no list".to_owned()))?;
        let length = kept.len() as u64;
        headers.remove(header::CONTENT_LENGTH);
        let mut reply = Reply::full(status, headers, kept);
        if self.is_head {
            reply.body = Body::empty();
            if length < SHORT {
                reply.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            }
        }
        *reply.body.outcome_mut() = outcome;
        Ok(reply)
    }

    /// The list without what the key may not use; `None` if it cannot be read.
    fn kept(&self, list: &Bytes) -> Option<Bytes> {
        let text = std::str::from_utf8(list).ok()?;
        let Some(entries) = serde_json::from_str::<Lists<'_>>(text).ok()?.entries() else { return Some(list.clone()) };
        let before = entries.get().as_ptr() as usize - text.as_ptr() as usize;
        let behind = &text[before + entries.get().len()..];
        let all: Vec<&RawValue> = serde_json::from_str(entries.get()).ok()?;
        let visible = |entry: &&&RawValue| {
            serde_json::from_str::<Entry>(entry.get()).is_ok_and(|entry| self.key.may_use(entry.name()))
        };
        let kept: Vec<&str> = all.iter().filter(visible).map(|entry| entry.get()).collect();
        if kept.len() == all.len() {
            return Some(list.clone());
        }
        // As Ollama writes its empty lists.
        let entries = if kept.is_empty() && self.route == Route::V1Models {
            "null".to_owned()
        } else {
            format!("[{}]", kept.join(","))
        };
        Some([&text[..before], &entries, behind].concat().into())
    }
}

/// A list of `/api` or of `/v1`.
#[derive(Deserialize)]
struct Lists<'a> {
    #[serde(borrow)]
    models: Option<&'a RawValue>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

impl<'a> Lists<'a> {
    /// The entries, if there are any.
    fn entries(self) -> Option<&'a RawValue> {
        self.models.or(self.data).filter(|entries| entries.get() != "null")
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    name: String,
    id: String,
}

impl Entry {
    fn name(&self) -> &str {
        if self.name.is_empty() { &self.id } else { &self.name }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Head;
    use crate::keys::tests::key;
    use crate::pattern::Pattern;
    use crate::peek::Peek;
    use crate::testing::{self, ask};
    use http::HeaderMap;
    use http::uri::PathAndQuery;

    fn layer(anonymous: Anonymous, keys: &Arc<Keys>) -> AuthLayer {
        AuthLayer::new(&Config { anonymous, ..Config::default() }, keys.clone(), Arc::default())
    }

    /// Keys with one that is changed like this, and its text.
    fn keys(change: impl FnOnce(&mut Key)) -> (Arc<Keys>, String) {
        let (digest, mut key, text) = key("ada");
        change(&mut key);
        let keys = Arc::new(Keys::default());
        keys.replace([(digest, key)]);
        (keys, text)
    }

    fn only(patterns: &[&str]) -> Box<[Pattern]> {
        patterns.iter().map(|text| Pattern::parse(text).unwrap()).collect()
    }

    async fn request(route: Route, authorization: &str, peek: Peek) -> Call {
        let method = Method::from_bytes(route.allow().rsplit(' ').next().unwrap().as_bytes()).unwrap();
        let mut head = Head { peek, ..Head::new(route, method, PathAndQuery::from_static("/")) };
        if !authorization.is_empty() {
            head.headers.insert("authorization", format!("Bearer {authorization}").parse().unwrap());
        }
        Call::new(head, Payload::empty(), testing::cluster(&[&["tiny"]]).await.snapshot().all())
    }

    fn about(model: &str) -> Peek {
        Peek { model: Some(model.to_owned()), ..Peek::default() }
    }

    /// The status that a call gets; 200 if it goes on.
    async fn status(layer: &AuthLayer, call: Call) -> u16 {
        let (mut service, mut inner) = testing::spawn(layer);
        let answer = ask(&mut service, call);
        tokio::select! {
            request = inner.next_request() => {
                request.unwrap().1.send_response(testing::reply("hi"));
                200
            }
            refused = answer => refused.unwrap_err().status().as_u16(),
        }
    }

    #[tokio::test]
    async fn anybody_may_ask_until_there_are_keys() {
        let none = Arc::new(Keys::default());
        let (some, text) = keys(|_| {});
        for (anonymous, keys, wanted) in [
            (Anonymous::UntilKeys, &none, 200),
            (Anonymous::UntilKeys, &some, 401),
            (Anonymous::Allow, &some, 200),
            (Anonymous::Deny, &none, 401),
        ] {
            let layer = layer(anonymous, keys);
            for authorization in ["", "ollama"] {
                let call = request(Route::Chat, authorization, about("tiny")).await;
                assert_eq!(status(&layer, call).await, wanted, "{anonymous:?} '{authorization}'");
            }
            let call = request(Route::Chat, "olol_no_key", about("tiny")).await;
            assert_eq!(status(&layer, call).await, 401, "{anonymous:?}");
        }
        let call = request(Route::Chat, &text, about("tiny")).await;
        assert_eq!(status(&layer(Anonymous::Deny, &some), call).await, 200);
    }

    #[tokio::test]
    async fn the_key_goes_with_the_call() {
        let (keys, text) = keys(|_| {});
        let (mut service, mut inner) = testing::spawn(&layer(Anonymous::UntilKeys, &keys));
        let _answer = ask(&mut service, request(Route::Chat, &text, about("tiny")).await);
        let (call, _) = inner.next_request().await.unwrap();
        assert_eq!(&*call.key.get().unwrap().name, "ada");
        let told = serde_json::to_string(&call.trail.take()).unwrap();
        assert!(told.contains(r#""key":"ada""#) && !told.contains(&text), "{told}");
    }

    #[tokio::test]
    async fn keys_change_while_the_stack_stays() {
        let (keys, text) = keys(|_| {});
        let layer = layer(Anonymous::UntilKeys, &keys);
        keys.replace([]);
        assert_eq!(status(&layer, request(Route::Chat, &text, about("tiny")).await).await, 401);
        assert_eq!(status(&layer, request(Route::Chat, "", about("tiny")).await).await, 200);
    }

    #[tokio::test]
    async fn a_key_may_do_what_it_says() {
        let (keys, text) = keys(|key| key.may = Rights::INFER);
        let layer = layer(Anonymous::UntilKeys, &keys);
        for (route, wanted) in [
            (Route::Chat, 200),
            (Route::V1Messages, 200),
            (Route::Version, 200),
            (Route::Delete, 403),
            (Route::Blob, 403),
            (Route::Tags, 403),
            (Route::Signout, 403),
        ] {
            assert_eq!(status(&layer, request(route, &text, about("tiny")).await).await, wanted, "{route:?}");
        }
    }

    #[tokio::test]
    async fn a_key_may_use_the_models_it_says_and_no_way_around_is_left() {
        let (keys, text) = keys(|key| key.models = Some(only(&["tiny*", "ada/*"])));
        let layer = layer(Anonymous::UntilKeys, &keys);
        let copy = |to: &str| Peek { destination: Some(to.to_owned()), ..about("tiny") };
        let sly_copy = Peek { source: Some("secret".to_owned()), ..copy("tiny") };
        let create = |from: &str| Peek { from: Some(from.to_owned()), ..about("ada/mine") };
        for (route, peek, wanted) in [
            (Route::Chat, about("Tiny:latest"), 200),
            (Route::Chat, about("library/tiny"), 200),
            (Route::Chat, about("secret"), 403),
            (Route::Chat, Peek::default(), 403),
            (Route::V1Chat, about("tiny://registry.ollama.ai/library/secret"), 403),
            (Route::V1Model, about("secret"), 403),
            (Route::Show, about("ada/x"), 200),
            (Route::Copy, copy("ada/mine"), 200),
            (Route::Copy, copy("secret"), 403),
            (Route::Copy, sly_copy, 403),
            (Route::Create, create("tiny"), 200),
            (Route::Create, create("secret"), 403),
            (Route::Create, create(""), 200),
            (Route::Version, Peek::default(), 200),
        ] {
            let call = request(route, &text, peek.clone()).await;
            assert_eq!(status(&layer, call).await, wanted, "{route:?} {peek:?}");
        }
    }

    #[tokio::test]
    async fn a_form_is_read_as_its_server_reads_it() {
        let (keys, text) = keys(|key| key.models = Some(only(&["tiny"])));
        let layer = layer(Anonymous::UntilKeys, &keys);
        let honest = "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ntiny\r\n--x--\r\n";
        let sly = ["--x\r\nContent-Disposition: form-data; name=model\r\n\r\nsecret\r\n", honest].concat();
        for (body, wanted) in [(honest.to_owned(), 200), (sly, 403), (honest.replace("tiny", "secret"), 403)] {
            let mut call = request(Route::V1Audio, &text, Peek::multipart(&[body.clone().into()])).await;
            let head = Arc::get_mut(&mut call.head).unwrap();
            head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("multipart/form-data; boundary=x"));
            call.payload = Payload::from_bytes(body);
            assert_eq!(status(&layer, call).await, wanted);
        }
    }

    #[tokio::test]
    async fn a_refusal_says_what_to_do_and_not_who_it_is() {
        let (keys, text) = keys(|key| key.models = Some(only(&["tiny*"])));
        let (mut service, _inner) = testing::spawn(&layer(Anonymous::UntilKeys, &keys));
        for (authorization, says) in [
            ("", "a key is needed: send it as 'Authorization: Bearer olol_…'"),
            ("ollama", "begins with olol_"),
            ("olol_ada1_wrong", "not known"),
            (&text, "key 'ada' may not use model 'secret'; it may use tiny*"),
        ] {
            let answer = ask(&mut service, request(Route::Chat, authorization, about("secret")).await).await;
            let error = answer.unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains(&text), "{error}");
        }
    }

    #[tokio::test]
    async fn a_call_that_only_asks_is_counted_nowhere_and_needs_no_key() {
        let (keys, text) = keys(|key| key.may = Rights::LIST);
        let (mut service, mut inner) = testing::spawn(&layer(Anonymous::UntilKeys, &keys));
        let mut call = request(Route::Chat, "", about("tiny")).await;
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        let _answer = ask(&mut service, call);
        let (call, _) = inner.next_request().await.unwrap();
        assert_eq!(call.trail.take()[0].decision, "without a key it would be refused");
        let mut call = request(Route::Chat, &text, about("tiny")).await;
        Arc::get_mut(&mut call.head).unwrap().dry = true;
        assert!(matches!(ask(&mut service, call).await, Err(Error::Forbidden(_))));
    }

    /// What is left of a list that a server gave.
    async fn filtered(call: Call, layer: &AuthLayer, list: &'static str) -> (Call, Reply) {
        let (mut service, mut inner) = testing::spawn(layer);
        let answer = ask(&mut service, call);
        let (call, respond) = inner.next_request().await.unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(list.len()));
        respond.send_response(Reply::full(StatusCode::OK, headers, list));
        (call, answer.await.unwrap())
    }

    async fn text_of(reply: Reply) -> String {
        assert_eq!(reply.headers.get(header::CONTENT_LENGTH), None);
        let length = reply.body.length();
        let text = String::from_utf8(reply.body.collect(9999).await.unwrap().to_vec()).unwrap();
        assert_eq!(length, Some(text.len() as u64));
        text
    }

    #[tokio::test]
    async fn what_a_key_may_not_use_it_does_not_see() {
        let (keys, text) = keys(|key| key.models = Some(only(&["tiny*"])));
        let layer = layer(Anonymous::UntilKeys, &keys);
        for (route, list, kept) in [
            (
                Route::Tags,
                r#"{"models":[{"name":"tiny:latest","n":1.50},{"name":"secret:latest"},{"n" : 2,"name":"Tiny:q8_0"}],"new":[1]}"#,
                r#"{"models":[{"name":"tiny:latest","n":1.50},{"n" : 2,"name":"Tiny:q8_0"}],"new":[1]}"#,
            ),
            (Route::Tags, r#"{"models":[{"name":"secret"},{"nameless":1}]}"#, r#"{"models":[]}"#),
            (Route::Ps, r#"{ "models" : [ {"name":"tiny"} ] }"#, r#"{ "models" : [ {"name":"tiny"} ] }"#),
            (Route::Ps, r#"{"models":null}"#, r#"{"models":null}"#),
            (
                Route::V1Models,
                "{\"object\":\"list\",\"data\":[{\"id\":\"secret\"},{\"id\":\"tiny\"}]}\n",
                "{\"object\":\"list\",\"data\":[{\"id\":\"tiny\"}]}\n",
            ),
            (
                Route::V1Models,
                "{\"object\":\"list\",\"data\":[{\"id\":\"secret\"}]}\n",
                "{\"object\":\"list\",\"data\":null}\n",
            ),
        ] {
            let (_, reply) = filtered(request(route, &text, Peek::default()).await, &layer, list).await;
            assert_eq!(text_of(reply).await, kept, "{list}");
        }
    }

    #[tokio::test]
    async fn a_look_at_a_list_tells_the_length_of_what_may_be_seen() {
        let (keys, text) = keys(|key| key.models = Some(only(&["tiny*"])));
        let mut call = request(Route::Tags, &text, Peek::default()).await;
        Arc::get_mut(&mut call.head).unwrap().method = Method::HEAD;
        let list = r#"{"models":[{"name":"secret"}]}"#;
        let (asked, reply) = filtered(call, &layer(Anonymous::UntilKeys, &keys), list).await;
        assert_eq!(asked.edits.unwrap().method, Some(Method::GET));
        assert_eq!((&reply.headers[header::CONTENT_LENGTH], reply.body.length()), (&HeaderValue::from(13), Some(0)));
    }

    #[tokio::test]
    async fn a_list_that_cannot_be_read_is_not_shown() {
        let (keys, text) = keys(|key| key.models = Some(only(&["tiny*"])));
        for list in ["<html>secret", r#"{"models":{"name":"secret"}}"#, r#"{"models":[{"name":"secret"}"#] {
            let (mut service, mut inner) = testing::spawn(&layer(Anonymous::UntilKeys, &keys));
            let answer = ask(&mut service, request(Route::Tags, &text, Peek::default()).await);
            inner.next_request().await.unwrap().1.send_response(testing::reply(list));
            assert!(matches!(answer.await, Err(Error::Internal(_))), "{list}");
        }
    }

    #[tokio::test]
    async fn a_list_for_a_key_of_all_models_passes_untouched() {
        let (keys, text) = keys(|_| {});
        let call = request(Route::Tags, &text, Peek::default()).await;
        let (asked, reply) = filtered(call, &layer(Anonymous::UntilKeys, &keys), "anything").await;
        assert!(asked.edits.is_none() && reply.headers.contains_key(header::CONTENT_LENGTH));
    }
}
