//! What a conversation is known by: a chain of hashes, a link a message, each made of all that was said up to there.
//!
//! The next turn of a conversation has the links of this one, and more. Proxies that share nothing must come to the same
//! links, so every number here is the same in every process and in every version: a test holds some of them.
//!
//! A message is read as far as a server reads it: spaces, the order of members, members that are null, and Anthropic's
//! `cache_control`, which moves from turn to turn, make no difference; everything else does.

use std::borrow::Cow;

use bytes::Bytes;
use rapidhash::v3::{RapidSecrets, rapidhash_v3_seeded};
use smallvec::SmallVec;

use super::Source;
use crate::call::{Call, Payload};
use crate::json::{Malformed, Reader, Span};
use crate::peek::Talk;
use crate::route::Route;

const SECRETS: RapidSecrets = RapidSecrets::seed(0x6f6c_6f6c);

/// What is longer is hashed in blocks of this size, and a prompt has a link a block.
const BLOCK: usize = 1024;
/// Links of a prompt until its blocks grow to twice their size, so that a long one has no endless chain.
const BLOCKS_OF_A_SIZE: usize = 64;
/// The most links that are kept of a chain: the first one, and the last ones, since that is where a conversation goes on.
const KEPT: usize = 64;
/// Values that are nested deeper are hashed as they are written.
const DEEPEST: usize = 16;

/// The options with which a runner is started: another value is another runner, with a cache of its own.
const LOAD_OPTIONS: [&[u8]; 7] =
    [b"num_ctx", b"num_batch", b"num_gpu", b"main_gpu", b"use_mmap", b"num_thread", b"low_vram"];

// What kind of thing was hashed: a list is no object, and an id no message.
const OBJECT: u64 = 1;
const LIST: u64 = 2;
const ID: u64 = 3;
const PERSON: u64 = 4;

/// All that was said up to some message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Its hash.
    pub(super) hash: u64,
    /// Bytes up to there.
    pub(super) bytes: u32,
}

/// The links of a conversation from its first message on that is not the system's: what the system says to everybody is
/// no conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// The first link, by which a conversation is told from others from its first turn to its last.
    root: Option<Link>,
    /// The last links, in order; the first one is among them while there are few.
    links: SmallVec<[Link; 8]>,
    /// The hash of all that was said so far, and how long it is.
    tip: u64,
    bytes: u32,
}

impl Chain {
    fn new(place: u64) -> Self {
        Self { tip: place, ..Self::default() }
    }

    /// A conversation that is known by a name alone.
    fn named(place: u64, name: u64) -> Self {
        let mut chain = Self::new(place);
        chain.say(join(ID, name), 0);
        chain.link();
        chain
    }

    /// Something more is said.
    fn say(&mut self, hash: u64, length: usize) {
        self.tip = join(self.tip, hash);
        self.bytes = self.bytes.saturating_add(u32::try_from(length).unwrap_or(u32::MAX));
    }

    /// What was said up to here may be the beginning of another turn.
    fn link(&mut self) {
        let link = Link { hash: self.tip, bytes: self.bytes };
        self.root.get_or_insert(link);
        if self.links.len() == 2 * KEPT {
            self.links.drain(..KEPT);
        }
        self.links.push(link);
    }

    /// What tells it from other conversations, whatever is said later; `None` if nothing was said.
    pub(super) fn root(&self) -> Option<u64> {
        self.root.map(|link| link.hash)
    }

    /// The last links, the longest first, and then the root.
    pub(super) fn tip_first(&self) -> impl Iterator<Item = Link> + '_ {
        let last = self.links.iter().rev().take(KEPT).copied();
        let was_left_out = self.links.len() > KEPT || self.links.first() != self.root.as_ref();
        last.chain(self.root.filter(|_| was_left_out))
    }

    /// The links that are longer than what is known already, or all of them; the longest first.
    pub(super) fn news(&self, known: Option<Link>) -> impl Iterator<Item = u64> + '_ {
        self.tip_first().take_while(move |link| Some(*link) != known).map(|link| link.hash)
    }

    /// The link that goes on from a known one.
    pub(super) fn after(&self, known: Link) -> Option<u64> {
        let at = self.links.iter().position(|link| *link == known)?;
        self.links.get(at + 1).map(|link| link.hash)
    }

    /// Bytes of all that was said.
    pub(super) fn bytes(&self) -> u32 {
        self.bytes
    }
}

/// What a call says of the conversation that it belongs to.
#[derive(Debug)]
pub(super) struct Clues {
    /// What it is known by.
    pub(super) source: Source,
    /// Its links.
    pub(super) chain: Chain,
    /// Who asks, if that is said.
    pub(super) person: Option<u64>,
}

impl Clues {
    /// A conversation whose client has named it in a header.
    pub(super) fn named(place: u64, name: &[u8]) -> Self {
        // As a text of a body, so that a name is the same wherever it stands.
        let quoted = [b"\"", name, b"\""].concat();
        Self { source: Source::Header, chain: Chain::named(place, join(0, hash(&quoted))), person: None }
    }

    /// What the body of a call tells. One that ends early tells what came before.
    pub(super) fn of(call: &Call, place: u64) -> Self {
        let mut chain = Chain::new(place);
        let Payload::Whole(pieces) = &call.payload else { return Self { source: Source::Chain, chain, person: None } };
        let talk = &call.peek.talk;
        if let Some(name) = talk.session.and_then(|span| text(pieces, span)) {
            return Self { source: Source::Body, chain: Chain::named(place, name), person: None };
        }
        let _ = match call.route {
            Route::Generate | Route::V1Completions => prompt(&mut chain, pieces, talk),
            Route::V1Responses => messages(&mut chain, pieces, talk.system, talk.input),
            Route::V1Messages => messages(&mut chain, pieces, talk.system, talk.messages),
            _ => messages(&mut chain, pieces, None, talk.messages),
        };
        if chain.root.is_none() && chain.bytes > 0 {
            // Only the system spoke.
            chain.link();
        }
        let person = person(pieces, talk).map(|person| join(join(place, PERSON), person));
        Self { source: Source::Chain, chain, person }
    }
}

/// Where the conversations of a call are told apart from those of others: the model, and how it is loaded.
pub(super) fn place(call: &Call) -> u64 {
    let model = call.place.model.as_ref().map_or(0, |model| hash(model.as_str().as_bytes()));
    match (&call.payload, call.peek.options) {
        (Payload::Whole(pieces), Some(options)) => join(model, load_options(pieces, options).unwrap_or_default()),
        _ => join(model, 0),
    }
}

/// The links of a chat.
fn messages(chain: &mut Chain, pieces: &[Bytes], system: Option<Span>, list: Option<Span>) -> Result<(), Malformed> {
    if let Some(span) = system {
        chain.say(digest(&mut Reader::at(pieces, span.start), 0)?, span.end - span.start);
    }
    let Some(span) = list else { return Ok(()) };
    let mut reader = Reader::at(pieces, span.start);
    if reader.peek()? != b'[' {
        // All in one text, as `/v1/responses` takes it: the same as one message of a user.
        let said = join(hash(b"content"), digest(&mut reader, 0)?)
            .wrapping_add(join(hash(b"role"), join(0, hash(b"\"user\""))));
        chain.say(OBJECT.wrapping_add(said), span.end - span.start);
        chain.link();
        return Ok(());
    }
    items(&mut reader, |reader| {
        let start = reader.offset();
        let (said, is_system) = message(reader)?;
        chain.say(said, reader.offset() - start);
        if !is_system || chain.root.is_some() {
            chain.link();
        }
        Ok(())
    })
}

/// The links of a prompt: those of the tokens before it, if it has some, else a link a block.
fn prompt(chain: &mut Chain, pieces: &[Bytes], talk: &Talk) -> Result<(), Malformed> {
    if let Some(span) = talk.images {
        chain.say(digest(&mut Reader::at(pieces, span.start), 0)?, span.end - span.start);
    }
    if let Some(span) = talk.context {
        let mut tokens = Tokens::new(std::mem::take(chain));
        Reader::at(pieces, span.start).parts(span.end - span.start).for_each(|part| tokens.read(part));
        *chain = tokens.finish();
        return Ok(());
    }
    if let Some(span) = talk.system {
        chain.say(digest(&mut Reader::at(pieces, span.start), 0)?, span.end - span.start);
    }
    let Some(span) = talk.prompt else { return Ok(()) };
    let mut reader = Reader::at(pieces, span.start);
    if reader.peek()? != b'"' {
        chain.say(digest(&mut reader, 0)?, span.end - span.start);
        chain.link();
        return Ok(());
    }
    let mut blocks = Blocks::new(std::mem::take(chain));
    // The quote at its end is not part of what it goes on from.
    reader.parts(span.end - span.start - 1).for_each(|part| blocks.read(part));
    *chain = blocks.finish();
    Ok(())
}

/// Who asks: OpenAI's `user`, Anthropic's `metadata.user_id`.
fn person(pieces: &[Bytes], talk: &Talk) -> Option<u64> {
    if let Some(user) = talk.user {
        return text(pieces, user);
    }
    let mut found = None;
    let mut reader = Reader::at(pieces, talk.metadata?.start);
    if reader.peek() == Ok(b'{') {
        let _ = members(&mut reader, |key, reader| {
            let (_, span) = reader.value()?;
            if key == b"user_id" {
                found = text(pieces, span);
            }
            Ok(())
        });
    }
    found
}

/// The hash of a text, if it is one and not empty.
fn text(pieces: &[Bytes], span: Span) -> Option<u64> {
    let reader = Reader::at(pieces, span.start);
    let is_text = reader.clone().peek() == Ok(b'"') && span.end - span.start > 2;
    is_text.then(|| hash_next(&reader, span.end - span.start))
}

/// The hash of the options that a runner is started with.
fn load_options(pieces: &[Bytes], options: Span) -> Result<u64, Malformed> {
    let mut reader = Reader::at(pieces, options.start);
    if reader.peek()? != b'{' {
        return Ok(0);
    }
    let mut sum = 0_u64;
    members(&mut reader, |key, reader| {
        let is_null = reader.peek()? == b'n';
        let value = digest(reader, 1)?;
        if LOAD_OPTIONS.contains(&key) && !is_null {
            sum = sum.wrapping_add(join(hash(key), value));
        }
        Ok(())
    })?;
    Ok(sum)
}

/// The hash of a message, and whether it is the system's.
fn message(reader: &mut Reader<'_>) -> Result<(u64, bool), Malformed> {
    if reader.peek()? != b'{' {
        return Ok((digest(reader, 0)?, false));
    }
    let mut is_system = false;
    let mut sum = OBJECT;
    members(reader, |key, reader| {
        if key.eq_ignore_ascii_case(b"role") && reader.peek()? == b'"' {
            let from = reader.clone();
            let inner = reader.clone().string()?;
            is_system = matches!(&*cut(&from, inner.end + 1 - from.offset()), br#""system""# | br#""developer""#);
        }
        sum = sum.wrapping_add(member(key, reader, 0)?);
        Ok(())
    })?;
    Ok((sum, is_system))
}

/// The hash of any value.
fn digest(reader: &mut Reader<'_>, depth: usize) -> Result<u64, Malformed> {
    match reader.peek()? {
        b'{' if depth < DEEPEST => {
            // A sum, since the order of members says nothing.
            let mut sum = OBJECT;
            members(reader, |key, reader| {
                sum = sum.wrapping_add(member(key, reader, depth)?);
                Ok(())
            })?;
            Ok(sum)
        }
        b'[' if depth < DEEPEST => {
            let mut all = LIST;
            items(reader, |reader| {
                all = join(all, digest(reader, depth + 1)?);
                Ok(())
            })?;
            Ok(all)
        }
        _ => {
            let from = reader.clone();
            let (_, span) = reader.value()?;
            Ok(hash_next(&from, span.end - span.start))
        }
    }
}

/// What a member adds to the hash of its object.
fn member(key: &[u8], reader: &mut Reader<'_>, depth: usize) -> Result<u64, Malformed> {
    if key == b"cache_control" || reader.peek()? == b'n' {
        reader.value()?;
        return Ok(0);
    }
    Ok(join(hash(key), digest(reader, depth + 1)?))
}

/// Visits the members of an object that is next: the key as it is written, and the reader before the value.
fn members<'a>(
    reader: &mut Reader<'a>,
    mut visit: impl FnMut(&[u8], &mut Reader<'a>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    if !reader.take(b'{')? || reader.take(b'}')? {
        return Ok(());
    }
    loop {
        reader.peek()?;
        // The quote before it is cut off again.
        let from = reader.clone();
        let inner = reader.string()?;
        let key = cut(&from, inner.end - inner.start + 1);
        if !reader.take(b':')? {
            return Err(Malformed);
        }
        visit(key.get(1..).unwrap_or_default(), reader)?;
        if !reader.take(b',')? {
            return reader.take(b'}')?.then_some(()).ok_or(Malformed);
        }
    }
}

/// Visits the items of a list that is next.
fn items<'a>(
    reader: &mut Reader<'a>,
    mut visit: impl FnMut(&mut Reader<'a>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    if !reader.take(b'[')? || reader.take(b']')? {
        return Ok(());
    }
    loop {
        reader.peek()?;
        visit(reader)?;
        if !reader.take(b',')? {
            return reader.take(b']')?.then_some(()).ok_or(Malformed);
        }
    }
}

/// The next bytes; a copy where a piece of the body ends among them.
fn cut<'a>(from: &Reader<'a>, length: usize) -> Cow<'a, [u8]> {
    match from.slice(length) {
        Some(whole) => Cow::Borrowed(whole),
        None => from.parts(length).flatten().copied().collect(),
    }
}

/// Cuts what is said into blocks, wherever its bytes lie, and gives the chain a link a block.
#[derive(Debug)]
struct Blocks {
    chain: Chain,
    /// The beginning of a block that lies in several parts.
    begun: Vec<u8>,
    count: usize,
    next_link: usize,
    links: usize,
}

impl Blocks {
    fn new(chain: Chain) -> Self {
        Self { chain, begun: Vec::new(), count: 0, next_link: 1, links: 0 }
    }

    fn read(&mut self, mut part: &[u8]) {
        while self.begun.len() + part.len() >= BLOCK {
            let (block, rest) = part.split_at(BLOCK - self.begun.len());
            if self.begun.is_empty() {
                self.block(hash(block));
            } else {
                self.begun.extend_from_slice(block);
                let said = hash(&self.begun);
                self.begun.clear();
                self.block(said);
            }
            part = rest;
        }
        self.begun.extend_from_slice(part);
    }

    fn block(&mut self, said: u64) {
        self.chain.say(said, BLOCK);
        self.count += 1;
        if self.count == self.next_link {
            self.chain.link();
            self.links += 1;
            self.next_link += 1 << (self.links / BLOCKS_OF_A_SIZE).min(32);
        }
    }

    /// The chain up to the end, which is a link too: the next turn may go on from there, or ask the same again.
    fn finish(mut self) -> Chain {
        if !self.begun.is_empty() {
            self.chain.say(hash(&self.begun), self.begun.len());
            self.chain.link();
        } else if self.chain.links.last().map(|link| link.hash) != Some(self.chain.tip) && self.count > 0 {
            self.chain.link();
        }
        self.chain
    }
}

/// Reads a list of tokens into blocks of their digits, however they are spaced.
#[derive(Debug)]
pub(super) struct Tokens(Blocks);

impl Tokens {
    fn new(chain: Chain) -> Self {
        Self(Blocks::new(chain))
    }

    /// Tokens that a server gave to whoever goes on from its answer.
    pub(super) fn of_an_answer(place: u64) -> Self {
        Self::new(Chain::new(place))
    }

    pub(super) fn read(&mut self, part: &[u8]) {
        let is_spacing = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'[' | b']');
        part.split(is_spacing).for_each(|run| self.0.read(run));
    }

    pub(super) fn finish(self) -> Chain {
        self.0.finish()
    }
}

/// The hash of the next bytes, wherever they lie.
fn hash_next(from: &Reader<'_>, length: usize) -> u64 {
    if let Some(whole) = from.slice(length) {
        let mut blocks = whole.chunks_exact(BLOCK);
        let all = blocks.by_ref().fold(0, |all, block| join(all, hash(block)));
        return join(all, hash(blocks.remainder()));
    }
    let mut all = 0;
    let mut begun: Vec<u8> = Vec::with_capacity(BLOCK);
    for mut part in from.parts(length) {
        while begun.len() + part.len() >= BLOCK {
            let (block, rest) = part.split_at(BLOCK - begun.len());
            begun.extend_from_slice(block);
            all = join(all, hash(&begun));
            begun.clear();
            part = rest;
        }
        begun.extend_from_slice(part);
    }
    join(all, hash(&begun))
}

/// The hash of bytes.
fn hash(bytes: &[u8]) -> u64 {
    rapidhash_v3_seeded(bytes, &SECRETS)
}

/// A number made of two; which one comes first matters.
pub(super) fn join(before: u64, next: u64) -> u64 {
    let mut both = [0; 16];
    both[..8].copy_from_slice(&before.to_le_bytes());
    both[8..].copy_from_slice(&next.to_le_bytes());
    hash(&both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Head;
    use crate::cluster::Snapshot;
    use crate::names::ModelName;
    use crate::peek::Peek;
    use http::Method;
    use http::uri::PathAndQuery;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::sync::Arc;

    /// What a call of this body tells, its bytes in pieces of this size.
    fn clues_in(route: Route, body: &str, size: usize) -> Clues {
        let pieces: SmallVec<[Bytes; 1]> = body.as_bytes().chunks(size.max(1)).map(Bytes::copy_from_slice).collect();
        let mut head = Head::new(route, Method::POST, PathAndQuery::from_static("/"));
        head.peek = Peek::json(&pieces);
        head.model = head.peek.model.as_deref().and_then(ModelName::parse);
        let call = Call::new(head, Payload::Whole(pieces), Arc::new(Snapshot::default()).all());
        Clues::of(&call, place(&call))
    }

    fn clues_of(route: Route, body: &Value) -> Clues {
        let text = body.to_string();
        clues_in(route, &text, text.len())
    }

    fn links(route: Route, body: &Value) -> Vec<u64> {
        clues_of(route, body).chain.links.iter().map(|link| link.hash).collect()
    }

    fn chat(messages: &[Value]) -> Value {
        json!({"model": "tiny", "messages": messages})
    }

    fn user(text: &str) -> Value {
        json!({"role": "user", "content": text})
    }

    fn said(text: &str) -> u64 {
        let all = format!(r#"{{"model":"tiny","messages":[{text}]}}"#);
        clues_in(Route::Chat, &all, all.len()).chain.root().unwrap()
    }

    #[test]
    fn the_numbers_are_the_same_in_every_version() {
        let (one, two) = (links(Route::Chat, &chat(&[user("hi")])), links(Route::Generate, &json!({"prompt": "hi"})));
        assert_eq!((one, two), (vec![6_793_973_578_239_556_053], vec![5_913_482_266_363_015_544]));
    }

    #[test]
    fn the_next_turn_goes_on_from_this_one() {
        let turn = [json!({"role": "system", "content": "be kind"}), user("hi")];
        let next = [&turn[..], &[json!({"role": "assistant", "content": "hello"}), user("more")]].concat();
        let (one, two) = (links(Route::Chat, &chat(&turn)), links(Route::Chat, &chat(&next)));
        assert_eq!((one.len(), two.len()), (1, 3), "what the system says is no link");
        assert_eq!(two[..1], one[..]);
        for route in [Route::V1Chat, Route::V1Messages] {
            assert_eq!(links(route, &chat(&next)), two, "{route:?}");
        }
        let responses = json!({"model": "tiny", "input": next});
        assert_eq!(links(Route::V1Responses, &responses), two);
        let (text, list) = (json!({"model": "tiny", "input": "hi"}), json!({"model": "tiny", "input": [user("hi")]}));
        assert_eq!(links(Route::V1Responses, &text), links(Route::V1Responses, &list));
    }

    #[test]
    fn what_the_system_says_belongs_to_what_follows() {
        let with = |system: Value| json!({"model": "tiny", "system": system, "messages": [user("hi")]});
        let bare = links(Route::V1Messages, &chat(&[user("hi")]));
        let one = links(Route::V1Messages, &with("be kind".into()));
        let other = links(Route::V1Messages, &with(json!([{"type": "text", "text": "be kind"}])));
        assert!(bare != one && one != other && one.len() == 1);
        assert_eq!(clues_of(Route::Chat, &chat(&[json!({"role": "system", "content": "hi"})])).chain.links.len(), 1);
    }

    #[test]
    fn only_what_a_server_reads_makes_a_difference() {
        let wanted = said(r#"{"role":"user","content":"hi"}"#);
        for same in [
            r#"{ "role" : "user",  "content":"hi" }"#,
            r#"{"content":"hi","role":"user"}"#,
            r#"{"role":"user","content":"hi","tool_calls":null}"#,
            r#"{"role":"user","content":"hi","cache_control":{"type":"ephemeral"}}"#,
        ] {
            assert_eq!(said(same), wanted, "{same}");
        }
        for other in [
            r#"{"role":"tool","content":"hi"}"#,
            r#"{"role":"user","content":"hi "}"#,
            r#"{"role":"user","content":["hi"]}"#,
            r#"{"role":"user","content":"hi","images":["aGk="]}"#,
            r#"{"role":"user","content":"hi","tool_name":"x"}"#,
            r#"{"role":"user","content":{"hi":1}}"#,
        ] {
            assert_ne!(said(other), wanted, "{other}");
        }
        let block = |more| format!(r#"{{"role":"user","content":[{{"type":"text","text":"hi"{more}}}]}}"#);
        assert_eq!(said(&block("")), said(&block(r#","cache_control":{"type":"ephemeral"}"#)));
        assert_ne!(said(r#"{"content":["a","b"]}"#), said(r#"{"content":["b","a"]}"#));
    }

    #[test]
    fn a_model_and_how_it_is_loaded_tell_conversations_apart() {
        let with = |more: Value| {
            let mut body = chat(&[user("hi")]);
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            links(Route::Chat, &body)
        };
        let plain = with(json!({}));
        assert_eq!(with(json!({"options": {"temperature": 1, "num_ctx": null}, "stream": false})), plain);
        assert_eq!(with(json!({"model": "TINY:latest"})), plain);
        assert_ne!(with(json!({"model": "other"})), plain);
        assert_ne!(with(json!({"options": {"num_ctx": 8192}})), plain);
    }

    #[test]
    fn a_prompt_that_grows_keeps_its_blocks() {
        let text: String = (b'a'..b'x').cycle().take(6000).map(char::from).collect();
        let of = |length: usize| links(Route::Generate, &json!({"model": "tiny", "prompt": text[..length]}));
        let (short, long) = (of(3000), of(5000));
        assert_eq!((short.len(), long.len()), (3, 5));
        assert_eq!(short[..2], long[..2]);
        assert_eq!(links(Route::V1Completions, &json!({"model": "tiny", "prompt": text[..5000]})), long);
        assert_eq!(of(2047).len(), 2, "the quote before it is part of the first block");
    }

    #[test]
    fn a_long_prompt_has_a_short_chain() {
        let body = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(20 << 20));
        let chain = clues_in(Route::Generate, &body, 10_007).chain;
        assert!(chain.links.len() <= 2 * KEPT && chain.tip_first().count() == KEPT + 1);
        assert_eq!(chain.tip_first().last(), chain.root);
        assert_eq!(chain, clues_in(Route::Generate, &body, body.len()).chain);
    }

    #[test]
    fn tokens_are_the_same_however_they_are_spaced() {
        let list: Vec<u32> = (100..900).collect();
        let dense = serde_json::to_string(&list).unwrap();
        let of = |list: &str| clues_in(Route::Generate, &format!(r#"{{"context":{list},"prompt":"x"}}"#), 999).chain;
        assert_eq!(of(&dense), of(&dense.replace(',', ", \n")));
        let mut answered = Tokens::of_an_answer(join(0, 0));
        dense.as_bytes()[1..].chunks(7).for_each(|part| answered.read(part));
        assert_eq!(answered.finish(), of(&dense));
    }

    #[test]
    fn a_name_in_the_body_is_all_that_counts() {
        let with = |key: &str, text: &str| {
            clues_of(Route::V1Chat, &json!({"model": "m", "messages": [user(text)], "prompt_cache_key": key}))
        };
        let (one, same, other) = (with("a", "hi"), with("a", "what"), with("b", "hi"));
        assert!(
            one.source == Source::Body
                && one.chain.root() == same.chain.root()
                && one.chain.root() != other.chain.root()
        );
        assert_eq!(with("", "hi").source, Source::Chain);
        let call = Call::new(
            Head::new(Route::Chat, Method::POST, PathAndQuery::from_static("/")),
            Payload::empty(),
            Arc::new(Snapshot::default()).all(),
        );
        let unnamed_model = clues_of(Route::V1Chat, &json!({"prompt_cache_key": "a"}));
        assert_eq!(
            Clues::named(place(&call), b"a").chain.root(),
            unnamed_model.chain.root(),
            "the same name in a header"
        );
    }

    #[test]
    fn who_asks_is_known_in_both_dialects() {
        let openai = clues_of(Route::V1Chat, &json!({"messages": [user("hi")], "user": "ada"}));
        let anthropic =
            clues_of(Route::V1Messages, &json!({"messages": [user("hi")], "metadata": {"x": {}, "user_id": "ada"}}));
        assert!(openai.person.is_some() && openai.person == anthropic.person);
        assert!(clues_of(Route::V1Messages, &json!({"messages": [user("hi")], "metadata": null})).person.is_none());
    }

    #[test]
    fn an_endless_list_of_messages_has_a_short_chain() {
        let all: Vec<Value> = (0..1000).map(|n| user(&n.to_string())).collect();
        let chain = |count: usize| clues_of(Route::Chat, &chat(&all[..count])).chain;
        let (one, two) = (chain(998), chain(1000));
        assert!(one.links.len() <= 2 * KEPT);
        let tip = one.tip_first().next().unwrap();
        assert!(two.tip_first().any(|link| link == tip));
        assert_eq!(two.news(Some(tip)).count(), 2);
        assert_eq!(two.after(tip), two.tip_first().nth(1).map(|link| link.hash));
    }

    #[test]
    fn what_ends_early_tells_what_came_before() {
        let whole = clues_of(Route::Chat, &chat(&[user("hi"), user("ho")])).chain;
        let early = clues_in(Route::Chat, r#"{"model":"tiny","messages":[{"role":"user","content":"hi"},{"ro"#, 5);
        assert_eq!(early.chain.root(), None, "a value that does not end is no member");
        assert_eq!(whole.links.len(), 2);
        let nested = format!(r#"{{"messages":[{}1{}]}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(clues_in(Route::Chat, &nested, nested.len()).chain.root().is_some());
    }

    fn message() -> impl Strategy<Value = Value> {
        let content = prop_oneof![
            any::<String>().prop_map(Value::from),
            proptest::collection::vec(any::<String>(), 0..3)
                .prop_map(|texts| texts.into_iter().map(|text| json!({"type": "text", "text": text})).collect())
        ];
        (prop_oneof!["user", "assistant", "tool"], content)
            .prop_map(|(role, content)| json!({"role": role, "content": content}))
    }

    proptest! {
        #[test]
        fn a_message_more_keeps_the_links_before_it(messages in proptest::collection::vec(message(), 1..9), more in message()) {
            let one = links(Route::Chat, &chat(&messages));
            let two = links(Route::Chat, &chat(&[&messages[..], &[more]].concat()));
            prop_assert_eq!(&two[..one.len()], &one[..]);
            prop_assert_eq!(two.len(), messages.len() + 1);
        }

        #[test]
        fn another_message_is_another_chain_from_there_on(
            messages in proptest::collection::vec(message(), 1..9),
            other in message(),
            at in any::<prop::sample::Index>()
        ) {
            let at = at.index(messages.len());
            prop_assume!(messages[at] != other);
            let mut changed = messages.clone();
            changed[at] = other;
            let (one, two) = (links(Route::Chat, &chat(&messages)), links(Route::Chat, &chat(&changed)));
            prop_assert_eq!(&one[..at], &two[..at]);
            prop_assert!(one[at..].iter().zip(&two[at..]).all(|(one, two)| one != two));
        }

        #[test]
        fn a_body_in_pieces_is_the_same_body(messages in proptest::collection::vec(message(), 1..9), size in 1_usize..64) {
            let body = chat(&messages).to_string();
            prop_assert_eq!(
                clues_in(Route::Chat, &body, size).chain,
                clues_in(Route::Chat, &body, body.len()).chain
            );
        }

        #[test]
        fn a_prompt_in_pieces_is_the_same_prompt(text in "\\PC{0,4000}", size in 1_usize..3000) {
            let body = json!({"prompt": text}).to_string();
            prop_assert_eq!(
                clues_in(Route::Generate, &body, size).chain,
                clues_in(Route::Generate, &body, body.len()).chain
            );
        }

        #[test]
        fn no_bytes_make_it_fail(bytes in "[\\[\\]{}:,\"a-z\\\\ 0]{0,200}", route in prop_oneof![Just(Route::Chat), Just(Route::Generate)]) {
            for key in ["messages", "prompt", "context", "metadata", "options"] {
                let _ = clues_in(route, &format!(r#"{{"{key}":{bytes}}}"#), 7);
            }
        }
    }
}
