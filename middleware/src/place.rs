//! The options with which a model is loaded: a runner that has others is loaded anew, which takes as long as the first time.
//!
//! Ollama compares what a request names, or the defaults for what it does not name, with what the runner has
//! (`server/sched.go`, `needsReload`). So two clients of which only one names `num_ctx` make it load for every request. Here
//! the options belong to the place where a call goes: a call that does not name them goes with what is loaded, one that
//! needs less context than is loaded takes what is there, and only one that needs more, or something else, costs a load.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::call::{Call, Payload};
use crate::json::{self, Kind, Malformed, Reader, Span};
use crate::peek::Peek;
use crate::route::Dialect;

/// The options that belong to a runner: `Runner` in Ollama's `api/types.go`.
const KEYS: [&str; 7] = ["num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict"];
/// The place of the context among them.
const CONTEXT: usize = 0;

/// Load options that somebody has named, each as it was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions([Option<Arc<str>>; KEYS.len()]);

impl LoadOptions {
    /// The load options that a call names, and where; nothing for dialects that know none.
    pub fn of(call: &Call) -> Named {
        let (Dialect::Ollama, Payload::Whole(pieces)) = (call.route.dialect(), &call.payload) else {
            return Named { takes: false, ..Named::default() };
        };
        Self::in_body(pieces, &call.peek)
    }

    /// The load options in the body of a native request that has been looked into.
    pub(crate) fn in_body(pieces: &[Bytes], peek: &Peek) -> Named {
        let mut named = Named { takes: true, is_bound: peek.is_bound, ..Named::default() };
        if let Some(span) = peek.options {
            // What cannot be read is the server's to refuse.
            let _ = named.read(&json::cut(pieces, span), span.start);
        }
        named
    }

    /// The load options among the members of a JSON object.
    pub(crate) fn in_object(object: &str) -> Self {
        let mut named = Named::default();
        // A model whose parameters cannot be read names none.
        let _ = named.read(object.as_bytes(), 0);
        named.options
    }

    /// All but the context.
    #[must_use]
    pub fn without_context(&self) -> Self {
        let mut options = self.clone();
        options.0[CONTEXT] = None;
        options
    }

    fn context(&self) -> Option<u64> {
        self.0[CONTEXT].as_ref().and_then(|text| text.parse().ok())
    }

    /// Whether nothing was named.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The options that a runner has after a call that names some of them: those, and for the rest what it had.
    #[must_use]
    pub fn after(&self, named: &Named) -> Self {
        let mut options = self.clone();
        for (had, asked) in options.0.iter_mut().zip(&named.options.0) {
            if asked.is_some() {
                had.clone_from(asked);
            }
        }
        if self.context() > named.options.context() && !named.is_bound {
            options.0[CONTEXT].clone_from(&self.0[CONTEXT]);
        }
        options
    }
}

/// What a call names of load options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// The values: those of the call, and for the rest those of its model.
    pub options: LoadOptions,
    /// Whether the route takes options at all.
    takes: bool,
    /// Whether more context than is asked for would be another answer.
    is_bound: bool,
    /// Where the value of `num_ctx` stands.
    context_at: Option<Span>,
    /// Where the first member of `options` would stand, and whether there is one already.
    members_at: Option<(usize, bool)>,
}

impl Named {
    /// Whether the route takes options at all.
    pub fn takes_options(&self) -> bool {
        self.takes
    }

    /// What the model names by itself, if the call does not: its server takes those without being told.
    #[must_use]
    pub fn or(mut self, defaults: &LoadOptions) -> Self {
        for (asked, default) in self.options.0.iter_mut().zip(&defaults.0) {
            if asked.is_none() {
                asked.clone_from(default);
            }
        }
        self
    }

    fn read(&mut self, object: &[u8], start: usize) -> Result<(), Malformed> {
        let pieces = [Bytes::copy_from_slice(object)];
        let mut reader = Reader::new(&pieces);
        if !reader.take(b'{')? {
            return Ok(());
        }
        let first = start + reader.offset();
        if reader.take(b'}')? {
            self.members_at = Some((first, false));
            return Ok(());
        }
        loop {
            let key = reader.string()?;
            if !reader.take(b':')? {
                return Err(Malformed);
            }
            let (kind, span) = reader.value()?;
            if let Some(at) = KEYS.iter().position(|known| known.as_bytes() == &*json::cut(&pieces, key)) {
                let text = String::from_utf8_lossy(&json::cut(&pieces, span)).into_owned();
                self.options.0[at] = (kind != Kind::Null).then(|| text.into());
                if at == CONTEXT {
                    self.context_at = Some(Span { start: start + span.start, end: start + span.end });
                }
            }
            if !reader.take(b',')? {
                self.members_at = Some((first, true));
                return Ok(());
            }
        }
    }

    /// Whether a runner would have to be loaded anew for this call. `context` is what its server says of it; 0: nothing.
    pub fn reloads(&self, loaded: &LoadOptions, context: u32) -> bool {
        let fits = |at: usize| match (&self.options.0[at], &loaded.0[at]) {
            (None, None) => true,
            // What is loaded can be named for it, where the route takes options.
            (None, Some(_)) => self.takes,
            (Some(asked), Some(has)) if asked == has => true,
            // What the model names by itself can only be overruled where the route takes options.
            (Some(_), has) if at == CONTEXT && self.takes => {
                let has = has.as_ref().and_then(|has| has.parse().ok()).or((context > 0).then_some(u64::from(context)));
                let fits =
                    |asked: u64| has.is_some_and(|has: u64| if self.is_bound { asked == has } else { asked <= has });
                self.options.context().is_some_and(fits)
            }
            (Some(_), _) => false,
        };
        !(0..KEYS.len()).all(fits)
    }

    /// The changes of a body that make this call go with what is loaded.
    pub fn edits(&self, payload: &Payload, loaded: &LoadOptions, context: u32) -> SmallVec<[(Span, Bytes); 1]> {
        let mut edits = SmallVec::new();
        let Payload::Whole(pieces) = payload else { return edits };
        let mut members = String::new();
        let mut member = |key: &str, value: &str| {
            let comma = if members.is_empty() { "" } else { "," };
            members.extend([comma, "\"", key, "\":", value]);
        };
        for (at, (asked, has)) in self.options.0.iter().zip(&loaded.0).enumerate() {
            match (asked, has) {
                (None, Some(has)) if self.context_at.is_none() || at != CONTEXT => member(KEYS[at], has),
                (Some(asked), has) if at == CONTEXT && !self.is_bound => {
                    let has = has.as_deref().map_or_else(|| context.to_string(), str::to_owned);
                    let is_less = |asked: &str| Some(asked.parse::<u64>().ok()? < has.parse::<u64>().ok()?);
                    match (is_less(asked), self.context_at) {
                        (Some(true), Some(span)) => edits.push((span, Bytes::from(has))),
                        // It is the model that names it.
                        (Some(true), None) => member(KEYS[at], &has),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        if !members.is_empty() && self.takes {
            edits.extend(insertion(members, self.members_at, pieces));
        }
        edits
    }
}

/// Puts members into the options, or options into the body.
fn insertion(members: String, at: Option<(usize, bool)>, pieces: &[Bytes]) -> Option<(Span, Bytes)> {
    let (start, text) = match at {
        Some((start, true)) => (start, members + ","),
        Some((start, false)) => (start, members),
        None => {
            let mut reader = Reader::new(pieces);
            reader.take(b'{').ok().filter(|taken| *taken)?;
            (reader.offset(), format!("\"options\":{{{members}}},"))
        }
    };
    Some((Span { start, end: start }, Bytes::from(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use serde_json::{Value, json};

    async fn call(body: &Value) -> Call {
        let mut call = testing::call("tiny").await;
        let pieces: Vec<Bytes> = body.to_string().as_bytes().chunks(7).map(Bytes::copy_from_slice).collect();
        let head = Arc::get_mut(&mut call.head).unwrap();
        head.peek = Peek::json(&pieces);
        call.payload = Payload::Whole(pieces.into());
        call
    }

    fn loaded(text: &[(usize, &str)]) -> LoadOptions {
        let mut options = LoadOptions::default();
        for (at, value) in text {
            options.0[*at] = Some((*value).into());
        }
        options
    }

    /// Whether a call reloads a runner, and the body that its server gets.
    async fn goes(body: Value, has: &[(usize, &str)], context: u32) -> (bool, Value) {
        let call = call(&body).await;
        let named = LoadOptions::of(&call);
        let edits = named.edits(&call.payload, &loaded(has), context);
        let Payload::Whole(pieces) = call.payload.edited(&edits) else { unreachable!() };
        (named.reloads(&loaded(has), context), serde_json::from_slice(&pieces.concat()).unwrap())
    }

    #[tokio::test]
    async fn who_names_nothing_goes_with_what_is_loaded() {
        let wanted = json!({"model": "tiny", "options": {"num_ctx": 8192}});
        assert_eq!(goes(json!({"model": "tiny"}), &[(0, "8192")], 0).await, (false, wanted.clone()));
        assert_eq!(goes(json!({"model": "tiny", "options": {}}), &[(0, "8192")], 0).await, (false, wanted));
        let wanted = json!({"model": "tiny", "options": {"seed": 1, "num_ctx": 8192, "num_gpu": 3}});
        let asked = json!({"model": "tiny", "options": {"seed": 1}});
        assert_eq!(goes(asked, &[(0, "8192"), (2, "3")], 0).await, (false, wanted));
        let plain = json!({"model": "tiny", "options": {"seed": 1}});
        assert_eq!(goes(plain.clone(), &[], 4096).await, (false, plain));
    }

    #[tokio::test]
    async fn who_needs_less_takes_what_is_there_and_who_needs_more_loads() {
        let ask = |context: u32| json!({"model": "tiny", "options": {"num_ctx": context}});
        assert_eq!(goes(ask(2048), &[(0, "8192")], 0).await, (false, ask(8192)));
        assert_eq!(goes(ask(2048), &[], 4096).await, (false, ask(4096)));
        assert_eq!(goes(ask(8192), &[(0, "8192")], 0).await, (false, ask(8192)));
        assert!(goes(ask(16384), &[(0, "8192")], 0).await.0);
        assert!(goes(ask(2048), &[], 0).await.0);
        assert!(goes(json!({"model": "tiny", "options": {"num_gpu": 1}}), &[(2, "0")], 0).await.0);
    }

    #[tokio::test]
    async fn who_wants_an_error_beyond_the_context_gets_just_that_context() {
        for key in ["truncate", "shift"] {
            let asked = json!({"model": "tiny", key: false, "options": {"num_ctx": 2048}});
            assert_eq!(goes(asked.clone(), &[(0, "8192")], 0).await, (true, asked.clone()));
            assert_eq!(goes(asked.clone(), &[(0, "2048")], 0).await, (false, asked));
            let asked = json!({"model": "tiny", key: true, "options": {"num_ctx": 2048}});
            assert!(!goes(asked, &[(0, "8192")], 0).await.0);
        }
    }

    #[tokio::test]
    async fn what_a_model_names_by_itself_counts_as_named_and_need_not_be_said() {
        let asked = json!({"model": "wide", "options": {"seed": 1}});
        let call = call(&asked).await;
        let named = LoadOptions::of(&call).or(&loaded(&[(0, "8192"), (2, "3")]));
        assert!(named.reloads(&loaded(&[]), 4096), "the other tag was loaded with less");
        assert!(!named.reloads(&loaded(&[(0, "8192"), (2, "3")]), 0));
        assert!(named.edits(&call.payload, &loaded(&[(0, "8192"), (2, "3")]), 0).is_empty());
        let edits = named.edits(&call.payload, &loaded(&[(0, "16384"), (2, "3")]), 0);
        let Payload::Whole(pieces) = call.payload.edited(&edits) else { unreachable!() };
        let sent: Value = serde_json::from_slice(&pieces.concat()).unwrap();
        assert_eq!(sent, json!({"model": "wide", "options": {"num_ctx": 16384, "seed": 1}}));
    }

    #[tokio::test]
    async fn what_a_call_leaves_behind_is_known() {
        let had = loaded(&[(0, "8192"), (2, "3")]);
        let named = |context: &str, is_bound| Named { options: loaded(&[(0, context)]), is_bound, ..Named::default() };
        assert_eq!(had.after(&named("2048", false)), had);
        assert_eq!(had.after(&named("9000", false)), loaded(&[(0, "9000"), (2, "3")]));
        assert_eq!(had.after(&named("2048", true)), loaded(&[(0, "2048"), (2, "3")]));
    }
}
